"""`llamafactory-cli train` on the workload, in float32.

python benchmarks/run_llamafactory.py FOLDER pad|neat [--rows tenth] [--full]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import engines

given = engines.asked(__doc__, ["pad", "neat"])
neat = given.mode == "neat"
settings = {
    "model_name_or_path": "model",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "full" if given.full else "lora",
    "dataset_dir": ".",
    "dataset": "alpaca-tenth" if given.rows == "tenth" else "alpaca",
    "template": "chatml",
    "cutoff_len": 512,
    "packing": neat,
    "neat_packing": neat,
    "per_device_train_batch_size": 2 if neat else 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-4,
    "num_train_epochs": 1,
    "output_dir": "out-llamafactory",
    "overwrite_output_dir": True,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_gradient_checkpointing": True,
}
if not given.full:
    settings |= {"lora_rank": 16, "lora_alpha": 32, "lora_target": "all"}
Path("llamafactory.json").write_text(json.dumps(settings))
program = str(Path(sys.executable).with_name("llamafactory-cli"))
os.execv(program, [program, "train", "llamafactory.json"])
