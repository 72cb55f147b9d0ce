"""Runs that are killed twenty times at random end as those that were never killed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kills.py")


@pytest.mark.slow
def test_runs_that_are_killed_end_as_if_they_had_not_been(tiny_model_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", "20", "--model", str(tiny_model_dir)],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.search(r"all: 20 kills, (\d+)% inside a save", done.stdout)
    assert said is not None, done.stdout


@pytest.mark.slow
def test_the_kills_find_what_is_wrong_with_a_naive_save(tiny_model_dir: Path) -> None:
    options = ["--kills", "6", "--seed", "7", "--recipe", "full", "--naive"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options, "--model", str(tiny_model_dir)],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    said = re.search(r"full: 6 kills, (\d+) inside a save, .* (\d+) stuck", done.stdout)
    assert said is not None, done.stdout
    assert int(said[1]) >= int(said[2]) > 0, "what is torn cannot be gone on from"
