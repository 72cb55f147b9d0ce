"""Plain `transformers.Trainer` with PEFT on the workload, the loss on answers alone.

python benchmarks/run_trainer.py FOLDER pad|group|flat [--rows tenth] [--full]

pad: random batches of 8, padded. group: batches of 8 of like length. flat: rows one after the other
without padding, about as many tokens a step.
"""

from __future__ import annotations

import engines
import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

given = engines.asked(__doc__, ["pad", "group", "flat"])
if given.device == "cpu":
    torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained("model")


def prepare(row: dict) -> dict:
    """Ids of a conversation, and labels on its answer."""
    head = tokenizer.apply_chat_template(
        row["messages"][:1], add_generation_prompt=True, tokenize=False
    )
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False).rstrip("\n")
    prompt = tokenizer(head, add_special_tokens=False).input_ids
    ids = tokenizer(text, add_special_tokens=False).input_ids[: given.length]
    labels = [-100] * len(prompt) + ids[len(prompt) :]
    return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}


rows = load_dataset("json", data_files=f"{given.rows}.jsonl", split="train")
rows = rows.map(prepare, remove_columns=rows.column_names)
model = AutoModelForCausalLM.from_pretrained(
    "model", dtype=engines.dtype(given), attn_implementation=given.attention
)
if not given.full:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        model,
        LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
flat = given.mode == "flat"
arguments = TrainingArguments(
    "out-trainer",
    per_device_train_batch_size=given.batch or 8,
    logging_steps=10,
    **engines.of_trainer(given),
    **({"train_sampling_strategy": "group_by_length"} if given.mode == "group" else {}),
)
collate = DataCollatorWithFlattening() if flat else DataCollatorForSeq2Seq(tokenizer, padding=True)
Trainer(model, arguments, train_dataset=rows, data_collator=collate).train()
