"""The model card: read by the hub's own parser, true to the run, silent of the machine, inert."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from conftest import random_texts, sentences
from markdown_it import MarkdownIt

from itune import cards, contrasts, origins, recipes, runs

Cli = Callable[..., Any]
TASK = """
task: classification
choices: [sad, very glad]
prompts: ["{{ text }} How is it?"]
response: "{{ choices[label] }}"
metrics: [accuracy, f1]
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path) -> Path:
    rows = [{"text": text, "label": int("likes" in text)} for text in sentences(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ask.yaml").write_text(TASK)
    source = {"path": str(tmp_path / "rows.jsonl"), "template": str(tmp_path / "ask.yaml")}
    made = {
        "model": {"name": str(tiny_model_dir)},
        "adapter": {"peft_type": "lora", "r": 4, "target_modules": "all-linear"},
        "data": {"train": source, "eval": {**source, "limit": 6}, "allow_overlap": True},
        "training": {"max_steps": 2, "tokens_per_step": 400, "max_length": 100},
        "evaluation": {"against": "base"},
        "output": {"merge": True},
    }
    (tmp_path / "tune.yaml").write_text(json.dumps(made))
    return tmp_path / "tune.yaml"


def test_a_card_is_of_the_hubs_format_and_gets_its_scores_from_eval(
    recipe: Path, cli: Cli, tiny_model_dir: Path
) -> None:
    ended = cli("tune", "-r", recipe)
    assert ended.code == 0, ended.err
    run = Path("runs/tune")
    card = huggingface_hub.ModelCard.load(run / "model/README.md")
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.base_model is None  # a folder is none of the hub's models
    assert card.data.eval_results is None
    assert "nothing was scored" in card.text
    assert f"`./{tiny_model_dir.name}`" in card.text
    ended = cli("eval", "--json")
    assert ended.code == 0, ended.err
    scored = json.loads(ended.out)["tasks"]["ask"]
    for folder, library in (("model", "peft"), ("merged", "transformers")):
        text = (run / folder / "README.md").read_text()
        card = huggingface_hub.ModelCard(text)
        assert card.data.library_name == library
        found = {each.metric_type: each for each in card.data.eval_results}
        assert set(found) == {"accuracy", "f1"}
        assert found["accuracy"].metric_value == scored["scores"]["accuracy"]["value"]
        assert found["accuracy"].task_type == "text-classification"
        low = scored["scores"]["accuracy"]["low"]
        assert f"95% interval [{low:.3f}" in found["accuracy"].metric_name
        row = next(line for line in card.text.splitlines() if "| `accuracy` |" in line)
        base = scored["against"]["scores"]["accuracy"]
        assert f"{base['value']:.3f} [{base['low']:.3f}, {base['high']:.3f}]" in row
        assert f"{scored['contamination']['exact']} are in the training data whole" in card.text
        for path in (recipe.parent, tiny_model_dir.parent):
            assert str(path) not in text
        assert str(Path.home()) not in text


def made_by_hand(folder: Path, manifest: dict[str, Any], **sections: Any) -> runs.Run:
    """The folder of a finished run, without a model."""
    train = {"path": "rows.jsonl", **sections.pop("train", {})}
    recipe = {"model": {"name": "org/base"}, "data": {"train": train}, **sections}
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    made = {
        "command": "tune",
        "itune": "1",
        "python": "3",
        "versions": {"torch": "2"},
        "hardware": {"machine": "x", "cores": 1},
        "steps": 3,
        "tokens": 10,
        "seconds": 1.0,
        "loss": 0.5,
        "computing": "float32",
        **manifest,
    }
    (folder / "run.json").write_text(json.dumps(made))
    return runs.Run(folder)


def report(path: str, commit: str | None) -> dict[str, Any]:
    counts = {"rows": 1, "tokens": 2, "supervised": 1, "dropped": 0, "truncated": 0, "read": 1}
    source = {"path": path, "commit": commit, "rows": "ab" * 32, "counts": counts}
    return {"train": {**counts, "sources": [source]}}


def test_every_family_has_a_task_that_the_hub_knows(tmp_path: Path) -> None:
    tasks = {"causal": "text-generation", "seq2seq": "text-generation", "masked": "fill-mask"}
    for family, task in tasks.items():
        origin = origins.of(parsed(tmp_path, "org/base"), family)
        run = made_by_hand(tmp_path / family, {"origin": origin})
        card = huggingface_hub.ModelCard(cards.render(run, cards.WHOLE))
        assert card.data.pipeline_tag == task
        assert ("text2text-generation" in card.data.tags) is (family == "seq2seq")
        assert ("transformers serve" in card.text) is (family == "causal")


def test_what_is_on_the_hub_is_named_by_its_id_and_commit(tmp_path: Path) -> None:
    commit = "c" * 40
    run = made_by_hand(
        tmp_path / "a",
        {
            "origin": {**origins.of(parsed(tmp_path, "org/base"), "causal"), "commit": commit},
            "data": report("org/rows", "d" * 40),
        },
        train={"path": "org/rows"},
        adapter={"peft_type": "lora"},
    )
    card = huggingface_hub.ModelCard(cards.render(run, cards.ADAPTER))
    assert card.data.base_model == "org/base"
    assert card.data.base_model_relation == "adapter"
    assert card.data.datasets == ["org/rows"]
    assert f"from_pretrained('org/base', revision='{commit}')" in card.text
    assert "d" * 40 in card.text
    merged = huggingface_hub.ModelCard(cards.render(run, cards.MERGED))
    assert merged.data.base_model_relation == "finetune"
    assert "peft" not in merged.text.partition("## Scores")[0]


def parsed(folder: Path, name: str) -> recipes.Recipe:
    text = json.dumps({"model": {"name": name}, "data": {"train": {"path": "rows.jsonl"}}})
    return recipes.loads(text, str(folder / "x.yaml"))


def test_a_run_on_a_run_leads_to_the_hub_but_is_no_adapter_of_it(tmp_path: Path) -> None:
    first = origins.of(parsed(tmp_path, "org/base"), "causal")
    below = made_by_hand(tmp_path / "one", {"origin": {**first, "license": "mit"}})
    below.model_dir.mkdir()
    again = origins.of(parsed(tmp_path, str(below.dir)), "causal")
    assert (again["kind"], again["name"], again["root"]) == ("run", "one", "org/base")
    assert origins.of(parsed(tmp_path, str(below.model_dir)), "causal") == again
    run = made_by_hand(
        tmp_path / "two",
        {"origin": again},
        adapter={"peft_type": "lora"},
        model={"name": str(below.dir)},
    )
    card = huggingface_hub.ModelCard(cards.render(run, cards.ADAPTER))
    assert (card.data.base_model, card.data.license) == (None, "mit")
    assert huggingface_hub.ModelCard(cards.render(run, cards.MERGED)).data.base_model == "org/base"


@pytest.mark.parametrize(
    ("front", "license"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ("license: [mit, gpl]", None),
        ("license: '<b>mine</b>'", None),
        ("license: {broken", None),
        ("tags: [x]", None),
    ],
)
def test_a_license_is_the_bases_where_it_names_one(
    front: str, license: str | None, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/README.md").write_text(f"---\n{front}\n---\n\n# base\n")
    found = origins.of(parsed(tmp_path, str(tmp_path / "base")), "causal")
    assert found["license"] == license


HOSTILE = "a`|<img src=x onerror=y>]( http://z )\n\n# h\n---\n```\n<script>"


def tokens(text: str) -> Iterator[Any]:
    for each in MarkdownIt("commonmark").enable("table").parse(text):
        yield each
        yield from each.children or ()


def test_texts_of_data_and_models_are_no_markup(tmp_path: Path) -> None:
    def render(name: str, text: str) -> str:
        scores = {"m": {"value": 1.0, "low": 0.0, "high": 1.0, "signature": text}}
        gain = {"m": {"value": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}}
        task = {"data": text, "rows": 1, "scores": scores, "wordings": []}
        task["against"] = {"name": text, "scores": scores, "difference": gain}
        run = made_by_hand(
            tmp_path / name,
            {
                "origin": {**origins.of(parsed(tmp_path, "a/b"), "causal"), "kind": "folder"}
                | {"name": text},
                "data": report(text, None),
                "computing": text,
            },
            train={"path": text.replace("\n", " ")},
            generation={"stop_strings": [text]},
        )
        (run.dir / "evals/all").mkdir(parents=True)
        found = {"tasks": {text: task}}
        (run.dir / "evals/all/scores.json").write_text(json.dumps(found))
        return cards.render(run, cards.WHOLE)

    tame, hostile = render("tame", "x"), render("hostile", HOSTILE)
    bodies = [huggingface_hub.ModelCard(text).text for text in (tame, hostile)]
    kinds = [
        [each.type for each in tokens(body) if each.type not in ("text", "text_special")]
        for body in bodies
    ]
    assert kinds[0] == kinds[1]
    html = [each.content for each in tokens(bodies[1]) if each.type.startswith("html")]
    assert all("<details>" in each or "</details>" in each for each in html), html
    assert huggingface_hub.ModelCard(hostile).data.eval_results[0].dataset_name == HOSTILE


def test_a_number_that_is_none_is_told_as_such(tmp_path: Path) -> None:
    run = made_by_hand(tmp_path / "a", {"loss": "nan", "heldout_loss": "inf"})
    (run.dir / "evals/all").mkdir(parents=True)
    score = {"value": "nan", "low": 0.0, "high": 1.0, "signature": "m"}
    task = {"data": "rows.jsonl", "rows": 1, "scores": {"m": score}, "wordings": []}
    (run.dir / "evals/all/scores.json").write_text(json.dumps({"tasks": {"nan": task}}))
    card = huggingface_hub.ModelCard(cards.render(run, cards.WHOLE))
    assert "The loss was nan nats a token" in card.text
    assert "nan [0.000, 1.000]" in card.text
    assert card.data.eval_results is None


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/home/me/rows.jsonl", "rows.jsonl"),
        ("/data/x/*.parquet", "*.parquet"),
        ("~/rows.jsonl", "rows.jsonl"),
        ("../../secret/rows.jsonl", "rows.jsonl"),
        ("file:///home/me/rows.jsonl", "rows.jsonl"),
        ("data/rows.jsonl", "data/rows.jsonl"),
        ("org/name", "org/name"),
        ("https://host/rows.jsonl", "https://host/rows.jsonl"),
    ],
)
def test_paths_of_the_machine_stay_on_it(path: str, shown: str) -> None:
    assert origins.public(path) == shown


def test_no_random_text_is_markup_in_a_card() -> None:
    texts = random_texts(5000)
    for start in range(0, len(texts), 100):
        part = texts[start : start + 100]
        rows = "".join(f"| {cards.code(text)} | {cards.plain(text)} |\n" for text in part)
        lines = "".join(f"x {cards.plain(text)} {cards.code(text)} y\n\n" for text in part)
        body = f"| a | b |\n| --- | --- |\n{rows}\n{lines}"
        assert {each for each in body if not contrasts.seen(each)} <= {"\n"}
        parsed = MarkdownIt("commonmark").enable("table").parse(body)
        assert sum(each.type == "tr_open" for each in parsed) == 101
        assert sum(each.type == "td_open" for each in parsed) == 200
        assert sum(each.type == "paragraph_open" for each in parsed) == 100
        within = [each.type for line in parsed for each in line.children or ()]
        assert set(within) <= {"text", "text_special", "code_inline"}
        assert within.count("code_inline") == 200
