"""CSV and TSV: what separates the cells, which row is broken, and what a column holds.

A cell stands for its text. A column is read as numbers or truth values only where each of them is
written as Python writes it: `007`, `1.50`, `1e3` and `true` stay what they are, and so do the words
NA and null.
"""

from __future__ import annotations

import array
import csv
import functools
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from itune import cache, errors

WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")
TRUTHS = frozenset({"true", "false", "TRUE", "FALSE"})  # stay texts, but ask for a word
TYPES = ("int64", "float64", "bool", "truths")
LARGEST_LOOKED = 100 << 20  # chosen: going through so many bytes takes some seconds
LOOKED = 1 << 16  # chosen: bytes that show what separates cells
ROWS_LOOKED = 50  # chosen: a sign of the texts themselves will not be in so many rows alike
SIGNS = (",", ";", "\t", "|")
NUMBER = re.compile(r"-?\d+([.,]\d+)?")
LONGEST = 1 << 30  # chosen: a cell may be as long as any row; Python's own limit is 128 KiB


@dataclass
class Table:
    """How a file is read: `sep` between cells, whether it is `quoted`, and each column's type.

    `truths`: the columns of texts that hold true and false alone.
    """

    sep: str
    quoted: bool = True
    columns: dict[str, str] = field(default_factory=dict)
    truths: list[str] = field(default_factory=list)

    def line_of(self, paths: Sequence[Path], row: int) -> tuple[int, int] | None:
        """(which file, which line) a row of the table begins at, both counted from its first file.

        None where there is no such row, or where to look for it would take long.
        """
        if sum(path.stat().st_size for path in paths) > LARGEST_LOOKED:
            return None
        for number, path in enumerate(paths):
            lines = _begins(path, self.sep, self.quoted)
            if row < len(lines):
                return number, lines[row]
            row -= len(lines)
        return None


@functools.lru_cache(maxsize=8)
def _begins(path: Path, sep: str, quoted: bool) -> array.array[int]:
    """The line that each row of a file begins in; the file has been found to be whole."""
    rows = _rows(path, str(path), sep, quoted=quoted)
    next(rows)
    return array.array("q", (line for line, _ in rows))


def look(paths: Sequence[Path], names: Sequence[str], suffix: str) -> Table:
    """How files of one kind are read as one table; each is gone through once for each content.

    `names`: how messages call the files. Raises DataError with the line of a broken row.
    """
    found = []
    for path, name in zip(paths, names, strict=True):

        def make(_folder: Path, path: Path = path, name: str = name) -> dict[str, Any]:
            return vars(_looked(path, name, suffix))

        key = cache.fingerprint([cache.digest(path), suffix, "tables", "6"])
        found.append(Table(**cache.entry("checked", key, make)[1]))
    first = found[0]
    for table, name in zip(found, names, strict=True):
        if (list(table.columns), table.sep) != (list(first.columns), first.sep):
            raise errors.DataError(
                f"{name}: its columns ({', '.join(table.columns)}) are not those of {names[0]} "
                f"({', '.join(first.columns)}). Make two sources, with rename where it is needed."
            )
        first.quoted &= table.quoted
        for column, kind in table.columns.items():
            if first.columns[column] != kind:
                first.columns[column] = "string"
    return first


def separator(file: IO[bytes], suffix: str) -> str:
    """What separates the columns: the sign that cuts each of the first rows into as many cells.

    Where there is no such sign, or two that cut alike, a comma goes before the others.
    Spreadsheets of countries that write 1,5 for one and a half save semicolons under that name.
    """
    if suffix == ".tsv":
        return "\t"
    raw = file.read(LOOKED)
    text = raw.decode("utf-8-sig", "replace")
    header = text.partition("\n")[0]
    cells = {sign: _cells(text, sign, whole=len(raw) < LOOKED) for sign in SIGNS}
    known = [sign for sign in SIGNS if sign in header]
    # The first of the largest, so that a comma goes before the others.
    return max(known, key=lambda sign: cells[sign], default=",")


def _cells(text: str, sign: str, *, whole: bool) -> int:
    """How many cells the first rows of a text have each, if more than one; 0 where they differ."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=sign)
    try:
        counts = [len(row) for row in itertools.islice(reader, ROWS_LOOKED) if row]
        if not whole and len(counts) > 1 and next(reader, None) is None:
            counts.pop()  # the last one is cut
    except csv.Error:
        return 0
    alike = len(set(counts)) == 1 and counts[0] > 1
    return counts[0] if alike else 0


def without_names(columns: Sequence[str]) -> str:
    """A hint to follow a message on columns, where their names look like cells of a row."""
    for name in columns:
        words = name.split()
        number = NUMBER.fullmatch(name.strip()) is not None
        if number or len(words) > 5 or (len(words) > 1 and name.rstrip()[-1] in ".!?"):
            return (
                " The first line is taken for the names of the columns, and "
                f"{errors.shown(name)} looks like a cell of a row: write a line of names above it."
            )
    return ""


def options(table: Table) -> dict[str, Any]:
    """A table as plain data: what the builder of `datasets` is told, its columns apart."""
    quoting = csv.QUOTE_MINIMAL if table.quoted else csv.QUOTE_NONE
    return {"sep": table.sep, "quoting": quoting, "keep_default_na": False, "na_values": [""]}


def features(table: Table) -> Any:
    """The columns as `datasets` names their types."""
    import datasets

    return datasets.Features({name: datasets.Value(kind) for name, kind in table.columns.items()})


def told(table: Table, suffix: str) -> Iterator[str]:
    """What the user should know of how a table is read."""
    if suffix == ".csv" and table.sep != ",":
        yield f"its columns are separated by {table.sep!r}"
    if not table.quoted:
        yield "its quotes are read as text, as they do not enclose cells"
    for column in table.truths:
        yield (
            f"true and false in {column!r} are texts: a template asks {{% if {column} == 'true' %}}"
        )


# --- going through a file -----------------------------------------------------------------


def _looked(path: Path, name: str, suffix: str) -> Table:
    with path.open("rb") as file:
        sep = separator(file, suffix)
    if suffix == ".csv":
        return _made(sep, True, _columns(path, name, sep, quoted=True)[0])
    try:
        plain: tuple[dict[str, str], int] | None = _columns(path, name, sep, quoted=False)
    except errors.DataError:
        plain = None
    try:
        columns, rows = _columns(path, name, sep, quoted=True)
        # Rows that quotes join, though each is a whole one: quotes are text there.
        if plain is None or plain[1] == rows:
            return _made(sep, True, columns)
    except errors.DataError:
        if plain is None:
            raise
    return _made(sep, False, plain[0])


def _made(sep: str, quoted: bool, kinds: dict[str, str]) -> Table:
    types = {column: "string" if kind == "truths" else kind for column, kind in kinds.items()}
    return Table(sep, quoted, types, [each for each, kind in kinds.items() if kind == "truths"])


def _columns(path: Path, name: str, sep: str, *, quoted: bool) -> tuple[dict[str, str], int]:
    """The type of each column, one of `TYPES` or string, and how many rows there are.

    Raises DataError.
    """
    rows = _rows(path, name, sep, quoted=quoted)
    _, header = next(rows)
    names = [each or f"Unnamed: {k}" for k, each in enumerate(header)]
    if twice := [each for each, count in Counter(names).items() if count > 1]:
        raise errors.DataError(
            f"{name}:1: two columns are called {errors.shown(twice[0])}. Rename one."
            f"{without_names(names)}"
        )
    kinds: list[str | None] = [None] * len(names)  # None: no cell yet that says anything
    missing, count = [False] * len(names), 0
    void: list[int] = []
    for line, row in rows:
        if len(row) != len(names):
            cells = f"{len(row)} cell{'s' * (len(row) != 1)}"
            raise errors.DataError(
                f"{name}:{line}: {cells}, expected {len(names)} as its first line has "
                f"({errors.inert(', '.join(names))}). A cell that holds {sep!r} goes in quotes."
            )
        count += 1
        if len(row) > 1 and not any(map(str.strip, row)):
            void.append(line)
        for k, cell in enumerate(row):
            if not cell:
                missing[k] = True
            elif kinds[k] != "string":
                kinds[k] = _kind(cell, kinds[k])
    if not count:
        raise errors.DataError(f"{name}: 0 rows, only the names of columns. Check how it was made.")
    if void:
        rest = f"; {len(void)} such rows" if len(void) > 1 else ""
        raise errors.DataError(
            f"{name}:{void[0]}: a row of empty cells alone, as spreadsheets leave below a table"
            f"{rest}. Delete {'these rows' if rest else 'it'}."
        )
    # The reader's whole numbers and truth values know no gaps.
    types = [
        "string" if kind is None or (gap and kind in ("int64", "bool")) else kind
        for kind, gap in zip(kinds, missing, strict=True)
    ]
    return dict(zip(names, types, strict=True)), count


def _kind(cell: str, known: str | None) -> str:
    """The type of a column with one more cell; `known`: that of those before."""
    candidates = TYPES if known is None else (known,)
    return next((kind for kind in candidates if _fits(cell, kind)), "string")


def _fits(cell: str, kind: str) -> bool:
    if kind == "int64":
        return WHOLE.fullmatch(cell) is not None
    if kind == "bool":
        return cell in ("True", "False")
    if kind == "truths":
        return cell in TRUTHS
    try:
        return repr(float(cell)) == cell and cell[-1].isdigit()
    except ValueError:
        return False


def _rows(path: Path, name: str, sep: str, *, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    """Each row that is not blank, and the line that it begins in."""
    before = csv.field_size_limit(LONGEST)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if quoted:
                reader = csv.reader(file, delimiter=sep, strict=True)
            else:
                reader = csv.reader(file, delimiter=sep, strict=True, quoting=csv.QUOTE_NONE)
            begins = 1
            try:
                for row in reader:
                    if row:
                        yield begins, row
                    begins = reader.line_num + 1
            except csv.Error as error:
                raise _broken(name, begins, reader.line_num, str(error)) from error
    finally:
        csv.field_size_limit(before)


def _broken(name: str, begins: int, line: int, said: str) -> errors.DataError:
    if "end of data" in said:
        return errors.DataError(
            f"{name}:{begins}: a quote opens in this row and none closes it. Was the copy cut? A "
            'quote that is text is written twice, "", in a cell in quotes.'
        )
    if "expected after" in said:
        row = f", in the row that begins in line {begins}" if begins != line else ""
        return errors.DataError(
            f"{name}:{line}: text after the quote that closes a cell{row}. Write a quote that is "
            'text twice, "", in a cell in quotes.'
        )
    return errors.DataError(f"{name}:{line}: {said}. Mend the row.")
