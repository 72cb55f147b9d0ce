"""Matthews' correlation of labels, -1 to 1."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from itune.metrics import f1, sufficient


class MatthewsCorrelation(f1.Labelled):
    """Matthews' correlation coefficient over all classes: scikit-learn's, on text, -1 to 1.

    0 is what guessing gets, whatever the classes' sizes (Gorodkin 2004 for more than two). All
    answers that are none of the labels make one class together, which nothing is asked for. Where
    one side holds a single class there is no correlation, and the value is 0, as in scikit-learn.
    """

    keys: ClassVar[tuple[str, ...]] = ("matthews_correlation",)
    bounds: ClassVar[tuple[float, float] | None] = (-1.0, 1.0)

    def described(self, n_labels: int) -> str:
        return f"matthews_correlation|labels:{n_labels}|outside:one class"

    def values(self, sums: sufficient.Array) -> dict[str, sufficient.Array]:
        right, answered, asked = self.parts(np.asarray(sums, dtype=np.float64))
        rows = asked.sum(axis=-1)
        outside = rows - answered.sum(axis=-1)
        hits = right.sum(axis=-1) * rows - (answered * asked).sum(axis=-1)
        spread = rows**2 - (answered**2).sum(axis=-1) - outside**2
        spread_asked = rows**2 - (asked**2).sum(axis=-1)
        both = spread * spread_asked
        found = np.where(both > 0, hits / np.sqrt(np.where(both > 0, both, 1)), 0.0)
        return {"matthews_correlation": found}

    def row_values(self, statistics: sufficient.Array) -> dict[str, sufficient.Array]:
        """Whether each answer is right: a single one has no correlation."""
        return {"matthews_correlation": self.parts(statistics)[0].sum(axis=-1).astype(np.float64)}
