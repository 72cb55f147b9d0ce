"""The random generators of a process: their state taken, put back, and gone on from.

Needs torch.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]


def state() -> Tensors:
    """The state of every generator of this process, as tensors on the CPU."""
    version, words, gauss = random.getstate()
    found = {"cpu": torch.get_rng_state(), "python": torch.tensor(words, dtype=torch.int64)}
    assert version == 3
    if gauss is not None:
        found["python_gauss"] = torch.tensor(gauss, dtype=torch.float64)
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def forked() -> contextlib.AbstractContextManager[None]:
    """While this holds, what is drawn leaves the generators as they were: of the CPU and of this
    process's GPU, not of all that the machine has."""
    own = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    made: contextlib.AbstractContextManager[None] = torch.random.fork_rng(devices=own)
    return made


def put(found: Tensors) -> None:
    """Give this process's generators the state that `state` gave."""
    gauss = found.get("python_gauss")
    words = tuple(found["python"].tolist())
    random.setstate((3, words, None if gauss is None else float(gauss)))
    torch.set_rng_state(found["cpu"])
    if "cuda" in found and torch.cuda.is_available():
        torch.cuda.set_rng_state(found["cuda"])


def go_on(rng: Sequence[Tensors], step: int, rank: int, world: int, seed: int) -> str | None:
    """Give this process the random state of its rank, and say what differs for a run whose number
    of processes changed.

    A rank that was not there draws from (seed, step, rank), so that the same start gives the same.
    """
    if rank < len(rng):
        put(rng[rank])
    else:
        drawn = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(drawn[0]))
        random.seed(int(drawn[0]))
    if world == len(rng):
        return None
    return (
        f"goes on after step {step} in {_processes(world)}, was "
        f"{_processes(len(rng))}: every step has the same rows; what is drawn at random in "
        "it, such as dropout, differs."
    )


def _processes(count: int) -> str:
    return f"{count} process{'es' * (count > 1)}"
