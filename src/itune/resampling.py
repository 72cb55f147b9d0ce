"""Metrics over resampled and swapped rows: a score's interval, a difference and its test."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from itune import intervals
from itune.intervals import Array

if TYPE_CHECKING:
    from itune.metrics import tables
    from itune.metrics.sufficient import SufficientMetric
    from itune.metrics.tables import Table

T = TypeVar("T", float, npt.NDArray[Any])


@dataclasses.dataclass(frozen=True)
class Score:
    """A value on its metric's own scale, with its confidence interval."""

    value: float
    low: float
    high: float
    signature: str
    """How it was computed: variant, tokenizer, version of the library."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """Ours minus theirs, with its confidence interval and two-sided p-value."""

    value: float
    low: float
    high: float
    p_value: float
    """How often systems that are alike differ as much, by chance; 1 = no difference at all."""


def score(
    metric: SufficientMetric,
    statistics: Array,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Score]:
    """The values of a metric whose statistics [rows, k] are known, each with its interval."""
    intervals.check(confidence, resamples)
    tables = [_table_of(metric, statistics)]
    return scores(tables, len(statistics), confidence, resamples, seed)


def compare(
    metric: SufficientMetric,
    ours: Array,
    theirs: Array,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Difference]:
    """Ours minus theirs for a metric whose statistics [rows, k] are known, paired by row."""
    intervals.check(confidence, resamples)
    pairs = [(_table_of(metric, ours), _table_of(metric, theirs))]
    return differences(pairs, len(ours), confidence, resamples, seed)


def mean(
    rows: Array,
    *,
    signature: str,
    bounds: tuple[float, float],
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Score:
    """The mean over rows of (sum, number of values), [rows, 2], with its interval."""
    intervals.check(confidence, resamples)
    table = _mean_of(rows, signature, bounds)
    return scores([table], len(rows), confidence, resamples, seed)[signature]


def apart(
    ours: Array,
    theirs: Array,
    *,
    signature: str,
    bounds: tuple[float, float],
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Score:
    """The mean of ours minus that of theirs, rows that have nothing to do with each other.

    As `mean` takes them; each side is resampled by itself. What a row pulls is what it adds to its
    own side's mean (Efron and Tibshirani 1993, section 14.5, for several samples).
    """
    intervals.check(confidence, resamples)
    sides = [_mean_of(rows, signature, bounds) for rows in (ours, theirs)]
    found = [table.values()[signature] for table in sides]
    drawn = [
        np.concatenate(
            [
                table.resampled(weights)[signature]
                # Another seed for the other side: the same draws would pair the rows.
                for weights in intervals.weights(len(table.rows), resamples, 2 * seed + side)
            ]
        )
        for side, table in enumerate(sides)
    ]
    value = found[0] - found[1]
    low, high = intervals.interval(
        value,
        drawn[0] - drawn[1],
        _pulled(sides, signature, value),
        bounds=(bounds[0] - bounds[1], bounds[1] - bounds[0]),
        confidence=confidence,
        n_rows=min(len(ours), len(theirs)),
    )
    return Score(value, low, high, signature)


def _pulled(sides: Sequence[Table], key: str, value: float) -> Array | None:
    """The difference without each row of either side, or None where one has a single row."""
    mine, others = (table.left_out() for table in sides)
    if mine is None or others is None:
        return None
    first, second = (table.values()[key] for table in sides)
    return np.concatenate([value + mine[key] - first, value - others[key] + second])


def _mean_of(rows: Array, signature: str, bounds: tuple[float, float]) -> tables.Summed:
    from itune.metrics import tables

    def values(sums: Array) -> dict[str, Array]:
        return {signature: sums[..., 0] / sums[..., 1]}

    given = np.asarray(rows, np.float64)
    return tables.Summed(given, values, {signature: signature}, bounds, np.arange(len(given)))


# --- tables -------------------------------------------------------------------------------------


def scores(
    tables: Sequence[Table], n_rows: int, confidence: float, resamples: int, seed: int
) -> dict[str, Score]:
    """Each value of the tables over n_rows rows, by key, with its interval."""
    drawn = _draw(
        [(table, table) for table in tables],
        intervals.weights(n_rows, resamples, seed),
        lambda mine, _, weights: mine.resampled(weights),
    )
    found = {}
    for table in tables:
        left_out = table.left_out()
        for key, value in table.values().items():
            low, high = intervals.interval(
                value,
                drawn[key],
                None if left_out is None else left_out[key],
                bounds=table.bounds,
                confidence=confidence,
                n_rows=n_rows,
            )
            found[key] = Score(value, low, high, table.signatures[key] + _undefined(drawn[key]))
    return found


def _undefined(drawn: Array) -> str:
    """For a signature: how many draws had no value and were left out of the interval."""
    missing = int(np.sum(~np.isfinite(drawn)))
    return f"|undefined:{missing} of {len(drawn)} draws" if missing else ""


def differences(
    pairs: Sequence[tuple[Table, Table]],
    n_rows: int,
    confidence: float,
    resamples: int,
    seed: int,
) -> dict[str, Difference]:
    """Our table's values minus theirs for each pair, by key; see `scoring.compare`."""

    def resampled(mine: Table, other: Table, weights: Array) -> dict[str, Array]:
        return _minus(mine.resampled(weights), other.resampled(weights))

    def swapped(mine: Table, other: Table, swaps: Array) -> dict[str, Array]:
        return _minus(mine.swapped(other, swaps), other.swapped(mine, swaps))

    drawn = _draw(pairs, intervals.weights(n_rows, resamples, seed), resampled)
    tossed = _draw(pairs, intervals.swaps(n_rows, resamples, seed), swapped)
    found = {}
    for mine, other in pairs:
        ours, theirs = mine.left_out(), other.left_out()
        left_out = None if ours is None or theirs is None else _minus(ours, theirs)
        bounds = mine.bounds and (mine.bounds[0] - mine.bounds[1], mine.bounds[1] - mine.bounds[0])
        for key, value in _minus(mine.values(), other.values()).items():
            low, high = intervals.interval(
                value,
                drawn[key],
                None if left_out is None else left_out[key],
                bounds=bounds,
                confidence=confidence,
                n_rows=n_rows,
            )
            chance = intervals.p_value(tossed[key], value)
            found[key] = Difference(value, low, high, chance)
    return found


def _table_of(metric: SufficientMetric, statistics: Array) -> Table:
    from itune.metrics import tables

    return tables.of_statistics(metric, statistics, np.arange(len(statistics)))


def _draw(
    pairs: Sequence[tuple[Table, Table]],
    blocks: Iterator[Array],
    ask: Callable[[Table, Table, Array], dict[str, Array]],
) -> dict[str, Array]:
    """What each pair of tables answers to all blocks of draws, by key, [draws]."""
    parts: dict[str, list[Array]] = {key: [] for mine, _ in pairs for key in mine.signatures}
    done = 0
    for block in blocks:
        for mine, other in pairs:
            wanted = block[: max(0, mine.most - done)]
            for key, values in (ask(mine, other, wanted) if len(wanted) else {}).items():
                parts[key].append(values)
        done += len(block)
    return {key: np.concatenate(found) for key, found in parts.items()}


def _minus(ours: dict[str, T], theirs: dict[str, T]) -> dict[str, T]:
    return {key: value - theirs[key] for key, value in ours.items()}
