"""The corpus: encoded examples of all sources, how many there are of what, and their order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from itune import (
    cases,
    encoding,
    formats,
    joining,
    orders,
    preparing,
    recipes,
    sources,
    tallies,
    templates,
)
from itune.cases import Case as Case
from itune.cases import Task as Task
from itune.cases import is_text as is_text
from itune.cases import tasks as tasks
from itune.preparing import Encoded as Encoded
from itune.sources import load as load


@dataclass(frozen=True)
class Corpus:
    """Encoded examples as flat arrays: example i is `ids[starts[i]:starts[i + 1]]`.

    ids int32 [tokens]; supervised bool [tokens]; starts int64 [examples + 1]; and per example
    its source, its row in it, its wording and whether it was cut (int32 [examples] each). What
    has one value a token is mapped from files and never read as a whole: take `example(i)`.
    `thinned`: whether prompts are hidden in part, which is for training alone.
    `learnt` holds the targets an example where they are known. For each source, `plain` says
    whether its examples are running text, `taken` what `sources.Rows.taken` is.
    """

    ids: Any
    supervised: Any
    starts: np.ndarray
    source: np.ndarray
    row: np.ndarray
    wording: np.ndarray
    truncated: np.ndarray
    sources: tuple[recipes.Source, ...]
    wordings: tuple[int, ...]
    dropped: int
    learnt: np.ndarray | None = None
    top: int | None = None
    reports: tuple[tallies.Report, ...] = ()
    duplicated: int = 0
    plain: tuple[bool, ...] = ()
    taken: tuple[np.ndarray | None, ...] = ()
    thinned: bool = False

    def __len__(self) -> int:
        return len(self.starts) - 1

    def number(self, index: int) -> int:
        """The number, from 0, that an example's row has in the whole of its source."""
        taken, row = self.taken[int(self.source[index])], int(self.row[index])
        return row if taken is None else int(taken[row])

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """One example's ids, int32, and for each whether it is learnt, bool; views, not copies."""
        start, end = int(self.starts[index]), int(self.starts[index + 1])
        return self.ids[start:end], self.supervised[start:end]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens an example, int64 [examples]."""
        return np.diff(self.starts)

    @property
    def targets(self) -> np.ndarray:
        """Tokens an example that carry loss, int64 [examples]: the first of all never does."""
        if self.learnt is not None:
            return self.learnt
        supervised = np.asarray(self.supervised)
        sums = np.concatenate([[0], np.cumsum(supervised, dtype=np.int64)])
        first = supervised[self.starts[:-1]]
        return np.asarray(sums[self.starts[1:]] - sums[self.starts[:-1]] - first)

    @property
    def highest(self) -> int:
        """The highest id of all."""
        return int(self.ids.max()) if self.top is None else self.top

    @property
    def counts(self) -> tallies.Counts:
        """What became of the rows."""
        rows = self._rows
        kept = int((rows[1:] != rows[:-1]).sum()) + 1 if len(self) else 0
        sums = {
            name: sum(getattr(report.counts, name) for report in self.reports)
            for name in ("too_long", "empty", "guarded", "allowed")
        }
        return tallies.Counts(
            rows=kept,
            tokens=int(self.starts[-1]),
            supervised=int(self.targets.sum()),
            truncated=int(self.truncated.sum()),
            dropped=self.dropped,
            read=kept + self.dropped + sums["empty"],
            duplicated=self.duplicated,
            **sums,
        )

    def an_epoch(self, seed: int) -> tallies.Counts:
        """The counts of what one epoch sees, each row in the wordings of its visits."""
        order = self.epoch(0, seed)
        return dataclasses.replace(
            self.counts,
            tokens=int(self.lengths[order].sum()),
            supervised=int(self.targets[order].sum()),
            truncated=int(self.truncated[order].sum()),
        )

    def shares(self, seed: int) -> list[dict[str, Any]]:
        """For each source what an epoch sees of it: `rows` and `tokens`, with their shares."""
        order = self.epoch(0, seed)
        source, n = self.source[order], len(self.sources)
        rows = np.bincount(source, minlength=n)
        tokens = np.bincount(source, weights=self.lengths[order], minlength=n).astype(np.int64)
        return [
            {
                "rows": int(rows[k]),
                "rows_share": round(float(rows[k] / rows.sum()), 6),
                "tokens": int(tokens[k]),
                "tokens_share": round(float(tokens[k] / tokens.sum()), 6),
            }
            for k in range(n)
        ]

    def epoch(self, epoch: int, seed: int) -> np.ndarray:
        """Which examples an epoch sees, int64, in their order: a pure function of its arguments.

        A source's weight says how often each of its rows is seen an epoch; a broken part is a
        sample drawn anew each epoch. Each visit takes the wording that its number gives. An
        example's place follows from its own row alone, so it needs no other row to be known.
        """
        pieces = self._pieces()
        chosen, keys = [], []
        for number, (source, n_wordings) in enumerate(
            zip(self.sources, self.wordings, strict=True)
        ):
            members = np.flatnonzero(self.source == number)
            for visit, share in orders.visits(source.weight, epoch):
                picked = members
                if n_wordings > 1:
                    rows = self.row[members].astype(np.uint64)
                    turn = templates.wording_of(n_wordings, seed, visit, rows)
                    picked = members[self.wording[members] == turn]
                piece = 0 if pieces is None or n_wordings > 1 else pieces[picked]
                key = orders.keys(seed, visit, number, self.row[picked], piece)
                if share < 1:
                    first = np.argsort(key, kind="stable")[: orders.taken(len(key), share)]
                    picked, key = picked[first], key[first]
                chosen.append(picked)
                keys.append(key)
        order = np.argsort(np.concatenate(keys), kind="stable")
        return np.asarray(np.concatenate(chosen)[order])

    def _pieces(self) -> np.ndarray | None:
        """Which piece of its row each example is, int64; None where every row is one."""
        rows = self._rows
        new = rows[1:] != rows[:-1]
        if new.all():
            return None
        places = np.arange(len(rows))
        places[1:][~new] = 0
        return np.asarray(np.arange(len(rows)) - np.maximum.accumulate(places))

    @property
    def _rows(self) -> np.ndarray:
        """Source and row in one number an example, ascending."""
        return np.asarray(self.source.astype(np.int64) << 32 | self.row)


# --- making one ---------------------------------------------------------------------------


def corpus(
    given: Sequence[recipes.Source],
    encoder: encoding.Encoder,
    training: recipes.Training,
    *,
    visits: float | None = 1,
    command: str = "",
    max_dropped: float | None = None,
) -> Corpus:
    """Every source read, rendered and encoded, through itune's own cache.

    `visits`: how many epochs choose wordings; None = encode every row in every wording.
    `command`: for which command, as `formats.reading` takes it. `max_dropped`: the share of a
    source's rows that may be left out. Raises DataError when a row is broken, when more are left
    out, or when nothing is left to learn from.
    """
    parts = []
    for source in given:
        n_visits = None if visits is None else math.ceil(visits * math.ceil(source.weight))
        part = preparing.prepared(source, encoder, training, visits=n_visits, command=command)
        tallies.refuse_loss(part, training, max_dropped)
        parts.append(part)
    lengths = np.concatenate([part.column("length") for part in parts])
    keys = np.concatenate([part.column("keys", "uint64") for part in parts])
    return Corpus(
        ids=joining.joined([part.column("ids") for part in parts]),
        supervised=joining.joined([part.column("supervised", "bool") for part in parts]),
        starts=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        source=np.repeat(
            np.arange(len(parts), dtype=np.int32), [len(part.column("length")) for part in parts]
        ),
        row=np.concatenate([part.column("row") for part in parts]),
        wording=np.concatenate([part.column("wording") for part in parts]),
        truncated=np.concatenate([part.column("truncated") for part in parts]),
        sources=tuple(given),
        wordings=tuple(part.reading.wordings for part in parts),
        dropped=sum(tallies.dropped(part) for part in parts),
        learnt=np.concatenate([part.column("targets") for part in parts]).astype(np.int64),
        top=max(part.known["highest"] for part in parts),
        reports=tuple(tallies.report(part) for part in parts),
        duplicated=tallies.repeats(keys) - sum(max(0, part.known["empty"] - 1) for part in parts),
        plain=tuple(part.reading.is_text for part in parts),
        taken=tuple(part.rows.taken for part in parts),
    )


def heldout(recipe: recipes.Recipe, encoder: encoding.Encoder, command: str = "") -> Corpus | None:
    """The rows on which the held-out loss is measured: some of each evaluation source."""
    count = recipe.training.heldout_rows
    if not recipe.data.eval or not count:
        return None
    each = max(1, count // len(recipe.data.eval))
    some = [
        source.model_copy(update={"limit": min(each, source.limit or each), "weight": 1.0})
        for source in recipe.data.eval
    ]
    return corpus(some, encoder, recipe.training, visits=1, command=command)


def texts(given: Sequence[recipes.Source], command: str = "") -> Iterator[str]:
    """The texts of the sources, for training a tokenizer: what is rendered, turn by turn."""
    for source in given:
        rows = sources.read(source)
        how = cases.reading(rows, command)
        for index, row in enumerate(rows.each()):
            if how.is_text and formats.is_blank(row):
                continue
            example = cases.placed(rows, how, index, row, 0)
            if example.text is not None:
                yield example.text
            else:
                yield from (message.content for message in example.messages)


def bytes_of(corpus: Corpus) -> np.ndarray:
    """Bytes of UTF-8 that the targets of each example of one source stand for, float64 [examples].

    A text's own bytes, shared out by the tokens of its pieces: together they are exact, but for
    the first token of each piece, which nothing foretells.
    """
    (source,) = corpus.sources
    rows = sources.read(source)
    how = cases.reading(rows)
    sizes, tokens = np.zeros(len(rows.data)), np.zeros(len(rows.data))
    np.add.at(tokens, corpus.row, corpus.lengths)
    wanted = set(corpus.row.tolist())
    for index, row in enumerate(rows.data):
        if index in wanted:
            sizes[index] = len((cases.placed(rows, how, index, row, 0).text or "").encode())
    each: np.ndarray = corpus.targets * (sizes / np.maximum(tokens, 1))[corpus.row]
    return each


def from_tokens(examples: Sequence[encoding.Tokens]) -> Corpus:
    """A corpus of examples at hand, outside of any source: for probes and likelihoods."""
    n = len(examples)
    blank = np.zeros(n, np.int32)
    return Corpus(
        ids=np.concatenate([np.array(e.ids, np.int32) for e in examples]),
        supervised=np.concatenate([np.array(e.supervised, bool) for e in examples]),
        starts=np.cumsum([0, *(len(e.ids) for e in examples)], dtype=np.int64),
        source=blank,
        row=np.arange(n, dtype=np.int32),
        wording=blank,
        truncated=blank,
        sources=(),
        wordings=(),
        dropped=0,
    )
