"""Files of rows: which kinds there are, and telling the line that is broken."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itune import cache, errors, unpacking

BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
SAME = {".ndjson": ".jsonl"}  # another name of a kind
# Kinds that people keep rows in and that are not read, with what becomes of them.
FOREIGN = {
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), "Save it as CSV UTF-8"),
    **dict.fromkeys((".docx", ".doc", ".odt", ".rtf", ".pdf", ".html"), "Save its text as .txt"),
    **dict.fromkeys((".db", ".sqlite", ".sqlite3"), "Save the table as CSV or Parquet"),
    **dict.fromkeys((".pkl", ".pickle", ".npy", ".pt"), "Save the rows as JSONL or Parquet"),
}
# chosen: far below where Python's own reader gives up, far above any row of data.
DEEPEST = 100

POINTER = b"version https://git-lfs.github.com/spec/"
HALF = re.compile(r"\\u[dD][89a-fA-F]")
SURROGATE = re.compile("[\ud800-\udfff]")
# A text that `datasets` would take for a time: 2024-01-11, 2024-01-11 10:30, 2024-01-11T10:30:00Z.
DATE = re.compile(r'"\d{4}-\d\d-\d\d(?:[T ][0-9:.,Z+-]*)?"')
KINDS = {str: "a text", bool: "a truth value", int: "a number", float: "a number"}


def kind(path: str | Path) -> str | None:
    """`.jsonl` of `a.jsonl` and of `a.jsonl.gz`; None where it is no file of rows."""
    path = Path(path)
    inner = path.with_suffix("") if path.suffix.lower() in unpacking.PACKED else path
    suffix = SAME.get(inner.suffix.lower(), inner.suffix.lower())
    return suffix if suffix in BUILDERS else None


def refuse_foreign(name: str) -> None:
    """Raise DataError for a file of a kind that is not read, and say what to save it as."""
    suffix = Path(name).suffix.lower()
    if suffix in FOREIGN:
        raise errors.DataError(
            f"{name}: files of the kind {suffix} are not read. {FOREIGN[suffix]}, and name that."
        )


# --- what is wrong with a file ------------------------------------------------------------


@dataclass
class Look:
    """What reading through a file has shown.

    `listed`: a JSON list although its name says lines. `document`: one value of JSON. `dated`: a
    text of JSON looks like a date. `fractions`: columns of whole numbers and others.
    """

    listed: bool = False
    document: bool = False
    dated: bool = False
    fractions: tuple[str, ...] = ()


def check(
    paths: Sequence[Path], names: Sequence[str], suffix: str, field: str | None
) -> list[Look]:
    """Read through files of text, once for each content; raise DataError where one is broken.

    Readers say that a file is broken, not where; and some mistakes they take as they are: a key
    given twice, NaN, half of a character. `names`: how messages call the files.
    """
    found = []
    for path, name in zip(paths, names, strict=True):

        def look(_folder: Path, path: Path = path, name: str = name) -> dict[str, Any]:
            return vars(_look(path, name, suffix, field))

        key = cache.fingerprint([cache.digest(path), suffix, field, "3"])
        found.append(Look(**cache.entry("checked", key, look)[1]))
    return found


def _look(path: Path, name: str, suffix: str, field: str | None) -> Look:
    if path.stat().st_size == 0:
        raise errors.DataError(f"{name}: 0 rows, the file is empty. Check how it was written.")
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise errors.DataError(
                f"{name}: stands for a file that Git LFS keeps elsewhere. Fetch it: git lfs pull."
            )
    if suffix in (".parquet", ".arrow"):
        _check_schema(path, name, suffix)
        return Look()
    if suffix == ".jsonl" and not _is_list(path):
        return _check_lines(path, name)
    if suffix in (".json", ".jsonl"):
        look = _check_document(path, name, field)
        look.listed = suffix == ".jsonl"
        return look
    rows = sum(bool(line.strip()) for _, line in _lines(path, name))
    if not rows:
        raise errors.DataError(f"{name}: 0 rows, only blank lines. Check how it was written.")
    return Look()


def _check_schema(path: Path, name: str, suffix: str) -> None:
    import pyarrow
    import pyarrow.parquet

    try:
        if suffix == ".parquet":
            pyarrow.parquet.read_schema(path)
            return
        with pyarrow.memory_map(str(path)) as file:
            try:
                pyarrow.ipc.open_stream(file)
            except pyarrow.ArrowInvalid:
                pyarrow.ipc.open_file(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise errors.DataError(
            f"{name}: is no whole {suffix} file: {errors.one_line(error)} Was the copy cut? "
            "Fetch it again."
        ) from error


def objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of each line of a JSONL file that is not blank. Raises DataError."""
    if path.is_dir():
        raise errors.DataError(f"{path}: a folder, expected a file. Name a file of JSON lines.")
    if not path.is_file():
        raise errors.DataError(f"{path}: no such file, in {Path.cwd()}. Check the path.")
    return _objects(path, str(path))


def _objects(path: Path, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path, name):
        if not line.strip():
            continue
        if kind(path) in (".csv", ".tsv", ".txt") and not line.lstrip().startswith("{"):
            raise errors.DataError(
                f"{name}:{number}: no JSON, and a file of JSON lines is read here. Write each row "
                'as an object, such as {"prompt": "..."}, in a file that ends in .jsonl.'
            )
        value = _parsed(line.rstrip("\r\n"), f"{name}:{number}")
        if not isinstance(value, dict):
            raise errors.DataError(
                f"{name}:{number}: expected an object {{...}}, found {shown_kind(value)}. "
                "Mend the line."
            )
        yield number, value


def _is_list(path: Path) -> bool:
    """Whether a whole list stands in the file; one that is a line of its own is a broken row."""
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
        if not first.lstrip().startswith(b"["):
            return False
        try:
            json.loads(first)
        except (ValueError, RecursionError):
            return True
        return not any(line.strip() for line in file)


def _lines(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """Numbered lines as text. Raises DataError with the line and byte that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise errors.DataError(
                    f"{name}:1: UTF-16, expected UTF-8. Convert it: "
                    "iconv -f UTF-16 -t UTF-8 OLD > NEW."
                )
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise errors.DataError(
                    f"{name}:{number}: not UTF-8, byte 0x{line[error.start]:02x} at "
                    f"{error.start}. Save it anew as UTF-8 (spreadsheets: as CSV UTF-8), or "
                    "convert it: iconv -f CP1252 -t UTF-8 OLD > NEW."
                ) from error


class _Fault(ValueError):
    """What is wrong within a line; the line's number is added where it is known."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise _Fault(f"the key {errors.shown(twice)} is given twice. Keep one.")
    return made


def _constant(word: str) -> Any:
    raise _Fault(f"{word} is no value of JSON. Write null, or take the row out.")


READER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant)


def _parsed(text: str, place: str, whole: str = "line") -> Any:
    """A JSON value. Raises DataError that begins with the place."""
    try:
        if text.count("[") + text.count("{") > DEEPEST and _depth(text) > DEEPEST:
            raise _Fault(f"nested deeper than {DEEPEST}. Flatten the row.")
        value = READER.decode(text)
        whole_text = json.dumps(value, ensure_ascii=False) if HALF.search(text) else ""
        if found := SURROGATE.search(whole_text):
            raise _Fault(
                f"half of a character, U+{ord(found[0]):04X}. Write the text anew as UTF-8."
            )
    except json.JSONDecodeError as error:
        raise errors.DataError(_malformed(error, place, whole)) from error
    except _Fault as error:
        raise errors.DataError(f"{place}: {error}") from error
    return value


def _malformed(error: json.JSONDecodeError, place: str, whole: str) -> str:
    line = error.doc
    near = errors.shown(line[max(0, error.pos - 30) : error.pos + 30].strip())
    at = f"{place}:{error.pos + 1}" if whole == "line" else f"{place}:{error.lineno}:{error.colno}"
    rest = line[error.pos :].strip()
    if whole == "line" and line.strip() in ("{", "["):
        return f"{at}: a value that goes on in the next line. Write each row in a line of its own."
    if error.msg.startswith("Unterminated") or not rest:
        return f"{at}: the {whole} ends inside a value, near {near}. Was the copy cut? Fetch it."
    what = error.msg[0].lower() + error.msg[1:]
    return f"{at}: not JSON, {what}, near {near}. Mend it or take it out."


def _depth(text: str) -> int:
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", text)
    deepest = depth = 0
    for sign in re.findall(r"[\[\]{}]", bare):
        depth += 1 if sign in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _check_lines(path: Path, name: str) -> Look:
    columns = _Columns(name)
    dated = False
    for number, line in _lines(path, name):
        if line.strip():
            dated = dated or DATE.search(line) is not None
            columns.add(_parsed(line.rstrip("\r\n"), f"{name}:{number}"), f"{name}:{number}")
    if not columns.rows:
        raise errors.DataError(f"{name}: 0 rows, only blank lines. Check how it was written.")
    columns.check()
    return Look(dated=dated, fractions=columns.fractions())


def _check_document(path: Path, name: str, field: str | None) -> Look:
    text = "".join(line for _, line in _lines(path, name))
    try:
        value = _parsed(text, name, "file")
    except errors.DataError:
        first = text.lstrip().partition("\n")[0]
        if not _is_object(first) or field is not None:
            raise
        return _check_lines(path, name)  # lines of JSON under the name of one value
    columns = _Columns(name)
    for number, row in enumerate(_under(value, name, field), 1):
        columns.add(row, f"{name} row {number}")
    columns.check()
    return Look(document=True, dated=DATE.search(text) is not None, fractions=columns.fractions())


def _under(value: Any, name: str, field: str | None) -> list[Any]:
    """The rows of one value of JSON. Raises DataError."""
    if field is not None:
        if not isinstance(value, dict) or field not in value:
            known = value if isinstance(value, dict) else ()
            raise errors.DataError(f"{name}: no field {field!r}.{errors.nearest(field, known)}")
        value = value[field]
    if field is None and _by_columns(value):
        raise errors.DataError(
            f"{name}: a table by columns ({errors.inert(', '.join(list(value)[:5]))}), and rows "
            f"are read. Write it by rows: pandas.DataFrame(json.load(open({name!r})))"
            ".to_json('rows.jsonl', orient='records', lines=True)."
        )
    if isinstance(value, dict) and any(isinstance(each, list) for each in value.values()):
        lists = [key for key, each in value.items() if isinstance(each, list)]
        raise errors.DataError(
            f"{name}: expected a list of rows, found a mapping. Name the key that they are under "
            f"with field.{errors.nearest('', lists)}"
        )
    rows = value if isinstance(value, list) else [value]
    if not rows:
        raise errors.DataError(f"{name}: 0 rows, the list is empty. Check how it was written.")
    return rows


def _by_columns(value: Any) -> bool:
    """Whether a value of JSON is a table by columns: of lists, or as pandas numbers its rows."""
    if not isinstance(value, dict) or len(value) < 2:
        return False
    columns = list(value.values())
    if all(isinstance(each, dict) for each in columns):
        first = list(columns[0])
        numbered = all(key.isdecimal() for key in first)
        return bool(first) and numbered and all(list(each) == first for each in columns)
    if not all(isinstance(each, list) for each in columns):
        return False
    # Lists of rows, such as those of several splits, are no columns.
    rows = any(isinstance(each, dict) for column in columns for each in column)
    return not rows and len(columns[0]) > 0 and len(set(map(len, columns))) == 1


def rows_of(path: Path, name: str, look: Look, field: str | None) -> Iterator[dict[str, Any]]:
    """The rows of a JSON file that `check` has looked through."""
    if look.document:
        text = "".join(line for _, line in _lines(path, name))
        yield from _under(_parsed(text, name, "file"), name, field)
    else:
        yield from (row for _, row in _objects(path, name))


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


class _Columns:
    """What kinds of values each column holds, so that the odd one out can be named."""

    def __init__(self, name: str) -> None:
        self.name, self.rows = name, 0
        self.seen: dict[str, dict[str, tuple[int, str, Any]]] = {}
        self.numbers: dict[str, set[type]] = {}

    def add(self, row: Any, place: str) -> None:
        if not isinstance(row, dict):
            raise errors.DataError(
                f"{place}: expected an object {{...}}, found {shown_kind(row)}. Each row is an "
                "object with its columns."
            )
        self.rows += 1
        for column, value in row.items():
            if value is None:
                continue
            if isinstance(value, float) and not math.isfinite(value):
                raise errors.DataError(f"{place}: column {column!r}: a number too large to hold.")
            if type(value) in (int, float):
                self.numbers.setdefault(column, set()).add(type(value))
            kinds = self.seen.setdefault(column, {})
            found = shown_kind(value)
            count, first, example = kinds.get(found, (0, place, value))
            kinds[found] = (count + 1, first, example)

    def fractions(self) -> tuple[str, ...]:
        """The columns that hold whole numbers and others."""
        return tuple(column for column, kinds in self.numbers.items() if len(kinds) > 1)

    def check(self) -> None:
        for column, kinds in self.seen.items():
            if len(kinds) > 1:
                usual = max(kinds, key=lambda each: kinds[each][0])
                odd = min(
                    (each for each in kinds if each != usual), key=lambda each: kinds[each][0]
                )
                count, place, value = kinds[odd]
                raise errors.DataError(
                    f"{place}: column {column!r}: expected {usual}, as most rows have, found {odd} "
                    f"({errors.shown(value)}); {count} such row{'s' * (count > 1)} of {self.rows}. "
                    "Mend or take them out."
                )


def shown_kind(value: Any) -> str:
    """What a value is, in words."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return KINDS.get(type(value), "nothing" if value is None else type(value).__name__)


def line_of(paths: Iterable[Path], row: int) -> tuple[int, int] | None:
    """(which file, which line) a row of JSONL files is at; None when they have no such row."""
    for number, path in enumerate(paths):
        with path.open("rb") as file:
            for line_number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                if row == 0:
                    return number, line_number
                row -= 1
    return None
