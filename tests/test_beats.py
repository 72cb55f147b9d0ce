"""Who stands still among several processes: told by their beats, without a clock of their own."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from itune import beats, errors, launching

LAUNCH = "this one"


class World:
    """Processes whose beats are written by hand, and the watch over them, limit 80 s."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        (folder / beats.FOLDER).mkdir()
        self.beats = [beats.Beat(k, "here", 100 + k, at_work=True) for k in range(size)]
        self.hang = beats.Hang(folder, LAUNCH, size, 100.0)
        self.now = 0.0

    def put(self, rank: int, launch: str = LAUNCH, **changed: object) -> None:
        self.beats[rank] = beats.Beat(**{**asdict(self.beats[rank]), **changed})
        text = json.dumps({"launch": launch, **asdict(self.beats[rank])})
        (self.folder / beats.FOLDER / str(rank)).write_text(text.ljust(beats.RECORD))

    def runs(self, seconds: int, *moving: int, ticking: bool = True) -> beats.Stuck | None:
        """Look every five seconds; the named processes work on, the others only tick."""
        for _ in range(seconds // 5):
            self.now += 5
            for rank, beat in enumerate(self.beats):
                if rank in moving:
                    self.put(rank, tick=beat.tick + 1, beats=beat.beats + 1)
                elif ticking:
                    self.put(rank, tick=beat.tick + 1)
            if found := self.hang.watch.look(self.now):
                return found
        return None


def test_nobody_is_named_who_works(tmp_path: Path) -> None:
    assert World(tmp_path, 3).runs(1000, 0, 1, 2) is None


def test_a_process_that_does_not_tick_is_named(tmp_path: Path) -> None:
    world = World(tmp_path, 3)
    assert world.runs(50, 0, 1, 2) is None
    world.put(1, step=7)
    found = world.runs(100, 0, 2, ticking=False)
    assert found is not None
    assert (found.beat, found.step, found.stopped) == (world.beats[1], 7, True)
    assert 130 <= world.now <= 150, "within the hundred seconds that are allowed"
    assert found.seconds == world.now - 50
    said = str(world.hang._error(found))
    assert f"did not move at all for {world.now - 50:g} s, after step 7" in said
    assert "launch.hang_timeout (100 s)" in said


def test_one_that_works_on_nothing_is_named_and_not_those_that_wait_for_it(tmp_path: Path) -> None:
    world = World(tmp_path, 3)
    world.runs(50, 0, 1, 2)
    world.put(0, waiting=True, met=9)
    world.put(1, waiting=True, met=9)
    world.put(2, met=8)
    found = world.runs(100)
    assert found is not None
    assert found.beat is not None
    assert (found.beat.rank, found.stopped) == (2, False)


def test_who_loads_or_saves_may_take_any_time(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    world.put(0, at_work=False)
    world.put(1, waiting=True)
    assert world.runs(1000) is None
    found = world.runs(200, ticking=False)
    assert found is not None, "but not without a tick"


def test_all_that_wait_for_each_other_are_told_of(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    for rank in (0, 1):
        world.put(rank, waiting=True, met=5)
    found = world.runs(200)
    assert found is not None
    assert found.beat is None
    for name in ("network", "launch.hang_timeout", "100 s"):
        assert name in str(world.hang._error(found))


def test_one_that_never_began_is_named(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    world.beats = world.beats[:1]
    found = world.runs(200, 0)
    assert found is not None
    assert found.beat == beats.Beat(1)
    assert "process 1 of 2 did not move at all" in str(world.hang._error(found))


def test_beats_of_another_launch_and_of_who_has_ended_do_not_count(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    world.put(0, launch="an older one")
    world.put(1, launch="an older one")
    for _ in range(50):
        world.now += 5
        assert world.hang.watch.look(world.now) is None
    world.runs(20, 0, 1)
    (tmp_path / beats.FOLDER / "1").unlink()
    world.beats = world.beats[:1]
    assert world.runs(500, 0) is None


def test_a_watch_that_was_stopped_itself_blames_nobody(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    world.runs(50, 0, 1)
    world.now += 5000
    assert world.runs(50, 0, 1) is None


@pytest.mark.parametrize(
    ("published", "began", "code"),
    [((), None, 3), ((4,), None, 3), ((4, 8), None, 75), ((4,), 0, 75)],
)
def test_the_code_says_whether_starting_again_gets_further(
    tmp_path: Path, published: tuple[int, ...], began: int | None, code: int
) -> None:
    world = World(tmp_path, 2)
    world.put(0, step=4, began=began)
    world.put(1, step=4, began=began)
    for step in published:
        (tmp_path / "checkpoints" / f"{step:06}").mkdir(parents=True)
    found = world.runs(500)
    assert found is not None
    error = world.hang._error(found)
    assert error.exit_code == code
    assert isinstance(error, errors.ItuneError)
    assert "after step 4" in str(error)


def test_a_pulse_is_written_while_it_lasts(tmp_path: Path) -> None:
    pulse, watch = beats.Pulse(), beats.Watch(tmp_path, LAUNCH, 1, 1.0)
    ended = threading.Event()
    with pulse.written(tmp_path, LAUNCH, 0, 1.0), pulse.working():
        pulse.beat(3)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            watch.look(time.monotonic())
            if watch.last() and (watch.last()[0].step, watch.last()[0].tick > 2) == (3, True):
                break
            ended.wait(0.02)
        assert watch.last()[0].at_work
        assert not watch.last()[0].waiting
        with pulse.meeting(), pulse.working(False):
            assert (pulse._waiting, pulse._at_work) == (True, False)
        assert (pulse._waiting, pulse._at_work) == (False, True)
    assert not (tmp_path / beats.FOLDER).exists()


@pytest.mark.parametrize(
    ("launch", "code", "hung", "state"),
    [
        (LAUNCH, 3, True, "interrupted"),
        (LAUNCH, 75, False, "interrupted"),
        (LAUNCH, 1, False, "failed"),
        ("another", 3, True, "running"),
    ],
)
def test_what_the_killed_could_not_write_the_launcher_does(
    launch: str, code: int, hung: bool, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(launching.SUPERVISED, LAUNCH)
    (tmp_path / "run.json").write_text(
        json.dumps({"state": "running", "launch": launch, "id": "a"})
    )
    hang = beats.Hang(tmp_path, LAUNCH, 2, 100.0)
    hang.found = errors.EnvironmentRefusal("stands still") if hung else None
    launching._note(hang, code)
    assert json.loads((tmp_path / "run.json").read_text())["state"] == state
    finished = json.dumps({"state": "finished", "launch": launch})
    (tmp_path / "run.json").write_text(finished)
    launching._note(hang, code)
    assert (tmp_path / "run.json").read_text() == finished
