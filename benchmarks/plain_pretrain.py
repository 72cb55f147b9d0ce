"""A plain transformers loop, to hold `itune pretrain` against: same config, tokenizer and budget.

    python benchmarks/plain_pretrain.py RUN TEXT FOLDER

RUN is a finished `itune pretrain` run of a decoder: its config, tokenizer, number of steps, tokens
a step, length, learning rate and schedule are taken. TEXT is the training file (Parquet or JSONL
with a column `text`). Documents are joined with their ends between and cut into blocks of one
length, as transformers' own run_clm.py does. The model goes to FOLDER; score both by one measure:

    itune eval --run RUN
    itune eval --recipe RUN/recipe.yaml --model FOLDER
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml


def blocks(text: str, tokenizer: Any, length: int) -> torch.Tensor:
    """The documents of a file, one after the other with their ends, in blocks; [blocks, length]."""
    kind = "parquet" if text.endswith("parquet") else "json"
    rows = datasets.load_dataset(kind, data_files=text, split="train")
    ids: list[int] = []
    for document in rows["text"]:
        ids += [*tokenizer(document, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def main() -> None:
    """Train, save, and say how long it took."""
    asked = argparse.ArgumentParser(description=__doc__)
    for name in ("run", "text", "folder"):
        asked.add_argument(name)
    given = asked.parse_args()
    run = Path(given.run)
    settings = yaml.safe_load((run / "recipe.yaml").read_text())["training"]
    steps = json.loads((run / "run.json").read_text())["steps"]
    length, seed = settings["max_length"], settings["seed"]
    a_step = settings["tokens_per_step"] // length
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    config = transformers.AutoConfig.from_pretrained(run / "model")
    data = blocks(given.text, tokenizer, length)
    transformers.set_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=float(settings["learning_rate"]),
        betas=(settings["adam_beta1"], settings["adam_beta2"]),
        weight_decay=settings["weight_decay"],
        fused=True,
    )
    warmup = settings["warmup_steps"]
    schedule = transformers.get_scheduler(
        settings["lr_scheduler_type"],
        optimizer,
        int(warmup if warmup >= 1 else warmup * steps),
        steps,
    )
    order = list(range(len(data)))
    random.Random(seed).shuffle(order)
    model.train()
    begun = time.process_time()
    for step in range(steps):
        rows = [order[k % len(order)] for k in range(step * a_step, (step + 1) * a_step)]
        loss = model(input_ids=data[rows], labels=data[rows]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["max_grad_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    tokens = steps * a_step * length
    spent = time.process_time() - begun
    print(f"{steps} steps, {tokens:,} tokens, {spent:.0f} CPU s ({tokens / spent:,.0f} a second)")
    model.save_pretrained(given.folder)
    tokenizer.save_pretrained(given.folder)


if __name__ == "__main__":
    main()
