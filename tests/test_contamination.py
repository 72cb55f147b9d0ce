"""Held-out rows in the training data: found, refused, written down, and told beside each score."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from itune import contamination, errors, recipes, runs
from itune.metrics import words

MOOD = """
task: classification
choices: [sad, glad]
prompts: ["Read these words with care and then say what the mood of the writer of them may be: {{ text }}",
          "{{ text }} How is it?"]
response: "{{ choices[label] }}"
metrics: [accuracy]
"""  # noqa: E501
ASKED = """
task: qa
prompts: ["{{ about.context }} {{ question }}"]
response: "{{ answers[0] }}"
"""


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def sources(*paths: str, template: str | None = None) -> list[recipes.Source]:
    return [recipes.Source(path=path, template=template) for path in paths]


def found(found: contamination.Found) -> set[tuple[str, str, int, str, int]]:
    return {(p.kind, p.eval.path, p.eval.row, p.train.path, p.train.row) for p in found.pairs}


@pytest.fixture(autouse=True)
def prompts(tmp_path: Path) -> None:
    (tmp_path / "mood.yaml").write_text(MOOD)
    (tmp_path / "asked.yaml").write_text(ASKED)


def grams(text: str) -> set[tuple[str, ...]]:
    cut = words.words(text)
    return {tuple(cut[k : k + 13]) for k in range(len(cut) - 12)}


def test_what_is_found_is_what_comparing_all_with_all_finds(tmp_path: Path) -> None:
    draw = random.Random(4)

    def said(n: int) -> str:
        return " ".join(draw.choice("abcdefgh") for _ in range(n))

    passages = [said(draw.randrange(9, 17)) for _ in range(12)]

    def texts(n: int) -> list[str]:
        made = [f"{said(draw.randrange(20))} {draw.choice(passages)}. {said(9)}" for _ in range(n)]
        return [*made, *draw.sample(passages, 6)]

    held = {"a.jsonl": texts(60), "b.jsonl": texts(20)}
    train = {"x.jsonl": texts(2500), "y.jsonl": texts(90)}
    for path, rows in (held | train).items():
        write(tmp_path / path, [{"text": row} for row in rows])
    exact, ngram = set(), set()
    for path, rows in held.items():
        for k, row in enumerate(rows):
            same = [other for many in train.values() for other in many if other == row]
            shared = any(grams(row) & grams(other) for many in train.values() for other in many)
            if same:
                exact.add((path, k))
            elif shared:
                ngram.add((path, k))
    assert len(exact) >= 6
    assert len(ngram) >= 6
    assert len(exact | ngram) < 92
    result = contamination.find(sources(*train), sources(*held))
    for kind, expected in (("exact", exact), ("ngram", ngram)):
        assert {(p.eval.path, p.eval.row) for p in result.pairs if p.kind == kind} == expected
    assert result.counts() == {"exact": len(exact), "ngram": len(ngram)}
    assert result.counts(1)["exact"] == sum(path == "b.jsonl" for path, _ in exact)
    assert result.counts(0, range(5))["ngram"] == sum(p == "a.jsonl" and k < 5 for p, k in ngram)
    assert result.rows == (66, 26)
    for pair in result.pairs:
        ours, theirs = held[pair.eval.path][pair.eval.row], train[pair.train.path][pair.train.row]
        assert pair.words in " ".join(words.words(ours))
        assert pair.words in " ".join(words.words(theirs))
        assert pair.kind == "exact" or len(pair.words.split()) >= 13


def test_what_the_template_says_is_no_overlap_and_short_rows_need_be_the_same(
    tmp_path: Path,
) -> None:
    write(tmp_path / "x.jsonl", [{"text": "It rains.", "label": 0}, {"text": "Sun", "label": 1}])
    write(
        tmp_path / "a.jsonl",
        [
            {"text": "It  rains.", "label": 0},  # the same but for white space
            {"text": "It rains.", "label": 1},  # another answer
            {"text": "it rains.", "label": 0},
        ],
    )
    made = contamination.find(sources("x.jsonl", template="./mood.yaml"),
                              sources("a.jsonl", template="./mood.yaml"))  # fmt: skip
    assert found(made) == {("exact", "a.jsonl", 0, "x.jsonl", 0)}


def test_columns_inside_columns_and_conversations_and_scripts_without_spaces(
    tmp_path: Path,
) -> None:
    passage = "the old bridge over the river was closed for repairs in the spring of that year"
    row = {"about": {"context": f"In short, {passage}."}, "question": "Why?", "answers": ["rust"]}
    write(tmp_path / "a.jsonl", [row, {**row, "about": {"context": "Nothing of it."}}])
    turns = [("system", "Be kind."), ("user", passage.upper()), ("assistant", "I see.")]
    write(
        tmp_path / "x.jsonl",
        [{"messages": [{"role": role, "content": text} for role, text in turns]}],
    )
    (tmp_path / "chat.yaml").write_text("task: chat\n")
    made = contamination.find(sources("x.jsonl", template="./chat.yaml"),
                              sources("a.jsonl", template="./asked.yaml"))  # fmt: skip
    assert found(made) == {("ngram", "a.jsonl", 0, "x.jsonl", 0)}
    assert made.pairs[0].words == passage
    poem = "床前明月光疑是地上霜举头望明月低头思故乡"
    write(tmp_path / "b.jsonl", [{"text": f"他说,{poem[:13]}"}, {"text": f"他说,{poem[:12]}"}])
    write(tmp_path / "y.jsonl", [{"text": poem}])
    han = contamination.find(sources("y.jsonl"), sources("b.jsonl"))
    assert found(han) == {("ngram", "b.jsonl", 0, "y.jsonl", 0)}


def test_a_row_that_is_everywhere_names_a_few(tmp_path: Path) -> None:
    text = " ".join(f"word{k}" for k in range(40))
    write(tmp_path / "x.jsonl", [{"text": f"{text} {k}"} for k in range(3000)] + [{"text": "end"}])
    write(tmp_path / "a.jsonl", [{"text": f"{text} more"}, {"text": "end"}, {"text": text}])
    made = contamination.find(sources("x.jsonl"), sources("a.jsonl"))
    assert made.counts() == {"exact": 1, "ngram": 2}
    assert len(made.pairs) <= 1 + 2 * contamination.NAMED


def test_empty_lines_of_a_text_are_no_rows_to_compare(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"text": ""}, {"text": "the cat sat"}, {"text": " "}])
    write(tmp_path / "held.jsonl", [{"text": ""}, {"text": "a dog ran"}, {"text": "the cat sat"}])
    both = contamination.find(sources("train.jsonl"), sources("held.jsonl"))
    assert found(both) == {("exact", "held.jsonl", 2, "train.jsonl", 1)}


def test_nothing_to_compare(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", [{"text": "a b c"}])
    write(tmp_path / "a.jsonl", [{"text": "d"}])
    assert not contamination.find(sources("x.jsonl"), sources("a.jsonl")).pairs
    write(tmp_path / "z.jsonl", [{"text": "a"}, {"other": "b"}])
    with pytest.raises(errors.DataError, match=r"z\.jsonl:2: column 'text'"):
        contamination.find(sources("z.jsonl"), sources("a.jsonl"))


# --- as commands see it -------------------------------------------------------------------


def rows_of(*names: str) -> Iterator[dict[str, Any]]:
    for name in names:
        yield {"text": f"{name} looks out of the window and thinks of home.", "label": 1}


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A recipe with four held-out rows, two of which are trained on, and one a passage of one."""
    train = [
        *rows_of("Ada", "Bo", "Cy"),
        {"text": " ".join(f"w{k}" for k in range(15)), "label": 0},
    ]
    held = [
        *rows_of("Di", "Cy", "Ada"),
        {"text": " ".join(f"w{k}" for k in range(2, 19)), "label": 0},
    ]
    write(tmp_path / "train.jsonl", train)
    write(tmp_path / "eval.jsonl", held)
    path = tmp_path / "tune.yaml"
    path.write_text(
        f"model: {{name: {tiny_model_dir}}}\n"
        "data:\n"
        "  train: {path: train.jsonl, template: ./mood.yaml}\n"
        "  eval: {path: eval.jsonl, template: ./mood.yaml}\n"
        "training: {max_steps: 1, tokens_per_step: 300, max_length: 200}\n"
    )
    return path


def test_rows_on_both_sides_stop_a_tune_until_they_are_allowed(
    recipe: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    refused = cli("tune", "-r", recipe)
    assert refused.code == 2, refused.err
    assert (
        "error: data.eval: 2 of its 4 rows are in data.train too: eval.jsonl row 2 = train.jsonl "
        "row 3; eval.jsonl row 3 = train.jsonl row 1. " in refused.err
    )
    kept = tmp_path / "runs/tune/contamination.jsonl"
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [(line["kind"], line["eval"]["row"], line["train"]["row"]) for line in lines] == [
        ("exact", 1, 2),
        ("exact", 2, 0),
        ("ngram", 3, 3),
    ]
    assert lines[2]["words"] == " ".join(f"w{k}" for k in range(2, 15))
    allowed = cli("tune", "-r", recipe, "-s", "data.allow_overlap=true")
    assert allowed.code == 0, allowed.err
    assert "warning: data.eval: 2 of its 4 rows" in allowed.err
    assert "1 of 4 held-out rows share 13 words or more" in allowed.err


def test_each_score_says_how_many_of_its_rows_were_trained_on(
    recipe: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    assert cli("tune", "-r", recipe, "-s", "data.allow_overlap=true").code == 0
    shutil.move("train.jsonl", "away.jsonl")  # what training wrote down is enough
    scored = cli("eval", "--json")
    assert scored.code == 0, scored.err
    assert json.loads(scored.out)["tasks"]["mood"]["contamination"] == {"exact": 2, "ngram": 1}
    kept = json.loads((tmp_path / "runs/tune/evals/all/scores.json").read_text())
    assert kept["tasks"]["mood"]["contamination"] == {"exact": 2, "ngram": 1}
    limited = json.loads(cli("eval", "--json", "--limit", "2").out)  # rows 1 and 3 of 4
    assert limited["tasks"]["mood"]["contamination"] == {"exact": 1, "ngram": 0}
    shown = cli("eval").out
    assert "also in the training data" in shown
    assert "2 rows whole, 1 more by a passage of 13 words" in shown

    write(tmp_path / "other.jsonl", list(rows_of("Bo", "Eli")))
    other = ("eval", "--json", "-s", "data.eval.0.path=other.jsonl")
    unknown = cli(*other)
    assert json.loads(unknown.out)["tasks"]["mood"]["contamination"] is None
    assert "the training data cannot be read" in cli("eval", *other[2:]).err
    shutil.move("away.jsonl", "train.jsonl")
    known = json.loads(cli(*other).out)["tasks"]["mood"]
    assert known["contamination"] == {"exact": 1, "ngram": 0}


def test_it_is_looked_for_once_and_again_when_the_data_changes(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = recipes.load(recipe)
    with runs.opened(read, "tune") as (run, _):
        pass
    first = contamination.of_training(read, run)
    calls = []
    find = contamination._find
    monkeypatch.setattr(contamination, "_find", lambda *sides: calls.append(1) or find(*sides))
    assert contamination.of_training(read, run) == first
    assert not calls
    write(tmp_path / "train.jsonl", list(rows_of("Bo", "Eli", "Di")))
    second = contamination.of_training(read, run)
    assert calls
    assert second is not None
    assert second.counts() == {"exact": 1, "ngram": 0}


def test_data_apart_is_one_short_line(
    recipe: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    write(tmp_path / "eval.jsonl", list(rows_of("Di", "Eli")))
    ended = cli("tune", "-r", recipe)
    assert ended.code == 0, ended.err
    assert "contamination: none of 2 held-out rows was found in the training data\n" in ended.err
    assert "also in the training data" not in cli("eval").out
