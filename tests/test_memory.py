"""A step that does not fit the memory is done in smaller micro-batches, to the same result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import folder_with, losses_of

from itune import losses

Cli = Callable[..., Any]


def holds(limit: int, patch: pytest.MonkeyPatch, *, allocator: bool) -> None:
    """A device whose memory ends with micro-batches of more tokens, once the forward is done."""
    real = losses.summed

    def summed(model: Any, batch: Any, **given: Any) -> Any:
        loss = real(model, batch, **given)
        if model.training and batch.ids.numel() > limit:
            if allocator:
                torch.empty(1 << 55)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return loss

    patch.setattr(losses, "summed", summed)


@pytest.mark.parametrize("allocator", [False, True], ids=["class", "allocator"])
def test_half_a_micro_batch_gives_what_it_gives_from_the_start(
    allocator: bool, tmp_path: Path, tiny_model_dir: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_with(tmp_path, tiny_model_dir)
    short = ("tune", "-r", "tune.yaml", "-s", "training.max_steps=5")
    assert cli(*short, "-s", "training.micro_batch_tokens=60", "-o", "runs/small").code == 0
    holds(60, monkeypatch, allocator=allocator)
    ended = cli(*short, "-o", "runs/halved")  # 120 a micro-batch, with dropout in the adapter
    assert ended.code == 0, ended.err
    assert ended.err.count("does not fit the memory") == 1
    small, halved = tmp_path / "runs/small", tmp_path / "runs/halved"
    # The failing micro-batch has at most 120 tokens, so its half may be a little below 60.
    wanted = [(step, pytest.approx(loss, rel=1e-3)) for step, loss, _ in losses_of(small)[:1]]
    assert [(step, loss) for step, loss, _ in losses_of(halved)[:1]] == wanted
    chosen = ended.err.split("does not fit the memory: ")[1].split(" ")[0]
    same = ("-s", f"training.micro_batch_tokens={chosen}", "-o", "runs/same")
    assert cli(*short, *same).code == 0
    weights = "model/adapter_model.safetensors"
    assert (halved / weights).read_bytes() == (tmp_path / "runs/same" / weights).read_bytes()
    assert losses_of(halved) == losses_of(tmp_path / "runs/same")


def test_a_row_that_does_not_fit_alone_is_named(
    tmp_path: Path, tiny_model_dir: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_with(tmp_path, tiny_model_dir)
    holds(3, monkeypatch, allocator=False)
    ended = cli("tune", "-r", "tune.yaml")
    assert ended.code == 3, ended.err
    assert "rows.jsonl row " in ended.err
    assert "tokens alone do not fit the memory" in ended.err
    assert "training.max_length (128)" in ended.err
    assert not json.dumps((tmp_path / "runs/tune/log.jsonl").read_text()).strip('"')
