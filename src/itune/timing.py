"""Where a run's time goes: seconds by phase, and with `training.profile` operators and a trace.

Needs torch.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# Steps that the trace holds, after those in which memory and kernels settle.
SETTLE, TRACED = 2, 3
TRACE = "trace.json"


class Clock:
    """Seconds of this process by phase; the rest of the whole is what nobody claimed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.began = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside under a name."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started)

    def add(self, name: str, seconds: float) -> None:
        """Count seconds under a name."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def shares(self) -> list[tuple[str, float, float]]:
        """(phase, seconds, share of the whole), the longest first, what is left last."""
        whole = max(time.perf_counter() - self.began, 1e-9)
        known = sorted(self.seconds.items(), key=lambda item: -item[1])
        rest = max(0.0, whole - sum(self.seconds.values()))
        return [(name, s, s / whole) for name, s in [*known, ("other", rest)]]


class Profile:
    """torch's profiler over some steps near the start, if asked for.

    It watches; weights and losses are the same to the last bit with and without it.
    """

    def __init__(self, folder: Path, *, on: bool, left: int) -> None:
        self.folder = folder
        self.operators: list[tuple[str, float, int]] | None = [] if on else None
        self._until = min(SETTLE + TRACED, left)
        self._from = max(0, self._until - TRACED)
        self._at = 0
        self._profiler: Any = None

    def step(self) -> None:
        """A step begins, or the last one is over."""
        if self.operators is None:
            return
        if self._at == self._from:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        elif self._at == self._until:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self.folder / TRACE))
            self.operators = _operators(self._profiler.key_averages())
            self._profiler = None
        self._at += 1

    def close(self) -> None:
        """Let go of the profiler when a run ends inside the steps that it watches."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None


def _operators(averages: Any) -> list[tuple[str, float, int]]:
    """(operator, seconds of its own, calls), the twelve that took longest."""
    device = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    longest = sorted(averages, key=lambda event: -getattr(event, device))[:12]
    return [(event.key, getattr(event, device) / 1e6, event.count) for event in longest]


def title(profile: Profile) -> str:
    """What the table shows, and where the trace is."""
    return (
        f"Where the time went: the whole training, then {TRACED} of its steps by operator "
        f"({profile.folder / TRACE}, for ui.perfetto.dev)"
    )


def rows(clock: Clock, profile: Profile) -> list[list[str]]:
    """The table for the terminal: phases of the run, then operators of the traced steps."""
    lines = [[name, f"{s:.2f}", f"{100 * share:.1f} %"] for name, s, share in clock.shares()]
    operators = profile.operators or []
    whole = sum(s for _, s, _ in operators) or 1.0
    lines += [[name, f"{s:.3f}", f"{100 * s / whole:.1f} %"] for name, s, _ in operators]
    return lines
