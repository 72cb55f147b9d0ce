"""ROUGE, by rouge_score, 0 to 1."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import logging
import re
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from rouge_score import rouge_scorer, tokenizers

from itune import errors
from itune.metrics import sufficient, words

# rougeLsum takes each line for a sentence; Chinese and Japanese are seldom written in lines.
SENTENCE_END = re.compile("(?<=[\u3002\uff01\uff1f])")


class Words(tokenizers.Tokenizer):  # type: ignore[misc, unused-ignore]
    """rouge_score's tokenizer for text of any script; on English the same as its default."""

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return words.words(text)


class ChineseWords(tokenizers.Tokenizer):  # type: ignore[misc, unused-ignore]
    """Cuts Chinese into words of a dictionary, by jieba; what is no letter or digit is left out."""

    def __init__(self) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its patterns warn on newer Pythons
                self.jieba = importlib.import_module("jieba")
        except ImportError as error:
            raise errors.UserError(
                "metric rouge:jieba: the package jieba is not installed. pip install 'itune[zh]', "
                "or ask for rouge, which counts characters."
            ) from error
        self.jieba.setLogLevel(logging.WARNING)

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        found = self.jieba.lcut(text.lower())
        return [word for word in found if any(letter.isalnum() for letter in word)]


class Rouge(sufficient.MeanMetric):
    """ROUGE-1, -2, -L and -Lsum (Lin 2004): the mean over rows of rouge_score's F, 0 to 1.

    A row with several references counts its best one, for each kind by itself. No stemming. The
    plain mean: no random bootstrap as in the script of `evaluate`'s hub. Where any reference holds
    a letter beyond a-z these are letters too, and each character of a script without spaces is a
    word; otherwise rouge_score's default tokenizer is used. With `cut="jieba"` Chinese is cut into
    words instead, as papers about Chinese do. The signature says which.
    """

    keys: ClassVar[tuple[str, ...]] = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    tokenizer: str = "default"

    def __init__(self, cut: str = "", **options: Any) -> None:
        super().__init__(**options)
        self.chinese = ChineseWords() if cut else None
        if cut:
            self.keys = tuple(f"{key}:{cut}" for key in self.keys)  # type: ignore[misc]

    def scores(
        self, predictions: Sequence[str], references: sufficient.References
    ) -> sufficient.Array:
        wide = any(map(words.beyond_english, itertools.chain.from_iterable(references)))
        self.tokenizer = "default+unicode" if wide else "default"
        if self.chinese is not None:
            self.tokenizer = f"jieba-{self.chinese.jieba.__version__}"
        self.signature = self.signature_of("rouge" if len(self.keys) > 1 else self.keys[0])
        kinds, cutter = type(self).keys, self.chinese or (Words() if wide else None)
        scorer = rouge_scorer.RougeScorer(list(kinds), tokenizer=cutter)
        rows = np.zeros((len(predictions), len(kinds)))
        for row, (text, answers) in enumerate(zip(predictions, references, strict=True)):
            if cutter is not None:
                text, answers = _lines(text), [_lines(each) for each in answers]
            best = scorer.score_multi(answers, text)
            rows[row] = [best[kind].fmeasure for kind in kinds]
        return rows

    def signature_of(self, key: str) -> str:
        version = importlib.metadata.version("rouge_score")
        return f"{key.partition(':')[0]}|stem:no|tok:{self.tokenizer}|rouge_score:{version}"


class Rouge1(Rouge):
    """ROUGE-1: see `Rouge`."""

    keys = ("rouge1",)


class Rouge2(Rouge):
    """ROUGE-2: see `Rouge`."""

    keys = ("rouge2",)


class RougeL(Rouge):
    """ROUGE-L: see `Rouge`."""

    keys = ("rougeL",)


class RougeLsum(Rouge):
    """ROUGE-Lsum, each line of a text a sentence: see `Rouge`."""

    keys = ("rougeLsum",)


def _lines(text: str) -> str:
    """The text with a line for each sentence, where the script has full stops of its own."""
    return SENTENCE_END.sub("\n", text)
