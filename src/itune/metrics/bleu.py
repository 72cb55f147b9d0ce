"""BLEU, by sacrebleu, 0 to 100."""

from __future__ import annotations

import itertools
from typing import ClassVar

from sacrebleu.metrics.bleu import BLEU

from itune.metrics import sacre, sufficient, words

# Japanese deserves ja-mecab, which needs a package more; characters need nothing.
TOKENIZERS = {"spaced": "13a", "han": "zh", "unspaced": "char"}


class Bleu(sacre.SacreMetric):
    """Corpus BLEU (Papineni et al. 2002) as sacrebleu computes it (Post 2018), 0 to 100.

    The tokenizer is sacrebleu's 13a; zh where most references are Chinese; char for other scripts
    without spaces. The signature names it.
    """

    keys: ClassVar[tuple[str, ...]] = ("bleu",)

    def configured(self, script: str) -> BLEU:
        # force: sacrebleu need not warn about texts that look tokenized.
        return BLEU(tokenize=TOKENIZERS[script], force=True)

    def script(self, references: sufficient.References) -> str:
        return words.script(list(itertools.chain.from_iterable(references)))
