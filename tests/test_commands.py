"""The four commands as a user runs them: from nothing to a scored, answering model."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PRETRAIN = """
model:
  from_scratch:
    model_type: llama
    tokenizer: {algorithm: bpe, vocab_size: 320}
    embedding_std: 0.2
    hidden_size: 48
    intermediate_size: 96
    num_hidden_layers: 2
    num_attention_heads: 2
    num_key_value_heads: 2
    max_position_embeddings: 128
data:
  train: {path: text.jsonl}
  eval: {path: text.jsonl, limit: 8}
training: {max_steps: 20, tokens_per_step: 600, max_length: 64, learning_rate: 2.0e-3}
"""
TUNE = """
model: {name: runs/base}
data:
  train:
    - {path: moods.jsonl, template: ./mood.yaml}
    - {path: places.jsonl, template: ./place.yaml, weight: 0.5}
  eval:
    - {path: moods.jsonl, template: ./mood.yaml, limit: 20}
    - {path: places.jsonl, template: ./place.yaml, limit: 10}
  allow_overlap: true
training: {num_train_epochs: 40, tokens_per_step: 500, max_length: 64, learning_rate: 4.0e-3}
generation: {max_new_tokens: 12}
evaluation: {against: base}
"""
MOOD = """
task: classification
choices: [sad, glad]
prompts: ["{{ text }} How is it?", "Mood of: {{ text }}"]
response: "{{ choices[label] }}"
metrics: [f1, accuracy]
"""
PLACE = """
task: qa
system: Answer in few words.
prompts: ["{{ text }} Where?"]
response: "{{ answers.text[0] }}"
references: answers.text
metrics: [squad]
"""


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def world(folder: Path) -> None:
    draw = random.Random(3)
    names, rooms = ["Ada", "Bo", "Cy", "Di"], ["kitchen", "garden", "hall", "attic"]
    moods = ["weeps", "sighs", "laughs", "dances"]
    texts, sad, where = [], [], []
    for _ in range(120):
        name, room, mood = draw.choice(names), draw.choice(rooms), draw.randrange(4)
        texts.append({"text": f"{name} {moods[mood]} in the {room}."})
        sad.append({"text": f"{name} {moods[mood]}.", "label": int(mood > 1)})
        where.append({"text": f"{name} is in the {room}.", "answers": {"text": [f"the {room}"]}})
    write(folder / "text.jsonl", texts)
    write(folder / "moods.jsonl", sad)
    write(folder / "places.jsonl", where)
    for name, text in (("pre", PRETRAIN), ("tune", TUNE), ("mood", MOOD), ("place", PLACE)):
        (folder / f"{name}.yaml").write_text(text)


@pytest.fixture
def tuned(tmp_path: Path, cli: Callable[..., Any]) -> Path:
    """A folder with a pretrained base in runs/base and a run tuned on it in runs/tune."""
    world(tmp_path)
    made = cli("pretrain", "-r", "pre.yaml", "-o", "runs/base", "--json")
    assert made.code == 0, made.err
    said = json.loads(made.out)
    assert said["state"] == "finished"
    assert said["steps"] == 20
    assert cli("tune", "-r", "tune.yaml").code == 0
    return tmp_path


def test_the_whole_loop(tuned: Path, cli: Callable[..., Any]) -> None:
    run = tuned / "runs" / "tune"
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, len(log) + 1))
    wanted = {"step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens"}
    assert wanted | {"seconds"} <= set(log[0])
    assert log[-1]["loss"] < log[0]["loss"] / 2
    kept_rows = json.loads((run / "run.json").read_text())["data"]["train"]
    assert (kept_rows["read"], kept_rows["rows"], kept_rows["dropped"]) == (240, 240, 0)
    moods, places = kept_rows["sources"]
    assert (moods["path"], moods["read_as"], moods["commit"]) == (
        "moods.jsonl",
        "template mood",
        None,
    )
    assert (moods["an_epoch"]["rows"], places["an_epoch"]["rows"]) == (120, 60)
    assert moods["counts"]["duplicated"] > 100

    scored = cli("eval", "--json")
    assert scored.code == 0, scored.err
    result = json.loads(scored.out)
    assert set(result) == {"run", "seconds", "tokens_per_second", "tasks"}
    mood = result["tasks"]["mood"]
    assert mood["scores"]["f1"]["value"] > 0.9
    assert (
        mood["scores"]["f1"]["low"] <= mood["scores"]["f1"]["value"] <= mood["scores"]["f1"]["high"]
    )
    assert mood["against"]["difference"]["f1"]["p_value"] < 0.05
    assert len(mood["wordings"]) == 2
    assert set(result["tasks"]["place"]["scores"]) == {"squad_em", "squad_f1"}
    kept = json.loads((run / "evals" / "all" / "scores.json").read_text())
    assert kept["tasks"] == result["tasks"]
    lines = (run / "evals" / "all" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 20 * 2 + 10
    assert {"task", "row", "prompt", "prediction", "references", "against"} <= set(
        json.loads(lines[0])
    )

    shown = cli("eval", "--metric", "rouge", "--limit", "5", "--against", "runs/tune")
    assert shown.code == 0, shown.err
    assert "rougeL" in shown.out
    assert "runs/tune" in shown.err

    text = cli("eval", "--run", "runs/base", "--json")
    assert json.loads(text.out)["tasks"]["text"]["scores"]["perplexity"]["value"] > 1

    answered = cli("generate", "--json", "--run", "runs/tune", "Mood of: Ada dances.")
    answer = json.loads(answered.out)
    assert answer["response"] == "glad"
    assert (answer["stop"], answer["prompt"]) == ("stop", "Mood of: Ada dances.")
    by_field = cli("generate", "--template", "./mood.yaml", "--field", "text=Bo weeps.")
    assert by_field.out.strip() == "sad"


def test_the_result_loads_without_itune(tuned: Path, cli: Callable[..., Any]) -> None:
    import torch
    import transformers

    folder = tuned / "runs" / "tune" / "model"
    assert "itune" not in (folder / "config.json").read_text()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Mood of: Cy sighs."}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        made = model.generate(**ids)
    plain = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    ours = cli("generate", "--json", "Mood of: Cy sighs.")
    assert json.loads(ours.out)["response"] == plain.strip()


def test_a_file_of_prompts_is_answered_in_order_and_only_once(
    tuned: Path, cli: Callable[..., Any]
) -> None:
    prompts = [f"Mood of: {name} laughs." for name in ("Ada", "Bo", "Cy")]
    write(tuned / "in.jsonl", [{"prompt": prompt} for prompt in prompts])
    assert cli("generate", "--input", "in.jsonl", "--output", "out.jsonl").code == 0
    whole = (tuned / "out.jsonl").read_text()
    assert [json.loads(line)["prompt"] for line in whole.splitlines()] == prompts
    (tuned / "out.jsonl").write_text(whole.splitlines()[0] + '\n{"prompt": "to')
    again = cli("generate", "--input", "in.jsonl", "--output", "out.jsonl")
    assert "1 of 3 are answered already" in again.err
    assert (tuned / "out.jsonl").read_text() == whole


def test_an_adapter_is_tuned_scored_and_merged(tuned: Path, cli: Callable[..., Any]) -> None:
    made = cli(
        "tune", "-r", "tune.yaml", "-o", "runs/lora", "-s", "output.merge=true", "-s",
        "adapter={peft_type: lora, r: 8, lora_alpha: 16, target_modules: all-linear}",
    )  # fmt: skip
    assert made.code == 0, made.err
    assert (tuned / "runs/lora/model/adapter_config.json").is_file()
    assert (tuned / "runs/lora/merged/config.json").is_file()
    ask = ("generate", "--json", "Ada weeps. How is it?")
    ours = cli(*ask, "--run", "runs/lora").out
    whole = cli(*ask, "--model", "runs/lora/merged")
    assert whole.code == 0, whole.err
    assert ours == whole.out


def test_predictions_from_a_file_are_scored_without_a_model(
    tmp_path: Path, cli: Callable[..., Any]
) -> None:
    import sacrebleu

    said = ["the cat sat on the mat today", "a dog ran home", "no"]
    gold = [["the cat sat on a mat today"], ["a dog ran home", "the dog went home"], ["yes"]]
    write(
        tmp_path / "p.jsonl",
        [{"prediction": p, "references": r} for p, r in zip(said, gold, strict=True)],
    )
    result = json.loads(cli("eval", "--predictions", "p.jsonl", "--metric", "bleu", "--json").out)
    streams = [[r[0] for r in gold], [r[1] if len(r) > 1 else None for r in gold]]
    expected = sacrebleu.corpus_bleu(said, streams).score  # type: ignore[arg-type]
    assert result["tasks"]["predictions"]["scores"]["bleu"]["value"] == pytest.approx(expected)


def test_the_preview_marks_what_is_learnt(
    tmp_path: Path, cli: Callable[..., Any], tiny_model_dir: Path
) -> None:
    world(tmp_path)
    options = ("-r", "tune.yaml", "-s", f"model.name={tiny_model_dir}", "--preview", "2")
    shown = cli("tune", *options, "--json")
    assert shown.code == 0, shown.err
    result = json.loads(shown.out)
    assert len(result["examples"]) == 2
    for example in result["examples"]:
        assert len(example["ids"]) == len(example["supervised"])
        assert 0 < sum(example["supervised"]) < len(example["ids"])
    assert result["counts"]["dropped"] == 0
    assert not (tmp_path / "runs").exists()
    shown = cli("tune", *options).out
    assert shown.count("⟪</s>⟫⟧") == 2
    assert "training data, all 240 rows" in shown


def test_a_run_of_hardly_a_step_is_told_beforehand(
    tmp_path: Path, cli: Callable[..., Any], tiny_model_dir: Path
) -> None:
    rows = [{"prompt": f"what is {n}?", "completion": f"the number {n}"} for n in range(60)]
    write(tmp_path / "rows.jsonl", rows)
    given = [f"model.name={tiny_model_dir}", "data.train.path=rows.jsonl", "training.max_length=64"]
    options = [each for one in given for each in ("-s", one)]
    for more in ((), ("--plan",)):
        told = cli("tune", *options, *more).err
        (line,) = [each for each in told.splitlines() if "training.tokens_per_step" in each]
        assert "the whole run is about 1 step, too few to learn much. Set it to" in line
        assert "for about 30 steps an epoch, or raise training.num_train_epochs." in line
    wanted = line.split("Set it to ")[1].split()[0]
    told = cli("tune", *options, "-s", f"training.tokens_per_step={wanted}", "--output", "b").err
    assert "too few" not in told
    assert 26 <= int(told.split("done: ")[1].split()[0]) <= 34
    told = cli("tune", *options, "-s", "training.max_steps=1", "--output", "c").err
    assert "too few" not in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tune", "-r", "nowhere.yaml"], "nowhere.yaml"),
        (["tune", "-r", "tune.yaml", "-s", "training.leraning_rate=1"], "learning_rate"),
        (["tune", "-r", "tune.yaml", "-s", "model.name=./nothing"], "no such folder"),
        (["tune", "-r", "tune.yaml", "-s", "data.train.0.path=mods.jsonl"], "moods.jsonl"),
        (["tune", "-r", "tune.yaml", "-s", "data.train.0.path=broken.jsonl"], "broken.jsonl:2"),
        (["tune", "-r", "tune.yaml", "-s", "data.train.0.path=empty.jsonl"], "0 rows"),
        (["tune", "-r", "tune.yaml", "-s", "data.train.0.path=text.jsonl"], "label"),
        (["tune", "-r", "tune.yaml", "-s", "adapter={peft_type: lorra}"], "lora"),
        (["tune", "-r", "tune.yaml", "-s", "adapter={peft_type: lora, ranks: 2}"], "no such field"),
        (["tune", "-r", "tune.yaml", "-s", "adapter={peft_type: lora, rank: 2}"], "Here it is r"),
        (["pretrain", "-r", "pre.yaml", "-s", "model.from_scratch.hiden_size=3"], "hidden_size"),
        (["eval", "--run", "elsewhere"], "not a run"),
        (["eval"], "no finished run"),
        (["eval", "--predictions", "moods.jsonl"], "--metric"),
        (["eval", "--predictions", "moods.jsonl", "--metric", "blue"], "bleu"),
        (["generate"], "no prompt"),
        (["generate", "hello", "-s", "training.seed=3"], "generation.FIELD"),
    ],
)  # fmt: skip
def test_a_users_mistake_is_one_message_and_exit_code_two(
    arguments: list[str], said: str, tmp_path: Path, cli: Callable[..., Any], tiny_model_dir: Path
) -> None:
    world(tmp_path)
    (tmp_path / "broken.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "tune.yaml").write_text(TUNE.replace("runs/base", str(tiny_model_dir)))
    ended = cli(*arguments)
    assert ended.code == 2, ended.err
    assert said in ended.err
    assert "Traceback" not in ended.err
    assert all(line.startswith("error: ") for line in ended.err.splitlines() if "error" in line)


def test_an_output_folder_that_is_not_ours_is_left_alone(
    tmp_path: Path, cli: Callable[..., Any], tiny_model_dir: Path
) -> None:
    world(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    ended = cli(
        "tune", "-r", "tune.yaml", "-s", f"model.name={tiny_model_dir}", "-o", "mine", "--fresh"
    )
    assert ended.code == 2
    assert "not a run" in ended.err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_two_processes_train_what_one_does(
    tmp_path: Path, itune: Callable[..., Any], tiny_model_dir: Path
) -> None:
    world(tmp_path)
    line = ["tune", "-r", "tune.yaml", "-s", f"model.name={tiny_model_dir}"]
    line += ["-s", "training.num_train_epochs=0.5", "-s", "training.heldout_rows=0"]
    assert itune(*line, "-o", "runs/one").returncode == 0
    two = itune(*line, "-o", "runs/two", "--processes", "2")
    assert two.returncode == 0, two.stderr
    one_log, two_log = (
        [
            json.loads(text)
            for text in (tmp_path / "runs" / name / "log.jsonl").read_text().splitlines()
        ]
        for name in ("one", "two")
    )
    assert json.loads((tmp_path / "runs/two/run.json").read_text())["processes"] == 2
    assert len(one_log) == len(two_log)
    for one, other in zip(one_log, two_log, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def test_an_error_in_two_processes_is_one_message_and_exit_code_two(
    tmp_path: Path, itune: Callable[..., Any], tiny_model_dir: Path
) -> None:
    world(tmp_path)
    (tmp_path / "moods.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label\n')
    line = ["tune", "-r", "tune.yaml", "-s", f"model.name={tiny_model_dir}", "--processes", "2"]
    ended = itune(*line)
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert [text for text in ended.stderr.splitlines() if text.startswith("error: ")] == [
        next(text for text in ended.stderr.splitlines() if "moods.jsonl:2" in text)
    ]


@pytest.mark.slow
def test_a_signal_to_several_processes_leaves_a_checkpoint(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    world(tmp_path)
    line = ["tune", "-r", "tune.yaml", "-s", f"model.name={tiny_model_dir}", "--processes", "2"]
    line += ["-s", "training.num_train_epochs=2000", "-s", "training.save_steps=100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "itune", *line], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "runs/tune/log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "Traceback" not in said
    assert list((tmp_path / "runs/tune/checkpoints").iterdir())


@pytest.mark.parametrize("kind", ["deepspeed", "fsdp"])
def test_sharding_that_would_not_happen_is_refused(
    kind: str, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    world(tmp_path)
    monkeypatch.setenv(f"ACCELERATE_USE_{kind.upper()}", "true")
    ended = cli("pretrain", "-r", "pre.yaml")
    assert ended.code == 3
    assert kind in ended.err
    assert "--set launch.fsdp=true" in ended.err
    assert ("launch.reshard_after_forward: false" in ended.err) == (kind == "deepspeed")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_two_processes_pretrain_from_nothing(tmp_path: Path, itune: Callable[..., Any]) -> None:
    world(tmp_path)
    made = itune("pretrain", "-r", "pre.yaml", "--processes", "2", "-s", "training.max_steps=3")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "runs/pre/model/tokenizer.json").is_file()


@pytest.mark.slow
def test_accelerate_launches_it(tmp_path: Path, tiny_model_dir: Path) -> None:
    world(tmp_path)
    line = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", "-m", "itune"]
    line += ["tune", "-r", "tune.yaml", "-s", f"model.name={tiny_model_dir}"]
    line += ["-s", "training.num_train_epochs=0.2"]
    ended = subprocess.run(
        [sys.executable, *line], cwd=tmp_path, env=os.environ, capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "runs/tune/model/config.json").is_file()
