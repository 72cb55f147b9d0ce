"""How far a number can be trusted: resampled rows, intervals, p-values, several tests at once.

Every random draw depends on the seed and on the number of rows alone: neither on their order nor
on the metric.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from itune import errors

Array = npt.NDArray[Any]
Key = TypeVar("Key")

BLOCK = 4_000_000  # chosen: weights drawn at a time, 32 MB as float64
NOISE = 1e-9  # sums in another order may differ by this much, on scales of 0 to 100 at most
SHIFTED = 0.7  # chosen: three quarters of the draws on one side of the value
NORMAL = statistics.NormalDist()


def check(confidence: float, resamples: int) -> None:
    """Raises UserError for settings with which no interval can be made."""
    if not 0 < confidence < 1:
        raise errors.UserError(
            f"confidence: is {errors.shown(confidence)}. Give a share between 0 and 1, e.g. 0.95."
        )
    if resamples < 1:
        raise errors.UserError(
            f"resamples: is {errors.shown(resamples)}. Give a whole number from 1, e.g. 1000."
        )


# --- draws --------------------------------------------------------------------------------------


def weights(n_rows: int, resamples: int, seed: int) -> Iterator[Array]:
    """How often each row is drawn when n_rows are drawn with replacement, [draws, rows] a block."""
    random = np.random.default_rng([seed, 1])
    for n_draws in _blocks(n_rows, resamples):
        drawn = random.integers(0, n_rows, size=(n_draws, n_rows))
        drawn += np.arange(n_draws)[:, None] * n_rows
        counts = np.bincount(drawn.ravel(), minlength=n_draws * n_rows)
        yield counts.reshape(n_draws, n_rows).astype(np.float64)


def swaps(n_rows: int, resamples: int, seed: int) -> Iterator[Array]:
    """Tosses of a coin, 0 or 1, [draws, rows] a block."""
    random = np.random.default_rng([seed, 2])
    for n_draws in _blocks(n_rows, resamples):
        yield (random.random((n_draws, n_rows)) < 0.5).astype(np.float64)


def _blocks(n_rows: int, resamples: int) -> Iterator[int]:
    """Sizes of the blocks that many draws are made in; the draws do not depend on them."""
    size = max(1, BLOCK // n_rows)
    for done in range(0, resamples, size):
        yield min(size, resamples - done)


# --- intervals ----------------------------------------------------------------------------------


def interval(
    value: float,
    drawn: Array,
    left_out: Array | None,
    *,
    bounds: tuple[float, float] | None,
    confidence: float,
    n_rows: int,
) -> tuple[float, float]:
    """The interval of a value from what its resamples gave: low and high.

    drawn [draws]: the value on resampled rows; left_out [rows]: the value without each row, or
    None; bounds: the least and the greatest value there is, where there are such. Bias-corrected
    and accelerated (`_accelerated`); where all draws are alike, that of unseen rows (`_unseen`).
    """
    known = drawn[np.isfinite(drawn)]
    if len(known) == 0:
        return value, value
    if bounds is not None and float(np.ptp(known)) <= NOISE and abs(known[0] - value) <= NOISE:
        return _unseen(value, bounds, confidence, n_rows)
    if abs(bias := _bias(value, known)) > SHIFTED:
        low, high = _reflected(value, known, bounds, confidence, n_rows)
    else:
        shares = _accelerated(bias, left_out, confidence, n_rows)
        low, high = np.quantile(known, shares).tolist()
    return min(low, value), max(high, value)


def _bias(value: float, drawn: Array) -> float:
    """How far the draws lie beside the value, in deviations of the normal distribution."""
    below = np.sum(drawn < value - NOISE) + np.sum(np.abs(drawn - value) <= NOISE) / 2
    edge = 0.5 / len(drawn)
    return NORMAL.inv_cdf(float(np.clip(below / len(drawn), edge, 1 - edge)))


def _reflected(
    value: float,
    drawn: Array,
    bounds: tuple[float, float] | None,
    confidence: float,
    n_rows: int,
) -> tuple[float, float]:
    """As far from the value as the draws are, on the other side (basic bootstrap, Efron 1979).

    Where nearly all draws lie on one side, as those of macro F1 over many classes of few rows do,
    the value is beside what it estimates by as much, and corrected percentiles would be draws of
    one end alone: an interval of half the width that it must have.
    """
    share = NORMAL.cdf(_student((1 + confidence) / 2, n_rows))
    lowest, highest = np.quantile(drawn, [1 - share, share])
    least, greatest = bounds or (-np.inf, np.inf)
    return float(max(2 * value - highest, least)), float(min(2 * value - lowest, greatest))


def _accelerated(
    bias: float, left_out: Array | None, confidence: float, n_rows: int
) -> list[float]:
    """Which shares of the draws bound the interval: BCa (Efron 1987), widened for few rows.

    The plain percentiles are off where the draws are not centred on the value (corrected by how
    many lie below it) or where their spread changes with it (corrected by the skew of what each
    row adds). For few rows draws spread too little, by (n - 1) / n, and the normal distribution
    is too narrow: Student's is put in its place (Hesterberg 2015, "expanded percentiles").
    """
    skew = _acceleration(left_out)
    reach = _student((1 + confidence) / 2, n_rows)
    shares = []
    for side in (-reach, reach):
        bent = 1 - skew * (bias + side)
        share = NORMAL.cdf(bias + (bias + side) / bent) if bent > 0 else float(side > 0)
        shares.append(min(max(share, 0.0), 1.0))
    return shares


def _acceleration(left_out: Array | None) -> float:
    """A sixth of the skew of the rows' influences, from the value without each of them."""
    if left_out is None or not np.isfinite(left_out).all():
        return 0.0
    pulls = left_out.mean() - left_out
    spread = float(np.sum(pulls**2)) ** 1.5
    return float(np.sum(pulls**3)) / (6 * spread) if spread > 0 else 0.0


def _student(share: float, n_rows: int) -> float:
    """The quantile of Student's distribution with n - 1 degrees, times sqrt(n / (n - 1)).

    By its expansion in powers of 1 / degrees (Abramowitz and Stegun, 26.7.5).
    """
    normal, degrees = NORMAL.inv_cdf(share), max(n_rows - 1, 1)
    first = (normal**3 + normal) / 4
    second = (5 * normal**5 + 16 * normal**3 + 3 * normal) / 96
    wide: float = (normal + first / degrees + second / degrees**2) * (1 + 1 / degrees) ** 0.5
    return wide


def _unseen(
    value: float, bounds: tuple[float, float], confidence: float, n_rows: int
) -> tuple[float, float]:
    """The interval where all rows are alike, so that every resample is the same.

    The share of rows that are otherwise, none of which was seen among n, is at most
    1 - (tail)^(1/n) (Clopper and Pearson 1934, for 0 of n; "rule of three"); at worst these rows
    give the least or the greatest value there is.
    """
    least, greatest = bounds
    seen = ((1 - confidence) / 2) ** (1 / n_rows)
    low = seen * value + (1 - seen) * least
    high = seen * value + (1 - seen) * greatest
    return min(low, value), max(high, value)


# --- tests --------------------------------------------------------------------------------------


def p_value(tossed: Array, value: float) -> float:
    """Two-sided: the share of swaps that differ at least as much, counting what was seen as one."""
    as_large = np.abs(tossed[np.isfinite(tossed)]) >= abs(value) - NOISE
    return float((as_large.sum() + 1) / (len(as_large) + 1))


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """The p-values as they count when all are tested together (Holm 1979), by the same keys.

    Below 0.05 for all that may be called different, such that the chance of even one false alarm
    among them is at most 0.05, however they depend on each other.
    """
    adjusted: dict[Key, float] = {}
    highest = 0.0
    for rank, key in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        highest = max(highest, min(1.0, p_values[key] * (len(p_values) - rank)))
        adjusted[key] = highest
    return {key: adjusted[key] for key in p_values}
