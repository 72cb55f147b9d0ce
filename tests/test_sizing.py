"""Micro-batches as large as a GPU's memory holds, with a memory that is made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import folder_with, losses_of

from itune import losses, memory

Cli = Callable[..., Any]
SHORT = ("tune", "-r", "tune.yaml", "-s", "training.max_steps=4")


class Gpu:
    """A device of so many bytes, of which a token of a micro-batch takes a thousand.

    Gradients that are made meanwhile are counted, as the device's allocator would.
    """

    def __init__(self, size: int, patch: pytest.MonkeyPatch) -> None:
        self.size, self.trials, self.tokens, self.made = size, 0, 0, 0
        real, gpu = losses.summed, self

        class Peak:
            def __init__(self, _: Any) -> None:
                self.bytes = 0

            def __enter__(self) -> Peak:
                gpu.trials += 1
                return self

            def __exit__(self, *_: object) -> None:
                self.bytes = 1000 * gpu.tokens + gpu.made

        def summed(model: Any, batch: Any, **given: Any) -> Any:
            self.tokens = batch.ids.numel()
            if model.training and 1000 * self.tokens > self.size:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            trained = [p for p in model.parameters() if p.requires_grad]
            self.made = sum(p.nbytes for p in trained if p.grad is None)
            return real(model, batch, **given)

        patch.setattr(memory, "left", lambda _: self.size)
        patch.setattr(memory, "Peak", Peak)
        patch.setattr(losses, "summed", summed)


TRAINED = 8192 * 4  # bytes of the adapter, and so of its gradients


def test_a_micro_batch_is_as_large_as_the_memory_that_is_left(
    tmp_path: Path, tiny_model_dir: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_with(tmp_path, tiny_model_dir)
    recipe = tmp_path / "tune.yaml"
    recipe.write_text(recipe.read_text().replace("micro_batch_tokens: 120, ", ""))
    wanted = int((0.9 * 220_000 - 3 * TRAINED) / 1000)
    by_hand = ("-s", f"training.micro_batch_tokens={wanted}", "-o", "runs/by-hand")
    assert cli(*SHORT, *by_hand).code == 0
    with monkeypatch.context() as patch:
        gpu = Gpu(220_000, patch)
        ended = cli(*SHORT, "-o", "runs/tried")
    assert ended.code == 0, ended.err
    found = [line for line in ended.err.splitlines() if line.startswith("micro-batches: up to")]
    # All but its moments: Adam counts its steps, too, in a number for each of its tensors.
    assert len(found) == 1
    chosen = json.loads((tmp_path / "runs/tried/run.json").read_text())["micro_batch_tokens"]
    assert wanted - 1 <= chosen <= wanted
    assert gpu.trials == 2  # a whole step of 300 tokens does not fit
    weights = "model/adapter_model.safetensors"
    tried, hand = tmp_path / "runs/tried", tmp_path / "runs/by-hand"
    assert (tried / weights).read_bytes() == (hand / weights).read_bytes()
    assert losses_of(tried) == losses_of(hand)
