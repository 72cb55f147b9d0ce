"""A run that goes on in another number of processes has the same rows, steps, losses, weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import saved
from faults.kills import LORA, MIXTURE, prepare
from safetensors.torch import load_file
from test_resuming import stops

Cli = Callable[..., Any]
Itune = Callable[..., Any]
CLOSE = 1e-5  # relative, of losses: sums over ranks are added up in another order
NORMS = 1e-4  # relative, of gradient norms
WEIGHTS = 1e-5  # absolute, of weights after twelve steps of Adam
TORN = """
import os
from itune import cli, training
real = training._Loop._apply
def torn(self, *given):
    if self.at.step == int(os.environ["LAST"]):
        os._exit(9)
    return real(self, *given)
training._Loop._apply = torn
cli.main()
"""
CASES = {
    "full": [],
    "lora": [LORA.replace("lora_dropout: 0.1", "lora_dropout: 0")],
    "accumulated": ["training.micro_batch_tokens=70"],
    "mixture": [MIXTURE],
    "padded": ["training.packing=false"],
}


@pytest.fixture
def ready(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A folder with data, a recipe and a model without dropout; an odd number of rows."""
    prepare(tmp_path, tiny_model_dir)
    rows = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:53]))
    return tmp_path


def line(name: str, *more: str) -> list[str]:
    """Twelve steps over an epoch's end, a checkpoint of every second, each row's loss."""
    given = [*CASES[name], "training.save_steps=2", "training.row_losses=true"]
    given += ["training.num_train_epochs=1.5", "training.max_steps=-1", "training.eval_steps=3"]
    return ["tune", "-r", "run.yaml", *(each for s in given for each in ("-s", s)), *more]


def logged(run: Path) -> list[dict[str, Any]]:
    return [json.loads(each) for each in (run / "log.jsonl").read_text().splitlines()]


def rows_of(run: Path) -> dict[int, list[tuple[str, int, int]]]:
    """The rows of each step: path, number, wording."""
    found: dict[int, list[tuple[str, int, int]]] = {}
    for text in (run / "row_losses.jsonl").read_text().splitlines():
        each = json.loads(text)
        row = each["path"], each["row"], each["wording"]
        found.setdefault(each["step"], []).append(row)
    return {step: sorted(rows) for step, rows in found.items()}


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    (path,) = (run / "model").glob("*model.safetensors")
    return load_file(path)


def assert_the_same(run: Path, straight: Path) -> None:
    assert rows_of(run) == rows_of(straight)
    one, other = logged(straight), logged(run)
    assert [each["step"] for each in one] == [each["step"] for each in other]
    for before, now in zip(one, other, strict=True):
        for name in ("epoch", "tokens", "supervised_tokens", "learning_rate"):
            assert now[name] == before[name]
        assert now["loss"] == pytest.approx(before["loss"], rel=CLOSE)
        assert now["grad_norm"] == pytest.approx(before["grad_norm"], rel=NORMS)
        if "heldout_loss" in before:
            assert now["heldout_loss"] == pytest.approx(before["heldout_loss"], rel=CLOSE)
    first, second = weights_of(straight), weights_of(run)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.allclose(second[name], tensor, rtol=0, atol=WEIGHTS), name


def torn(cli: Cli, monkeypatch: pytest.MonkeyPatch, given: list[str], at: int) -> None:
    with monkeypatch.context() as patched:
        stops(patched, at)
        assert cli(*given).code != 0


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_in_two(
    ready: Path, cli: Cli, itune: Itune, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli(*line("full"), "-o", "runs/straight").code == 0
    steps = len(logged(ready / "runs/straight"))
    assert steps > 8, "over an epoch's end"
    torn(cli, monkeypatch, line("full", "-o", "runs/torn"), 5)
    ended = itune(*line("full", "-o", "runs/torn", "-s", "launch.num_processes=2"))
    assert ended.returncode == 0, ended.stderr
    said = "goes on after step 4 in 2 processes, was 1 process: every step has the same rows"
    assert ended.stderr.count(said) == 1
    assert json.loads((ready / "runs/torn/run.json").read_text())["processes"] == 2
    assert_the_same(ready / "runs/torn", ready / "runs/straight")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_on_in_fewer_and_in_more(name: str, ready: Path, itune: Itune, cli: Cli) -> None:
    """Two processes are torn off, then one, then four finish."""
    assert cli(*line(name), "-o", "runs/straight").code == 0
    (ready / "torn.py").write_text(TORN)
    for processes, last in ((2, 3), (1, 7)):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc_per_node", str(processes), "torn.py"]
        ended = subprocess.run(
            [*launch, *line(name, "-o", "runs/run")], cwd=ready, capture_output=True, text=True,
            timeout=240, check=False, env={**os.environ, "LAST": str(last)},
        )  # fmt: skip
        assert ended.returncode != 0
        assert len(logged(ready / "runs/run")) == last, ended.stderr
    assert "goes on after step 2 in 1 process, was 2 processes" in ended.stderr
    done = itune(*line(name, "-o", "runs/run", "-p", "4"))
    assert done.returncode == 0, done.stderr
    assert "goes on after step 6 in 4 processes, was 1 process" in done.stderr
    assert_the_same(ready / "runs/run", ready / "runs/straight")


@pytest.mark.slow
def test_what_a_new_process_draws_follows_from_seed_step_and_rank(
    tmp_path: Path, itune: Itune, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout a run that went on in more processes is not the straight one, but has its rows;
    and going on so twice gives the same twice."""
    model = saved(tmp_path / "made", "causal")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "attention_dropout": 0.1}))
    prepare(tmp_path, model)
    assert cli(*line("full"), "-o", "runs/straight").code == 0
    torn(cli, monkeypatch, line("full", "-o", "runs/first"), 5)
    shutil.copytree(tmp_path / "runs/first", tmp_path / "runs/second")
    for name in ("first", "second"):
        ended = itune(*line("full", "-o", f"runs/{name}", "-p", "2"))
        assert ended.returncode == 0, ended.stderr
    first, second, straight = (tmp_path / "runs" / n for n in ("first", "second", "straight"))
    assert rows_of(first) == rows_of(straight)
    assert [each["loss"] for each in logged(first)] == [each["loss"] for each in logged(second)]
    here, there = (logged(run)[-1]["loss"] for run in (first, straight))
    assert here != pytest.approx(there, rel=CLOSE)
    assert here == pytest.approx(there, rel=0.05), "the same curve but for what is drawn"
