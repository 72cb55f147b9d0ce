"""`itune generate` with a template of choices: rows without a label get the likeliest."""

from __future__ import annotations

import csv
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from test_commands import world

Cli = Callable[..., Any]
FEW = ("-s", "generation.max_new_tokens=3")
RECIPE = """
model: {name: unused}
data:
  train: [{path: moods.jsonl, template: ./mood.yaml}]
  eval: [{path: moods.jsonl, template: ./mood.yaml}]
  allow_overlap: true
"""


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(params=["causal", "seq2seq", "masked"])
def model(request: pytest.FixtureRequest) -> str:
    family = "model" if request.param == "causal" else request.param
    return str(request.getfixturevalue(f"tiny_{family}_dir"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with rows to label as CSV, without their labels."""
    world(tmp_path)
    (tmp_path / "eval.yaml").write_text(RECIPE)
    with (tmp_path / "new.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text"])
        writer.writeheader()
        for number, row in enumerate(lines(tmp_path / "moods.jsonl")):
            writer.writerow({"id": f"{number:03}", "text": row["text"]})
    return tmp_path


def test_rows_get_the_label_that_eval_finds_for_them(folder: Path, model: str, cli: Cli) -> None:
    scored = cli("eval", "-r", "eval.yaml", "--model", model, "-o", "scored", "--wordings", "first")
    assert scored.code == 0, scored.err
    assert "kept nowhere" not in scored.err
    found = {line["row"]: line["prediction"] for line in lines(folder / "scored/predictions.jsonl")}
    ask = ("generate", "--model", model, "--template", "./mood.yaml")
    made = cli(*ask, "--input", "new.csv", "--output", "labelled.jsonl")
    assert made.code == 0, made.err
    assert "Generating" not in made.err, "a library's own bar"
    labelled = lines(folder / "labelled.jsonl")
    assert {int(line["input"]["id"]): line["response"] for line in labelled} == found
    assert labelled[7]["input"]["id"] == "007"
    for line in labelled:
        assert set(line["chances"]) == {"sad", "glad"}
        assert sum(line["chances"].values()) == pytest.approx(1)
        assert max(line["chances"], key=line["chances"].get) == line["response"]
    again = cli(*ask, "--input", "new.csv", "--output", "labelled.jsonl")
    assert "120 of 120 are answered already" in again.err
    one = cli(*ask, "--field", "text=Ada weeps.", "--json")
    alone = json.loads(one.out)
    among = next(line for line in labelled if line["input"]["text"] == "Ada weeps.")
    assert alone["response"] == among["response"]
    assert alone["chances"]["sad"] == pytest.approx(among["chances"]["sad"], rel=1e-4)
    assert cli(*ask, "--field", "text=Ada weeps.").out.strip() == among["response"]
    unkept = cli("eval", "-r", "eval.yaml", "--model", model, "--limit", "2")
    assert "answers and scores are kept nowhere; --output DIR keeps them" in unkept.err


def test_answers_are_written_where_that_is_asked_for(
    folder: Path, tiny_model_dir: Path, cli: Cli
) -> None:
    ask = ("generate", "--model", str(tiny_model_dir), "--template", "./mood.yaml", *FEW)
    ask = (*ask, "--field", "text=Ada weeps.")
    written = json.loads(cli(*ask, "-s", "evaluation.decide=generate", "--json").out)
    assert set(written) == {"prompt", "response", "stop", "tokens", "input"}
    for given in ("--explain", "--seed=3"):
        ended = cli(*ask, given)
        assert ended.code == 2
        assert "the likeliest of the choices of ./mood.yaml is picked" in ended.err
    ended = cli(*ask, "-s", "evaluation.decide=likeliest")
    assert ended.code == 2
    assert "unknown way to decide. Known: generate, likelihood" in ended.err


def test_an_encoder_that_is_asked_without_choices_is_refused(
    folder: Path, tiny_masked_dir: Path, cli: Cli
) -> None:
    ended = cli("generate", "--model", str(tiny_masked_dir), "Ada weeps.")
    assert ended.code == 2
    assert "itune generate --template NAME" in ended.err


@pytest.mark.parametrize("model", ["causal", "masked"], indirect=True)  # a T5 has no last position
def test_a_row_that_is_too_long_is_cut_as_in_eval(folder: Path, model: str, cli: Cli) -> None:
    long = {"text": "Ada weeps in the kitchen. " * 200, "label": 0}
    (folder / "moods.jsonl").write_text(json.dumps(long) + "\n")
    scored = cli("eval", "-r", "eval.yaml", "--model", model, "-o", "scored", "--wordings", "first")
    assert scored.code == 0, scored.err
    asked = ("--template", "./mood.yaml", "--input", "moods.jsonl", "--output", "labelled.jsonl")
    made = cli("generate", "--model", model, *asked)
    assert made.code == 0, made.err
    assert "1 of 1 prompts are cut to the" in made.err
    (line,) = lines(folder / "labelled.jsonl")
    (other,) = lines(folder / "scored/predictions.jsonl")
    assert line["response"] == other["prediction"]


def test_columns_are_called_as_the_recipe_of_the_run_calls_them(
    folder: Path, tiny_model_dir: Path, cli: Cli
) -> None:
    rows = [
        {"What was said": "Ada weeps.", "label": 0},
        {"What was said": "Bo dances.", "label": 1},
    ]
    (folder / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = "{path: said.jsonl, template: ./mood.yaml, rename: {What was said: text}}"
    (folder / "said.yaml").write_text(
        f"model: {{name: {tiny_model_dir}}}\ndata: {{train: {source}}}\n"
        "training: {max_steps: 1, heldout_rows: 0}\n"
    )
    assert cli("tune", "-r", "said.yaml").code == 0
    (folder / "new.csv").write_text("id,What was said\n1,Cy sighs.\n")
    ask = ("generate", "--template", "./mood.yaml")
    made = cli(*ask, "--input", "new.csv", "--output", "out.jsonl")
    assert made.code == 0, made.err
    (line,) = lines(folder / "out.jsonl")
    assert line["input"] == {"id": 1, "text": "Cy sighs."}
    one = cli(*ask, "--field", "What was said=Cy sighs.", "--json")
    assert json.loads(one.out)["chances"] == pytest.approx(line["chances"], rel=1e-4)


def test_what_generate_wrote_is_scored_by_eval(
    folder: Path, tiny_model_dir: Path, cli: Cli
) -> None:
    rows = [{"prompt": "Where is Ada?", "references": ["the hall", "hall"]}, {"prompt": "Bo?"}]
    (folder / "in.jsonl").write_text(json.dumps(rows[0]) + "\n")
    ask = ("generate", "--model", str(tiny_model_dir), *FEW, "--input")
    assert cli(*ask, "in.jsonl", "--output", "out.jsonl").code == 0
    (line,) = lines(folder / "out.jsonl")
    assert line["input"] == rows[0]
    scored = cli("eval", "--predictions", "out.jsonl", "--metric", "squad_f1", "--json")
    assert scored.code == 0, scored.err
    (folder / "in.jsonl").write_text(json.dumps(rows[1]) + "\n")
    assert cli(*ask, "in.jsonl", "--output", "bare.jsonl").code == 0
    (line,) = lines(folder / "bare.jsonl")
    assert "input" not in line, "nothing but the prompt was there"
    ended = cli("eval", "--predictions", "bare.jsonl", "--metric", "squad_f1")
    assert ended.code == 2
    assert "bare.jsonl:1: reference: expected a text, found nothing" in ended.err


def test_rows_of_parquet_keep_what_json_does_not_know_as_text(
    folder: Path, tiny_model_dir: Path, cli: Cli
) -> None:
    day = datetime.datetime(2024, 1, 11, 10, 30)
    rows = [{"prompt": "Where is Ada?", "day": day, "system": "Be brief."}]
    datasets.Dataset.from_list(rows).to_parquet(folder / "in.parquet")
    ask = ("generate", "--model", str(tiny_model_dir), *FEW)
    made = cli(*ask, "--input", "in.parquet", "--output", "out.jsonl")
    assert made.code == 0, made.err
    (line,) = lines(folder / "out.jsonl")
    assert line["input"]["day"] == "2024-01-11 10:30:00"
    told = cli(*ask, "Where is Ada?", "--system", "Be brief.", "--json")
    assert json.loads(told.out)["response"] == line["response"], "its own system message is heard"
    plain = cli(*ask, "Where is Ada?", "--json")
    assert json.loads(plain.out)["response"] != line["response"]


def test_each_line_of_a_text_file_is_a_prompt(folder: Path, tiny_model_dir: Path, cli: Cli) -> None:
    (folder / "in.txt").write_text("Where is Ada?\nWhere is Bo?\n")
    ask = ("generate", "--model", str(tiny_model_dir), *FEW, "--input", "in.txt")
    assert cli(*ask, "--output", "out.jsonl").code == 0
    assert [line["prompt"] for line in lines(folder / "out.jsonl")] == [
        "Where is Ada?",
        "Where is Bo?",
    ]


def test_another_seed_draws_another_answer(tiny_model_dir: Path, cli: Cli) -> None:
    ask = ("generate", "--model", str(tiny_model_dir), "Where is Ada?", "-s")
    drawn = (*ask, "generation.do_sample=true")
    answers = {cli(*drawn, "--seed", seed).out for seed in ("1", "2", "3")}
    assert len(answers) == 3
    assert cli(*drawn, "--seed", "2").out in answers
    ended = cli(*ask, "generation.max_new_tokens=3", "--seed", "2")
    assert ended.code == 2
    assert "--seed: the likeliest token is taken each time" in ended.err
