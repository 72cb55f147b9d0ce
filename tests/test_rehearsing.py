"""What can fail late fails before the first step; what is tried leaves no trace in the result."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState, tracking

from itune import checkpoints, decoding, optimizers, recipes, rehearsing, storage

Cli = Callable[..., Any]
RECIPE = """
model: {name: MODEL}
adapter: {peft_type: lora, r: 4, target_modules: all-linear, lora_dropout: 0.2}
data:
  train: {path: rows.jsonl, template: ./ask.yaml}
  eval:
    - {path: held.jsonl, template: ./ask.yaml}
    - {path: held.jsonl, template: ./room.yaml}
training: {max_steps: 3, tokens_per_step: 200, max_length: 128, save_steps: 2, eval_steps: 2}
"""
ASK = """
task: qa
prompts: ["Where is {{ who }}?", "{{ who }} is where?"]
response: "{{ where }}"
metrics: [exact_match, rougeL]
"""
ROOM = """
task: classification
choices: ["in room 0", "in room 1", "in room 2"]
prompts: ["Where is {{ who }}?"]
response: "{{ where }}"
metrics: [accuracy]
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_model_dir: Path) -> Path:
    for name, first in (("rows", 0), ("held", 100)):
        rows = [{"who": f"cat {first + k}", "where": f"in room {k % 3}"} for k in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ask.yaml").write_text(ASK)
    (tmp_path / "room.yaml").write_text(ROOM)
    (tmp_path / "lora.yaml").write_text(RECIPE.replace("MODEL", str(tiny_model_dir)))
    return tmp_path


def left(run: Path) -> dict[str, Any]:
    """All that a run leaves but times and its own id."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {
        "log": [{k: v for k, v in line.items() if k != "seconds"} for line in lines],
        "weights": (run / "model/adapter_model.safetensors").read_bytes(),
        "names": sorted(str(path.relative_to(run)) for path in run.rglob("*")),
    }


def test_what_was_tried_is_told_and_changes_no_bit(
    folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = ("-s", "generation.do_sample=true", "-s", "generation.temperature=2.0")
    tried = cli("tune", "-r", "lora.yaml", "-o", "runs/tried", *drawn)
    assert tried.code == 0, tried.err
    said = next(line for line in tried.err.splitlines() if "tried before the first step" in line)
    for part in ("a checkpoint of", "a held-out batch", "answers to 2 rows of ask", "(accuracy)"):
        assert part in said
    with monkeypatch.context() as patched:
        patched.setattr(rehearsing, "rehearse", lambda *a, **k: None)
        assert cli("tune", "-r", "lora.yaml", "-o", "runs/not", *drawn).code == 0
    assert left(folder / "runs/tried") == left(folder / "runs/not")


def test_a_run_that_goes_on_tries_again_only_what_may_have_changed(
    folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from itune import training

    real = training._Loop._step

    def stops(self: Any, step: Any) -> Any:
        if self.at.step == 2:
            raise KeyboardInterrupt
        return real(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(training._Loop, "_step", stops)
        cli("tune", "-r", "lora.yaml")
    again = ("tune", "-r", "lora.yaml", "-o", "runs/again")
    shutil.copytree(folder / "runs/lora", folder / "runs/again")
    ended = cli(*again)
    assert ended.code == 0, ended.err
    assert "resuming after step 2 of 3" in ended.err
    assert "tried before the first step" not in ended.err
    other = cli("tune", "-r", "lora.yaml", "-s", "generation.max_new_tokens=4")
    assert other.code == 0, other.err
    said = next(line for line in other.err.splitlines() if "tried before the first step" in line)
    assert "answers to 2 rows of ask" in said
    assert "checkpoint" not in said


def test_a_run_killed_while_trying_is_in_nobodys_way(folder: Path, cli: Cli) -> None:
    assert cli("tune", "-r", "lora.yaml", "-s", "model.name=./nothing").code == 2
    (folder / "runs/lora/checkpoints/.trial/.staged-x-000000").mkdir(parents=True)
    ended = cli("tune", "-r", "lora.yaml", "-s", "training.seed=3")
    assert ended.code == 0, ended.err
    assert not list((folder / "runs/lora/checkpoints").glob(".*"))


# --- each sink broken in turn -------------------------------------------------------------


class _Full(storage.Disk):
    """A disk on which no checkpoint can be written."""

    def produce(self, path: Path, produce: Callable[[Path], None]) -> None:
        if path.name == "optimizer.safetensors":
            raise OSError(28, "No space left on device")
        super().produce(path, produce)


def _full(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(storage, "DISK", _Full())


def _forgetful(patch: pytest.MonkeyPatch) -> None:
    real = checkpoints.save

    def save(*given: Any, **named: Any) -> Path:
        path = real(*given, **named)
        spoilt = path / "weights.safetensors"
        spoilt.write_bytes(spoilt.read_bytes()[:-1] + b"x")
        return path

    patch.setattr(checkpoints, "save", save)


def _small(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))


def _nan(patch: pytest.MonkeyPatch) -> None:
    from itune import losses

    real = losses.summed
    patch.setattr(losses, "summed", lambda *a, **k: real(*a, **k) * float("nan"))


def _mute(patch: pytest.MonkeyPatch) -> None:
    def generate(*_: Any, **__: Any) -> Any:
        raise ValueError("these settings contradict each other")

    patch.setattr(decoding, "generate", generate)


def _tracked(patch: pytest.MonkeyPatch, *, starts: bool) -> None:
    class Tracker(tracking.GeneralTracker):
        name = "tensorboard"
        requires_logging_directory = False

        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__()
            if not starts:
                raise PermissionError("may not write")

        @property
        def tracker(self) -> None:
            return None

        def store_init_configuration(self, values: Any) -> None:
            pass

        def log(self, values: Any, step: Any = None, **_: Any) -> None:
            raise ConnectionError("its server is gone")

    patch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Tracker)
    patch.setattr(tracking, "_available_trackers", [tracking.LoggerType.TENSORBOARD])


SINKS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], int, str]] = {
    "disk that is full": (_full, 3, "No space left on device"),
    "disk that forgets": (_forgetful, 3, "weights.safetensors was changed"),
    "disk too small": (_small, 3, "0.1 MB are free: 2 checkpoints of"),
    "loss not finite": (_nan, 4, "before the first step"),
    "no answer": (_mute, 2, "these settings contradict each other"),
    "tracker that does not start": (
        lambda patch: _tracked(patch, starts=False),
        3,
        "tensorboard cannot be started: 'may not write'",
    ),
    "tracker that takes nothing": (
        lambda patch: _tracked(patch, starts=True),
        3,
        "tensorboard does not take a line: 'its server is gone'",
    ),
}


@pytest.mark.parametrize("end", ["finished", "interrupted", "failing"])
def test_a_tracker_gets_the_result_and_is_closed(
    end: str, folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    class Tracker(tracking.GeneralTracker):
        name = "tensorboard"
        requires_logging_directory = False
        tracker = None

        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__()

        def store_init_configuration(self, values: Any) -> None:
            pass

        def log(self, values: Any, step: Any = None, **_: Any) -> None:
            if end == "interrupted" and step == 2:
                raise KeyboardInterrupt
            if end == "failing" and "final/loss" in values:
                raise ConnectionError("its server is gone")
            told.append((step, values))

        def finish(self) -> None:
            told.append("closed")
            if end == "failing":
                raise ConnectionError("its server is gone still")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Tracker)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.TENSORBOARD])
    options = ("-s", "tracking.log_with=[tensorboard]", "-s", "training.logging_steps=50")
    ended = cli("tune", "-r", "lora.yaml", "-o", "runs/seen", *options)
    assert told.count("closed") == 1
    assert told[-1] == "closed"
    if end == "interrupted":
        assert ended.code == 130, ended.err
        return
    assert ended.code == 0, ended.err
    record = json.loads((folder / "runs/seen/run.json").read_text())
    curves = {step: values["heldout_loss"] for step, values in told[1:3]}
    assert curves == {2: pytest.approx(curves[2]), 3: record["heldout_loss"]}
    if end == "failing":
        assert "tensorboard: does not take the result: 'its server is gone'" in ended.err
        assert "tensorboard: its run was not closed: 'its server is gone still'" in ended.err
        return
    step, final = told[-2]
    assert (step, final["final/steps"], final["final/loss"]) == (3, 3, record["loss"])
    assert final["final/heldout_loss"] == record["heldout_loss"]


@pytest.mark.parametrize("end", ["finished", "failing"])
def test_a_tracker_gets_the_scores_and_prints_nothing_among_them(
    end: str, folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    names: list[Any] = []

    class Tracker(tracking.GeneralTracker):
        name = "trackio"
        requires_logging_directory = False
        tracker = None

        def __init__(self, project: str, **options: Any) -> None:
            super().__init__()
            names.append((project, options))

        def start(self) -> None:
            sys.stdout.write("* project initialized\n")
            tracking.logger.debug("as those of accelerate do")

        def store_init_configuration(self, values: Any) -> None:
            pass

        def log(self, values: Any, step: Any = None, **_: Any) -> None:
            if end == "failing" and any(key.startswith("eval/") for key in values):
                raise ConnectionError("its server is gone")
            told.append((step, values))

        def finish(self) -> None:
            sys.stdout.write("* run finished\n")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "trackio", Tracker)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.TRACKIO])
    tune = ("tune", "-r", "lora.yaml", "-o", "runs/seen", "-s", "tracking.log_with=[trackio]")
    ended = cli(*tune, "--json")
    assert json.loads(ended.out)["state"] == "finished"
    PartialState._reset_state()  # of the tune above: an evaluation is a process of its own
    ended = cli("eval", "--run", "runs/seen", "--json")
    assert ended.code == 0, ended.err
    tasks = json.loads(ended.out)["tasks"]
    # One name for both, which another run of the folder does not have.
    own = json.loads((folder / "runs/seen/run.json").read_text())["id"][:8]
    assert names == [("itune", {"name": f"seen-{own}", "resume": "allow"})] * 2
    if end == "failing":
        ended = cli("eval", "--run", "runs/seen")
        assert ended.code == 0
        assert "trackio: does not take the scores: 'its server is gone'" in ended.err
        return
    step, scores = told[-1]
    assert step == 3
    assert scores == {
        f"eval/{name}/{key}": score["value"]
        for name, task in tasks.items()
        for key, score in task["scores"].items()
    }
    before = len(told)
    assert cli("eval", "--run", "runs/seen", "--limit", "2", "--metric", "rougeL").code == 0
    assert all(key.startswith("eval-limit-2/") for key in told[-1][1])
    assert cli("eval", "--run", "runs/seen", "-s", "tracking.log_with=[]").code == 0
    assert len(told) == before + 1


@pytest.mark.parametrize("sink", SINKS)
def test_a_broken_sink_stops_the_run_before_its_first_step(
    sink: str, folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, code, said = SINKS[sink]
    spoil(monkeypatch)
    options = ("-s", "tracking.log_with=[tensorboard]") if "tracker" in sink else ()
    ended = cli("tune", "-r", "lora.yaml", *options)
    assert (ended.code, "Traceback" in ended.err) == (code, False), ended.err
    assert said in ended.err
    run = folder / "runs/lora"
    log = run / "log.jsonl"
    assert not log.exists() or not log.read_text()
    assert not list((run / "checkpoints").glob("*"))
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert cli("tune", "-r", "lora.yaml", "-s", "training.seed=5").code == 0


def test_a_metric_of_ones_own_that_fails_does_so_before_the_first_step(
    folder: Path, cli: Cli
) -> None:
    (folder / "mine.py").write_text(
        "import datasets\nimport evaluate\n"
        "class Mine(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        text = datasets.Value('string')\n"
        "        features = datasets.Features({'predictions': text, 'references': text})\n"
        "        return evaluate.MetricInfo('', '', features)\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'mine': len(predictions) / 0}\n"
    )
    ended = cli("tune", "-r", "lora.yaml", "-s", "evaluation.metrics=[./mine.py]")
    assert ended.code == 2
    assert "mine.py: does not compute: ZeroDivisionError" in ended.err
    assert not (folder / "runs/lora/log.jsonl").exists()


# --- the size of what is written ----------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adamw_torch", "adafactor", "sgd"])
def test_the_blank_state_is_that_of_a_step_but_zeros(name: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    model[0].bias.requires_grad_(False)
    settings = recipes.Training(optim=name)  # type: ignore[arg-type]
    blank = optimizers.blank_state(model, settings)
    made = optimizers.optimizer(model, settings)
    model(torch.ones(2, 4)).sum().backward()
    made.step()
    real = made.state_dict()
    assert blank["state"].keys() == real["state"].keys()
    for number, fields in real["state"].items():
        assert blank["state"][number].keys() == fields.keys()
        for field, value in fields.items():
            if isinstance(value, torch.Tensor):
                zeros = blank["state"][number][field]
                assert (zeros.shape, zeros.dtype) == (value.shape, value.dtype), field
                assert not zeros.any()
