"""A step that does not fit the memory is done in smaller micro-batches, to the same result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


SHORT = """
import os, sys
from itune import cli, losses
import torch
real = losses.summed
def summed(model, batch, **given):
    loss = real(model, batch, **given)
    if model.training and batch.ids.numel() > 50 and os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
    return loss
losses.summed = summed
cli.main()
"""


@pytest.mark.slow
def test_where_one_of_two_processes_runs_short_both_take_smaller_batches(
    tmp_path: Path, tiny_model_dir: Path, itune: Callable[..., Any]
) -> None:
    folder_with(tmp_path, tiny_model_dir)
    (tmp_path / "short.py").write_text(SHORT)
    options = ["tune", "-r", "tune.yaml", "-s", "training.max_steps=5", "-s"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "short.py"]
    done = subprocess.run(
        [sys.executable, *launch, *options, "adapter.lora_dropout=0", "-o", "runs/short"],
        cwd=tmp_path, env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "does not fit the memory" in line]
    assert len(said) == 1, "the first process alone speaks"
    chosen = said[0].split("does not fit the memory: ")[1].split(" ")[0]
    same = itune(
        *options, "adapter.lora_dropout=0", "-p", "2", "-o", "runs/same",
        "-s", f"training.micro_batch_tokens={chosen}",
    )  # fmt: skip
    assert same.returncode == 0, same.stderr
    short, wanted = losses_of(tmp_path / "runs/short"), losses_of(tmp_path / "runs/same")
    assert [step for step, _, _ in short] == [1, 2, 3, 4, 5]
    for ours, theirs in zip(short, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("rows", ["several", "one"])
def test_memory_that_runs_out_in_a_later_visit_of_hidden_tokens(
    rows: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pre.yaml").write_text(
        "model: {from_scratch: {model_type: bert, hidden_size: 16, num_hidden_layers: 1,"
        " num_attention_heads: 2, intermediate_size: 16,"
        " tokenizer: {algorithm: wordpiece, vocab_size: 120}}}\n"
        "data: {train: {path: rows.jsonl}}\n"
        "training: {num_train_epochs: 4, tokens_per_step: 64, max_length: 64}\n"
    )
    lines = [json.dumps({"text": f"the cat number {k} sits on the mat"}) + "\n" for k in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    real, calls = losses.summed, []

    def summed(model: Any, batch: Any, **given: Any) -> Any:
        loss = real(model, batch, **given)
        short = len(batch.lengths) > 1 if rows == "several" else True
        calls.append(model.training)
        if model.training and sum(calls) > 4 and short:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    monkeypatch.setattr(losses, "summed", summed)
    ended = cli("pretrain", "-r", "pre.yaml")
    if rows == "several":
        assert ended.code == 0, ended.err
        assert "does not fit the memory" in ended.err
    else:
        assert ended.code == 3, ended.err
        assert "rows.jsonl row " in ended.err
        assert "alone do not fit the memory" in ended.err
