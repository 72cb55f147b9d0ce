"""TRL's `SFTTrainer` on the workload, as its command line sets it up.

python benchmarks/run_trl.py FOLDER pad|pack|padfree [--rows tenth] [--full]
"""

from __future__ import annotations

import engines
import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

given = engines.asked(__doc__, ["pad", "pack", "padfree"])
if given.device == "cpu":
    torch.set_num_threads(1)
suffix = "-tenth" if given.rows == "tenth" else ""
modes = {
    "pad": {"per_device_train_batch_size": given.batch or 8, "max_length": given.length},
    "pack": {
        "packing": True,
        "per_device_train_batch_size": given.batch or 2,
        "max_length": given.length,
    },
    "padfree": {
        "padding_free": True,
        "per_device_train_batch_size": given.batch or 8,
        "max_length": None,
    },
}
loaded = {"dtype": engines.dtype(given)}
if given.attention:
    loaded["attn_implementation"] = given.attention
trainer = SFTTrainer(
    "model",
    args=SFTConfig(
        "out-trl",
        model_init_kwargs=loaded,
        **engines.of_trainer(given),
        **modes[given.mode],
    ),
    train_dataset=load_dataset("json", data_files=f"pairs{suffix}.jsonl", split="train"),
    peft_config=None
    if given.full
    else LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
