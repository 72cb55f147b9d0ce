"""Whether every process of a run gets on: each leaves beats in the run's folder; one watches them.

A thread of each process writes `tick`, which moves unless the whole process stands still, and how
often its work went on. Whoever watches (the process that started them, or each of them where a
stranger did) names the one that stands still. Collective calls never tell: they only wait.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from itune import errors, storage

FOLDER = ".beats"
RECORD = 512  # bytes, written over and over in one place: a full disk does not stop it
# Of the time that is allowed, as beats are written and looked at in turns.
PATIENCE = 0.8


@dataclass(frozen=True, slots=True)
class Beat:
    """What a process says of itself.

    `at_work`: `beats` move whenever a micro-batch is done, so standing still is a fault. Elsewhere
    (loading, a checkpoint) one call of a library may take any time, and only `tick` counts.
    `began`: steps that were done when the work began, which may be many before the first look.
    """

    rank: int = 0
    host: str = ""
    pid: int = 0
    tick: int = 0
    beats: int = 0
    met: int = 0
    step: int = 0
    at_work: bool = False
    waiting: bool = False
    began: int | None = None


class Pulse:
    """This process's own beat. Costs an addition where nobody watches."""

    def __init__(self) -> None:
        self._beats = self._met = self._step = 0
        self._at_work = self._waiting = False
        self._began: int | None = None

    def beat(self, step: int | None = None) -> None:
        """Work went on; `step`: that many steps are done."""
        self._beats += 1
        if step is not None:
            self._step = step

    @contextlib.contextmanager
    def meeting(self) -> Iterator[None]:
        """A collective call, in which a process may wait for the others."""
        self._met += 1
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False
            self._beats += 1

    @contextlib.contextmanager
    def working(self, wanted: bool = True) -> Iterator[None]:
        """Beats come often in this block; or, with False inside of it, they do not."""
        before, self._at_work = self._at_work, wanted
        if wanted and self._began is None:
            self._began = self._step
        self._beats += 1
        try:
            yield
        finally:
            self._at_work = before
            self._beats += 1

    @contextlib.contextmanager
    def written(self, folder: Path, launch: str, rank: int, seconds: float) -> Iterator[None]:
        """Have beats in the run's folder until the block ends; `launch` tells them from old ones.

        `seconds`: how long a process may stand still; beats come often enough for that.
        """
        path = folder / FOLDER / str(rank)
        path.parent.mkdir(exist_ok=True)
        ended = threading.Event()
        writer = threading.Thread(
            target=self._write, args=(path, launch, rank, seconds, ended), daemon=True
        )
        writer.start()
        try:
            yield
        finally:
            ended.set()
            writer.join()
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the last one takes the folder away
                path.parent.rmdir()

    def _write(
        self, path: Path, launch: str, rank: int, seconds: float, ended: threading.Event
    ) -> None:
        tick, host = 0, socket.gethostname()[:100]
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            while not ended.is_set():
                tick += 1
                beat = Beat(
                    rank, host, os.getpid(), tick, self._beats, self._met, self._step,
                    self._at_work, self._waiting, self._began,
                )  # fmt: skip
                text = json.dumps({"launch": launch, **asdict(beat)})
                with contextlib.suppress(OSError):  # tried again; silence is what is told
                    os.pwrite(handle, text.encode().ljust(RECORD), 0)
                ended.wait(interval(seconds))
        finally:
            os.close(handle)


PULSE = Pulse()


def interval(seconds: float) -> float:
    """Seconds from one beat to the next, where a process may stand still for so many."""
    return min(10.0, seconds / 20)


# --- watching -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stuck:
    """A process that stands still (None: all of them wait for each other), and after what step.

    seconds: for how long, as far as was seen.
    """

    beat: Beat | None
    step: int
    stopped: bool
    seconds: float


class Watch:
    """Looks at the beats of one launch, again and again, and finds who stands still."""

    def __init__(self, folder: Path, launch: str, world: int, seconds: float) -> None:
        self.folder, self.launch, self.world = folder, launch, world
        self.seconds = seconds
        self.pause = interval(seconds)
        self._limit = PATIENCE * seconds
        self._now = 0.0
        self._looked: float | None = None
        self.began: int | None = None  # steps that were done when the work began
        self._seen: dict[int, Beat] = {}
        self._ended: set[int] = set()
        self._ticked: dict[int, float] = {}
        self._moved: dict[int, float] = {}

    def wait(self, ended: threading.Event) -> Stuck | None:
        """Look until somebody stands still, or until `ended`."""
        while not ended.wait(self.pause):
            if stuck := self.look(time.monotonic()):
                return stuck
        return None

    def last(self) -> list[Beat]:
        """The last beat of every process that wrote one."""
        return [beat for beat in self._seen.values() if beat.pid]

    def look(self, now: float) -> Stuck | None:
        """Who stands still at a moment of a clock that runs on, in seconds."""
        # A watch that was stopped itself has no reason to find the others late.
        elapsed = 0.0 if self._looked is None else now - self._looked
        self._looked = now
        self._now += min(elapsed, 2 * self.pause)
        self._read()
        return self._found()

    def _read(self) -> None:
        found = {rank: beat for rank in range(self.world) if (beat := self._beat(rank))}
        for rank in set(range(self.world)) - set(self._seen) - set(found) - self._ended:
            if found:
                found[rank] = Beat(rank)  # the others have begun, so it should
        for rank, beat in found.items():
            before = self._seen.get(rank)
            if before is None or before.tick != beat.tick:
                self._ticked[rank] = self._now
            if before is None or _place(before) != _place(beat):
                self._moved[rank] = self._now
            self._seen[rank] = beat
            if beat.at_work and self.began is None:
                self.began = beat.step if beat.began is None else beat.began

    def _beat(self, rank: int) -> Beat | None:
        """What a process of this launch wrote; None before, and after it took it away in order."""
        try:
            said = json.loads((self.folder / FOLDER / str(rank)).read_bytes())
        except FileNotFoundError:
            if rank in self._seen and self._seen[rank].pid:
                self._ended.add(rank)
                del self._seen[rank]
            return None
        except (OSError, ValueError):  # caught while it was written
            return None
        return Beat(**said) if said.pop("launch") == self.launch else None

    def _found(self) -> Stuck | None:
        late = self._now - self._limit
        step = max((beat.step for beat in self._seen.values()), default=0)
        stopped = [beat for rank, beat in self._seen.items() if self._ticked[rank] < late]
        if stopped:
            who = _furthest_behind(stopped)
            return Stuck(who, step, stopped=True, seconds=self._now - self._ticked[who.rank])
        still = [beat for rank, beat in self._seen.items() if self._moved[rank] < late]
        idle = [beat for beat in still if beat.at_work and not beat.waiting]
        all_wait = len(still) == self.world and all(beat.waiting for beat in still)
        if idle or all_wait:
            who = _furthest_behind(idle or still)
            alike = not idle and len({beat.met for beat in still}) == 1
            seconds = self._now - self._moved[who.rank]
            return Stuck(None if alike else who, step, stopped=False, seconds=seconds)
        return None


def _furthest_behind(found: Sequence[Beat]) -> Beat:
    return min(found, key=lambda beat: (beat.met, beat.rank))


def _place(beat: Beat) -> tuple[int, int, bool, bool]:
    return beat.beats, beat.met, beat.at_work, beat.waiting


class Hang:
    """Watches the processes of a launch; `found` is the error when one stands still."""

    def __init__(self, folder: Path, launch: str, world: int, seconds: float) -> None:
        self.folder, self.world, self.seconds = folder, world, seconds
        self.watch = Watch(folder, launch, world, seconds)
        self.found: errors.ItuneError | None = None

    @contextlib.contextmanager
    def watched(self, act: Callable[[Hang], None]) -> Iterator[None]:
        """Watch from a thread while a block runs; `act` is called once when one stands still."""
        ended = threading.Event()

        def look() -> None:
            if (stuck := self.watch.wait(ended)) is not None:
                self.found = self._error(stuck)
                act(self)

        thread = threading.Thread(target=look, name="itune-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _error(self, stuck: Stuck) -> errors.ItuneError:
        """What is told; one can go on by itself if a checkpoint was published by this launch."""
        if stuck.beat is None:
            who = f"the {self.world} processes wait for each other; their network may be down"
        else:
            place = f" ({stuck.beat.pid} on {stuck.beat.host})" if stuck.beat.pid else ""
            how = "did not move at all" if stuck.stopped else "did not get on with its work"
            who = f"process {stuck.beat.rank} of {self.world}{place} {how}"
        text = (
            f"{self.folder}: {who} for {stuck.seconds:.3g} s, after step {stuck.step}, so the run "
            f"was ended before launch.hang_timeout ({self.seconds:g} s) is over. Checkpoints are "
            "whole: run the same command again to go on, or raise launch.hang_timeout if a single "
            "micro-batch takes as long."
        )
        began = self.watch.began
        published = storage.numbered(self.folder / "checkpoints")
        went_on = began is not None and bool(published) and int(published[0].name) > began
        return errors.Interrupted(text) if went_on else errors.EnvironmentRefusal(text)
