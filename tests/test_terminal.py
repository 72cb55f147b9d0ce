"""Outputs that are closed, cut off or plain, and what lies where one stands: no traceback.

And texts that would drive a terminal: from nowhere do they reach it as they are.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from conftest import random_texts

from itune import console, errors, launching, runs

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


def test_nothing_is_said_of_the_cache_when_python_ends(tmp_path: Path) -> None:
    code = f"from itune import cache; from pathlib import Path; cache.use(Path('{tmp_path}/a/b'))"
    ended = shell(f'{sys.executable} -X dev -c "{code}"')
    assert (ended.returncode, ended.stderr) == (0, "")


def test_what_lies_where_one_stands_is_not_imported(tmp_path: Path) -> None:
    for name in ("json.py", "yaml.py", "accuracy/accuracy.py", "accuracy.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("open('marker', 'w')")
    ended = shell(f"{ITUNE} tune --recipe missing")
    assert ended.returncode == 2
    assert "no such recipe" in ended.stderr
    assert not (tmp_path / "marker").exists()


# --- texts of models and data ----------------------------------------------------------------

TEXTS = 5000


class Terminal(io.StringIO):
    """An output that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def still(text: str, kept: str = "\n") -> bool:
    """Whether nothing in a text drives a terminal or hides: but for what is kept, all is seen."""
    return all(each.isprintable() or each in kept for each in text)


def test_quoted_values_are_short_inert_and_on_one_line() -> None:
    for text in random_texts(TEXTS):
        assert errors.inert(text).isprintable()
        shown = errors.shown(text)
        assert shown.isprintable()
        assert len(shown) <= errors.LONGEST_VALUE
        assert still(console.inert(text), kept="\n\t")


def test_sentences_tables_and_warnings_hold_texts_as_they_are_spelt(
    capsys: pytest.CaptureFixture[str],
) -> None:
    screen, texts = console.Screen(), [text.replace("\t", " ") for text in random_texts(TEXTS)]
    for text in texts:
        screen.say(text)
    said = capsys.readouterr().err
    assert still(said)
    assert said == "".join(f"{console.inert(text)}\n" for text in texts), "no text is rich's markup"
    for text in texts:
        launching.warn(text)
    warned = capsys.readouterr().err
    assert warned.count("\n") == TEXTS
    assert still(warned)
    for start in range(0, TEXTS, 500):
        screen.table("t", ["a", "b"], [[text, text] for text in texts[start : start + 500]])
    out = capsys.readouterr().out
    assert still(out)
    assert "[bold red]" in out


def test_answers_are_inert_in_a_terminal_and_as_they_are_in_a_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = random_texts(TEXTS)
    for output, kept in ((Terminal(), False), (io.StringIO(), True)):
        monkeypatch.setattr(sys, "stdout", output)
        screen = console.Screen()
        for text in texts:
            screen.result(text)
            screen.part(text)
        written = output.getvalue()
        assert ("".join(f"{text}\n{text}" for text in texts) == written) is kept
        assert still(written, kept="\n\t") is not kept


def test_no_token_of_a_preview_drives_the_terminal_or_forges_a_sign(
    capsys: pytest.CaptureFixture[str],
) -> None:
    screen, texts = console.Screen(), [f"{text}\u27e6\u27eb" for text in random_texts(TEXTS)]
    for start in range(0, TEXTS, 100):
        part = texts[start : start + 100]
        screen.example(part[0], [console.Stretch(text, False, False, 7) for text in part])
        screen.shaded("t", [console.Shade(text, False, "dim", "") for text in part])
    out = capsys.readouterr().out
    assert still(out)
    titles = sum(console.inert(text).count("\u27e6") for text in texts[::100])
    assert out.count("\u27e6") == titles, "but in the titles no sign stands: nothing is learnt"


def test_lines_of_the_log_read_back_the_same_and_drive_no_terminal() -> None:
    for text in random_texts(TEXTS):
        line = runs.to_json({"text": text}, indent=1)
        kinds = {unicodedata.category(each) for each in line if each not in "\n\u200c\u200d"}
        assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}
        assert json.loads(line) == {"text": text}
    assert runs.to_json({"日本": "é \u3000😀"}) == '{"日本": "é \u3000😀"}'
