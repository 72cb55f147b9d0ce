"""Which examples training sees first, found without encoding the rest."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from itune import data, encoding, orders, recipes, samples, templates


class Shown(NamedTuple):
    """One example of the preview, and the source that its row is from."""

    source: Rows
    example: data.Encoded


class _Stream(NamedTuple):
    """All that one visit to a source may see: rows and pieces, and the keys that sort them."""

    source: Rows
    visit: int
    share: float
    rows: np.ndarray
    pieces: np.ndarray
    keys: np.ndarray


class Rows(samples.Opened):
    """A training source whose rows are encoded one by one, when they are asked for."""

    def __init__(
        self,
        number: int,
        source: recipes.Source,
        encoder: encoding.Encoder,
        training: recipes.Training,
        command: str = "",
    ) -> None:
        super().__init__(number, source, command)
        self.encoder, self.training = encoder, training
        self.known: dict[int, list[data.Encoded]] = {}

    def encode(self, wanted: Sequence[int]) -> None:
        """Encode those of the rows that were not yet, in the wordings of the first epoch."""
        new = sorted(set(wanted) - set(self.known))
        for row in new:
            self.known[row] = []
        for start in range(0, len(new), 1000):
            some, visits = new[start : start + 1000], math.ceil(self.source.weight)
            for each in self.encoded(some, self.encoder, self.training, visits=visits):
                self.known[each.row].append(each)

    def wording(self, visit: int, row: int) -> int:
        """The wording that a row has in a visit."""
        return int(templates.wording_of(self.n_wordings, self.training.seed, visit, row))

    def seen(self, visit: int, row: int, piece: int) -> data.Encoded | None:
        """What training sees of a row in a visit; None when it is dropped or has no such piece."""
        self.encode([row])
        made = self.known[row]
        if self.n_wordings > 1:
            wanted = self.wording(visit, row)
            return next((each for each in made if each.wording == wanted), None)
        return made[piece] if piece < len(made) else None

    def streams(self) -> Iterator[_Stream]:
        """One stream for each visit of the first epoch."""
        most = self._most_pieces()
        rows = np.repeat(np.arange(len(self)), most)
        pieces = np.arange(len(rows)) - np.repeat(np.cumsum(most) - most, most)
        for visit, share in orders.visits(self.source.weight, 0):
            keys = orders.keys(self.training.seed, visit, self.number, rows, pieces)
            yield _Stream(self, visit, share, rows, pieces, keys)

    def _most_pieces(self) -> np.ndarray:
        """Into how many pieces each row may be cut, int64 [rows]: a token has a byte or more."""
        most = np.ones(len(self), np.int64)
        if not self.plain or "text" not in self.rows.column_names:
            return most
        column = self.rows.select_columns("text").with_format("arrow")[:]["text"]
        if str(column.type) not in {"string", "large_string"}:
            return most
        kind = np.int32 if str(column.type) == "string" else np.int64
        borders = [
            np.frombuffer(chunk.buffers()[1], kind)[chunk.offset :][: len(chunk) + 1]
            for chunk in column.chunks
            if len(chunk)
        ]
        sizes = np.concatenate([np.diff(each).astype(np.int64) for each in borders])
        # 2: a space before the text, and the end-of-sequence token
        room = max(1, self.training.max_length - self.encoder.room)
        return np.asarray(most + (sizes + 2) // room)

    @functools.cached_property
    def all_visits(self) -> Counter[int]:
        """How many examples each visit has to choose from; encodes the whole source."""
        self.encode(range(len(self)))
        counts: Counter[int] = Counter()
        for visit, _ in orders.visits(self.source.weight, 0):
            for row, made in self.known.items():
                several = self.n_wordings > 1
                counts[visit] += self.seen(visit, row, 0) is not None if several else len(made)
        return counts


def _within(stream: _Stream, rank: int, looked: int) -> bool:
    """Whether the example of this rank by its key is within the share that the visit sees.

    `looked`: how many rows or pieces were looked at to find it.
    """
    if stream.share >= 1 or rank == 0:
        return True
    if rank >= orders.taken(len(stream.rows), stream.share):
        return False
    # Keys are as good as random, so of the rest at least half as many are kept as until here.
    sure = len(stream.rows) * (rank + 1) // looked // 2
    if rank < orders.taken(sure, stream.share):
        return True
    return rank < orders.taken(stream.source.all_visits[stream.visit], stream.share)


def first(sources: Sequence[Rows], number: int) -> list[Shown]:
    """The first examples of the first epoch: those of `data.Corpus.epoch(0, seed)`."""
    streams = [stream for source in sources for stream in source.streams()]
    which = np.repeat(np.arange(len(streams)), [len(stream.keys) for stream in streams])
    inside = np.concatenate([np.arange(len(stream.keys)) for stream in streams])
    order = np.argsort(np.concatenate([stream.keys for stream in streams]), kind="stable")
    looked: Counter[int] = Counter()
    kept: Counter[int] = Counter()
    out: list[Shown] = []
    at_once = 2 * number + 8
    for start in range(0, len(order), at_once):
        chunk = [
            (int(which[k]), streams[which[k]], inside[k]) for k in order[start : start + at_once]
        ]
        for source in sources:
            source.encode([int(s.rows[i]) for _, s, i in chunk if s.source is source])
        for name, stream, i in chunk:
            found = stream.source.seen(stream.visit, int(stream.rows[i]), int(stream.pieces[i]))
            looked[name] += 1
            kept[name] += found is not None
            if found is not None and _within(stream, kept[name] - 1, looked[name]):
                out.append(Shown(stream.source, found))
            if len(out) == number:
                return out
    return out
