"""What `--plan` says beside what the runs then took: memory and seconds over many configurations.

    python benchmarks/forecast.py [--folder DIR] [--only NAME ...]

Each configuration is planned and then run, one after the other, on rows and models that are made on
the spot. Writes and prints a table for docs/plan.md; exits with 1 where a memory is off by more
than 15 % or a time by more than 25 %. About a quarter of an hour on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import workload

LORA = "adapter={peft_type: lora, r: 16, lora_alpha: 32}"
CUT = ("launch.num_processes=2", "launch.fsdp=true")
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
}
# Folder of a tokenizer with so many entries, and what is changed of a Llama's config.
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "narrow": (32_000, {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}),
    "deep": (32_000, {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12}),
    "wide": (96_000, {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4}),
    "large": (32_000, {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}),
    "t5": (
        32_000,
        {
            "model_type": "t5",
            "architectures": ["T5ForConditionalGeneration"],
            "d_model": 256,
            "d_ff": 1024,
            "d_kv": 32,
            "num_layers": 4,
            "num_heads": 8,
            "decoder_start_token_id": 0,
        },
    ),
    "gpt2": (
        32_000,
        {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_embd": 384,
            "n_layer": 6,
            "n_head": 6,
        },
    ),
}
CONFIGURATIONS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    # name: model, steps, settings
    "all weights": ("narrow", 30, ()),
    "LoRA": ("narrow", 30, (LORA,)),
    "LoRA, deep": ("deep", 10, (LORA,)),
    "all weights, deep": ("deep", 10, ()),
    "deep, recomputed": ("deep", 8, ("training.gradient_checkpointing=true",)),
    "deep, adafactor": ("deep", 10, ("training.optim=adafactor",)),
    "deep, padded": ("deep", 8, ("training.packing=false",)),
    "small micro-batches": ("deep", 10, ("training.micro_batch_tokens=512",)),
    "vocabulary of 96,000": ("wide", 10, ()),
    "the same, LoRA": ("wide", 10, (LORA,)),
    "large": ("large", 4, ()),
    "large, LoRA": ("large", 5, (LORA,)),
    "large, cut in two": ("large", 4, CUT),
    "large, cut in two, layers kept": ("large", 4, (*CUT, "launch.reshard_after_forward=false")),
    "large, LoRA, cut in two": ("large", 5, (LORA, *CUT)),
    "large, DoRA": ("large", 4, ("adapter={peft_type: lora, r: 8, use_dora: true}",)),
    "GPT-2": ("gpt2", 20, ()),
    "T5": ("t5", 20, ()),
    "bfloat16, LoRA": ("large", 5, (LORA, "model.dtype=bfloat16")),
}


def make(folder: Path, name: str) -> None:
    """A model's folder: tokenizer, config and random weights."""
    import torch
    import transformers

    vocabulary, changed = MODELS[name]
    source = folder / f"tokenizer-{vocabulary}"
    if not source.is_dir():
        workload.write(source, vocabulary=vocabulary)
    made = folder / name
    shutil.copytree(source / "model", made)
    (made / "model.safetensors").unlink()
    config = {**LLAMA, **changed, "vocab_size": vocabulary}
    (made / "config.json").write_text(json.dumps(config))
    torch.manual_seed(workload.SEED)
    loaded = transformers.AutoConfig.from_pretrained(made)
    kind = getattr(transformers, config["architectures"][0])
    kind(loaded).save_pretrained(made)
    if not (folder / "rows.jsonl").exists():
        shutil.copy(source / "rows.jsonl", folder / "rows.jsonl")


def itune(folder: Path, *arguments: str) -> dict[str, Any]:
    """One command of itune's and what it printed as JSON."""
    ended = subprocess.run(
        [sys.executable, "-m", "itune", *arguments, "--json"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        sys.exit(f"{' '.join(arguments)}: {ended.stderr}")
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def measured(folder: Path, name: str) -> dict[str, Any]:
    """What was planned and what it took, of one configuration."""
    model, steps, settings = CONFIGURATIONS[name]
    if not (folder / model).is_dir():
        make(folder, model)
    sets = (
        f"model.name={model}",
        "model.dtype=float32",
        "data.train={path: rows.jsonl, template: chat}",
        "training={tokens_per_step: 4096, max_length: 512, save_steps: 1000000}",
        f"training.max_steps={steps}",
        *settings,
    )
    given = ["tune", *(part for each in sets for part in ("--set", each))]
    found = itune(folder, *given, "--plan")
    output = folder / "run"
    took = itune(folder, *given, "--output", str(output), "--fresh")
    memory = json.loads((output / "run.json").read_text())["memory"]
    shutil.rmtree(output)
    return {
        "planned_memory": found["memory_bytes"]["peak"],
        "memory": memory["device"] or memory["process"],
        "planned_seconds": found["seconds"],
        "seconds": took["seconds"],
        "how": found["how"],
        "trainable": found["trainable"],
    }


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("forecast-bench"))
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    asked = parser.parse_args()
    folder = asked.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    lines, off = [], []
    print("| configuration | trained | GB planned | GB | off | s planned | s | off |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for name in asked.only:
        each = measured(folder, name)
        memory = each["planned_memory"] / each["memory"] - 1
        seconds = each["planned_seconds"] / each["seconds"] - 1
        line = (
            f"| {name} | {each['trainable']:,} | {each['planned_memory'] / 1e9:.2f} "
            f"| {each['memory'] / 1e9:.2f} | {memory:+.0%} | {each['planned_seconds']:.1f} "
            f"| {each['seconds']:.1f} | {seconds:+.0%} |"
        )
        print(line, flush=True)
        lines.append(line)
        if abs(memory) > 0.15 or abs(seconds) > 0.25:
            off.append(name)
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    if off:
        sys.exit(f"off by more than is promised: {', '.join(off)}")


if __name__ == "__main__":
    main()
