"""Every recipe and prompt that ships loads, says what it shows, and fits the data it is for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Itune

from itune import recipes, templates

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
PROMPTS = sorted((ROOT / "prompts").rglob("*.yaml"))
Row = dict[str, Any]

# For each prompt a row as its data set has it, the answer, and what counts as right.
ROWS: dict[str, tuple[Row, str, list[str]]] = {
    "sentiment": ({"text": "A fine film.", "label": 1}, "positive", ["positive"]),
    "review": ({"text": "A fine film.", "label": 1}, "positive", ["positive"]),
    "review-beginning": ({"text": "A fine film.", "label": 1}, "positive", ["positive"]),
    "squad": (
        {
            "context": "Ada lived in London.",
            "question": "Where did Ada live?",
            "answers": {"text": ["London", "in London"], "answer_start": [13, 10]},
        },
        "London",
        ["London", "in London"],
    ),
    "summarize": (
        {"source": ["One sentence.", "Another."], "target": ["Short.", "Brief."]},
        "Short.",
        ["Short.", "Brief."],
    ),
    "translate-en-fr": ({"en": "A dog.", "fr": "Un chien."}, "Un chien.", ["Un chien."]),
    "translate-en-de": ({"en": "A dog.", "de": "Ein Hund."}, "Ein Hund.", ["Ein Hund."]),
    "alpaca": (
        {"instruction": "Add.", "input": "2 and 3", "output": "5"},
        "5",
        ["5"],
    ),
    "topic": (
        {"text": "The bank lowered its rates on Monday.", "label": 2},
        "business",
        ["business"],
    ),
    "entailment": (
        {"premise": "A boy kicks a ball.", "hypothesis": "Nobody is moving.", "label": 2},
        "no",
        ["no"],
    ),
    "open-qa": (
        {"question": "Which river flows through Vienna?", "answer": ["Danube", "the Danube"]},
        "Danube",
        ["Danube", "the Danube"],
    ),
    "translate": (
        {
            "source": "A dog.",
            "target": "Ein Hund.",
            "source_language": "English",
            "target_language": "German",
        },
        "Ein Hund.",
        ["Ein Hund."],
    ),
    "headline": (
        {"text": "It rained in the valley on Sunday.", "headline": "Rain at last"},
        "Rain at last",
        ["Rain at last"],
    ),
    "dialogue": (
        {"history": ["Is the shop open?", "Until six."], "reply": "Then I must hurry."},
        "Then I must hurry.",
        ["Then I must hurry."],
    ),
    "story": (
        {"beginning": "The lamp went out.", "continuation": "Mara lit it again."},
        "Mara lit it again.",
        ["Mara lit it again."],
    ),
    "poem": (
        {"topic": "snow", "poem": "White on the sill,\nwhite on the hill.", "form": "couplet"},
        "White on the sill,\nwhite on the hill.",
        ["White on the sill,\nwhite on the hill."],
    ),
    "maths": (
        {"question": "A pen costs 3. What do two cost?", "answer": "2 * 3 = 6\n#### 6"},
        "2 * 3 = 6\n#### 6",
        ["2 * 3 = 6\n#### 6"],
    ),
    "quickstart-couplet": (
        {"topic": "rain", "couplet": "Rain,\nhail.", "fitting": ["Rain,\nhail.", "Rain,\npain."]},
        "Rain,\nhail.",
        ["Rain,\nhail.", "Rain,\npain."],
    ),
    "quickstart-summary": (
        {"text": "Anna went. She came.", "summary": "Anna went."},
        "Anna went.",
        ["Anna went."],
    ),
    "quickstart-translation": (
        {"english": "A dog.", "french": "Un chien."},
        "Un chien.",
        ["Un chien."],
    ),
}
ROWS["quickstart-sentiment"] = ROWS["sentiment"]
ROWS["quickstart-questions"] = ROWS["squad"]
MESSAGES = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hello to you."},
]


def named(paths: list[Path]) -> list[Any]:
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


def command_of(path: Path) -> str:
    return "pretrain" if path.stem.startswith("pretrain") else "tune"


def sources(recipe: recipes.Recipe) -> list[recipes.Source]:
    return [*recipe.data.train, *recipe.data.eval]


def test_all_were_seen() -> None:
    for kind, paths in (("recipes", RECIPES), ("prompts", PROMPTS)):
        assert set(paths) == set(recipes.shipped(kind).rglob("*.yaml"))
        assert set(paths) == {path for path in (ROOT / kind).rglob("*.y*ml") if path.is_file()}
    assert len(RECIPES) >= 8
    assert len(PROMPTS) >= 8
    assert {path.stem for path in PROMPTS} == {*ROWS, "chat"}, "every prompt has a row above"


@pytest.mark.parametrize("path", named([*RECIPES, *PROMPTS]))
def test_the_first_comment_says_what_it_shows(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    first = lines[
        1 if path in RECIPES else 0
    ]  # a recipe's first line names its schema, for editors
    assert first.startswith("# ")
    assert "Shows: " in first


@pytest.mark.parametrize("path", named(RECIPES))
def test_recipe_loads_and_is_the_same_when_written_out(path: Path) -> None:
    command = command_of(path)
    recipe = recipes.load(path, command=command)
    again = recipes.loads(recipes.dump(recipe), path.as_posix())
    assert recipes.digest(again) == recipes.digest(recipe)
    for source in sources(recipe):
        if source.template is not None:
            templates.load(source.template)
        else:
            assert command == "pretrain"


@pytest.mark.parametrize("path", named([path for path in RECIPES if path.parent.name == "recipes"]))
def test_recipe_is_found_by_its_bare_name(path: Path) -> None:
    command = command_of(path)
    by_name = recipes.load(path.stem, command=command)
    assert recipes.digest(by_name) == recipes.digest(recipes.load(path, command=command))


@pytest.mark.parametrize("path", named(PROMPTS))
def test_prompt_renders_a_row_of_its_data(path: Path) -> None:
    template = templates.load(path)
    assert template.name == path.stem
    if template.task == "chat":
        assert not template.prompts
        return
    row, answer, gold = ROWS[path.stem]
    for wording in range(len(template.prompts)):
        prompt = template.prompt(row, wording)
        assert prompt == prompt.strip()
        assert "{" not in prompt
        assert "None" not in prompt
    assert template.answer(row) == answer
    assert template.gold(row) == gold
    assert template.columns() <= set(row)


@pytest.mark.slow
def test_reviews_from_scratch_take_two_steps_each_and_are_scored(itune: Itune) -> None:
    kinds = (("dull", "slow", "bad"), ("fine", "warm", "good"))
    rows = [
        {"text": f"A {kinds[n % 2][n % 3]} film, number {n}.", "label": n % 2} for n in range(100)
    ]
    for name, part in (("train", rows[:80]), ("test", rows[80:])):
        lines = "\n".join(map(json.dumps, part)) + "\n"
        Path(f"{name}.jsonl").write_text(lines, encoding="utf-8")
    folder = ROOT / "recipes" / "imdb-from-scratch"
    small = {
        "data.train.0.path": "train.jsonl",
        "data.eval.0.path": "test.jsonl",
        "training.max_steps": 2,
        "training.tokens_per_step": 256,
    }
    changes = [part for key, value in small.items() for part in ("--set", f"{key}={value}")]
    words = ("data.train.1.path=train.jsonl",)
    phrases = ("model.from_scratch.tokenizer.phrases=20", "output.dir=runs/phrases-pretrain")
    tuned = (*words, "model.name=runs/phrases-pretrain", "output.dir=runs/phrases")
    for command, more in (
        ("pretrain", ()),
        ("tune", words),
        ("pretrain", phrases),
        ("tune", tuned),
    ):
        sets = [part for change in more for part in ("--set", change)]
        done = itune(command, "--recipe", folder / f"{command}.yaml", *changes, *sets, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["steps"] == 2
    together = ("--set", "evaluation.ensemble=[runs/phrases]")
    done = itune("eval", "--run", "runs/imdb-from-scratch-tune", *together, "--json")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert scores["ensemble"] == ["runs/phrases"]
    assert scores["tasks"]["review"]["rows"] == 20
