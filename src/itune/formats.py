"""Rows of a data set, whatever their columns, become Examples: messages, or plain text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from itune import errors, templates

# What published conversations call a role, and the name that chat templates know it by.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
THOUGHT = ("reasoning_content", "reasoning", "thinking")

# The keys of a turn: of `messages`, and of ShareGPT's `conversations`.
CONTENT = ("role", "content")
SHAREGPT = ("from", "value")


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


def is_blank(row: Mapping[str, Any]) -> bool:
    """Whether a row of running text is an empty line, which is passed over."""
    text = row.get("text")
    return isinstance(text, str) and not text.strip()


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
    turns, names = row.get("messages"), CONTENT
    if turns is None:
        turns, names = row.get("conversations"), SHAREGPT
    if isinstance(turns, str):
        turns = _listed(turns)
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise errors.DataError(
            f"expected a list in column 'messages' or 'conversations', found {_shown(turns)} "
            f"(the row has {_columns(row)}). Rename the column with data.train.rename."
        )
    messages = tuple(_message(turn, names, number) for number, turn in enumerate(turns, 1))
    messages = (*system_of(row, messages), *messages)
    if answered and not any(message.role == "assistant" for message in messages):
        raise errors.DataError(
            "no assistant's turn: there is nothing to learn from this conversation. "
            "Take the row out, or check the roles."
        )
    last = messages[-1]
    return Example(
        messages=messages, references=(last.content,) if last.role == "assistant" else ()
    )


def _listed(text: str) -> Any:
    """A list that a table holds as the text of its JSON; anything else as it is."""
    try:
        return json.loads(text) if text.lstrip().startswith("[") else text
    except (ValueError, RecursionError):
        return text


def system_of(row: Mapping[str, Any], messages: Sequence[Message] = ()) -> tuple[Message, ...]:
    """The system message of a row's own column, where it has one. Raises DataError."""
    if row.get("tools") not in (None, "", [], "[]"):
        raise errors.DataError(
            "column 'tools': describes tools, and no model here is told of any. Write them into a "
            "system message as text, or give the column another name with rename."
        )
    if row.get("system") is None:
        return ()
    text = _text(row, "system", empty=True)
    if not text.strip():
        return ()
    if messages and messages[0].role == "system":
        raise errors.DataError(
            "column 'system': the conversation begins with a system message too. Keep one."
        )
    return (Message("system", text),)


def _message(turn: Any, names: tuple[str, str], number: int) -> Message:
    other = SHAREGPT if names == CONTENT else CONTENT
    if isinstance(turn, Mapping) and not set(names) & set(turn) and set(other) <= set(turn):
        names = other  # either column is met with either pair of keys
    role_name, content_name = names
    if not isinstance(turn, Mapping) or role_name not in turn or content_name not in turn:
        raise errors.DataError(
            f"turn {number}: expected '{role_name}' and '{content_name}', found {_shown(turn)}."
        )
    role, content = turn[role_name], turn[content_name]
    if turn.get("tool_calls") and content is not None:
        raise errors.DataError(
            f"turn {number}: calls tools, and text alone is read. Write the call into "
            f"'{content_name}' as text, or take the row out."
        )
    for key in THOUGHT:
        if turn.get(key):
            raise errors.DataError(
                f"turn {number}: has {key!r}, and '{content_name}' alone is learnt. Write it there "
                "as the model does (such as <think>...</think> before the answer), or take it out."
            )
    if turn.get("weight") == 0:
        raise errors.DataError(
            f"turn {number}: has weight 0, and every turn of the assistant is learnt, or the last "
            "alone (training.train_on). Take the row out, or the key."
        )
    if role not in ROLES:
        raise errors.DataError(
            f"turn {number}: unknown role {role!r}.{errors.nearest(str(role), ROLES)}"
        )
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_part(each, number, k) for k, each in enumerate(content, 1))
    if not isinstance(content, str):
        call = content is None and bool(turn.get("tool_calls"))
        what = "a call of a tool without any" if call else _shown(content)
        raise errors.DataError(
            f"turn {number}: expected a text in '{content_name}', found {what}. "
            f"{'Write the call there as text' if call else 'Write one'}, or take the row out."
        )
    return Message(ROLES[role], content)


def _part(part: Any, number: int, k: int) -> str:
    """The text of one part of a content, as chat templates read parts: one after the other."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind in ("text", None) and isinstance(text, str):
        return text
    if isinstance(kind, str) and kind != "text":
        raise errors.DataError(
            f"turn {number}, part {k}: {errors.inert(kind)!r}, and text alone is read. Take the "
            "row out, or write what it shows as text."
        )
    raise errors.DataError(f"turn {number}, part {k}: expected a text, found {_shown(part)}.")


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


def alpaca(row: Mapping[str, Any]) -> Example:
    """A row of Alpaca's shape: instruction, an input that may be empty or absent, output.

    And `system`, and `history`, pairs of earlier prompts and answers. Raises DataError.
    """
    instruction, given, output = (
        _text(row, name, empty=name == "input") for name in ("instruction", "input", "output")
    )
    prompt = f"{instruction}\n\n{given}" if given.strip() else instruction
    said = (*system_of(row), *_history(row), Message("user", prompt), Message("assistant", output))
    return Example(said, references=(output,))


def _history(row: Mapping[str, Any]) -> list[Message]:
    pairs = row.get("history")
    pairs = (_listed(pairs) or []) if isinstance(pairs, str) else pairs or []
    out: list[Message] = []
    for pair in pairs if isinstance(pairs, Sequence) else [pairs]:
        two = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
        if not two or not all(isinstance(each, str) for each in pair):
            raise errors.DataError(
                f"column 'history': expected pairs of a prompt and its answer, found "
                f"{_shown(pair)}. Mend or take out the row."
            )
        out += [Message("user", pair[0]), Message("assistant", pair[1])]
    return out


def _text(row: Mapping[str, Any], name: str, *, empty: bool = False) -> str:
    value = row.get(name)
    if empty and value is None:
        return ""
    if not isinstance(value, str) or not (empty or value.strip()):
        raise errors.DataError(
            f"column {name!r}: expected a text, found {_shown(value)}. Mend or take out the row."
        )
    return value


def prompt_completion(row: Mapping[str, Any]) -> Example:
    """A row of prompt and completion: two texts, or two lists of messages (role, content)."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if row.get("label") is False:
        raise errors.DataError(
            "column 'label': false, as rows for KTO mark an answer that is not wanted, and every "
            "answer is learnt here. Take such rows out."
        )
    if isinstance(prompt, str) or isinstance(completion, str):
        asked, answer = _text(row, "prompt"), _text(row, "completion")
        said = (*system_of(row), Message("user", asked), Message("assistant", answer))
        return Example(said, references=(answer,))
    before, after = (
        conversation({"messages": each}, answered=False).messages for each in (prompt, completion)
    )
    if len(after) != 1 or after[0].role != "assistant":
        raise errors.DataError(
            f"column 'completion': expected one message of the assistant, found "
            f"{', '.join(each.role for each in after)}. Write such rows as 'messages'."
        )
    said = (*system_of(row, before), *before, *after)
    return Example(said, references=(after[0].content,))


# --- which format a row has ---------------------------------------------------------------

NEEDED = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
READ = {  # the columns that a format reads where they are there
    "messages": ("system",),
    "conversations": ("system",),
    "alpaca": ("input", "system", "history"),
    "prompt_completion": ("system",),
    "text": (),
}
TOLD = {
    "messages": "conversations (column messages)",
    "conversations": "conversations (column conversations)",
    "alpaca": "instructions (columns instruction, input, output)",
    "prompt_completion": "prompts and completions (columns prompt, completion)",
    "text": "plain text (column text)",
}


@dataclass(frozen=True)
class Reading:
    """How the rows of a source become Examples: by a template, or by a format's name."""

    template: templates.Template | None
    format: str | None = None
    unread: tuple[str, ...] = field(default=(), repr=False)
    """Columns that a format leaves out."""

    @property
    def wordings(self) -> int:
        """How many ways there are to say a row."""
        return max(1, len(self.template.prompts)) if self.template else 1

    @property
    def choices(self) -> tuple[str, ...]:
        """The answers that may be given, where a template names them."""
        return tuple(self.template.choices) if self.template else ()

    @property
    def cuts_left(self) -> bool:
        """Whether a text that does not fit loses its beginning."""
        return self.template is not None and self.template.truncation_side == "left"

    @property
    def is_text(self) -> bool:
        """Whether rows are running text, which has no prompt and no answer."""
        return self.template is None and self.format == "text"

    @property
    def is_chat(self) -> bool:
        """Whether rows hold messages that stand for themselves."""
        return self.format in FORMATS if self.template is None else self.template.task == "chat"

    @property
    def task(self) -> templates.Template:
        """The template, or one that stands for a format when its answers are scored."""
        return self.template or templates.Template(name=str(self.format), task="chat")

    @property
    def told(self) -> str | None:
        """What the columns were taken for; None where a template says it."""
        if self.template:
            return None
        left = f"; not read: {', '.join(self.unread)}" if self.unread else ""
        return f"{TOLD[str(self.format)]}{left}"

    def train_on(self, wanted: str) -> str:
        """Which answers are learnt: of a prompt and completion, the completion alone."""
        return "last" if self.format == "prompt_completion" else wanted

    def columns(self) -> set[str]:
        """The columns whose texts say what a row is about."""
        return self.prompt_columns() if self.template is None else self.template.columns()

    def prompt_columns(self) -> set[str]:
        """The columns whose texts may be cut to make a row fit."""
        if self.template is not None:
            return self.template.prompt_columns()
        return {"alpaca": {"instruction", "input"}, "prompt_completion": {"prompt"}}.get(
            str(self.format), set()
        )

    def example(self, row: Mapping[str, Any], wording: int = 0) -> Example:
        """The Example of a row in one wording. Raises DataError."""
        if self.template is not None:
            return templated(self.template, row, wording)
        return FORMATS[str(self.format)](row)


FORMATS: dict[str, Callable[[Mapping[str, Any]], Example]] = {
    "messages": lambda row: conversation({**row, "conversations": None}),
    "conversations": lambda row: conversation({**row, "messages": None}),
    "alpaca": alpaca,
    "prompt_completion": prompt_completion,
    "text": plain_text,
}


def reading(
    template: str | None, format_: str | None, columns: Sequence[str], where: str, command: str
) -> Reading:
    """How to read rows with these columns: by the template or format named, or as they look.

    `command`: tune wants prompts and answers, pretrain takes text too; "" takes what there is.
    Raises DataError where the columns fit no format, or more than one.
    """
    if template is not None:
        if format_ is not None:
            raise errors.DataError(f"{where}: both template and format are given. Keep one.")
        return Reading(templates.load(template))
    found = [name for name, needed in NEEDED.items() if set(needed) <= set(columns)]
    if len(found) > 1 and "text" in found and command != "pretrain":
        found.remove("text")
    if format_ is not None:
        missing = sorted(set(NEEDED[format_]) - set(columns))
        if missing:
            raise errors.DataError(
                f"{where}: format {format_}: no column {missing[0]!r}."
                f"{errors.nearest(missing[0], columns)}"
            )
        found = [format_]
    if len(found) > 1:
        raise errors.DataError(
            f"{where}: the columns can be read as {' or as '.join(TOLD[each] for each in found)}. "
            f"Choose with format: {' or format: '.join(found)}, or name a template."
        )
    if not found:
        raise errors.DataError(
            f"{where}: nothing says what is prompt and what is answer in its columns "
            f"({', '.join(sorted(columns)) or 'none'}). Name a template, or rename columns to one "
            "of: messages; conversations; instruction and output; prompt and completion"
            f"{'' if command == 'tune' else '; text'}."
        )
    if found == ["text"] and command == "tune":
        raise errors.DataError(
            f"{where}: its rows are plain text, so nothing says what is prompt and what is answer. "
            "Name a template that splits them, or use itune pretrain."
        )
    read = (*NEEDED[found[0]], *READ[found[0]])
    return Reading(None, found[0], tuple(sorted(set(columns) - set(read))))


def _columns(row: Mapping[str, Any]) -> str:
    return ", ".join(sorted(row)) or "no columns"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
