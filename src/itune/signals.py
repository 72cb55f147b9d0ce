"""Signals that ask to stop: heeded at once, or between two steps; a second one ends all.

A signal that interrupts a library's own code, an import say, may be taken for a fault there and
lost. So who works long asks `check`, and what fails after it is told as the signal's doing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from itune import errors

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def asking() -> tuple[signal.Signals, ...]:
    """The signals that ask to stop; a hangup does not where it is ignored, as under nohup."""
    deaf = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(each for each in ASKING if each != signal.SIGHUP or not deaf)


def told(name: str | None) -> str:
    """What a user reads after a signal stopped what has no checkpoint of its own."""
    return f"stopped by {name}; what was finished is kept. Run the same command again to go on."


def early() -> None:
    """Until a command listens, end at once and in order: nothing has begun."""
    for number in asking():
        signal.signal(number, _leave)


def _leave(number: int, _frame: Any) -> None:
    sys.stderr.write(f"error: {told(signal.Signals(number).name)}\n")
    sys.stderr.flush()
    os._exit(errors.Interrupted.exit_code)


def deafen() -> None:
    """Heed no signal any more: the exit code is known, and only the end is left."""
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)


class Stopped(BaseException):
    """A signal asked to stop where nothing needed to be finished first; its text is its name.

    No Exception, so that no library takes it for a fault of its own; no KeyboardInterrupt, which
    the command line's library would answer itself.
    """


class Listener:
    """Hears the signals of `asking()` while `listening()`; `asked` is the name of the first.

    `raised`: whether Stopped was raised for it, so that whatever fails now may come of that.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self.raised = False
        self._waiting = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Raise Stopped at a first signal, or note it while `waiting`; a second one kills."""
        self.settle()
        before = {number: signal.signal(number, self._heard) for number in asking()}
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
        self.asked, self.raised = None, False

    def check(self) -> None:
        """Raise Stopped where a signal asked for it, and a library kept that from getting here."""
        if self.asked is not None and not self._waiting:
            raise Stopped(self.asked)

    def _heard(self, number: int, _frame: Any) -> None:
        if self.asked is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.asked = signal.Signals(number).name
        if not self._waiting:
            self.raised = True
            raise Stopped(self.asked)


LISTENER = Listener()
