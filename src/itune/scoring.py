"""Predictions to scores with intervals, paired comparison of two systems, spread over wordings.

A row of the data may have been asked in several wordings; its answers are not independent, so what
is resampled and swapped is the row with all its wordings. Every random draw depends on the seed and
on the number of rows alone: neither on their order nor on the metric.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from itune import errors, metrics

if TYPE_CHECKING:
    from itune.metrics.tables import Table

Array = npt.NDArray[Any]
T = TypeVar("T", float, npt.NDArray[Any])

BLOCK = 4_000_000  # chosen: weights drawn at a time, 32 MB as float64
NOISE = 1e-9  # sums in another order may differ by this much, on scales of 0 to 100 at most


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a system answered to one row of the data in one wording of the prompt."""

    row: int
    """Which row of the data; the same number for all its wordings, and in both of two systems."""
    wording: int
    """Which of the template's prompts, from 0."""
    prediction: str
    """The answer; empty text is an answer too, and a wrong one."""
    references: tuple[str, ...]
    """What would have been right; at least one."""


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
    rows: Sequence[Prediction],
    metric_names: Sequence[str],
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    choices: Sequence[str] = (),
) -> dict[str, Score]:
    """Each value of the metrics over all rows and wordings, by key, with its interval.

    The interval is the percentile bootstrap over rows (Efron 1979; for such metrics Koehn 2004).
    Where no resample differs, e.g. every answer is right, the bootstrap has nothing to say and the
    interval is that of the rows which may not have been seen (`_unseen`).
    Raises UserError: no rows, an unknown metric; DataError: the same row and wording twice.
    """
    _check_settings(confidence, resamples)
    ordered = _ordered(rows, "predictions")
    tables = _tables(ordered, metric_names, choices)
    n_rows = len(_starts(ordered))
    pairs = [(table, table) for table in tables]
    drawn = _draw(
        pairs, _weights(n_rows, resamples, seed), lambda mine, _, weights: mine.resampled(weights)
    )
    return {
        key: _scored(table, key, value, drawn[key], confidence, n_rows)
        for table in tables
        for key, value in table.values().items()
    }


def compare(
    ours: Sequence[Prediction],
    theirs: Sequence[Prediction],
    metric_names: Sequence[str],
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    choices: Sequence[str] = (),
) -> dict[str, Difference]:
    """Ours minus theirs for each value of the metrics, by key, paired by row.

    The interval is the percentile bootstrap of the difference: both systems see the same resampled
    rows, those of `score` with the same seed (paired bootstrap, Koehn 2004, section 5). The p-value
    is that of approximate randomisation (Noreen 1989; Riezler and Maxwell 2005): the two answers to
    a row are swapped by the toss of a coin, and p = (swaps with at least the difference that was
    seen, either way, + 1) / (swaps + 1). So it is never below 1 / (resamples + 1).
    Raises what `score` raises; DataError where rows, wordings or references are not the same.
    """
    _check_settings(confidence, resamples)
    left, right = _ordered(ours, "our predictions"), _ordered(theirs, "their predictions")
    _check_paired(left, right)
    pairs = list(
        zip(
            _tables(left, metric_names, choices), _tables(right, metric_names, choices), strict=True
        )
    )
    n_rows = len(_starts(left))

    def resampled(mine: Table, other: Table, weights: Array) -> dict[str, Array]:
        return _minus(mine.resampled(weights), other.resampled(weights))

    def swapped(mine: Table, other: Table, swaps: Array) -> dict[str, Array]:
        return _minus(mine.swapped(other, swaps), other.swapped(mine, swaps))

    drawn = _draw(pairs, _weights(n_rows, resamples, seed), resampled)
    tossed = _draw(pairs, _swaps(n_rows, resamples, seed), swapped)
    differences = {}
    for mine, other in pairs:
        for key, value in _minus(mine.values(), other.values()).items():
            low, high = _percentiles(drawn[key], value, confidence)
            differences[key] = Difference(value, low, high, _p_value(tossed[key], value))
    return differences


def by_wording(
    rows: Sequence[Prediction], metric_names: Sequence[str], *, choices: Sequence[str] = ()
) -> list[dict[str, float]]:
    """The values of each wording alone, by its number; raises what `score` raises."""
    ordered = _ordered(rows, "predictions")
    tables = _tables(ordered, metric_names, choices)
    wordings = np.array([row.wording for row in ordered])
    return [
        {
            key: value
            for table in tables
            for key, value in table.values(np.flatnonzero(wordings == wording)).items()
        }
        for wording in np.unique(wordings)
    ]


def _tables(
    ordered: Sequence[Prediction], metric_names: Sequence[str], choices: Sequence[str]
) -> list[Table]:
    """One table for each metric that has a value which those before it have not."""
    for name in metric_names:
        metrics.check(name)
    tables: list[Table] = []
    for name in dict.fromkeys(metric_names):
        table = _table(ordered, name, choices)
        known = {key for each in tables for key in each.signatures}
        taken = sorted(known & set(table.signatures)) if name.endswith(".py") else []
        if taken:
            raise errors.UserError(
                f"metric {name}: its value {errors.shown(taken[0])} has the name of another "
                "metric's that is asked for too. Rename it, or ask for one of them."
            )
        table.signatures = {k: each for k, each in table.signatures.items() if k not in known}
        if table.signatures:
            tables.append(table)
    return tables


def _table(ordered: Sequence[Prediction], name: str, choices: Sequence[str]) -> Table:
    from itune.metrics import tables

    return tables.make(
        metrics.load(name, choices=choices),
        [each.prediction for each in ordered],
        [each.references for each in ordered],
        _starts(ordered),
    )


def _ordered(rows: Sequence[Prediction], where: str) -> list[Prediction]:
    """The predictions by row and wording, so that nothing depends on the order they came in."""
    if not rows:
        raise errors.UserError(f"{where}: there are no rows to score. Give at least one.")
    ordered = sorted(rows, key=lambda each: (each.row, each.wording))
    for one, other in itertools.pairwise(ordered):
        if (one.row, one.wording) == (other.row, other.wording):
            raise errors.DataError(
                f"{where}: row {one.row} in wording {one.wording} is there twice. Keep one of them."
            )
    return ordered


def _starts(ordered: Sequence[Prediction]) -> Array:
    """Where each row begins among the ordered predictions, [rows]."""
    rows = np.array([each.row for each in ordered])
    return np.flatnonzero(np.concatenate([[True], rows[1:] != rows[:-1]]))


def _check_settings(confidence: float, resamples: int) -> None:
    if not 0 < confidence < 1:
        raise errors.UserError(
            f"confidence: is {errors.shown(confidence)}. Give a share between 0 and 1, e.g. 0.95."
        )
    if resamples < 1:
        raise errors.UserError(
            f"resamples: is {errors.shown(resamples)}. Give a whole number from 1, e.g. 1000."
        )


def _check_paired(ours: Sequence[Prediction], theirs: Sequence[Prediction]) -> None:
    """Raises DataError, which names the first place where two systems did not answer the same."""
    left = {(each.row, each.wording): each.references for each in ours}
    right = {(each.row, each.wording): each.references for each in theirs}
    for here, there, only in ((left, right, "ours"), (right, left, "theirs")):
        missing = sorted(here.keys() - there.keys())
        if missing:
            row, wording = missing[0]
            raise errors.DataError(
                f"comparison: {len(missing)} of {len(here)} answers are only in {only}, the first "
                f"to row {row} in wording {wording}. Compare answers to the same rows and wordings."
            )
    for (row, wording), references in left.items():
        if right[row, wording] != references:
            raise errors.DataError(
                f"comparison: row {row} in wording {wording} has other references in ours than in "
                "theirs. Compare answers to the same data."
            )


def _weights(n_rows: int, resamples: int, seed: int) -> Iterator[Array]:
    """How often each row is drawn when n_rows are drawn with replacement, [draws, rows] a block."""
    random = np.random.default_rng([seed, 1])
    for n_draws in _blocks(n_rows, resamples):
        drawn = random.integers(0, n_rows, size=(n_draws, n_rows))
        drawn += np.arange(n_draws)[:, None] * n_rows
        counts = np.bincount(drawn.ravel(), minlength=n_draws * n_rows)
        yield counts.reshape(n_draws, n_rows).astype(np.float64)


def _swaps(n_rows: int, resamples: int, seed: int) -> Iterator[Array]:
    """Tosses of a coin, 0 or 1, [draws, rows] a block."""
    random = np.random.default_rng([seed, 2])
    for n_draws in _blocks(n_rows, resamples):
        yield (random.random((n_draws, n_rows)) < 0.5).astype(np.float64)


def _blocks(n_rows: int, resamples: int) -> Iterator[int]:
    """Sizes of the blocks that many draws are made in; the draws do not depend on them."""
    size = max(1, BLOCK // n_rows)
    for done in range(0, resamples, size):
        yield min(size, resamples - done)


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


def _scored(
    table: Table, key: str, value: float, drawn: Array, confidence: float, n_rows: int
) -> Score:
    low, high = _percentiles(drawn, value, confidence)
    if table.bounds is not None and high - low <= NOISE:
        low, high = _unseen(value, table.bounds, confidence, n_rows)
    return Score(value, low, high, table.signatures[key])


def _percentiles(drawn: Array, value: float, confidence: float) -> tuple[float, float]:
    """The middle share of the draws, widened to hold the value; the value if none is finite."""
    known = drawn[np.isfinite(drawn)]
    if len(known) == 0:
        return value, value
    tail = (1 - confidence) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return min(float(low), value), max(float(high), value)


def _unseen(
    value: float, bounds: tuple[float, float], confidence: float, n_rows: int
) -> tuple[float, float]:
    """The interval where all rows score alike, so that every resample is the same.

    The share of rows that score otherwise, none of which was seen among n, is at most
    1 - (tail)^(1/n) (Clopper and Pearson 1934, for 0 of n; "rule of three"); at worst these rows
    score the least or the greatest value there is.
    """
    least, greatest = bounds
    seen = ((1 - confidence) / 2) ** (1 / n_rows)
    low = seen * value + (1 - seen) * least
    high = seen * value + (1 - seen) * greatest
    return min(low, value), max(high, value)


def _p_value(tossed: Array, value: float) -> float:
    """Two-sided: the share of swaps that differ at least as much, counting what was seen as one."""
    as_large = np.abs(tossed[np.isfinite(tossed)]) >= abs(value) - NOISE
    return float((as_large.sum() + 1) / (len(as_large) + 1))
