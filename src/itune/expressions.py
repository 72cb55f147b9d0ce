"""What an expression of a prompt template may give: a text or a number of the row, or a refusal.

Jinja writes the word None for an empty cell, and takes 0 for a text that is no number: a model
would learn both. So what `{{ }}` refuses is refused within filters and `~` too.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import jinja2.filters

from itune import errors, sandbox

# Filters that are there to look at what may be nothing.
FOR_NOTHING = ("default", "d", "tojson")
# Filters that make a text of whatever they are given: of a list, what Python writes for it.
OF_TEXT = (
    *("capitalize", "e", "escape", "forceescape", "indent", "lower", "replace", "safe", "string"),
    *("title", "trim", "truncate", "upper", "wordcount"),
)


class Choices(tuple[str, ...]):
    """The choices, which a label may not count from the end: -1 is no label."""

    def __getitem__(self, label: Any) -> Any:
        if isinstance(label, slice):
            return super().__getitem__(label)
        try:
            index = operator.index(label)
        except TypeError:
            raise sandbox.Refused(
                f"label {errors.shown(label)} is not a whole number{self._advice(label)}"
            ) from None
        if not 0 <= index < len(self):
            from_one = (
                ". Labels from 1 are written choices[LABEL - 1]" if index == len(self) else ""
            )
            raise sandbox.Refused(
                f"label {index} is out of range: {len(self)} choices have the labels 0 to "
                f"{len(self) - 1}{from_one}"
            )
        return super().__getitem__(index)

    def _advice(self, label: Any) -> str:
        if label in tuple(self):
            return ". It is an answer already: write it without choices[]"
        if isinstance(label, str | float):
            try:
                whole = float(label).is_integer()
            except (ValueError, OverflowError):
                whole = False
            if whole:
                return ". Write choices[label | int]"
        return (
            f". Write 0 to {len(self) - 1} in the rows; where they hold the answer itself, as "
            "choices has it, leave out choices[]"
        )


class Environment(sandbox.Environment):
    """The sandbox, where what is missing, empty or no text is refused."""

    def __init__(self) -> None:
        super().__init__(
            undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=printable
        )
        known = self.filters
        known |= {name: _filled(each) for name, each in known.items() if name not in FOR_NOTHING}
        known |= {name: _filled(known[name], printable) for name in OF_TEXT}
        known |= {"int": _number("int"), "float": _number("float"), "join": _joining(known["join"])}

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`answers.items` is the field called items where there is one, not the dict's method."""
        if isinstance(obj, Mapping) and attribute in obj:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def joined(self, parts: tuple[Any, ...]) -> str:
        """What `~` gives."""
        return super().joined(tuple(map(printable, parts)))


def printable(value: Any) -> Any:
    """What `{{ }}` may print: Python's words for nothing or for a list are in no one's data."""
    if type(value) is str:
        sandbox.BUDGET.spend(0, len(value))
        return value
    if value is None:
        raise sandbox.Refused("an expression is empty (null)")
    if callable(value) and not isinstance(value, jinja2.Undefined):
        raise sandbox.Refused("an expression is a function. Add its brackets")
    if isinstance(value, dict | list | tuple | set | bytes):
        raise sandbox.Refused(
            f"an expression is {errors.shown(value)}, not text. Take one, or | join"
        )
    return value


def _present(value: Any) -> Any:
    if value is None:
        printable(value)
    return value


def _filled(function: Any, check: Callable[[Any], Any] = _present) -> Callable[..., Any]:
    """A filter that refuses what may not be printed, and would make a text of it."""
    first = int(hasattr(function, "jinja_pass_arg"))  # Jinja gives such a filter its own first

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        for value in args[first : first + 1]:
            check(value)
        return function(*args, **kwargs)

    return run


def _number(name: str) -> Callable[..., Any]:
    """The filter `int` or `float`, where 0 stands for no text unless the template says so."""
    convert = sandbox.metered(jinja2.filters.FILTERS[name])

    def run(value: Any, default: Any = None, *rest: Any, **kwargs: Any) -> Any:
        if default is None:
            _present(value)
        made = convert(value, default, *rest, **kwargs)
        if made is None:
            raise sandbox.Refused(f"{errors.shown(value)} is no number, and | {name} needs one")
        return made

    return run


def _joining(join: Callable[..., str]) -> Callable[..., str]:
    """The filter `join` over what may be printed alone."""

    @jinja2.pass_environment
    def run(
        environment: jinja2.Environment,
        value: Any,
        d: str = "",
        attribute: str | int | None = None,
    ) -> str:
        items = _present(value)
        if attribute is not None:
            items = map(jinja2.filters.make_attrgetter(environment, attribute), items)
        return join(environment, [printable(each) for each in items], d)

    return run
