"""Evaluation and generation by several processes give what one gives, and outlive a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_commands import write
from test_judging import LORA, RECIPE, with_runs
from test_launching import SETTINGS, WAYS, start

from itune import sharing

Itune = Callable[..., "subprocess.CompletedProcess[str]"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A folder with a run of an adapter, whose evaluation data has questions and plain text."""
    texts = "    - {path: text.jsonl, format: text, limit: 30}\n"
    recipe = RECIPE.format(base=tiny_model_dir).replace("limit: 6", "limit: 40")
    recipe = recipe.replace("limit: 5", "limit: 40").replace("  allow", texts + "  allow")
    return with_runs(tmp_path_factory.mktemp("shared"), lora=recipe + LORA)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it, where the test runs."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def scores(path: Path) -> dict[str, Any]:
    """What scores.json says but how long it took."""
    found = json.loads(path.read_text())
    del found["seconds"], found["tokens_per_second"]
    return dict(found)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_are_even_and_cover_every_piece_once(
    world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = [float((7 * place) % 31 + 1) for place in range(100)]
    shares = []
    for rank in range(world):
        monkeypatch.setattr(sharing, "_place", sharing._Place(rank, world))
        shares.append(sharing.mine(costs))
    assert sorted(place for share in shares for place in share) == list(range(100))
    loads = [sum(costs[place] for place in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs)
    assert all(share == sorted(share) for share in shares)


@pytest.mark.slow
def test_two_processes_score_as_one(folder: Path, itune: Itune) -> None:
    line = ["eval", "--run", "runs/lora", "--against", "base", "--json"]
    one = itune(*line, "-o", "one", env=ONE_THREAD)
    two = itune(*line, "-o", "two", "-p", "2", env=ONE_THREAD)
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    assert {"mood", "place", "text"} == set(json.loads(two.stdout)["tasks"])
    for name in ("predictions.jsonl", "against.jsonl"):
        assert (folder / "two" / name).read_bytes() == (folder / "one" / name).read_bytes()
    assert scores(folder / "two/scores.json") == scores(folder / "one/scores.json")
    assert sorted(path.name for path in (folder / "two").iterdir()) == sorted(
        path.name for path in (folder / "one").iterdir()
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", [each for each in WAYS if each != "recipe"])
def test_every_launcher_scores_and_answers_the_same(way: str, folder: Path, itune: Itune) -> None:
    (folder / "two.yaml").write_text(SETTINGS)
    write(folder / "in.jsonl", [{"prompt": f"Who is {n}?"} for n in range(9)])
    score, ask = (
        ["eval", "--run", "runs/lora"],
        ["generate", "--run", "runs/lora", "-i", "in.jsonl"],
    )
    assert itune(*score, "-o", "one", env=ONE_THREAD).returncode == 0
    assert itune(*ask, "-o", "one.jsonl", env=ONE_THREAD).returncode == 0
    launcher, more, env = WAYS[way]
    if way == "torchrun":  # it would take --run for the beginning of an option of its own
        launcher = [*launcher[:-1], "--", launcher[-1]]
    for given in ([*score, "-o", "two"], [*ask, "-o", "two.jsonl"]):
        ended = start(folder, launcher, [*given, *more], {**env, **ONE_THREAD})
        assert ended.returncode == 0, ended.stderr
        assert "of 2 processes" in ended.stderr or given[0] == "generate", ended.stderr
    for name in ("two/predictions.jsonl", "two.jsonl"):
        assert (folder / name).read_bytes() == (folder / name.replace("two", "one")).read_bytes()
    assert scores(folder / "two/scores.json") == scores(folder / "one/scores.json")


@pytest.mark.slow
def test_two_processes_write_what_one_does(folder: Path, itune: Itune) -> None:
    write(folder / "in.jsonl", [{"prompt": f"Who is {n}?" + " Say." * (n % 5)} for n in range(21)])
    line = ["generate", "--run", "runs/lora", "-i", "in.jsonl", "-s", "generation.do_sample=true"]
    for name, more in (("one", []), ("two", ["-p", "2"])):
        ended = itune(*line, "-o", f"{name}.jsonl", *more, env=ONE_THREAD)
        assert ended.returncode == 0, ended.stderr
    whole = (folder / "one.jsonl").read_bytes()
    assert (folder / "two.jsonl").read_bytes() == whole
    (folder / "two.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:5]) + b'{"prom')
    ended = itune(*line, "-o", "two.jsonl", "-p", "2", env=ONE_THREAD)
    assert "5 of 21 are answered already" in ended.stderr
    assert (folder / "two.jsonl").read_bytes() == whole
    said = itune("generate", "-", "--run", "runs/lora", "-p", "2", stdin="Who?", env=ONE_THREAD)
    assert said.returncode == 0, said.stderr
    alone = itune("generate", "-", "--run", "runs/lora", stdin="Who?", env=ONE_THREAD)
    assert said.stdout == alone.stdout


def second(launcher: int) -> int:
    """The process of rank 1 that a launcher started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        if b"RANK=1" in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError("there is no such process")


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["one", "all"])
def test_a_stopped_evaluation_ends_and_goes_on(killed: str, folder: Path, itune: Itune) -> None:
    line = ["eval", "--run", "runs/lora", "-s", "generation.max_new_tokens=400", "-o", "kept"]
    line += ["-s", "generation.min_new_tokens=400"]
    process = subprocess.Popen(
        [sys.executable, "-m", "itune", *line, "-p", "2"],
        cwd=folder, env={**os.environ, **ONE_THREAD}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    part = folder / "kept/predictions.1.jsonl"
    deadline = time.monotonic() + 120
    while not (part.is_file() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    if killed == "one":
        os.kill(second(process.pid), signal.SIGKILL)
    else:
        process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (3 if killed == "one" else 75), said
    assert "Traceback" not in said
    if killed == "one":
        assert "process 1 of the run was killed" in said
    begun = sum(len(path.read_text().splitlines()) for path in (folder / "kept").glob("*.jsonl"))
    assert 0 < begun < 120
    again = itune(*line, "-p", "2", env=ONE_THREAD)
    assert again.returncode == 0, again.stderr
    assert "answers are kept in kept/predictions.jsonl" in again.stderr
    line[line.index("kept")] = "whole"
    assert itune(*line, env=ONE_THREAD).returncode == 0
    assert scores(folder / "kept/scores.json") == scores(folder / "whole/scores.json")
    for name in ("kept", "whole"):
        assert not (folder / name / "predictions.1.jsonl").exists()
    one, two = (folder / name / "predictions.jsonl" for name in ("kept", "whole"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
def test_what_is_wrong_is_said_once_with_its_code(folder: Path, itune: Itune) -> None:
    (folder / "moods.jsonl").write_text('{"text": "a", "label\n')
    ended = itune("eval", "--run", "runs/lora", "-p", "2", env=ONE_THREAD)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("error: ") == 1
    assert "moods.jsonl:1" in ended.stderr


def test_one_process_talks(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    by_option = cli("generate", "--chat", "-p", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    by_launcher = cli("generate", "--chat")
    for ended in (by_option, by_launcher):
        assert ended.code == 2
        assert "--chat: in several processes?" in ended.err
