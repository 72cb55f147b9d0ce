"""A run that was stopped and went on is, to the last bit, the one that never stopped."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import saved
from faults.kills import LORA, MIXTURE, prepare

Cli = Callable[..., Any]
TEXT = "data.train=[{path: text.jsonl}]"
# Twelve steps of uneven micro-batches, over an epoch's end; two wordings a row; a checkpoint of
# every second step.
CASES: dict[str, tuple[str, list[str]]] = {
    "full, dropout": ("tune", []),
    "lora, dropout": ("tune", [LORA]),
    "accumulated": ("tune", ["training.micro_batch_tokens=70"]),
    "mixture": ("tune", [MIXTURE, LORA]),
    "padded": ("tune", ["training.packing=false"]),
    "averaged": ("tune", [LORA, "training.swa_start=5"]),
    "pretrain": ("pretrain", [TEXT]),
    "stream": ("pretrain", ["data.train=[{path: text.jsonl, streaming: true, limit: 30}]"]),
}


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    """A folder with data and recipe, and a model that has dropout in its attention."""
    model = saved(tmp_path / "made", "causal")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "attention_dropout": 0.1}))
    prepare(tmp_path, model)
    return tmp_path


def line(name: str, *more: str) -> list[str]:
    command, sets = CASES[name]
    given = [*sets, "training.save_steps=2", *more]
    return [command, "-r", "run.yaml", "-q", *(each for s in given for each in ("-s", s))]


def left(run: Path) -> dict[str, object]:
    """All that a run leaves but the time it took: every line of its log, and its weights."""
    logged = [json.loads(each) for each in (run / "log.jsonl").read_text().splitlines()]
    (weights,) = (run / "model").glob("*model.safetensors")
    return {
        "log": [{k: v for k, v in each.items() if k != "seconds"} for each in logged],
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }


def stops(patch: pytest.MonkeyPatch, at: int) -> None:
    """A run that is torn off in the middle of a step, as by a kill: nothing is put in order."""
    from itune import training

    real = training._Loop._apply

    def torn(self: Any, *given: Any) -> Any:
        if self.at.step == at:
            raise KeyboardInterrupt
        return real(self, *given)

    patch.setattr(training._Loop, "_apply", torn)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_that_went_on_is_the_one_that_never_stopped(
    name: str, ready: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli(*line(name), "-o", "runs/straight").code == 0
    for at in (3, 8):
        with monkeypatch.context() as patched:
            stops(patched, at)
            assert cli(*line(name), "-o", "runs/torn").code != 0
    ended = cli(*line(name), "-o", "runs/torn")
    assert ended.code == 0, ended.err
    torn, straight = left(ready / "runs/torn"), left(ready / "runs/straight")
    assert [each["step"] for each in straight["log"]] == list(range(1, 13))  # type: ignore[attr-defined]
    assert torn == straight


@pytest.mark.slow
def test_dropout_is_drawn(ready: Path, cli: Cli) -> None:
    """Or the case above would show nothing."""
    assert cli(*line("full, dropout"), "-o", "runs/with").code == 0
    model = ready / "model/config.json"
    model.write_text(json.dumps({**json.loads(model.read_text()), "attention_dropout": 0.0}))
    assert cli(*line("full, dropout"), "-o", "runs/without").code == 0
    assert left(ready / "runs/with") != left(ready / "runs/without")


TORN = """
import os, sys
from itune import cli, training
real = training._Loop._apply
def torn(self, *given):
    if self.at.step == 7:
        os._exit(9)
    return real(self, *given)
training._Loop._apply = torn
cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full, dropout", "accumulated"])
def test_two_processes_go_on_as_if_they_had_never_stopped(name: str, ready: Path) -> None:
    (ready / "torn.py").write_text(TORN)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

    def run(*given: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *given], cwd=ready, capture_output=True, text=True,
            timeout=240, check=False, env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        )  # fmt: skip

    done = run("-m", "itune", *line(name), "-p", "2", "-o", "runs/straight")
    assert done.returncode == 0, done.stderr
    torn = run(*launch, "torn.py", *line(name))
    assert torn.returncode != 0
    log = (ready / "runs/run/log.jsonl").read_text().splitlines()
    assert len(log) == 7, torn.stderr
    done = run("-m", "itune", *line(name), "-p", "2")
    assert done.returncode == 0, done.stderr
    assert left(ready / "runs/run") == left(ready / "runs/straight")


def test_what_was_trained_on_is_not_read_again(
    ready: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going on after step k makes the batches of the steps behind it, and encodes nothing."""
    from itune import encoding, feeding, plans

    made: list[int] = []
    planned: list[int] = []
    encoded: list[object] = []
    real_feed, real_step = feeding.Feed.__init__, plans.Plan.step
    real_encode = encoding.Encoder.pieces

    def counted(self: Any, plan: Any, corpus: Any, collate: Any, **given: Any) -> None:
        def collated(corpus: Any, rows: np.ndarray) -> Any:
            made.extend(rows.tolist())
            return collate(corpus, rows)

        real_feed(self, plan, corpus, collated, **given)

    def step(self: Any, number: int) -> Any:
        planned.append(number)
        return real_step(self, number)

    def encode(self: Any, *given: Any, **named: Any) -> Any:
        encoded.extend(given[0])
        return real_encode(self, *given, **named)

    monkeypatch.setattr(feeding.Feed, "__init__", counted)
    monkeypatch.setattr(plans.Plan, "step", step)
    monkeypatch.setattr(encoding.Encoder, "pieces", encode)
    texts = [{"text": f"Of these, story {k} has been read by nobody. " * 3} for k in range(40)]
    (ready / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    options = line("pretrain", "data.eval=[]")
    with monkeypatch.context() as patched:
        stops(patched, 9)
        assert cli(*options).code != 0
    whole = len(made)
    assert len(encoded) >= 40, "all texts were encoded at first"
    for each in (made, planned, encoded):
        each.clear()  # type: ignore[attr-defined]
    assert cli(*options).code == 0
    assert sorted(set(planned)) == [8, 9, 10, 11], "steps 9 to 12, and none before"
    assert 0 < len(made) < whole
    assert not encoded
