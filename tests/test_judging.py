"""`itune eval`: answers are kept and used again, compared in pairs, and shown in 80 columns."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_commands import world, write

from itune import (
    answering,
    commands,
    decoding,
    likelihoods,
    models,
    recipes,
    results,
    scoreboard,
    stepping,
)

RECIPE = """
model: {{name: {base}}}
data:
  train:
    - {{path: moods.jsonl, template: ./mood.yaml}}
    - {{path: places.jsonl, template: ./place.yaml}}
  eval:
    - {{path: moods.jsonl, template: ./mood.yaml, limit: 6}}
    - {{path: places.jsonl, template: ./place.yaml, limit: 5}}
  allow_overlap: true
training:
  {{max_steps: 2, tokens_per_step: 300, max_length: 96, heldout_rows: 0, learning_rate: 0.02}}
generation: {{max_new_tokens: 4}}
evaluation: {{resamples: 50}}
"""
LORA = "adapter: {peft_type: lora, r: 4, lora_alpha: 32, target_modules: all-linear}\n"
DATA = ("moods.jsonl", "places.jsonl", "text.jsonl", "mood.yaml", "place.yaml")

Cli = Callable[..., Any]


def with_runs(folder: Path, **recipes: str) -> Path:
    """A folder with the data, and a finished run of each recipe under its name."""
    before = Path.cwd()
    world(folder)
    os.chdir(folder)
    try:
        for name, recipe in recipes.items():
            Path(f"{name}.yaml").write_text(recipe)
            commands.train("tune", commands.Common(f"{name}.yaml", quiet=True), [])
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A folder with two finished runs: runs/lora, and runs/full without an adapter."""
    recipe = RECIPE.format(base=tiny_model_dir)
    return with_runs(tmp_path_factory.mktemp("judged"), full=recipe, lora=recipe + LORA)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it, where the test runs."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done so far: `load` for a model, `generate` and `choose` for each prompt."""
    seen: list[str] = []
    load, generate, choose = models.load, decoding.generate, likelihoods.choose

    def loading(*arguments: Any, **options: Any) -> Any:
        seen.append("load")
        return load(*arguments, **options)

    def generating(model: Any, encoder: Any, prompts: Any, *rest: Any, **options: Any) -> Any:
        seen.extend(["generate"] * len(prompts))
        return generate(model, encoder, prompts, *rest, **options)

    def choosing(model: Any, encoder: Any, prompts: Any, choices: Any, **options: Any) -> Any:
        seen.extend(["choose"] * len(prompts))
        return choose(model, encoder, prompts, choices, **options)

    monkeypatch.setattr(models, "load", loading)
    monkeypatch.setattr(decoding, "generate", generating)
    monkeypatch.setattr(likelihoods, "choose", choosing)
    return seen


def read(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        yield json.loads(line)


def folder_of(folder: Path, name: str) -> Path:
    """Where a run keeps what was asked so, of data that is other than its recipe's."""
    (found,) = (folder / "runs/lora/evals").glob(f"{name}-*")
    return found


def result(ended: Any) -> dict[str, Any]:
    assert ended.code == 0, ended.err
    found: dict[str, Any] = json.loads(ended.out)
    return found


NO_TEXT = ("-s", "data.eval=[{path: moods.jsonl, template: ./mood.yaml, limit: 6}]")
ALL = (
    "-s",
    "data.eval=[{path: moods.jsonl, template: ./mood.yaml, limit: 6}, "
    "{path: places.jsonl, template: ./place.yaml, limit: 5}, {path: text.jsonl, limit: 4}]",
)
PLACES = ("-s", "data.eval=[{path: places.jsonl, template: ./place.yaml, limit: 5}]")


def test_sources_of_one_name_are_each_scored(folder: Path, cli: Cli) -> None:
    """Four files of one template, of unequal sizes, and two of plain text with one name."""
    given = []
    for place, rows in (("", 3), ("en/", 2), ("de/", 4), ("fr/", 1)):
        (folder / place).mkdir(exist_ok=True)
        if place:
            shutil.copy(folder / "moods.jsonl", folder / place)
        given.append(f"{{path: {place}moods.jsonl, template: ./mood.yaml, limit: {rows}}}")
    for place, rows in (("", 2), ("en/", 3)):
        if place:
            shutil.copy(folder / "text.jsonl", folder / place)
        given.append(f"{{path: {place}text.jsonl, limit: {rows}}}")
    asked = ("-s", f"data.eval=[{', '.join(given)}]")
    tasks = result(cli("eval", "--run", "runs/lora", *asked, "--json"))["tasks"]
    assert {name: found["rows"] for name, found in tasks.items()} == {
        "mood": 3, "mood:moods": 2, "mood:de-moods": 4, "mood:fr-moods": 1,
        "text": 2, "text:text": 3,
    }  # fmt: skip


# --- kept answers ---


def test_a_second_metric_costs_no_answer(folder: Path, cli: Cli, asked: list[str]) -> None:
    run = ("eval", "--run", "runs/lora", *PLACES)
    first = result(cli(*run, "--json"))
    assert asked == ["load", *["generate"] * 5]
    asked.clear()
    again = cli(*run, "--metric", "chrf", "--metric", "squad")
    assert again.code == 0, again.err
    assert asked == []
    place = folder_of(folder, "path-places.jsonl")
    assert place.name.startswith("path-places.jsonl-template-place.yaml-")
    kept_in = place.relative_to(folder) / "predictions.jsonl"
    assert f"place: 5 of 5 answers are kept in {kept_in}" in again.err
    kept = json.loads((place / "scores.json").read_text())["tasks"]["place"]
    assert set(kept["scores"]) == {"chrf", "squad_em", "squad_f1"}
    assert kept["scores"]["squad_f1"] == first["tasks"]["place"]["scores"]["squad_f1"]
    assert json.loads((place / "scores.old-1.json").read_text()) == first
    cli(*run, "--metric", "chrf", "--metric", "squad")
    assert not (place / "scores.old-2.json").exists(), "the same scores again"


@pytest.mark.parametrize("option", ["generation.max_new_tokens=3", "evaluation.decide=generate"])
def test_other_settings_ask_anew(option: str, folder: Path, cli: Cli, asked: list[str]) -> None:
    run = ("eval", "--run", "runs/lora", "-o", "kept", *NO_TEXT, "--metric", "accuracy")
    result(cli(*run, "--json"))
    before = list(read(folder / "kept/predictions.jsonl"))
    marks = json.loads((folder / "kept/asked.json").read_text())
    asked.clear()
    other = cli(*run, "-s", option)
    assert len(asked) == 1 + 12
    changed = "generation" if "generation" in option else "decide"
    assert f"answers by another {changed}; asked anew" in other.err
    assert "those are kept in kept/predictions.old-1.jsonl" in other.err
    lines = list(read(folder / "kept/predictions.jsonl"))
    assert len(lines) == 12
    assert list(read(folder / "kept/predictions.old-1.jsonl")) == before
    now = json.loads((folder / "kept/asked.json").read_text())
    assert now["predictions.old-1.jsonl"] == marks["predictions.jsonl"]
    assert now["predictions.jsonl"] != marks["predictions.jsonl"]


def test_other_settings_have_a_folder_of_their_own(folder: Path, cli: Cli) -> None:
    run = ("eval", "--run", "runs/lora", *NO_TEXT, "--metric", "accuracy")
    one = result(cli("eval", "--run", "runs/lora", "--limit", "2", "--json"))
    evals = folder / "runs/lora/evals"
    assert [each.name for each in evals.iterdir()] == ["limit-2"], "nothing is set otherwise"
    for tokens in (3, 2, 3):
        sets = ("-s", f"generation.max_new_tokens={tokens}", "-s", "evaluation.confidence=0.9")
        result(cli("eval", "--run", "runs/lora", "--limit", "2", *sets, "--json"))
    names = sorted(each.name for each in evals.iterdir())
    cut = [name[: -len("-123abc")] for name in names[1:]]
    assert cut == ["limit-2-max-new-tokens-2", "limit-2-max-new-tokens-3"], names
    assert json.loads((evals / "limit-2/scores.json").read_text()) == one
    result(cli(*run, "--json"))
    assert len(list(evals.glob("fewer-*"))) == 1, "one source of two"
    result(cli(*run, "-o", "kept", "--json"))
    result(cli(*run, "-o", "kept", "--limit", "1", "--json"))
    assert len(list(read(folder / "kept/predictions.jsonl"))) == 2
    assert len(list(read(folder / "kept/predictions.old-1.jsonl"))) == 12, "no answer is dropped"


def test_other_weights_or_another_prompt_ask_anew(folder: Path, cli: Cli, asked: list[str]) -> None:
    run = ("eval", "--run", "runs/lora", *PLACES)
    result(cli(*run, "--json"))
    asked.clear()
    rows = list(read(folder / "places.jsonl"))
    rows[len(rows) * 2 // 5]["text"] = "Eve is in the cellar."  # the third of five taken
    write(folder / "places.jsonl", rows)
    result(cli(*run, "--json"))
    assert asked == ["load", "generate"], "one row alone was asked otherwise"
    asked.clear()
    weights = folder / "runs/lora/model/adapter_model.safetensors"
    os.utime(weights, (1, 1))
    assert "asked anew" not in cli(*run).err, "a copy has other times, and is the same model"
    assert asked == []
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "answers by another model; asked anew" in cli(*run).err
    assert asked == ["load", *["generate"] * 5]


def test_an_interrupted_evaluation_goes_on_where_it_was(
    folder: Path, cli: Cli, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ("eval", "--run", "runs/lora", *PLACES)
    whole = result(cli(*run, "-o", "whole", "--json"))
    monkeypatch.setattr(stepping, "BATCH_ROWS", 2)
    generate = decoding.generate

    def dying(
        model: Any, encoder: Any, prompts: Any, wanted: Any, done: Any, **options: Any
    ) -> Any:
        def told(place: int, completion: Any) -> None:
            done(place, completion)
            if len(list(read(folder_of(folder, "path-places.jsonl") / "predictions.jsonl"))) == 3:
                raise KeyboardInterrupt

        return generate(model, encoder, prompts, wanted, told, **options)

    with monkeypatch.context() as patched:
        patched.setattr(decoding, "generate", dying)
        stopped = cli(*run)
    assert stopped.code == 75
    assert "place: stopped; 3 answers are kept in runs/lora/evals/path-places" in stopped.err
    assert "Run the same command again" in stopped.err
    path = folder_of(folder, "path-places.jsonl") / "predictions.jsonl"
    with path.open("a") as file:
        file.write('{"task": "place", "row": 4, "predic')  # torn by the kill
    asked.clear()
    again = cli(*run, "--json")
    assert asked == ["load", "generate", "generate"]
    assert result(again)["tasks"] == whole["tasks"]
    assert path.read_text() == (folder / "whole/predictions.jsonl").read_text()


def test_a_long_evaluation_says_how_far_it_is(
    folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "SAID_EVERY", 0.0)
    said = cli("eval", "--run", "runs/lora", *PLACES).err
    assert "place: 4 of 5 answers, 0 min left" in said
    assert "5 of 5" not in said


def test_answers_drawn_at_random_go_on_as_they_would_have(
    folder: Path, cli: Cli, asked: list[str]
) -> None:
    run = ("eval", "--run", "runs/lora", "-s", "generation.temperature=1.5", *PLACES)
    result(cli(*run, "--json"))
    path = folder_of(folder, "path-places.jsonl") / "predictions.jsonl"
    whole = path.read_text()
    asked.clear()
    result(cli(*run, "--json"))
    assert asked == []
    path.write_text("".join(whole.splitlines(keepends=True)[:3]))
    result(cli(*run, "--json"))
    assert asked == ["load", "generate", "generate"]
    assert path.read_text() == whole, "the seed gives the same answers to the rows left over"


# --- against ---


def test_the_base_of_an_adapter_is_the_same_loaded_model(
    folder: Path, cli: Cli, asked: list[str]
) -> None:
    both = ("eval", "--run", "runs/lora", "--against", "base", "-o", "both")
    found = result(cli(*both, *ALL, "--json"))
    assert asked.count("load") == 1
    assert asked.count("generate") == 2 * 5
    base = json.loads((folder / "runs/lora/run.json").read_text())["base"]
    alone = result(cli("eval", "--model", base, "-r", "lora.yaml", *ALL, "--json"))
    for task in ("mood", "place", "text"):
        theirs = found["tasks"][task]["against"]["scores"]
        assert theirs == alone["tasks"][task]["scores"], task
    tuned = result(cli("eval", "--run", "runs/lora", "-o", "other", *ALL, "--json"))
    for task in ("mood", "place", "text"):
        assert found["tasks"][task]["scores"] == tuned["tasks"][task]["scores"], task
    text = found["tasks"]["text"]
    gap = text["scores"]["perplexity"]["value"] - text["against"]["scores"]["perplexity"]["value"]
    assert text["against"]["difference"]["perplexity"]["value"] == pytest.approx(gap)
    assert gap != 0, "two steps of training change something"
    assert_bits_are_of_bytes(folder, text)
    asked.clear()
    assert cli(*both, *PLACES).code == 0
    assert asked == [], "both models' answers are kept"


def assert_bits_are_of_bytes(folder: Path, found: dict[str, Any]) -> None:
    """Of all bytes but those of the first token of each text, a share like that of the tokens."""
    from itune import configs, recipes, sources

    recipe = recipes.load(folder / "runs/lora/recipe.yaml")
    rows = sources.read(recipes.Source(path=str(folder / found["data"]), limit=found["rows"]))
    lines = [row["text"] for row in rows.data]
    encoder = configs.encoder(recipe.model)
    tokens = [len(each.ids) for each in encoder.documents(lines)]
    sizes = [len(line.encode()) * (n - 1) / n for line, n in zip(lines, tokens, strict=True)]
    nats = np.log(found["scores"]["perplexity"]["value"]) * (sum(tokens) - len(tokens))
    bits = found["scores"]["bits_per_byte"]
    assert bits["value"] == pytest.approx(nats / np.log(2) / sum(sizes), rel=1e-9)
    assert bits["low"] < bits["value"] < bits["high"]
    assert found["against"]["difference"]["bits_per_byte"]["value"] != 0


def test_another_model_is_not_scored_in_the_name_of_a_run(folder: Path, cli: Cli) -> None:
    for given in ("model.name=gpt2", "adapter.r=2"):
        ended = cli("eval", "--run", "runs/lora", "-s", given)
        assert ended.code == 2
        assert "a run is scored with the model that it trained" in ended.err


def test_texts_of_other_tokens_are_told_beside_and_not_tested_in_pairs() -> None:
    ours = np.array([[10.0, 4, 20], [12.0, 5, 24]])
    theirs = np.array([[9.0, 2, 20], [11.0, 3, 24]])
    way = results.Way((), recipes.Evaluation(resamples=50))
    rival = results.Rival("runs/other", {}, {"text": ("text.jsonl", theirs)})
    found = results.perplexity("text", "text.jsonl", ours, rival, way)
    assert "against" not in found
    (note,) = found["notes"]
    assert f"its bits_per_byte are {20 / 44 / np.log(2):.3f} [" in note
    (table,) = scoreboard.tables({"tasks": {"text": found}}, 0.95)
    assert "runs/other reads these texts as other tokens" in " ".join(table.notes)


def test_the_base_of_a_wholly_tuned_model_is_loaded_after_it(
    folder: Path, cli: Cli, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []
    alive: list[int] = []
    load = models.load

    def counting(*arguments: Any, **options: Any) -> Any:
        alive.append(sum(each() is not None for each in loaded))
        model = load(*arguments, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(models, "load", counting)
    run = ("eval", "--run", "runs/full", "--against", "base", *NO_TEXT, "--json")
    found = result(cli(*run))["tasks"]["mood"]
    assert alive == [0, 0], "the tuned model was let go of first"
    assert set(found["against"]) == {"name", "scores", "difference", "changed"}
    count = found["against"]["changed"]["count"]
    assert sum(count.values()) == 12


def test_rows_that_changed_are_listed_both_ways(folder: Path, cli: Cli) -> None:
    ours = ["the hall", "the attic", "x", "the garden"]
    theirs = ["the hall", "no", "the hall", "garden"]
    golds = ["the hall", "the attic", "the hall", "the garden"]
    for name, said in (("ours", ours), ("theirs", theirs)):
        rows = [
            {"prompt": f"Where is {i}?", "prediction": text, "reference": gold}
            for i, (text, gold) in enumerate(zip(said, golds, strict=True))
        ]
        write(folder / f"{name}.jsonl", rows)
    run = ("eval", "--predictions", "ours.jsonl", "--against", "theirs.jsonl")
    found = result(cli(*run, "--metric", "rougeL", "--metric", "exact_match", "--json"))
    against = found["tasks"]["predictions"]["against"]
    changed = against["changed"]
    assert changed["metric"] == "rougeL"
    assert changed["count"] == {"better": 2, "worse": 1, "same": 1}
    assert [row["row"] for row in changed["better"]] == [2, 4], "rows are lines here; most first"
    assert changed["worse"] == [
        {
            "row": 3,
            "wording": 0,
            "prompt": "Where is 2?",
            "prediction": "x",
            "against": "the hall",
            "references": ["the hall"],
            "gain": -1.0,
        }
    ]
    shown = cli(*run, "--metric", "rougeL", "--metric", "exact_match").out
    assert "answers by rougeL: 2 better, 1 worse, 1 the same" in shown
    tests = against["difference"].values()
    assert len(tests) == 2
    assert all(each["p_holm"] == min(1, 2 * each["p_value"]) for each in tests)
    assert "p (Holm)" in shown
    assert "p (Holm)" not in cli(*run, "--metric", "rougeL").out, "one test needs no correction"


def test_a_file_that_was_asked_something_else_is_refused(folder: Path, cli: Cli) -> None:
    run = ("eval", "--run", "runs/lora", *PLACES)
    result(cli(*run, "--json"))
    lines = list(read(folder_of(folder, "path-places.jsonl") / "predictions.jsonl"))
    write(folder / "same.jsonl", lines)
    same = cli(*run, "--against", "same.jsonl", "--json")
    assert result(same)["tasks"]["place"]["against"]["changed"]["count"]["same"] == 5
    lines[1]["prompt"] += " Say it in French."
    write(folder / "other.jsonl", lines)
    refused = cli(*run, "--against", "other.jsonl")
    assert refused.code == 2
    assert f"row {lines[1]['row']} in wording 0 was asked otherwise" in refused.err
    assert "Say it in French" in refused.err


def test_other_rows_are_refused_before_anything_is_answered(
    folder: Path, cli: Cli, asked: list[str]
) -> None:
    write(folder / "less.jsonl", [{"prediction": "x", "reference": "x"}])
    refused = cli("eval", "--run", "runs/lora", *PLACES, "--against", "less.jsonl")
    assert refused.code == 2
    assert "comparison: " in refused.err
    assert asked == []


def test_files_of_several_tasks_are_scored_task_by_task(folder: Path, cli: Cli) -> None:
    rows = [
        {"task": task, "row": row, "prediction": "yes", "reference": gold}
        for task, gold in (("one", "yes"), ("two", "no"))
        for row in range(3)
    ]
    write(folder / "p.jsonl", rows)
    found = result(cli("eval", "--predictions", "p.jsonl", "--metric", "accuracy", "--json"))
    values = {name: task["scores"]["accuracy"]["value"] for name, task in found["tasks"].items()}
    assert values == {"one": 1.0, "two": 0.0}
    for bad, message in (('"row": "x"', "row: expected a whole number"), ("", "0 rows")):
        text = f'{{"prediction": "a", "reference": "b", {bad}}}\n' if bad else "\n"
        (folder / "bad.jsonl").write_text(text)
        ended = cli("eval", "--predictions", "bad.jsonl", "--metric", "accuracy")
        assert ended.code == 2
        assert message in ended.err


# --- choices, wordings, classes ---


def test_answers_that_are_no_choice_are_wrong_and_counted(folder: Path, cli: Cli) -> None:
    run = ("eval", "--run", "runs/lora", "-s", "evaluation.decide=generate", *NO_TEXT)
    found = result(cli(*run, "--json"))["tasks"]["mood"]
    lines = list(read(folder_of(folder, "generate") / "predictions.jsonl"))
    odd = sum(line["prediction"] not in ("sad", "glad") for line in lines)
    assert odd > 0, "a model after two steps writes nonsense"
    assert found["unparseable"] == {"count": odd, "share": odd / 12}
    right = sum(line["prediction"] in line["references"] for line in lines)
    assert found["scores"]["accuracy"]["value"] == right / 12
    assert f"{odd} answers ({odd / 12:.1%}) are none of the choices" in cli(*run).out
    picked = cli("eval", "--run", "runs/lora", *NO_TEXT)
    assert "none of the choices" not in picked.out


def test_answers_that_were_cut_are_counted_and_kept_as_such(folder: Path, cli: Cli) -> None:
    run = ("eval", "--run", "runs/lora", "-s", "generation.max_new_tokens=1")
    found = result(cli(*run, "--against", "base", "--json"))
    folder = folder_of(folder, "max-new-tokens-1")
    shares = []
    for name, counted in (
        ("predictions.jsonl", found["tasks"]["place"]),
        ("against.jsonl", found["tasks"]["place"]["against"]),
    ):
        stops = [line["stop"] for line in read(folder / name) if line["task"] == "place"]
        assert set(stops) <= {"stop", "length"}
        shares.append(stops.count("length") / len(stops))
        assert counted["cut"] == {"count": stops.count("length"), "share": shares[-1]}
    assert any(shares), "one of the two writes on after its first token"
    assert "cut" not in found["tasks"]["mood"], "its answers are picked among choices"
    # From kept answers, and from a file of them, the same is told.
    again = cli(*run, "--against", str(folder / "against.jsonl"))
    lines = again.out.count("did not end and are cut at generation.max_new_tokens")
    assert lines == sum(share > 0 for share in shares)
    report = (folder.parents[1] / "report.html").read_text()
    assert ("did not end and are cut" in report) == (shares[0] > 0)


def test_rows_that_are_asked_twice_are_told_of(folder: Path, cli: Cli) -> None:
    twice = (
        "-s",
        'data.eval=[{path: moods.jsonl, template: ./mood.yaml, split: "train[:4]+train[2:6]"}]',
    )
    lines = (folder / "moods.jsonl").read_text().splitlines()
    repeated = 8 - len({*lines[:6]})
    found = result(cli("eval", "--run", "runs/lora", *twice, "--json"))["tasks"]["mood"]
    assert found["rows"] == 8
    assert found["duplicated"] == repeated >= 2
    told = f"{repeated} rows say what an earlier one does, though the intervals take all for new"
    assert told in cli("eval", "--run", "runs/lora", *twice).out
    assert told in (folder / "runs/lora/report.html").read_text()


def test_f1_tells_of_each_class(folder: Path, cli: Cli) -> None:
    found = result(cli("eval", "--run", "runs/lora", *NO_TEXT, "--json"))["tasks"]["mood"]
    details = found["scores"]["f1"]["details"]
    assert set(details["classes"]) == {"glad", "sad"}
    assert sum(each["rows"] for each in details["classes"].values()) == 12
    assert details["micro"] == pytest.approx(found["scores"]["accuracy"]["value"])
    assert sum(map(sum, details["confusion"]["counts"])) == 12
    assert "details" not in found["scores"]["accuracy"]


def test_wordings_are_scored_apart_and_their_spread_is_shown(folder: Path, cli: Cli) -> None:
    run = ("eval", "--run", "runs/lora", *NO_TEXT)
    ended = cli(*run, "--metric", "accuracy", "--metric", "ter", "--json")
    found = result(ended)["tasks"]["mood"]
    each = [wording["scores"] for wording in found["wordings"]]
    for key, best in (("accuracy", max), ("ter", min)):
        values = [scores[key] for scores in each]
        spread = found["spread"][key]
        assert spread["best"] == best(values)
        assert spread["spread"] == pytest.approx(max(values) - min(values))
        assert spread["mean"] == pytest.approx(sum(values) / 2)
    assert "over 2 wordings" in cli(*run).out
    for given in ("first", "1"):
        first = result(cli(*run, "--wordings", given, "--json"))["tasks"]["mood"]
        assert first["wordings"] == []
        assert first["rows"] == 6
    assert len(list(read(folder_of(folder, "wordings-1") / "predictions.jsonl"))) == 6
    for given in ("0", "last"):
        ended = cli(*run, "--wordings", given)
        assert ended.code == 2
        assert "--wordings: expected all, first, or a number" in ended.err


def test_what_cannot_be_scored_is_said_before_anything_is_asked(
    folder: Path, cli: Cli, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = list(read(folder / "places.jsonl"))
    for row in rows:
        row["answers"]["text"] = ["とても良い天気です"]
    write(folder / "places.jsonl", rows)
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_ja_mecab.MeCab", None)
    ended = cli("eval", "--run", "runs/lora", "--metric", "bleu", *PLACES)
    assert ended.code == 2
    assert "sacrebleu[ja]" in ended.err
    assert asked == []


# --- tables ---


@pytest.mark.parametrize("columns", ["80", "120"])
def test_tables_fit_in_80_columns(
    columns: str, folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    names = ["matthews_correlation", "f1", "ter", "bleu", "rouge", "squad"]
    run = ["eval", "--run", "runs/lora", "--against", "base", *ALL]
    ended = cli(*run, *[part for name in names for part in ("--metric", name)])
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert max(map(len, lines)) <= 80
    heads = [line.split() for line in lines if line.startswith("metric")]
    assert ["metric", "difference", "95", "%", "interval", "p", "p", "(Holm)"] in heads
    for name in ("matthews_correlation", "rougeLsum", "squad_em", "perplexity"):
        assert sum(line.startswith(f"{name} ") for line in lines) >= 2


def test_shots_have_answers_of_their_own(folder: Path, cli: Cli, asked: list[str]) -> None:
    run = ("eval", "--run", "runs/lora", *PLACES)
    result(cli(*run, "--json"))
    found = result(cli(*run, "--shots", "2", "--limit", "3", "--json"))
    assert found["tasks"]["place"]["rows"] == 3
    lines = list(read(folder_of(folder, "limit-3-shots-2") / "predictions.jsonl"))
    assert len(lines) == 3
    assert all(line["prompt"].count("Where?") == 3 for line in lines)
    assert asked.count("generate") == 5 + 3
    by_recipe = cli(*run, "--limit", "3", "-s", "evaluation.shots=2")
    assert "3 of 3 answers are kept" in by_recipe.err


# --- options and adapters ---


@pytest.mark.parametrize(
    "given", ["-r lora.yaml", "-s a=1", "-o x", "--run runs/lora", "--limit 1", "--shots 0"]
)
def test_what_says_nothing_of_given_answers_is_refused(given: str, folder: Path, cli: Cli) -> None:
    write(folder / "p.jsonl", [{"prediction": "a", "reference": "a"}])
    run = ("eval", "--predictions", "p.jsonl", "--metric", "accuracy")
    assert cli(*run).code == 0
    refused = cli(*run, *given.split())
    assert refused.code == 2
    assert "has no meaning beside --predictions" in refused.err


def test_an_adapter_that_cannot_be_folded_is_compared_with_its_base(
    folder: Path, cli: Cli, asked: list[str], tiny_model_dir: Path
) -> None:
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    wanted = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    for path in (folder / "runs/lora/model").glob("adapter*"):
        path.unlink()
    peft.get_peft_model(base, wanted).save_pretrained(folder / "runs/lora/model")
    asked.clear()
    found = result(cli("eval", "--run", "runs/lora", "--against", "base", *PLACES, "--json"))
    assert asked.count("load") == 1, "one model, with the adapter put on it"
    alone = result(cli("eval", "--model", tiny_model_dir, "-r", "lora.yaml", *PLACES, "--json"))
    theirs = found["tasks"]["place"]["against"]["scores"]
    assert theirs == alone["tasks"]["place"]["scores"]


def test_texts_measured_in_batches_are_as_each_alone(
    folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from itune import batches

    run = ("eval", "--run", "runs/lora", "-s", "data.eval=[{path: text.jsonl, limit: 9}]", "--json")
    together = result(cli(*run))["tasks"]["text"]["scores"]["perplexity"]
    monkeypatch.setattr(batches, "MICRO_TOKENS", 1)
    alone = result(cli(*run))["tasks"]["text"]["scores"]["perplexity"]
    assert together["value"] == pytest.approx(alone["value"], rel=1e-6)
    assert together["low"] == pytest.approx(alone["low"], rel=1e-6)
