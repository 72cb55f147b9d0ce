"""The probe: the leanest way of computing that gives this model's own numbers.

Needs torch. What a model does with packed rows, with a mask, or after its output layer cannot be
read off its config, and a wrong guess spoils training without a sign of it. So the model is asked:
some tiny rows alone, by its plain forward, against the same rows in each way that we have.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from itune import attention, batches, data, encoding, generators, losses

ROWS, MASK, PADDING, ALONE = "rows", "mask", "padding", "alone"
LAYOUTS = {
    ROWS: "per-row attention",
    MASK: "the library's block mask",
    PADDING: "padding",
    ALONE: "one row at a time",
}
HEADS = {
    losses.TARGETS: "fused loss at the targets",
    losses.KEPT: "logits at the targets",
    losses.FULL: "all logits",
}

EXACT = 1e-4  # relative. float32 rounds at about 1e-6; a leak from row to row is 1e-2 and more
# In 16 bits the same numbers computed in another order differ by this much at most; leaks by more.
ROUNDED = 5e-2
# Gradients compared: the smaller tensors first, up to so many numbers. Each layer has small ones.
_COMPARED = 64_000_000

# Fields of a config that name such a length: sliding_window, attention_chunk_size, index_topk.
_BORDER = re.compile(r"window|chunk_size|topk$|top_k$|local_attention|block_size")

_REFUSALS = (
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    RuntimeError,
    AssertionError,
)

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Path:
    """How a run computes: how rows share a batch, how the loss is made, and why, in one line.

    ALONE is for a model that gives other numbers as soon as a row is padded; it is slow.
    padding, packed: how rows are padded or packed where the layout is that; None for a decoder's
    plain way.
    """

    layout: str
    head: str
    why: str
    padding: batches.Collate | None = None
    packed: batches.Collate | None = None

    @property
    def padded(self) -> bool:
        """Whether micro-batches are filled up to their longest row."""
        return self.layout in (PADDING, ALONE)

    def collate(self, pad_id: int) -> batches.Collate:
        """The function that makes a micro-batch for this path."""
        known: dict[str, batches.Collate] = {
            ROWS: self.packed or batches.packed,
            MASK: batches.flat,
        }
        # One row alone has no padding, so the model's own positions hold.
        places = self.layout != ALONE
        return known.get(self.layout) or self.padding or batches.padder(pad_id, places=places)


@dataclass(frozen=True)
class _Seen:
    """What a way of computing gave: logits [tokens, vocabulary], summed loss, some gradients."""

    logits: torch.Tensor
    loss: float
    gradients: list[torch.Tensor | None]


def choose(
    model: Any,
    longest: int,
    *,
    packing: bool = True,
    autocast: Autocast = contextlib.nullcontext,
    padding: batches.Collate | None = None,
    packed: batches.Collate | None = None,
) -> Path:
    """The leanest exact path for a model, which is left in the attention that the path needs.

    longest: tokens of the longest row of the run; a sliding window beyond it plays no part.
    padding: how the rows of an encoder or an encoder-decoder are collated; they are packed only as
    `packed` does.
    Random state, gradients and weights are as before. Raises nothing of the model's own: a way
    that fails is a way that is not taken.
    """
    attention.register()
    own = model.config._attn_implementation
    with _undisturbed(model):
        probe = _Probe(model, own, longest, autocast, padding, packed)
        head, notes = _head(probe, PADDING)
        layout = PADDING
        if padding is not None and packed is None:
            pass
        elif not packing:
            notes.append("training.packing is off")
        else:
            layout, refused = _layout(probe, head)
            if layout != PADDING and head == losses.FULL:  # it may be padding that went wrong
                head, notes = _head(probe, layout)
            notes += refused
        if layout == PADDING and head == losses.FULL:  # the others were tried on padded rows
            off = probe.against(PADDING, head)
            if off is not None:
                layout, (head, _) = ALONE, _head(probe, ALONE)
                notes.append(f"{LAYOUTS[PADDING]}: {off}")
    model.set_attn_implementation(attention.NAME if layout == ROWS else own)
    why = f"batches: {LAYOUTS[layout]}, {HEADS[head]}"
    return Path(layout, head, f"{why} ({'; '.join(notes)})" if notes else why, padding, packed)


def differs(
    model: Any, path: Path, kernel: str, longest: int, autocast: Autocast = contextlib.nullcontext
) -> str | None:
    """How a model whose layers were compiled fails to give its own numbers in a path, or None.

    kernel: the attention of the model's own; longest: as for `choose`.
    """
    with _undisturbed(model):
        with torch.compiler.set_stance("force_eager"):
            model.set_attn_implementation(kernel)
            probe = _Probe(model, kernel, longest, autocast, path.padding, path.packed)
        return probe.against(path.layout, path.head)


def _head(probe: _Probe, layout: str) -> tuple[str, list[str]]:
    """The leanest exact head, tried in a layout, and what was passed over."""
    notes: list[str] = []
    plain = losses.is_plain(losses.output_layer(probe.model))
    able = {losses.TARGETS: plain, losses.KEPT: losses.keeps_logits(probe.model)}
    for head, possible in able.items():
        if not possible:
            reason = "the output layer is no plain matrix" if head == losses.TARGETS else None
        else:
            reason = probe.against(layout, head)
            if reason is None:
                return head, notes
        if reason is not None:
            notes.append(f"{HEADS[head]}: {reason}")
    return losses.FULL, notes


def _layout(probe: _Probe, head: str) -> tuple[str, list[str]]:
    notes: list[str] = []
    # The library's block mask is made for decoders.
    for layout in (ROWS, MASK) if probe.padding is None else (ROWS,):
        reason = probe.against(layout, head)
        if reason is None:
            return layout, notes
        notes.append(f"{LAYOUTS[layout]}: {reason}")
    return PADDING, notes


class _Probe:
    """Five tiny rows and what the model makes of each alone."""

    def __init__(
        self,
        model: Any,
        own: str,
        longest: int,
        autocast: Autocast,
        padding: batches.Collate | None = None,
        packed: batches.Collate | None = None,
    ) -> None:
        self.model, self.own, self.autocast = model, own, autocast
        self.padding, self.packed = padding, packed
        trained = sorted((p for p in model.parameters() if p.requires_grad), key=torch.numel)
        room = np.cumsum([p.numel() for p in trained]) <= _COMPARED
        self.compared = [p for p, fits in zip(trained, room, strict=True) if fits] or trained[:1]
        self.rows = _rows(model, longest, decoder=padding is None)
        self.device = next(model.parameters()).device
        self.alone = self._alone()
        self.tolerance = EXACT
        if self._rounds():
            noise = self._difference(self._seen(PADDING, losses.FULL))
            self.tolerance = min(ROUNDED, max(EXACT, 4 * noise))

    def _rounds(self) -> bool:
        """Whether anything is computed in fewer bits than float32 has."""
        with self.autocast():
            mixed = torch.is_autocast_enabled(self.device.type)
        return mixed or torch.finfo(self.model.dtype).bits < 32

    def against(self, layout: str, head: str) -> str | None:
        """None if a way gives what the rows give alone, else how it fails, in a few words."""
        try:
            difference = self._difference(self._seen(layout, head))
        except torch.OutOfMemoryError:
            raise
        except _REFUSALS as error:
            return f"not possible, {' '.join(str(error).split())[:120]}"
        if difference <= self.tolerance:
            return None
        return f"off by {difference:.1e}"

    def _alone(self) -> _Seen:
        every, total = [], torch.zeros((), device=self.device)
        gradients: list[torch.Tensor | None] = [None] * len(self.compared)
        for k in range(len(self.rows)):
            row = (self.padding or batches.flat)(self.rows, np.array([k])).to(self.device)
            with self.autocast():
                logits = self.model(**replace(row, positions=None, mask=None).inputs()).logits
            logits = losses.own(logits, row)
            every.append(logits[0].detach().float())
            if not len(row.wanted):
                continue
            loss = F.cross_entropy(logits[0, row.places].float(), row.wanted, reduction="sum")
            total += loss.detach()
            found = self._gradients(loss)
            gradients = [_summed(pair) for pair in zip(gradients, found, strict=True)]
        return _Seen(torch.cat(every), float(total), gradients)

    def _seen(self, layout: str, head: str) -> _Seen:
        self.model.set_attn_implementation(attention.NAME if layout == ROWS else self.own)
        every = np.arange(len(self.rows))
        if layout != ALONE:
            return self._of(every, layout, head)
        parts = [self._of(every[k : k + 1], layout, head) for k in every]
        return _Seen(
            torch.cat([part.logits for part in parts]),
            sum(part.loss for part in parts),
            [_summed(each) for each in zip(*(part.gradients for part in parts), strict=True)],
        )

    def _of(self, rows: np.ndarray, layout: str, head: str) -> _Seen:
        """What some rows give in one micro-batch."""
        collate = Path(layout, head, "", self.padding, self.packed).collate(pad_id=0)
        batch = collate(self.rows, rows).to(self.device)
        with torch.no_grad(), self.autocast():
            logits = losses.own(self.model(**batch.inputs()).logits.float(), batch)
        real = logits[0] if batch.mask is None else logits[_real(batch)]
        with self.autocast():
            loss = losses.summed(self.model, batch, head=head)
        return _Seen(real, float(loss.detach()), self._gradients(loss))

    def _gradients(self, loss: torch.Tensor) -> list[torch.Tensor | None]:
        if not self.compared:
            return []
        return list(torch.autograd.grad(loss, self.compared, allow_unused=True))

    def _difference(self, seen: _Seen) -> float:
        """The largest of the relative differences of logits, loss and gradients."""
        pairs = [
            (a, b)
            for a, b in zip(seen.gradients, self.alone.gradients, strict=True)
            if a is not None or b is not None
        ]
        size = max((float(b.abs().max()) for _, b in pairs if b is not None), default=0.0)
        worst = max((_apart(a, b) for a, b in pairs), default=0.0)
        each = (
            _apart(seen.logits, self.alone.logits)
            / max(float(self.alone.logits.abs().max()), 1e-9),
            abs(seen.loss - self.alone.loss) / max(abs(self.alone.loss), 1e-9),
            worst / max(size, 1e-9),
        )
        return max(float("inf") if value != value else value for value in each)


def _real(batch: batches.Batch) -> torch.Tensor:
    """Where a padded batch has an output that is somebody's: bool [examples, longest]."""
    if batch.mask is None or batch.decoder is not None:
        return batch.targets != batches.IGNORED
    return batch.mask.bool()


def _summed(each: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """The sum of those that are there."""
    present = [x for x in each if x is not None]
    return torch.stack(present).sum(0) if present else None


def _apart(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
    if a is None or b is None:
        present = a if b is None else b
        return 0.0 if present is None else float(present.abs().max())
    return float((a - b).abs().max())


def _rows(model: Any, longest: int, *, decoder: bool = True) -> data.Corpus:
    """Rows of ids that any vocabulary has: a single token, a pair, one beyond the window if any.

    Half of each is not learnt, as a prompt is not; only a decoder may have an empty prompt.
    """
    lengths = [7, 1, 12, 2, 5] if decoder else [7, 2, 12, 3, 5]
    if borders := _borders(model, longest):
        lengths[4] = max(borders) + 3
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = [torch.randint(0, vocabulary, (n,), generator=draw).tolist() for n in lengths]
    if not decoder:
        # RoBERTa's kind counts no place for padding, which stands in no text.
        pad = getattr(model.config, "pad_token_id", None)
        ids = [[(id_ + (id_ == pad)) % vocabulary for id_ in row] for row in ids]
    return data.from_tokens(
        [encoding.Tokens(row, [k >= len(row) // 2 for k in range(len(row))]) for row in ids]
    )


def _borders(model: Any, longest: int) -> list[int]:
    """Lengths below `longest` beyond which a row may be attended to in another way.

    A window, a chunk, or how many keys a sparse attention picks; the names differ from model to
    model, and a length too many costs a longer row of the probe, no more.
    """
    config = model.config.get_text_config()
    # ModernBERT's window is half of a field of another name.
    fields = {**config.to_dict(), "sliding_window": getattr(config, "sliding_window", None)}
    return [
        value
        for name, value in fields.items()
        if _BORDER.search(name) and type(value) is int and 0 < value < longest
    ]


@contextlib.contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """No dropout, and the random state of CPU and GPUs as before."""
    training = model.training
    model.eval()
    try:
        with generators.forked():
            yield
    finally:
        model.train(training)
