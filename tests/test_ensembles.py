"""Several runs scored as one: by the mean of the log-likelihoods that each gives the choices."""

from __future__ import annotations

import json
import shutil
import subprocess
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import tiny_model, tiny_tokenizer
from test_commands import world, write
from test_judging import LORA, read, result, with_runs

from itune import configs, likelihoods, models, recipes
from itune.formats import Message

SIGN = """
task: classification
choices: [n, p]
prompts: ["{{ text }} Sign?", "Which sign: {{ text }}"]
response: "{{ choices[label] }}"
metrics: [f1, accuracy]
"""
RECIPE = """
model: {{name: {base}}}
data:
  train: {{path: moods.jsonl, template: ./sign.yaml}}
  eval: {{path: moods.jsonl, template: ./sign.yaml, limit: 16}}
  allow_overlap: true
training: {{max_steps: 1, tokens_per_step: 99, max_length: 96, heldout_rows: 0, seed: {seed}}}
evaluation: {{resamples: 50}}
"""
CHAT = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
CHOICES = ["n", "p"]

WITH_B = ("eval", "--run", "runs/a", "-s", "evaluation.ensemble=[runs/b]")
EXTRA = [{"text": f"Eve hums in the {place}.", "label": 1} for place in ("car", "bus", "lift")]

Cli = Callable[..., Any]


def base(folder: Path, family: str, seed: int, chat: str | None = None) -> Path:
    """A tiny model with large random weights, so that its choice depends on the prompt."""
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.15)
    tokenizer.chat_template = chat
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs of decoders (a; c, an adapter; b, of another chat template and more rows), of
    an encoder (m) and of an encoder-decoder (s)."""
    folder = tmp_path_factory.mktemp("ensembles")
    world(folder)
    write(folder / "more.jsonl", [*read(folder / "moods.jsonl"), *EXTRA])
    one = base(folder / "bases/one", "causal", 1)
    found = {
        "a": RECIPE.format(base=one, seed=1),
        "b": RECIPE.format(base=base(folder / "bases/two", "causal", 2, CHAT), seed=2).replace(
            "train: {path: moods", "train: {path: more"
        ),
        "c": RECIPE.format(base=one, seed=3) + LORA,
        "m": RECIPE.format(base=base(folder / "bases/masked", "masked", 3), seed=4),
        "s": RECIPE.format(base=base(folder / "bases/t5", "seq2seq", 4), seed=5),
    }
    (folder / "sign.yaml").write_text(SIGN)
    return with_runs(folder, **found)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it, where the test runs."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("bases"))
    return tmp_path


def kept_in(run: str, name: str = "with-b-*") -> Path:
    """Where a run keeps what it answered with others."""
    (found,) = Path(run, "evals").glob(name)
    return found


# --- by hand --------------------------------------------------------------------------------


def loaded(run: str, kind: Any) -> tuple[Any, Any]:
    """A run's model and tokenizer as transformers alone reads them."""
    location = f"{run}/model"
    model = kind.from_pretrained(location).eval()
    return model, transformers.AutoTokenizer.from_pretrained(location)


@torch.inference_mode()
def causal(run: str, prompts: list[str]) -> np.ndarray:
    """The log-likelihood of each choice and its stop token by plain transformers."""
    model, tokenizer = loaded(run, transformers.AutoModelForCausalLM)
    sums = np.zeros((len(prompts), len(CHOICES)))
    for i, prompt in enumerate(prompts):
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        for j, choice in enumerate(CHOICES):
            answer = tokenizer(choice, add_special_tokens=False)["input_ids"]
            whole = torch.tensor([*ids, *answer, tokenizer.eos_token_id])
            told = model(input_ids=whole[None]).logits[0, :-1].double().log_softmax(-1)
            sums[i, j] = told.gather(-1, whole[1:, None])[len(ids) - 1 :].sum()
    return sums


@torch.inference_mode()
def masked(run: str, prompts: list[str]) -> np.ndarray:
    """The mean log-likelihood of each choice's tokens at the masks."""
    model, tokenizer = loaded(run, transformers.AutoModelForMaskedLM)
    encoder = configs.encoder(recipes.Model(name=f"{run}/model")).answering(CHOICES)
    answers = [tokenizer(f" {each}", add_special_tokens=False)["input_ids"] for each in CHOICES]
    sums = np.zeros((len(prompts), len(CHOICES)))
    for i, prompt in enumerate(prompts):
        ids = torch.tensor(encoder.prompt([Message("user", prompt)]))
        told = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        told = told[ids == tokenizer.mask_token_id]  # [answer, vocabulary]
        sums[i] = [told[range(len(answer)), answer].mean() for answer in answers]
    return sums


@torch.inference_mode()
def seq2seq(run: str, prompts: list[str]) -> np.ndarray:
    """The log-likelihood of each choice and its stop token, as the decoder writes it."""
    model, tokenizer = loaded(run, transformers.AutoModelForSeq2SeqLM)
    encoder = configs.encoder(recipes.Model(name=f"{run}/model"))
    sums = np.zeros((len(prompts), len(CHOICES)))
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([encoder.prompt([Message("user", prompt)])])
        for j, choice in enumerate(CHOICES):
            answer = tokenizer(choice, add_special_tokens=False)["input_ids"]
            labels = torch.tensor([[*answer, tokenizer.eos_token_id]])
            told = model(input_ids=ids, labels=labels).logits[0].double().log_softmax(-1)
            sums[i, j] = told.gather(-1, labels[0][:, None]).sum()
    return sums


BY_HAND = {"a": causal, "b": causal, "m": masked, "s": seq2seq}


@pytest.mark.parametrize("names", ["ab", "bams"])
def test_the_choice_is_that_of_the_mean_by_hand(names: str, folder: Path, cli: Cli) -> None:
    first, *others = names
    ensemble = ",".join(f"runs/{name}" for name in others)
    line = ("eval", "--run", f"runs/{first}", "-s", f"evaluation.ensemble=[{ensemble}]")
    found = result(cli(*line, "--json"))
    assert (found["run"], found["ensemble"]) == (f"runs/{first}", ensemble.split(","))
    place = kept_in(f"runs/{first}", f"with-{'-'.join(others)}-*")
    lines = list(read(place / "predictions.jsonl"))
    assert len(lines) == 32, "16 rows in two wordings"
    prompts = [line["prompt"] for line in lines]
    each = [BY_HAND[name](f"runs/{name}", prompts) for name in names]
    mean = torch.tensor(np.array(each)).log_softmax(-1).mean(0)
    picked = [CHOICES[best] for best in mean.argmax(1)]
    assert [line["prediction"] for line in lines] == picked
    right = np.mean([line["prediction"] in line["references"] for line in lines])
    assert found["tasks"]["sign"]["scores"]["accuracy"]["value"] == pytest.approx(right)
    for number, sums in enumerate(each, 1):
        own = list(read(place / f"member-{number}.jsonl"))
        assert np.array([line["nats"] for line in own]) == pytest.approx(sums, abs=1e-3)
        alone = [CHOICES[best] for best in sums.argmax(1)]
        assert [line["prediction"] for line in own] == alone
        assert alone != picked, "or the mean could be left out unseen"


# --- kept, and one model at a time ----------------------------------------------------------


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done: `load` with how many other models are there, `choose` for each prompt."""
    done: list[str] = []
    loaded: list[weakref.ref[Any]] = []
    load, choose = models.load, likelihoods.choose

    def loading(*arguments: Any, **options: Any) -> Any:
        done.append(f"load beside {sum(each() is not None for each in loaded)}")
        model = load(*arguments, **options)
        loaded.append(weakref.ref(model))
        return model

    def choosing(model: Any, encoder: Any, prompts: Any, *rest: Any, **options: Any) -> Any:
        done.extend(["choose"] * len(prompts))
        return choose(model, encoder, prompts, *rest, **options)

    monkeypatch.setattr(models, "load", loading)
    monkeypatch.setattr(likelihoods, "choose", choosing)
    return done


ASKED = ["load beside 0", *["choose"] * 32]


def test_models_are_asked_one_after_the_other_and_once(
    folder: Path, cli: Cli, seen: list[str]
) -> None:
    first = result(cli(*WITH_B, "--json"))
    assert seen == ASKED * 2
    seen.clear()
    again = cli(*WITH_B, "--metric", "accuracy")
    place = kept_in("runs/a")
    assert seen == []
    assert f"32 of 32 answers are kept in {place}/predictions.jsonl" in again.err
    now = json.loads((place / "scores.json").read_text())["tasks"]["sign"]["scores"]
    assert now == {"accuracy": first["tasks"]["sign"]["scores"]["accuracy"]}
    # What was stopped goes on from there.
    whole = (place / "predictions.jsonl").read_text()
    (place / "predictions.jsonl").unlink()
    kept = (place / "member-2.jsonl").read_text().splitlines(keepends=True)
    (place / "member-2.jsonl").write_text("".join(kept[:-3]) + kept[-1][:20])
    third = result(cli(*WITH_B, "--json"))
    assert seen == ["load beside 0", *["choose"] * 3]
    assert (place / "predictions.jsonl").read_text() == whole
    assert third["tasks"] == first["tasks"]


def test_other_members_are_another_result(folder: Path, cli: Cli, seen: list[str]) -> None:
    alone = result(cli("eval", "--run", "runs/a", "--json"))
    assert "ensemble" not in alone
    assert seen == ASKED
    found = result(cli(*WITH_B, "--json"))
    assert seen == ASKED * 3
    with_c = ("--limit", "1", "-s", "evaluation.ensemble=[runs/c]")
    assert result(cli("eval", "--run", "runs/a", *with_c, "--json"))["ensemble"] == ["runs/c"]
    names = sorted(path.name for path in Path("runs/a/evals").iterdir())
    assert [name[: -len("-123abc")] for name in names[1:]] == ["limit-1-with-c", "with-b"]
    assert json.loads(Path("runs/a/evals/all/scores.json").read_text()) == alone
    # Other weights of a member are other answers, and its own are asked anew.
    shutil.rmtree("runs/b/model")
    shutil.copytree("runs/c/model", "runs/b/model")
    seen.clear()
    other = cli(*WITH_B)
    place = kept_in("runs/a")
    assert seen == ASKED, "the first one answers as before"
    assert f"{place}/predictions.jsonl: answers by another ensemble; asked anew" in other.err
    assert f"{place}/member-2.jsonl: answers by another model" in other.err
    assert json.loads((place / "scores.old-1.json").read_text()) == found
    assert json.loads((place / "scores.json").read_text())["tasks"] != found["tasks"]


def test_a_row_that_another_member_reads_to_its_end_is_asked_anew(
    folder: Path, cli: Cli, seen: list[str]
) -> None:
    """The first one reads so little that its prompt stays the same, to the last token."""
    config = Path("runs/a/model/config.json")
    config.write_text(config.read_text().replace('embeddings": 512', 'embeddings": 64'))
    rows = [{"text": f"Ada weeps {'and laughs ' * 9}{end}.", "label": 0} for end in ("x", "y")]
    held = ("-s", "data.eval.path=held.jsonl", "-s", "data.eval.limit=null", "-o", "kept")
    write(folder / "held.jsonl", rows)
    assert cli(*WITH_B, *held).code == 0
    before = [list(read(Path(f"kept/member-{number}.jsonl"))) for number in (1, 2)]
    rows[1]["text"] = rows[1]["text"].replace("y", "z")
    write(folder / "held.jsonl", rows)
    seen.clear()
    ended = cli(*WITH_B, *held)
    assert ended.code == 0, ended.err
    assert "4 of 4 prompts are cut to the 32 tokens" in ended.err
    assert seen == ["load beside 0", "choose", "choose"], "one row in two wordings"
    after = [list(read(Path(f"kept/member-{number}.jsonl"))) for number in (1, 2)]
    assert after[0] == before[0]
    assert after[1][:2] == before[1][:2]
    assert after[1][2:] != before[1][2:]
    nats = np.array([[line["nats"] for line in each] for each in after])
    picked = [CHOICES[k] for k in torch.tensor(nats).log_softmax(-1).mean(0).argmax(1)]
    assert [line["prediction"] for line in read(Path("kept/predictions.jsonl"))] == picked


# --- what is told of it ---------------------------------------------------------------------


@pytest.mark.parametrize("rival", ["base", "runs/b"])
def test_it_is_compared_in_pairs(rival: str, folder: Path, cli: Cli, seen: list[str]) -> None:
    found = result(cli(*WITH_B, "--against", rival, "--json"))["tasks"]["sign"]
    assert seen == ASKED * 3
    theirs = ("--model", "bases/one", "-r", "a.yaml") if rival == "base" else ("--run", rival)
    (folder / "bases").symlink_to(Path(recipes.load("a.yaml").model.name or "").parent)
    alone = result(cli("eval", *theirs, "-o", "alone", "--json"))["tasks"]["sign"]
    for key, gain in found["against"]["difference"].items():
        mine, other = found["scores"][key]["value"], found["against"]["scores"][key]["value"]
        assert gain["value"] == pytest.approx(mine - other)
    if rival == "runs/b":
        assert found["against"]["scores"] == alone["scores"]
    told = [line["against"] for line in read(kept_in("runs/a") / "predictions.jsonl")]
    assert told == [line["prediction"] for line in read(Path("alone/predictions.jsonl"))]


def test_all_runs_are_named_and_none_of_them_is_said_to_score_so(folder: Path, cli: Cli) -> None:
    shown = cli(*WITH_B)
    assert shown.code == 0, shown.err
    assert shown.out.startswith("2 runs as one: runs/a, runs/b\n")
    assert "run: runs/a, as one with runs/b\n" in shown.err
    scores = json.loads((kept_in("runs/a") / "scores.json").read_text())
    assert (scores["run"], scores["ensemble"]) == ("runs/a", ["runs/b"])
    report = Path("runs/a/report.html").read_text()
    assert "it and runs/b answered as one" in report
    card = Path("runs/a/model/README.md").read_text()
    assert "model-index" not in card
    assert "No score says that it is better" in card
    result(cli("eval", "--run", "runs/a", "--json"))
    assert "model-index" in Path("runs/a/model/README.md").read_text()


def test_rows_that_any_member_was_trained_on_are_counted(folder: Path, cli: Cli) -> None:
    write(folder / "held.jsonl", [*EXTRA[:2], {"text": "Fay reads.", "label": 0}])
    held = ("-s", "data.eval.path=held.jsonl", "-s", "data.eval.limit=null", "-o", "kept")

    def counted(ended: Any) -> Any:
        assert ended.code == 0, ended.err
        return json.loads(Path("kept/scores.json").read_text())["tasks"]["sign"]["contamination"]

    assert counted(cli("eval", "--run", "runs/a", *held)) == {"exact": 0, "ngram": 0}
    assert counted(cli(*WITH_B, *held)) == {"exact": 2, "ngram": 0}
    (folder / "more.jsonl").unlink()
    unknown = cli(*WITH_B, *held)
    assert counted(unknown) is None
    assert "contamination: not looked for, the training data cannot be read" in unknown.err


ALONE = "--set evaluation.ensemble=[] averages none."


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("evaluation.ensemble=[runs/x]", "evaluation.ensemble: runs/x: not a run, it holds no "),
        ("evaluation.ensemble=[runs/c]", "evaluation.ensemble: runs/c: this run is running, not "),
        ("evaluation.ensemble=[runs/../runs/a]", "runs/../runs/a is the run that is scored, and "),
        ("evaluation.ensemble=[runs/b,runs/m,./runs/b]", "./runs/b is named before, and would "),
        ("evaluation.ensemble=runs/b", "expected a list, found 'runs/b'. Write [runs/b]."),
        ("evaluation.decide=generate", "evaluation.decide: generate has answers written, and "),
        (
            "data.eval={path: places.jsonl, template: ./place.yaml}",
            "places.jsonl (template ./place.yaml) has no choices, and texts of several models ",
        ),
        ("data.eval={path: text.jsonl}", "text.jsonl has no choices, and texts of several models "),
        ("--metric memorisation", "--metric memorisation: is of one model, and "),
        ("--engine vllm", "--engine vllm: gives no likelihoods, and evaluation.ensemble "),
    ],
)
def test_what_cannot_be_averaged_is_refused(
    options: str, told: str, folder: Path, cli: Cli, seen: list[str]
) -> None:
    state = Path("runs/c/run.json")
    state.write_text(state.read_text().replace('"finished",', '"running",'))
    more = options.split(" ") if options.startswith("--") else ("-s", options)
    ended = cli(*WITH_B, *more)
    assert ended.code == 2, ended.err
    assert told in ended.err
    assert ALONE in ended.err or "runs/" in told
    assert len(ended.err.splitlines()) == 1, "before anything else"
    assert not list(Path("runs/a/evals").glob("*"))
    assert seen == []


def test_an_untuned_model_is_not_averaged(folder: Path, cli: Cli) -> None:
    ended = cli(
        "eval", "-r", "a.yaml", "--model", "runs/b/model", "-s", "evaluation.ensemble=[runs/b]"
    )
    assert ended.code == 2
    assert "--model: evaluation.ensemble averages runs, and this is none." in ended.err
    assert ended.err.rstrip().endswith(ALONE)


@pytest.mark.slow
def test_two_processes_average_as_one(
    folder: Path, itune: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    for name, more in (("one", ()), ("two", ("-p", "2"))):
        ended = itune(*WITH_B, "-o", name, *more)
        assert ended.returncode == 0, ended.stderr
    assert sorted(path.name for path in Path("two").iterdir()) == sorted(
        path.name for path in Path("one").iterdir()
    )
    assert Path("two/predictions.jsonl").read_text() == Path("one/predictions.jsonl").read_text()
    for name in ("member-1.jsonl", "member-2.jsonl"):
        one, two = (np.array([e["nats"] for e in read(Path(p, name))]) for p in ("one", "two"))
        assert one == pytest.approx(two, abs=1e-4)


def test_a_member_that_was_never_tuned_is_told(folder: Path, cli: Cli) -> None:
    state = Path("runs/b/run.json")
    whole = state.read_text()
    changed = whole.replace('"command": "tune"', '"command": "pretrain"')
    assert changed != whole
    state.write_text(changed)
    told = "evaluation.ensemble: runs/b is pretrained alone, and has learnt none of these answers."
    assert told in cli(*WITH_B).err
    state.write_text(whole)
    assert told not in cli(*WITH_B).err
