"""`itune generate`, spoken: text as it comes, and a talk through standard input."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_tokenizer

from itune import console, encoding, formats, speaking, stepping, vocabularies

Cli = Callable[..., Any]


@pytest.fixture
def talk(cli: Cli, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """`talk("hello\\n/quit\\n", *options)`: a talk through a pipe."""

    def run(lines: str, *options: str, tokens: int = 5) -> Any:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        few = ("-s", f"generation.max_new_tokens={tokens}", "--model", str(tiny_model_dir))
        return cli("generate", "--chat", *few, *options)

    return run


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_parts_of_an_answer_make_up_its_text() -> None:
    encoder = encoding.Encoder(vocabularies.with_template(tiny_tokenizer()))
    text = "héllo  wörld\n\n  日本語 🙂 end"
    parts: list[str] = []
    heard = speaking.Heard(encoder, parts.append)
    for token in [*encoder.text_ids(f"  {text} \n"), encoder.text_ids("é")[0]]:
        heard.told(0, token)
    assert "\ufffd" not in "".join(parts)
    assert len(parts) > 5
    assert heard.end() == "".join(parts) == f"{text} \n\ufffd"


def test_one_answer_is_streamed_to_a_terminal_inert(
    cli: Cli, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("generate", "--model", str(tiny_model_dir), "-s", "generation.max_new_tokens=20", "hi")
    whole = cli(*line)
    assert whole.code == 0, whole.err
    terminal = _Terminal()
    writes: list[str] = []
    plain = terminal.write
    terminal.write = lambda text: (writes.append(text), plain(text))[1]  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(
        encoding.Encoder, "decode", lambda self, ids: "".join(f"{id_}\x1b" for id_ in ids)
    )
    cli(*line)
    assert len(writes) > 10
    assert "\x1b" not in terminal.getvalue()


def test_a_talk_remembers_and_is_saved(talk: Cli, tmp_path: Path, tiny_model_dir: Path) -> None:
    ended = talk("hello\n\n//there\n/save talk.jsonl\n/save in.txt\n", "--system", "Be kind.")
    assert ended.code == 0, ended.err
    turns = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    roles = [turn["role"] for turn in turns]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert [turns[0]["content"], turns[3]["content"]] == ["Be kind.", "/there"]
    assert ended.out == f"{turns[2]['content']}\n{turns[4]['content']}\n"
    # The second answer is that to the history, encoded as in training.
    speaker = speaking.loaded(_asked(tiny_model_dir), {"max_new_tokens": 5}, lambda text: None)
    history = [formats.Message(turn["role"], turn["content"]) for turn in turns[:4]]
    assert speaker.answer(speaker.encoder.prompt(history), 0).text == turns[4]["content"]


def _asked(model: Path) -> Any:
    from itune import prompting

    return prompting.Asked(model=str(model))


def test_reset_forgets_and_quit_ends(talk: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    lines = "hello\n/reset\n/save a.jsonl\n/save mine.txt\n/rest\n/help\n/save\n/quit\nhello\n"
    ended = talk(lines)
    assert ended.code == 0
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"messages": []}
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert "mine.txt: is there already" in ended.err
    assert "/rest: no such command. Did you mean '/reset'?" in ended.err
    assert "/save: to which file?" in ended.err
    assert len(ended.out.splitlines()) >= 1
    assert ended.out == talk("hello\n").out  # nothing after /quit was asked


def test_ctrl_c_stops_the_answer_and_not_the_talk(
    talk: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = talk("hello\n", tokens=30).out
    step, steps = stepping.Stepper._step, 0

    def stopping(self: Any) -> None:
        nonlocal steps
        steps += 1
        if steps in (11, 14):
            signal.raise_signal(signal.SIGINT)
        step(self)

    monkeypatch.setattr(stepping.Stepper, "_step", stopping)
    ended = talk("hello\nmore\n/save talk.jsonl\n/reset\nhello\n", tokens=30)
    assert ended.code == 0, ended.err
    assert ended.err.count("(stopped)") == 2
    turns = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert whole.startswith(turns[1]["content"])
    assert len(turns[1]["content"]) < len(whole.strip())
    assert ended.out.endswith(whole)


def test_the_oldest_turns_of_a_long_talk_are_dropped_and_that_is_said(
    talk: Cli, tmp_path: Path
) -> None:
    long = "q" * 180
    ended = talk(f"first {long}\nsecond {long}\nthird {long}\n/save talk.jsonl\n")
    assert "the oldest 2 messages are forgotten" in ended.err
    turns = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert turns[0]["content"].startswith("second")
    over = talk(f"{'q' * 600}\nhello\n")
    assert over.code == 0
    assert "error: a prompt of" in over.err
    assert over.out == talk("hello\n").out


@pytest.mark.parametrize(
    ("options", "said"),
    [(("a prompt",), "with a prompt"), (("--json",), "--json"), (("-i", "x.jsonl"), "--input")],
)
def test_options_that_make_no_talk_are_refused(
    options: tuple[str, ...], said: str, talk: Cli
) -> None:
    ended = talk("", *options)
    assert ended.code == 2
    assert said in ended.err


def test_bad_rows_are_named_with_their_line(cli: Cli, tmp_path: Path, tiny_model_dir: Path) -> None:
    line = ("generate", "--model", str(tiny_model_dir), "-i", "in.jsonl", "-o", "out.jsonl")
    good = '{"prompt": "a"}\n'
    for bad, said in [
        ({"messages": [{"role": "nobody", "content": "x"}]}, "unknown role"),
        ({"messages": []}, "expected a list"),
        ({"prompt": "q" * 600}, "a prompt of"),
    ]:
        (tmp_path / "in.jsonl").write_text(good + json.dumps(bad) + "\n")
        ended = cli(*line)
        assert ended.code == 2
        assert "in.jsonl:2: " in ended.err
        assert said in ended.err
        assert not (tmp_path / "out.jsonl").exists()
    (tmp_path / "in.jsonl").write_text(good * 3)
    done = cli(*line, "-s", "generation.max_new_tokens=2")
    assert "answer 3/3" in done.err


def test_a_stop_while_a_part_is_shown_shows_it_once_and_before_it_says_so(
    talk: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, said = console.Screen.part, console.Screen.say
    order: list[str] = []

    def part(self: Any, text: str) -> None:
        shown(self, text)
        order.append(text)
        if len(order) == 3:
            signal.raise_signal(signal.SIGINT)

    def say(self: Any, text: str) -> None:
        order.append(text)
        said(self, text)

    monkeypatch.setattr(console.Screen, "part", part)
    monkeypatch.setattr(console.Screen, "say", say)
    ended = talk("hello\n/save talk.jsonl\n", tokens=30)
    assert ended.code == 0, ended.err
    turns = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert ended.out == turns[1]["content"] + "\n"
    stopped = next(k for k, text in enumerate(order) if "(stopped)" in text)
    assert "".join(order[:stopped]).rstrip("\n") == turns[1]["content"]


def test_a_line_that_is_no_text_is_told_and_the_talk_goes_on(talk: Cli) -> None:
    ended = talk("hi \udc9b31m\nhello\n/quit\n")
    assert ended.code == 0, ended.err
    assert "the question: not UTF-8, byte 0x9b at 3" in ended.err
    assert ended.out == talk("hello\n").out
    refused = talk("hello\n", "--system", "be \udcff")
    assert refused.code == 2
    assert "--system: not UTF-8, byte 0xff at 3" in refused.err


def test_nothing_is_imported_in_an_answer_where_ctrl_c_would_leave_it_half_there(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    script = (
        "import sys\n"
        "from itune import chatting, cli\n"
        "lines, seen = iter(['hello', None]), []\n"
        "chatting._line = lambda: (seen.append(set(sys.modules)), next(lines))[1]\n"
        "try:\n"
        "    cli.main()\n"
        "finally:\n"
        "    print(sorted(seen[1] - seen[0]), file=sys.stderr)\n"
    )
    asked = ("generate", "--chat", "--model", str(tiny_model_dir))
    ended = subprocess.run(
        [sys.executable, "-c", script, *asked, "-s", "generation.max_new_tokens=3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.stderr.splitlines()[-1] == "[]", ended.stderr
