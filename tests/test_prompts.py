"""What the shipped prompts say, word for word; and what each file tells of the rows it expects.

After a change that is meant: ITUNE_RENEW=1 python -m pytest tests/test_prompts.py, and read the
difference.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import shapes
from conftest import ROOT
from test_recipes_shipped import PROMPTS, ROWS

from itune import encoding, formats, templates

GOLDEN = ROOT / "tests" / "golden" / "prompts"
OURS = [path for path in PROMPTS if not path.stem.startswith("quickstart-")]
WORDED = [path for path in PROMPTS if path.stem != "chat"]
TASKS = {
    *("sentiment", "topic", "entailment", "squad", "open-qa", "translate", "summarize"),
    *("headline", "dialogue", "alpaca", "story", "poem", "maths"),
}


def rendered(path: Path) -> str:
    """A row of the prompt's data in each of its wordings, then its answers."""
    template = templates.load(path)
    row, *_ = ROWS[path.stem]
    parts = [f"--- row\n{json.dumps(row, ensure_ascii=False)}"]
    parts += [f"--- prompts.{k}\n{template.prompt(row, k)}" for k in range(len(template.prompts))]
    parts += [f"--- response\n{template.answer(row)}"]
    parts += [f"--- right\n{answer}" for answer in template.gold(row)]
    return "\n".join(parts) + "\n"


@pytest.mark.parametrize("path", WORDED, ids=lambda path: path.stem)
def test_prompt_reads_as_reviewed(path: Path) -> None:
    golden = GOLDEN / f"{path.stem}.txt"
    text = rendered(path)
    if os.environ.get("ITUNE_RENEW"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == {path.stem for path in WORDED}
    assert {path.stem for path in WORDED} >= TASKS


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_prompt_tells_its_rows_and_shows_one(path: Path) -> None:
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(line.startswith("# Columns: ") for line in head)
    template = templates.load(path)
    if template.task == "chat":
        return
    (example,) = [line for line in head if line.startswith("# Example: ")]
    row = json.loads(example.removeprefix("# Example: "))
    assert 3 <= len(template.prompts) <= 10
    texts = {template.prompt(row, k) for k in range(len(template.prompts))}
    assert len(texts) == len(template.prompts)
    assert template.answer(row) == template.gold(row)[0]


def test_values_are_the_same_for_all_rows(tmp_path: Path) -> None:
    text = (ROOT / "prompts" / "translate.yaml").read_text(encoding="utf-8")
    pair = "values: {source_language: English, target_language: German}\n"
    template = templates.loads(text + pair, "translate-de.yaml")
    row = {"source": "A dog.", "target": "Ein Hund."}
    assert template.prompt(row, 0) == "Translate from English to German: A dog."
    assert template.columns() == {"source", "target"}


@pytest.mark.parametrize("path", WORDED, ids=lambda path: path.stem)
def test_prompt_is_the_served_one_in_every_wording(path: Path) -> None:
    """What is trained on begins with the ids that a server makes of the same message."""
    template = templates.load(path)
    row, *_ = ROWS[path.stem]
    kinds, first = list(shapes.KINDS), WORDED.index(path)
    for number, shape in enumerate(shapes.SHAPES):
        one = encoding.Encoder(shapes.tokenizer(kinds[(first + number) % len(kinds)], shape))
        if shape == "parts":  # read otherwise by a server, see test_rendering
            continue
        for k in range(len(template.prompts)):
            messages = formats.templated(template, row, k).messages
            served = one.tokenizer.apply_chat_template(
                [{"role": m.role, "content": m.content} for m in messages[:-1]],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
            tokens = one.conversation(messages)
            assert tokens.ids[: len(served)] == list(served)
            assert tokens.supervised == [n >= len(served) for n in range(len(tokens.ids))]
            assert tokens.ids[-1] == one.stop_id
