"""No credential of the environment is in any file that a command leaves, or in what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from faults.kills import prepare

CANARIES = {
    "HF_TOKEN": "hf_CanaryBirdInTheMine1234567890",
    "WANDB_API_KEY": "0123456789abcdefcanary0123456789abcdef01",
    "AWS_SECRET_ACCESS_KEY": "canary+in/the+mine+of+the+cloud",
    "OPENAI_API_KEY": "sk-canary-canary-canary-canary",
    "MY_PASSWORD": "the canary sings",
}
IN_AN_ADDRESS = "yellow-canary-of-the-address"
# What libraries do when a request fails: the address is in the message.
CRASH = f"""
import os, sys
from itune import cli, training
def fails(self, step):
    held = " ".join(os.environ[name] for name in {sorted(CANARIES)})
    raise ValueError("401 for https://me:{IN_AN_ADDRESS}@example.org/rows " + held)
training._Loop._step = fails
cli.main()
"""


def words(folder: Path) -> list[str]:
    """The files below a folder that hold a canary."""
    held = [value.encode() for value in (*CANARIES.values(), IN_AN_ADDRESS)]
    files = [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
    assert files
    return [str(p) for p in files if any(each in p.read_bytes() for each in held)]


@pytest.mark.slow
def test_no_credential_is_in_a_file_or_a_line(tmp_path: Path, tiny_model_dir: Path) -> None:
    import os

    prepare(tmp_path, tiny_model_dir)
    short = ["-r", "run.yaml", "-s", "training.max_steps=1", "-s", "training.row_losses=true"]
    text = ["-s", "data.train=[{path: text.jsonl}]"]
    url = f"https://me:{IN_AN_ADDRESS}@example.org/rows.jsonl"
    crash = tmp_path.parent / "crash.py"
    crash.write_text(CRASH)
    module = ["-m", "itune"]
    commands: dict[str, tuple[list[str], int]] = {
        "pretrain": ([*module, "pretrain", *short, *text, "-o", "runs/pretrain"], 0),
        "tune": ([*module, "tune", *short, "-o", "runs/tune"], 0),
        "two": ([*module, "tune", *short, "-o", "runs/two", "-p", "2"], 0),
        "eval": ([*module, "eval", "--run", "runs/tune", "--limit", "3"], 0),
        "generate": ([*module, "generate", "--run", "runs/tune", "Where?"], 0),
        "url of data": ([*module, "tune", *short, "-s", f"data.train=[{{path: '{url}'}}]"], 2),
        "url of a model": ([*module, "generate", "--model", url, "Where?"], 2),
        "value": ([*module, "tune", *short, "-s", f"model.name={CANARIES['MY_PASSWORD']!r}"], 2),
        "crash": ([str(crash), "tune", *short, "-o", "runs/crash"], 1),
    }
    for name, (line, code) in commands.items():
        done = subprocess.run(
            [sys.executable, *line], cwd=tmp_path, env={**os.environ, **CANARIES},
            capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == code, (name, done.stderr)
        for canary in (*CANARIES.values(), IN_AN_ADDRESS):
            assert canary not in done.stdout + done.stderr, name
    assert "Traceback" in done.stderr
    assert done.stderr.count("[secret]") >= len(CANARIES) + 1
    assert words(tmp_path) == []


def test_a_credential_given_as_an_option_is_not_quoted(
    cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_PASSWORD", CANARIES["MY_PASSWORD"])
    for given in (CANARIES["HF_TOKEN"], CANARIES["MY_PASSWORD"]):
        ended = cli("tune", f"--{given}")
        assert ended.code == 2
        assert "a secret on the command line" in ended.err
        assert given not in ended.err + ended.out


def test_a_short_or_harmless_value_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    from itune import errors

    monkeypatch.setenv("SOME_TOKEN", "yes")
    monkeypatch.setenv("USE_CLS_TOKENS", "classifier")
    assert errors.masked("yes, the classifier") == "yes, the classifier"
    monkeypatch.setenv("SOME_TOKEN", "yes-or-no")
    assert errors.masked("say yes-or-no") == "say [secret]"
