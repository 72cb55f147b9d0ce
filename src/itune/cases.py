"""What is scored: the prompts of evaluation data, in every wording, with their gold answers."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itune import encoding, errors, fitting, formats, recipes, sources, tables, templates


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt to answer: a row in one wording, its prompt ids and its gold answers."""

    row: int
    wording: int
    messages: tuple[formats.Message, ...]
    ids: tuple[int, ...]
    references: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """The cases of one evaluation source, named by its template, or by its file without one."""

    name: str
    path: str
    template: templates.Template
    cases: tuple[Case, ...]
    truncated: int

    @property
    def rows(self) -> int:
        """How many rows there are, each asked in every wording."""
        return len({case.row for case in self.cases})

    @property
    def duplicated(self) -> int:
        """Rows that ask what an earlier one asks, and want the same: they are no new evidence."""
        first = min((case.wording for case in self.cases), default=0)
        asked = [(c.messages, c.references) for c in self.cases if c.wording == first]
        return len(asked) - len(set(asked))


def reading(rows: sources.Rows, command: str = "") -> formats.Reading:
    """How the rows of a source become Examples. Raises DataError."""
    source = rows.source
    try:
        found = formats.reading(
            source.template, source.format, _columns(rows), source.path, command
        )
    except errors.DataError as error:
        raise errors.DataError(f"{error}{_without_names(rows)}") from error
    if found.is_text and source.allow_control_tokens:
        raise errors.DataError(
            f"{source.path}: allow_control_tokens: its rows are plain text, which has no answers. "
            "Delete it."
        )
    return found


def _without_names(rows: sources.Rows) -> str:
    """A hint for the rows of a table whose first line is no names of columns, it seems."""
    return "" if rows.table is None else tables.without_names(list(rows.table.columns))


def _columns(rows: sources.Rows) -> list[str]:
    return list(rows.columns) if rows.source.template is None else []


def is_text(source: recipes.Source) -> bool:
    """Whether a source holds running text, which is measured by its perplexity."""
    return source.template is None and reading(sources.read(source)).is_text


def bound(encoder: encoding.Encoder, rows: sources.Rows, how: formats.Reading) -> encoding.Encoder:
    """The encoder, told of a source's choices and of the control tokens that its answers may hold.

    Raises DataError for one that they may not.
    """
    try:
        return encoder.answering(how.choices).allowing(rows.source.allow_control_tokens)
    except errors.DataError as error:
        raise errors.DataError(f"{rows.source.path}: {error}") from error


def placed(
    rows: sources.Rows, how: formats.Reading, index: int, row: Any, wording: int
) -> formats.Example:
    """The Example of a row. Raises DataError with the place, and how many rows are like it."""
    try:
        return checked(how.example(row, wording))
    except errors.UserError as error:
        text = f"{rows.place(index)}: {error}{getattr(error, 'cure', '')}"
        if getattr(error, "column", ""):
            text += _without_names(rows)
        if not rows.source.streaming:
            text += _alike(rows, how, wording, index)
        raise errors.DataError(text) from error


def checked(example: formats.Example) -> formats.Example:
    """The Example, if no text of it holds a NUL, which no text has and many readers end at."""
    for text in (example.text or "", *(message.content for message in example.messages)):
        if "\0" in text:
            near = errors.shown(text[max(0, text.index("\0") - 15) :][:30])
            raise errors.DataError(
                f"the character U+0000 (NUL) in {near}. Take it out: text has none."
            )
    return example


# Signs that show a text in another order than it has, so in another than the model reads:
# https://www.unicode.org/reports/tr9/, embeddings, overrides and isolates.
TURNING = re.compile("[\u202a-\u202e\u2066-\u2069]")


def turned(text: str) -> str | None:
    """The first sign of a text that shows it in another order, as U+202E; None without one."""
    found = None if text.isascii() else TURNING.search(text)
    return found and f"U+{ord(found[0]):04X}"


# chosen: little, as the command fails anyway; a template that never ends takes seconds for each.
MOST_COUNTED = 50_000
MOST_NAMED = 4
SECONDS = 2.0


def _alike(rows: sources.Rows, how: formats.Reading, wording: int, first: int) -> str:
    """How many rows cannot be read either, of all or of those that there is time to look at."""
    ends, broken, looked = time.monotonic() + SECONDS, 0, 0
    others: list[int] = []
    for index in range(min(len(rows.data), MOST_COUNTED)):
        try:
            checked(how.example(rows.data[index], wording))
        except errors.UserError:
            broken += 1
            if index != first and len(others) < MOST_NAMED:
                others.append(index)
        looked = index + 1
        if time.monotonic() > ends:
            break
    rest = " looked at" if looked < len(rows.data) else ""
    if not broken:
        return ""
    name = f"{rows.source.path}:"
    also = ", ".join(rows.place(index).removeprefix(name) for index in others)
    more = f": also {also}{', ...' * (broken > len(others) + 1)}" if others else ""
    return f" {broken:,} such row{'s' * (broken > 1)} of {looked:,}{rest}{more}."


def tasks(
    asked: Sequence[recipes.Source],
    encoder: encoding.Encoder,
    *,
    max_prompt: int,
    limit: int | None = None,
) -> list[Task]:
    """The prompts of each evaluation source that has answers, in every wording.

    `max_prompt`: tokens a prompt may have; a longer one is shortened as in training.
    Raises DataError when a row is broken or a prompt cannot be made to fit.
    """
    out: list[Task] = []
    for source in asked:
        least = [each for each in (limit, source.limit) if each is not None]
        given = source.model_copy(update={"limit": min(least, default=None), "streaming": False})
        rows = sources.read(given)
        how = reading(rows)
        if how.is_text:
            continue
        name = how.task.name if how.template else Path(source.path).stem
        name = unused(name, source, {task.name for task in out})
        cases, truncated = _cases(rows, how, encoder, max_prompt)
        out.append(Task(name, source.path, how.task, tuple(cases), truncated))
    return out


def unused(name: str, source: recipes.Source, taken: Collection[str]) -> str:
    """A name for what is measured of a source, that no other one has."""
    path = Path(source.path)
    which = [path.stem, f"{path.parent.name}-{path.stem}"]
    which += [f"{path.stem}-{each}" for each in (source.name, source.split) if each]
    several = (f"{path.stem}-{number}" for number in itertools.count(2))
    made = (f"{name}:{each}" for each in itertools.chain(which, several))
    return next(each for each in itertools.chain([name], made) if each not in taken)


def _cases(
    rows: sources.Rows, how: formats.Reading, encoder: encoding.Encoder, max_prompt: int
) -> tuple[list[Case], int]:
    jobs = []
    encoder = bound(encoder, rows, how)
    for index, row in enumerate(rows.data):
        for wording in range(how.wordings):
            near = fitting.near_row(row, how, encoder, max_prompt)
            example = placed(rows, how, index, near, wording)
            if not example.references:
                raise errors.DataError(
                    f"{rows.place(index)}: the conversation does not end with the "
                    "assistant's answer, so there is nothing to score against. Take the row out "
                    "of data.eval; training may keep such rows."
                )
            jobs.append((index, wording, near, example))
    encoded = encoder.conversations([example.prompt for *_, example in jobs], prompt=True)
    cases, truncated = [], 0
    for (index, wording, row, example), tokens in zip(jobs, encoded, strict=True):
        messages, ids = example.prompt, tokens.ids
        if len(ids) > max_prompt:
            shorter = fitting.prompt(example, how, row, wording, encoder, max_prompt)
            if shorter is None:
                raise errors.DataError(
                    f"{rows.place(index)}: the prompt has {len(ids)} tokens, at most "
                    f"{max_prompt} fit beside the answer. Raise training.max_length, lower "
                    "generation.max_new_tokens, or take the row out."
                )
            (messages, ids), truncated = shorter, truncated + 1
        cases.append(Case(rows.number(index), wording, messages, tuple(ids), example.references))
    return cases, truncated
