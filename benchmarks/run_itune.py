"""`itune tune` on the workload.

python benchmarks/run_itune.py FOLDER MODE [--rows tenth] [--full]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

RECIPE = """\
model: {{name: model, dtype: float32}}
{adapter}
data: {{train: {{path: {rows}.jsonl, template: chat}}}}
training: {{tokens_per_step: 1280, max_length: 512, learning_rate: 2.0e-4, save_steps: 1000000}}
"""
ADAPTER = "adapter: {peft_type: lora, r: 16, lora_alpha: 32, target_modules: all-linear}"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path)
parser.add_argument("mode", choices=["packed", "padded"])
parser.add_argument("--rows", default="rows", choices=["rows", "tenth"])
parser.add_argument("--full", action="store_true", help="all weights instead of an adapter")
given = parser.parse_args()
os.chdir(given.folder)
recipe = Path("tune.yaml")
recipe.write_text(RECIPE.format(adapter="" if given.full else ADAPTER, rows=given.rows))
command = [sys.executable, "-m", "itune", "tune", "--recipe", "tune.yaml", "--fresh", "--quiet"]
if given.mode == "padded":
    command += ["--set", "training.packing=false"]
os.execv(sys.executable, command)
