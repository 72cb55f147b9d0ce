"""TRL's `SFTTrainer` on the workload, as its command line sets it up, in float32.

python benchmarks/run_trl.py FOLDER pad|pack|padfree [--rows tenth] [--full]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path)
parser.add_argument("mode", choices=["pad", "pack", "padfree"])
parser.add_argument("--rows", default="rows", choices=["rows", "tenth"])
parser.add_argument("--full", action="store_true", help="all weights instead of an adapter")
given = parser.parse_args()
os.chdir(given.folder)
torch.set_num_threads(1)
suffix = "-tenth" if given.rows == "tenth" else ""
modes = {
    "pad": {"per_device_train_batch_size": 8, "max_length": 512},
    "pack": {"packing": True, "per_device_train_batch_size": 2, "max_length": 512},
    "padfree": {"padding_free": True, "per_device_train_batch_size": 8, "max_length": None},
}
trainer = SFTTrainer(
    "model",
    args=SFTConfig(
        "out-trl",
        num_train_epochs=1,
        learning_rate=2e-4,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        model_init_kwargs={"dtype": torch.float32},
        **modes[given.mode],
    ),
    train_dataset=load_dataset("json", data_files=f"pairs{suffix}.jsonl", split="train"),
    peft_config=None
    if given.full
    else LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
