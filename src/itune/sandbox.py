"""Jinja in a box: no way out, no files, and bounds on time, memory and output that hold.

A template is code from somebody else: a recipe's author, or whoever put a model on the hub. What
it may cost is counted where the cost arises, in the process itself: each turn of a loop or call,
each text and list that is made, before it is made where it could be large. So no single operation
is long, and the clock is read between them.
"""

from __future__ import annotations

import datetime
import functools
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.filters
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

SECONDS = 2.0  # of the processor, for one rendering
STEPS = 2_000_000  # turns of loops, calls, and members of lists that are looked through
CHARACTERS = 40_000_000  # in all texts that one rendering makes on its way
NODES = 500_000  # members that a list may have, those of the lists in it included
LARGEST_SOURCE = 200_000  # characters of a template

# Random, or able to make a text of any length out of a few characters, and needed by no prompt.
NO_FILTERS = (
    "random",
    "batch",
    "slice",
    "center",
    "format",
    "pprint",
    "urlize",
    "wordwrap",
    "xmlattr",
    "striptags",
)
# Filters and tests that look at one thing only.
QUICK = frozenset(
    [
        *("count", "d", "default", "first", "last", "length", "boolean", "callable", "defined"),
        *("false", "float", "integer", "iterable", "mapping", "none", "number", "sequence"),
        *("string", "true", "undefined"),
    ]
)
NO_METHODS = (
    *("center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map"),
    *("translate", "maketrans", "encode"),
)
# Nothing is hidden behind their attributes: an image, a table, a number have methods that write
# files or grow without end.
OPEN_TYPES = (
    *(str, Mapping, list, tuple, set, frozenset),
    *(datetime.date, datetime.time, datetime.timedelta),
    *(jinja2.Undefined, jinja2.runtime.LoopContext, jinja2.runtime.TemplateReference),
    jinja2.utils.Namespace,
)
CONTAINERS = (list, tuple, dict, set, frozenset)
# What an expression over any data may raise: 'a' + 1, row.x[{}], 1 / 0, a macro that calls itself.
PYTHON_FAULTS = (
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)
# What Python's compiler and Jinja's parser raise for a hundred nested brackets or loops.
COMPILER_FAULTS = (RecursionError, SyntaxError, MemoryError, ValueError, OverflowError)


class Refused(Exception):
    """What a template asked for and does not get; its text is the middle of a message."""


class Exhausted(Refused):
    """A template that would take too long, too much memory, or write too much."""


class Budget(threading.local):
    """What one rendering has spent; each thread has its own."""

    def __init__(self) -> None:
        self.active = False
        self.steps = self.characters = self.look = 0
        self.until = 0.0
        self.most = CHARACTERS

    def __enter__(self) -> Budget:
        self.most = CHARACTERS
        self.active, self.steps, self.characters, self.look, self.until = True, 0, 0, 64, 0.0
        return self

    def __exit__(self, *_: object) -> None:
        self.active = False

    def spend(self, steps: int, characters: int = 0) -> None:
        """Count a cost, and raise Exhausted where the sum is too much."""
        if not self.active:  # at compile time nothing that could be costly is worked out
            raise Exhausted("it is not being rendered")
        self.steps += steps
        self.characters += characters
        if self.characters > self.most:
            raise Exhausted(f"it makes more than {self.most} characters of text")
        if self.steps >= self.look:
            self._look()

    def _look(self) -> None:
        """Look at the clock, which costs more than most steps: so not at each."""
        now = time.thread_time()
        self.look = self.steps + 64
        self.until = self.until or now + SECONDS
        if self.steps > STEPS:
            raise Exhausted(f"it takes more than {STEPS} steps")
        if now > self.until:
            raise Exhausted(f"it takes longer than {SECONDS:g} seconds")

    def made(self, value: Any) -> Any:
        """Count a value that was made, and give it back."""
        if isinstance(value, str):
            self.spend(0, len(value))
        elif isinstance(value, CONTAINERS):
            self.weigh(value)
        elif isinstance(value, range):
            self.spend(len(value))
        return value

    def weigh(self, *values: Any) -> int:
        """Characters in texts and lists. A list that holds itself many times over is refused:
        to print, compare or look it up would take for ever."""
        nodes = characters = 0
        waiting = list(values)
        while waiting:
            each = waiting.pop()
            if isinstance(each, str):
                characters += len(each)
            elif isinstance(each, CONTAINERS):
                nodes += len(each)
                if nodes > NODES:
                    raise Exhausted(f"it makes a list of more than {NODES} members")
                waiting += each
                if isinstance(each, dict):
                    waiting += each.values()
        if characters > self.most:
            raise Exhausted(f"it makes more than {self.most} characters of text")
        self.spend(nodes)
        return characters


BUDGET = Budget()


class _Generator(jinja2.compiler.CodeGenerator):
    """Writes the counting into the compiled template, where Jinja has no hook for it."""

    def visit_Call(self, node: Any, frame: Any, forward_caller: bool = False) -> None:
        if isinstance(node.node, jinja2.nodes.EnvironmentAttribute):
            self.write(f"environment.{node.node.name}({node.args[0].value})")
        else:
            super().visit_Call(node, frame, forward_caller=forward_caller)

    def visit_Concat(self, node: Any, frame: Any) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def _weighed(self, name: str, visit: Callable[..., None], node: Any, frame: Any) -> None:
        self.write(f"environment.{name}(")
        visit(node, frame)
        self.write(")")

    def visit_Compare(self, node: Any, frame: Any) -> None:
        if _is_quick(node):
            super().visit_Compare(node, frame)
        else:
            self._weighed("compared", super().visit_Compare, node, frame)

    def visit_List(self, node: Any, frame: Any) -> None:
        if all(isinstance(item, jinja2.nodes.Const) for item in node.items):
            super().visit_List(node, frame)
        else:
            self._weighed("built", super().visit_List, node, frame)

    def visit_Tuple(self, node: Any, frame: Any) -> None:
        if node.ctx != "load" or all(isinstance(item, jinja2.nodes.Const) for item in node.items):
            super().visit_Tuple(node, frame)
        else:
            self._weighed("built", super().visit_Tuple, node, frame)

    def visit_Dict(self, node: Any, frame: Any) -> None:
        self._weighed("built", super().visit_Dict, node, frame)


def _is_quick(node: jinja2.nodes.Compare) -> bool:
    """Whether a comparison has a constant on a side that bounds it."""
    literals = (jinja2.nodes.Const, jinja2.nodes.List, jinja2.nodes.Tuple)
    if isinstance(node.expr, jinja2.nodes.Const):
        return all(op.op not in ("in", "notin") for op in node.ops)
    return all(isinstance(op.expr, literals) for op in node.ops)


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with nothing random in it and a budget for each rendering."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        # Prompts are plain text for a tokenizer: escaping for HTML would change them.
        super().__init__(autoescape=False, cache_size=0, **options)
        self.globals = {"range": self.globals["range"]}
        for name in NO_FILTERS:
            del self.filters[name]
        self.filters |= {"join": _join, "replace": _replace, "round": _round, "indent": _indent}
        self.filters |= {"sum": _sum, "tojson": _tojson}
        known: dict[str, Any]
        for known in (self.filters, self.tests):
            known |= {name: metered(each) for name, each in known.items() if name not in QUICK}
        self.turn = functools.partial(BUDGET.spend, 1)  # what each body of a loop begins with

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        if len(source) > LARGEST_SOURCE:
            raise jinja2.TemplateSyntaxError(f"it is longer than {LARGEST_SOURCE} characters", 1)
        tree = super()._parse(source, name, filename)
        kinds = (
            jinja2.nodes.For,
            jinja2.nodes.Macro,
            jinja2.nodes.CallBlock,
            jinja2.nodes.Block,
        )
        for node in list(tree.find_all(kinds)):
            written = sum(len(data.data) for data in node.find_all(jinja2.nodes.TemplateData))
            count = jinja2.nodes.Call(
                jinja2.nodes.EnvironmentAttribute("turn"),
                [jinja2.nodes.Const(written)],
                *([], None, None),
            )
            counted = jinja2.nodes.ExprStmt(count).set_lineno(node.lineno)
            counted.set_environment(self)
            node.body.insert(0, counted)  # type: ignore[attr-defined]
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not isinstance(obj, OPEN_TYPES) or (isinstance(obj, str) and attr in NO_METHODS):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """No `str.format` in Jinja's safe wrapping either: it can still pad without end."""

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        BUDGET.spend(1)
        if args or kwargs:
            BUDGET.weigh(*args, *kwargs.values())
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            if __obj.__name__ == "join":
                args = (list(*args),)
                _check_join(owner, args[0])
            elif __obj.__name__ == "replace":
                _check_replace(owner, *args[:2])
        return BUDGET.made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, sign: str, left: Any, right: Any) -> Any:
        if sign == "+":
            result = left + right
            BUDGET.made(result)
            return result
        numbers = all(isinstance(each, int | float) for each in (left, right))
        if not numbers or sign == "**":
            raise Refused(f"the operator {sign} is for numbers, and ** is not available")
        return _small(super().call_binop(context, sign, left, right))

    def joined(self, parts: tuple[Any, ...]) -> str:
        """What `~` gives."""
        BUDGET.spend(1, BUDGET.weigh(*parts))
        return "".join(map(str, parts))

    def compared(self, value: Any) -> Any:
        """The truth of a comparison that may have taken long."""
        BUDGET.spend(8)
        return value

    def built(self, value: Any) -> Any:
        """A list, tuple or mapping that the template wrote down."""
        BUDGET.weigh(value)
        return value


# --- filters that are as the library's, and bounded -----------------------------------------------


def metered(function: Any) -> Callable[..., Any]:
    """A filter or test whose cost is counted."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        BUDGET.spend(1)
        BUDGET.weigh(*args, *kwargs.values())
        return BUDGET.made(function(*args, **kwargs))

    return run


def _small(number: Any) -> Any:
    if isinstance(number, int) and abs(number) > 2**64:
        raise Exhausted("it makes a number of more than 20 digits")
    return number


def _check_join(glue: str, items: list[Any]) -> None:
    BUDGET.spend(len(items), BUDGET.weigh(items) + len(items) * len(glue))


@jinja2.pass_environment
def _join(
    environment: jinja2.Environment,
    value: Iterable[Any],
    d: str = "",
    attribute: str | int | None = None,
) -> str:
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(environment, attribute), value)
    items = list(value)
    _check_join(str(d), items)
    return str(d).join(map(str, items))


def _check_replace(text: str, old: str = "", new: str = "") -> None:
    BUDGET.spend(1, len(text) + text.count(old) * max(0, len(new) - len(old)))


def _replace(s: str, old: str, new: str, count: int | None = None) -> str:
    _check_replace(str(s), str(old), str(new))
    return str(s).replace(str(old), str(new), -1 if count is None else count)


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    if abs(precision) > 20:
        raise Exhausted("it rounds to more than 20 digits")
    return jinja2.filters.do_round(value, precision, method)


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    one = width if isinstance(width, int) else len(width)
    BUDGET.spend(1, len(str(s)) + one * (1 + str(s).count("\n")))
    return jinja2.filters.do_indent(s, width, first, blank)


@jinja2.pass_eval_context
def _tojson(context: Any, value: Any, indent: int | None = None) -> str:
    return jinja2.filters.do_tojson(context, value, small_indent(indent))


def small_indent(indent: Any) -> Any:
    """An indent for JSON, where it is a small number or nothing."""
    if indent is not None and not (isinstance(indent, int) and indent <= 16):
        raise Exhausted("it indents JSON by more than 16")
    return indent


@jinja2.pass_environment
def _sum(
    environment: jinja2.Environment,
    iterable: Iterable[Any],
    attribute: str | int | None = None,
    start: Any = 0,
) -> Any:
    if not isinstance(start, int | float):
        raise Refused("the filter sum is for numbers")
    if attribute is not None:
        iterable = map(jinja2.filters.make_attrgetter(environment, attribute), iterable)
    return _small(sum(iterable, start))
