"""The order in which an epoch sees its examples; a place follows from an example's own row alone.

So the first examples of an epoch can be told from the number of rows, before any is encoded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np


def keys(seed: int, visit: int, source: int, rows: Any, pieces: Any) -> np.ndarray:
    """What the examples of one visit to a source are sorted by, uint64 [rows].

    `rows`: each example's row in its source; `pieces`: which piece of that row it is, where plain
    text was cut, else 0. Numbers mixed into one that looks random (splitmix64, Steele et al. 2014).
    """
    state: Any = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in (seed, visit, source, rows, pieces):
            state = state ^ np.asarray(part, np.uint64)
            state = state + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


def visits(weight: float, epoch: int) -> Iterator[tuple[int, float]]:
    """(number of the visit, share of the examples it sees) for each visit that an epoch pays."""
    a_row = math.ceil(weight)
    for k in range(a_row):
        yield epoch * a_row + k, min(1.0, weight - k)


def taken(count: int, share: float) -> int:
    """How many of a source's examples a visit sees: those with the smallest keys."""
    return count if share >= 1 else max(1, round(count * share))
