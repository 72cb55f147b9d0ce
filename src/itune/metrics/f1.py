"""F1 of a classification, macro-averaged, 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from itune import errors
from itune.metrics import sufficient

MOST_LABELS = 1000  # chosen: more are no classes but free text, and would need much memory


class F1(sufficient.SufficientMetric):
    """Macro F1 over the labels: scikit-learn's `f1_score(average="macro")`, on text, 0 to 1.

    The labels are those of the references, and `choices` where given. **An answer that is none of
    them is wrong, but makes no new class**: it costs its true class recall, while scikit-learn by
    itself would add a class with F1 0 for every odd answer. So the classes do not depend on the
    system. A class neither asked for nor answered has no F1 and is left out, as scikit-learn does.
    Labels are compared without the spaces around them, else exactly. A row with several references
    counts the one that was answered, else the first.
    """

    keys: ClassVar[tuple[str, ...]] = ("f1",)

    def __init__(self, choices: Sequence[str] = (), **options: Any) -> None:
        super().__init__(**options)
        self.choices = tuple(choices)

    def count(
        self, predictions: Sequence[str], references: sufficient.References
    ) -> sufficient.Array:
        """Answered and right, answered, asked for: each for all labels; [rows, 3 * labels]."""
        gold = [[each.strip() for each in answers] for answers in references]
        labels = sorted({each.strip() for each in self.choices}.union(*gold))
        if len(labels) > MOST_LABELS:
            raise errors.UserError(
                f"metric f1: the references hold {len(labels)} different labels, at most "
                f"{MOST_LABELS} are classes. Use squad_f1 for the overlap of words."
            )
        self.signature = f"f1|average:macro|labels:{len(labels)}|outside:wrong"
        place = {label: index for index, label in enumerate(labels)}
        counts = np.zeros((len(predictions), 3, len(labels)), dtype=np.int8)
        for row, (text, answers) in enumerate(zip(predictions, gold, strict=True)):
            answered = text.strip()
            asked = answered if answered in answers else answers[0]
            counts[row, 2, place[asked]] = 1
            if answered in place:
                counts[row, 1, place[answered]] = 1
                counts[row, 0, place[answered]] = answered == asked
        return counts.reshape(len(predictions), -1)

    def values(self, sums: sufficient.Array) -> dict[str, sufficient.Array]:
        shape = np.shape(sums)
        right, answered, asked = np.moveaxis(np.reshape(sums, (*shape[:-1], 3, -1)), -2, 0)
        both = answered + asked
        known = both > 0
        each = 2 * right / np.where(known, both, 1)
        return {"f1": each.sum(axis=-1) / known.sum(axis=-1)}

    def _compute(
        self, *, predictions: Any, references: Any, choices: Sequence[str] = (), **options: Any
    ) -> dict[str, float]:
        kept, self.choices = self.choices, tuple(choices) or self.choices
        try:
            return super()._compute(predictions=predictions, references=references)
        finally:
            self.choices = kept
