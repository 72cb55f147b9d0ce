"""Solved examples before a question: the same for a row each time, and never its own answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_tokenizer
from test_commands import write

from itune import data, encoding, errors, recipes, shots, templates, vocabularies

PLACE = """
task: qa
system: Answer in few words.
prompts: ["{{ text }} Where?", "Find it. {{ text }}"]
response: "{{ answers.text[0] }}"
"""
CHAT = "task: chat\n"
RECIPE = """
model: {name: nothing}
data:
  train: [{path: train.jsonl, template: ./place.yaml}, {path: more.jsonl, template: ./place.yaml}]
  eval: {path: test.jsonl, template: ./place.yaml}
training: {seed: 3}
"""
LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


@pytest.fixture(scope="module")
def encoder() -> encoding.Encoder:
    return encoding.Encoder(vocabularies.with_template(tiny_tokenizer()))


def row(text: str, place: str = "home") -> dict[str, Any]:
    return {"text": text, "answers": {"text": [place]}}


@pytest.fixture
def recipe(tmp_path: Path) -> recipes.Recipe:
    write(tmp_path / "train.jsonl", [row(f"The cat {n} sits.", f"seat {n}") for n in range(12)])
    write(tmp_path / "more.jsonl", [row(f"The dog {n} runs.", f"way {n}") for n in range(8)])
    write(tmp_path / "test.jsonl", [row(f"The bird {n} flies.", f"tree {n}") for n in range(6)])
    (tmp_path / "place.yaml").write_text(PLACE)
    return recipes.loads(RECIPE)


def asked(
    recipe: recipes.Recipe, encoder: encoding.Encoder, count: int, *, room: int = 4000
) -> tuple[list[data.Case], list[str]]:
    said: list[str] = []
    tasks = data.tasks(recipe.data.eval, encoder, max_prompt=room)
    found = shots.add(tasks, recipe, encoder, count, max_prompt=room, say=said.append)
    return list(found[0].cases), said


def test_shots_are_turns_before_the_question_in_its_wording(
    recipe: recipes.Recipe, encoder: encoding.Encoder
) -> None:
    cases, said = asked(recipe, encoder, 3)
    plain = data.tasks(recipe.data.eval, encoder, max_prompt=4000)[0].cases
    assert said == []
    for case, question in zip(cases, plain, strict=True):
        roles = [message.role for message in case.messages]
        assert roles == ["system", *["user", "assistant"] * 3, "user"]
        assert case.messages[0] == question.messages[0]
        assert case.messages[-1] == question.messages[-1]
        assert case.references == question.references
        assert list(case.ids) == encoder.prompt(case.messages)
        for user, answer in zip(case.messages[1:-1:2], case.messages[2:-1:2], strict=True):
            begins = "The " if case.wording == 0 else "Find it. The "
            assert user.content.startswith(begins)
            number = "".join(filter(str.isdigit, user.content))
            kind = "seat" if "cat" in user.content else "way"
            assert answer.content == f"{kind} {number}"
    assert len({case.messages[1:-1] for case in cases}) > 6, "rows are shown unlike examples"
    told = {turn.content for case in cases for turn in case.messages}
    assert any("cat" in text for text in told)
    assert any("dog" in text for text in told), "all sources of the template are drawn from"


def test_the_shots_of_a_row_follow_from_seed_and_row_alone(
    recipe: recipes.Recipe, encoder: encoding.Encoder
) -> None:
    whole, _ = asked(recipe, encoder, 2)
    source = recipe.data.eval[0].model_copy(update={"limit": 2})
    some = recipe.model_copy(update={"data": recipe.data.model_copy(update={"eval": (source,)})})
    cases = asked(some, encoder, 2)[0]
    assert [case.row for case in cases] == [0, 0, 3, 3], "spread over the six rows"
    assert cases == whole[:2] + whole[6:8]
    assert [turn.content.removeprefix("Find it. ") for turn in whole[1].messages[2:-1:2]] == [
        turn.content for turn in whole[0].messages[2:-1:2]
    ], "both wordings of a row show the same answers"
    more = [case.messages[1:3] for case in asked(recipe, encoder, 3)[0]]
    assert more == [case.messages[1:3] for case in whole], "more shots begin with the same"
    training = recipe.training.model_copy(update={"seed": 4})
    other = recipe.model_copy(update={"training": training})
    assert asked(other, encoder, 2)[0] != whole


def test_a_row_that_overlaps_the_question_is_never_shown(
    tmp_path: Path, recipe: recipes.Recipe, encoder: encoding.Encoder
) -> None:
    write(tmp_path / "test.jsonl", [row("The cat 3 sits."), row(f"Here: {LONG}!")])
    near = [row(f"{LONG.upper()}, and so on"), row("The cat 3 sits.", "elsewhere")]
    far = [row(" ".join(LONG.split()[:12])), row("The cat 4 sits.")]
    write(tmp_path / "train.jsonl", near[:1])
    write(tmp_path / "more.jsonl", [*near[1:], *far])
    cases, _ = asked(recipe, encoder, 2)
    for case in cases:
        told = [turn.content for turn in case.messages[1:-1]]
        if "bird" in case.messages[-1].content or case.row == 0:
            assert not any("cat 3" in text for text in told)
        else:
            assert not any("ELEVEN TWELVE THIRTEEN" in text for text in told)
    with pytest.raises(errors.DataError, match=r"row 1: 3 of 4 rows found that do not overlap"):
        asked(recipe, encoder, 4)


def test_shots_that_do_not_fit_are_dropped_first_and_it_is_said_once(
    recipe: recipes.Recipe, encoder: encoding.Encoder
) -> None:
    whole, _ = asked(recipe, encoder, 4)
    room = max(len(case.ids) for case in whole) - 1
    cases, said = asked(recipe, encoder, 4, room=room)
    fewer = sum(len(case.messages) < 10 for case in cases)
    assert 0 < fewer <= 12
    assert said == [f"shots: {fewer} of 12 prompts have fewer than 4, as no more fit"]
    assert all(len(case.ids) <= room for case in cases)
    for case, full in zip(cases, whole, strict=True):
        kept = case.messages[:-1]
        assert full.messages[: len(kept)] == kept
        assert case.messages[-1] == full.messages[-1], "the question stays whole"


def test_a_task_without_training_rows_says_so(
    tmp_path: Path, recipe: recipes.Recipe, encoder: encoding.Encoder
) -> None:
    (tmp_path / "other.yaml").write_text(PLACE.replace("Where?", "Where then?"))
    sources = [each.model_copy(update={"template": "./other.yaml"}) for each in recipe.data.train]
    other = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"train": tuple(sources)})}
    )
    with pytest.raises(errors.DataError, match=r"no source of data.train has the template place"):
        asked(other, encoder, 1)


def test_a_conversation_is_shown_whole(tmp_path: Path, encoder: encoding.Encoder) -> None:
    (tmp_path / "talk.yaml").write_text(CHAT)
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "good day"},
    ]
    write(tmp_path / "a.jsonl", [{"messages": turns}])
    question = [{"role": "user", "content": "bye"}, {"role": "assistant", "content": "so long"}]
    write(tmp_path / "b.jsonl", [{"messages": question}])
    recipe = recipes.loads(
        "model: {name: nothing}\ndata:\n  train: {path: a.jsonl, template: ./talk.yaml}\n"
        "  eval: {path: b.jsonl, template: ./talk.yaml}\n"
    )
    (case,), _ = asked(recipe, encoder, 1)
    assert [turn.content for turn in case.messages] == ["hello", "good day", "bye"]
    assert templates.load("./talk.yaml").task == "chat"
