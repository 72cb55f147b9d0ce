"""Intervals hold what they promise, comparisons are paired, the order of rows changes nothing."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
from test_metrics import ODD, own

from itune import errors, intervals, metrics, resampling, scoring
from itune.metrics import sufficient, tables
from itune.scoring import Prediction

WORDS = ["the", "a", "cat", "dog", "sat", "on", "ran", "to", "old", "red", "house", "mat"]


def labels(n: int, right: float, *, seed: int = 0, wordings: int = 1) -> list[Prediction]:
    """Rows asked for one of two labels, answered right with a probability of `right`."""
    draw = random.Random(seed)
    rows = []
    for row in range(n):
        gold = "yes" if row % 2 else "no"
        wrong = "no" if row % 2 else "yes"
        for wording in range(wordings):
            answer = gold if draw.random() < right else wrong
            rows.append(Prediction(row, wording, answer, (gold,)))
    return rows


def sentences(n: int, kept: float, *, seed: int = 0, wordings: int = 1) -> list[Prediction]:
    """Rows of text, of which each word is kept with a probability of `kept`."""
    golds, draw, rows = random.Random(1), random.Random(seed), []
    for row in range(n):
        gold = golds.choices(WORDS, k=12)
        for wording in range(wordings):
            said = [word if draw.random() < kept else draw.choice(WORDS) for word in gold]
            rows.append(Prediction(row, wording, " ".join(said), (" ".join(gold),)))
    return rows


def everything(*, but: tuple[str, ...] = ()) -> list[str]:
    return [name for name in metrics.names() if name not in but]


# --- scores ---


@pytest.mark.parametrize("name", metrics.names())
def test_value_is_that_of_the_metric_itself(name: str) -> None:
    rows = sentences(20, 0.7)
    metric = metrics.load(name)
    assert isinstance(metric, sufficient.SufficientMetric)
    texts = [row.prediction for row in rows]
    direct = metric.compute(predictions=texts, references=[list(row.references) for row in rows])
    found = scoring.score(rows, [name], resamples=50)
    assert {key: each.value for key, each in found.items()} == direct
    assert {key: each.signature for key, each in found.items()} == {
        key: metric.signature_of(key) for key in direct
    }
    assert all(each.low <= each.value <= each.high for each in found.values())


def test_interval_of_a_mean_is_nearly_the_normal_one() -> None:
    rows = labels(400, 0.7)
    found = scoring.score(rows, ["accuracy"], resamples=2000)["accuracy"]
    spread = 1.96 * math.sqrt(found.value * (1 - found.value) / 400)
    assert found.low == pytest.approx(found.value - spread, abs=0.006)
    assert found.high == pytest.approx(found.value + spread, abs=0.006)
    narrow = scoring.score(rows, ["accuracy"], confidence=0.5)["accuracy"]
    assert narrow.high - narrow.low == pytest.approx((found.high - found.low) * 0.344, rel=0.2)


def test_interval_holds_the_truth_as_often_as_it_promises() -> None:
    held = 0
    for seed in range(200):
        found = scoring.score(labels(100, 0.7, seed=seed), ["accuracy"], resamples=300)
        held += found["accuracy"].low <= 0.7 <= found["accuracy"].high
    assert 0.90 <= held / 200 <= 0.98


def test_wordings_of_a_row_are_drawn_together() -> None:
    once = labels(100, 0.7)
    copied = [dataclasses.replace(row, wording=w) for row in once for w in range(4)]
    names = ["accuracy", "f1", "bleu", "rougeL"]
    assert scoring.score(copied, names, resamples=100).keys() == {*names}
    for key, found in scoring.score(copied, names).items():
        alone = scoring.score(once, names)[key]
        if key != "bleu":  # four copies of a row are no new knowledge, nor any change of a ratio
            assert dataclasses.astuple(found)[:3] == pytest.approx(dataclasses.astuple(alone)[:3])


def test_neither_scores_nor_differences_depend_on_the_order_of_rows() -> None:
    ours, theirs = sentences(30, 0.8, wordings=2), sentences(30, 0.6, seed=3, wordings=2)
    names = everything(but=("ter",))
    shuffled = random.Random(9).sample(ours, len(ours))
    assert scoring.score(shuffled, names, resamples=50) == scoring.score(ours, names, resamples=50)
    assert scoring.by_wording(shuffled, names) == scoring.by_wording(ours, names)
    back = theirs[::-1]
    once = scoring.compare(ours, theirs, names, resamples=50)
    assert scoring.compare(shuffled, back, names, resamples=50) == once


def test_the_seed_decides_the_draws() -> None:
    rows = labels(50, 0.7)
    one, same, other = (scoring.score(rows, ["f1"], seed=seed)["f1"] for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_draws_do_not_depend_on_the_size_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = sentences(25, 0.8), sentences(25, 0.6, seed=3)
    names = ["f1", "bleu", "chrf"]
    whole = scoring.score(ours, names), scoring.compare(ours, theirs, names)
    monkeypatch.setattr(intervals, "BLOCK", 25 * 7)
    monkeypatch.setattr(tables, "WIDEST", 25 * 3)
    assert (scoring.score(ours, names), scoring.compare(ours, theirs, names)) == whole


def test_memory_of_the_draws_is_bounded() -> None:
    assert {block.nbytes for block in intervals.weights(100_000, 80, 0)} == {32_000_000}
    sizes = [len(block) for block in intervals.weights(100_000, 90, 0)]
    assert sizes == [40, 40, 10]
    assert len(next(intervals.weights(3 * intervals.BLOCK, 1, 0))) == 1


def test_every_draw_has_as_many_rows_as_there_are() -> None:
    blocks = list(intervals.weights(50, 200, 0))
    weights = np.concatenate(blocks)
    assert weights.shape == (200, 50)
    assert set(weights.sum(axis=1)) == {50.0}
    assert weights.mean(axis=0) == pytest.approx(np.ones(50), abs=0.35)


@pytest.mark.parametrize(("right", "low", "high"), [(1.0, 0.9638, 1.0), (0.0, 0.0, 0.0362)])
def test_rows_that_are_all_alike_still_leave_doubt(right: float, low: float, high: float) -> None:
    """The exact interval of 100 of 100 (Clopper and Pearson) is 0.9638 to 1."""
    found = scoring.score(labels(100, right), ["accuracy"])["accuracy"]
    assert found.value == right
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@pytest.mark.parametrize("odd", ODD)
def test_odd_text_has_scores_and_differences(odd: str) -> None:
    texts, golds = ODD[odd]
    rows = [Prediction(i, 0, text, tuple(golds[i])) for i, text in enumerate(texts)]
    others = [dataclasses.replace(row, prediction="something else") for row in rows]
    scores = scoring.score(rows, everything(), resamples=10)
    assert len(scores) == 14
    for each in scores.values():
        assert math.isfinite(each.value)
        assert each.low <= each.value <= each.high
    for diff in scoring.compare(rows, others, everything(), resamples=10).values():
        assert diff.low <= diff.value <= diff.high
        assert 0 < diff.p_value <= 1


def test_a_value_that_two_names_give_is_there_once() -> None:
    rows = sentences(5, 0.5)
    found = scoring.score(rows, ["rougeL", "rouge", "rougeL"], resamples=5)
    assert list(found) == ["rougeL", "rouge1", "rouge2", "rougeLsum"]
    assert scoring.score(rows, [], resamples=5) == {}


def test_choices_reach_f1() -> None:
    rows = [Prediction(0, 0, "yes", ("yes",)), Prediction(1, 0, "unsure", ("no",))]
    f1 = scoring.score(rows, ["f1"], choices=["yes", "no", "unsure"], resamples=5)["f1"]
    assert f1.value == pytest.approx(1 / 3)
    assert "labels:3" in f1.signature


def test_f1_of_rare_classes_is_not_drawn_to_zero() -> None:
    """A class that no row of a draw holds is left out of that draw, instead of counting 0."""
    golds = [("common" if i else "rare") for i in range(40)]
    rows = [Prediction(i, 0, gold, (gold,)) for i, gold in enumerate(golds)]
    assert scoring.score(rows, ["f1"])["f1"].low > 0.9


def test_many_wordings_of_a_row_overflow_nothing() -> None:
    once = labels(20, 0.7)
    other = [dataclasses.replace(row, prediction="no") for row in once]
    many, many_other = (
        [dataclasses.replace(row, wording=w) for row in rows for w in range(128)]
        for rows in (once, other)
    )
    for key in ("f1", "accuracy"):
        alone, found = (scoring.score(rows, [key])[key] for rows in (once, many))
        assert dataclasses.astuple(found)[:3] == pytest.approx(dataclasses.astuple(alone)[:3])
        alone_by, found_by = (
            scoring.compare(*pair, [key])[key] for pair in ((once, other), (many, many_other))
        )
        assert dataclasses.astuple(found_by) == pytest.approx(dataclasses.astuple(alone_by))


# --- comparison ---


def test_equal_systems_do_not_differ_but_might_on_other_rows() -> None:
    rows = sentences(20, 0.7)
    unseen = 1 - 0.025 ** (1 / 20)  # the share of rows like none of these, at most
    for key, found in scoring.compare(rows, rows, everything(), resamples=50).items():
        scale = 100 if key in ("bleu", "chrf", "ter") else 1
        scale *= 2 if key == "matthews_correlation" else 1
        assert (found.value, found.p_value) == (0, 1)
        assert found.high == -found.low == pytest.approx(scale * unseen)


@pytest.mark.parametrize("name", ["accuracy", "exact_match", "f1", "rougeL"])
def test_rows_that_all_differ_alike_still_leave_doubt(name: str) -> None:
    """30 of 30 rows are won: what is known is that most are, not that all are (0.884, exactly)."""
    ours = labels(30, 1.0)
    theirs = labels(30, 0.0)
    found = scoring.compare(ours, theirs, [name], resamples=100)[name]
    back = scoring.compare(theirs, ours, [name], resamples=100)[name]
    assert found.value == -back.value == 1
    assert found.high == -back.low == 1
    # The rows never seen, 11.6 % at most, are lost at worst: 0.884 - 0.116.
    assert found.low == -back.high == pytest.approx(2 * 0.025 ** (1 / 30) - 1)


def test_few_rows_have_wider_intervals_than_the_plain_percentiles() -> None:
    """Of 12 numbers from a skewed distribution: held as often as is promised, nearly."""
    draw, held = np.random.default_rng(4), 0
    for seed in range(300):
        row = np.column_stack([draw.gamma(2.0, 0.1, 12), np.ones(12)])
        metric = metrics.load("accuracy")
        found = resampling.score(metric, row, resamples=400, seed=seed)["accuracy"]  # type: ignore[arg-type]
        held += found.low <= 0.2 <= found.high
    assert 0.91 <= held / 300 <= 0.98


def test_holm_is_that_of_a_worked_example() -> None:
    """Holm (1979): the smallest times the number of tests, the next times one fewer, rising."""
    found = intervals.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(found) == ["a", "b", "c", "d"]
    assert intervals.holm({"one": 0.2}) == {"one": 0.2}
    assert intervals.holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert intervals.holm({}) == {}


def test_unequal_systems_differ_either_way() -> None:
    good, bad = sentences(60, 0.9), sentences(60, 0.5, seed=4)
    names = ["bleu", "chrf", "rouge", "squad_f1"]
    forth = scoring.compare(good, bad, names, resamples=500)
    back = scoring.compare(bad, good, names, resamples=500)
    apart_good, apart_bad = (scoring.score(rows, names, resamples=5) for rows in (good, bad))
    for key, found in forth.items():
        assert found.value == apart_good[key].value - apart_bad[key].value
        assert found.p_value == back[key].p_value == pytest.approx(1 / 501)
        assert 0 < found.low < found.value < found.high
        assert back[key].low == pytest.approx(-found.high)


def test_p_value_is_that_of_all_swaps() -> None:
    """Four rows, ours right in all and theirs in none: 2 of the 16 swaps are as far apart."""
    ours = [Prediction(i, 0, "yes", ("yes",)) for i in range(4)]
    theirs = [dataclasses.replace(row, prediction="no") for row in ours]
    found = scoring.compare(ours, theirs, ["accuracy"], resamples=4000)["accuracy"]
    assert found.value == 1
    assert found.p_value == pytest.approx(2 / 16, abs=0.02)


def test_p_value_is_even_where_systems_are_alike() -> None:
    values = [
        scoring.compare(
            sentences(40, 0.7, seed=2 * i + 1), sentences(40, 0.7, seed=2 * i + 2), ["squad_f1"],
            resamples=200,
        )["squad_f1"].p_value
        for i in range(60)
    ]  # fmt: skip
    assert 0.4 < np.mean(values) < 0.62
    assert np.mean(np.array(values) <= 0.1) <= 0.2


def test_pairing_sees_what_single_intervals_do_not() -> None:
    theirs = sentences(100, 0.6)
    ours = [
        dataclasses.replace(row, prediction=row.references[0]) if row.row % 8 == 0 else row
        for row in theirs
    ]
    found = scoring.compare(ours, theirs, ["rougeL"])["rougeL"]
    one, other = (scoring.score(rows, ["rougeL"])["rougeL"] for rows in (ours, theirs))
    assert one.low < other.high, "the single intervals overlap"
    assert found.low > 0
    assert found.p_value < 0.01


def test_all_wordings_of_a_row_are_swapped_together() -> None:
    ours = labels(6, 1.0, wordings=5)
    theirs = labels(6, 0.0, wordings=5)
    found = scoring.compare(ours, theirs, ["accuracy"], resamples=4000)["accuracy"]
    assert found.p_value == pytest.approx(2 / 2**6, abs=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: rows[1:],
            r"1 of 4 answers are only in ours, the first to row 0 in wording 0",
        ),
        (
            lambda rows: [*rows, Prediction(9, 1, "", ("yes",))],
            "only in theirs, the first to row 9",
        ),
        (
            lambda rows: [dataclasses.replace(row, prompt="Is it so? Or no?") for row in rows],
            r"wording 0 was asked otherwise: ours 'Is it so\?', theirs 'Is it so\? Or no\?'",
        ),
        (
            lambda rows: [dataclasses.replace(row, references=("maybe",)) for row in rows],
            "row 0 in wording 0 has other references",
        ),
    ],
)
def test_systems_that_answered_something_else_are_not_compared(change, message) -> None:  # type: ignore[no-untyped-def]
    rows = [dataclasses.replace(row, prompt="Is it so?") for row in labels(4, 0.5)]
    with pytest.raises(errors.DataError, match=message):
        scoring.compare(rows, change(rows), ["accuracy"])
    unknown = [dataclasses.replace(row, prompt=None) for row in rows]
    assert scoring.compare(rows, unknown, ["accuracy"], resamples=5)["accuracy"].value == 0


def test_texts_are_counted_once_for_all_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = sentences(9, 0.8, wordings=2), sentences(9, 0.5, seed=6, wordings=2)
    seen = []
    make = tables.make

    def making(metric: object, *rest: object) -> object:
        seen.append(metric)
        return make(metric, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(tables, "make", making)
    whole = scoring.score(ours, ["rouge", "rougeL"], resamples=5)
    assert list(whole) == ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    assert next(iter(scoring.score(ours, ["rougeL", "rouge"], resamples=5))) == "rougeL"
    scoring.compare(ours, theirs, ["rouge"], resamples=5)
    scoring.changes(ours, theirs, ["rouge"])
    scoring.by_wording(ours, ["rouge"])
    assert len(seen) == 3


# --- rows that changed ---


def test_rows_that_changed_are_found_both_ways_and_the_largest_first() -> None:
    golds = ["a cat sat on the mat", "a dog ran home", "no", "the old red house"]
    said = ["a cat sat on the mat", "a dog ran home", "no", "house"]
    before = ["nothing", "a dog ran", "no", "the old red house"]
    ours, theirs = (
        [Prediction(row, 0, text, (golds[row],)) for row, text in enumerate(texts)]
        for texts in (said, before)
    )
    key, found = scoring.changes(ours, theirs, ["rougeL", "accuracy"])
    assert key == "rougeL"
    assert [each.ours.row for each in found] == [0, 1, 3]
    assert [each.theirs.prediction for each in found] == [before[0], before[1], before[3]]
    assert found[0].gain == 1
    assert found[2].gain == pytest.approx(0.4 - 1)
    _, back = scoring.changes(ours, theirs, ["ter"])
    assert [each.ours.row for each in back] == [0, 1, 3], "less is better"
    _, labelled = scoring.changes(labels(6, 1.0), labels(6, 0.0), ["matthews_correlation"])
    assert [each.gain for each in labelled] == [1] * 6


def test_metrics_that_score_no_single_answer_are_passed_over_for_changes() -> None:
    path = own("share", '{"share": predictions.count("yes") / len(predictions)}')
    ours, theirs = labels(4, 1.0), labels(4, 0.0)
    assert scoring.changes(ours, theirs, [path]) == ("", [])
    assert scoring.changes(ours, theirs, [path, "accuracy"])[0] == "accuracy"


# --- wordings ---


def test_each_wording_has_its_own_values() -> None:
    rows = [
        Prediction(row, wording, "yes" if row >= wording else "no", ("yes",))
        for row in range(4)
        for wording in range(3)
    ]
    found = scoring.by_wording(rows, ["accuracy", "exact_match"])
    assert [each["accuracy"] for each in found] == [1.0, 0.75, 0.5]
    assert all(each["accuracy"] == each["exact_match"] for each in found)


@pytest.mark.parametrize("name", metrics.names())
def test_values_of_a_wording_are_those_of_its_rows_alone(name: str) -> None:
    rows = sentences(12, 0.7, wordings=2)
    parts = [[row for row in rows if row.wording == wording] for wording in range(2)]
    alone = [scoring.score(part, [name], resamples=1) for part in parts]
    assert scoring.by_wording(rows, [name]) == [
        {key: pytest.approx(each.value, abs=1e-12) for key, each in found.items()}
        for found in alone
    ]


# --- what is refused ---


def test_what_cannot_be_scored_is_a_fault_of_the_user() -> None:
    rows = labels(3, 1.0)
    with pytest.raises(errors.UserError, match="there are no rows"):
        scoring.score([], ["f1"])
    with pytest.raises(errors.DataError, match="row 2 in wording 0 is there twice"):
        scoring.score([*rows, rows[2]], ["f1"])
    with pytest.raises(errors.UserError, match="Did you mean 'bleu'"):
        scoring.score(rows, ["f1", "blue"])
    with pytest.raises(errors.UserError, match=r"confidence: is 95\."):
        scoring.score(rows, ["f1"], confidence=95)
    with pytest.raises(errors.UserError, match="resamples: is 0"):
        scoring.compare(rows, rows, ["f1"], resamples=0)


# --- the user's own metrics ---


def test_a_users_value_is_computed_anew_for_each_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    path = own(
        "agree", '{"agree": sum(map(str.__eq__, predictions, references)) / len(references)}'
    )
    monkeypatch.setattr(tables.Recomputed, "most", 40)
    ours, theirs = labels(40, 0.9, wordings=2), labels(40, 0.4, seed=5, wordings=2)
    found = scoring.score(ours, [path, "accuracy"])
    assert found["agree"].value == pytest.approx(found["accuracy"].value)
    assert found["agree"].low < found["agree"].value < found["agree"].high
    assert found["agree"].signature.startswith("agree.py|evaluate:")
    both = scoring.compare(ours, theirs, [path, "accuracy"], resamples=40)
    assert dataclasses.astuple(both["agree"]) == pytest.approx(
        dataclasses.astuple(both["accuracy"])
    )
    assert [each["agree"] for each in scoring.by_wording(ours, [path])] == [
        pytest.approx(each["accuracy"]) for each in scoring.by_wording(ours, ["accuracy"])
    ]


def test_a_users_list_of_one_number_a_row_is_a_mean() -> None:
    path = own("each", '{"each": [float(a == b) for a, b in zip(predictions, references)]}')
    rows = labels(40, 0.7)
    found = scoring.score(rows, [path, "accuracy"])
    assert dataclasses.astuple(found["each"])[:3] == dataclasses.astuple(found["accuracy"])[:3]


def test_a_users_value_may_not_hide_behind_another() -> None:
    path = own("mine", '{"f1": 1.0}')
    with pytest.raises(errors.UserError, match="its value 'f1' has the name of another"):
        scoring.score(labels(4, 1.0), ["f1", path])
    assert Path(path).exists()


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ('{"score": float("nan")}', r"undefined\.py: its value 'score' is nan, no finite number"),
        ('{"score": float("inf")}', r"its value 'score' is inf, no finite"),
        ('{"score": [1.0, float("nan"), 0.0, 1.0]}', r"'score' is nan in row 1, no finite"),
    ],
)
def test_a_users_value_that_is_no_number_is_refused(result: str, message: str) -> None:
    path = own("undefined", result)
    with pytest.raises(errors.UserError, match=message):
        scoring.score(labels(4, 1.0), [path])
    with pytest.raises(errors.UserError, match=message):
        scoring.compare(labels(4, 1.0), labels(4, 0.0), [path])


def test_draws_on_which_a_users_value_is_undefined_are_counted() -> None:
    """A share among the answers "no": some draws of four rows hold none."""
    share = 'sum(p == r for p, r in zip(predictions, references) if p == "no")'
    path = own(
        "among", f'{{"among": {share} / n if (n := predictions.count("no")) else float("nan")}}'
    )
    found = scoring.score(labels(4, 1.0), [path], resamples=100)["among"]
    missing = int(found.signature.partition("|undefined:")[2].partition(" of 100 draws")[0])
    assert 1 <= missing <= 25
    assert found.value == 1


def test_the_interval_of_f1_over_many_classes_of_few_rows_holds_it() -> None:
    random = np.random.default_rng(0)

    def answers(n_rows: int) -> tuple[Any, Any]:
        gold = random.integers(0, 77, n_rows)
        return gold, np.where(random.random(n_rows) < 0.7, gold, random.integers(0, 77, n_rows))

    gold, said = answers(200_000)
    truth = sklearn.metrics.f1_score(gold, said, average="macro")
    held = 0
    for _ in range(40):
        rows = [
            scoring.Prediction(row, 0, str(text), (str(right),))
            for row, (right, text) in enumerate(zip(*answers(400), strict=True))
        ]
        found = scoring.score(rows, ["f1"], resamples=200)["f1"]
        held += found.low <= truth <= found.high
    assert held >= 36, "32 of 40 where corrected percentiles are taken of draws of one end"
