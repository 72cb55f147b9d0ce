"""Owns the checks of the quick start's data: repeatable, nothing leaks, answers where they say."""

from __future__ import annotations

import json
import random
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "recipes" / "quickstart" / "make_data.py"
INPUTS = {
    "sentiment": ("text",),
    "translation": ("english",),
    "summary": ("text",),
    "questions": ("context", "question"),
    "couplet": ("topic",),
}
ROWS = 60
SEED = 17


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of one file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def generate(output: Path) -> Path:
    """Runs the script as a user does, in a process of its own."""
    command = [sys.executable, str(SCRIPT), "--output", str(output)]
    options = ["--rows", str(ROWS), "--seed", str(SEED)]
    subprocess.run([*command, *options], check=True, timeout=60)
    return output


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of a small run."""
    return generate(tmp_path_factory.mktemp("quickstart"))


def test_same_seed_same_bytes(made: Path, tmp_path: Path) -> None:
    again = generate(tmp_path)
    names = sorted(path.name for path in made.iterdir())
    splits = ("train", "dev", "test")
    expected = [f"{task}-{split}.jsonl" for task in INPUTS for split in splits]
    assert names == sorted([*expected, "pretrain.jsonl", "heldout.jsonl"])
    assert {name: (again / name).read_bytes() for name in names} == {
        name: (made / name).read_bytes() for name in names
    }


@pytest.mark.parametrize("task", INPUTS)
def test_no_prompt_is_in_two_splits(made: Path, task: str) -> None:
    splits = [rows_of(made / f"{task}-{split}.jsonl") for split in ("train", "dev", "test")]
    train, dev, test = (
        {tuple(row[column] for column in INPUTS[task]) for row in rows} for rows in splits
    )
    assert train
    assert dev
    assert test
    assert not train & dev
    assert not train & test
    assert not dev & test


def test_held_out_pairs_meet_in_no_training_text(made: Path) -> None:
    # The words are looked up here anew, in each row as written, not by the script's own filter.
    hold_out = runpy.run_path(str(SCRIPT))["hold_out"]
    kept = hold_out(random.Random(f"{SEED} pairs"), share=0.06)
    pairs = {(a.lower(), b.lower()) for split in kept.values() for a, b in split}
    assert pairs
    for path in [made / "pretrain.jsonl", *made.glob("*-train.jsonl")]:
        for row in rows_of(path):
            text = json.dumps(row, ensure_ascii=False).replace("\\n", " ").lower()
            found = set(re.findall(r"\w+", text))
            found |= {word.removesuffix("s") for word in found}
            met = [(a, b) for a, b in pairs if a in found and b in found]
            assert not met, f"{path.name}: {met} in {row}"


def test_answers_start_where_they_say(made: Path) -> None:
    for split in ("train", "dev", "test"):
        for row in rows_of(made / f"questions-{split}.jsonl"):
            for answer, start in zip(
                row["answers"]["text"], row["answers"]["answer_start"], strict=True
            ):
                assert row["context"][start : start + len(answer)] == answer
