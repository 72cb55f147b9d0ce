"""Rows of a data set, whatever their columns, become Examples: messages, or plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from itune import errors, templates

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """What a row says once its columns are understood.

    Either `messages` (the last one is the answer where the row has one) or `text` is set.
    `references` are the gold answers that a prediction is scored against.
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    references: tuple[str, ...] = field(default=())

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the answer."""
        return self.messages[:-1]


def plain_text(row: Mapping[str, Any]) -> Example:
    """A row of running text, in its column `text`. Raises DataError when there is none."""
    text = row.get("text")
    if not isinstance(text, str) or not text.strip():
        raise errors.DataError(
            f"column 'text': expected a text, found {_shown(text)} (the row has {_columns(row)}). "
            "Name the column with data.train.rename, or give the source a template."
        )
    return Example(text=text)


def conversation(row: Mapping[str, Any], *, answered: bool = True) -> Example:
    """A row of `messages` (role, content) or ShareGPT's `conversations` (from, value).

    `answered`: at least one turn must be the assistant's. The references are the last message
    where it is the assistant's. Raises DataError.
    """
    turns = row.get("messages")
    names = ("role", "content")
    if turns is None:
        turns, names = row.get("conversations"), ("from", "value")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise errors.DataError(
            f"expected a list in column 'messages' or 'conversations', found {_shown(turns)} "
            f"(the row has {_columns(row)}). Rename the column with data.train.rename."
        )
    messages = tuple(_message(turn, names, number) for number, turn in enumerate(turns, 1))
    if answered and not any(message.role == "assistant" for message in messages):
        raise errors.DataError(
            "no assistant's turn: there is nothing to learn from this conversation. "
            "Take the row out, or check the roles."
        )
    last = messages[-1]
    return Example(
        messages=messages, references=(last.content,) if last.role == "assistant" else ()
    )


def _message(turn: Any, names: tuple[str, str], number: int) -> Message:
    role_name, content_name = names
    if not isinstance(turn, Mapping) or role_name not in turn or content_name not in turn:
        raise errors.DataError(
            f"turn {number}: expected '{role_name}' and '{content_name}', found {_shown(turn)}."
        )
    role, content = turn[role_name], turn[content_name]
    if role not in ROLES:
        raise errors.DataError(
            f"turn {number}: unknown role {role!r}.{errors.nearest(str(role), ROLES)}"
        )
    if not isinstance(content, str):
        raise errors.DataError(f"turn {number}: expected a text, found {_shown(content)}.")
    return Message(ROLES[role], content)


def templated(template: templates.Template, row: Mapping[str, Any], wording: int) -> Example:
    """A row rendered by a template in one of its wordings. Raises TemplateError or DataError."""
    if template.task == "chat":
        return conversation(row)
    system = (Message("system", template.system),) if template.system else ()
    return Example(
        messages=(
            *system,
            Message("user", template.prompt(row, wording)),
            Message("assistant", template.answer(row)),
        ),
        references=tuple(template.gold(row)),
    )


def example(template: templates.Template | None, row: Mapping[str, Any], wording: int) -> Example:
    """The Example of a row: by its template, or plain text where it has none."""
    return plain_text(row) if template is None else templated(template, row, wording)


def _columns(row: Mapping[str, Any]) -> str:
    return ", ".join(sorted(row)) or "no columns"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
