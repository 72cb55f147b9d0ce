"""Each metric equals its reference on whatever text Hypothesis finds, empty and odd ones too."""

# ruff: noqa: RUF001 - Chinese punctuation is meant.

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_metrics import loaded, streams, value

Rows = tuple[list[str], list[list[str]]]

PIECES = [
    *("", " ", "a", "the", "The cat", "cat", "sat", "mat.", "Mat", "3.5", "U.S.", "it's", "&amp;"),
    *("\n", "\t", "...", "—", "“q”", "naïve", "x" * 40, "A AN THE", "\u200d", "!"),
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=8).map(" ".join) | st.text(max_size=12)
LATIN = TEXTS.filter(lambda text: all(ord(letter) < 0x250 or letter in "—“”" for letter in text))
ALL = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)


def rows(texts: st.SearchStrategy[str], *, most: int = 3) -> st.SearchStrategy[Rows]:
    """Some predictions, and for each its references."""
    row = st.tuples(texts, st.lists(texts, min_size=1, max_size=most))
    return st.lists(row, min_size=1, max_size=5).map(
        lambda found: ([said for said, _ in found], [golds for _, golds in found])
    )


@pytest.mark.parametrize("name", ["bleu", "chrf", "ter"])
@given(found=rows(LATIN))
@ALL
def test_sacrebleu(name: str, found: Rows) -> None:
    import sacrebleu

    expected = getattr(sacrebleu, f"corpus_{name}")(found[0], streams(found[1])).score
    assert value(name, found) == expected


@given(found=rows(st.text("今天天气很好我们。，！GPU 2", max_size=10)))
@ALL
def test_sacrebleu_in_chinese(found: Rows) -> None:
    import sacrebleu

    expected = sacrebleu.corpus_bleu(found[0], streams(found[1]), tokenize="zh").score
    assert value("bleu:zh", found) == expected


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
@given(found=rows(st.text(string.printable, max_size=30)))
@ALL
def test_rouge_score(name: str, found: Rows) -> None:
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer([name])
    each = [
        scorer.score_multi(golds, said)[name].fmeasure for said, golds in zip(*found, strict=True)
    ]
    assert value(name, found) == pytest.approx(np.mean(each), abs=1e-12)


LABELS = st.lists(
    st.tuples(st.sampled_from("abcd?"), st.sampled_from("abcd")), min_size=1, max_size=20
)


@given(pairs=LABELS)
@ALL
def test_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    from sklearn import metrics

    said, gold = [one for one, _ in pairs], [other for _, other in pairs]
    found = said, [[each] for each in gold]
    near: dict[str, Any] = {"abs": 1e-12}
    assert value("accuracy", found) == pytest.approx(metrics.accuracy_score(gold, said), **near)
    macro = metrics.f1_score(gold, said, labels=sorted(set(gold)), average="macro", zero_division=0)
    assert value("f1", found) == pytest.approx(macro, **near)
    known = [each if each in gold else "?" for each in said]
    if len({*known, *gold}) > 1:  # scikit-learn warns of a single class
        expected = metrics.matthews_corrcoef(gold, known)
        assert value("matthews_correlation", found) == pytest.approx(expected, **near)


def normalized(text: str) -> str:
    """As the rules of SQuAD 1.1 say, in their order: lower case, punctuation, articles, spaces."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad_f1(said: str, gold: str) -> float:
    left, right = normalized(said).split(), normalized(gold).split()
    same = sum((Counter(left) & Counter(right)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(left), same / len(right)
    return 2 * precision * recall / (precision + recall)


@given(found=rows(LATIN))
@ALL
def test_squad(found: Rows) -> None:
    matched = [
        float(any(normalized(said) == normalized(gold) for gold in golds))
        for said, golds in zip(*found, strict=True)
    ]
    shared = [
        max(squad_f1(said, gold) for gold in golds) for said, golds in zip(*found, strict=True)
    ]
    assert value("squad_em", found) == pytest.approx(np.mean(matched), abs=1e-12)
    assert value("squad_f1", found) == pytest.approx(np.mean(shared), abs=1e-12)


@given(found=rows(TEXTS))
@ALL
def test_exact_match(found: Rows) -> None:
    expected = [
        said.strip() in [gold.strip() for gold in golds] for said, golds in zip(*found, strict=True)
    ]
    assert loaded("exact_match").statistics(*found)[:, 0].tolist() == expected
