"""The share of answers that are a reference to the letter, 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from itune.metrics import sufficient


class ExactMatch(sufficient.MeanMetric):
    """The share of rows whose answer equals one of the references, 0 to 1.

    Spaces around both are removed first. Case, punctuation and articles count; `squad_em` is the
    one that forgives these.
    """

    keys: ClassVar[tuple[str, ...]] = ("exact_match",)
    signature = "exact_match|strip:yes|case:mixed"

    def scores(
        self, predictions: Sequence[str], references: sufficient.References
    ) -> sufficient.Array:
        return np.asarray(
            [
                text.strip() in {each.strip() for each in answers}
                for text, answers in zip(predictions, references, strict=True)
            ]
        )
