"""BLEU, by sacrebleu, 0 to 100."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

from sacrebleu.metrics.bleu import BLEU

from itune import errors
from itune.metrics import sacre, sufficient, words

TOKENIZERS: dict[words.Script, str] = {
    "spaced": "13a",
    "han": "zh",
    "kana": "ja-mecab",
    "hangul": "ko-mecab",
    "unspaced": "char",
}
LANGUAGES = {"ja-mecab": ("Japanese", "ja"), "ko-mecab": ("Korean", "ko")}


class Bleu(sacre.SacreMetric):
    """Corpus BLEU (Papineni et al. 2002) as sacrebleu computes it (Post 2018), 0 to 100.

    The tokenizer is sacrebleu's 13a; zh, ja-mecab or ko-mecab where most references are Chinese,
    Japanese or Korean; char for other scripts without spaces. `cut` decides instead: one of
    `metrics.BLEU_WORDS`. The signature names it.
    """

    keys: ClassVar[tuple[str, ...]] = ("bleu",)

    def __init__(self, cut: str = "", **options: Any) -> None:
        self.cut = f"{cut}-mecab" if cut in ("ja", "ko") else cut
        super().__init__(**options)
        if cut:
            self.keys = (f"bleu:{cut}",)  # type: ignore[misc]

    def configured(self, script: words.Script) -> BLEU:
        tokenizer = self.cut or TOKENIZERS[script]
        try:
            # force: sacrebleu need not warn about texts that look tokenized.
            return BLEU(tokenize=tokenizer, force=True)
        except RuntimeError as error:
            if tokenizer not in LANGUAGES:
                raise
            language, extra = LANGUAGES[tokenizer]
            asked = "asked for" if self.cut else "the references are"
            raise errors.UserError(
                f"metric bleu: {asked} {language}, which sacrebleu cuts into words by a dictionary "
                f"that is not installed. pip install 'sacrebleu[{extra}]', or ask for bleu:char."
            ) from error

    def script(self, references: sufficient.References) -> words.Script:
        return words.script(list(itertools.chain.from_iterable(references)))
