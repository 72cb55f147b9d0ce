"""The tree of errors a user can meet, their exit codes, and how a message hints and quotes.

    ItuneError               1   itune's own fault; the traceback is kept
    ├─ UserError             2   the user's input is wrong: nothing was started, nothing is lost
    │  ├─ RecipeError            a recipe, or a `--set` on top of it
    │  ├─ TemplateError          a prompt template
    │  ├─ DataError              rows, columns, files of data
    │  ├─ ModelError             a model's folder or hub repository
    │  ├─ OptionError            the command line
    │  └─ RunError               a run's folder
    ├─ EnvironmentRefusal    3   no room, no device, hub unreachable, folder locked
    ├─ Diverged              4   the loss is no longer finite
    └─ Interrupted          75   stopped with a checkpoint: run the same command again

A UserError reads `place: what is wrong, with the value. What to do.`, one line for each fault.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from typing import ClassVar

LONGEST_VALUE = 60  # chosen: a value longer than this hides the sentence around it
MOST_NAMES = 20
SECRET_NAME = re.compile(r"(TOKEN|API_KEY|SECRET|PASSWORD|PASSWD|ACCESS_KEY|CREDENTIALS?)$")
SHORTEST_SECRET = 8  # chosen: a shorter value is found in ordinary words

# Values that are credentials whatever their key: Hugging Face, OpenAI-like, GitHub, GitLab, AWS,
# Slack, JSON web tokens, private keys, passwords inside URLs. `hf_` also starts ordinary words
# (hf_transfer), so a short one must hold a digit or a capital.
SECRET = re.compile(
    r"\bhf_(?=[A-Za-z]*[0-9A-Z])[A-Za-z0-9]{8,}|\bhf_[A-Za-z0-9]{20,}|\bapi_org_[A-Za-z0-9]{16,}"
    r"|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"
    r"|\bAKIA[0-9A-Z]{16}\b|\bxox[abprs]-[\w-]{10,}|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|(?<=://)[^/\s:@]*:[^/\s:@]+(?=@)"
)


class ItuneError(Exception):
    """The root of the tree; raised as itself only for faults of itune's own."""

    exit_code: ClassVar[int] = 1


class UserError(ItuneError):
    """The user's input is wrong; nothing was started and nothing is lost."""

    exit_code: ClassVar[int] = 2


class RecipeError(UserError):
    """A recipe, or a `--set` on top of it, cannot be used; one line a fault."""


class TemplateError(UserError):
    """A prompt template cannot be used."""


class DataError(UserError):
    """A file, row or column of data is not what was expected.

    Of a row that lacks a column: its name, and the line of a recipe that mends it.
    """

    column: str = ""
    cure: str = ""


class ModelError(UserError):
    """A model's folder or repository cannot be used."""


class OptionError(UserError):
    """Options of the command line are unknown or contradict each other."""


class RunError(UserError):
    """A run's folder is missing, foreign, damaged, or was made by another recipe."""


class EnvironmentRefusal(ItuneError):
    """The machine or the network refuses: no room, no device, no hub, a locked folder."""

    exit_code: ClassVar[int] = 3


class Diverged(ItuneError):
    """The loss or a gradient is no longer finite."""

    exit_code: ClassVar[int] = 4


class Interrupted(ItuneError):
    """Stopped by a signal after a checkpoint; the same command continues."""

    exit_code: ClassVar[int] = 75


EXIT_CODES = tuple(
    kind.exit_code for kind in (UserError, EnvironmentRefusal, Diverged, Interrupted)
)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint to follow a sentence: ` Did you mean 'x'?`, else ` Known: a, b, c.`, else nothing."""
    names = sorted(set(known))
    by_folded = {each.casefold().replace("-", "_"): each for each in names}
    close = difflib.get_close_matches(name.casefold().replace("-", "_"), by_folded, n=1, cutoff=0.7)
    if close:
        return f" Did you mean {by_folded[close[0]]!r}?"
    if not names:
        return ""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f" Known: {', '.join(names[:MOST_NAMES])}{more}."


def refuse_unknown(
    section: str,
    given: Iterable[str],
    known: Iterable[str],
    owner: str,
    kind: type[UserError] = RecipeError,
) -> None:
    """Raise `kind` for the first key of a section that the library's object has no field for."""
    names = set(known)
    unknown = sorted(set(given) - names)
    if unknown:
        hint = nearest(unknown[0], names)
        raise kind(f"{section}.{unknown[0]}: {owner} has no such field.{hint}")


def masked(text: str) -> str:
    """The text with every credential in it replaced: by its form, or as the environment has it."""
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, "[secret]")
    return SECRET.sub("[secret]", text)


def inert(text: str) -> str:
    """Text that can neither drive a terminal nor break a line: the unprintable is escaped."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def shown(value: object) -> str:
    """A value as a message quotes it: short, on one line, inert, without credentials."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return f"a mapping of {len(value)} keys" if len(value) != 1 else "a mapping of 1 key"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    text = inert(masked(repr(value) if isinstance(value, str) else str(value)))
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def one_line(error: BaseException) -> str:
    """An error's text as one sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith(".") else f"{text}."
