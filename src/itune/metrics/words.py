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
HANGUL = re.compile("[\uac00-\ud7a3]+")  # runs of syllables: words, nearly
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


Script = Literal["spaced", "han", "kana", "hangul", "unspaced"]


def script(texts: Sequence[str]) -> Script:
    """How most words of the texts are written.

    With spaces between them, in Korean or else; or without: in Chinese, Japanese, or another such
    script. It is Japanese as soon as a tenth (chosen) of the unspaced characters are kana.
    """
    text = "\n".join(each for each in texts if not each.isascii())
    single = len(UNSPACED.findall(text))
    hangul = len(HANGUL.findall(text))
    if single == 0 and hangul == 0:
        return "spaced"
    others = sum(len(words(each)) for each in texts) - single
    if single < others:
        return "hangul" if 2 * hangul > others else "spaced"
    han, kana = (len(re.findall(f"[{letters}]", text)) for letters in (HAN, KANA))
    if han >= 0.9 * single:
        return "han"
    return "kana" if 2 * (han + kana) >= single else "unspaced"
