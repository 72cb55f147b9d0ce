"""What is looked at before the first step: each fault is found, named and, where it must, fatal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_tokenizer

from itune import doctor, encoding, errors, vocabularies

TEMPLATE = """
task: qa
prompts: ["Where is {{ who }} at this time of day?", "{{ who }} is where, at this time of day?"]
response: "{{ place }}"
"""
GOOD = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def recipe_file(folder: Path, model: Path, chat: str, rows: list[Any], **tokens: str) -> Path:
    """A recipe for one step on `rows` with a model that has this chat template."""
    shutil.copytree(model, folder / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat
    for name, value in tokens.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder / "model")
    (folder / "where.yaml").write_text(TEMPLATE)
    (folder / "talk.yaml").write_text("task: chat\n")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = "talk" if "messages" in rows[0] else "where"
    path = folder / "tune.yaml"
    path.write_text(
        "model: {name: ./model}\n"
        f"data: {{train: {{path: rows.jsonl, template: ./{name}.yaml}}}}\n"
        "training: {max_steps: 1, tokens_per_step: 200, max_length: 128}\n"
    )
    return path


PLACES = [{"who": f"person {k}", "place": f"in room {k}"} for k in range(6)]


def talk(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[k % 2], "content": c} for k, c in enumerate(contents)]}


WRONG = {
    "two beginning-of-sequence tokens": (
        GOOD.replace("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"),
        {},
    ),
    "a role's header within the loss": (
        GOOD.replace("{% if add_generation_prompt %}assistant: {% endif %}", ""),
        {},
    ),
    "have a role's header": (
        GOOD.replace("{{ m.role }}: ", "{{ '### Reply: ' if m.role == 'assistant' }}").replace(
            "{% if add_generation_prompt %}assistant: {% endif %}", ""
        ),
        {},
    ),
    "the text of the prompt within the loss": (
        GOOD.replace(
            "{{ m.role }}: {{ m.content }}",
            "{{ m.role }}: {{ m.content }}{{ ' to ' + messages[loop.index0 - 1].content "
            "if m.role == 'assistant' }}",
        ),
        {},
    ),
}


@pytest.mark.parametrize("said", WRONG)
def test_what_would_train_a_wrong_model_stops_the_run(
    said: str, tmp_path: Path, tiny_model_dir: Path, cli: Callable[..., Any]
) -> None:
    chat, tokens = WRONG[said]
    path = recipe_file(tmp_path, tiny_model_dir, chat, PLACES, **tokens)
    ended = cli("tune", "-r", path)
    assert ended.code == 2, ended.err
    assert said in ended.err
    assert "rows.jsonl: 12 of 12 examples looked at" in ended.err
    assert "the first in row 1. " in ended.err
    assert not (tmp_path / "runs/tune/log.jsonl").exists()


def test_an_answer_that_ends_where_generation_goes_on(
    tmp_path: Path, tiny_model_dir: Path, cli: Callable[..., Any]
) -> None:
    later = GOOD.replace("eos_token if", "('<mask>' if loop.index0 == 3 else eos_token) if")
    rows = [talk("a", "b"), talk("a", "b", "c", "d")]
    path = recipe_file(tmp_path, tiny_model_dir, later, rows)
    ended = cli("tune", "-r", path, "--preview", "1")
    assert ended.code == 2
    assert "1 of 2 examples looked at have an answer that ends with a token at which" in ended.err
    assert "first in row 2" in ended.err


WARNED = {
    "writes no stop token after an answer": (GOOD.replace("eos_token if", "'\\n' if"), {}, PLACES),
    "text of the chat template within the loss": (
        GOOD.replace("{{ m.content }}", "{{ '<think></think>' if m.role == 'assistant' }}"
                     "{{ m.content }}"),
        {},
        PLACES,
    ),
    "end with the pad token": (
        GOOD.replace("eos_token if", "pad_token if"), {}, PLACES,
    ),
    "an empty answer": (GOOD, {}, [talk("say nothing", ""), talk("hello", "there")]),
}  # fmt: skip


@pytest.mark.parametrize("said", WARNED)
def test_the_rest_is_said_and_the_run_goes_on(
    said: str, tmp_path: Path, tiny_model_dir: Path, cli: Callable[..., Any]
) -> None:
    chat, tokens, rows = WARNED[said]
    path = recipe_file(tmp_path, tiny_model_dir, chat, rows, **tokens)
    ended = cli("tune", "-r", path)
    assert ended.code == 0, ended.err
    warnings = [line for line in ended.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert said in warnings[0]
    assert "masks, roles and stop tokens are right" not in ended.err


def test_a_clean_bill_is_one_line(
    tmp_path: Path, tiny_model_dir: Path, cli: Callable[..., Any]
) -> None:
    rows = [talk("hi", "ho", "more", "less"), *[talk("hi", f"ho {k}") for k in range(99)]]
    path = recipe_file(tmp_path, tiny_model_dir, GOOD, rows, pad_token="</s>")
    ended = cli("tune", "-r", path)
    assert ended.code == 0, ended.err
    assert "checked 64 examples: masks, roles and stop tokens are right" in ended.err
    assert "warning" not in ended.err


@pytest.fixture
def encoder() -> encoding.Encoder:
    return encoding.Encoder(vocabularies.with_template(tiny_tokenizer()))


@pytest.mark.parametrize(
    ("ids", "supervised", "found"),
    [
        ([0, 70, 71, 1], "0011", set()),
        ([0, 70, 71, 1], "0000", {"masked"}),
        ([0, 70, 71, 1], "1000", {"masked"}),
        ([0, 70, 71, 72], "0011", {"stopless"}),
        ([0, 70, 71, 3], "0011", {"unheard"}),
        ([0, 70, 71, 72, 73, 1], "001011", {"stopless"}),
        ([0, 0, 70, 71, 1], "00011", {"bos"}),
        ([0, 70, 2, 1], "0011", {"pad"}),
        ([0, 70, 71, 1, 72, 1], "001111", {"twice"}),
    ],
)
def test_ids_and_masks(
    ids: list[int], supervised: str, found: set[str], encoder: encoding.Encoder
) -> None:
    tokens = encoding.Tokens(ids, [flag == "1" for flag in supervised])
    assert doctor.faults(tokens, [], encoder, {encoder.eos_id}) == found


def test_every_fault_says_how_to_mend_it() -> None:
    for fault in doctor.FAULTS.values():
        assert fault.what.startswith(("have ", "are ", "begin ", "end "))
        assert fault.cure.endswith(".")
    report = doctor.Report(2, (doctor.Finding("a. Do b.", True), doctor.Finding("c. Do d.", False)))
    with pytest.raises(errors.DataError, match=r"^a\. Do b\.$"):
        doctor.heed(report, print)
