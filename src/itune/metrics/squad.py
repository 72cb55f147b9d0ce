"""SQuAD's exact match and F1 of extracted answers, 0 to 1."""

from __future__ import annotations

import itertools
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from itune.metrics import sufficient, words

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# Of full width, or common beside Chinese and Japanese characters.
WIDE_PUNCTUATION = re.compile(
    "[\u3000-\u3004\u3008-\u303f\u30fb\uff00-\uff0f\uff1a-\uff20\uff3b-\uff40"
    "\uff5b-\uff65\u2018\u2019\u201c\u201d\u2026\u2014\u00b7]"
)


class Squad(sufficient.MeanMetric):
    """Exact match and F1 over words, as SQuAD 1.1 scores (Rajpurkar et al. 2016), 0 to 1.

    Both sides in lower case, without ASCII punctuation and the articles a, an, the; the best over
    the references; the mean over rows. Kept from the original: two answers of which nothing is left
    match exactly, yet share no word (exact match 1, F1 0). Where any reference is written without
    spaces between words, each character of such a script is a word; no other text is affected.
    """

    keys: ClassVar[tuple[str, ...]] = ("squad_em", "squad_f1")
    tokenizer: str = "default"

    def scores(
        self, predictions: Sequence[str], references: sufficient.References
    ) -> sufficient.Array:
        apart = any(map(words.unspaced, itertools.chain.from_iterable(references)))
        self.tokenizer = "default+characters" if apart else "default"
        self.signature = self.signature_of("squad" if len(self.keys) > 1 else self.keys[0])
        rows = np.zeros((len(predictions), len(self.keys)))
        for row, (text, answers) in enumerate(zip(predictions, references, strict=True)):
            answer = tokens(text, apart=apart)
            golds = [tokens(each, apart=apart) for each in answers]
            best = {
                "squad_em": max(float(answer == gold) for gold in golds),
                "squad_f1": max(overlap(answer, gold) for gold in golds),
            }
            rows[row] = [best[key] for key in self.keys]
        return rows

    def signature_of(self, key: str) -> str:
        return f"{key}|squad:1.1|tok:{self.tokenizer}"


class SquadEm(Squad):
    """Exact match of SQuAD 1.1: see `Squad`."""

    keys = ("squad_em",)


class SquadF1(Squad):
    """F1 over words of SQuAD 1.1: see `Squad`."""

    keys = ("squad_f1",)


def tokens(text: str, *, apart: bool) -> list[str]:
    """The words that SQuAD compares; apart: each character of a script without spaces is one."""
    text = ARTICLES.sub(" ", text.lower().translate(PUNCTUATION))
    if apart and words.unspaced(text):
        text = words.UNSPACED.sub(r" \g<0> ", WIDE_PUNCTUATION.sub(" ", text))
    return text.split()


def overlap(answer: Sequence[str], gold: Sequence[str]) -> float:
    """F1 of the words of two answers, repeated ones counted; 0 where none is shared."""
    shared = sum((Counter(answer) & Counter(gold)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(answer), shared / len(gold)
    return 2 * precision * recall / (precision + recall)
