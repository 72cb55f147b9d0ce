"""Tuning on top of what was tuned: all weights of it, from anywhere, with where it came from."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from conftest import Ended, Itune

Cli = Callable[..., Any]
RECIPE = """
model: {name: ./model}
adapter: {peft_type: lora, r: 4, target_modules: all-linear}
data: {train: {path: rows.jsonl}}
training: {max_steps: 3, tokens_per_step: 300, max_length: 128, heldout_rows: 0}
"""
ALL = RECIPE.replace("adapter: {peft_type: lora, r: 4, target_modules: all-linear}\n", "")


@pytest.fixture
def folder(tmp_path: Path, tiny_model_dir: Path) -> Path:
    rows = [{"prompt": f"Where is {k}?", "completion": f"in room {k % 5}"} for k in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"text": f"Room {k} is beside room {k + 1}. " * 3} for k in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    (tmp_path / "lora.yaml").write_text(RECIPE)
    (tmp_path / "all.yaml").write_text(ALL)
    return tmp_path


def test_all_weights_are_trained_on_top_of_an_adapter_as_of_the_merged_model(
    folder: Path, cli: Cli
) -> None:
    from safetensors.torch import load_file

    merged = ("-s", "output.merge=true", "-s", "training.learning_rate=0.01")
    assert cli("tune", "-r", "lora.yaml", "-o", "runs/a", *merged).code == 0
    found = {}
    for name in ("runs/a", "runs/a/merged"):
        out = f"runs/on-{Path(name).name}"
        ended = cli("tune", "-r", "all.yaml", "-o", out, "-s", f"model.name={name}")
        assert ended.code == 0, ended.err
        manifest = json.loads(Path(out, "run.json").read_text())
        assert manifest["trainable"] == manifest["parameters"]
        found[name] = load_file(Path(out, "model/model.safetensors"))
    start = load_file("runs/a/merged/model.safetensors")
    for key, weight in found["runs/a"].items():
        assert not weight.equal(start[key]), key
        assert weight.equal(found["runs/a/merged"][key]), key
    line = ("-r", "all.yaml", "-o", "runs/more", "-s", "model.name=runs/a")
    ended = cli("pretrain", *line, "-s", "data.train.path=texts.jsonl")
    assert ended.code == 0, ended.err


def test_a_model_of_which_nothing_is_trained_is_an_error(folder: Path, cli: Cli) -> None:
    frozen = "adapter={peft_type: lora, inference_mode: true}"
    ended = cli("tune", "-r", "lora.yaml", "-s", frozen)
    assert (ended.code, "Traceback" in ended.err) == (2, False), ended.err
    assert "adapter: nothing of the model would be trained" in ended.err
    assert not Path("runs/lora/log.jsonl").exists()


def test_an_adapter_on_random_weights_keeps_them_and_names_no_repository(
    folder: Path, cli: Cli
) -> None:
    scratch = (
        "{model_type: llama, tokenizer: ./model, hidden_size: 16, num_hidden_layers: 1,"
        " num_attention_heads: 2, num_key_value_heads: 2, intermediate_size: 16}"
    )
    text = RECIPE.replace("{name: ./model}", f"{{from_scratch: {scratch}}}")
    Path("new.yaml").write_text(text)
    ended = cli("tune", "-r", "new.yaml")
    assert ended.code == 0, ended.err
    settings = json.loads(Path("runs/new/model/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder / "runs/new/base")
    assert settings["target_modules"] == sorted(settings["target_modules"])  # in every run alike
    assert cli("generate", "--run", "runs/new", "Where is 3?").code == 0


@pytest.mark.parametrize("kind", ["lily", "shadow", "prefix_tuning"])
def test_an_adapter_that_never_folds_is_refused_before_a_row_is_read(
    kind: str, folder: Path, cli: Cli
) -> None:
    (folder / "rows.jsonl").write_text("no row\n")
    merged = ("-s", f"adapter={{peft_type: {kind}}}", "-s", "output.merge=true")
    ended = cli("tune", "-r", "lora.yaml", *merged)
    assert ended.code == 2, ended.err
    assert f"output.merge: its adapter ({kind}) cannot be folded into its base" in ended.err
    saved = {"peft_type": kind.upper(), "base_model_name_or_path": "./model"}
    (folder / "below").mkdir()
    (folder / "below/adapter_config.json").write_text(json.dumps(saved))
    ended = cli("tune", "-r", "lora.yaml", "--fresh", "-s", "model.name=./below")
    assert ended.code == 2, ended.err
    assert f"model.name: ./below: its adapter ({kind}) cannot be folded into its" in ended.err


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ("{peft_type: beft}", "this adapter cannot be folded into its base: Base layer has"),
        ("{peft_type: lora, target_modules: [lm_head]}", "lm_head has its weights in common"),
        ("{peft_type: lora, target_modules: [embed_tokens]}", "embed_tokens has its weights in"),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias")
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_an_adapter_that_does_not_fold_into_this_base_is_refused_before_a_row_is_read(
    adapter: str, said: str, folder: Path, cli: Cli
) -> None:
    import peft
    import transformers

    tied = json.loads(Path("model/config.json").read_text()) | {"tie_word_embeddings": True}
    Path("model/config.json").write_text(json.dumps(tied))
    model = transformers.AutoModelForCausalLM.from_pretrained("model")
    model.tie_weights()
    model.save_pretrained("model")
    (folder / "rows.jsonl").write_text("no row\n")
    asked = ("-s", f"adapter={adapter}", "-s", "output.merge=true")
    for more in ((), ("--plan",)):
        ended = cli("tune", "-r", "lora.yaml", *asked, *more)
        assert ended.code == 2, ended.err
        assert f"output.merge: {said}" in ended.err

    kind = adapter[1:-1].replace("peft_type: ", "")
    beft, lora = peft.BeftConfig, peft.LoraConfig
    settings = beft() if kind == "beft" else lora(target_modules=[kind.split("[")[1][:-1]])
    peft.get_peft_model(model, settings).save_pretrained("below", save_embedding_layers=False)
    ended = cli("tune", "-r", "lora.yaml", "-o", "runs/on", "-s", "model.name=./below")
    assert ended.code == 2, ended.err
    assert "model.name: ./below: its adapter cannot be folded into its base, so" in ended.err


@pytest.mark.filterwarnings("ignore")
def test_embeddings_that_a_config_ties_and_a_folder_does_not_are_adapted(
    folder: Path, cli: Cli
) -> None:
    """Both matrices are there and differ, so transformers keeps them apart."""
    tied = json.loads(Path("model/config.json").read_text()) | {"tie_word_embeddings": True}
    Path("model/config.json").write_text(json.dumps(tied))
    head = ("-s", "adapter.target_modules=[lm_head]", "-s", "output.merge=true")
    ended = cli("tune", "-r", "lora.yaml", *head)
    assert ended.code == 0, ended.err


@pytest.mark.filterwarnings("default")
def test_what_peft_warns_of_is_a_line_each(folder: Path, cli: Cli) -> None:
    idle = ("-s", "adapter.rank_pattern={nix: 2}", "-s", "adapter.exclude_modules=[nada]")
    ended = cli("tune", "-r", "lora.yaml", *idle)
    assert ended.code == 0, ended.err
    told = [line for line in ended.err.splitlines() if line.startswith("warning: peft: ")]
    assert len(told) == 2, ended.err
    assert any("rank_pattern" in line and "nix" in line for line in told)
    assert any("exclude_modules" in line and "nada" in line for line in told)
    assert "Warning:" not in ended.err
    assert ".py" not in ended.err


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("num_hidden_layers: 0", "expected a whole number from 1, found 0."),
        ("hidden_size: -16", "expected a whole number from 1, found -16."),
        ("num_attention_heads: 0", "expected a whole number from 1, found 0."),
        ("rms_norm_eps: -1.0e-6", "expected a number from 0, found -1e-06."),
        ("initializer_range: -0.02", "expected a number from 0, found -0.02."),
        ("attention_dropout: 1.5", "expected a share from 0 to 1, found 1.5."),
        ("rope_theta: 0", "expected a number above 0, found 0."),
        ("hidden_act: nix", "unknown 'nix'."),
        ("hidden_act: gellu", "gelu"),
    ],
)
def test_a_field_of_which_no_model_should_be_made_is_named_before_a_row_is_read(
    key: str, said: str, folder: Path, cli: Cli
) -> None:
    (folder / "rows.jsonl").write_text("no row\n")
    scratch = f"{{model_type: llama, tokenizer: ./model, {key}}}"
    Path("new.yaml").write_text(ALL.replace("{name: ./model}", f"{{from_scratch: {scratch}}}"))
    ended = cli("tune", "-r", "new.yaml")
    assert (ended.code, "Traceback" in ended.err) == (2, False), ended.err
    assert f"model.from_scratch.{key.partition(':')[0]}: " in ended.err
    assert said in ended.err
    assert len(ended.err.strip().splitlines()) <= 2, ended.err


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("hidden_size: 17", "llama cannot be built: "),
        ("hidden_size: wide", "llama cannot be built: "),
        ("num_key_value_heads: 3", "llama cannot be built: "),
        ("vocab_size: 7", "model.from_scratch.vocab_size: 7, and by the tokenizer it is 320."),
    ],
)
def test_a_config_that_no_model_follows_from_is_told_of(
    field: str, said: str, folder: Path, cli: Cli
) -> None:
    scratch = "model_type: llama, tokenizer: ./model, hidden_size: 16, intermediate_size: 16"
    heads = "num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2"
    given = dict(each.split(": ") for each in f"{scratch}, {heads}, {field}".split(", "))
    fields = ", ".join(f"{key}: {value}" for key, value in given.items())
    Path("new.yaml").write_text(ALL.replace("{name: ./model}", f"{{from_scratch: {{{fields}}}}}"))
    ended = cli("tune", "-r", "new.yaml")
    assert (ended.code, "Traceback" in ended.err) == (2, False), ended.err
    assert f"model.from_scratch{'.' if 'vocab' in field else ':'}" in ended.err
    assert said in ended.err


def test_an_adapter_whose_base_is_gone_says_where_the_whole_model_is(
    folder: Path, cli: Cli
) -> None:
    assert cli("tune", "-r", "lora.yaml", "-s", "output.merge=true").code == 0
    shutil.rmtree("model")
    for name in ("runs/lora", "runs/lora/model"):
        ended = cli("generate", "--model", name, "Where is 3?")
        assert ended.code == 2, ended.err
        assert "Name the whole model instead, runs/lora/merged, or put a copy" in ended.err


def test_shares_of_hidden_tokens_are_at_most_all_of_them(folder: Path, cli: Cli) -> None:
    ended = cli("tune", "-r", "all.yaml", "-s", "training.random_replace_prob=0.3")
    assert ended.code == 2, ended.err
    assert "training.random_replace_prob" in ended.err
    assert "0.3 and mask_replace_prob, 0.8, are shares of the same tokens" in ended.err


# --- an adapter of the hub ------------------------------------------------------------------


@pytest.fixture
def root(hub: tuple[Path, dict[str, str | None]]) -> Path:
    return hub[0]


@pytest.fixture
def cli_there(hub: tuple[Path, dict[str, str | None]], itune: Itune) -> Cli:
    """The command in a process of its own: libraries read once where the hub is."""

    def run(*arguments: object) -> Ended:
        done = itune(*arguments, env=hub[1])
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


@pytest.mark.slow
def test_an_adapter_of_the_hub_is_tuned_on_as_one_of_a_folder(
    root: Path, folder: Path, cli_there: Cli
) -> None:
    from safetensors.torch import load_file

    shutil.copytree("model", root / "models/stack/base")
    made = ("-s", "model.name=stack/base", "-s", "training.learning_rate=0.01")
    assert cli_there("tune", "-r", "lora.yaml", "-o", "runs/a", *made).code == 0
    shutil.copytree("runs/a/model", root / "models/stack/a")
    (root / "models/stack/a/training.bin").write_text("pickled")
    for name, recipe in (("here", "all.yaml"), ("there", "all.yaml"), ("lora", "lora.yaml")):
        below = "runs/a" if name == "here" else "stack/a"
        ended = cli_there("tune", "-r", recipe, "-o", f"runs/{name}", "-s", f"model.name={below}")
        assert ended.code == 0, ended.err
    here, there = (load_file(f"runs/{name}/model/model.safetensors") for name in ("here", "there"))
    assert all(weight.equal(there[key]) for key, weight in here.items())
    told = cli_there("generate", "--model", "stack/a", "--json", "Where is 3?")
    assert told.out == cli_there("generate", "--model", "runs/a/model", "--json", "Where is 3?").out
    card = huggingface_hub.ModelCard.load(Path("runs/there/model/README.md"))
    assert card.data.base_model == "stack/a"
    stacked = Path("runs/lora/model/README.md").read_text()
    assert "[stack/a](https://huggingface.co/stack/a)" in stacked
    assert "PATH_OF_THE_BASE" in stacked
    assert "That base is on no hub" in stacked


@pytest.mark.slow
def test_an_adapter_of_the_hub_whose_base_is_on_none_is_told_of(
    root: Path, folder: Path, cli_there: Cli
) -> None:
    assert cli_there("tune", "-r", "lora.yaml", "-o", "runs/a").code == 0
    shutil.copytree("runs/a/model", root / "models/stack/lone")
    config = root / "models/stack/lone/adapter_config.json"
    config.write_text(config.read_text().replace(str(folder / "model"), "./nowhere"))
    ended = cli_there("tune", "-r", "lora.yaml", "-o", "runs/b", "-s", "model.name=stack/lone")
    assert (ended.code, "Traceback" in ended.err) == (2, False), ended.err
    assert "stack/lone: an adapter for './nowhere', which is on no hub and not here" in ended.err
    assert "(stack/lone-merged)" in ended.err


def test_a_name_that_is_no_model_offers_those_that_are(folder: Path, cli: Cli) -> None:
    assert cli("tune", "-r", "all.yaml", "-o", "runs/done").code == 0
    (folder / "runs/torn").mkdir()
    (folder / "runs/torn/run.json").write_text('{"state": "failed"}')
    ended = cli("tune", "-r", "all.yaml", "-o", "runs/new", "-s", "model.name=runs/dona")
    assert ended.code == 2, ended.err
    assert "runs/dona: no such folder" in ended.err
    assert "done" in ended.err.split("no such folder")[1]
    assert "torn" not in ended.err
    assert "new" not in ended.err.split("no such folder")[1]


def test_pretraining_says_its_perplexity(folder: Path, cli: Cli) -> None:
    sets = ("data.eval={path: texts.jsonl}", "data.allow_overlap=true", "training.heldout_rows=8")
    given = ("data.train.path=texts.jsonl", *sets)
    ended = cli("pretrain", "-r", "all.yaml", *(x for each in given for x in ("-s", each)))
    assert ended.code == 0, ended.err
    loss, told = (ended.err.split(f"{name} ")[-1] for name in ("held-out loss", "perplexity"))
    assert float(told.split()[0]) == pytest.approx(math.exp(float(loss.split(",")[0])), rel=1e-3)


def test_what_a_method_needs_and_was_not_given_is_named(folder: Path, cli: Cli) -> None:
    ended = cli("tune", "-r", "lora.yaml", "-s", "adapter={peft_type: adaption_prompt}")
    assert ended.code == 2, ended.err
    assert "these are not set: " in ended.err
    assert "adapter_len" in ended.err
    assert "adapter_layers" in ended.err


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("modules_to_save: [lm_haed]", "the model has no 'lm_haed'. Did you mean 'lm_head'?"),
        ("modules_to_save: lm_head", "not a list. Write [lm_head]."),
        ("trainable_token_indices: [99999]", "does not go with LlamaForCausalLM: index 99999"),
        ("trainable_token_indices: [1, -1]", "expected a list of token numbers"),
        ("trainable_token_indices: 5", "expected a list of token numbers"),
        ("task_type: SEQ_CLS", "it follows from the model's family"),
        ("r: four", "does not go with LlamaForCausalLM: '<=' not supported"),
    ],
)
def test_a_field_of_a_method_that_will_not_do_is_told_of(
    field: str, said: str, folder: Path, cli: Cli
) -> None:
    ended = cli("tune", "-r", "lora.yaml", "-s", f"adapter={{peft_type: lora, {field}}}")
    assert (ended.code, "Traceback" in ended.err) == (2, False), ended.err
    assert said in ended.err
    assert "are not set" not in ended.err


def test_a_lora_that_wakes_at_a_token_answers_beside_its_base(folder: Path, cli: Cli) -> None:
    wakes = "adapter={peft_type: lora, r: 4, alora_invocation_tokens: [5]}"
    assert cli("tune", "-r", "lora.yaml", "-s", wakes).code == 0
    ended = cli("generate", "--run", "runs/lora", "Where is 3?")
    assert ended.code == 0, ended.err


def test_the_card_names_every_stage_with_its_data(folder: Path, cli: Cli) -> None:
    assert cli("pretrain", "-r", "all.yaml", "-s", "data.train.path=texts.jsonl").code == 0
    for name, base in (("second", "runs/all"), ("third", "runs/second")):
        ended = cli("tune", "-r", "lora.yaml", "-o", f"runs/{name}", "-s", f"model.name={base}")
        assert ended.code == 0, ended.err
    card = (folder / "runs/third/model/README.md").read_text()
    stages = [line for line in card.splitlines() if line.startswith("* Before it: ")]
    assert len(stages) == 2
    for stage, told in zip(
        stages,
        (
            ("`all`", "pretrain", "`texts.jsonl`", "`./model`"),
            ("`second`", "tune", "`rows.jsonl`", "`./all`"),
        ),
        strict=True,
    ):
        assert all(each in stage for each in told), stage
