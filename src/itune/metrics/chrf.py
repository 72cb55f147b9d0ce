"""chrF, by sacrebleu, 0 to 100."""

from __future__ import annotations

from typing import ClassVar

from sacrebleu.metrics.chrf import CHRF

from itune.metrics import sacre, sufficient, words


class Chrf(sacre.SacreMetric):
    """Corpus chrF2 (Popović 2015) as sacrebleu computes it, 0 to 100; it needs no tokenizer."""

    keys: ClassVar[tuple[str, ...]] = ("chrf",)

    def configured(self, script: words.Script) -> CHRF:
        return CHRF()

    def script(self, references: sufficient.References) -> words.Script:
        return "spaced"
