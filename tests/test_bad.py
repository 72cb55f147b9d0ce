"""Bad inputs, a folder each under tests/bad: what is said, the exit code, that nothing is lost.

The number is the row of the table of bad inputs. A folder holds `expect.yaml` and whatever the
command reads. Its keys: `arguments`, a list; `exit_code`; `says`, regular expressions that standard
error must match. And where needed: `first`, a command that runs before; `python`, code that makes
in the folder what cannot be kept as a file; `environment`, variables; `absent`, files that must not
be there afterwards; `hidden`, words that must be in no output; `longest`, how many characters the
output may have. A tiny model is there as `model`.
"""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

CASES = sorted(path.parent for path in (ROOT / "tests" / "bad").glob("*/expect.yaml"))
NEEDED = {"arguments", "exit_code", "says"}
GOING_ON = {"mine/run.json", "mine/log.jsonl", "mine/.lock", "mine/recipe.yaml", "mine/report.html"}
OTHERS = {"first", "python", "environment", "absent", "hidden", "longest"}


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
    assert NEEDED <= set(expected) <= NEEDED | OTHERS
    return expected


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_input_is_told(
    case: Path,
    tmp_path: Path,
    tiny_model_dir: Path,
    cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = placed(case, tmp_path, tiny_model_dir)
    if "first" in expected:
        assert cli(*expected["first"]).code == 0
    exec(expected.get("python", ""), made := {})
    for name, value in expected.get("environment", {}).items():
        monkeypatch.setenv(name, value)
    before = tree(tmp_path)
    try:
        ended = cli(*expected["arguments"])
    finally:
        if "held" in made:  # a lock, or what is put back
            made["held"].close()
    assert ended.code == expected["exit_code"], ended.err
    for pattern in expected["says"]:
        assert re.search(pattern, ended.err), f"{pattern!r} is not in {ended.err!r}"
    assert "Traceback" not in ended.err
    assert not [each for each in expected.get("hidden", ()) if each in ended.out + ended.err]
    assert len(ended.out + ended.err) <= expected.get("longest", math.inf)
    assert not [each for each in expected.get("absent", ()) if Path(each).exists()]
    after = tree(tmp_path)
    for name, digest in before.items():
        if "first" in expected and name in GOING_ON:
            continue  # a run that is gone on with has a new state and log
        if "checkpoints/" in name:  # one that is broken is moved aside, as it is
            assert digest in after.values(), name
        else:
            assert after.get(name) == digest, name
