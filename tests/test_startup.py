"""Help comes at once: no command's help imports anything that takes a second."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Itune

COMMANDS = ("pretrain", "tune", "eval", "generate")
HEAVY = {"torch", "transformers", "datasets", "peft", "accelerate", "evaluate", "numpy", "pandas"}
IMPORTED = re.compile(r"^import time: +\d+ \| +\d+ \| *(\S+)$", re.MULTILINE)


def imports(*arguments: str, code: int = 0) -> tuple[set[str], str]:
    """First names of all that `itune ARGUMENTS` imports, and what it prints."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "itune", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr[-2000:]
    said = done.stdout if code == 0 else done.stderr
    return {name.split(".")[0] for name in IMPORTED.findall(done.stderr)}, said


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_heavy(command: str) -> None:
    names, text = imports(*filter(None, [command]), "--help")
    assert "typer" in names, "nothing was measured"
    assert not names & HEAVY
    assert "Usage" in text


def test_a_preview_does_without_torch(tmp_path: Path, tiny_model_dir: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "One?", "completion": "Two."}\n' * 3)
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{name: {tiny_model_dir}}}\ndata: {{train: [{{path: rows.jsonl}}]}}\n"
    )
    names, text = imports("tune", "-r", "recipe.yaml", "--preview", "1")
    assert "example 1 of 1" in text
    assert "transformers" in names
    assert "torch" not in names


@pytest.mark.parametrize(
    ("command", "given"),
    [
        ("tune", "model.name=./nix"),
        ("tune", "data.train.0.path=nix.jsonl"),
        ("eval", "data.eval.0.path=nix.jsonl"),
    ],
)
def test_what_is_not_there_is_refused_without_torch(
    command: str, given: str, tmp_path: Path, tiny_model_dir: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "One?", "completion": "Two."}\n' * 3)
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{name: {tiny_model_dir}}}\n"
        "data: {train: [{path: rows.jsonl}], eval: [{path: rows.jsonl}], allow_overlap: true}\n"
    )
    model = ("--model", str(tiny_model_dir)) if command == "eval" else ()
    names, text = imports(command, "-r", "recipe.yaml", *model, "-s", given, code=2)
    assert re.search(r"nix\S*: no such f(ile|older), in ", text)
    assert "torch" not in names


def test_there_are_four_commands_and_no_fifth(itune: Itune) -> None:
    text = itune("--help").stdout
    table = text[text.index("Commands") :]
    assert tuple(re.findall(r"^\W*([a-z]+)  ", table, re.MULTILINE)) == COMMANDS


def test_version_is_that_of_the_package(itune: Itune) -> None:
    import itune as package

    assert package.__version__ in itune("--version").stdout
