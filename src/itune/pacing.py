"""How often a checkpoint is worth its time, from how often the devices of a run fail.

J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17 (1974); J. T.
Daly, A higher order estimate of the optimum checkpoint interval, FGCS 22 (2006).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from itune import launching, runs

MEASURED = 5  # steps, of which the first is left out: it warms up
MOST = 700.0  # of an exponent: the largest that a float holds is e to the 709th


def interval(checkpoint: float, failures: float) -> float:
    """Seconds of work between checkpoints that lose the least time (Young).

    checkpoint: seconds that one takes; failures: mean seconds between failures of the whole run.
    """
    return math.sqrt(2 * checkpoint * failures)


def lost(every: float, checkpoint: float, failures: float, restart: float = 0.0) -> float:
    """The share of the time that does not get a run on, with `every` seconds of work between
    checkpoints and failures at random moments (Daly's exact expectation).

    restart: seconds from a failure to the first step after it.
    """
    if (every + checkpoint + restart) / failures > MOST:
        return 1.0
    whole = failures * math.exp(restart / failures) * math.expm1((every + checkpoint) / failures)
    return 1 - every / whole


class Pace:
    """Steps from one checkpoint to the next, decided once, after the first steps of a run.

    hours: mean hours between failures of one device.
    """

    def __init__(self, hours: float, processes: int) -> None:
        self.failures = 3600 * hours / processes
        self.processes = processes
        self._seconds: list[float] = []

    def add(self, seconds: float) -> bool:
        """Count a step; whether enough are measured now."""
        self._seconds.append(seconds)
        return len(self._seconds) >= MEASURED

    def steps(self, checkpoint: float, total: int) -> int:
        """Steps between checkpoints that take so many seconds each."""
        wanted = interval(checkpoint, self.failures) / max(self.step_seconds, 1e-9)
        return min(total, max(1, round(wanted)))

    @property
    def step_seconds(self) -> float:
        """The median of what was measured but its first."""
        return statistics.median(self._seconds[1:] or self._seconds)

    def decided(self, run: runs.Run, total: int, say: Callable[[str], None]) -> int:
        """The steps, said and kept in run.json by the first process, whose word goes."""
        if not launching.is_main():
            return 0
        seconds = float(run.manifest["checkpoint_seconds"])
        found = self.steps(seconds, total)
        run.update(save_every=found)
        say(self.told(found, seconds))
        return found

    def told(self, steps: int, checkpoint: float) -> str:
        """What the user is told of it."""
        every = steps * self.step_seconds
        share = lost(every, checkpoint, self.failures)
        many = f", {self.processes} processes" if self.processes > 1 else ""
        return (
            f"a checkpoint every {steps:,} steps ({every:.3g} s): one takes {checkpoint:.2g} s and "
            f"a step {self.step_seconds:.2g} s, a failure is expected every "
            f"{self.failures / 3600:,.3g} h (launch.mtbf_hours{many}); "
            f"{share:.2%} of the time is lost to both."
        )
