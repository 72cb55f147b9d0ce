"""F1 of a classification, macro-averaged, 0 to 1; and what metrics of labels have in common."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from itune import errors
from itune.metrics import sufficient

MOST_LABELS = 1000  # chosen: more are no classes but free text, and would need much memory
MOST_CONFUSED = 100  # chosen: a confusion matrix of more is not written out


class Labelled(sufficient.SufficientMetric, abc.ABC):
    """A metric of labels. The classes are those of the references, and `choices` where given.

    **An answer that is none of them is wrong, but makes no new class**, so the classes do not
    depend on the system. Labels are compared without the spaces around them, else exactly. A row
    with several references counts the one that was answered, else the first.
    """

    def __init__(self, choices: Sequence[str] = (), **options: Any) -> None:
        super().__init__(**options)
        self.choices = tuple(choices)

    @abc.abstractmethod
    def described(self, n_labels: int) -> str:
        """The signature for so many labels."""

    def labels(self, references: sufficient.References) -> list[str]:
        """The classes, in order. Raises UserError where they are too many to be classes."""
        asked = {each.strip() for answers in references for each in answers}
        found = sorted(asked.union(each.strip() for each in self.choices))
        if len(found) > MOST_LABELS:
            raise errors.UserError(
                f"metric {self.keys[0]}: the references hold {len(found)} different labels, at "
                f"most {MOST_LABELS} are classes. Use squad_f1 for the overlap of words."
            )
        return found

    def check_references(self, references: sufficient.References) -> None:
        self.labels(references)

    def count(
        self, predictions: Sequence[str], references: sufficient.References
    ) -> sufficient.Array:
        """Answered and right, answered, asked for: each for all labels; [rows, 3 * labels]."""
        labels = self.labels(references)
        self.signature = self.described(len(labels))
        place = {label: index for index, label in enumerate(labels)}
        counts = np.zeros((len(predictions), 3, len(labels)), dtype=np.int8)
        for row, (answered, asked) in enumerate(_pairs(predictions, references)):
            counts[row, 2, place[asked]] = 1
            if answered in place:
                counts[row, 1, place[answered]] = 1
                counts[row, 0, place[answered]] = answered == asked
        return counts.reshape(len(predictions), -1)

    @staticmethod
    def parts(sums: sufficient.Array) -> tuple[sufficient.Array, ...]:
        """Of sums [..., 3 * labels]: answered and right, answered, asked for; [..., labels]."""
        shape = np.shape(sums)
        return tuple(np.moveaxis(np.reshape(sums, (*shape[:-1], 3, -1)), -2, 0))

    def _compute(
        self, *, predictions: Any, references: Any, choices: Sequence[str] = (), **options: Any
    ) -> dict[str, float]:
        kept, self.choices = self.choices, tuple(choices) or self.choices
        try:
            return super()._compute(predictions=predictions, references=references)
        finally:
            self.choices = kept


class F1(Labelled):
    """Macro F1 over the labels: scikit-learn's `f1_score(average="macro")`, on text, 0 to 1.

    An answer that is no label costs its true class recall, while scikit-learn by itself would add
    a class with F1 0 for every odd answer. A class neither asked for nor answered has no F1 and is
    left out, as scikit-learn does. The rest as in `Labelled`.
    """

    keys: ClassVar[tuple[str, ...]] = ("f1",)

    def described(self, n_labels: int) -> str:
        return f"f1|average:macro|labels:{n_labels}|outside:wrong"

    def values(self, sums: sufficient.Array) -> dict[str, sufficient.Array]:
        right, answered, asked = self.parts(sums)
        both = answered + asked
        known = both > 0
        each = 2 * right / np.where(known, both, 1)
        return {"f1": each.sum(axis=-1) / known.sum(axis=-1)}

    def details(
        self, predictions: Sequence[str], references: sufficient.References
    ) -> dict[str, Any]:
        """Micro F1, each class by itself, and which class was answered how often for which.

        `confusion`: for each label of `labels` asked for, how often each was answered; one column
        more counts the answers that are none of them.
        """
        labels = self.labels(references)
        right, answered, asked = self.parts(sufficient.total(self.count(predictions, references)))
        made: dict[str, Any] = {
            # Micro F1 as scikit-learn's with these labels: an odd answer is no false positive.
            "micro": _share(2 * right.sum(), answered.sum() + asked.sum()),
            "classes": {
                label: {
                    "precision": _share(right[k], answered[k]),
                    "recall": _share(right[k], asked[k]),
                    "f1": _share(2 * right[k], answered[k] + asked[k]),
                    "rows": int(asked[k]),
                }
                for k, label in enumerate(labels)
            },
        }
        if len(labels) <= MOST_CONFUSED:
            place = {label: index for index, label in enumerate(labels)}
            table = np.zeros((len(labels), len(labels) + 1), dtype=np.int64)
            for said, gold in _pairs(predictions, references):
                table[place[gold], place.get(said, len(labels))] += 1
            made["confusion"] = {"labels": labels, "counts": table.tolist()}
        return made


def _pairs(predictions: Sequence[str], references: sufficient.References) -> list[tuple[str, str]]:
    """(answered, asked for) of each row."""
    pairs = []
    for text, answers in zip(predictions, references, strict=True):
        answered, golds = text.strip(), [each.strip() for each in answers]
        pairs.append((answered, answered if answered in golds else golds[0]))
    return pairs


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
