"""Texts of models and data as a page may show them: nothing hidden, cut to size, compared."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

MOST = 1500  # chosen: characters shown of one text; a page of 20 samples stays below 1 MB
# Words; a character of a script without spaces is one.
WORDS = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u9fff\uf900-\ufaff]|\w+|\s+|.")
NAMES = 200  # chosen: characters of a name in a card
JOINERS = "\u200c\u200d"  # within words of Persian and Hindi, and within pictures


class Part(NamedTuple):
    """A stretch of a text, and whether it is marked as different."""

    text: str
    marked: bool


def visible(text: str) -> str:
    """The text with everything that is not to be seen spelt out: controls, marks of direction.

    Lines, tabs and all kinds of spaces stay.
    """
    return "".join(each if seen(each) else ascii(each)[1:-1] for each in text)


def seen(each: str) -> bool:
    """Whether a character is one that a reader sees, or a space, or joins those beside it."""
    return (
        each.isprintable()
        or each in "\n\t"
        or each in JOINERS
        or unicodedata.category(each) == "Zs"
    )


def cut(text: str, most: int = MOST) -> str:
    """The start of a text, made visible, and how long it is in all where that is not all."""
    if len(text) <= most:
        return visible(text)
    return f"{visible(text[:most])} \u2026 ({len(text):,} characters in all)"


def marked(text: str, references: Sequence[str], most: int = MOST) -> list[Part]:
    """The start of a text, in parts: those words are marked that its nearest reference has not."""
    words = WORDS.findall(text[:most])
    found = [_shared(words, WORDS.findall(each[:most])) for each in references]
    kept = max(found, key=sum, default=[True] * len(words))
    parts: list[Part] = []
    for word, same in zip(words, kept, strict=True):
        aside = not same
        if parts and parts[-1].marked == aside:
            parts[-1] = Part(parts[-1].text + word, aside)
        else:
            parts.append(Part(word, aside))
    parts = [Part(visible(each.text), each.marked and not each.text.isspace()) for each in parts]
    if len(text) > most:
        parts.append(Part(f" \u2026 ({len(text):,} characters in all)", False))
    return parts


def _shared(words: Sequence[str], others: Sequence[str]) -> list[bool]:
    """Of each word whether the other text has it in the same order."""
    kept = [False] * len(words)
    matcher = difflib.SequenceMatcher(None, words, others, autojunk=False)
    for start, _, size in matcher.get_matching_blocks():
        kept[start : start + size] = [True] * size
    return kept


# --- in Markdown --------------------------------------------------------------------------


def code(text: object) -> str:
    """A text as code within a line or the cell of a table."""
    shown = " ".join(cut(str(text), NAMES).split()) or " "  # two signs alone would be no code
    return f"`{shown.replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def plain(text: object) -> str:
    """A text as it is, with all that Markdown or HTML would take for their own escaped."""
    shown = " ".join(cut(str(text), NAMES).split())
    return re.sub(r"([\\`*_{}\[\]()<>#+!|&~-])", r"\\\1", shown)


def fence(text: str) -> str:
    """A fence that no line of a text ends."""
    longest = max((len(found) for found in re.findall("`+", text)), default=0)
    return "`" * max(3, longest + 1)
