"""Encoded examples on their way into the files of a part, and the count of what became of rows."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from itune import encoding

# What of an example is kept beside its tokens, each a file of int32.
COLUMNS = ("length", "targets", "row", "wording", "truncated")


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as training has it: its row and wording, both from 0, and its tokens."""

    row: int
    wording: int
    truncated: bool
    tokens: encoding.Tokens


@dataclass
class Tally:
    """What became of a source's rows; `held`: control strings that answers hold as text, and in
    how many examples each; `answers`: of how many kept rows each of the choices is the answer."""

    read: int = 0
    kept: int = 0
    tokens: int = 0
    too_long: int = 0
    empty: int = 0
    highest: int = 0
    guarded: int = 0
    allowed: int = 0
    turned: int = 0
    turned_at: str = ""
    held: dict[str, int] = field(default_factory=dict)
    answers: dict[str, int] = field(default_factory=dict)

    def add(self, later: Tally) -> None:
        """Count the rows of another tally, which come after these."""
        highest, turned_at = max(self.highest, later.highest), self.turned_at or later.turned_at
        for mine, theirs in ((self.held, later.held), (self.answers, later.answers)):
            for text, number in theirs.items():
                mine[text] = mine.get(text, 0) + number
        for name, value in asdict(later).items():
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
        self.highest, self.turned_at = highest, turned_at


class Out:
    """Where encoded examples go; what became of their rows, and how long each would be whole."""

    def __init__(self) -> None:
        self.tally = Tally()
        self.full = array("i")

    def row(self, text: str) -> None:
        """Count a row; `text` is what tells it from others."""
        self.tally.read += 1

    def keep(self, tokens: encoding.Tokens, row: int, wording: int, truncated: bool) -> None:
        """Take an example."""
        raise TypeError(f"{type(self).__name__} takes none")


class Few(Out):
    """A few examples, at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Encoded] = []

    def keep(self, tokens: encoding.Tokens, row: int, wording: int, truncated: bool) -> None:
        """Take an example."""
        self.kept.append(Encoded(row, wording, truncated, tokens))


class Batch(Out):
    """The examples of some rows, as flat arrays that are sent from process to process."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = {name: array("i") for name in COLUMNS}
        self.keys = array("Q")
        self.ids = array("i")
        self.supervised = bytearray()

    def row(self, text: str) -> None:
        """Count a row; `text` is what tells it from others."""
        super().row(text)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self.keys.append(int.from_bytes(digest, "little"))

    def keep(self, tokens: encoding.Tokens, row: int, wording: int, truncated: bool) -> None:
        """Take an example."""
        ids, learnt = tokens.ids, tokens.supervised
        self.ids.extend(ids)
        self.supervised.extend(learnt)
        self.tally.tokens += len(ids)
        self.tally.guarded += tokens.guarded
        self.tally.allowed += tokens.allowed > 0
        self.tally.highest = max(self.tally.highest, max(ids))
        values = (len(ids), sum(learnt) - bool(learnt[0]), row, wording, int(truncated))
        for column, value in zip(self.columns.values(), values, strict=True):
            column.append(value)


class Writer:
    """The files of a part while they grow, a batch after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.whole = Batch()
        self.ids = (folder / "ids.bin").open("wb")
        self.supervised = (folder / "supervised.bin").open("wb")

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.ids.close()
        self.supervised.close()

    def add(self, made: Batch) -> None:
        """Write a batch."""
        self.ids.write(made.ids)
        self.supervised.write(made.supervised)
        for name, column in made.columns.items():
            self.whole.columns[name].extend(column)
        self.whole.keys.extend(made.keys)
        self.whole.full.extend(made.full)
        self.whole.tally.add(made.tally)

    def known(self) -> dict[str, Any]:
        """Write the small columns; what is known of the whole."""
        for name, column in (*self.whole.columns.items(), ("keys", self.whole.keys)):
            (self.folder / f"{name}.bin").write_bytes(column.tobytes())
        full = (
            np.frombuffer(self.whole.full, np.int32) if self.whole.full else np.zeros(1, np.int32)
        )
        shares = (0.05, 0.5, 0.95, 1)
        lengths = np.quantile(full, shares, method="higher").astype(int).tolist()
        return {**asdict(self.whole.tally), "lengths": lengths}
