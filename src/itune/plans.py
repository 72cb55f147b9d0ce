"""The plan of steps: which rows each optimiser step sees, and how ranks share them.

Arrays, not objects: a plan of ten million rows is a cut point a step and an order an epoch.
"""

from __future__ import annotations

import array
import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from itune import batches, objectives

if TYPE_CHECKING:
    from itune import data, recipes

_ORDERS_KEPT = 2  # a step may lie across the border of two epochs
_AT_ONCE = 1 << 22  # rows that are cut in one go; chosen: some 200 MB, whatever the run's size


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step: `ranks[r]` holds rank r's micro-batches, each the indices of examples.

    `targets` counts the tokens that carry loss over all ranks: what the loss is divided by.
    `epoch` is how many epochs are seen once the step is done. Every rank has as many micro-batches
    as the others if it has as many rows.
    """

    ranks: tuple[tuple[np.ndarray, ...], ...]
    targets: int
    tokens: int
    epoch: float


@dataclass
class Plan:
    """Every step of a run, known before the first: a pure function of lengths, seed and world.

    The rows of all epochs, each in its order, make one stream; step k is the stream from cuts[k]
    to cuts[k + 1]. The order of an epoch is computed again when a step of it is asked for. Which
    rows a step has follows from lengths, order and tokens_per_step alone; how they are shared and
    cut into micro-batches depends on the world and on memory too.

    cuts int64 [steps + 1]; tokens_at, targets_at int64 [steps]: sums over the step's rows.
    """

    cuts: np.ndarray
    tokens_at: np.ndarray
    targets_at: np.ndarray
    starts: list[int]  # where each epoch begins in the stream
    sizes: list[int]  # how many rows each epoch has when whole
    epoch_rows: Callable[[int], np.ndarray]
    lengths: np.ndarray
    micro_batch_tokens: int
    world: int
    padded: bool
    _orders: dict[int, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens_at)

    @property
    def tokens(self) -> int:
        """Tokens that the whole run sees."""
        return int(self.tokens_at.sum())

    def rows(self, step: int) -> np.ndarray:
        """The examples that a step sees, int64, in the order of the stream."""
        start, end = int(self.cuts[step]), int(self.cuts[step + 1])
        first = int(np.searchsorted(self.starts, start, "right")) - 1
        parts = []
        for epoch in range(first, len(self.starts)):
            begin = self.starts[epoch]
            if begin >= end:
                break
            parts.append(self._order(epoch)[max(0, start - begin) : end - begin])
        return np.concatenate(parts)

    def cost(self, rows: np.ndarray) -> int:
        """The tokens that examples take in one micro-batch, padding among them where there is."""
        lengths = self.lengths[rows]
        return int(lengths.max()) * len(lengths) if self.padded else int(lengths.sum())

    def half(self, rows: np.ndarray) -> int:
        """Half of what a micro-batch that did not fit has, in tokens; 0 where it is one row."""
        return 0 if len(rows) == 1 else max(1, min(self.cost(rows), self.micro_batch_tokens) // 2)

    def step(self, step: int) -> Step:
        """Step `step` (from 0), shared over the ranks and cut into micro-batches."""
        rows = self.rows(step)
        shares = [
            batches.micro_batches(share, self.lengths, self.micro_batch_tokens, padded=self.padded)
            for share in _shared(rows, self.lengths, self.world)
        ]
        count = max(map(len, shares))
        return Step(
            ranks=tuple(tuple(_split(parts, count)) for parts in shares),
            targets=int(self.targets_at[step]),
            tokens=int(self.tokens_at[step]),
            epoch=self.epoch(step),
        )

    def epoch(self, step: int) -> float:
        """How many epochs are seen when a step is done."""
        end = int(self.cuts[step + 1])
        last = int(np.searchsorted(self.starts, end - 1, "right")) - 1
        return round(last + (end - self.starts[last]) / self.sizes[last], 6)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            while len(self._orders) >= _ORDERS_KEPT:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = self.epoch_rows(epoch)
        return self._orders[epoch]


def plan(
    epoch_rows: Callable[[int], np.ndarray],
    lengths: np.ndarray,
    targets: np.ndarray,
    *,
    tokens_per_step: int,
    micro_batch_tokens: int,
    epochs: float = 1.0,
    max_steps: int = -1,
    world: int = 1,
    padded: bool = False,
) -> Plan:
    """The steps of a run.

    Each epoch's rows flow in their order into steps of at most `tokens_per_step` tokens (a longer
    row makes a step alone), across the border of epochs, so that every step but the last is full.
    `epoch_rows(e)` is epoch e's order and must give the same at every call. A step's rows are
    shared over `world` ranks and cut into micro-batches of at most `micro_batch_tokens` (padding
    counted where `padded`). `max_steps` above 0 decides the length instead of `epochs`.
    """
    found = _Growing()
    epoch = 0
    while (max_steps > 0 and len(found) < max_steps) or (max_steps <= 0 and epoch < epochs):
        rows = epoch_rows(epoch)
        found.sizes.append(len(rows))
        if max_steps <= 0 and epochs - epoch < 1:
            rows = rows[: max(1, round(len(rows) * (epochs - epoch)))]
        found.take(rows, lengths, targets, tokens_per_step)
        epoch += 1
    if len(found.open_lengths):
        found.close()
    cuts, tokens_at, targets_at = found.arrays(max_steps)
    return Plan(
        cuts,
        tokens_at,
        targets_at,
        found.starts,
        found.sizes,
        epoch_rows,
        lengths,
        micro_batch_tokens,
        world,
        padded,
    )


def of_run(
    settings: recipes.Training,
    corpus: data.Corpus,
    *,
    world: int,
    padded: bool,
    changing: bool = False,
    alone: bool = False,
) -> Plan:
    """The steps of a run; `changing`: what an example is differs from visit to visit; `alone`:
    each has a micro-batch of its own."""
    lengths: Any = corpus.lengths
    targets: Any = corpus.targets
    if changing:
        order = objectives.visits(corpus, settings.seed)
        lengths, targets = objectives.Repeated(lengths), objectives.Repeated(targets)
    micro = settings.micro_batch_tokens or min(settings.tokens_per_step, batches.MICRO_TOKENS)
    micro = 1 if alone else micro  # the least there is: one row makes a micro-batch in any case
    return plan(
        order if changing else lambda epoch: corpus.epoch(epoch, settings.seed),
        lengths,
        targets,
        tokens_per_step=settings.tokens_per_step,
        micro_batch_tokens=micro,
        epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
        world=world,
        padded=padded,
    )


class _Growing:
    """The plan while epochs are added: what is cut, and the last rows, whose step is open."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.sizes: list[int] = []
        self.seen = 0  # rows taken so far
        self.cuts: list[np.ndarray] = [np.zeros(1, np.int64)]
        self.tokens: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.steps = 0
        self.open_lengths = np.zeros(0, np.int64)
        self.open_targets = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return self.steps

    def take(self, rows: np.ndarray, lengths: np.ndarray, targets: np.ndarray, limit: int) -> None:
        """One more epoch. Its last step stays open: the next epoch's rows may still fit."""
        self.starts.append(self.seen)
        for begin in range(0, len(rows), _AT_ONCE):
            self._take(rows[begin : begin + _AT_ONCE], lengths, targets, limit)

    def _take(self, rows: np.ndarray, lengths: np.ndarray, targets: np.ndarray, limit: int) -> None:
        first = self.seen - len(self.open_lengths)
        costs = np.concatenate([self.open_lengths, lengths[rows]])
        ends = _cuts(costs, limit)[:-1]
        learnt = np.concatenate([self.open_targets, targets[rows]])
        self._add(first, ends, costs, learnt)
        last = int(ends[-1]) if len(ends) else 0
        self.open_lengths, self.open_targets = costs[last:].copy(), learnt[last:].copy()
        self.seen += len(rows)

    def close(self) -> None:
        """The open rows make the last step."""
        count = len(self.open_lengths)
        self._add(self.seen - count, np.array([count]), self.open_lengths, self.open_targets)

    def _add(self, first: int, ends: np.ndarray, costs: np.ndarray, learnt: np.ndarray) -> None:
        if not len(ends):
            return
        begins = np.concatenate([[0], ends[:-1]])
        self.cuts.append(first + ends)
        self.tokens.append(np.add.reduceat(costs[: ends[-1]], begins))
        self.targets.append(np.add.reduceat(learnt[: ends[-1]], begins))
        self.steps += len(ends)

    def arrays(self, max_steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(cuts, tokens, targets) of all steps, or of the first `max_steps` if above 0."""
        kept = self.steps if max_steps <= 0 else min(max_steps, self.steps)
        return (
            np.concatenate(self.cuts)[: kept + 1],
            np.concatenate(self.tokens)[:kept],
            np.concatenate(self.targets)[:kept],
        )


def _cuts(costs: np.ndarray, limit: int) -> np.ndarray:
    """Where the steps end that fill up to `limit` one after the other, the last being len(costs).

    For every place at once: the end of a step that began there; then from end to end.
    """
    sums = np.concatenate([[0], np.cumsum(costs, dtype=np.int64)])
    ends = np.searchsorted(sums, sums[:-1] + limit, "right")
    ends -= 1
    np.maximum(ends, np.arange(1, len(costs) + 1), out=ends)
    del sums
    following, place, found = memoryview(ends.data), 0, array.array("q")
    while place < len(costs):
        place = following[place]
        found.append(place)
    return np.frombuffer(found, np.int64)


def _shared(rows: np.ndarray, lengths: np.ndarray, world: int) -> list[np.ndarray]:
    """Rows for each rank, the longest first, so that ranks have nearly the same tokens."""
    ordered = rows[np.lexsort((rows, -lengths[rows]))]
    if world == 1:
        return [ordered]
    shares: list[list[int]] = [[] for _ in range(world)]
    loads = [(0, rank) for rank in range(world)]
    for row, length in zip(ordered.tolist(), lengths[ordered].tolist(), strict=True):
        load, rank = loads[0]
        shares[rank].append(row)
        heapq.heapreplace(loads, (load + length, rank))
    return [np.array(share, np.int64) for share in shares]


def _split(parts: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """The same rows in `count` parts, or in as many as there are rows if these are fewer.

    Ranks that compute as many micro-batches as the others meet them at each collective call.
    """
    made = list(parts)
    while len(made) < count:
        widest = max(range(len(made)), key=lambda k: len(made[k]), default=None)
        if widest is None or len(made[widest]) < 2:
            break
        half = len(made[widest]) // 2
        made[widest : widest + 1] = [made[widest][:half], made[widest][half:]]
    return made


def share_or_count(value: float, total: int) -> int:
    """Steps that a setting means: below 1 a share of `total`, else a number. At least 1."""
    return max(1, math.ceil(value * total) if value < 1 else int(value))
