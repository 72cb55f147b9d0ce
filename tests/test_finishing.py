"""What a run leaves is whole after any kill, loads from anywhere, and merges late as well."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from itune import folding

Cli = Callable[..., Any]
RECIPE = """
model: {name: MODEL}
adapter: {peft_type: lora, r: 4, target_modules: all-linear}
data: {train: {path: rows.jsonl}}
training: {max_steps: 4, tokens_per_step: 300, max_length: 128, learning_rate: 1.0e-2}
generation: {max_new_tokens: 6}
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_model_dir: Path) -> Path:
    rows = [{"prompt": f"Where is {k}?", "completion": f"in room {k % 5}"} for k in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    (tmp_path / "lora.yaml").write_text(RECIPE.replace("MODEL", "./model"))
    return tmp_path


def test_a_run_killed_after_its_model_was_written_is_finished_by_the_same_command(
    folder: Path, cli: Cli
) -> None:
    assert cli("tune", "-r", "lora.yaml").code == 0
    run = folder / "runs/lora"
    whole = (run / "model/adapter_model.safetensors").read_bytes()
    manifest = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**manifest, "state": "running"}))
    again = cli("tune", "-r", "lora.yaml")
    assert again.code == 0, again.err
    assert (run / "model/adapter_model.safetensors").read_bytes() == whole
    assert json.loads((run / "run.json").read_text())["state"] == "finished"


def test_merging_is_done_later_too_and_changes_no_answer(folder: Path, cli: Cli) -> None:
    assert cli("tune", "-r", "lora.yaml").code == 0
    late = cli("tune", "-r", "lora.yaml", "-s", "output.merge=true")
    assert late.code == 0, late.err
    assert "merged: logits within" in late.err
    ask = ("generate", "--json", "Where is 7?", "-s", "generation.max_new_tokens=6")
    assert cli(*ask, "--run", "runs/lora").out == cli(*ask, "--model", "runs/lora/merged").out


def test_what_cannot_be_merged_is_refused_before_training(folder: Path, cli: Cli) -> None:
    ended = cli(
        "tune", "-r", "lora.yaml", "-s", "output.merge=true",
        "-s", "adapter={peft_type: prompt_tuning, num_virtual_tokens: 4}",
    )  # fmt: skip
    assert ended.code == 2
    assert "output.merge" in ended.err
    assert not (folder / "runs/lora/log.jsonl").exists()


def test_an_adapter_on_an_adapter_is_whole_by_itself(
    folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft
    import torch
    import transformers

    assert cli("tune", "-r", "lora.yaml", "-o", "runs/one").code == 0
    two = ("tune", "-r", "lora.yaml", "-o", "runs/two", "-s", "model.name=runs/one")
    made = cli(*two, "-s", "output.merge=true", "-s", "training.seed=3")
    assert made.code == 0, made.err
    assert cli("generate", "--run", "runs/two", "Where is 3?").code == 0
    # From elsewhere, by peft alone, and on what the first tuning had learnt.
    monkeypatch.chdir("/")
    alone = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "runs/two/model")
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder / "runs/two/merged")
    ids = torch.arange(4, 40)[None]
    with torch.inference_mode():
        difference = (alone(ids).logits - whole(ids).logits).abs().max()
    assert difference < 1e-4


@pytest.mark.parametrize(
    ("option", "code", "said"),
    [
        ("generation.max_new_token=5", 2, "max_new_tokens"),
        ("generation.num_return_sequences=2", 2, "one answer"),
        ("training.max_steps=0", 2, "-1 for epochs"),
        ("tracking.log_with=[nope]", 2, "unknown 'nope'"),
        ("tracking.log_with=[wandb]", 3, "not installed"),
        ("model.family=masked", 2, "masked"),
        ("training.use_liger_kernel=true", 3, "its kernels run on a GPU"),
        ("training.lr_scheduler_kwargs={cycles: 2}", 2, "unexpected keyword argument 'cycles'"),
    ],
)
def test_what_could_fail_late_fails_before_the_first_step(
    option: str, code: int, said: str, folder: Path, cli: Cli
) -> None:
    ended = cli("tune", "-r", "lora.yaml", "-s", option)
    assert (ended.code, "Traceback" in ended.err) == (code, False), ended.err
    assert said in ended.err
    assert not (folder / "runs/lora/log.jsonl").exists()


@pytest.mark.parametrize(
    "option",
    [
        "tracking.log_with=[nope]",
        "training.use_liger_kernel=true",
        "training.lr_scheduler_kwargs={cycles: 2}",
    ],
)
def test_a_plan_refuses_what_the_run_refuses(option: str, folder: Path, cli: Cli) -> None:
    planned = cli("tune", "-r", "lora.yaml", "-s", option, "--plan")
    ended = cli("tune", "-r", "lora.yaml", "-s", option)
    assert planned.code == ended.code != 0
    assert planned.err == ended.err.partition("\n")[2] != ""


def test_a_plan_says_that_the_folder_would_be_refused(folder: Path, cli: Cli) -> None:
    (folder / "taken").mkdir()
    (folder / "taken/notes.txt").write_text("mine")
    ended = cli("tune", "-r", "lora.yaml", "--plan", "--json", "-o", "taken")
    assert ended.code == 0, ended.err
    assert "as things are, the run itself would be refused: taken" in ended.err
    both = cli("tune", "-r", "lora.yaml", "--plan", "--preview", "1")
    assert both.code == 2
    assert "--preview and --plan" in both.err


def test_other_settings_for_answers_are_no_other_run(folder: Path, cli: Cli) -> None:
    assert cli("tune", "-r", "lora.yaml").code == 0
    again = cli("tune", "-r", "lora.yaml", "-s", "generation.max_new_tokens=9")
    assert again.code == 0, again.err
    assert "already complete" in again.err
    assert "next: itune generate --run runs/lora PROMPT" in again.err


def test_rows_that_changed_since_the_run_began_are_refused(
    folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from itune import training

    with monkeypatch.context() as patched:
        patched.setattr(training._Loop, "train", lambda self: self.save())
        cli("tune", "-r", "lora.yaml")
    manifest = json.loads((folder / "runs/lora/run.json").read_text())
    (folder / "runs/lora/run.json").write_text(json.dumps({**manifest, "state": "interrupted"}))
    rows = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text(rows.replace("room 3", "room 9"))
    ended = cli("tune", "-r", "lora.yaml")
    assert ended.code == 2, ended.err
    assert "rows.jsonl: its rows have changed since this run began" in ended.err
    (folder / "rows.jsonl").write_text(rows)
    assert cli("tune", "-r", "lora.yaml").code == 0


def test_a_run_that_took_no_step_is_in_nobodys_way(folder: Path, cli: Cli) -> None:
    (folder / "bad.jsonl").write_text('{"prompt": "a", "completion": 5}\n')
    assert cli("tune", "-r", "lora.yaml", "-s", "data.train.path=bad.jsonl").code == 2
    mended = cli("tune", "-r", "lora.yaml")
    assert mended.code == 0, mended.err
    # One that did train is not moved aside unasked.
    other = cli("tune", "-r", "lora.yaml", "-s", "training.seed=5")
    assert other.code == 2
    assert "another recipe" in other.err


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_4"])
def test_what_changes_its_base_is_saved_as_a_plain_lora_for_the_base_as_it_is(
    start: str, folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft
    import torch
    import transformers

    from itune import finishing

    ids, told = torch.arange(4, 40)[None], []
    save = finishing.adapters.save

    def saving(model: Any, *given: Any) -> None:
        model.eval()
        with torch.inference_mode():
            told.append(model(ids).logits)
        save(model, *given)

    monkeypatch.setattr(finishing.adapters, "save", saving)
    sets = ("-s", f"adapter.init_lora_weights={start}", "-s", "output.merge=true")
    made = cli("tune", "-r", "lora.yaml", *sets, "-s", "training.learning_rate=0.05")
    assert made.code == 0, made.err
    run = folder / "runs/lora"
    assert not (run / ".start").exists()
    settings = json.loads((run / "model/adapter_config.json").read_text())
    assert (settings["init_lora_weights"], settings["r"]) == (True, 8)
    assert settings["target_modules"] == sorted(settings["target_modules"])
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.inference_mode():
        untuned = base.eval()(ids).logits
        alone = peft.PeftModel.from_pretrained(base, run / "model").eval()(ids).logits
        whole = transformers.AutoModelForCausalLM.from_pretrained(run / "merged").eval()(ids).logits
    assert (alone - told[0]).abs().max() < 1e-5
    assert (whole - told[0]).abs().max() < 1e-5
    assert (untuned - told[0]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": "pissa", "use_dora": True},
        {"init_lora_weights": "olora", "modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa_niter_4", "bias": "all"},
        {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "lora_ga"},
    ],
)
def test_a_start_that_could_not_be_saved_plain_is_refused(fields: dict[str, Any]) -> None:
    from itune import adapters, errors

    with pytest.raises(errors.RecipeError, match=r"adapter\.init_lora_weights: "):
        adapters.config({"peft_type": "lora", **fields})


def test_nothing_is_tuned_on_top_of_what_cannot_be_folded_in(folder: Path, cli: Cli) -> None:
    soft = ("-s", "adapter={peft_type: prompt_tuning, num_virtual_tokens: 4}")
    assert cli("tune", "-r", "lora.yaml", *soft, "-o", "runs/soft").code == 0
    ended = cli("tune", "-r", "lora.yaml", "-s", "model.name=runs/soft", "-o", "runs/on")
    assert ended.code == 2, ended.err
    assert "runs/soft: its adapter (prompt_tuning) cannot be folded into its base" in ended.err
    assert "training data" not in ended.err  # nor was a row read for it
    assert not (folder / "runs/on/log.jsonl").exists()


ALONE = """
import json, sys
sys.modules["itune"] = None  # importing it fails from here on
import peft, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
transformers.utils.logging.set_verbosity_error()
adapter, merged, base, prompt = "runs/lora/model", "runs/lora/merged", "model", sys.argv[1]
asked = [{"role": "user", "content": prompt}]
tokenizer = AutoTokenizer.from_pretrained(adapter)
inputs = tokenizer.apply_chat_template(
    asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
ways = {
    "PeftModel": peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), adapter),
    "AutoPeft": peft.AutoPeftModelForCausalLM.from_pretrained(adapter),
    "AutoModel": AutoModelForCausalLM.from_pretrained(adapter),
    "merged": AutoModelForCausalLM.from_pretrained(merged),
}
settings = GenerationConfig.from_pretrained(adapter)
answers, logits = {}, {}
with torch.inference_mode():
    for name, model in ways.items():
        logits[name] = model.eval()(**inputs).logits
        out = model.generate(**inputs, generation_config=settings)[0, inputs["input_ids"].shape[1]:]
        answers[name] = tokenizer.decode(out, skip_special_tokens=True)
apart = max(float((each - logits["PeftModel"]).abs().max()) for each in logits.values())
piped = transformers.pipeline("text-generation", model=merged)(asked)
answers["pipeline"] = piped[0]["generated_text"][-1]["content"]
print(json.dumps({"answers": answers, "apart": apart, "stops": settings.eos_token_id}))
"""


@pytest.mark.slow
def test_what_comes_out_loads_and_answers_alike_with_no_itune_installed(
    folder: Path, cli: Cli
) -> None:
    import os
    import subprocess
    import sys

    assert cli("tune", "-r", "lora.yaml", "-s", "output.merge=true").code == 0
    ended = cli("generate", "--json", "--run", "runs/lora", "Where is 7?")
    ours = json.loads(ended.out)["response"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, "Where is 7?"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert {each.strip() for each in told["answers"].values()} == {ours.strip()}
    assert told["apart"] < 1e-4
    assert told["stops"] == [1]
    for name in ("model", "merged"):
        templates = list((folder / "runs/lora" / name).glob("**/*.jinja"))
        assert [each.name for each in templates] == ["chat_template.jinja"]
        settings = json.loads((folder / "runs/lora" / name / "tokenizer_config.json").read_text())
        assert "chat_template" not in settings


@pytest.mark.parametrize(
    ("number", "said"),
    [(1.02, "the merged model's logits differ by"), (float("nan"), "numbers that are not finite")],
    ids=["other", "not a number"],
)
def test_a_merged_model_that_answers_otherwise_is_not_kept(
    number: float, said: str, folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("tune", "-r", "lora.yaml").code == 0
    real = folding.merged

    def spoilt(model: Any) -> Any:
        whole = real(model)
        with torch.no_grad():
            whole.model.layers[0].mlp.down_proj.weight[0] *= number
        return whole

    monkeypatch.setattr(folding, "merged", spoilt)
    ended = cli("tune", "-r", "lora.yaml", "-s", "output.merge=true")
    assert ended.code == 2, ended.err
    assert said in ended.err
    assert sorted(path.name for path in (folder / "runs/lora").glob("*merged*")) == []
    assert json.loads((folder / "runs/lora/run.json").read_text())["state"] == "finished"
