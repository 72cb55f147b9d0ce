"""The preview: the very examples that training sees first, shown so that every output tells."""

from __future__ import annotations

import io
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich.console
from conftest import sentences

from itune import configs, console, data, encoding, firsts, previewing, recipes

MOOD = """
task: classification
choices: [sad, glad]
prompts: ["{{ text }} How is it?", "Mood of: {{ text }}", "{{ text }}"]
response: "{{ choices[label] }}"
"""
ONE = MOOD.replace(', "Mood of: {{ text }}", "{{ text }}"', "")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows of very different lengths: a third of them too long for 64 tokens, whatever is cut."""
    draw, said = random.Random(5), sentences(400)
    rows = [
        {"text": said[k], "label": draw.randrange(2), "story": " ".join(said[k : k + 9])}
        for k in range(300)
    ]
    write(tmp_path / "moods.jsonl", rows)
    long = [{"text": row["text"], "label": 2 if k % 3 else 0} for k, row in enumerate(rows)]
    write(tmp_path / "long.jsonl", long)
    write(
        tmp_path / "stories.jsonl", [{"text": row["story"][: 20 + k]} for k, row in enumerate(rows)]
    )
    (tmp_path / "mood.yaml").write_text(MOOD)
    (tmp_path / "one.yaml").write_text(ONE)
    long_choice = f'choices: [sad, glad, "{" ".join(said[:9])}"]'
    (tmp_path / "long.yaml").write_text(MOOD.replace("choices: [sad, glad]", long_choice))
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def recipe_of(train: Any, model: Path, **training: Any) -> recipes.Recipe:
    settings = {"max_length": 64, "seed": 3, **training}
    return recipes.loads(
        json.dumps({"model": {"name": str(model)}, "data": {"train": train}, "training": settings})
    )


def encoder_of(recipe: recipes.Recipe) -> encoding.Encoder:
    return encoding.Encoder(configs.tokenizer(recipe.model.name or ""))


MIXTURES = {
    "one source": [{"path": "moods.jsonl", "template": "./one.yaml"}],
    "several wordings": [{"path": "moods.jsonl", "template": "./mood.yaml"}],
    "dropped rows": [{"path": "long.jsonl", "template": "./long.yaml"}],
    "plain text in pieces": [{"path": "stories.jsonl"}],
    "weights": [
        {"path": "moods.jsonl", "template": "./one.yaml", "weight": 0.05},
        {"path": "long.jsonl", "template": "./long.yaml", "weight": 2.3},
        {"path": "stories.jsonl", "weight": 0.1},
        {"path": "moods.jsonl", "template": "./mood.yaml", "weight": 0.001},
    ],
}


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("number", [7, 10_000])
def test_the_preview_is_what_training_sees_first(
    name: str, number: int, folder: Path, tiny_model_dir: Path
) -> None:
    recipe = recipe_of(MIXTURES[name], tiny_model_dir)
    encoder = encoder_of(recipe)
    corpus = data.corpus(recipe.data.train, encoder, recipe.training, visits=1)
    expected = [
        (
            corpus.ids[corpus.starts[i] : corpus.starts[i + 1]].tolist(),
            corpus.supervised[corpus.starts[i] : corpus.starts[i + 1]].tolist(),
            int(corpus.row[i]),
            int(corpus.wording[i]),
        )
        for i in corpus.epoch(0, recipe.training.seed)[:number]
    ]
    assert corpus.dropped or "dropped" not in name
    rows = [
        firsts.Rows(k, source, encoder, recipe.training)
        for k, source in enumerate(recipe.data.train)
    ]
    made = [
        (each.tokens.ids, each.tokens.supervised, each.row, each.wording)
        for _, each in firsts.first(rows, number)
    ]
    assert made == expected


def test_little_is_encoded_of_a_large_source(folder: Path, tiny_model_dir: Path) -> None:
    rows = [{"text": text, "label": 1} for text in sentences(2000)] * 10
    write(folder / "large.jsonl", rows)
    recipe = recipe_of(
        {"path": "large.jsonl", "template": "./mood.yaml", "weight": 0.5}, tiny_model_dir
    )
    source = firsts.Rows(0, recipe.data.train[0], encoder_of(recipe), recipe.training)
    assert len(firsts.first([source], 5)) == 5
    assert len(source.known) < 50
    table = previewing.tally([source])
    assert (table.looked, table.total) == (2000, 20_000)
    assert len(source.known) <= 2050


def test_the_table_counts_what_training_counts(folder: Path, tiny_model_dir: Path) -> None:
    recipe = recipe_of(
        [
            {"path": "long.jsonl", "template": "./long.yaml"},
            {"path": "stories.jsonl"},
            {"path": "moods.jsonl", "template": "./one.yaml"},
        ],
        tiny_model_dir,
        max_length=40,
    )
    encoder = encoder_of(recipe)
    corpus = data.corpus(recipe.data.train, encoder, recipe.training, visits=1)
    rows = [
        firsts.Rows(k, source, encoder, recipe.training)
        for k, source in enumerate(recipe.data.train)
    ]
    counted = previewing.counts(previewing.tally(rows))
    for name in ("rows", "tokens", "supervised", "truncated", "dropped"):
        assert counted[name] == getattr(corpus.counts, name), name
    assert counted["truncated"] > 0
    assert counted["dropped"] > 0
    assert (counted["sampled"], counted["of"]) == (900, 900)
    by_name = {(part["source"], part["wording"]): part for part in counted["sources"]}
    assert len(by_name) == 3 + 3  # and the three wordings of the first
    for k, source in enumerate(recipe.data.train):
        lengths = corpus.lengths[corpus.source == k]
        part = by_name[source.path, None]
        assert part["lengths"]["max"] == lengths.max()
        assert part["lengths"]["median"] == sorted(lengths)[math.ceil(len(lengths) / 2) - 1]
        assert sum(part["histogram"]["counts"]) == len(lengths)
    for wording in range(3):
        part = by_name["long.jsonl", wording]
        kept = (corpus.source == 0) & (corpus.wording == wording)
        assert part["rows"] == kept.sum()
        assert part["rows"] + part["dropped"] == 100
        assert part["tokens"] == corpus.lengths[kept].sum()


def hostile(folder: Path, tiny_model_dir: Path) -> Path:
    text = "a \x1b[31mred\x07 [bold]b[/bold] \u202eabc\u200b \u3164⟦x⟧ <s> two  spaces \nend \t"
    write(folder / "rows.jsonl", [{"text": text, "label": 1}])
    path = folder / "tune.yaml"
    path.write_text(
        f"model: {{name: {tiny_model_dir}}}\n"
        "data: {train: {path: rows.jsonl, template: ./one.yaml}}\n"
        "training: {max_length: 200}\n"
    )
    return path


SHOWN = (
    "⟪<s>⟫User:↵\n"
    "a \\x1b[31mred\\x07 [bold]b[/bold] \\u202eabc\\u200b \\u3164\\u27e6x\\u27e7 <s> "
    "two␣␣spaces␣↵\n"
    "end ⇥ How is it?↵\n"
    "Assistant:↵\n"
    "⟦glad⟪</s>⟫⟧\n"
)


def test_a_pipe_shows_by_signs_what_a_terminal_shows_by_colour(
    folder: Path, tiny_model_dir: Path, cli: Callable[..., Any]
) -> None:
    ended = cli("tune", "-r", hostile(folder, tiny_model_dir), "--preview", "1")
    assert ended.code == 0, ended.err
    assert SHOWN in ended.out
    assert "\x1b" not in ended.out + ended.err
    assert "example 1 of 1, rows.jsonl row 1, " in ended.out
    assert "training data, all 1 rows" in ended.out
    assert not (folder / "runs").exists()


def test_an_output_without_unicode_has_the_same_signs_in_ascii() -> None:
    written = io.BytesIO()
    screen = console.Screen()
    screen.out = rich.console.Console(file=io.TextIOWrapper(written, "ascii"), soft_wrap=True)
    prompt, answer = ("é  a\n", False, False), ("漢", True, False)
    stretches = [console.Stretch(*each) for each in (prompt, answer, ("</s>", True, True))]
    screen.example("example 1", stretches)
    screen.out.file.flush()
    assert written.getvalue() == b"example 1\n\\xe9__a\\n\n[[\\u6f22<<</s>>>]]\n\n"
    assert screen.bars([0, 5, 10]) == ".59"


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_terminal_of_80_columns_has_colours_or_with_no_color_none(
    no_color: str,
    folder: Path,
    tiny_model_dir: Path,
    cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"NO_COLOR": no_color, "COLUMNS": "80", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    shown = cli("tune", "-r", hostile(folder, tiny_model_dir), "--preview", "1").out
    escapes = re.compile("\x1b\\[([0-9;]*)m")
    # Bold, dim and reverse are no colours; 30 to 49 and 90 to 107 are.
    used = {int(part) for code in escapes.findall(shown) for part in code.split(";") if part}
    assert used == {0, 1, 2, 7} | (set() if no_color else {32})
    assert "glad" in shown
    assert no_color or ("\x1b[32mglad" in shown and "\x1b[7;32m⟪</s>⟫" in shown)
    bare = escapes.sub("", shown)
    assert "\x1b" not in bare
    assert "⟦glad⟪</s>⟫⟧" in bare
    assert max(map(len, bare.splitlines())) <= 80


def test_ids_are_shown_when_asked_for(
    folder: Path, tiny_model_dir: Path, cli: Callable[..., Any]
) -> None:
    path = hostile(folder, tiny_model_dir)
    asked = ("tune", "-r", path, "--preview", "1")
    shown = cli(*asked, "--verbose")
    assert shown.code == 0, shown.err
    result = json.loads(cli(*asked, "--json").out)
    (example,) = result["examples"]
    assert set(example) == {"text", "ids", "supervised", "source", "row", "wording"}
    assert (example["source"], example["row"], example["wording"]) == ("rows.jsonl", 0, 0)
    body = shown.out.split("\ntraining data")[0]
    assert [int(id_) for id_ in re.findall(r"#(\d+) ", body)] == example["ids"]
    assert re.search(r"↵#\d+ \n", body)
    assert cli(*asked).out.count("#") == 0


def test_a_piece_of_a_long_text_says_which_it_is(
    folder: Path, tiny_model_dir: Path, cli: Callable[..., Any]
) -> None:
    write(folder / "long.jsonl", [{"text": " ".join(sentences(20))}])
    line = ("pretrain", "-s", f"model.name={tiny_model_dir}", "-s", "data.train.path=long.jsonl")
    shown = cli(*line, "-s", "training.max_length=64", "--preview", "100")
    assert shown.code == 0, shown.err
    said = re.findall(r"long\.jsonl row 1, piece (\d+) of (\d+), (\d+) tokens", shown.out)
    count = len(said)
    assert count > 2
    assert sorted((int(k), int(of)) for k, of, _ in said) == [(k + 1, count) for k in range(count)]
    assert shown.out.count("⟪</s>⟫⟧") == 1  # the text ends once


def test_what_a_stretch_says_is_what_its_ids_say(tiny_model_dir: Path) -> None:
    encoder = encoding.Encoder(configs.tokenizer(str(tiny_model_dir)))
    ids = encoder.text_ids("é, 漢字 and 🙂 smile")
    draw = np.random.default_rng(1)
    cut = encoding.Tokens(ids, [bool(each) for each in draw.integers(0, 2, len(ids))])
    for single in (False, True):
        parts = previewing.stretches(encoder, cut, single=single)
        assert all(part.text for part in parts)
    whole = encoding.Tokens(ids, [False] * len(ids))
    assert [p.text for p in previewing.stretches(encoder, whole)] == ["é, 漢字 and 🙂 smile"]


def test_the_name_of_a_long_path_keeps_its_end() -> None:
    assert console.elided("data/a/very/long/path/train.jsonl", 14) == "...train.jsonl"
    assert len(console.elided("x" * 50, 24)) == 24


def test_what_the_command_would_refuse_is_told(
    folder: Path, tiny_model_dir: Path, cli: Callable[..., Any]
) -> None:
    def shown(train: str, command: str = "tune", *more: str) -> Any:
        text = f"model: {{name: {tiny_model_dir}}}\ndata: {{train: {train}}}\n"
        (folder / "asked.yaml").write_text(text + "training: {max_length: 64}\n")
        return cli(command, "-r", str(folder / "asked.yaml"), "--preview", "1", *more)

    lossy = shown("{path: long.jsonl, template: ./long.yaml}")
    assert lossy.code == 0, lossy.err
    assert "rows looked at would be left out, more than data.max_dropped (0.01)" in lossy.err
    texts = "{path: stories.jsonl, format: text}"
    refused = shown(texts)
    assert refused.code == 2
    assert "its rows are plain text" in refused.err
    streamed = shown("{path: stories.jsonl, format: text, streaming: true}", "pretrain")
    assert streamed.code == 0, streamed.err
    assert "of the first 300 rows read" in streamed.out
    both = shown(
        "[{path: stories.jsonl, streaming: true}, {path: stories.jsonl}]", "pretrain", "--json"
    )
    counts = json.loads(both.out)["counts"]
    assert counts["streamed"]
    assert [each["streamed"] for each in counts["sources"]] == [True, False]


def test_blank_lines_are_no_loss_and_what_columns_are_taken_for_is_said(
    folder: Path, tiny_model_dir: Path, cli: Callable[..., Any]
) -> None:
    (folder / "lines.txt").write_text("one line\n\n\nanother line\n\n", encoding="utf-8")
    write(folder / "asked.jsonl", [{"instruction": "say a", "output": "a", "text": "say a: a"}])
    for name in ("lines.txt", "asked.jsonl"):
        (folder / f"{name}.yaml").write_text(
            f"model: {{name: {json.dumps(str(tiny_model_dir))}}}\n"
            f"data: {{train: {{path: {name}}}}}\n"
        )
    lines = cli("pretrain", "-r", folder / "lines.txt.yaml", "--preview", "1")
    assert lines.code == 0, lines.err
    assert "would be left out" not in lines.err
    assert "3 of these rows are empty, such as blank lines, and left out." in lines.err
    assert "lines.txt: read as plain text (column text)" in lines.err
    asked = cli("tune", "-r", folder / "asked.jsonl.yaml", "--preview", "1", "--json")
    assert json.loads(asked.out)["counts"]["empty"] == 0
    asked = cli("tune", "-r", folder / "asked.jsonl.yaml", "--preview", "1")
    assert "read as instructions (columns instruction, input, output)" in asked.err
    none = cli("tune", "-r", folder / "asked.jsonl.yaml", "--preview", "0")
    assert none.code == 2
    assert not (folder / "runs").exists()
