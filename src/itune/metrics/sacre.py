"""The way of BLEU, chrF and TER: statistics, value and signature are sacrebleu's own."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from sacrebleu.metrics.base import Metric

from itune.metrics import sufficient, words


class SacreMetric(sufficient.SufficientMetric):
    """A metric of sacrebleu's, equal to its `corpus_score` to the last bit."""

    bounds: ClassVar[tuple[float, float] | None] = (0.0, 100.0)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.library = self.configured("spaced")

    @abc.abstractmethod
    def configured(self, script: words.Script) -> Metric:
        """sacrebleu's object for texts that are mostly written so (`words.script`)."""

    @abc.abstractmethod
    def script(self, references: sufficient.References) -> words.Script:
        """How the references are written, as far as this metric has to know."""

    def check_references(self, references: sufficient.References) -> None:
        self.configured(self.script(references))

    def count(
        self, predictions: Sequence[str], references: sufficient.References
    ) -> sufficient.Array:
        self.library = self.configured(self.script(references))
        # Its streams: all first references, all second ones, ...; None where a row has no more.
        streams: list[Any] = list(itertools.zip_longest(*references))
        counted = self.library._extract_corpus_statistics(list(predictions), streams)
        self.signature = str(self.library.get_signature())
        return np.asarray(counted, dtype=np.float64)

    def values(self, sums: sufficient.Array) -> dict[str, sufficient.Array]:
        rows = np.reshape(sums, (-1, np.shape(sums)[-1])).tolist()
        scores = [self.library._compute_score_from_stats(row).score for row in rows]
        return {self.keys[0]: np.reshape(np.asarray(scores), np.shape(sums)[:-1])}
