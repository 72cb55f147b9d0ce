"""The weights with the lowest held-out loss come out, and a run that gets no better ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import saved
from faults.kills import prepare
from safetensors.torch import load_file
from test_resuming import left, stops

Cli = Callable[..., Any]
BEST = ("training.load_best_model_at_end=true", "training.eval_steps=1", "training.save_steps=4")
# Learning so fast that the held-out loss falls and rises again.
FAST = (
    *("training.learning_rate=0.06", "training.lr_scheduler_type=constant"),
    *("training.seed=3", "training.max_steps=8"),
)


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    prepare(tmp_path, saved(tmp_path / "made", "causal"))
    return tmp_path


def line(*sets: str) -> list[str]:
    return ["tune", "-r", "run.yaml", *(each for s in (*FAST, *sets) for each in ("-s", s))]


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(each) for each in (run / "log.jsonl").read_text().splitlines()]


def weights(folder: Path) -> Path:
    (found,) = folder.glob("*model.safetensors")
    return found


def lowest(run: Path) -> int:
    measured = [each for each in log(run) if "heldout_loss" in each]
    return int(min(measured, key=lambda each: each["heldout_loss"])["step"])


def test_the_best_weights_come_out(ready: Path, cli: Cli) -> None:
    ended = cli(*line(*BEST), "-o", "runs/best")
    assert ended.code == 0, ended.err
    run = ready / "runs/best"
    step = lowest(run)
    assert step < 8, "the data no longer overfits, so this shows nothing"
    found = json.loads((run / "run.json").read_text())
    assert found["best_step"] == step
    assert found["heldout_loss"] == min(each["heldout_loss"] for each in log(run))
    assert f"the weights are those of step {step}" in ended.err
    assert f"after step {step}" in (run / "model/README.md").read_text()
    # The same as of a run that was told to stop there, and not as of one that went to the end.
    for name, sets in (("there", (f"training.max_steps={step}",)), ("end", ())):
        assert cli(*line("training.eval_steps=1", *sets), "-o", f"runs/{name}").code == 0
    best, there, last = (
        load_file(weights(ready / f"runs/{name}/model")) for name in ("best", "there", "end")
    )
    assert all(bool((best[name] == there[name]).all()) for name in best)
    assert any(bool((best[name] != last[name]).any()) for name in best)


def test_the_best_checkpoint_is_kept_as_long_as_one_that_counts_on_it(
    ready: Path, cli: Cli
) -> None:
    assert cli(*line(*BEST, "training.save_total_limit=1", "training.save_steps=1")).code == 0
    run = ready / "runs/run"
    kept = {int(each.name) for each in (run / "checkpoints").iterdir()}
    assert kept == {lowest(run), 8}


def test_a_run_that_gets_no_better_ends(ready: Path, cli: Cli) -> None:
    ended = cli(*line("training.eval_steps=1", "training.patience=2"))
    assert ended.code == 0, ended.err
    run = ready / "runs/run"
    best = lowest(run)
    assert [each["step"] for each in log(run)] == list(range(1, best + 3))
    assert "stopped early after step" in ended.err
    found = json.loads((run / "run.json").read_text())
    assert (found["steps"], found["best_step"], found["state"]) == (best + 2, best, "finished")


@pytest.mark.parametrize("at", ["before", "behind"])
def test_a_run_that_was_stopped_knows_its_best_step(
    at: str, ready: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = (*BEST, "training.patience=3")
    assert cli(*line(*sets), "-o", "runs/straight").code == 0
    best = lowest(ready / "runs/straight")
    with monkeypatch.context() as patched:
        stops(patched, best - 1 if at == "before" else best + 2)
        assert cli(*line(*sets), "-o", "runs/torn").code != 0
    ended = cli(*line(*sets), "-o", "runs/torn")
    assert ended.code == 0, ended.err
    assert left(ready / "runs/torn") == left(ready / "runs/straight")


def test_a_best_step_that_is_gone_is_told_before_the_work(
    ready: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = (*BEST, "training.save_steps=1")
    with monkeypatch.context() as patched:
        stops(patched, 7)
        assert cli(*line(*sets)).code != 0
    run = ready / "runs/run"
    best = lowest(run)
    assert best < 7
    shutil.move(run / f"checkpoints/{best:06d}", ready / "elsewhere")
    ended = cli(*line(*sets))
    assert ended.code == 2
    assert f"{best:06d}: the step with the lowest held-out loss" in ended.err
    shutil.move(ready / "elsewhere", run / f"checkpoints/{best:06d}")
    assert cli(*line(*sets)).code == 0


@pytest.mark.parametrize("how", ["data.eval=[]", "training.heldout_rows=0"])
@pytest.mark.parametrize("key", ["patience=2", "load_best_model_at_end=true"])
def test_without_a_held_out_loss_there_is_no_best(
    how: str, key: str, ready: Path, cli: Cli
) -> None:
    ended = cli(*line(how, f"training.{key}"))
    assert ended.code == 2
    assert key.partition("=")[0] in ended.err
    assert "Give data.eval" in ended.err
    assert not (ready / "runs").exists()


def test_one_step_or_the_mean_of_many_comes_out(ready: Path, cli: Cli) -> None:
    ended = cli(*line("training.patience=2", "training.swa_start=0.5"))
    assert ended.code == 2
    assert "swa_start" in ended.err
    assert "patience" in ended.err
