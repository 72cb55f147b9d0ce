"""What is told of a run as it goes, and how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Watcher(Protocol):
    """Whoever shows how a run goes."""

    def begin(self, steps: int, tokens: int, done_steps: int, done_tokens: int) -> None:
        """The run starts, or goes on after `done_steps`."""

    def step(self, record: dict[str, Any]) -> None:
        """One step is done; the record is its line of the log."""

    def say(self, text: str) -> None:
        """A sentence for the user."""

    def end(self) -> None:
        """No more steps follow."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table for the user."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How training ended. Losses are in nats a token; seconds are of training alone.

    `waited`: seconds of them in which a step had to wait for its rows. `best_step`: the step whose
    weights and held-out loss these are, where it is not simply the last.
    """

    steps: int
    tokens: int
    supervised_tokens: int
    seconds: float
    waited: float
    loss: float
    heldout_loss: float | None
    best_step: int | None = None
