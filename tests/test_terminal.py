"""Outputs that are closed, cut off or plain, and what lies where one stands: no traceback."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ITUNE = f"{shlex.quote(sys.executable)} -m itune"
SCORE = f"{ITUNE} eval --predictions rows.jsonl --metric exact_match"


def shell(line: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    ended = shell(f"{ITUNE} tune --help | true")
    assert (ended.returncode, ended.stderr) == (141, "")


def test_a_closed_output_is_no_fault() -> None:
    ended = shell(f"{ITUNE} --version >&-")
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "code"),
    [
        (f"{SCORE} >&-", 0),
        (f"{SCORE} | true", 141),
        (f"{SCORE} 2>&-", 0),
        (f"{SCORE} </dev/null", 0),
    ],
)
def test_results_may_go_unread(line: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prediction": "\u00e9", "reference": "a"}\n' * 2)
    ended = shell(line, TERM="dumb", LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert ended.returncode == code
    assert "Traceback" not in ended.stderr
    assert "\x1b" not in ended.stdout + ended.stderr


def test_what_lies_where_one_stands_is_not_imported(tmp_path: Path) -> None:
    for name in ("json.py", "yaml.py", "accuracy/accuracy.py", "accuracy.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("open('marker', 'w')")
    ended = shell(f"{ITUNE} tune --recipe missing")
    assert ended.returncode == 2
    assert "no such recipe" in ended.stderr
    assert not (tmp_path / "marker").exists()
