"""TER, by sacrebleu, from 0 upwards; less is better."""

from __future__ import annotations

import itertools
from typing import ClassVar

from sacrebleu.metrics.ter import TER

from itune.metrics import sacre, sufficient, words


class Ter(sacre.SacreMetric):
    """Translation edit rate (Snover et al. 2006) as sacrebleu computes it; **less is better**.

    100 = as many edits as the references have words; there is no greatest value. Where most
    references are written without spaces it counts characters (sacrebleu's normalized,
    asian_support). The signature says so.
    """

    keys: ClassVar[tuple[str, ...]] = ("ter",)
    bounds: ClassVar[tuple[float, float] | None] = None
    unseen: ClassVar[tuple[float, float] | None] = (0.0, 100.0)
    less_is_better: ClassVar[bool] = True

    def configured(self, script: words.Script) -> TER:
        spaced = script in ("spaced", "hangul")
        return TER(normalized=not spaced, asian_support=not spaced)

    def script(self, references: sufficient.References) -> words.Script:
        return words.script(list(itertools.chain.from_iterable(references)))
