"""The loss on supervised positions only, summed, so that the step can divide it exactly.

Needs torch. There are three ways to the same number, from the leanest to the one that any model
has: the head computes loss instead of logits, in chunks, at the targets alone (TARGETS); the model
is asked for the logits of some positions (KEPT); or all logits are made (FULL). The probe at the
start of a run finds the first that is exact for the model at hand.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from itune import batches

TARGETS, KEPT, FULL = "targets", "kept", "full"

# Rows a chunk, and the vocabulary from which on half of them. The head's weight is read twice a
# chunk, so rows decide the speed: at 128 to 256 it is flat on a CPU (torch's default of 4 is nine
# times slower), and beyond only memory grows. In 16 bits it is mostly a GPU that computes, whose
# products outrun its memory by hundreds: it takes as many more. chosen: not measured on one.
CHUNK, WIDE, TIMES_IN_16_BITS = 256, 65_536, 4

Each = list[torch.Tensor]


def summed(
    model: torch.nn.Module,
    batch: batches.Batch,
    *,
    head: str | None = None,
    each: Each | None = None,
    balance: bool = False,
) -> torch.Tensor:
    """Summed cross-entropy in nats over the batch's targets, a float32 scalar or better.

    Whoever calls divides by the count of the whole optimiser step (transformers #34191): a mean
    of means would weigh a token by its micro-batch. A batch without targets gives 0.
    `head`: TARGETS, KEPT or FULL; None takes what the model's signature allows without a probe.
    `each` receives the loss of every target, float32 [targets] without a gradient; whether it is
    there changes nothing else.
    `balance` adds what a config with `output_router_logits` asks for besides, that experts are used
    alike, times the targets: so a step of one micro-batch has the library's own loss.
    """
    head = head or (KEPT if keeps_logits(model) else FULL)
    if head == TARGETS:
        with _losing(output_layer(model), batch, each):
            output = model(**batch.inputs())
        loss: torch.Tensor = output.logits
        if loss.numel() != 1:  # BART adds a bias of its own, for one
            raise ValueError("the model changes the logits that its output layer gives")
        return _balanced(loss.reshape(()), model, output, batch) if balance else loss.reshape(())
    logits, output = _kept(model, batch) if head == KEPT else _full(model, batch)
    if each is not None:
        with torch.no_grad():
            each.append(F.cross_entropy(precise(logits), batch.wanted, reduction="none"))
    loss = F.cross_entropy(precise(logits), batch.wanted, reduction="sum")
    return _balanced(loss, model, output, batch) if balance else loss


def _balanced(loss: torch.Tensor, model: Any, output: Any, batch: batches.Batch) -> torch.Tensor:
    """The loss with that of experts which are not used alike, if the model gives it."""
    uneven = getattr(output, "aux_loss", None)
    if uneven is None:
        return loss
    inner = _base(model)
    names = ("router_aux_loss_coef", "aux_loss_coef")  # the second of JetMoe
    weight = next(float(getattr(inner, name)) for name in names if hasattr(inner, name))
    return loss + weight * len(batch.places) * precise(uneven)


def nats(model: torch.nn.Module, batch: batches.Batch) -> torch.Tensor:
    """The loss of each target, float32 [targets]."""
    each: Each = []
    summed(model, batch, each=each)
    return torch.cat(each)


def surprises(model: torch.nn.Module, batch: batches.Batch) -> torch.Tensor:
    """1 for each target that is not what the model finds likeliest there, else 0; bool [targets].

    Without any in an answer, greedy decoding writes that answer: each token of it is the
    likeliest after those before it.
    """
    logits, _ = _kept(model, batch) if keeps_logits(model) else _full(model, batch)
    return logits.argmax(-1) != batch.wanted


def precise(x: torch.Tensor) -> torch.Tensor:
    """The same in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _full(model: torch.nn.Module, batch: batches.Batch) -> tuple[torch.Tensor, Any]:
    output = model(**batch.inputs())
    return own(output.logits, batch).flatten(0, 1).index_select(0, batch.places), output


def own(states: torch.Tensor, batch: batches.Batch) -> torch.Tensor:
    """States or logits of the batch's own tokens: an adapter may set virtual ones before them."""
    return states[:, states.shape[1] - batch.targets.shape[1] :]


def _kept(model: torch.nn.Module, batch: batches.Batch) -> tuple[torch.Tensor, Any]:
    """Logits at the targets; columns in which no row learns anything are never made."""
    width = batch.targets.shape[1]
    kept, which = batch.columns or columns(batch)
    output = model(**batch.inputs(), logits_to_keep=kept)
    rows = torch.div(batch.places, width, rounding_mode="floor")
    places = rows * len(kept) + which
    return output.logits.flatten(0, 1).index_select(0, places), output


def logits_at(model: Any, inputs: dict[str, torch.Tensor], places: torch.Tensor) -> torch.Tensor:
    """Logits at some places of a padded batch, [places, vocabulary]; no others are made.

    inputs: what the model is called with, `input_ids` [batch, time] among it; places int64
    [places], counted through the flattened batch.
    """
    layer, width = output_layer(model), inputs["input_ids"].shape[1]
    if layer is None:
        logits: torch.Tensor = model(**inputs).logits
        return logits[:, logits.shape[1] - width :].flatten(0, 1).index_select(0, places)
    whole = layer.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        mine = hidden[:, hidden.shape[1] - width :].flatten(0, 1).index_select(0, places)
        made: torch.Tensor = whole(mine[None])
        return made

    with _doing(layer, forward):
        found: torch.Tensor = model(**inputs).logits[0]
    return found


def columns(batch: batches.Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns of the targets that hold any, and for each target which of them it is in."""
    found: tuple[torch.Tensor, torch.Tensor] = torch.unique(
        batch.places % batch.targets.shape[1], return_inverse=True
    )
    return found


def keeps_logits(model: Any) -> bool:
    """Whether the model's forward can be asked for the logits of some positions alone."""
    return "logits_to_keep" in inspect.signature(_base(model).forward).parameters


def output_layer(model: Any) -> Any:
    """The layer that makes logits from hidden states, as it stands in the model; or None."""
    return _base(model).get_output_embeddings()


def is_plain(layer: Any) -> bool:
    """Whether an output layer is a matrix and perhaps a bias: no adapter, copy or quantisation."""
    return type(layer) is torch.nn.Linear


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# --- the head that computes loss ----------------------------------------------------------


@contextlib.contextmanager
def _losing(layer: Any, batch: batches.Batch, each: Each | None) -> Iterator[None]:
    """While this holds, the output layer returns the summed loss, float32 [1, 1, 1].

    The layer itself is still called by the model, and the model by whatever wraps it, so hooks
    (FSDP) run as ever.
    """

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        states, weight, bias = _same_dtype(own(hidden, batch), layer.weight, layer.bias)
        if not len(batch.places):
            # In the graph all the same: every rank must have every gradient.
            return precise((states.sum() + weight.sum()) * 0.0).reshape(1, 1, 1)
        states = states.reshape(-1, states.shape[-1]).index_select(0, batch.places)
        if each is not None:
            each.append(_apart(states, weight, bias, batch.wanted))
        return precise(head_loss(states, weight, bias, batch.wanted)).reshape(1, 1, 1)

    with _doing(layer, forward):
        yield


@contextlib.contextmanager
def _doing(layer: Any, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """While this holds, a layer that is called does something else."""
    before = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before


def _same_dtype(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What autocast makes of the arguments of a linear layer; the fused loss it does not know."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def head_loss(
    states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    wanted: torch.Tensor,
    chunk: int | None = None,
) -> torch.Tensor:
    """Summed cross-entropy of `states @ weight.T + bias` without all of the logits at once.

    states [rows, width], weight [vocabulary, width], wanted int64 [rows]; `chunk` rows at a time.
    """
    chunk = chunk or chunk_of(len(states), weight)
    # In 16 bits torch adds the chunks up in 16 bits as well, the loss and the weight's gradient: of
    # 131,072 targets four fifths of the loss were lost. On a GPU it needs no less memory either.
    if not fused() or states.dtype.itemsize < 4:
        loss: torch.Tensor = Chunked.apply(states, weight, bias, wanted, chunk)  # type: ignore[no-untyped-call]
        return loss
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None)
    return F.linear_cross_entropy(
        states, weight, wanted, linear_bias=bias, reduction="sum", options=options
    )


def chunk_of(rows: int, weight: torch.Tensor) -> int:
    """How many rows at a time: fewer where each has a wide vocabulary's logits.

    All chunks are of one size: 365 rows in two of 183 need less memory than 256 and 109.
    """
    most = CHUNK if weight.shape[0] < WIDE else CHUNK // 2
    most *= TIMES_IN_16_BITS if weight.dtype.itemsize < 4 else 1
    return -(-rows // max(1, -(-rows // most))) or 1


@functools.cache
def fused() -> bool:
    """Whether torch has this loss itself (2.13 and later)."""
    return hasattr(F, "linear_cross_entropy")


def _apart(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wanted: torch.Tensor
) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(
            [
                F.cross_entropy(precise(F.linear(h, weight, bias)), y, reduction="none")
                for h, y in zip(states.split(CHUNK), wanted.split(CHUNK), strict=True)
            ]
        )


class Chunked(torch.autograd.Function):
    """The same loss for 16 bits, added up in float32, and for a torch that lacks it; gradients are
    made going forward, as there."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        wanted: torch.Tensor,
        chunk: int,
    ) -> torch.Tensor:
        """Sum the loss over chunks and keep the gradients of what asks for one."""
        total = precise(states.new_zeros(()))
        inputs = (states, weight, bias)
        sums = torch.promote_types(states.dtype, torch.float32)  # of what every chunk adds to
        kinds = (states.dtype, sums, sums)
        grads = [
            torch.zeros_like(x, dtype=kind) if x is not None and needed else None
            for x, kind, needed in zip(inputs, kinds, ctx.needs_input_grad, strict=False)
        ]
        for start in range(0, len(states), chunk):
            part, target = states[start : start + chunk], wanted[start : start + chunk, None]
            logits = F.linear(part, weight, bias)
            shares = precise(logits)
            total += (torch.logsumexp(shares, 1, keepdim=True) - shares.gather(1, target)).sum()
            if not any(g is not None for g in grads):
                continue
            slope = torch.softmax(shares, 1).scatter_add_(
                1, target, torch.full_like(target, -1, dtype=shares.dtype)
            )
            if grads[0] is not None:
                grads[0][start : start + chunk] = slope.to(weight.dtype) @ weight
            if grads[1] is not None:
                grads[1] += slope.to(part.dtype).T @ part
            if grads[2] is not None:
                grads[2] += slope.sum(0)
        ctx.kinds = [None if x is None else x.dtype for x in inputs]
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The kept gradients times the gradient of the sum."""
        (scale,) = upstream
        grads = (
            None if g is None else (precise(g) * scale).to(kind)
            for g, kind in zip(ctx.saved_tensors, ctx.kinds, strict=True)
        )
        return (*grads, None, None)
