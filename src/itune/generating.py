"""`itune generate`: one answer a prompt, in their order, or a talk; and where answers are written.

Everything heavy is imported when it is needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from itune import (
    commands,
    console,
    engines,
    errors,
    files,
    launchers,
    launching,
    prompting,
    runs,
    sharing,
    storage,
)

if TYPE_CHECKING:
    from itune import explaining, speaking


def generate(
    common: commands.Common, asked: prompting.Asked, arguments: Sequence[str] = ()
) -> None:
    """`itune generate`: one answer a prompt, in their order; or a talk."""
    fields, decide = _settings(common.sets)
    asked = dataclasses.replace(asked, decide=decide)
    prompting.check(asked, common.output)
    if asked.chat and max(common.processes or 1, launchers.started()) > 1:
        raise errors.OptionError(
            "--chat: in several processes? One talks. Leave --processes and the launcher out."
        )
    if engines.asked(asked.engine, common.processes) is None:
        launching.ensure(common.processes, arguments)
    with sharing.joined():
        _generate(common, asked, fields)


def _generate(common: commands.Common, asked: prompting.Asked, fields: Mapping[str, Any]) -> None:
    screen = common.screen()
    if asked.chat:
        if common.json:
            raise errors.OptionError("--chat: with --json? Keep one; /save FILE writes JSON.")
        from itune import chatting, speaking

        commands.still()
        chatting.Chat(speaking.loaded(asked, fields, screen.say), screen, asked.system).run()
        return
    if asked.input is not None and files.kind(asked.input) not in (None, ".jsonl"):
        commands.still()  # a library reads it, with a bar of its own
    conversations = sharing.of_first(lambda: prompting.conversations(asked))
    path = None if asked.input is None else common.output
    if path is None:
        _missing(common, asked, fields, conversations, [""] * len(conversations), 0)
        return
    from itune import speaking

    with contextlib.ExitStack() as held:
        sharing.of_first(lambda: held.enter_context(prompting.alone(path)))
        prompts = [each.prompt for each in conversations]
        marks = sharing.of_first(lambda: speaking.marks(asked, fields, conversations))
        finished = sharing.of_first(lambda: prompting.answered(path, prompts, marks))
        _missing(common, asked, fields, conversations, marks, finished)


def _missing(
    common: commands.Common,
    asked: prompting.Asked,
    fields: Mapping[str, Any],
    conversations: Sequence[prompting.Conversation],
    marks: Sequence[str],
    finished: int,
) -> None:
    """Answer all that is asked but the first `finished`, which are answered already."""
    screen = common.screen()
    if finished:
        screen.say(f"{common.output}: {finished} of {len(conversations)} are answered already")
    waiting = conversations[finished:]
    if waiting:
        _answer(common, asked, fields, waiting, marks[finished:], finished)
    if common.output is not None:
        many = f"{len(waiting)} answer{'s' * (len(waiting) != 1)}"
        screen.say(f"{many} written to {common.output}")


def _answer(
    common: commands.Common,
    asked: prompting.Asked,
    fields: Mapping[str, Any],
    waiting: Sequence[prompting.Conversation],
    marks: Sequence[str],
    finished: int,
) -> None:
    from itune import shades, speaking

    commands.still()
    screen = common.screen()
    speaker = sharing.first_before_others(lambda: speaking.loaded(asked, fields, screen.say))
    prompts = speaker.read(waiting, screen.say)
    if speaker.choices:
        _pick(common, speaker, waiting, marks, prompts)
        return
    alone = len(waiting) == 1
    streams = alone and common.output is None and not common.json and sys.stdout.isatty()
    heard = speaking.Heard(speaker.encoder, screen.part) if streams else None
    told: list[tuple[str, Any]] = []
    with screen.counting(len(waiting) if common.output is not None else 0) as done:
        answers = speaker.answers(
            prompts, finished, told=heard.told if heard else None, done=done, say=screen.say
        )
        asking = zip(waiting, marks, prompts, answers, strict=True)
        for each, mark, read, completion in asking:
            if sharing.rank() > 0:
                continue
            if heard is not None:
                heard.end()
                screen.part("\n")
            found = None
            if asked.explain:
                found = speaker.explained(read.ids, completion, drivers=alone)
            if prompting.paged(asked, common.output):
                told.append((each.prompt, found))
            else:
                answer = {
                    "response": completion.text,
                    "stop": completion.stop,
                    "tokens": completion.tokens,
                }
                if found is not None:
                    answer["explained"] = found.plain()
                _tell(common, screen, _line(each, answer, mark), found, heard=heard, alone=alone)
    if common.output is not None and told:
        storage.write(common.output, shades.page(told, speaker.name))


def _pick(
    common: commands.Common,
    speaker: speaking.Speaker,
    waiting: Sequence[prompting.Conversation],
    marks: Sequence[str],
    prompts: Sequence[speaking.Read],
) -> None:
    """Answer each prompt with one of the template's choices, and say how likely each was."""
    screen = common.screen()
    with screen.counting(len(waiting) if common.output is not None else 0) as done:
        picks = speaker.picks(prompts, done=done, say=screen.say)
        for each, mark, found in zip(waiting, marks, picks, strict=True):
            if sharing.rank() == 0:
                answer = {"response": found.text, "chances": found.chances}
                line = _line(each, answer, mark)
                _tell(common, screen, line, None, heard=None, alone=len(waiting) == 1)


def _line(asked: prompting.Conversation, answer: Mapping[str, Any], mark: str) -> dict[str, Any]:
    """An answer as JSON has it, with the row that asked for it.

    A mark says to a later start by what it was made.
    """
    line = {"prompt": asked.prompt, **answer}
    if asked.row.keys() - {"prompt"}:
        # What JSON does not know, such as a time of Parquet's, is told as text.
        line["input"] = json.loads(json.dumps(dict(asked.row), default=str))
    return {**line, "asked": mark} if mark else line


def _tell(
    common: commands.Common,
    screen: console.Screen,
    answer: Mapping[str, Any],
    found: explaining.Explanation | None,
    *,
    heard: speaking.Heard | None,
    alone: bool,
) -> None:
    """Write an answer, and what explains it, where they belong."""
    from itune import shades

    if common.output is not None:
        with common.output.open("a", encoding="utf-8") as file:
            file.write(runs.to_json(answer) + "\n")
    elif common.json:
        commands.emit(common, answer)
    else:
        if heard is None:
            text = answer["response"]
            screen.result(text if alone else f"> {answer['prompt']}\n{text}\n")
        if found is not None:
            shades.show(screen, found)


def _settings(sets: Sequence[str]) -> tuple[dict[str, Any], str | None]:
    """Fields of generation, and how a choice is decided upon where that is given (--set)."""
    from itune import recipes, yamls

    fields: dict[str, Any] = {}
    decide = None
    for item in sets:
        key, sign, value = item.partition("=")
        section, _, name = key.partition(".")
        given = yamls.parse_value(value, f"--set {item}", errors.OptionError) if sign else None
        if sign and key == "evaluation.decide":
            known = get_args(recipes.Evaluation.model_fields["decide"].annotation)
            if given not in known:
                raise errors.OptionError(
                    f"--set {item}: unknown way to decide.{errors.nearest(str(given), known)}"
                )
            decide = given
        elif sign and section == "generation" and name:
            fields[name] = given
        else:
            raise errors.OptionError(
                f"--set {item}: itune generate takes generation.FIELD=VALUE, and "
                "evaluation.decide=HOW where a template has choices."
            )
    return fields, decide
