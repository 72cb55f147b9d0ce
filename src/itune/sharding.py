"""A model cut over the processes of a run, each of which keeps a part of every weight (FSDP2).

Needs torch. torch's own `fully_shard` does it, by the same calls on CPUs and GPUs: each repeated
layer is gathered when it computes and let go of afterwards, and what is left goes with the root.
Gradients and the optimiser's state are cut as their weights are, and so are checkpoints; the result
is whole again. Every function that gathers is called by every process.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from itune import batches, errors, launching, losses, memory, pieces, probing, recipes

# Gradients that are compared before and after: the smaller tensors first, up to so many numbers.
COMPARED = 64_000_000


def cut(
    model: Any,
    layers: Sequence[Any],
    batch: batches.Batch,
    head: str,
    accelerator: Accelerator,
    launch: recipes.Launch,
) -> None:
    """Cut a whole model, which every process holds, in its place; each of its layers by itself.

    Gradients are summed over processes, not averaged. What is computed in bfloat16 is gathered in
    it, and summed in float32; else numbers are those of the whole model. A batch shows that they
    are: raises ModelError where its loss or gradients are others afterwards, or none.
    """
    compared = _smallest(model)
    before = _seen(model, batch, head, accelerator, compared)
    with _refusing(model):
        _shard(model, layers, accelerator, launch, _nothing)
        after = _seen(model, batch, head, accelerator, compared)
    mixed = accelerator.mixed_precision == "bf16" or model.dtype != torch.float32
    largest = max((float(each.abs().max()) for each in before[1:]), default=0.0)
    for name, old, new in zip(("loss", *compared), before, after, strict=True):
        size = float(old.abs()) if name == "loss" else largest
        off = float((old - new).abs().max()) / max(size, 1e-9)
        if not off <= (probing.ROUNDED if mixed else probing.EXACT):
            what = "its loss is" if name == "loss" else f"the gradient of {name} is"
            raise _refusal(model, f"{what} then off by {off:.1e}")


def cut_as_read(
    model: Any,
    layers: Sequence[Any],
    fill: Callable[[Any], None],
    accelerator: Accelerator,
    launch: recipes.Launch,
) -> None:
    """Cut a model in its place that has no weights yet: `fill` gives those of a module, in which
    others may have theirs already. Only a layer is whole at any time, and what no layer has.

    Raises ModelError for a model that cannot be cut. Nothing shows that it computes the same.
    """
    _shard(model, layers, accelerator, launch, fill)


@contextlib.contextmanager
def _refusing(model: Any) -> Iterator[None]:
    """What torch or a model's own code raises in being cut, in our words; what was computed within
    was computed before by the whole model, so that it is the cutting.
    """
    try:
        yield
    except (ValueError, TypeError, AssertionError, NotImplementedError, RuntimeError) as error:
        if memory.is_short(error) or launching.lost_peer(error):
            raise
        raise _refusal(model, " ".join(str(error).split())[:200]) from error


def _nothing(_: Any) -> None:
    """What is done before a whole model is cut."""


def _refusal(model: Any, why: str) -> errors.ModelError:
    return errors.ModelError(
        f"launch.fsdp: {type(model).__name__.removeprefix('FSDP')} cannot be cut over processes: "
        f"{why}. Set launch.fsdp to false."
    )


def _shard(
    model: Any,
    layers: Sequence[Any],
    accelerator: Accelerator,
    launch: recipes.Launch,
    fill: Callable[[Any], None],
) -> None:
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    mixed = accelerator.mixed_precision == "bf16"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else None
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy or MixedPrecisionPolicy()}
    if launch.cpu_offload and accelerator.device.type != "cpu":
        options["offload_policy"] = CPUOffloadPolicy()
    for layer in layers:
        fill(layer)
        with _refusing(model):
            fully_shard(layer, reshard_after_forward=launch.reshard_after_forward, **options)
    fill(model)
    with _refusing(model):
        fully_shard(model, **options)  # the root's are used first and last, and stay in between
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    # Of an output that is written into, whose gradient is then wrong: that is looked at.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)


def _smallest(model: Any) -> list[str]:
    """The names of the smaller tensors that are trained, COMPARED numbers or one of them."""
    named = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    named.sort(key=lambda each: each[1])
    room = itertools.accumulate(size for _, size in named)
    return [name for (name, _), total in zip(named, room, strict=True) if total <= COMPARED] or [
        named[0][0]
    ]


def _seen(
    model: Any, batch: batches.Batch, head: str, accelerator: Accelerator, compared: Sequence[str]
) -> list[torch.Tensor]:
    """The loss of a batch and the gradients of some parameters, whole, in float32 on the CPU.

    What is drawn is drawn alike each time, and no random state changes.
    """
    named = dict(model.named_parameters())
    training, drawn = model.training, memory.Drawn()
    torch.manual_seed(0)
    model.train()
    with accelerator.autocast():
        loss = losses.summed(model, batch, head=head)
    if is_cut(model):
        loss.backward()
        cut_ones = [named[name].grad for name in compared]
        # As many gradients are summed as there are processes, of one batch.
        made = [None if g is None else whole(g) / accelerator.num_processes for g in cut_ones]
    else:
        made = list(torch.autograd.grad(loss, [named[n] for n in compared], allow_unused=True))
    model.zero_grad()
    model.train(training)
    drawn.restore()
    blank = loss.new_zeros(())
    found = [loss.detach(), *(blank if g is None else g for g in made)]
    return [each.float().cpu() for each in found]


@contextlib.contextmanager
def refusing_short(tokens: int) -> Iterator[None]:
    """Have memory that runs out in a micro-batch of so many tokens told of with what helps.

    Raises EnvironmentRefusal, which ends this process and with it the others, that wait for it.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not memory.is_short(error):
            raise
        raise errors.EnvironmentRefusal(
            f"launch.fsdp: a micro-batch of {tokens:,} tokens does not fit the memory "
            f"({memory.told(error)}). Lower training.micro_batch_tokens, set "
            "training.gradient_checkpointing, or take more processes."
        ) from error


def is_cut(model: Any) -> bool:
    """Whether a model was cut."""
    return isinstance(model, FSDPModule)


def let_go(model: Any) -> None:
    """Have every process keep its own rows alone: a measurement leaves what it gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def kept(model: Any) -> int:
    """How many of a model's parameters this process keeps; each shared one counts once."""
    return sum(
        p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters()
    )


# --- whole tensors, and parts of them -----------------------------------------------------------


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor gathered from all processes; one that is not cut, as it is."""
    if isinstance(tensor, DTensor):
        full: torch.Tensor = tensor.full_tensor()
        return full
    return tensor


def owned(value: Any, *, first: bool) -> Any:
    """A mapping, and those in it, with this process's rows of every cut tensor.

    Of what is not cut, only the `first` process has its tensors.
    """
    if isinstance(value, dict):
        found = {key: owned(each, first=first) for key, each in value.items()}
        return {key: each for key, each in found.items() if each is not None}
    if isinstance(value, DTensor):
        mine: torch.Tensor = value.to_local()
        return mine.detach()
    return None if torch.is_tensor(value) and not first else value


def part(held: pieces.Pieces, name: str, like: torch.Tensor, peers: pieces.Peers) -> torch.Tensor:
    """A tensor of a checkpoint, of which this process reads what it has of a parameter `like`.

    A copy, for what is read is the file itself, which would stay on the disk when it is removed.
    """
    if not isinstance(like, DTensor) or held.shape(name) != like.shape:
        return held[name].clone()
    mine = held.own(name, peers)
    made = torch.empty_like(like.detach(), dtype=mine.dtype)  # where the parameter's own rows are
    if isinstance(made, DTensor):
        made.to_local().copy_(mine)
    return made


# --- the result ---------------------------------------------------------------------------------


def outline(model: Any) -> Any:
    """A copy of a whole model without its weights, for `fill`: cutting leaves no way back."""
    blank = {
        id(p): torch.nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, {**blank, **{id(b): b for b in model.buffers()}})


@torch.no_grad()
def fill(outline: Any, model: Any, *, keep: bool) -> None:
    """Give an outline the weights of the cut model that it is of, whole and on the CPU.

    Only where they are kept: elsewhere it stays without.
    """
    cut_ones = dict(model.named_parameters())
    found: dict[int, torch.nn.Parameter] = {}
    for name, p in outline.named_parameters():
        full = whole(cut_ones[name].detach())
        if keep:
            found[id(p)] = torch.nn.Parameter(full.cpu(), requires_grad=p.requires_grad)
    if keep:
        for module in outline.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = found[id(p)]
