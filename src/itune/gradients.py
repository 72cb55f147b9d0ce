"""The gradient of a step over all processes: agreed on, then summed.

Needs torch. Processes meet once a step, when each has its whole gradient or knows that it cannot
have it: one that runs out of memory halfway would leave the others waiting in a collective call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator

from itune import beats

CHUNK = 1 << 24  # chosen: numbers summed in one call; 64 MB are long enough to be fast


def least(value: int, accelerator: Accelerator) -> int:
    """The least of a number over all processes."""
    if accelerator.num_processes == 1:
        return value
    own = torch.tensor([value], dtype=torch.int64, device=accelerator.device)
    with beats.PULSE.meeting():
        return int(accelerator.gather(own).min())


def begin_alike(parameters: Sequence[torch.nn.Parameter], accelerator: Accelerator) -> None:
    """Give every process the first one's values of what is trained, whatever its disk holds."""
    if accelerator.num_processes > 1:
        with beats.PULSE.meeting():
            for p in parameters:
                torch.distributed.broadcast(p.data, 0)


def add_up(parameters: Sequence[torch.nn.Parameter], accelerator: Accelerator) -> None:
    """Sum every parameter's gradient over all processes; a process without one counts as zero."""
    if accelerator.num_processes == 1:
        return
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for some in _chunks([p.grad for p in parameters if p.grad is not None]):
        flat = torch.cat([each.flatten() for each in some])
        with beats.PULSE.meeting():
            torch.distributed.all_reduce(flat)
        start = 0
        for each in some:
            each.copy_(flat[start : start + each.numel()].view_as(each))
            start += each.numel()


def _chunks(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours of one dtype, together at most CHUNK numbers or one tensor alone."""
    some: list[torch.Tensor] = []
    size = 0
    for each in tensors:
        if some and (each.dtype != some[0].dtype or size + each.numel() > CHUNK):
            yield some
            some, size = [], 0
        some.append(each)
        size += each.numel()
    if some:
        yield some
