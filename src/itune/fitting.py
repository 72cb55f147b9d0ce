"""What is longer than it may be is cut: the prompt, its longest column, at the template's side."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from itune import encoding, formats

T = TypeVar("T")
Row = Mapping[str, Any]
WINDOW = 16  # chosen: characters a token that are looked at first; a token of prose has about four


# --- what is far too long is not tokenized whole --------------------------------------------------


def _near(encoder: encoding.Encoder, text: str, limit: int, *, left: bool = False) -> str:
    """The part of a text that may come to stand within `limit` tokens, with as many to spare."""
    size = WINDOW * limit
    while size < len(text):
        part = text[-size:] if left else text[:size]
        if len(encoder.texts.ids([part])[0]) >= 2 * limit:
            return part
        size *= 4
    return text


def near_row(row: Row, reading: formats.Reading, encoder: encoding.Encoder, limit: int) -> Row:
    """The row without what is far beyond `limit` tokens of a prompt's column; itself otherwise."""
    long = {
        name: _near(encoder, text, limit, left=reading.cuts_left)
        for name in reading.prompt_columns()
        if isinstance(text := row.get(name), str) and len(text) > WINDOW * limit
    }
    changed = {name: text for name, text in long.items() if len(text) < len(row[name])}
    return {**row, **changed} if changed else row


def near_chat(
    whole: formats.Example, encoder: encoding.Encoder, limit: int
) -> formats.Example | None:
    """The Example without the turns that are far beyond `limit` tokens; None where none is left.

    Earlier answers are not counted: a chat template may leave some of them out.
    """
    room = WINDOW * limit
    if sum(len(message.content) for message in whole.messages) <= room:
        return whole
    kept, asked = 0, 0
    for end, message in enumerate(whole.messages, 1):
        part = message.content[:room]
        here = len(encoder.texts.ids([part])[0]) if part else 0
        if asked + here >= 2 * limit:
            break
        if message.role == "assistant":
            kept = end
        else:
            asked += here
    if kept == len(whole.messages):
        return whole
    return replace(whole, messages=whole.messages[:kept]) if kept > 1 else None


def hopeless(answer: str, encoder: encoding.Encoder, limit: int) -> bool:
    """Whether an answer alone is far longer than `limit` tokens."""
    return len(answer) > WINDOW * limit and _near(encoder, answer, limit) != answer


# --- cutting -----------------------------------------------------------------------------------


def example(
    whole: formats.Example,
    reading: formats.Reading,
    row: Row,
    wording: int,
    encoder: encoding.Encoder,
    limit: int,
    train_on: str,
) -> encoding.Tokens | None:
    """The example within `limit` tokens, its answer whole; None when that cannot be.

    Where the prompt is cut must not tell the answer: a prompt that ends the earlier the longer its
    answer is would be read off by the model. So room is kept for the longest of the choices, or
    for a round number of tokens.
    """
    if reading.is_chat and not reading.prompt_columns():
        for end in range(len(whole.messages) - 1, 0, -1):
            if whole.messages[end - 1].role != "assistant":
                continue
            tokens = encoder.conversation(whole.messages[:end], train_on=train_on)
            if len(tokens.ids) <= limit:
                return tokens
        return None

    def encode(shorter: formats.Example) -> encoding.Tokens:
        return encoder.conversation(shorter.messages, train_on=train_on)

    def size(tokens: encoding.Tokens) -> int:
        if encoder.even:
            return len(tokens.ids)
        answer = sum(tokens.supervised)
        rounded = min(1 << (answer - 1).bit_length(), limit // 2)
        return len(tokens.ids) - answer + max(answer, _longest(encoder, reading.choices) or rounded)

    return _shortened(reading, row, wording, encoder, limit, encode, size)


@functools.lru_cache(maxsize=8)
def _longest(encoder: encoding.Encoder, choices: tuple[str, ...]) -> int:
    """Tokens that are learnt of the longest of the choices, whatever is asked; 0 without any."""
    asked = formats.Message("user", "?")
    talks = [(asked, formats.Message("assistant", choice)) for choice in choices]
    made = encoder.conversations(talks, train_on="last")
    return max((sum(tokens.supervised) for tokens in made), default=0)


@functools.lru_cache(maxsize=1)  # a row is cut in each of its wordings, one after the other
def _spans(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Where each token of a text begins and ends in it."""
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans: list[tuple[int, int]] = made["offset_mapping"]
    return spans


def prompt(
    whole: formats.Example,
    reading: formats.Reading,
    row: Row,
    wording: int,
    encoder: encoding.Encoder,
    limit: int,
) -> tuple[tuple[formats.Message, ...], list[int]] | None:
    """Messages and ids of the prompt within `limit` tokens; None when that cannot be.

    A conversation loses its oldest turns, its system message never.
    """
    if reading.is_chat and not reading.prompt_columns():
        system = tuple(m for m in whole.prompt[:1] if m.role == "system")
        for start in range(len(system) + 1, len(whole.prompt)):
            if whole.prompt[start].role != "user":
                continue
            later = (*system, *whole.prompt[start:])
            ids = encoder.prompt(later)
            if len(ids) <= limit:
                return later, ids
        return None

    def encode(shorter: formats.Example) -> tuple[tuple[formats.Message, ...], list[int]]:
        return shorter.prompt, encoder.prompt(shorter.prompt)

    return _shortened(reading, row, wording, encoder, limit, encode, lambda pair: len(pair[1]))


def _shortened(
    reading: formats.Reading,
    row: Row,
    wording: int,
    encoder: encoding.Encoder,
    limit: int,
    encode: Callable[[formats.Example], T],
    size: Callable[[T], int],
) -> T | None:
    """Encode with the row's longest prompt column cut at one side until `limit` is kept.

    The wording around it stays whole: the question, the choices and the end of the prompt are
    where the model needs them. None when the limit cannot be kept so.
    """
    texts = {
        name: value for name in reading.prompt_columns() if isinstance(value := row.get(name), str)
    }
    if not texts:
        return None
    column = max(texts, key=lambda name: len(texts[name]))
    text = texts[column]
    answer = reading.example(row, wording).messages[-1]
    spans = _spans(encoder.tokenizer, text)
    kept = min(len(spans), limit)  # more never fit: the wording takes room too
    while kept > 0:
        part = slice(spans[-kept][0], None) if reading.cuts_left else slice(spans[kept - 1][1])
        cut = {**row, column: text[part] if kept < len(spans) else text}
        shorter = reading.example(cut, wording)
        result = encode(shorter)
        excess = size(result) - limit
        if excess <= 0:
            return result if shorter.messages[-1] == answer else None
        kept -= max(excess, 1)
    return None
