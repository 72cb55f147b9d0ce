"""`itune eval --predictions`: files of answers that other programs wrote, good and bad ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_commands import write

GOOD = '{"prediction": "x", "reference": "x"}\n'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (GOOD.encode() + '{"prediction": "é"}\n'.encode("latin-1"), "p.jsonl:2: not UTF-8, byte"),
        (GOOD.encode("utf-16"), "p.jsonl:1: UTF-16, expected UTF-8"),
        (b'{"prediction": "x", \n', "p.jsonl:1:"),
        (b'["x"]\n', "p.jsonl:1: expected an object {...}, found a list"),
        (b"", "p.jsonl: 0 rows"),
        (b'{"prediction": "x", "references": []}\n', "p.jsonl:1: references: there is none"),
        (
            b'{"prediction": "x", "reference": "x", "references": ["z"]}\n',
            "p.jsonl:1: reference: 'x' is none of `references`",
        ),
        (None, "p.jsonl: a folder"),
    ],
)
def test_a_file_that_cannot_be_scored_names_its_line(
    content: bytes | None, said: str, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    path = tmp_path / "p.jsonl"
    path.mkdir() if content is None else path.write_bytes(content)
    ended = cli("eval", "--predictions", "p.jsonl", "--metric", "accuracy")
    assert ended.code == 2
    assert ended.err.startswith(f"error: {said}"), ended.err
    assert ended.err.count("\n") == 1


def test_a_mark_of_utf8_before_the_first_line_is_no_fault(
    tmp_path: Path, cli: Callable[..., Any]
) -> None:
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    ended = cli("eval", "--predictions", "p.jsonl", "--metric", "accuracy", "--json")
    scores = json.loads(ended.out)["tasks"]["predictions"]["scores"]
    assert scores["accuracy"]["value"] == 1.0


@pytest.mark.parametrize("against", ["base", "folder"])
def test_a_file_is_compared_with_a_file_alone(
    against: str, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "p.jsonl").write_text(GOOD)
    asked = ("eval", "--predictions", "p.jsonl", "--metric", "accuracy", "--against", against)
    ended = cli(*asked)
    assert ended.code == 2
    assert f"--against: {against} is" in ended.err
    assert "predictions.jsonl" in ended.err


def test_a_row_that_changed_in_several_wordings_is_listed_once(
    tmp_path: Path, cli: Callable[..., Any]
) -> None:
    for name, texts in (("ours", ["yes", "yes", "yes"]), ("theirs", ["no", "no", "yes"])):
        rows = [
            {"row": row, "wording": wording, "prediction": text, "reference": "yes"}
            for row in (7, 8)
            for wording, text in enumerate(texts)
        ]
        write(tmp_path / f"{name}.jsonl", rows)
    asked = ("eval", "--predictions", "ours.jsonl", "--metric", "accuracy")
    found = json.loads(cli(*asked, "--against", "theirs.jsonl", "--json").out)
    changed = found["tasks"]["predictions"]["against"]["changed"]
    assert changed["count"] == {"better": 4, "worse": 0, "same": 2}, "all answers are counted"
    assert [row["row"] for row in changed["better"]] == [7, 8]


def test_it_is_said_of_which_scores_less_is_better(tmp_path: Path, cli: Callable[..., Any]) -> None:
    (tmp_path / "p.jsonl").write_text(GOOD)
    asked = ("eval", "--predictions", "p.jsonl", "--metric", "chrf")
    assert "less is better: ter\n" in cli(*asked, "--metric", "ter").out
    assert "less is better" not in cli(*asked).out
