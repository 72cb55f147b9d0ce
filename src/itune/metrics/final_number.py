"""The share of worked answers whose result, their last number, is right, 0 to 1."""

from __future__ import annotations

import decimal
import re
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from itune.metrics import sufficient

# 1,250.50 or 1250.50 or .5, with its sign where that is no minus between two numbers.
NUMBER = re.compile(r"(?<![\d.])(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?!\d)")


def last_number(text: str) -> decimal.Decimal | None:
    """The last number in a text, None where it has none: 1,250 is 1250, and 7.0 is 7."""
    found = NUMBER.findall(text)
    return decimal.Decimal(found[-1].replace(",", "")) if found else None


class FinalNumber(sufficient.MeanMetric):
    """The share of rows whose last number equals that of one of the references, 0 to 1.

    An answer without a number is wrong, and so is every answer to a reference without one.
    """

    keys: ClassVar[tuple[str, ...]] = ("final_number",)
    signature = "final_number|last:yes|thousands:,"

    def scores(
        self, predictions: Sequence[str], references: sufficient.References
    ) -> sufficient.Array:
        wanted = [{last_number(each) for each in answers} - {None} for answers in references]
        return np.asarray(
            [last_number(text) in right for text, right in zip(predictions, wanted, strict=True)]
        )
