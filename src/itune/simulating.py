"""A training step on tensors without memory: what it would hold at most, and what it computes.

Needs torch. The model's own code runs, forward and backward, on torch's fake tensors, which have
shapes and no numbers. Every storage is counted from when it is made to when it is let go of.
"""

from __future__ import annotations

import collections
import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary

from itune import batches, losses, optimizers, recipes

GRADIENTS, ACTIVATIONS, LOGITS, CACHE = "gradients", "activations", "logits", "cache"


def _attended(query: Any, key: Any, value: Any, *_: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attended_back(_: Any, query: Any, key: Any, value: Any, *__: Any) -> int:
    shapes = (query.shape, key.shape, value.shape)
    return int(sdpa_backward_flop_count(query.shape, *shapes))


def _grouped(rows: Any, matrices: Any, *_: Any) -> int:
    return int(2 * rows.numel() * matrices.shape[-1])


aten = torch.ops.aten
# What torch's own counter, made for GPUs, does not know.
FLOPS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attended,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attended_back,
    aten._grouped_mm: _grouped,
}


@dataclass(frozen=True, slots=True)
class Held:
    """What a step holds at its peak, beyond weights and the optimizer's state, and computes.

    bytes: by part (`gradients`, `activations`, `logits`, `cache`: 16-bit copies of the weights that
    autocast keeps for the length of a micro-batch), which add up to the peak. flops: floating-point
    operations of each micro-batch, forward and backward, what is computed again among them.
    """

    bytes: Mapping[str, int]
    flops: tuple[int, ...]


def held(
    model: Any,
    parts: Sequence[batches.Batch],
    settings: recipes.Training,
    *,
    head: str,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]],
    own: Any = None,
) -> Held:
    """What a step of these micro-batches holds and computes, of a model on the meta device.

    The model may be large: nothing of it is in memory, here or afterwards. `head`: as for
    `losses.summed`. `own`: what a process keeps of a model that is cut, with `named_parameters`:
    gradients and the optimizer's step are then those of its parts. Raises what the model raises
    where its shapes follow from its numbers, as in some mixtures of experts.
    """
    made = [replace(part, columns=losses.columns(part)) for part in parts]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _given_shapes(model, mode):
        live, flops = _Live(model, 1.0 if own is None else _trained(own) / _trained(model)), []
        given = [part.each(mode.from_tensor) for part in made]
        model.train()
        for part in given:
            before = live.flops
            with live:
                with autocast():
                    loss = losses.summed(model, part, head=head, balance=True)
                loss.backward()
                del loss
            flops.append(live.flops - before)
        if settings.optim != "adamw_torch_fused":  # that one works in place, tensor by tensor
            _step(model if own is None else _twin(own), settings, live)
        for p in model.parameters():
            p.grad = None
    return Held(dict(live.at_peak), tuple(flops))


def _step(model: Any, settings: recipes.Training, live: _Live) -> None:
    """An optimizer's step, once its state is there."""
    made = optimizers.optimizer(model, settings)
    made.step()
    live.know(p.grad for group in made.param_groups for p in group["params"])
    live.know(each for fields in made.state.values() for each in fields.values())
    with live:
        made.step()


def _trained(model: Any) -> int:
    return sum(p.nbytes for _, p in model.named_parameters() if p.requires_grad)


def _twin(own: Any) -> Any:
    """A process's parts as fake tensors of the CPU that have gradients."""
    twins = []
    for name, p in own.named_parameters():
        if p.requires_grad:
            twin = torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="cpu"))
            twin.grad = torch.empty_like(twin)
            twins.append((name, twin))
    return SimpleNamespace(named_parameters=lambda: twins)


@contextlib.contextmanager
def _given_shapes(model: Any, mode: FakeTensorMode) -> Iterator[None]:
    """A model's tensors of the meta device as fake ones of the CPU, for a while."""
    places = [
        (module, name, tensor)
        for module in model.modules()
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if tensor is not None
    ]
    twins: dict[int, Any] = {}
    for module, name, tensor in places:
        if id(tensor) not in twins:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            trained = tensor.requires_grad
            if isinstance(tensor, torch.nn.Parameter):
                fake = torch.nn.Parameter(fake, requires_grad=trained)
            twins[id(tensor)] = fake
        _put(module, name, twins[id(tensor)])
    try:
        yield
    finally:
        for module, name, tensor in places:
            _put(module, name, tensor)


def _put(module: Any, name: str, tensor: Any) -> None:
    table = module._parameters if name in module._parameters else module._buffers
    table[name] = tensor


class _Live(TorchDispatchMode):
    """Counts the bytes of every storage that is made within, by part, until it is gone.

    share: of each gradient, what is kept of it.
    """

    def __init__(self, model: Any, share: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._share = share
        parameters = list(model.parameters())
        self._trained = {(p.shape, p.dtype) for p in parameters if p.requires_grad}
        self._shapes = {p.shape for p in parameters if p.ndim > 1}
        layer = losses.output_layer(model)
        weight = getattr(layer, "weight", None)
        self._wide = None if weight is None else weight.shape[0]
        self._known: Any = WeakIdKeyDictionary()
        self.know((*parameters, *model.buffers()))
        self.now: collections.Counter[str] = collections.Counter()
        self.at_peak: dict[str, int] = {}
        self._total = self._peak = self.flops = 0

    def know(self, tensors: Iterable[Any]) -> None:
        """Leave out of the count what is there already."""
        for tensor in tensors:
            if torch.is_tensor(tensor):
                self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do as told and look at what was made."""
        out = self._done(func, args, kwargs or {})
        tree_map_only(torch.Tensor, self._see, out)
        if "linear_cross_entropy" in func.name():
            self._pass_by(LOGITS, _chunk_bytes(args))
        self.flops += self._counted(func.overloadpacket, args, kwargs or {}, out)
        return out

    def _done(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is aten._grouped_mm.default:  # its shapes are those of 16 bits alone
            halves = tree_map_only(torch.Tensor, _halved, args)
            return torch.empty_like(func(*halves, **kwargs), dtype=args[0].dtype)
        # Autograd adds up in place, if not for tensors of kinds that it does not know.
        if func is aten.index_add.default:
            return aten.index_add_.default(*args, **kwargs)
        if func is aten.add.Tensor and self._is_gradient(args[0]) and self._is_gradient(args[1]):
            return aten.add_.Tensor(*args, **kwargs)
        return func(*args, **kwargs)

    def _counted(self, kind: Any, args: Any, kwargs: Any, out: Any) -> int:
        if kind in FLOPS:
            return int(FLOPS[kind](*args))
        known = flop_registry.get(kind)
        return 0 if known is None else int(known(*args, **kwargs, out_val=out))

    def _is_gradient(self, tensor: Any) -> bool:
        given = torch.is_tensor(tensor) and not torch.is_grad_enabled()
        return given and (tensor.shape, tensor.dtype) in self._trained

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known[storage] = True
        part, size = self._part(tensor), storage.nbytes()
        if part == GRADIENTS:
            size = int(self._share * size)
        self.now[part] += size
        self._total += size
        weakref.finalize(storage, self._gone, part, size)
        if self._total > self._peak:
            self._peak, self.at_peak = self._total, dict(self.now)

    def _pass_by(self, part: str, size: int) -> None:
        """Count what an operation makes and lets go of within itself."""
        if self._total + size > self._peak:
            self._peak = self._total + size
            self.at_peak = {**self.now, part: self.now[part] + size}

    def _part(self, tensor: torch.Tensor) -> str:
        if self._is_gradient(tensor):
            return GRADIENTS
        if self._wide is not None and tensor.ndim > 1 and tensor.shape[-1] == self._wide:
            return LOGITS
        if tensor.shape in self._shapes and tensor.dtype != torch.float32:
            return CACHE
        return ACTIVATIONS

    def _gone(self, part: str, size: int) -> None:
        self.now[part] -= size
        self._total -= size


def _halved(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor


def _chunk_bytes(args: Any) -> int:
    """Bytes of the logits of one chunk, in torch's own loss over chunks of rows."""
    states, weight = [each for each in args if torch.is_tensor(each) and each.ndim == 2][:2]
    rows = losses.chunk_of(states.shape[0], weight)
    return int(rows * weight.shape[0] * torch.finfo(torch.float32).bits // 8)
