"""Rows as flat arrays of tokens, and the order that an epoch sees them in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_tokenizer

from itune import (
    cases,
    configs,
    data,
    encoding,
    errors,
    formats,
    preparing,
    recipes,
    sources,
    starting,
    vocabularies,
)


def corpus(rows: int, *, dropped: int | None = None, weight: float = 1.0) -> data.Corpus:
    """One example a row, of two tokens; `dropped` is left out as one that did not fit."""
    kept = [row for row in range(rows) if row != dropped]
    made = data.from_tokens([encoding.Tokens([1, 2], [False, True])] * len(kept))
    source = recipes.Source(path="x.jsonl", weight=weight)
    changed = {"row": np.array(kept, np.int32), "sources": (source,), "wordings": (1,)}
    return data.Corpus(**{**vars(made), **changed})


def seen(made: data.Corpus, epoch: int = 0, seed: int = 1) -> list[int]:
    return made.row[made.epoch(epoch, seed)].tolist()


def test_an_epoch_has_every_row_once_in_an_order_of_its_own() -> None:
    made = corpus(500)
    orders = [tuple(seen(made, epoch, seed)) for epoch in (0, 1) for seed in (1, 2)]
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(500)) for order in orders)
    assert tuple(seen(made)) == orders[0]
    # Far from sorted: a row's place says nothing of its number.
    assert abs(np.corrcoef(orders[0], np.arange(500))[0, 1]) < 0.15


def test_a_row_that_is_dropped_moves_no_other() -> None:
    whole = seen(corpus(100))
    assert seen(corpus(100, dropped=37)) == [row for row in whole if row != 37]


def test_a_weight_says_how_often_a_row_is_seen() -> None:
    counts = np.bincount(seen(corpus(100, weight=2.5)))
    assert counts.sum() == 250
    assert set(counts.tolist()) == {2, 3}
    few = [frozenset(seen(corpus(100, weight=0.25), epoch)) for epoch in range(8)]
    assert all(len(each) == 25 for each in few)
    assert len(set(few)) == 8


def test_pieces_of_one_text_are_spread_over_the_epoch() -> None:
    made = data.from_tokens([encoding.Tokens([1, 2], [False, True])] * 400)
    source = recipes.Source(path="x.jsonl")
    row = np.repeat(np.arange(4, dtype=np.int32), 100)
    made = data.Corpus(**{**vars(made), "row": row, "sources": (source,), "wordings": (1,)})
    order = made.epoch(0, 1)
    assert sorted(order.tolist()) == list(range(400))
    assert len(set(made.row[order[:40]].tolist())) == 4


def test_where_a_prompt_is_cut_does_not_tell_its_answer(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    (tmp_path / "judge.yaml").write_text(
        "task: classification\nchoices: [bad, surprisingly wonderful]\n"
        'prompts: ["{{ text }} How is it?"]\nresponse: "{{ choices[label] }}"\n'
    )
    text = "the cat sees the red ball at home today and never finds some bread " * 4
    rows = [{"text": text, "label": label} for label in (0, 1)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder = encoding.Encoder(configs.tokenizer(str(tiny_tokenizer_dir)))
    source = recipes.Source(path="rows.jsonl", template="./judge.yaml")
    made = data.corpus([source], encoder, recipes.Training(max_length=80))
    prompts = [
        ids[: int(np.argmax(learnt))].tolist() for ids, learnt in map(made.example, range(2))
    ]
    assert made.truncated.tolist() == [1, 1]
    assert prompts[0] == prompts[1]


def test_a_long_instruction_is_cut_beside_a_long_answer(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    row = {
        "instruction": "find the old book " * 20,
        "input": "",
        "output": "the small dog likes it " * 12,
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    encoder = encoding.Encoder(configs.tokenizer(str(tiny_tokenizer_dir)))
    source = recipes.Source(path="rows.jsonl", template="alpaca")
    made = data.corpus([source], encoder, recipes.Training(max_length=250))
    ids, learnt = made.example(0)
    assert encoder.decode(ids[learnt].tolist()).strip() == row["output"].strip()
    assert len(ids) <= 250


@pytest.mark.parametrize(("side", "kept"), [("right", "begin"), ("left", "end")])
def test_a_prompt_is_cut_at_the_side_that_its_template_says(
    side: str, kept: str, tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    (tmp_path / "ask.yaml").write_text(
        f'task: qa\ntruncation_side: {side}\nprompts: ["{{{{ text }}}} What?"]\n'
        'response: "{{ said }}"\n'
    )
    row = {"text": f"begin {'the red ball ' * 40} end", "said": "ball"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    encoder = encoding.Encoder(configs.tokenizer(str(tiny_tokenizer_dir)))
    source = recipes.Source(path="rows.jsonl", template="./ask.yaml")
    made = data.corpus([source], encoder, recipes.Training(max_length=90))
    text = encoder.decode(made.example(0)[0].tolist())
    assert made.truncated.tolist() == [1]
    assert [word for word in ("begin", "end") if word in text] == [kept]
    assert "What?" in text


def test_control_strings_in_the_data_are_counted(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    texts = ["plain", "an end </s> within", "none", "<pad>"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    encoder = encoding.Encoder(configs.tokenizer(str(tiny_tokenizer_dir)))
    made = data.corpus([recipes.Source(path="rows.jsonl")], encoder, recipes.Training())
    assert made.counts.guarded == 2


WORDS = "the cat, a red ball and 12 dogs; some bread. "


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["columns", "template", "chat"])
def test_a_row_far_too_long_is_cut_as_if_it_were_tokenized_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, side: str
) -> None:
    rows: list[dict[str, Any]] = []
    for k, times in enumerate((1, 40, 90, 150, 400)):
        text = f"begin {k} " + WORDS * times + f"end {k}"
        turns = ["a cat?", "a ball", text, "bread", "so?", "no"]
        chat = [{"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(turns)]
        short = {"instruction": "say", "input": text, "output": "a ball"}
        rows.append({"messages": chat} if kind == "chat" else short)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "t.yaml").write_text(
        "task: generation\nprompts: ['{{ instruction }}: {{ input }} what?']\n"
        f"response: '{{{{ output }}}}'\ntruncation_side: {side}\n"
    )
    source = recipes.Source(
        path=str(tmp_path / "rows.jsonl"),
        template=str(tmp_path / "t.yaml") if kind == "template" else None,
    )
    encoder = encoding.Encoder(vocabularies.with_template(tiny_tokenizer()))
    made = []
    for window in (16, 1_000_000):
        monkeypatch.setattr("itune.fitting.WINDOW", window)
        job = preparing.Job(
            opened := sources.read(source),
            cases.reading(opened),
            encoder,
            recipes.Training(max_length=50),
            None,
        )
        made.append(job.examples(list(enumerate(rows))))
    assert made[0] == made[1]
    assert [each.truncated for each in made[0]] == [True] * 5
    assert all(len(each.tokens.ids) <= 50 for each in made[0])


def test_an_answer_far_too_long_is_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "a cat?", "completion": WORDS * n} for n in (1, 200)]
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": WORDS * 200}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "talk.jsonl").write_text(
        json.dumps({"messages": talk})
        + "\n"
        + json.dumps({"messages": [talk[0], talk[0] | {"role": "assistant"}]})
    )
    encoder = encoding.Encoder(vocabularies.with_template(tiny_tokenizer()))
    given = [recipes.Source(path=str(tmp_path / f"{name}.jsonl")) for name in ("rows", "talk")]
    made = data.corpus(given, encoder, recipes.Training(max_length=60))
    assert (made.counts.read, made.counts.rows, made.counts.too_long) == (4, 2, 2)


def test_a_row_of_many_megabytes_is_cut_in_little_memory(tmp_path: Path) -> None:
    """Row 37 of the bad inputs: no more memory than its text takes a few times over."""
    text = WORDS * 120_000  # 5 MB, a million tokens and more
    rows = [{"instruction": "say", "input": text, "output": "a ball"}]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "t.yaml").write_text(
        "task: generation\nprompts: ['{{ input | trim }} what?']\nresponse: '{{ output }}'\n"
    )
    opened = sources.read(recipes.Source(path=str(source), template=str(tmp_path / "t.yaml")))
    encoder = encoding.Encoder(vocabularies.with_template(tiny_tokenizer()))
    job = preparing.Job(
        opened, cases.reading(opened), encoder, recipes.Training(max_length=64), None
    )
    seen: list[int] = []
    whole = encoder.texts.ids
    encoder.texts.ids = lambda texts, **keys: (  # type: ignore[method-assign]
        seen.append(sum(map(len, texts))) or whole(texts, **keys)
    )
    (made,) = job.examples([(0, rows[0])])
    assert len(made.tokens.ids) <= 64
    assert sum(seen) < 100 * 64


def test_a_stream_is_told_to_be_looked_at_in_part(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a cat?", "completion": "a ball"}\n')
    recipe = recipes.loads(
        "model: {name: m}\n"
        f"data: {{train: {{path: {tmp_path / 'rows.jsonl'}, streaming: true}}}}\n"
    )
    encoder = encoding.Encoder(vocabularies.with_template(tiny_tokenizer()))
    made = data.corpus(recipe.data.train, encoder, recipes.Training(max_steps=1))
    said = [line for line in starting.counted(made, 1) if "a stream" in line]
    assert len(said) == 1
    assert "first 10,000 rows" in said[0]
    assert starting.for_the_record(recipe, made)["sources"][0]["looked_at_first"] == 10_000


def thoughts(path: Path) -> recipes.Source:
    answers = ["<think> a </think> b", "plain", "<mask> <think> c", "</s> <mask>"]
    rows = [{"prompt": f"say {k} <think>", "completion": each} for k, each in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipes.Source(path=str(path))


def thinking() -> encoding.Encoder:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    return encoding.Encoder(vocabularies.with_template(tokenizer))


def test_control_strings_of_answers_are_told_with_the_way_to_learn_them(tmp_path: Path) -> None:
    made = data.corpus([thoughts(tmp_path / "rows.jsonl")], thinking(), recipes.Training())
    assert (made.counts.guarded, made.counts.allowed) == (4, 0)
    assert made.reports[0].held == {"<mask>": 2, "<think>": 2, "</think>": 1}
    said = "\n".join(starting.counted(made, 1))
    assert "4 examples with control strings of the model, which stay text. To learn" in said
    assert "allow_control_tokens: ['<think>', '</think>', '<mask>']" in said


def test_answers_hold_the_control_tokens_that_their_source_allows(tmp_path: Path) -> None:
    given = thoughts(tmp_path / "rows.jsonl")
    allowing = given.model_copy(update={"allow_control_tokens": ("<think>", "</think>")})
    encoder = thinking()
    made = data.corpus([allowing, given], encoder, recipes.Training())
    names = [str(token) for token in encoder.tokenizer.convert_ids_to_tokens(np.asarray(made.ids))]
    assert (names.count("<think>"), names.count("</think>"), names.count("<mask>")) == (2, 1, 0)
    assert [(each.counts.allowed, each.held) for each in made.reports] == [
        (2, {"<mask>": 2}),
        (0, {"<mask>": 2, "<think>": 2, "</think>": 1}),
    ]
    assert "2 examples with control tokens in the answer" in "\n".join(starting.counted(made, 1))
    whole = made.example(0)
    plain = encoder.conversation(
        [formats.Message("user", "say 0 <think>"), formats.Message("assistant", "b")]
    )
    start = plain.supervised.index(True)
    assert whole[0][:start].tolist() == plain.ids[:start]


def test_an_evaluation_source_asks_as_it_trains(tmp_path: Path) -> None:
    turns = ["why?", "<think> a </think> b", "and?", "c"]
    row = [{"role": ("user", "assistant")[k % 2], "content": t} for k, t in enumerate(turns)]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": row}))
    source = recipes.Source(
        path=str(tmp_path / "rows.jsonl"), allow_control_tokens=("<think>", "</think>")
    )
    encoder = thinking()
    (task,) = data.tasks([source], encoder, max_prompt=200)
    ids, _ = data.corpus([source], encoder, recipes.Training()).example(0)
    assert tuple(ids[: len(task.cases[0].ids)].tolist()) == task.cases[0].ids
    (opened,) = encoder.tokenizer.convert_tokens_to_ids(["<think>"])
    assert opened in task.cases[0].ids


@pytest.mark.parametrize(
    ("name", "said"), [("<thimk>", "is no added token"), ("</s>", "is the tokenizer's eos_token")]
)
def test_a_control_token_that_cannot_be_allowed_is_told(
    tmp_path: Path, name: str, said: str
) -> None:
    given = thoughts(tmp_path / "rows.jsonl")
    with pytest.raises(
        errors.DataError, match=f"rows.jsonl: allow_control_tokens: '{name}' {said}"
    ):
        data.corpus(
            [given.model_copy(update={"allow_control_tokens": (name,)})],
            thinking(),
            recipes.Training(),
        )


def test_a_plain_text_has_no_answers_that_could_hold_control_tokens(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    source = recipes.Source(path=str(tmp_path / "rows.jsonl"), allow_control_tokens=("<think>",))
    with pytest.raises(errors.DataError, match="allow_control_tokens: its rows are plain text"):
        data.corpus([source], thinking(), recipes.Training())


@pytest.mark.parametrize(
    ("sources", "told"),
    [
        # 1 to 3 where 0 to 3 are allowed for: every label is one off, and none is out of range
        ([[1, 2, 3]], ["no row has the answer bad, of 4 choices", "choices[LABEL - 1]"]),
        ([[0, 0], [1, 2, 3]], []),
        ([[0, 0], [1, 2]], ["no row has the answer superb, of 4 choices"]),
    ],
)
def test_a_choice_that_no_row_has_as_its_answer_is_told(
    sources: list[list[int]], told: list[str], tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    (tmp_path / "judge.yaml").write_text(
        "task: classification\nchoices: [bad, fair, good, superb]\n"
        'prompts: ["{{ text }} How is it?"]\nresponse: "{{ choices[label] }}"\n'
    )
    given = []
    for k, labels in enumerate(sources):
        rows = [{"text": f"the red ball {label}", "label": label} for label in labels]
        path = tmp_path / f"{k}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given.append(recipes.Source(path=path.name, template="./judge.yaml"))
    encoder = encoding.Encoder(configs.tokenizer(str(tiny_tokenizer_dir)))
    made = data.corpus(given, encoder, recipes.Training())
    said = [line for line in starting.counted(made, 1) if "no row has" in line]
    assert len(said) == bool(told)
    assert all(part in said[0] for part in told)
    assert ("LABEL" in "".join(said)) == ("choices[LABEL - 1]" in told)


def test_held_out_rows_that_do_not_fit_are_told(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    rows = [{"prompt": "a cat?", "completion": "the red ball " * n} for n in (1, 1, 90)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipes.loads(
        "model: {name: m}\ntraining: {max_length: 64}\n"
        "data: {train: {path: rows.jsonl}, eval: {path: rows.jsonl}, allow_overlap: true}\n"
    )
    made = data.heldout(recipe, encoding.Encoder(configs.tokenizer(str(tiny_tokenizer_dir))))
    (said,) = starting.left_out(made)
    assert "rows.jsonl: the held-out loss is without 1 of 3 rows, 1 of them too long" in said
