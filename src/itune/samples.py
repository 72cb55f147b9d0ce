"""A source opened to look at some of its rows: as Examples, and as training encodes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from itune import data, encoding, errors, formats, orders, recipes, templates

if TYPE_CHECKING:
    import datasets


class Opened:
    """A source, read but not encoded; `number` is its place in the recipe, from 0.

    `plain` is running text, cut in pieces; `n_wordings` is 1 then. `columns` are those that a
    template reads. Raises DataError when the source cannot be read.
    """

    def __init__(self, number: int, source: recipes.Source) -> None:
        self.number, self.source = number, source
        self.rows: datasets.Dataset = data.load(source)
        self._template = templates.load(source.template) if source.template else None
        self.plain = self._template is None
        self.n_wordings = max(1, len(self._template.prompts)) if self._template else 1
        self.columns = sorted(self._template.columns()) if self._template else []

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def mark(self) -> str:
        """Changes when the rows or their template do."""
        text = json.dumps([self.rows._fingerprint, repr(self._template)])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def first(self, seed: int, count: int) -> list[int]:
        """The rows that the first visit of training sees first, by their first piece where cut."""
        keys = orders.keys(seed, 0, self.number, np.arange(len(self)), 0)
        return [int(row) for row in np.argsort(keys, kind="stable")[:count]]

    def example(self, index: int, row: Mapping[str, Any], wording: int) -> formats.Example:
        """The Example of a row. Raises DataError with its place."""
        try:
            return formats.example(self._template, row, wording)
        except errors.UserError as error:
            raise errors.DataError(f"{self.source.path} row {index + 1}: {error}") from error

    def batches(self, size: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """All rows, `size` at a time, and the number of the first of them."""
        start = 0
        for batch in self.rows.iter(batch_size=size):
            values = zip(*batch.values(), strict=True)
            rows = [dict(zip(batch, each, strict=True)) for each in values]
            yield start, rows
            start += len(rows)

    def encoded(
        self,
        indices: Sequence[int],
        encoder: encoding.Encoder,
        training: recipes.Training,
        *,
        visits: int | None,
    ) -> list[data.Encoded]:
        """What training makes of some rows; a dropped one gives none. See `data.examples`."""
        return data.examples(self.rows, indices, self.source, encoder, training, visits=visits)
