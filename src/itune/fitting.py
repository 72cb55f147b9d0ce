"""What is longer than it may be is cut: the prompt, its longest column, at the template's side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from itune import encoding, formats

T = TypeVar("T")
Row = Mapping[str, Any]


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

    longest = max(
        (_supervised(encoder, (*whole.prompt[-1:], _answer(each))) for each in reading.choices),
        default=0,
    )

    def size(tokens: encoding.Tokens) -> int:
        if encoder.even:
            return len(tokens.ids)
        answer = sum(tokens.supervised)
        rounded = min(1 << (answer - 1).bit_length(), limit // 2)
        return len(tokens.ids) - answer + max(answer, longest or rounded)

    return _shortened(reading, row, wording, encoder, limit, encode, size)


def _answer(text: str) -> formats.Message:
    return formats.Message("assistant", text)


def _supervised(encoder: encoding.Encoder, messages: tuple[formats.Message, ...]) -> int:
    return sum(encoder.conversation(messages, train_on="last").supervised)


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
    spans = encoder.tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )["offset_mapping"]
    kept = len(spans)
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
