"""A source opened to look at some of its rows: as Examples, and as training encodes them."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from itune import cases, encoding, formats, orders, preparing, recipes
from itune import sources as opening

if TYPE_CHECKING:
    import datasets

STREAM_ROWS = 10_000  # chosen: a look at a stream is done in seconds


class Opened:
    """A source, read but not encoded; `number` is its place in the recipe, from 0.

    `plain` is running text, cut in pieces; `n_wordings` is 1 then. `columns` are those whose texts
    make the prompt. Of a stream only the first STREAM_ROWS rows are looked at. Raises DataError
    when the source cannot be read.
    """

    def __init__(self, number: int, source: recipes.Source, command: str = "") -> None:
        self.number, self.source = number, source
        self._opened = opening.read(source)
        self._reading = cases.reading(self._opened, command)
        self.rows: datasets.Dataset = _looked_at(self._opened)
        self.plain = self._reading.is_text
        self.n_wordings = self._reading.wordings
        self.columns = sorted(self._reading.columns())

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def told(self) -> list[str]:
        """What the user should know of how it is read, a line each."""
        lines = [*self._opened.notes]
        if self._reading.told:
            lines.append(f"{self.source.path}: read as {self._reading.told}")
        return lines

    def is_empty(self, index: int) -> bool:
        """Whether a row is a text without any, such as a blank line, which nobody misses."""
        text = self.rows[index].get("text") if self.plain else None
        return isinstance(text, str) and not text.strip()

    def number_of(self, index: int) -> int:
        """The number, from 0, that a row has in the whole source."""
        return self._opened.number(index)

    @property
    def mark(self) -> str:
        """Changes when the rows or how they are read do."""
        text = json.dumps([self._opened.identity, repr(self._reading)], default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def first(self, seed: int, count: int) -> list[int]:
        """The rows that the first visit of training sees first, by their first piece where cut."""
        keys = orders.keys(seed, 0, self.number, np.arange(len(self)), 0)
        return [int(row) for row in np.argsort(keys, kind="stable")[:count]]

    def example(self, index: int, row: Mapping[str, Any], wording: int) -> formats.Example:
        """The Example of a row. Raises DataError with its place."""
        return cases.placed(self._opened, self._reading, index, row, wording)

    def batches(self, size: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """All rows, `size` at a time, and the number of the first of them."""
        for start in range(0, len(self.rows), size):
            yield start, _rows(self.rows[start : start + size])

    def encoded(
        self,
        indices: Sequence[int],
        encoder: encoding.Encoder,
        training: recipes.Training,
        *,
        visits: int | None,
    ) -> list[preparing.Encoded]:
        """What training makes of some rows; a dropped one gives none.

        `visits`: how many visits choose wordings; None = every wording. Raises DataError.
        """
        asked = visits if self.n_wordings > 1 else None
        job = preparing.Job(self._opened, self._reading, encoder, training, asked)
        rows = _rows(self.rows[list(indices)])
        return job.examples(list(zip(indices, rows, strict=True)))


def _rows(columns: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    values = zip(*columns.values(), strict=True)
    return [dict(zip(columns, each, strict=True)) for each in values]


def _looked_at(opened: opening.Rows) -> datasets.Dataset:
    if not opened.source.streaming:
        rows: datasets.Dataset = opened.data
        return rows
    import datasets

    return datasets.Dataset.from_list(list(itertools.islice(opened.each(), STREAM_ROWS)))
