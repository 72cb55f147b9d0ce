"""Signals that ask to stop: heeded at once, or between two steps; a second one ends all."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Stopped(BaseException):
    """A signal asked to stop where nothing needed to be finished first; its text is its name.

    No Exception, so that no library takes it for a fault of its own; no KeyboardInterrupt, which
    the command line's library would answer itself.
    """


class Listener:
    """Hears the signals of `ASKING` while `listening()`; `asked` is the name of the first."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self._waiting = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Raise Stopped at a first signal, or note it while `waiting`; a second one kills."""
        self.asked = None
        before = {number: signal.signal(number, self._heard) for number in ASKING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Only note a signal: whoever works in this block asks `asked`, and stops in order."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def settle(self) -> None:
        """Go on after a signal that was answered: the next one is a first one again."""
        self.asked = None

    def _heard(self, number: int, _frame: Any) -> None:
        if self.asked is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.asked = signal.Signals(number).name
        if not self._waiting:
            raise Stopped(self.asked)


LISTENER = Listener()
