"""YAML 1.2 text to plain data that remembers the line of every value, and back to text.

PyYAML's scanner and parser are used, its loader is not: that one follows YAML 1.1 (`1e-5` is a
string, `no` is false, `12:30:45` is a number), keeps the last of two equal keys without a word, and
expands aliases without end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from itune import errors

LARGEST_FILE = 1_000_000  # bytes
DEEPEST = 50
MOST_ALIASED = 10_000  # nodes that aliases may add

Key = tuple[str | int, ...]

# The core schema, https://yaml.org/spec/1.2.2/#103-core-schema, but for one thing: a number written
# with a leading zero (08, 007) is an identifier far more often than a number, so it stays text.
NULL = re.compile(r"null|Null|NULL|~|")
TRUE = re.compile(r"true|True|TRUE")
FALSE = re.compile(r"false|False|FALSE")
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
OCTAL = re.compile(r"0o[0-7]+")
HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
INFINITY = re.compile(r"[-+]?\.(inf|Inf|INF)")
NOT_A_NUMBER = re.compile(r"\.(nan|NaN|NAN)")

# What PyYAML says, and what is most often the cause.
CAUSES = {
    "mapping values are not allowed": "a ': ' inside a value. Put the value in quotes.",
    "could not find expected ':'": "a line that is neither 'key: value' nor '- item'. Mend it.",
    "unexpected end of stream": "the text ends inside quotes. Close them.",
    "expected <block end>": "wrong indentation, or text after a closing ] } or quote. Mend it.",
    "expected ',' or ']'": "a list is not closed, or lacks a comma. Mend it.",
    "expected ',' or '}'": "a mapping is not closed, or lacks a comma. Mend it.",
    "expected the node content": "a value is missing. Write it or delete its key.",
    "unknown escape character": "an unknown \\ inside double quotes. Use single quotes.",
    "expected escape sequence of": "an unknown \\ inside double quotes. Use single quotes.",
    "that cannot start any token": "a value starts with a sign of YAML's own. Put it in quotes.",
}


@dataclass
class Document:
    """Data and where each value of it was written."""

    data: Any
    where: str  # the file as messages name it
    kind: type[errors.UserError]
    lines: dict[Key, int] = field(default_factory=dict)  # from 1
    literals: set[Key] = field(default_factory=set)  # written as block scalars with |
    overrides: dict[Key, str] = field(default_factory=dict)  # key -> the place that set it
    faults: list[str] = field(default_factory=list)

    def line(self, key: Key) -> int:
        """The line of a value, else of what holds it."""
        while key and key not in self.lines:
            key = key[:-1]
        return self.lines.get(key, 1)

    def place(self, key: Key) -> str:
        """What the user can open to mend this value: `file:line`, or the option that set it."""
        for end in range(len(key), -1, -1):
            if key[:end] in self.overrides:
                return self.overrides[key[:end]]
            if key[:end] in self.lines:
                return f"{self.where}:{self.lines[key[:end]]}"
        return f"{self.where}:1"

    def fault(self, key: Key, what: str, *, below: int = 0) -> None:
        """Add one line to the faults; below: so many lines under the place of the key."""
        place = f"{self.where}:{self.line(key) + below}" if below else self.place(key)
        name = f"{dotted(key)}: " if key and key not in self.overrides else ""
        self.faults.append(errors.masked(f"{place}: {name}{what}"))

    def refuse(self) -> None:
        """Raise all the faults at once, in the order of the file."""
        if self.faults:
            raise self.kind("\n".join(sorted(dict.fromkeys(self.faults), key=_by_line)))

    def put(self, key: Key, value: Any, place: str) -> None:
        """Replace or add a value on behalf of an option; the holder must exist."""
        holder = self.data
        for part in key[:-1]:
            holder = holder[part]
        holder[key[-1]] = value
        for known in [each for each in self.lines if each[: len(key)] == key]:
            del self.lines[known]
        self.overrides[key] = place


def dotted(key: Key) -> str:
    """A key as `--set` takes it: `data.train.0.path`."""
    return ".".join(errors.inert(str(part)) for part in key)


def _by_line(fault: str) -> tuple[int, int]:
    """Faults of the file by line, those of options last."""
    found = re.match(r"(?!--)[^\n]*?:(\d+)(?::\d+)?: ", fault)
    return (0, int(found[1])) if found else (1, 0)


def read_text(path: Path, kind: type[errors.UserError]) -> str:
    """The text of a small UTF-8 file; raises `kind`."""
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise kind(f"{path}: cannot be read: {error.strerror}.") from error
    if len(raw) > LARGEST_FILE:
        raise kind(f"{path}: larger than 1 MB. This is not the file that was meant.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise kind(
            f"{path}: not UTF-8: byte 0x{byte:02x} at {error.start}. Save the file as UTF-8."
        ) from error


def parse(text: str, where: str, kind: type[errors.UserError]) -> Document:
    """The mapping that a file holds; raises `kind` if it cannot be read or holds no mapping.

    A key given twice is not raised but noted in `faults`, to be reported with the others.
    """
    document = Document(None, where, kind)
    node = _Composer(text, kind, lambda line, column: f"{where}:{line}:{column}").compose()
    if node is None:
        raise kind(f"{where}:1: expected a mapping, found an empty file. Write 'key: value' lines.")
    if not isinstance(node.value, dict):
        raise kind(
            f"{where}:{node.line}: expected a mapping, found {errors.shown(_plain(node))}. "
            "Write 'key: value' lines."
        )
    document.data = _plain(node, (), document)
    return document


def parse_value(text: str, place: str, kind: type[errors.UserError]) -> Any:
    """The value of an option; raises `kind`. A leading * is a file pattern, for lack of anchors."""
    if text.lstrip().startswith("*"):
        return text
    node = _Composer(text, kind, lambda line, column: place).compose()
    if node is None:
        return None
    document = Document(None, place, kind)
    value = _plain(node, (), document)
    if document.faults:
        raise kind(f"{place}: a key is given twice. Keep one.")
    return value


# --- text to nodes ------------------------------------------------------------------------------


@dataclass
class _Node:
    """A value and its line; `size` and `height` count what aliases stand for."""

    value: Any  # a scalar, list[_Node] or dict[str, _Node]
    line: int
    size: int = 1
    height: int = 0
    literal: bool = False
    key_lines: dict[str, int] = field(default_factory=dict)
    twice: list[tuple[str, int]] = field(default_factory=list)  # repeated keys and their lines


class _Composer:
    """Nodes from PyYAML's events, refusing what a recipe has no use for."""

    def __init__(
        self, text: str, kind: type[errors.UserError], place: Callable[[int, int], str]
    ) -> None:
        self.text, self.kind, self.place = text, kind, place
        self.anchors: dict[str, _Node | None] = {}  # None while its node is being read
        self.aliased = 0
        self.events: Iterator[Any] = self._events()

    def refusal(self, mark: Any, what: str) -> errors.UserError:
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        return self.kind(errors.masked(f"{self.place(line, column)}: {what}"))

    def _events(self) -> Iterator[Any]:
        try:
            yield from yaml.parse(self.text, Loader=yaml.SafeLoader)
        except yaml.reader.ReaderError as error:
            line = self.text.count("\n", 0, error.position) + 1
            column = error.position - self.text.rfind("\n", 0, error.position)
            code = error.character if isinstance(error.character, int) else ord(error.character)
            raise self.kind(
                f"{self.place(line, column)}: the character U+{code:04X} does not belong in a text "
                "file. Delete it."
            ) from error
        except yaml.MarkedYAMLError as error:
            raise self._syntax(error) from error
        except (ValueError, OverflowError) as error:  # an escape beyond Unicode: "\UFFFFFFFF"
            raise self.kind(f"{self.place(1, 1)}: not YAML: {error}.") from error

    def _syntax(self, error: yaml.MarkedYAMLError) -> errors.UserError:
        mark = error.problem_mark or error.context_mark
        lines = self.text.splitlines()
        if mark is None:
            return self.refusal(mark, f"not YAML: {error.problem}.")
        number = min(mark.line, len(lines) - 1)
        for index in (number, number - 1):  # the parser may notice a tab one line late
            indent = re.match(r"\s*", lines[index])[0] if 0 <= index < len(lines) else ""  # type: ignore[index]
            if "\t" in indent:
                place = self.place(index + 1, indent.index("\t") + 1)
                return self.kind(f"{place}: a tab in the indentation. Use spaces.")
        problem = error.problem or "it cannot be read"
        what = next((ours for theirs, ours in CAUSES.items() if theirs in problem), f"{problem}.")
        return self.refusal(mark, f"not YAML, near {errors.shown(lines[number].strip())}: {what}")

    def compose(self) -> _Node | None:
        """The only document's node; None for an empty text."""
        node: _Node | None = None
        count = 0
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                count += 1
                if count > 1:
                    raise self.refusal(event.start_mark, "a second document (---). Keep one.")
                node = self.node(next(self.events), 1)
        return node

    def node(self, event: Any, depth: int) -> _Node:
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event, depth)
        if depth > DEEPEST:
            raise self.refusal(event.start_mark, f"nested deeper than {DEEPEST}. Flatten it.")
        if event.tag is not None:
            raise self.refusal(
                event.start_mark,
                f"the tag {errors.shown(event.tag)} is not allowed: files are data. Delete it.",
            )
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            node = self.scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self.sequence(event, depth)
        else:
            node = self.mapping(event, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def alias(self, event: Any, depth: int) -> _Node:
        if event.anchor not in self.anchors:
            raise self.refusal(
                event.start_mark,
                f"the alias *{event.anchor} has no anchor. Quote a text that starts with *.",
            )
        node = self.anchors[event.anchor]
        if node is None:
            raise self.refusal(
                event.start_mark, f"the cyclic alias *{event.anchor} holds itself. Delete it."
            )
        self.aliased += node.size
        if self.aliased > MOST_ALIASED:
            raise self.refusal(
                event.start_mark, f"aliases expand to more than {MOST_ALIASED} nodes. Use fewer."
            )
        if depth + node.height > DEEPEST:
            raise self.refusal(event.start_mark, f"nested deeper than {DEEPEST}. Flatten it.")
        return node

    def scalar(self, event: Any) -> _Node:
        line = event.start_mark.line + 1
        if any("\ud800" <= each <= "\udfff" for each in event.value):
            raise self.refusal(event.start_mark, "half of a surrogate pair. Delete the escape.")
        if not event.implicit[0]:  # quoted or a block: always text
            return _Node(event.value, line, literal=event.style == "|")
        try:
            return _Node(resolve(event.value), line)
        except ValueError as error:  # Python refuses integers of more than 4300 digits
            raise self.refusal(event.start_mark, "a number of too many digits.") from error

    def sequence(self, event: Any, depth: int) -> _Node:
        node = _Node([], event.start_mark.line + 1)
        for child in iter(lambda: next(self.events), None):
            if isinstance(child, yaml.SequenceEndEvent):
                break
            self.add(node, item := self.node(child, depth + 1))
            node.value.append(item)
        return node

    def mapping(self, event: Any, depth: int) -> _Node:
        node = _Node({}, event.start_mark.line + 1)
        for child in iter(lambda: next(self.events), None):
            if isinstance(child, yaml.MappingEndEvent):
                break
            key, line = self.key(child, depth), child.start_mark.line + 1
            self.add(node, item := self.node(next(self.events), depth + 1))
            if key in node.value:
                node.twice.append((key, line))
            else:
                node.value[key], node.key_lines[key] = item, line
        return node

    def key(self, event: Any, depth: int) -> str:
        value = self.node(event, depth + 1).value
        if value == "<<" and event.implicit[0]:  # as text, in quotes, it is a key like any
            raise self.refusal(
                event.start_mark, "the merge key << is not part of YAML 1.2. Write the keys out."
            )
        if isinstance(value, str):
            return value
        found = "a list or mapping" if isinstance(value, list | dict) else errors.shown(value)
        raise self.refusal(
            event.start_mark, f"expected text as the key, found {found}. Put it in quotes."
        )

    @staticmethod
    def add(holder: _Node, item: _Node) -> None:
        holder.size += item.size
        holder.height = max(holder.height, item.height + 1)


def resolve(text: str) -> str | int | float | bool | None:
    """What an unquoted scalar stands for."""
    if NULL.fullmatch(text):
        return None
    if TRUE.fullmatch(text) or FALSE.fullmatch(text):
        return text.casefold() == "true"
    if INTEGER.fullmatch(text):
        return int(text)
    if OCTAL.fullmatch(text) or HEXADECIMAL.fullmatch(text):
        return int(text, 0)
    if FLOAT.fullmatch(text):
        return float(text)
    if INFINITY.fullmatch(text) or NOT_A_NUMBER.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def _plain(node: _Node, key: Key = (), document: Document | None = None) -> Any:
    """The data of a node; lines, block scalars and repeated keys are noted in the document."""
    if document is not None:
        document.lines.setdefault(key, node.line)
        if node.literal:
            document.literals.add(key)
    if isinstance(node.value, list):
        return [_plain(item, (*key, i), document) for i, item in enumerate(node.value)]
    if not isinstance(node.value, dict):
        return node.value
    if document is not None:
        for name, line in node.key_lines.items():
            document.lines[(*key, name)] = line
        for name, line in node.twice:
            document.fault(
                (*key, name), f"given on lines {node.key_lines[name]} and {line}. Keep one."
            )
    return {name: _plain(item, (*key, name), document) for name, item in node.value.items()}


# --- data to text -------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or the reader above would take for something else than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Line breaks other than \\n are lost but in double quotes, where they are escaped."""
        style = '"' if any(each in data for each in "\r\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


for _tag, _pattern, _first in (
    ("null", NULL, ["n", "N", "~", ""]),
    ("bool", re.compile(f"{TRUE.pattern}|{FALSE.pattern}"), list("tTfF")),
    ("int", re.compile(rf"({INTEGER.pattern}|{OCTAL.pattern}|{HEXADECIMAL.pattern})$"), None),
    ("float", re.compile(rf"({FLOAT.pattern})$"), None),
):
    _Dumper.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}",
        re.compile(rf"(?:{_pattern.pattern})\Z"),
        _first or list("-+.0123456789"),
    )


def dump(data: Any) -> str:
    """The YAML text that both this reader and others read as the data."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text
