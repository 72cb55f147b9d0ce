"""How often checkpoints are written: the formula against brute force, and a run that decides it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.kills import prepare
from test_resuming import stops

from itune import pacing

Cli = Callable[..., Any]
LINE = ["tune", "-r", "run.yaml", "-s", "training.save_steps=auto", "-s"]
LINE += ["training.save_total_limit=20"]
OFTEN, NEVER = "launch.mtbf_hours=0.000000001", "launch.mtbf_hours=1000000000"


@pytest.mark.parametrize(("checkpoint", "failures"), [(1.0, 1e4), (20.0, 86_400.0), (60.0, 3600.0)])
def test_no_other_interval_loses_less(checkpoint: float, failures: float) -> None:
    best = pacing.lost(pacing.interval(checkpoint, failures), checkpoint, failures)
    others = [
        pacing.lost(pacing.interval(checkpoint, failures) * 1.01**k, checkpoint, failures)
        for k in range(-200, 200)
    ]
    # The formula is the first order of an optimum, so it may be off where failures come often.
    assert best < min(others) + 0.002
    assert best < others[0] - 0.002
    assert best < others[-1] - 0.002


def test_what_is_lost_is_what_a_simulation_loses() -> None:
    draw = random.Random(3)
    every, checkpoint, failures, restart = 300.0, 15.0, 2000.0, 40.0
    clock, done, fails = 0.0, 0.0, draw.expovariate(1 / failures)
    while done < 3_000_000:
        if fails >= every + checkpoint:
            fails -= every + checkpoint
            clock += every + checkpoint
            done += every
            continue
        clock += fails
        fails = draw.expovariate(1 / failures)
        while fails < restart:  # the restart itself may fail
            clock += fails
            fails = draw.expovariate(1 / failures)
        clock += restart
        fails -= restart
    share = pacing.lost(every, checkpoint, failures, restart)
    assert share == pytest.approx(1 - done / clock, abs=0.005)


def test_eight_processes_fail_eight_times_as_often() -> None:
    one, eight = (pacing.Pace(1000.0, n) for n in (1, 8))
    for pace in (one, eight):
        assert [pace.add(s) for s in (9.0, 2.0, 1.0, 2.0, 3.0)] == [False] * 4 + [True]
        assert pace.step_seconds == 2.0, "the first step warms up"
    assert one.steps(4.0, 10**9) == round((2 * 4.0 * 3_600_000) ** 0.5 / 2)
    assert eight.steps(4.0, 10**9) == round((2 * 4.0 * 450_000) ** 0.5 / 2)
    assert one.steps(4.0, 500) == 500
    assert one.steps(0.0, 500) == 1
    assert "launch.mtbf_hours, 8 processes" in eight.told(10, 4.0)


def kept(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").glob("[0-9]*"))


def test_a_run_decides_once_and_keeps_to_it(
    tmp_path: Path, tiny_model_dir: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path, tiny_model_dir)
    ended = cli(*LINE, "-s", NEVER, "-o", "runs/never")
    assert ended.code == 0, ended.err
    assert ended.err.count("a checkpoint every 12 steps (") == 1
    assert "a failure is expected every 1e+09 h (launch.mtbf_hours)" in ended.err
    assert kept(tmp_path / "runs/never") == [12]
    made = json.loads((tmp_path / "runs/never/run.json").read_text())
    assert made["save_every"] == 12
    assert 0 < made["checkpoint_seconds"] < 60

    with monkeypatch.context() as patched:
        stops(patched, 8)
        assert cli(*LINE, "-s", OFTEN, "-o", "runs/often").code != 0
    assert kept(tmp_path / "runs/often") == [5, 6, 7, 8], "from the first that is decided on"
    ended = cli(*LINE, "-s", NEVER, "-o", "runs/often")
    assert ended.code == 0, ended.err
    assert "a checkpoint every" not in ended.err
    assert kept(tmp_path / "runs/often") == list(range(5, 13))
    logs = [(tmp_path / "runs" / n / "log.jsonl").read_text() for n in ("never", "often")]
    losses = [[json.loads(each)["loss"] for each in log.splitlines()] for log in logs]
    assert losses[0] == losses[1], "what a run learns does not depend on it"


@pytest.mark.slow
def test_processes_agree_on_it(tmp_path: Path, tiny_model_dir: Path, itune: Cli) -> None:
    prepare(tmp_path, tiny_model_dir)
    ended = itune(*LINE, "-s", "launch.mtbf_hours=0.0001", "-p", "2")
    assert ended.returncode == 0, ended.stderr
    every = json.loads((tmp_path / "runs/run/run.json").read_text())["save_every"]
    due = [step for step in range(5, 13) if step % every == 0 or step == 12]
    assert kept(tmp_path / "runs/run") == due


def test_it_needs_to_know_how_often_a_device_fails(
    tmp_path: Path, tiny_model_dir: Path, cli: Cli
) -> None:
    prepare(tmp_path, tiny_model_dir)
    ended = cli(*LINE)
    assert ended.code == 2
    assert "training.save_steps=auto: auto goes by how often a device fails" in ended.err
    assert "launch.mtbf_hours" in ended.err
    ended = cli("tune", "-r", "run.yaml", "-s", "training.save_steps=often")
    assert ended.code == 2
    assert "expected a number of steps, a share below 1, or auto, found 'often'" in ended.err
