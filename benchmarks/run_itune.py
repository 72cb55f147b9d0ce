"""`itune tune` on the workload.

python benchmarks/run_itune.py FOLDER packed|padded [--rows tenth] [--full]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import engines

given = engines.asked(__doc__, ["packed", "padded"])
training = {
    "tokens_per_step": given.tokens,
    "max_length": given.length,
    "learning_rate": 2e-4,
    "save_steps": 1_000_000,
    "packing": given.mode == "packed",
    "gradient_checkpointing": given.recompute,
    "use_liger_kernel": given.liger,
    "torch_compile": given.compile,
}
if given.batch:
    training["micro_batch_tokens"] = given.batch * given.length
recipe = {
    "model": {"name": "model", "dtype": "float32" if given.device == "cpu" else "bfloat16"},
    "data": {"train": {"path": f"{given.rows}.jsonl", "template": "chat"}},
    "training": training,
}
if given.attention:
    recipe["model"]["attn_implementation"] = given.attention
if not given.full:
    recipe["adapter"] = {
        "peft_type": "lora",
        "r": 16,
        "lora_alpha": 32,
        "target_modules": "all-linear",
    }
Path("tune.yaml").write_text(json.dumps(recipe, indent=1))  # which is YAML, too
command = [sys.executable, "-m", "itune", "tune", "--recipe", "tune.yaml", "--fresh", "--quiet"]
os.execv(sys.executable, command)
