"""What `itune generate` takes for a prompt, and writes: its own answers alone, and each once."""

from __future__ import annotations

import fcntl
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

Cli = Callable[..., Any]


@pytest.fixture
def line(tmp_path: Path, tiny_model_dir: Path) -> list[str]:
    prompts = ["What is here?", "two\u2028lines", "an \x85 odd one"]
    rows = "".join(json.dumps({"prompt": each}) + "\n" for each in prompts)
    (tmp_path / "in.jsonl").write_text(rows)
    few = ["-s", "generation.max_new_tokens=3"]
    return ["generate", "--model", str(tiny_model_dir), *few, "--input", "in.jsonl", "--output"]


@pytest.mark.parametrize("content", ["my notes\nline 2\n", '{"a": 1}\nnot json\n', "no line end"])
def test_a_file_of_something_else_is_left_alone(
    content: str, line: list[str], tmp_path: Path, cli: Cli
) -> None:
    (tmp_path / "notes.txt").write_text(content)
    ended = cli(*line, "notes.txt")
    assert ended.code == 2, ended.err
    assert "notes.txt" in ended.err
    assert (tmp_path / "notes.txt").read_text() == content


def test_answers_are_kept_whatever_their_characters(
    line: list[str], tmp_path: Path, cli: Cli
) -> None:
    assert cli(*line, "out.jsonl").code == 0
    whole = (tmp_path / "out.jsonl").read_bytes()
    again = cli(*line, "out.jsonl")
    assert "3 of 3 are answered already" in again.err
    (tmp_path / "out.jsonl").write_bytes(whole[: whole.index(b"\n") + 15])
    torn = cli(*line, "out.jsonl")
    assert "1 of 3 are answered already" in torn.err
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_a_file_has_its_answers_from_one_command_at_a_time(
    line: list[str], tmp_path: Path, cli: Cli
) -> None:
    with (tmp_path / "out.jsonl").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        ended = cli(*line, "out.jsonl")
        assert ended.code == 3, ended.err
        assert "another process writes its answers there" in ended.err
    assert (tmp_path / "out.jsonl").read_text() == ""
    assert cli(*line, "out.jsonl").code == 0
    assert len((tmp_path / "out.jsonl").read_bytes().splitlines()) == 3
    assert cli(*line, "new.jsonl", "-s", "generation.max_new_tokens=zero").code == 2
    assert not (tmp_path / "new.jsonl").exists()


def test_answers_to_other_prompts_are_not_taken_for_these(
    line: list[str], tmp_path: Path, cli: Cli
) -> None:
    assert cli(*line, "out.jsonl").code == 0
    whole = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "in.jsonl").write_text('{"prompt": "Another?"}\n{"prompt": "One more?"}\n')
    ended = cli(*line, "out.jsonl")
    assert ended.code == 2
    assert "line 1 is no answer to prompt 1" in ended.err
    assert (tmp_path / "out.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    "other",
    [
        ("-s", "generation.max_new_tokens=4"),
        ("-s", "generation.temperature=0.7"),
        ("--system", "Be brief."),
        ("--model", "another"),
    ],
)
def test_answers_of_another_model_or_settings_are_not_taken_for_these(
    other: tuple[str, str], line: list[str], tmp_path: Path, cli: Cli, tiny_model_dir: Path
) -> None:
    assert cli(*line, "out.jsonl").code == 0
    whole = (tmp_path / "out.jsonl").read_bytes()
    if "--model" in other:
        shutil.copytree(tiny_model_dir, tmp_path / "another")
        weights = load_file(tmp_path / "another" / "model.safetensors")
        save_file(
            {name: tensor + 1 for name, tensor in weights.items()},
            tmp_path / "another" / "model.safetensors",
            metadata={"format": "pt"},
        )
    ended = cli(*line, "out.jsonl", *other)
    assert ended.code == 2
    assert "line 1 is an answer of another model, other settings" in ended.err
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    begun = json.loads(whole.splitlines()[0])
    del begun["asked"]  # as others write it: taken at its word
    (tmp_path / "out.jsonl").write_text(json.dumps(begun) + "\n")
    assert "1 of 3 are answered already" in cli(*line, "out.jsonl").err


@pytest.mark.parametrize(
    ("output", "said"),
    [("nowhere/out.jsonl", "no folder"), (".", "a folder"), ("in.jsonl", "the input too")],
)
def test_an_output_that_could_not_be_written_is_refused_first(
    output: str, said: str, line: list[str], cli: Cli
) -> None:
    ended = cli(*line, output)
    assert ended.code == 2
    assert said in ended.err


def test_a_broken_input_is_told_with_its_line(line: list[str], tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "M\xfcnchen"}\n')
    ended = cli(*line, "out.jsonl")
    assert ended.code == 2
    assert "in.jsonl:2: not UTF-8, byte 0xfc" in ended.err


@pytest.mark.parametrize(
    "given",
    [
        ["a \udc9b31m"],
        ["a", "--system", "b \udcff"],
        ["--template", "sentiment", "--field", "text=\udc80"],
        ["--input", "in.jsonl", "--output", "out.jsonl"],
    ],
    ids=["prompt", "system", "field", "file"],
)
def test_a_prompt_that_is_no_text_is_told(
    given: list[str], tmp_path: Path, tiny_model_dir: Path, cli: Cli
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a \\ud83d b"}\n')
    ended = cli("generate", "--model", str(tiny_model_dir), *given)
    assert ended.code == 2, ended.err
    what = "U+D83D" if "in.jsonl" in given else "not UTF-8, byte 0x"
    assert what in ended.err


def test_standard_input_that_is_no_text_is_told(
    tiny_model_dir: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a \x9b31m"), "utf-8"))
    ended = cli("generate", "--model", str(tiny_model_dir), "-")
    assert ended.code == 2, ended.err
    assert "standard input: not UTF-8, byte 0x9b at 2" in ended.err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("temperature=0", "a number above 0, found 0. For the likeliest answer write do_sample"),
        ("temperature=hot", "a number above 0, found 'hot'"),
        ("top_k=1.5", "a whole number from 0, found 1.5"),
        ("num_beams=two", "a whole number from 1, found 'two'"),
        ("max_new_tokens=abc", "a whole number from 1, found 'abc'"),
        ("do_sample=no", "true or false, found 'no'"),
        ("top_p=2", "a number from 0 to 1, found 2"),
    ],
)
def test_a_setting_of_another_kind_is_told(
    given: str, said: str, tiny_model_dir: Path, cli: Cli
) -> None:
    ended = cli("generate", "--model", str(tiny_model_dir), "hello", "-s", f"generation.{given}")
    assert ended.code == 2
    assert f"generation.{given.partition('=')[0]}: expected {said}" in ended.err
