"""`itune generate --chat` at a terminal of its own: typed lines, Ctrl-C, the end of the input."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# The slave becomes the terminal that controls the command, so that ^C is heard as a signal.
START = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.executable, [sys.executable, '-m', 'itune', *sys.argv[1:]])"
)
PATIENCE = 60.0


class Terminal:
    """A command at a terminal; `seen` is all that it has shown."""

    def __init__(self, *arguments: str, stdout: Any = None) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, *arguments],
            stdin=slave,
            stdout=slave if stdout is None else stdout,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, text: str, more: int = 0) -> str:
        """What is shown from now until a text, and so many signs after it."""
        begin, end = len(self.seen), time.monotonic() + PATIENCE
        while text not in self.seen[begin:] or (
            len(self.seen) < self.seen.index(text, begin) + len(text) + more
        ):
            assert time.monotonic() < end, f"no {text!r} in {self.seen[begin:]!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.master, 1).decode("utf-8", "replace")
                except OSError:  # how Linux tells that the other side is gone
                    raise AssertionError(f"ended before {text!r}: {self.seen!r}") from None
        return self.seen[begin:]

    def end(self) -> int:
        """The exit code; what was shown last is in `seen`."""
        try:
            while True:
                if select.select([self.master], [], [], PATIENCE)[0]:
                    part = os.read(self.master, 4096)
                    self.seen += part.decode("utf-8", "replace")
                    if not part:
                        break
        except OSError:
            pass
        return self.process.wait(PATIENCE)


Start = Callable[..., Terminal]


@pytest.fixture
def terminal() -> Iterator[Start]:
    """`terminal(*arguments)`: a command at one; what still runs is killed after the test."""
    started: list[Terminal] = []

    def start(*arguments: str, stdout: Any = None) -> Terminal:
        started.append(Terminal(*arguments, stdout=stdout))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()
        os.close(each.master)


@pytest.fixture
def options(tiny_model_dir: Path, tmp_path: Path) -> list[str]:
    """Of a talk with a model whose answer takes minutes: whoever does not stop it fails."""
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1 << 16}))
    length = [f"generation.{name}_new_tokens=60000" for name in ("min", "max")]
    return ["generate", "--chat", "--model", str(model), "-s", length[0], "-s", length[1]]


def messages(name: str) -> list[tuple[str, str]]:
    found = json.loads(Path(name).read_text())["messages"]
    return [(each["role"], each["content"]) for each in found]


@pytest.mark.slow
def test_a_talk_at_a_terminal(options: list[str], terminal: Start) -> None:
    talk = terminal(*options, "--system", "Be kind.")
    talk.until("> ")
    for question in ("hello", "more"):
        talk.type(f"{question}\n")
        talk.until(f"{question}\r\n", more=20)  # the answer is under way
        talk.type("\x03")
        talk.until("(stopped)\r\n> ")
    talk.type("/save talk.jsonl\n")
    talk.until("5 messages written to talk.jsonl\r\n> ")
    said = messages("talk.jsonl")
    assert [role for role, _ in said] == ["system", "user", "assistant", "user", "assistant"]
    assert [said[k][1] for k in (0, 1, 3)] == ["Be kind.", "hello", "more"]
    assert len(said[2][1]) > 0
    talk.type("half a question\x03")
    talk.until("/quit ends the talk\r\n> ")
    talk.type("/reset\n")
    talk.until("forgotten\r\n> ")
    talk.type("/save empty.jsonl\n")
    talk.until("1 messages written to empty.jsonl\r\n> ")
    assert messages("empty.jsonl") == [("system", "Be kind.")]
    talk.type("\x04")
    assert talk.end() == 0
    assert talk.seen.endswith("> \r\n")  # so that the shell goes on at a line of its own


@pytest.mark.slow
def test_answers_that_go_to_a_file_hold_no_prompt(options: list[str], terminal: Start) -> None:
    with Path("out.txt").open("w") as file:
        talk = terminal(*options, "-s", "generation.min_new_tokens=4", stdout=file)
        talk.until("> ")
        talk.type("hello\n")
        while not (said := Path("out.txt").read_text()):
            talk.process.poll()
            assert talk.process.returncode is None
        talk.type("\x03")
        talk.until("(stopped)\r\n> ")
        talk.type("/quit\n")
        assert talk.end() == 0
    assert not said.startswith("> ")
    assert not Path("out.txt").read_text().endswith("> ")
