"""Words of any script: which ones have no spaces between words, and how to cut a text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

# Letters of scripts that put no spaces between words: kana, Han, Thai, Lao, Burmese, Khmer. Ranges
# of the Unicode standard's Blocks.txt; what in them is no letter, digit or mark is no word either.
KANA = "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"
HAN = "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
UNSPACED = re.compile(f"[{KANA}{HAN}\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
ENGLISH = re.compile("[a-z0-9]+")


class _Spaces(dict[int, str]):
    """For `str.translate`: letters, digits, marks stay, unspaced ones apart; all else a space."""

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        if not letter.isalnum() and not unicodedata.category(letter).startswith("M"):
            kept = " "
        else:
            kept = f" {letter} " if UNSPACED.match(letter) else letter
        self[code] = kept
        return kept


SPACES = _Spaces()


def beyond_english(text: str) -> bool:
    """Whether the text holds a letter that is not one of a-z; a dash or a curly quote is none."""
    if text.isascii():
        return False
    composed = unicodedata.normalize("NFC", text)  # an e and its accent are one letter, not two
    return any(letter > "\x7f" and letter.isalpha() for letter in composed)


def unspaced(text: str) -> bool:
    """Whether the text holds a character of a script without spaces between words."""
    return not text.isascii() and UNSPACED.search(text) is not None


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation.

    English: runs of a-z and 0-9, as rouge_score's own tokenizer. In a text with other letters these
    are letters too (rouge_score cuts words at each of them), and an unspaced one is a word.
    """
    if not beyond_english(text):
        return ENGLISH.findall(text.lower())
    return unicodedata.normalize("NFC", text.lower()).translate(SPACES).split()


def script(texts: Sequence[str]) -> Literal["spaced", "han", "unspaced"]:
    """How most words of the texts are written: with spaces, in Chinese characters, or neither.

    Japanese is "unspaced", as soon as a tenth (chosen) of its unspaced characters are kana.
    """
    text = "\n".join(each for each in texts if not each.isascii())
    single = len(UNSPACED.findall(text))
    if single == 0:
        return "spaced"
    others = sum(len(words(each)) for each in texts) - single
    if single < others:
        return "spaced"
    han = len(re.findall(f"[{HAN}]", text))
    return "han" if han >= 0.9 * single else "unspaced"
