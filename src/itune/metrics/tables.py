"""One metric over one system's rows, ready to answer for any weighting of the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from itune.metrics import sufficient, user
from itune.metrics.sufficient import Array, References

WIDEST = 4_000_000  # chosen: statistics turned into float64 at a time, 32 MB
RECOMPUTED = 100  # chosen: draws for a metric of the user's, each of which computes it anew


class Table(Protocol):
    """What scoring asks of a metric. A row is what is drawn: its answers in all wordings."""

    signatures: dict[str, str]
    """The signature of each value that is wanted, by key, in the order of the result."""
    bounds: tuple[float, float] | None
    """The least and the greatest value that rows never seen may have, where there are such."""
    less_is_better: bool
    """Whether a smaller value is the better one."""
    details: Mapping[str, Any]
    """What the metric has to say beside its values."""
    most: int
    """How many draws it may be asked for."""

    def values(self, places: Array | None = None) -> dict[str, float]:
        """The values over the answers at these places, or over all."""

    def resampled(self, weights: Array) -> dict[str, Array]:
        """Values [draws] where each row counts as often as weights [draws, rows] say."""

    def swapped(self, other: Any, swaps: Array) -> dict[str, Array]:
        """Values [draws] where rows marked 1 in swaps [draws, rows] are the other system's."""

    def left_out(self) -> dict[str, Array] | None:
        """Values [rows] without each row, or None where that is not to be had."""

    def each(self) -> Array | None:
        """What each answer scores by the first value, [answers], or None."""


def make(
    metric: sufficient.SufficientMetric | user.UserMetric,
    texts: Sequence[str],
    references: References,
    starts: Array,
) -> Table:
    """The table of a metric; starts [rows]: where the answers to each row begin among the texts.

    Raises what the metric raises.
    """
    if isinstance(metric, sufficient.SufficientMetric):
        return of_statistics(
            metric,
            metric.statistics(texts, references),
            starts,
            details=metric.details(texts, references),
        )
    found = metric.checked(texts, references)
    signatures = dict.fromkeys(found, metric.signature)
    if all(isinstance(value, np.ndarray) for value in found.values()):
        statistics = np.column_stack([*found.values(), np.ones(len(texts))])
        return Summed(statistics, _means(list(found)), signatures, None, starts)
    return Recomputed(metric, texts, references, signatures, starts)


def of_statistics(
    metric: sufficient.SufficientMetric,
    statistics: Array,
    starts: Array,
    *,
    details: Mapping[str, Any] | None = None,
) -> Table:
    """The table of a metric whose statistics [answers, k] are known; see `make`."""
    table = Summed(
        statistics,
        metric.values,
        {key: metric.signature_of(key) for key in metric.keys},
        metric.unseen or metric.bounds,
        starts,
    )
    table.less_is_better = metric.less_is_better
    table.rows_of = metric.row_values
    table.details = details or {}
    return table


class Summed:
    """A metric with sufficient statistics: every question is a product with the table of these."""

    most = 2**62

    def __init__(
        self,
        statistics: Array,
        values: Callable[[Array], Mapping[str, Array]],
        signatures: dict[str, str],
        bounds: tuple[float, float] | None,
        starts: Array,
    ) -> None:
        self.statistics, self.values_of = statistics, values
        self.signatures, self.bounds = signatures, bounds
        self.less_is_better = False
        self.details: Mapping[str, Any] = {}
        self.rows_of = values
        self.rows = statistics  # [rows, k], summed over wordings
        if len(starts) < len(statistics):
            kind = np.int16 if statistics.dtype == np.int8 else statistics.dtype
            self.rows = np.add.reduceat(statistics, starts, axis=0, dtype=kind)

    def _of(self, sums: Array) -> dict[str, Array]:
        found = self.values_of(sums)
        return {key: np.asarray(found[key]) for key in self.signatures}

    def values(self, places: Array | None = None) -> dict[str, float]:
        """The values over the answers at these places, or over all."""
        chosen = self.statistics if places is None else self.statistics[places]
        found = self._of(sufficient.total(chosen))
        return {key: float(value) for key, value in found.items()}

    def resampled(self, weights: Array) -> dict[str, Array]:
        """Values [draws] where each row counts as often as weights [draws, rows] say."""
        return self._of(product(weights, self.rows))

    def swapped(self, other: Summed, swaps: Array) -> dict[str, Array]:
        """Values [draws] where rows marked 1 in swaps [draws, rows] are the other system's."""
        return self._of(sufficient.total(self.rows) + product(swaps, other.rows, minus=self.rows))

    def left_out(self) -> dict[str, Array] | None:
        """Values [rows] without each row; None for a single one."""
        if len(self.rows) < 2:
            return None
        total, width = sufficient.total(self.rows), max(1, WIDEST // self.rows.shape[1])
        parts = [
            self._of(total - self.rows[first : first + width])
            for first in range(0, len(self.rows), width)
        ]
        return {key: np.concatenate([part[key] for part in parts]) for key in self.signatures}

    def each(self) -> Array | None:
        """What each answer scores by the first value, [answers]."""
        key, width = next(iter(self.signatures)), max(1, WIDEST // self.statistics.shape[1])
        parts = [
            self.rows_of(self.statistics[first : first + width].astype(np.float64))[key]
            for first in range(0, len(self.statistics), width)
        ]
        return np.concatenate(parts)


class Recomputed:
    """A metric of the user's that gives its value and nothing else: computed anew for each draw."""

    most = RECOMPUTED

    def __init__(
        self,
        metric: user.UserMetric,
        texts: Sequence[str],
        references: References,
        signatures: dict[str, str],
        starts: Array,
    ) -> None:
        self.metric, self.signatures = metric, signatures
        self.bounds: tuple[float, float] | None = None
        self.less_is_better = False
        self.details: Mapping[str, Any] = {}
        self.answers = list(zip(texts, references, strict=True))
        self.ends = [*starts.tolist(), len(texts)]

    def row(self, row: int) -> Answers:
        """The answers to a row, in all its wordings."""
        return self.answers[self.ends[row] : self.ends[row + 1]]

    def _compute(self, answers: Answers) -> dict[str, float]:
        found = self.metric.compute([text for text, _ in answers], [gold for _, gold in answers])
        return {key: float(np.mean(found.get(key, np.nan))) for key in self.signatures}

    def _each(self, draws: Sequence[Answers]) -> dict[str, Array]:
        found = [self._compute(answers) for answers in draws]
        return {key: np.array([one[key] for one in found]) for key in self.signatures}

    def values(self, places: Array | None = None) -> dict[str, float]:
        """The values over the answers at these places, or over all."""
        chosen = self.answers if places is None else [self.answers[place] for place in places]
        found = self._compute(chosen)
        for key, value in found.items():
            self.metric.refuse_undefined(key, value)
        return found

    def left_out(self) -> None:
        """Nothing: it would be computed anew for each row."""

    def each(self) -> None:
        """Nothing: what it says of single answers need not be on the same scale."""

    def resampled(self, weights: Array) -> dict[str, Array]:
        """Values [draws] where each row counts as often as weights [draws, rows] say."""
        drawn = [np.repeat(np.arange(len(one)), one.astype(int)).tolist() for one in weights]
        return self._each([[each for row in rows for each in self.row(row)] for rows in drawn])

    def swapped(self, other: Recomputed, swaps: Array) -> dict[str, Array]:
        """Values [draws] where rows marked 1 in swaps [draws, rows] are the other system's."""
        return self._each(
            [
                [
                    each
                    for row, swap in enumerate(one)
                    for each in (other if swap else self).row(row)
                ]
                for one in swaps
            ]
        )


Answers = Sequence[tuple[str, Sequence[str]]]


def product(weights: Array, table: Array, *, minus: Array | None = None) -> Array:
    """weights [draws, rows] @ (table - minus) [rows, k], as float64, some columns at a time."""
    width = max(1, WIDEST // len(table))
    parts = []
    for first in range(0, table.shape[1], width):
        columns = table[:, first : first + width].astype(np.float64)
        if minus is not None:
            columns -= minus[:, first : first + width]
        parts.append(weights @ columns)
    return np.hstack(parts)


def _means(keys: Sequence[str]) -> Callable[[Array], Mapping[str, Array]]:
    def values(sums: Array) -> dict[str, Array]:
        return {key: sums[..., place] / sums[..., -1] for place, key in enumerate(keys)}

    return values
