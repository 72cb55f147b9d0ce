"""Few-shot prompts: solved examples from the training data as turns before the question.

Which rows are shown before a question follows from the seed and the question's row alone.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from itune import data, encoding, errors, formats, recipes, sources, templates
from itune.metrics import words

GRAM = 13  # words; what is as long in common is no coincidence (Brown et al. 2020, appendix C)
TRIES = 50  # chosen: rows looked at for each that is wanted


def add(
    tasks: Sequence[data.Task],
    recipe: recipes.Recipe,
    encoder: encoding.Encoder,
    count: int,
    *,
    max_prompt: int,
    say: Callable[[str], None],
) -> list[data.Task]:
    """The tasks with `count` solved rows of the training data before each question.

    A row that asks the same as the question, or shares 13 words in a row with it, is never shown.
    Where not all fit in `max_prompt` tokens the last ones are left out, which is said once.
    Raises DataError where the training data has no rows for a task, or not enough.
    """
    out, short = [], 0
    asking = [source for source in recipe.data.eval if not data.is_text(source)]
    for task, source in zip(tasks, asking, strict=True):
        # A case names its row by the number that it has in the whole source.
        whole = source.model_copy(update={"limit": None})
        pool, questions = _Pool(task, recipe), data.load(whole)
        asked: list[list[tuple[formats.Message, ...]]] = []
        for case in task.cases:
            shots = pool.drawn(case, questions[case.row], count, recipe.training.seed)
            asked.append([_before(case.messages, shots[:kept]) for kept in range(count, -1, -1)])
        cases, cut = _fitted(task, asked, encoder, max_prompt)
        short += cut
        out.append(dataclasses.replace(task, cases=tuple(cases)))
    if short:
        total = sum(len(task.cases) for task in tasks)
        say(f"shots: {short} of {total} prompts have fewer than {count}, as no more fit")
    return out


class _Pool:
    """The training rows of a task."""

    def __init__(self, task: data.Task, recipe: recipes.Recipe) -> None:
        self.template, self.where = task.template, task.name
        names = {
            str(source.template): templates.load(source.template)
            for source in recipe.data.train
            if source.template
        }
        fitting = [
            source
            for source in recipe.data.train
            if source.template and names[str(source.template)] == task.template
        ]
        if not fitting:
            raise errors.DataError(
                f"shots: no source of data.train has the template {task.template.name}, so there "
                "are no rows to show. Add one, or leave out --shots."
            )
        self.sources = [
            sources.read(source.model_copy(update={"streaming": False})) for source in fitting
        ]
        self.size = sum(len(rows.data) for rows in self.sources)

    def row(self, index: int) -> tuple[str, Mapping[str, Any]]:
        """(place for messages, row) of one of all rows together."""
        for rows in self.sources:
            if index < len(rows.data):
                return rows.place(index), rows.data[index]
            index -= len(rows.data)
        raise IndexError(index)

    def drawn(
        self, case: data.Case, question: Mapping[str, Any], count: int, seed: int
    ) -> list[tuple[formats.Message, ...]]:
        """The turns of so many rows, none of which overlaps the question."""
        draw = random.Random(f"shots:{seed}:{case.row}")
        found: list[tuple[formats.Message, ...]] = []
        asked, grams = case.messages[-1].content, _grams(_told(self.template, question))
        for index in _drawn_once(draw, self.size, count * TRIES):
            if len(found) == count:
                break
            where, row = self.row(index)
            if grams & _grams(_told(self.template, row)):
                continue
            try:
                example = formats.example(self.template, row, case.wording)
            except errors.UserError as error:
                raise errors.DataError(f"{where}: {error}") from error
            turns = tuple(turn for turn in example.messages if turn.role != "system")
            if any(turn.content == asked for turn in turns) or not example.references:
                continue
            found.append(turns)
        if len(found) < count:
            raise errors.DataError(
                f"shots: {self.where} row {case.row + 1}: {len(found)} of {count} rows found that "
                "do not overlap the question. Lower --shots, or add training rows."
            )
        return found


def _drawn_once(draw: random.Random, size: int, most: int) -> Iterator[int]:
    """Numbers below `size`, none twice; how many will be wanted does not change the first."""
    seen: set[int] = set()
    while len(seen) < min(size, most):
        index = draw.randrange(size)
        if index not in seen:
            seen.add(index)
            yield index


def _told(template: templates.Template, row: Mapping[str, Any]) -> str:
    """What a row itself says in a prompt, without the template's own words."""
    if template.task == "chat":
        return " \n ".join(message.content for message in formats.conversation(row).messages)
    return " \n ".join(_strings([row.get(name) for name in sorted(template.columns())]))


def _strings(value: Any) -> Iterator[str]:
    """All texts in a value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _strings(each)


@lru_cache(maxsize=4096)
def _grams(text: str) -> frozenset[int]:
    """All runs of 13 words, hashed."""
    told = words.words(text)
    return frozenset(hash(tuple(told[k : k + GRAM])) for k in range(len(told) - GRAM + 1))


def _before(
    question: Sequence[formats.Message], shots: Sequence[Sequence[formats.Message]]
) -> tuple[formats.Message, ...]:
    """The shots after the system message, before the question."""
    begin = 1 if question[0].role == "system" else 0
    return (*question[:begin], *(turn for shot in shots for turn in shot), *question[begin:])


def _fitted(
    task: data.Task,
    asked: Sequence[Sequence[tuple[formats.Message, ...]]],
    encoder: encoding.Encoder,
    max_prompt: int,
) -> tuple[list[data.Case], int]:
    """The cases with as many shots as fit, and how many have not all of them.

    asked: for each case its messages with all shots, with one fewer, ..., with none.
    """
    cases, cut = [], 0
    encoder = encoder.answering(task.template.choices)
    whole = encoder.conversations([options[0] for options in asked], prompt=True)
    for case, options, tokens in zip(task.cases, asked, whole, strict=True):
        messages, ids = options[0], tokens.ids
        for fewer in options[1:]:
            if len(ids) <= max_prompt:
                break
            messages, ids = fewer, encoder.prompt(fewer)
        cut += messages is not options[0]
        cases.append(dataclasses.replace(case, messages=messages, ids=tuple(ids)))
    return cases, cut
