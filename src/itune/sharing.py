"""Work that the processes of a launch share: each does its part, and all learn the whole.

Nothing is summed and no gradient is exchanged, so what travels are Python's own objects, over the
network and not the devices' links. torch is imported where several processes are at work alone.
"""

from __future__ import annotations

import contextlib
import datetime
import heapq
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from itune import launchers, launching

T = TypeVar("T")

# chosen: longer than any evaluation. A process that dies ends its connections and the launch with
# it, so none waits so long for one that is gone.
PATIENCE = datetime.timedelta(days=30)


@dataclass
class _Place:
    """Where this process stands among those that share."""

    rank: int = 0
    world: int = 1


_place = _Place()


def world() -> int:
    """How many processes share the work; 1 unless `joined`."""
    return _place.world


def rank() -> int:
    """Which of them this one is, from 0."""
    return _place.rank


def affordable(explicit: int | None, of_recipe: int | None) -> int | None:
    """How many processes to start: as many as are asked for here, else by the recipe.

    A recipe that was written for a larger machine is not refused on a smaller one, as a number on
    the command line is: scores are the same with any number.
    """
    if explicit is not None or of_recipe is None or of_recipe < 2 or "LOCAL_RANK" in os.environ:
        return explicit
    if launchers.asked() is not None:  # it decides, as on a command line
        return explicit
    import torch

    return min(of_recipe, torch.cuda.device_count() or os.cpu_count() or 1)


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """The processes of the launch can share within; each has its own device. One needs nothing."""
    started = launchers.started()
    if started == 1:
        yield
        return
    import torch
    from torch import distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("gloo", timeout=PATIENCE)
    _place.rank, _place.world = int(os.environ["RANK"]), started
    try:
        yield
    finally:
        _place.rank, _place.world = 0, 1
        distributed.destroy_process_group()


def gathered(mine: T) -> list[T]:
    """What each process has, by its rank; all wait for the last."""
    if world() == 1:
        return [mine]
    from torch import distributed

    found: list[Any] = [None] * world()
    try:
        distributed.all_gather_object(found, mine)
    except RuntimeError as error:
        if launching.lost_peer(error):  # it says why it is gone, and has to be heard first
            time.sleep(launching.TELLING)
        raise
    return found


def of_first(make: Callable[[], T]) -> T:
    """What `make` gives in the first process, to all; it is called in that one alone."""
    return gathered(make() if rank() == 0 else None)[0]  # type: ignore[return-value]


def first_before_others(make: Callable[[], T]) -> T:
    """What `make` gives in each process: in the first, and then, with what it left, the others."""
    if rank() == 0:
        made = make()
        gathered(None)
        return made
    gathered(None)
    return make()


def mine(costs: Sequence[float]) -> list[int]:
    """The places of the pieces that this process does: by cost an even share, in their order.

    The costliest piece first, each goes to the process with the least so far (Graham 1969): every
    process finds the same split by itself.
    """
    loads = [(0.0, each) for each in range(world())]
    found = []
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        load, owner = heapq.heappop(loads)
        if owner == rank():
            found.append(place)
        heapq.heappush(loads, (load + costs[place], owner))
    return sorted(found)
