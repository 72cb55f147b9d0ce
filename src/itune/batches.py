"""Rows become micro-batches, and micro-batches tensors: packed without padding, or padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from itune import data, objectives

IGNORED = -100

# chosen: activations of so many tokens stay small beside the weights of a small model, and more
# in one call is no faster on a CPU.
MICRO_TOKENS = 8192


def micro_batches(
    rows: Sequence[int] | np.ndarray, lengths: np.ndarray, limit: int, *, padded: bool = False
) -> list[np.ndarray]:
    """Rows cut, in their order, into micro-batches of at most `limit` tokens each.

    `padded`: a micro-batch costs its longest row times its rows.
    """
    rows = np.asarray(rows, np.int64)
    sizes: list[int] = lengths[rows].tolist()  # of Python's own: read one by one, they are faster
    cuts = [0]
    longest = total = 0
    for place, length in enumerate(sizes):
        longest, total = max(longest, length), total + length
        cost = longest * (place + 1 - cuts[-1]) if padded else total
        if place > cuts[-1] and cost > limit:
            cuts.append(place)
            longest = total = length
    ends = [*cuts[1:], len(sizes)]
    return [rows[a:b] for a, b in zip(cuts, ends, strict=True) if b > a]


# --- tensors ------------------------------------------------------------------------------

Change = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class Segments:
    """Where the examples of a packed micro-batch lie, for attention within each alone.

    bounds int32 [examples + 1]: where each begins, and the end. gather int64 [examples, longest]:
    position in the packed row of each example's tokens, short ones filled at the right with their
    own last position. scatter int64 [tokens]: where in the flattened gather each packed token
    stands.
    """

    lengths: tuple[int, ...]
    bounds: torch.Tensor
    gather: torch.Tensor
    scatter: torch.Tensor

    def each(self, change: Change) -> Segments:
        """The same with every tensor changed."""
        return Segments(
            self.lengths, change(self.bounds), change(self.gather), change(self.scatter)
        )


@dataclass(frozen=True)
class Batch:
    """A micro-batch as tensors.

    Of a decoder, packed: ids, positions and targets int64 [1, tokens], segments set if attention
    is told where examples lie. Padded: [examples, longest], mask int64 of the same shape. Targets
    stand where their prediction is made: the target at t is the id at t + 1, or IGNORED. Of an
    encoder, the target at t is what the mask at t hides; padded, positions are left to the model.
    Of an encoder-decoder, decoder int64 and targets are [examples, longest answer]. places int64
    [targets]: where in the flattened targets those that count stand; wanted int64 [targets]: what
    they are. lengths: tokens of each example. fills: it is an encoder's. columns: those of the
    targets that hold any, and for each of `places` which of them it is in; looked up when left out.
    """

    ids: torch.Tensor
    positions: torch.Tensor | None
    targets: torch.Tensor
    places: torch.Tensor
    wanted: torch.Tensor
    lengths: tuple[int, ...]
    mask: torch.Tensor | None = None
    segments: Segments | None = None
    decoder: torch.Tensor | None = None
    fills: bool = False
    columns: tuple[torch.Tensor, torch.Tensor] | None = None

    def inputs(self) -> dict[str, Any]:
        """What the model is called with, by name.

        Without a cache, which is on by default in most configs and would join packed examples.
        """
        named: dict[str, Any] = {"input_ids": self.ids}
        if self.positions is not None:
            named["position_ids"] = self.positions
        if self.decoder is not None:
            named["decoder_input_ids"] = self.decoder
        if self.segments is not None:
            named["segments"] = self.segments
        if self.mask is not None:
            named["attention_mask"] = self.mask
        return named if self.fills else {**named, "use_cache": False}

    def owners(self) -> torch.Tensor:
        """Which of the micro-batch's examples each target belongs to, int64 [targets]."""
        import torch

        if self.targets.shape[0] > 1:
            return self.places // self.targets.shape[1]
        ends = torch.tensor(self.lengths, device=self.places.device).cumsum(0)
        return torch.searchsorted(ends, self.places, right=True)

    def to(self, device: torch.device) -> Batch:
        """The same on a device, copied while the device computes if it lies in pinned memory."""
        return self.each(lambda x: x.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same in memory that a GPU reads by itself."""
        return self.each(lambda x: x.pin_memory())

    def each(self, change: Change) -> Batch:
        """The same with every tensor changed."""
        return Batch(
            change(self.ids),
            None if self.positions is None else change(self.positions),
            change(self.targets),
            change(self.places),
            change(self.wanted),
            self.lengths,
            None if self.mask is None else change(self.mask),
            None if self.segments is None else self.segments.each(change),
            None if self.decoder is None else change(self.decoder),
            self.fills,
            None if self.columns is None else (change(self.columns[0]), change(self.columns[1])),
        )


Collate = Callable[["data.Corpus", np.ndarray], Batch]


def packed(corpus: data.Corpus, rows: np.ndarray) -> Batch:
    """The examples one after the other in a single row, no padding."""
    return segmented(flat(corpus, rows))


def segmented(batch: Batch) -> Batch:
    """A packed micro-batch that tells attention where its examples lie."""
    import torch

    lengths = np.array(batch.lengths)
    longest = int(lengths.max())
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    within = np.minimum(np.arange(longest)[None], lengths[:, None] - 1)
    filled = np.arange(len(lengths)).repeat(lengths) * longest
    segments = Segments(
        batch.lengths,
        torch.from_numpy(bounds.astype(np.int32)),
        torch.from_numpy(bounds[:-1, None] + within),
        torch.from_numpy(filled + np.concatenate([np.arange(n) for n in lengths])),
    )
    return replace(batch, segments=segments)


def flat(corpus: data.Corpus, rows: np.ndarray) -> Batch:
    """The same without segments: the model reads from the positions where an example begins."""
    examples = [_example(corpus, int(row)) for row in rows]
    lengths = tuple(len(ids) for ids, _ in examples)
    return _batch(
        np.concatenate([ids for ids, _ in examples])[None],
        np.concatenate([np.arange(n) for n in lengths])[None],
        np.concatenate([targets for _, targets in examples])[None],
        lengths,
    )


def padded(corpus: data.Corpus, rows: np.ndarray, pad_id: int) -> Batch:
    """One row an example, filled at the right with `pad_id`."""
    examples = [_example(corpus, int(row)) for row in rows]
    lengths = tuple(len(ids) for ids, _ in examples)
    shape = (len(examples), max(lengths))
    ids, targets = np.full(shape, pad_id), np.full(shape, IGNORED)
    for k, (row_ids, row_targets) in enumerate(examples):
        ids[k, : len(row_ids)] = row_ids
        targets[k, : len(row_ids)] = row_targets
    column = np.broadcast_to(np.arange(shape[1]), shape).copy()
    mask = (column < np.array(lengths)[:, None]).astype(np.int64)
    return _batch(ids, column, targets, lengths, mask)


def _batch(
    ids: np.ndarray,
    positions: np.ndarray | None,
    targets: np.ndarray,
    lengths: tuple[int, ...],
    mask: np.ndarray | None = None,
) -> Batch:
    import torch

    places = np.flatnonzero(targets != IGNORED)
    wanted = targets.reshape(-1)[places]
    return Batch(
        torch.from_numpy(ids),
        None if positions is None else torch.from_numpy(positions),
        torch.from_numpy(targets),
        torch.from_numpy(places),
        torch.from_numpy(wanted),
        lengths,
        None if mask is None else torch.from_numpy(mask),
    )


def padder(pad_id: int, *, places: bool = True) -> Collate:
    """The function that collates by padding with `pad_id`; without `places`, positions are left
    to the model."""

    def collate(corpus: data.Corpus, rows: np.ndarray) -> Batch:
        made = padded(corpus, rows, pad_id)
        return made if places else replace(made, positions=None)

    return collate


# --- encoders and encoder-decoders ----------------------------------------------------------


def masked(objective: objectives.Objective, pad_id: int) -> Collate:
    """The function that collates for an encoder: a target where each mask is."""

    def collate(corpus: data.Corpus, rows: np.ndarray) -> Batch:
        pairs = [objective.example(corpus, int(row)) for row in rows]
        lengths = tuple(len(ids) for ids, _ in pairs)
        ids, mask = _filled([ids for ids, _ in pairs], pad_id)
        targets, _ = _filled([targets for _, targets in pairs], IGNORED)
        return replace(_batch(ids, None, targets, lengths, mask), fills=True)

    return collate


def masked_flat(objective: objectives.Objective, first: int) -> Collate:
    """The function that packs an encoder's examples into a single row, no padding.

    first: the position that the model gives to a text's first token.
    """

    def collate(corpus: data.Corpus, rows: np.ndarray) -> Batch:
        pairs = [objective.example(corpus, int(row)) for row in rows]
        lengths = tuple(len(ids) for ids, _ in pairs)
        batch = _batch(
            np.concatenate([ids for ids, _ in pairs])[None],
            np.concatenate([np.arange(first, first + n) for n in lengths])[None],
            np.concatenate([targets for _, targets in pairs])[None],
            lengths,
        )
        return segmented(replace(batch, fills=True))

    return collate


def paired(objective: objectives.Objective, pad_id: int, shift: Change) -> Collate:
    """The function that collates for an encoder-decoder.

    `shift`: labels (IGNORED beyond an answer's end) to what the decoder reads.
    """

    def collate(corpus: data.Corpus, rows: np.ndarray) -> Batch:
        pairs = [objective.example(corpus, int(row)) for row in rows]
        lengths = tuple(len(read) + len(written) for read, written in pairs)
        ids, mask = _filled([read for read, _ in pairs], pad_id)
        targets, _ = _filled([written for _, written in pairs], IGNORED)
        batch = _batch(ids, None, targets, lengths, mask)
        return replace(batch, decoder=shift(batch.targets))

    return collate


def _filled(rows: Sequence[np.ndarray], value: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of unequal lengths in one array, filled at the right, and the mask of what is real."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max())[None] < lengths[:, None]
    out = np.full(mask.shape, value, np.int64)
    out[mask] = np.concatenate(rows)
    return out, mask.astype(np.int64)


def _example(corpus: data.Corpus, row: int) -> tuple[np.ndarray, np.ndarray]:
    raw, supervised = corpus.example(row)
    ids = raw.astype(np.int64)
    targets = np.full(len(ids), IGNORED, np.int64)
    learnt = supervised[1:]
    targets[:-1][learnt] = ids[1:][learnt]
    return ids, targets
