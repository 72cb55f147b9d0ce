"""The result of worked maths is its last number."""

from __future__ import annotations

import decimal

import pytest

from itune import metrics
from itune.metrics import final_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 * 3 = 6\n#### 6", "6"),
        ("It costs $1,250.50.", "1250.5"),
        ("it is -3", "-3"),
        ("5-3", "3"),
        ("x = .5!", "0.5"),
        ("7.0 apples", "7"),
        ("first 12, then 5", "5"),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number_is_found(text: str, number: str | None) -> None:
    expected = None if number is None else decimal.Decimal(number)
    assert final_number.last_number(text) == expected


def test_worked_answers_are_scored_by_their_result_alone() -> None:
    metric = metrics.load("final_number")
    answers = ["So it is 42.", "40 and 2, so 43", "forty-two", "#### 42.0", "1,000"]
    golds = [["6 * 7\n#### 42"]] * 4 + [["#### 1000", "#### 1"]]
    assert metric.statistics(answers, golds)[:, 0].tolist() == [1, 0, 0, 1, 1]
    assert metric.statistics(["no", "7"], [["no"], ["no"]])[:, 0].tolist() == [0, 0]
