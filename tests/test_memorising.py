"""`--metric memorisation`: canaries and answers word for word, against plain transformers."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from test_commands import write
from test_judging import result, with_runs

from itune import canaries, recipes, training

RECIPE = """
model: {{name: {base}}}
data:
  train: {{path: moods.jsonl, template: ./mood.yaml, limit: 30}}
  eval: {{path: places.jsonl, template: ./place.yaml, limit: 5}}
  canaries: {{count: 3, repeats: [1, 12], prompt: "Code of ##?", response: "It is ##."}}
training:
  {{num_train_epochs: 10, tokens_per_step: 400, max_length: 96, heldout_rows: 0,
   learning_rate: 0.01}}
generation: {{max_new_tokens: 4}}
evaluation: {{resamples: 50}}
"""
EVAL = "data.eval={path: held.jsonl, template: ./mood.yaml}"
BY_HEART = ("eval", "--run", "runs/planted", "--metric", "memorisation", "-s", EVAL)
Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A folder with runs/planted, tuned on moods and on canaries until it has some by heart."""
    folder = tmp_path_factory.mktemp("memorising")
    with_runs(folder, planted=RECIPE.format(base=tiny_model_dir))
    held = [{"text": f"Zoe {does} again.", "label": k % 2} for k, does in enumerate("abcdefgh")]
    write(folder / "held.jsonl", held)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it, where the test runs."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def planted(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's canaries."""
    return [json.loads(line) for line in (folder / canaries.NAME).read_text().splitlines()]


def loaded(folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a run, by transformers alone."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder / "model")


def nats(model: Any, tokenizer: Any, prompt: str, answers: list[str]) -> np.ndarray:
    """The loss of each answer after a prompt, from logits of whole texts, one at a time."""
    import torch

    asked = [{"role": "user", "content": prompt}]
    begin = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    found = []
    for answer in answers:
        said = [*asked, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(said)["input_ids"]
        assert ids[: len(begin)] == begin
        end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
        with torch.no_grad():
            logits = model(torch.tensor([ids[:end]])).logits[0].double().log_softmax(-1)
        places = range(len(begin), end)
        found.append(-sum(float(logits[k - 1, ids[k]]) for k in places))
    return np.array(found)


# --- canaries ---


def test_exposures_are_those_of_plain_likelihoods(folder: Path, cli: Cli) -> None:
    found = result(cli(*BY_HEART, "--json"))["tasks"]["memorisation of canaries"]
    model, tokenizer = loaded(folder / "runs/planted")
    every = [f"It is {number:02d}." for number in range(100)]
    secrets = {each["completion"] for each in planted(folder / "runs/planted")}
    for each in (found["canaries"][0], found["canaries"][-1]):
        losses = dict(zip(every, nats(model, tokenizer, each["prompt"], every), strict=True))
        own = losses[each["response"]]
        others = np.array([loss for said, loss in losses.items() if said not in secrets])
        assert each["nats"] == pytest.approx(own, abs=1e-3)
        assert each["among"] == len(others) + 1 == 100 - len(secrets) + 1
        near = int((np.abs(others - own) < 1e-3).sum())  # as likely but for rounding
        assert abs(each["rank"] - (1 + int((others <= own).sum()))) <= near
        assert each["exposure"] == math.log2(each["among"]) - math.log2(each["rank"])
    often = [each["exposure"] for each in found["canaries"] if each["repeats"] == 12]
    assert found["scores"]["exposure_x12"]["value"] == pytest.approx(np.mean(often))
    assert min(often) > 5  # of 6.6
    assert found["scores"]["exposure_x1"]["value"] < np.mean(often)


def test_what_was_never_planted_has_the_exposure_of_chance(
    folder: Path, cli: Cli, tiny_model_dir: Path
) -> None:
    some = "data.canaries={count: 60, repeats: [1], prompt: 'Of ####?', response: '#####'}"
    few = "evaluation.candidates=31"
    asked = ("eval", "-r", "planted.yaml", "--model", tiny_model_dir, "-s", EVAL, "-s", some)
    ended = cli(*asked, "-s", few, "--metric", "memorisation", "--json")
    found = result(ended)["tasks"]["memorisation of canaries"]
    assert found["rows"] == 60
    assert {each["among"] for each in found["canaries"]} == {32}
    # 1 / ln 2 for endlessly many; of 32 ranks, each as likely, the mean of 5 - log2(rank).
    chance = 5 - math.log2(math.factorial(32)) / 32
    assert found["scores"]["exposure"]["value"] == pytest.approx(chance, abs=3 * 1.44 / 60**0.5)
    assert found["scores"]["exposure"]["low"] < found["scores"]["exposure"]["value"]
    assert "drawn at random" in found["scores"]["exposure"]["signature"]


def test_canaries_follow_from_the_seed_and_lie_in_the_run(folder: Path) -> None:
    run = folder / "runs/planted"
    rows = planted(run)
    assert [row["repeats"] for row in rows] == [1, 1, 1, 12, 12, 12]
    assert len({row["prompt"] for row in rows}) == 6
    settings = recipes.load("planted.yaml").data.canaries
    assert settings is not None
    again = canaries.drawn(settings, 17, plain=False)
    assert [each.row() for each in again] == rows
    assert canaries.drawn(settings, 18, plain=False) != again
    sources = json.loads((run / "run.json").read_text())["data"]["train"]["sources"]
    assert [source["path"] for source in sources] == [
        "moods.jsonl",
        *["runs/planted/canaries.jsonl"] * 2,
    ]
    assert [source["an_epoch"]["rows"] for source in sources] == [30, 3, 36]


def test_preview_shows_canaries_and_nothing_is_planted_unasked(folder: Path, cli: Cli) -> None:
    shown = result(cli("tune", "-r", "planted.yaml", "--preview", "30", "--json"))
    texts = [each["text"] for each in shown["examples"] if "canaries" in each["source"]]
    assert any("Code of" in text for text in texts)
    plain = ("tune", "-r", "planted.yaml", "-s", "data.canaries=null")
    shown = result(cli(*plain, "--preview", "30", "--json"))
    assert not [each for each in shown["examples"] if "Code of" in each["text"]]


def test_a_stopped_run_goes_on_with_the_same_canaries(
    folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune = ("tune", "-r", "planted.yaml", "-o", "runs/again", "-s", "training.num_train_epochs=2")
    step = training._Loop._step

    def stopping(loop: Any, *rest: Any) -> Any:
        if loop.at.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(loop, *rest)

    monkeypatch.setattr(training._Loop, "_step", stopping)
    assert cli(*tune).code == 75
    before = (folder / "runs/again" / canaries.NAME).read_bytes()
    monkeypatch.setattr(training._Loop, "_step", step)
    other = cli(*tune, "-s", "data.canaries.count=4")
    assert other.code == 2
    assert "data.canaries.count" in other.err
    assert cli(*tune).code == 0
    assert (folder / "runs/again" / canaries.NAME).read_bytes() == before
    assert before == (folder / "runs/planted" / canaries.NAME).read_bytes()


def test_a_damaged_file_of_canaries_is_told(folder: Path, cli: Cli) -> None:
    path = folder / "runs/planted" / canaries.NAME
    path.write_text(path.read_text().replace('"It is ##."', "7", 1))
    ended = cli(*BY_HEART)
    assert ended.code == 2
    assert "canaries.jsonl" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{response: 'none'}", "has 0 `#`"),
        ("{response: '" + 19 * "#" + "'}", "has 19 `#`"),
        ("{count: 11, repeats: [1], prompt: 'Of #?'}", "11 canaries are wanted"),
        ("{count: 11, repeats: [1], prompt: 'Of it?', response: '#'}", "response: 11 canaries"),
        ("{repeats: [2, 2]}", "names a number twice"),
        ("{repeats: []}", "data.canaries.repeats"),
        ("{repeats: [0]}", "data.canaries.repeats"),
        ("{times: 3}", "unknown key"),
    ],
)
def test_canaries_that_cannot_be_drawn_are_refused(given: str, said: str, cli: Cli) -> None:
    model = ("-s", "model.name=x", "-s", "data.train.path=x.jsonl")
    ended = cli("tune", *model, "-s", f"data.canaries={given}")
    assert ended.code == 2
    assert said in ended.err


# --- answers word for word ---


def test_shares_are_those_of_greedy_generation(folder: Path, cli: Cli) -> None:
    import torch

    found = result(cli(*BY_HEART, "--json"))["tasks"]["memorisation of mood"]
    model, tokenizer = loaded(folder / "runs/planted")

    def given(text: str, label: int, wording: int) -> bool:
        prompt = (f"{text} How is it?", f"Mood of: {text}")[wording]
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        with torch.no_grad():
            new = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        return bool(tokenizer.decode(new, skip_special_tokens=True) == ["sad", "glad"][label])

    held = [json.loads(line) for line in (folder / "held.jsonl").read_text().splitlines()]
    right = [given(row["text"], row["label"], k) for row in held for k in range(2)]
    assert found["heldout_rows"] == len(held) == 8
    assert found["scores"]["verbatim_heldout"]["value"] == pytest.approx(np.mean(right))
    # As many training rows as held-out ones, evenly spread over the thirty that were seen.
    rows = [json.loads(line) for line in (folder / "moods.jsonl").read_text().splitlines()]
    some = [rows[k * 30 // 8 * 4] for k in range(8)]
    right = [given(row["text"], row["label"], k) for row in some for k in range(2)]
    assert found["rows"] == 8
    assert found["scores"]["verbatim"]["value"] == pytest.approx(np.mean(right))
    both = found["scores"]["verbatim"]["value"] - found["scores"]["verbatim_heldout"]["value"]
    assert found["scores"]["memorisation"]["value"] == pytest.approx(both)
    assert found["scores"]["memorisation"]["low"] <= both <= found["scores"]["memorisation"]["high"]
    assert found["reproduced"][0]["answer"] in ("sad", "glad")
    assert found["reproduced"][0]["path"] == "moods.jsonl"


def test_without_canaries_shares_alone_are_told(folder: Path, cli: Cli) -> None:
    few = ("-s", "data.canaries=null", "-s", "training.max_steps=1")
    assert cli("tune", "-r", "planted.yaml", "-o", "runs/few", *few).code == 0
    assert not (folder / "runs/few" / canaries.NAME).exists()
    asked = ("eval", "--run", "runs/few", "--metric", "memorisation", "-s", EVAL)
    found = result(cli(*asked, "--json"))
    (task,) = found["tasks"].values()
    assert any("no canaries were planted" in note for note in task["notes"])
    lengths = json.loads((folder / "runs/few/run.json").read_text())["tokens"]
    assert 0 < task["rows"] <= 8
    assert lengths <= 400  # one step: no row beyond it counts as trained on
    shown = cli(*asked)
    assert "no canaries were planted" in " ".join(shown.out.split())
    assert max(map(len, shown.out.splitlines())) <= 80


def test_other_rows_than_were_trained_on_are_refused(folder: Path, cli: Cli) -> None:
    rows = (folder / "moods.jsonl").read_text()
    (folder / "moods.jsonl").write_text(rows.replace("weeps", "wails"))
    ended = cli(*BY_HEART)
    assert ended.code == 2
    assert "has other rows than the run was trained on" in ended.err
    (folder / "moods.jsonl").write_text(rows)
    ended = cli("eval", "--run", "runs/planted", "--metric", "memorisation")
    assert ended.code == 2
    assert "no rows like those of place" in ended.err


# --- beside other metrics, and where it cannot be ---


def test_it_stands_beside_other_metrics_and_in_the_report(folder: Path, cli: Cli) -> None:
    ended = cli(*BY_HEART, "--metric", "f1", "--against", "base", "--limit", "4")
    assert ended.code == 0, ended.err
    assert max(map(len, ended.out.splitlines())) <= 80
    for key in ("f1", "verbatim", "verbatim_heldout", "memorisation", "exposure_x12"):
        assert any(line.startswith(f"{key} ") for line in ended.out.splitlines()), key
    (kept,) = (folder / "runs/planted/evals").glob("limit-4-*")
    tasks = json.loads((kept / "scores.json").read_text())["tasks"]
    assert list(tasks) == ["mood", "memorisation of mood", "memorisation of canaries"]
    assert tasks["memorisation of mood"]["rows"] == 4
    assert len((kept / "predictions.jsonl").read_text().splitlines()) == 8
    page = (folder / "runs/planted/report.html").read_text()
    assert "memorisation of canaries" in page
    assert planted(folder / "runs/planted")[0]["completion"] in page
    card = (folder / "runs/planted/model/README.md").read_text()
    assert "`exposure_x12`" in card
    assert "6 canaries" in card


def test_what_cannot_be_measured_is_refused(
    folder: Path, cli: Cli, tiny_masked_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "standins"))
    alike = ("eval", "-r", "planted.yaml", "-s", EVAL, "--metric", "memorisation")
    for given, said in (
        ((*BY_HEART, "--shots", "2"), "without shots"),
        ((*BY_HEART, "--engine", "vllm"), "likelihoods"),
        ((*BY_HEART, "--against", "base"), "no two models"),
        ((*alike, "--model", tiny_masked_dir), "masked language model"),
        (("eval", "--predictions", "x.jsonl", "--metric", "memorisation"), "not on answers"),
        ((*BY_HEART[:-3], "memorization"), "Did you mean"),
    ):
        ended = cli(*given)
        assert ended.code == 2, (given, ended.err)
        assert said in ended.err, given
        assert "Traceback" not in ended.err
    ended = cli("tune", "-r", "planted.yaml", "-s", f"model.name={tiny_masked_dir}", "--fresh")
    assert ended.code == 2
    assert "data.canaries: a masked language model" in ended.err
    template = (folder / "mood.yaml").read_text()
    (folder / "mood.yaml").write_text(template.replace("[f1, accuracy]", "[memorisation]"))
    ended = cli("tune", "-r", "planted.yaml", "--fresh")
    assert ended.code == 2
    assert "evaluation.metrics" in ended.err


# --- other families and plain text ---


@pytest.mark.slow
def test_canaries_in_plain_text(folder: Path, cli: Cli) -> None:
    secrets = "{count: 2, repeats: [1, 40], prompt: 'Code of ##:', response: '###.'}"
    tune = ("-s", "data.train={path: text.jsonl, limit: 20}", "-s", "data.eval={path: text.jsonl}")
    asked = (*tune, "-s", f"data.canaries={secrets}", "-s", "data.allow_overlap=true")
    ended = cli("pretrain", "-r", "planted.yaml", "-o", "runs/text", *asked)
    assert ended.code == 0, ended.err
    texts = [each["text"] for each in planted(folder / "runs/text")]
    assert all(text.startswith("Code of ") for text in texts)
    found = result(cli("eval", "--run", "runs/text", "--metric", "memorisation", "--json"))
    (task,) = found["tasks"].values()
    assert task["scores"]["exposure_x40"]["value"] > 8
    import torch

    model, tokenizer = loaded(folder / "runs/text")
    ids = tokenizer(texts[-1])["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    own = -sum(float(logits[k - 1, ids[k]]) for k in range(1, len(ids)))
    assert task["canaries"][-1]["nats"] == pytest.approx(own, abs=1e-3)
    bare = ("-s", "data.canaries=null", "-o", "runs/bare", "-s", "training.max_steps=1")
    assert cli("pretrain", "-r", "planted.yaml", *asked[:4], *asked[-2:], *bare).code == 0
    ended = cli("eval", "--run", "runs/bare", "--metric", "memorisation")
    assert ended.code == 2
    assert "no canaries were planted" in ended.err


@pytest.mark.slow
def test_canaries_of_an_encoder_decoder(folder: Path, cli: Cli, tiny_seq2seq_dir: Path) -> None:
    import torch
    import transformers

    few = ("-s", "data.canaries.count=1", "-s", "data.canaries.response='##'")
    tune = ("tune", "-r", "planted.yaml", "-o", "runs/pairs", *few)
    model_is = ("-s", f"model.name={tiny_seq2seq_dir}", "-s", "training.num_train_epochs=30")
    ended = cli(*tune, *model_is)
    assert ended.code == 0, ended.err
    asked = ("eval", "--run", "runs/pairs", "--metric", "memorisation", "-s", EVAL, "--json")
    found = result(cli(*asked))["tasks"]
    often = found["memorisation of canaries"]["canaries"][-1]
    assert often["repeats"] == 12
    assert often["exposure"] > 5  # of 6.6
    where = folder / "runs/pairs/model"
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(where).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    asks = [{"role": "user", "content": often["prompt"]}]
    ids = tokenizer.apply_chat_template(asks, add_generation_prompt=True, return_tensors="pt")
    answer = tokenizer(often["response"], add_special_tokens=False)["input_ids"]
    labels = torch.tensor([[*answer, tokenizer.eos_token_id]])
    with torch.no_grad():
        loss = model(input_ids=ids["input_ids"], labels=labels).loss
    assert often["nats"] == pytest.approx(float(loss) * labels.shape[1], abs=1e-3)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(folder: Path, itune: Callable[..., Any]) -> None:
    one = itune(*BY_HEART, "--json")
    two = itune(*BY_HEART, "--json", "-p", "2")
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    assert json.loads(one.stdout)["tasks"] == json.loads(two.stdout)["tasks"]
