"""Bad inputs, a folder each under tests/bad: what is said, the exit code, that nothing is lost.

A folder holds `expect.yaml` and whatever the command reads. Its keys: `arguments`, a list;
`exit_code`; `says`, regular expressions that standard error must match; and `python`, where given,
code that makes in the folder what cannot be kept as a file. A tiny model is there as `model`.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

CASES = sorted(path.parent for path in (ROOT / "tests" / "bad").glob("*/expect.yaml"))


def tree(folder: Path) -> dict[str, str]:
    """The digest of every file below a folder, by its name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def placed(case: Path, folder: Path, model: Path) -> dict[str, Any]:
    """The case's files laid out in a folder; what is expected of it."""
    shutil.copytree(case, folder, dirs_exist_ok=True)
    (folder / "expect.yaml").unlink()
    shutil.copytree(model, folder / "model")
    expected: dict[str, Any] = yaml.safe_load((case / "expect.yaml").read_text(encoding="utf-8"))
    known = {"arguments", "exit_code", "says", "python"}
    assert known - {"python"} <= set(expected) <= known
    if "python" in expected:
        subprocess.run([sys.executable, "-c", expected["python"]], cwd=folder, check=True)
    return expected


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_input_is_told(
    case: Path, tmp_path: Path, tiny_model_dir: Path, cli: Callable[..., Any]
) -> None:
    expected = placed(case, tmp_path, tiny_model_dir)
    before = tree(tmp_path)
    ended = cli(*expected["arguments"])
    assert ended.code == expected["exit_code"], ended.err
    for pattern in expected["says"]:
        assert re.search(pattern, ended.err), f"{pattern!r} is not in {ended.err!r}"
    assert "Traceback" not in ended.err
    after = tree(tmp_path)
    assert {name: after.get(name) for name in before} == before
