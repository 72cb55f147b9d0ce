"""What `itune generate` is asked: prompts from options, standard input and files; kept answers."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from itune import errors, files, runs, templates

if TYPE_CHECKING:
    from itune import formats


class Conversation(NamedTuple):
    """What is asked once: the prompt as shown, the messages, and where they stand.

    row: the columns that it was made of; how: by which template, where there is one.
    """

    prompt: str
    messages: list[formats.Message]
    where: str
    row: Mapping[str, Any] = {}
    how: formats.Reading | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be answered, and by which model."""

    prompts: tuple[str, ...] = ()
    run: Path | None = None
    model: str | None = None
    input: Path | None = None
    template: str | None = None
    fields: tuple[str, ...] = ()
    system: str | None = None
    chat: bool = False
    explain: bool = False
    engine: str | None = None
    seed: int | None = None
    """What draws follow from; the run's when left out."""
    decide: str | None = None
    """How one of a template's choices is picked (`evaluation.decide`); the run's when left out."""


def check(asked: Asked, output: Path | None) -> None:
    """Refuse options that contradict each other or could not be followed in the end."""
    if asked.run is not None and asked.model is not None:
        raise errors.OptionError("--run and --model: which one answers? Keep one.")
    if asked.input is not None and output is None:
        raise errors.OptionError("--input: where to? Name the file with --output FILE.")
    if asked.chat:
        _check_chat(asked, output)
    if asked.engine is not None and (asked.chat or asked.explain):
        name, why = ("--chat", "speaks") if asked.chat else ("--explain", "reads its model")
        raise errors.OptionError(
            f"--engine {asked.engine}: with {name}? That {why} token by token, in this process. "
            "Keep one."
        )
    if output is None:
        return
    if asked.input is not None and paged(asked, output):
        raise errors.OptionError(
            f"--output {output}: a page is of prompts on the command line. Name a file that ends "
            "in .jsonl, whose lines then hold what --explain finds."
        )
    if output.is_dir():
        raise errors.OptionError(f"--output {output}: a folder. Name a file.")
    if not output.absolute().parent.is_dir():
        raise errors.OptionError(f"--output {output}: there is no folder {output.parent}. Make it.")
    if asked.input is not None and asked.input.absolute() == output.absolute():
        raise errors.OptionError(f"--output {output}: is the input too. Name another file.")


def paged(asked: Asked, output: Path | None) -> bool:
    """Whether what is explained goes to a page."""
    return asked.explain and output is not None and output.suffix.lower() in (".html", ".htm")


def _check_chat(asked: Asked, output: Path | None) -> None:
    given = {
        "a prompt": asked.prompts,
        "--input": asked.input,
        "--output": output,
        "--template": asked.template,
        "--field": asked.fields,
        "--explain": asked.explain,
    }
    for name, value in given.items():
        if value:
            raise errors.OptionError(
                f"--chat: with {name}? Questions are typed, one a line, and /save FILE keeps the "
                f"talk. Leave {name} out."
            )


def conversations(asked: Asked) -> list[Conversation]:
    """Each thing that is asked, in order. Raises OptionError."""
    found = list(_conversations(asked))
    if not found:
        raise errors.OptionError(
            "no prompt. Give one or more on the command line, - for standard input, or rows of a "
            "file with --input FILE."
        )
    return found


def answered(path: Path, prompts: Sequence[str], marks: Sequence[str]) -> int:
    """How many of the prompts a file answers already; a line that a kill tore is taken out.

    marks: of each prompt, what decides its answer (`speaking.marks`). Raises OptionError for a
    file that holds anything else than such answers to these prompts: nothing of it is touched.
    """
    if not path.is_file():
        return 0
    *whole, torn = path.read_bytes().split(b"\n")
    for number, line in enumerate(whole, 1):
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        known = isinstance(found, dict) and "response" in found and number <= len(prompts)
        if not known or found.get("prompt") != prompts[number - 1]:
            raise errors.OptionError(
                f"--output {path}: line {number} is no answer to prompt {number}. "
                "Name another file, or take that one away."
            )
        if found.get("asked", marks[number - 1]) != marks[number - 1]:
            raise errors.OptionError(
                f"--output {path}: line {number} is an answer of another model, other settings or "
                "another talk. Name another file, or take that one away."
            )
    if torn and not torn.startswith(b'{"prompt": '[: len(torn)]):
        raise errors.OptionError(
            f"--output {path}: holds something else than answers. Name another file."
        )
    if torn:
        os.truncate(path, path.stat().st_size - len(torn))  # in place: it may be held, see `alone`
    return len(whole)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold a file of answers alone. Raises EnvironmentRefusal while another process does."""
    import fcntl

    made = not path.exists()
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise errors.EnvironmentRefusal(
                f"--output {path}: another process writes its answers there. Wait for it, or name "
                "another file."
            ) from error
        except OSError:  # where locks are unknown, nobody can be kept out
            yield
            return
        try:
            yield
        finally:
            if made and path.is_file() and path.stat().st_size == 0:
                path.unlink()


@contextlib.contextmanager
def located(where: str, kind: type[errors.UserError] = errors.DataError) -> Iterator[None]:
    """Have what is wrong with one thing that was asked say where it stands."""
    try:
        yield
    except errors.UserError as error:
        column = getattr(error, "column", "") if where == "--field" else ""
        cure = f" Write --field {column}=VALUE." if column else ""
        raise kind(f"{where}: {error}{cure}") from error


def _conversations(asked: Asked) -> Iterator[Conversation]:
    template = templates.load(asked.template) if asked.template else None
    if template is not None and template.task == "chat":  # its rows stand for themselves
        template = None
    from itune import formats

    how = formats.Reading(template.asking(asked.system)) if template is not None else None
    names_of = _renames(asked)
    if asked.fields:
        if template is None:
            raise errors.OptionError("--field: for which template? Name it with --template NAME.")
        row = _renamed(_fields(asked.fields), names_of)
        yield _asked(row, "--field", how, asked.system)
    for prompt in asked.prompts:
        text = _standard_input() if prompt == "-" else prompt
        names = ["prompt"] if template is None else sorted(template.asked_columns())
        if len(names) > 1:
            raise errors.OptionError(
                f"--template {asked.template}: asks for {', '.join(names)}. Give each of them with "
                "--field NAME=TEXT, or rows with --input."
            )
        yield _asked(dict.fromkeys(names, text), "prompt", how, asked.system)
    if asked.input is not None:
        for where, row in _rows(asked.input, asked.template):
            yield _asked(_renamed(row, names_of), where, how, asked.system)


def _renames(asked: Asked) -> dict[str, str]:
    """How the run that answers calls columns that its template knows by other names."""
    if asked.template is None or asked.model is not None:
        return {}
    recipe = (runs.find(asked.run) if asked.run is not None else runs.newest()).recipe
    every = [*recipe.data.train, *recipe.data.eval]
    return next((dict(each.rename) for each in every if each.template == asked.template), {})


def _renamed(row: Mapping[str, Any], names: Mapping[str, str]) -> Mapping[str, Any]:
    fresh = {new: row[old] for old, new in names.items() if old in row and new not in row}
    return {**{k: v for k, v in row.items() if names.get(k) not in fresh}, **fresh}


def _rows(path: Path, template: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where it stands, its columns) of each row of a file of any kind."""
    if not path.is_file() or files.kind(path) in (None, ".jsonl"):
        for number, given in files.objects(path):
            yield f"{path}:{number}", given
        return
    from itune import formats, recipes, sources

    rows = sources.read(recipes.Source(path=str(path), template=template))
    lines = files.kind(path) == ".txt" and template is None  # each of them is a prompt
    for index, row in enumerate(rows.each()):
        if not (lines and formats.is_blank(row)):
            yield rows.place(index), {"prompt": row["text"]} if lines else row


def _standard_input() -> str:
    try:
        return sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise errors.DataError(
            f"standard input: not UTF-8, byte 0x{error.object[error.start]:02x} at {error.start}. "
            "Convert it with iconv."
        ) from error


def _asked(
    row: Mapping[str, Any], where: str, how: formats.Reading | None, system: str | None
) -> Conversation:
    from itune import formats

    first = [formats.Message("system", system)] if system else []
    if "messages" in row and how is None:
        with located(where):
            turns = list(formats.conversation(row, answered=False).messages)
        own = turns[0].role == "system"  # a row's own goes before that of the command line
        messages = turns if own else [*first, *turns]
        return _readable(Conversation(turns[-1].content, messages, where, row))
    with located(where):
        if how is None:
            prompt, first = row.get("prompt"), [*formats.system_of(row)] or first
        else:
            first = list(how.example(row).prompt)
            prompt = first.pop().content
    if not isinstance(prompt, str) or not prompt.strip():
        cure = (
            "It is empty."
            if where == "prompt"
            else "A row needs `prompt`, `messages`, or --template with its fields."
        )
        raise errors.DataError(f"{where}: no prompt. {cure}")
    messages = [*first, formats.Message("user", prompt)]
    return _readable(Conversation(prompt, messages, where, row, how))


def _readable(asked: Conversation) -> Conversation:
    refuse_half_characters(asked.messages, asked.where)
    return asked


def refuse_half_characters(messages: Sequence[formats.Message], where: str) -> None:
    """Raise DataError for what is no text, and what no tokenizer takes, in messages."""
    for message in messages:
        try:
            message.content.encode()
        except UnicodeEncodeError as error:
            code = ord(message.content[error.start])
            # As Python keeps the bytes of a command line that are no text (PEP 383).
            byte = f"not UTF-8, byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else ""
            what = byte or f"half of a surrogate pair, U+{code:04X},"
            raise errors.DataError(
                f"{where}: {what} at {error.start}. Take it out: text has none."
            ) from error


def _fields(given: Sequence[str]) -> dict[str, str]:
    row = {}
    for item in given:
        key, sign, value = item.partition("=")
        if not sign or not key:
            raise errors.OptionError(f"--field {item}: expected key=value.")
        row[key] = value
    return row
