"""Random changes of good files: each is taken, or refused in one of our own errors."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from itune import cases, errors, recipes, sources, templates

RECIPE = (ROOT / "recipes" / "quickstart" / "pretrain.yaml").read_bytes()
TEMPLATE = (ROOT / "prompts" / "sentiment.yaml").read_bytes()
ROWS = (
    b'{"text": "A fine film \\u00e9\\ud83d\\ude00.", "label": 1, "tags": ["a", {"b": null}]}\n'
    b'{"text": "Dull; \\"very\\" dull.", "label": 0, "tags": []}\n'
    b'{"text": "\xc3\xa9t\xc3\xa9", "label": -1.5e3, "tags": [true]}\n'
)
ROW = {"text": "A fine film.", "label": 1}
# Bytes that mean something to one of the readers, besides any byte at all.
SIGNS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b":",
    b"\n",
    b"\t",
    b"%}",
    b"{{",
    b"{%",
    b"\\u",
    b"&a ",
    b"*a",
]
SIGNS += [
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\0",
    b"NaN",
    b"-",
    b"|",
    b"!!",
    b"1e999",
    b"#",
    b"'",
    b" ",
]


def mutated(content: bytes, draw: random.Random) -> bytes:
    """The content with one to eight changes: a bit flipped, stretches put in or taken out."""
    made = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        at, length = draw.randrange(len(made) + 1), draw.choice((1, 1, 2, 7, 40))
        kind = draw.randrange(5)
        if kind == 0 and at < len(made):
            made[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            made[at:at] = draw.choice(SIGNS) * draw.choice((1, 1, 1, 3, 200))
        elif kind == 2:
            del made[at : at + length]
        elif kind == 3:
            made[at:at] = bytes(made[draw.randrange(len(made) + 1) :][:length])
        else:
            made[at : at + length] = draw.randbytes(length)
    return bytes(made)


def recipe(path: Path) -> None:
    recipes.load(path, command="tune")


def template(path: Path) -> None:
    made = templates.load(path)
    for wording in range(len(made.prompts)):
        made.prompt(ROW, wording)
    if made.response is not None:
        made.answer(ROW)
        made.gold(ROW)


def rows(path: Path) -> None:
    found = sources.read(recipes.Source(path=str(path), template="sentiment"))
    how = cases.reading(found, "tune")
    for index, row in enumerate(found.data):
        cases.placed(found, how, index, row, 0)


READERS = {"recipe": (RECIPE, recipe), "template": (TEMPLATE, template), "rows": (ROWS, rows)}


def tried(name: str, count: int, seed: int) -> int:
    """How many of `count` changed files were refused; what is no error of ours is raised."""
    content, read = READERS[name]
    draw, said = random.Random(seed), list[str]()
    path = Path("rows.jsonl" if name == "rows" else "changed.yaml")
    for number in range(count):
        path.write_bytes(changed := mutated(content, draw))
        try:
            read(path)
        except errors.UserError as error:
            said.append(str(error))
        except Exception as error:
            raise AssertionError(f"{name}, number {number} of seed {seed}: {changed!r}") from error
    assert all(each.strip() for each in said)
    assert all(line.isprintable() for each in said for line in each.split("\n"))
    return len(said)


@pytest.mark.parametrize("name", READERS)
def test_a_changed_file_is_read_or_refused(name: str) -> None:
    assert tried(name, 60, seed=1) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_ten_thousand_changed_files_are_read_or_refused(name: str) -> None:
    assert 0 < tried(name, 3334, seed=2) < 3334


def test_a_reader_that_lets_a_fault_through_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    reader: Callable[[Path], None] = lambda path: [][0]  # noqa: E731
    monkeypatch.setitem(READERS, "rows", (ROWS, reader))
    with pytest.raises(AssertionError, match="rows, number 0 of seed 1"):
        tried("rows", 1, seed=1)
