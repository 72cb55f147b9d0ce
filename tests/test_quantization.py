"""An adapter on a base of few bits: trained, scored, merged into the float base, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LORA = "adapter={peft_type: lora, r: 4, target_modules: all-linear}"
RECIPE = """
model: {name: MODEL}
adapter: {peft_type: lora, r: 4, target_modules: all-linear}
data:
  train: {path: rows.jsonl, template: sentiment}
  eval: {path: rows.jsonl, split: "train[:6]", template: sentiment}
  allow_overlap: true
training: {max_steps: 6, tokens_per_step: 400, max_length: 128, learning_rate: 5.0e-3}
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path) -> str:
    rows = [
        {"text": f"number {k} is {'fine' if k % 2 else 'poor'}", "label": k % 2} for k in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "few.yaml").write_text(RECIPE.replace("MODEL", str(tiny_model_dir)))
    return "few.yaml"


@pytest.mark.parametrize(
    "bits",
    [
        "load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: true",
        "load_in_8bit: true",
    ],
)
def test_an_adapter_on_few_bits_learns_and_merges_into_the_float_base(
    bits: str, recipe: str, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    import torch
    import transformers

    few = f"quantization={{quant_method: bitsandbytes, {bits}}}"
    made = cli("tune", "-r", recipe, "-s", few, "-s", "output.merge=true")
    assert made.code == 0, made.err
    log = [json.loads(line) for line in (tmp_path / "runs/few/log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "runs/few/merged")
    assert whole.dtype == torch.float32
    assert not hasattr(whole.config, "quantization_config")
    assert cli("eval", "--run", "runs/few").code == 0


@pytest.mark.parametrize(
    ("section", "without", "said"),
    [
        ("{load_in_4bit: true}", (), "quant_method is missing"),
        ("{quant_method: bitsandbyte}", (), "bitsandbytes"),
        ("{quant_method: bitsandbytes, load_in_4bits: true}", (), "load_in_4bit"),
        (
            "{quant_method: bitsandbytes, load_in_4bit: true}",
            ("-s", "adapter=null"),
            "Add an adapter",
        ),
    ],
)
def test_a_wrong_section_is_refused(
    section: str, without: tuple[str, ...], said: str, recipe: str, cli: Callable[..., Any]
) -> None:
    ended = cli("tune", "-r", recipe, "-s", f"quantization={section}", *without)
    assert ended.code == 2, ended.err
    assert said in ended.err


def test_kernels_for_a_gpu_are_refused_without_one(recipe: str, cli: Callable[..., Any]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    ended = cli("tune", "-r", recipe, "-s", "training.use_liger_kernel=true")
    assert ended.code == 3
    assert "use_liger_kernel" in ended.err
