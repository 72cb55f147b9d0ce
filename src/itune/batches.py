"""Lengths become the plan of steps, and the plan's rows become tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from itune import data

IGNORED = -100

# chosen: activations of so many tokens stay small beside the weights of a small model, and more
# in one call is no faster on a CPU.
MICRO_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step: `ranks[r]` holds rank r's micro-batches, each the indices of examples.

    `targets` counts the tokens that carry loss over all ranks: what the loss is divided by.
    `epoch` is how many epochs are seen once the step is done.
    """

    ranks: tuple[tuple[np.ndarray, ...], ...]
    targets: int
    tokens: int
    epoch: float


@dataclass(frozen=True)
class Plan:
    """Every step of a run, known before the first: a pure function of lengths, seed and world."""

    steps: tuple[Step, ...]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def tokens(self) -> int:
        """Tokens that the whole run sees."""
        return sum(step.tokens for step in self.steps)


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
    A step's rows are shared over `world` ranks and cut
    into micro-batches of at most `micro_batch_tokens` (padding counted where `padded`).
    `max_steps` above 0 decides the length instead of `epochs`.
    """
    steps: list[Step] = []
    pending: list[int] = []
    held, epoch = 0, 0
    seen = 0.0
    while max_steps > 0 or epoch < epochs:
        rows = epoch_rows(epoch)
        share = 1.0 / len(rows)
        if max_steps <= 0 and epochs - epoch < 1:
            rows = rows[: max(1, round(len(rows) * (epochs - epoch)))]
        for row in rows.tolist():
            length = int(lengths[row])
            if pending and held + length > tokens_per_step:
                steps.append(
                    _step(pending, lengths, targets, world, micro_batch_tokens, padded, seen)
                )
                pending, held = [], 0
                if len(steps) == max_steps:
                    return Plan(tuple(steps))
            pending.append(row)
            held += length
            seen += share
        epoch += 1
        seen = float(epoch) if epoch <= epochs or max_steps > 0 else seen
    if pending:
        steps.append(_step(pending, lengths, targets, world, micro_batch_tokens, padded, seen))
    return Plan(tuple(steps))


def _step(
    rows: Sequence[int],
    lengths: np.ndarray,
    targets: np.ndarray,
    world: int,
    micro: int,
    padded: bool,
    epoch: float,
) -> Step:
    longest_first = sorted(rows, key=lambda row: (-int(lengths[row]), row))
    shares: list[list[int]] = [[] for _ in range(world)]
    loads = [0] * world
    for row in longest_first:
        rank = loads.index(min(loads))
        shares[rank].append(row)
        loads[rank] += int(lengths[row])
    return Step(
        ranks=tuple(tuple(micro_batches(share, lengths, micro, padded=padded)) for share in shares),
        targets=int(sum(int(targets[row]) for row in rows)),
        tokens=int(sum(int(lengths[row]) for row in rows)),
        epoch=round(epoch, 6),
    )


def micro_batches(
    rows: Sequence[int], lengths: np.ndarray, limit: int, *, padded: bool = False
) -> list[np.ndarray]:
    """Rows cut, in their order, into micro-batches of at most `limit` tokens each.

    `padded`: a micro-batch costs its longest row times its rows.
    """
    out: list[np.ndarray] = []
    current: list[int] = []
    longest = total = 0
    for row in rows:
        length = int(lengths[row])
        cost = max(longest, length) * (len(current) + 1) if padded else total + length
        if current and cost > limit:
            out.append(np.array(current))
            current, longest, total = [], 0, 0
        current.append(row)
        longest, total = max(longest, length), total + length
    if current:
        out.append(np.array(current))
    return out


# --- tensors ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segments:
    """Where the examples of a packed micro-batch lie, for attention within each alone.

    gather int64 [examples, longest]: position in the packed row of each example's tokens, short
    ones filled at the right with their own last position. scatter int64 [tokens]: where in the
    flattened gather each packed token stands.
    """

    lengths: tuple[int, ...]
    gather: torch.Tensor
    scatter: torch.Tensor

    def to(self, device: torch.device) -> Segments:
        """The same on a device."""
        return Segments(self.lengths, self.gather.to(device), self.scatter.to(device))


@dataclass(frozen=True)
class Batch:
    """A micro-batch as tensors.

    Packed: ids, positions and targets int64 [1, tokens], segments set. Padded: [examples,
    longest], mask int64 of the same shape. Targets stand where their prediction is made: the
    target at t is the id at t + 1, or IGNORED.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor | None = None
    segments: Segments | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(
            self.ids.to(device),
            self.positions.to(device),
            self.targets.to(device),
            None if self.mask is None else self.mask.to(device),
            None if self.segments is None else self.segments.to(device),
        )


def packed(corpus: data.Corpus, rows: np.ndarray) -> Batch:
    """The examples one after the other in a single row, no padding."""
    import torch

    examples = [_example(corpus, int(row)) for row in rows]
    lengths = tuple(len(ids) for ids, _ in examples)
    longest = max(lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    column = np.arange(longest)
    within = np.minimum(column[None], np.array(lengths)[:, None] - 1)
    return Batch(
        ids=torch.from_numpy(np.concatenate([ids for ids, _ in examples]))[None],
        positions=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None],
        targets=torch.from_numpy(np.concatenate([targets for _, targets in examples]))[None],
        segments=Segments(
            lengths,
            torch.from_numpy(starts[:, None] + within),
            torch.from_numpy(
                np.concatenate([k * longest + np.arange(n) for k, n in enumerate(lengths)])
            ),
        ),
    )


def padded(corpus: data.Corpus, rows: np.ndarray, pad_id: int) -> Batch:
    """One row an example, filled at the right with `pad_id`."""
    import torch

    examples = [_example(corpus, int(row)) for row in rows]
    longest = max(len(ids) for ids, _ in examples)
    shape = (len(examples), longest)
    ids, targets = np.full(shape, pad_id), np.full(shape, IGNORED)
    mask = np.zeros(shape, np.int64)
    for k, (row_ids, row_targets) in enumerate(examples):
        ids[k, : len(row_ids)] = row_ids
        targets[k, : len(row_ids)] = row_targets
        mask[k, : len(row_ids)] = 1
    positions = np.broadcast_to(np.arange(longest), shape).copy()
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        torch.from_numpy(targets),
        mask=torch.from_numpy(mask),
    )


def padder(pad_id: int) -> Callable[[data.Corpus, np.ndarray], Batch]:
    """The function that collates by padding with `pad_id`."""

    def collate(corpus: data.Corpus, rows: np.ndarray) -> Batch:
        return padded(corpus, rows, pad_id)

    return collate


def _example(corpus: data.Corpus, row: int) -> tuple[np.ndarray, np.ndarray]:
    start, end = int(corpus.starts[row]), int(corpus.starts[row + 1])
    ids = corpus.ids[start:end].astype(np.int64)
    targets = np.full(end - start, IGNORED, np.int64)
    learnt = corpus.supervised[start + 1 : end]
    targets[:-1][learnt] = ids[1:][learnt]
    return ids, targets


def share_or_count(value: float, total: int) -> int:
    """Steps that a setting means: below 1 a share of `total`, else a number. At least 1."""
    return max(1, math.ceil(value * total) if value < 1 else int(value))
