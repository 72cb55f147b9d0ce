"""What the chat template wrote and what the data did; which control strings data may write."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from itune import errors, formats

Messages = Sequence[formats.Message]
Part = tuple[formats.Message | None, str]

# Two private-use characters around a number stand for a message's content, so that what the
# chat template itself writes can be told from what the data wrote.
PLACE = re.compile("\ue000(\\d+)\ue001")


def placed(messages: Messages) -> list[formats.Message]:
    """The messages with a mark in the place of each content."""
    return [
        replace(m, content=f"\ue000{i}\ue001") if m.content.strip() else m
        for i, m in enumerate(messages)
    ]


# What a template may do to a text before it writes it.
_CHANGES: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    lambda text: text.strip(),
    lambda text: text.lstrip(),
    lambda text: text.rstrip(),
)


def aligned(marked: str, text: str, messages: Messages) -> list[Part]:
    """The parts of a rendered text, each with the message that it is of; None: the template's own.

    `marked`: the same text with marks, see `placed`. Raises DataError where that cannot be told
    for certain: a text that repeats what the template writes around it, in a template that also
    changes texts.
    """
    parts = PLACE.split(marked)
    owners = [messages[int(part)] if k % 2 else None for k, part in enumerate(parts)]
    for mine, others in itertools.product(_CHANGES, _CHANGES):
        filled = [
            part
            if owner is None
            else (mine if owner.role == "assistant" else others)(owner.content)
            for owner, part in zip(owners, parts, strict=True)
        ]
        if "".join(filled) == text:
            return list(zip(owners, filled, strict=True))
    first, last = (
        re.fullmatch(gap.join(f"({re.escape(part)})" for part in parts[::2]), text, re.DOTALL)
        for gap in ("(.*?)", "(.*)")
    )
    if first is None or last is None or first.groups() != last.groups():
        raise errors.DataError(
            "the text holds control strings of the model and its chat template rewrites "
            "texts, so they cannot be kept apart. Take the row out."
        )
    return list(zip(owners, first.groups(), strict=True))


def lost(said: str, text: str) -> bool:
    """Whether a template wrote less of a text than it says, whatever it did to the space in it."""
    return said.strip() not in text and "".join(said.split()) not in "".join(text.split())


class Veil:
    """Messages whose control strings are hidden from the chat template, which could otherwise take
    a text apart at them; each is one character that no text has."""

    def __init__(self, messages: Messages, strings: Iterable[str]) -> None:
        whole = "".join(message.content for message in messages)
        free = (sign for sign in map(chr, range(0xE100, 0xF8FF)) if sign not in whole)
        found = sorted((each for each in strings if each in whole), key=len, reverse=True)
        self._signs = dict(zip(found, free, strict=False))
        self._strings = {sign: each for each, sign in self._signs.items()}
        pattern = re.compile("|".join(map(re.escape, found)) or "(?!)")
        self.messages = [
            replace(m, content=pattern.sub(lambda hit: self._signs[hit[0]], m.content))
            for m in messages
        ]

    def lifted(self, parts: Sequence[Part]) -> list[Part]:
        """The parts with their control strings."""
        table = str.maketrans(self._strings)
        return [(owner, text if owner is None else text.translate(table)) for owner, text in parts]


# --- control strings that answers may hold -------------------------------------------------------


class Allowed:
    """Control tokens that answers may hold, `ids` by their strings; none, if it is empty."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self.ids = dict(ids)
        self.known = frozenset(self.ids.values())
        longest = sorted(self.ids, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest))})") if ids else None

    def __bool__(self) -> bool:
        return bool(self.ids)

    def others(self, ids: Iterable[int]) -> list[int]:
        """The ids without those that are allowed."""
        return [id_ for id_ in ids if id_ not in self.known]

    def split(self, text: str) -> list[str]:
        """A text cut before and after each allowed string."""
        return [part for part in self._pattern.split(text) if part] if self._pattern else [text]

    def learnt(self, answer: str, ids: Sequence[int]) -> int:
        """How many allowed strings of an answer have become tokens among its ids."""
        return sum(min(answer.count(text), ids.count(id_)) for text, id_ in self.ids.items())

    def missed(self, text: str, ids: Sequence[int]) -> bool:
        """Whether a tokenizer read an allowed string otherwise, as one may beside a space."""
        return any(text.count(each) != ids.count(id_) for each, id_ in self.ids.items())

    def opened(self, before: str) -> str:
        """The allowed string that a prompt ends with, as <think>; empty where it ends with none."""
        return next((text for text in self.ids if before.rstrip().endswith(text)), "")

    def continued(self, answer: str, before: str) -> str:
        """What is left of an answer to say where its prompt opens it already."""
        opened, begun = self.opened(before), answer.lstrip()
        if not opened or not begun.startswith(opened):
            return answer
        rest = begun[len(opened) :]
        return rest if before.endswith(opened) else rest.lstrip()


def allowed(names: Sequence[str], tokenizer: Any, taken: Mapping[int, str]) -> Allowed:
    """The tokens of these names. `taken`: ids that no answer may hold, and what each of them does.

    Raises DataError for a name that is no added token of the tokenizer, or one that is taken.
    """
    known = {str(token): id_ for id_, token in tokenizer.added_tokens_decoder.items()}
    for name in names:
        if name not in known:
            raise errors.DataError(
                f"allow_control_tokens: {name!r} is no added token of the tokenizer."
                f"{errors.nearest(name, known)}"
            )
        if known[name] in taken:
            raise errors.DataError(
                f"allow_control_tokens: {name!r} {taken[known[name]]}, so no text may hold it. "
                "Take it off the list."
            )
    return Allowed({name: known[name] for name in names})


def to_allow(texts: Iterable[str]) -> str:
    """How to learn control strings that answers hold as tokens; nothing where there are none."""
    found = list(dict.fromkeys(texts))
    listed = errors.inert(", ".join(f"'{text}'" for text in found[:8]))
    advice = f". To learn them in answers as tokens, set allow_control_tokens: [{listed}]"
    return advice if found else ""
