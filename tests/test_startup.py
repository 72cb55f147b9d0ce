"""Help comes at once: no command's help imports anything that takes a second."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from conftest import Itune

COMMANDS = ("pretrain", "tune", "eval", "generate")
HEAVY = {"torch", "transformers", "datasets", "peft", "accelerate", "evaluate", "numpy", "pandas"}
IMPORTED = re.compile(r"^import time: +\d+ \| +\d+ \| *(\S+)$", re.MULTILINE)


def imports(*arguments: str) -> tuple[set[str], str]:
    """First names of all that `itune ARGUMENTS` imports, and what it prints."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "itune", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {name.split(".")[0] for name in IMPORTED.findall(done.stderr)}, done.stdout


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_heavy(command: str) -> None:
    names, text = imports(*filter(None, [command]), "--help")
    assert "typer" in names, "nothing was measured"
    assert not names & HEAVY
    assert "Usage" in text


def test_there_are_four_commands_and_no_fifth(itune: Itune) -> None:
    text = itune("--help").stdout
    table = text[text.index("Commands") :]
    assert tuple(re.findall(r"^\W*([a-z]+)  ", table, re.MULTILINE)) == COMMANDS


def test_version_is_that_of_the_package(itune: Itune) -> None:
    import itune as package

    assert package.__version__ in itune("--version").stdout
