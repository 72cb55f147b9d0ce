"""Runs that are killed twenty times at random end as those that were never killed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from . import kills

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
    assert int(said[1]) >= 25


def test_kills_that_miss_the_saves_are_no_evidence() -> None:
    assert kills.Round(kills=20, in_a_save=5).code == 0
    assert kills.Round(kills=20, in_a_save=4).code == kills.NO_EVIDENCE
    assert kills.Round(kills=20, in_a_save=4, differing=1).code == 1


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


def test_what_an_earlier_kill_left_is_no_save_under_way(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / ".staged-mine-000001").mkdir(parents=True)
    left = kills.begun(tmp_path)
    assert not kills.saving(tmp_path, left)
    (folder / ".staged-mine-000002").mkdir()
    assert kills.saving(tmp_path, left)
    (folder / ".staged-mine-000002").rmdir()
    (folder / ".staged-mine-000001" / "weights.safetensors").touch()
    assert kills.saving(tmp_path, left)
