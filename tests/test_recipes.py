"""The recipe: how YAML is read, what is refused in which words, what is written and compared."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from itune import checks, elsewhere, errors, launchers, recipes, records, yamls

GOOD = """\
model: {name: some/model}
data:
  train: {path: rows.jsonl, template: sentiment}
"""
TRAINING = GOOD + "training:\n"


def faults(text: str, command: str = "") -> list[str]:
    with pytest.raises(errors.RecipeError) as caught:
        recipes.loads(text, "x.yaml", command)
    return str(caught.value).splitlines()


def load(text: str, *overrides: str, command: str = "") -> recipes.Recipe:
    Path("x.yaml").write_text(text, encoding="utf-8")
    return recipes.load("x.yaml", overrides=overrides, command=command)


def override_faults(text: str, *overrides: str) -> list[str]:
    with pytest.raises(errors.RecipeError) as caught:
        load(text, *overrides)
    return str(caught.value).splitlines()


# --- YAML 1.2 -----------------------------------------------------------------------------------

SCALARS = {
    "1e-5": 1e-5,
    "1E+3": 1000.0,
    ".5": 0.5,
    "-1.": -1.0,
    "0": 0,
    "-17": -17,
    "0x1F": 31,
    "0o17": 15,
    "true": True,
    "False": False,
    "null": None,
    "~": None,
    "yes": "yes",
    "no": "no",
    "on": "on",
    "off": "off",
    "08": "08",
    "007": "007",
    "1_000": "1_000",
    "12:30:45": "12:30:45",
    "2024-01-01": "2024-01-01",
    "1.2.3": "1.2.3",
    "'1e-5'": "1e-5",
    '"null"': "null",
    "test[:2000]": "test[:2000]",
    "1e999": float("inf"),
}


@pytest.mark.parametrize("text", SCALARS)
def test_scalars_are_those_of_yaml_1_2(text: str) -> None:
    value = yamls.parse(f"a: {text}\n", "x.yaml", errors.RecipeError).data["a"]
    assert value == SCALARS[text]
    assert type(value) is type(SCALARS[text])


UNREADABLE = {
    "": "x.yaml:1: expected a mapping, found an empty file",
    "# only a comment\n": "x.yaml:1: expected a mapping, found an empty file",
    "- a\n- b\n": "x.yaml:1: expected a mapping, found a list of 2.",
    "just text": "x.yaml:1: expected a mapping, found 'just text'.",
    "a: [1,2": "x.yaml:1:8: not YAML, near 'a: [1,2': a list is not closed",
    "a:\n\tb: 1\n": "x.yaml:2:1: a tab in the indentation. Use spaces.",
    "a: {x: 1}\nb:\n  c: 1\n\td: 2\n": "x.yaml:4:1: a tab in the indentation. Use spaces.",
    "a: b: c": "x.yaml:1:5: not YAML, near 'a: b: c': a ': ' inside a value",
    'a: "x': "x.yaml:1:6: not YAML, near 'a: \"x': the text ends inside quotes",
    "a: @x": "a value starts with a sign of YAML's own. Put it in quotes.",
    "a: 1\nb\nc: 2": "neither 'key: value' nor '- item'",
    "a: 1\n  b: 2\n": "x.yaml:2:4: not YAML",
    "a: 1\n--- \nb: 2\n": "x.yaml:2:1: a second document (---).",
    "a: !!python/object/apply:os.system ['touch marker']": "x.yaml:1:4: the tag "
    "'tag:yaml.org,2002:python/object/apply:os.system' is not allowed",
    "a: !mine x": "the tag '!mine' is not allowed",
    "a: &x 1\nb: {<<: *x}": "x.yaml:2:5: the merge key << is not part of YAML 1.2.",
    "a: &x [*x]": "x.yaml:1:8: the cyclic alias *x holds itself.",
    "a: *x": "x.yaml:1:4: the alias *x has no anchor.",
    "1: a": "x.yaml:1:1: expected text as the key, found 1. Put it in quotes.",
    "? [a]\n: b": "expected text as the key, found a list or mapping.",
    'a: "\\ud800"': "half of a surrogate pair",
    "a: \x01": "x.yaml:1:4: the character U+0001 does not belong in a text file.",
    f"a: {'1' * 5000}": "a number of too many digits",
    "a: " + "[" * 3000: "nested deeper than 50",
    "a: " + "{b: " * 3000: "nested deeper than 50",
    "[" * 51 + "]" * 51: "nested deeper than 50",
}


@pytest.mark.parametrize("text", UNREADABLE, ids=lambda text: repr(text[:30]))
def test_what_is_not_a_yaml_mapping_is_told_with_its_place(text: str) -> None:
    (line,) = faults(text)
    assert UNREADABLE[text] in line
    assert line.startswith("x.yaml:")
    assert not Path("marker").exists()


def test_an_alias_bomb_is_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    started = time.process_time()
    (line,) = faults("\n".join(lines))
    assert "aliases expand to more than 10000 nodes" in line
    assert time.process_time() - started < 1


def test_aliases_are_followed() -> None:
    text = "model: {name: m}\ndata: {train: &rows {path: a}, eval: [*rows, *rows]}\n"
    recipe = recipes.loads(text)
    assert recipe.data.eval == recipe.data.train * 2


def test_aliases_do_not_get_around_the_depth() -> None:
    lines = ["a0: &a0 [[[[[[[[[[x]]]]]]]]]]"]
    lines += [f"a{i}: &a{i} [[[[[[[[[[*a{i - 1}]]]]]]]]]]" for i in range(1, 7)]
    assert "nested deeper than 50" in faults("\n".join(lines))[0]


def test_bytes_that_are_not_utf8_are_told(tmp_path: Path) -> None:
    for raw, told in (
        (GOOD.encode("utf-16"), "not UTF-8: byte 0xff at 0"),
        (b"a: caf\xe9\n", "not UTF-8: byte 0xe9 at 6"),
        (b"#" * 1_000_001, "larger than 1 MB"),
    ):
        path = tmp_path / "x.yaml"
        path.write_bytes(raw)
        with pytest.raises(errors.RecipeError, match=told):
            recipes.load(path)


def test_a_byte_order_mark_is_fine() -> None:
    Path("x.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert recipes.load("x.yaml").model.name == "some/model"


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from(list("ab:-[]{}&*!|>'\"\\%@`#, \n\t0.1e~?<\ud800\x00é"))))
def test_any_text_is_read_or_refused_in_our_words(text: str) -> None:
    try:
        recipes.loads(text, "x.yaml")
    except errors.RecipeError as error:
        for line in str(error).splitlines():
            assert line.startswith("x.yaml:")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(
        [*SCALARS, "<<", "=", "- a", "a: b", " x ", "x\n", "\n\n", "#", "0b1", "1:20"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), JSON))
def test_what_is_written_is_read_back(data: dict[str, Any]) -> None:
    assert yamls.parse(yamls.dump(data), "x.yaml", errors.RecipeError).data == data


# --- faults of fields ---------------------------------------------------------------------------

# What stands after GOOD, and the line told about it.
FIELDS = {
    "training: {leraning_rate: 1e-5}": "x.yaml:4: training.leraning_rate: unknown key. "
    "Did you mean 'learning_rate'?",
    "training:\n  learning_rate: abc": "x.yaml:5: training.learning_rate: expected a number > 0 "
    "and <= 10, found 'abc'.",
    "training: {learning_rate: '1e-5'}": "x.yaml:4: training.learning_rate: expected a number > 0 "
    "and <= 10, found '1e-5'. Take the quotes off.",
    "training: {learning_rate: -1}": "x.yaml:4: training.learning_rate: expected a number > 0 and "
    "<= 10, found -1.",
    "training: {learning_rate: .nan}": "x.yaml:4: training.learning_rate: expected a finite "
    "number, found nan.",
    "generation: {temperature: .inf}": "x.yaml:4: generation.temperature: expected a finite "
    "number, found inf.",
    "training: {learning_rate: }": "x.yaml:4: training.learning_rate: expected a number > 0 and "
    "<= 10, found nothing. Give a value or leave the key out.",
    "training: {seed: 2.0}": "x.yaml:4: training.seed: expected a whole number >= 0 and "
    "< 4294967296, found 2.0. Write 2.",
    "training: {seed: true}": "x.yaml:4: training.seed: expected a whole number >= 0 and "
    "< 4294967296, found true.",
    "training: {save_steps: 0}": "x.yaml:4: training.save_steps: expected a number > 0, found 0.",
    "training: {save_steps: 2.5}": "x.yaml:4: training.save_steps: expected a share below 1 or a "
    "whole number of steps, found 2.5.",
    "training: {num_train_epochs: -1}": "x.yaml:4: training.num_train_epochs: expected a number "
    "> 0, found -1.",
    "training: {tokens_per_step: 0}": "x.yaml:4: training.tokens_per_step: expected a whole number "
    ">= 1, found 0.",
    "training: {micro_batch_tokens: 0}": "x.yaml:4: training.micro_batch_tokens: expected a whole "
    "number >= 1, found 0.",
    "training: {micro_batch_tokens: 99999}": "x.yaml:4: training.micro_batch_tokens: 99999 is more "
    "than tokens_per_step, 16384. Lower it or leave it out.",
    "training: {packing: yes}": "x.yaml:4: training.packing: expected true or false, found 'yes'.",
    "training: {optim: adamw}": "x.yaml:4: training.optim: expected one of adamw_torch_fused, "
    "adamw_torch, adafactor, sgd, found 'adamw'.",
    "training: {train_on: lst}": "x.yaml:4: training.train_on: expected one of assistant, last, "
    "found 'lst'. Did you mean 'last'?",
    "training: {lr: 0.1}": "x.yaml:4: training.lr: unknown key. Here it is learning_rate.",
    "training: {bf16: true}": "x.yaml:4: training.bf16: unknown key. Here it is model.dtype.",
    "training: {epochs: 1}": "x.yaml:4: training.epochs: unknown key. Here it is num_train_epochs.",
    "training: {batch_size: 8}": "x.yaml:4: training.batch_size: unknown key. A step is measured "
    "in tokens: tokens_per_step.",
    "lora: {r: 8}": "x.yaml:4: lora: unknown key. Write adapter: {peft_type: lora, r: 16}.",
    "training: [1]": "x.yaml:4: training: expected a mapping of keys, found a list of 1.",
    "evaluation: {metrics: f1}": "x.yaml:4: evaluation.metrics: expected a list, found 'f1'. "
    "Write [f1].",
    "evaluation: {metrics: [accurcy]}": "x.yaml:4: evaluation.metrics.0: unknown metric "
    "'accurcy'. Did you mean 'accuracy'?",
    "evaluation: {against: 12:30:45, confidence: 95}": "x.yaml:4: evaluation.confidence: expected "
    "a number > 0 and < 1, found 95.",
    "evaluation: {against: 2024}": "x.yaml:4: evaluation.against: expected text, found 2024. "
    "Put it in quotes.",
    "adapter: {r: 8}": "x.yaml:4: adapter: peft_type is missing. Add one, such as peft_type: lora.",
    "adapter: lora": "x.yaml:4: adapter: expected a mapping of keys, found 'lora'. Write "
    "{peft_type: lora}.",
    "adapter: {peft_type: lora, rank: 8}": "x.yaml:4: adapter.rank: unknown key. Here it is r.",
    'adapter: {peft_type: lora, r: "8"}': "x.yaml:4: adapter.r: expected a number, found the text "
    "'8'. Take the quotes off.",
    'adapter: {peft_type: lora, use_rslora: "false"}': "x.yaml:4: adapter.use_rslora: expected "
    "true or false, found the text 'false'. Take the quotes off.",
    "output: runs/x": "x.yaml:4: output: expected a mapping of keys, found 'runs/x'. Write "
    "{dir: runs/x}.",
    "learning_rate: 1.0e-4": "x.yaml:4: learning_rate: unknown key. Here it is "
    "training.learning_rate.",
    "lr: 1.0e-4": "x.yaml:4: lr: unknown key. Here it is training.learning_rate.",
    "leraning_rate: 1.0e-4": "x.yaml:4: leraning_rate: unknown key. Did you mean "
    "'training.learning_rate'?",
    "limit: 8": "x.yaml:4: limit: unknown key. Here it is data.train.limit or data.eval.limit.",
    "training: {metrics: [f1]}": "x.yaml:4: training.metrics: unknown key. Here it is "
    "evaluation.metrics.",
    "packing: true": "x.yaml:4: packing: unknown key. Here it is training.packing.",
    "train: x": "x.yaml:4: train: unknown key. Here it is data.train.",
    "training: {gradient_clipping: 1}": "x.yaml:4: training.gradient_clipping: unknown key. "
    "Here it is max_grad_norm.",
    "training: {lora_alpha: 16}": "x.yaml:4: training.lora_alpha: unknown key. Here it is "
    "adapter.lora_alpha.",
    "launch: {num_processes: 0}": "x.yaml:4: launch.num_processes: expected a whole number >= 1, "
    "found 0.",
    "quantization: {quant_method: torchao}\nadapter: {peft_type: lora}\nlaunch: {fsdp: true}": (
        "x.yaml:4: quantization: beside launch.fsdp: weights of few bits are not cut. Take one of "
        "the two out."
    ),
    "training: {torch_compile: true}\nlaunch: {fsdp: true}": "x.yaml:4: training.torch_compile: "
    "beside launch.fsdp: compiled layers are not cut. Take one of the two out.",
    "training: {optim: adafactor}\nlaunch: {fsdp: true}": "x.yaml:4: training.optim: beside "
    "launch.fsdp: adafactor keeps moments of rows and columns, which are not cut. Take one of the "
    "two out.",
    "launch: {fsdp: full_shard}": "x.yaml:4: launch.fsdp: expected true or false, found "
    "'full_shard'.",
    "launch: {cpu_offload: true}": "x.yaml:4: launch.cpu_offload: only parts of a model that is "
    "cut are kept in the machine's memory. Set launch.fsdp: true too, or take it out.",
    "launch: {deepspeed: zero3.json}": f"x.yaml:4: launch.deepspeed: itune runs no DeepSpeed. "
    f"{launchers.ZERO}",
    'output: {dir: "a\\0b"}': "x.yaml:4: output.dir: 'a\\x00b' holds a control character. "
    "Delete it.",
    "output: {dir: .}": "x.yaml:4: output.dir: '.' is no folder for one run. Name one below it.",
    "output: {dir: /}": "x.yaml:4: output.dir: '/' is no folder for one run. Name one below it.",
    "name: mine": "x.yaml:4: name: unknown key. A recipe is named by its file; the model's name "
    "is model.name.",
    "trainig: {}": "x.yaml:4: trainig: unknown key. Did you mean 'training'?",
    "tracking: {log_with: [x]}\ntracking: {}": "x.yaml:5: tracking: given on lines 4 and 5. "
    "Keep one.",
}
FIELDS = {
    text: told.replace("x.yaml:5: tracking: given", "x.yaml:4: tracking: given")
    for text, told in FIELDS.items()
}


def test_a_key_under_eval_is_not_sent_to_train() -> None:
    told = faults(f"{GOOD}  eval: {{dataset: x}}\n")
    assert "x.yaml:4: data.eval.dataset: unknown key. Here it is path." in told


@pytest.mark.parametrize("text", FIELDS)
def test_a_fault_of_a_field_is_one_line(text: str) -> None:
    assert faults(f"{GOOD}{text}\n") == [FIELDS[text]]


def test_a_bare_file_name_is_told_how_to_be_a_source() -> None:
    for text in ("a.csv", "[a.csv]"):
        (line,) = faults(f"model: {{name: x}}\ndata: {{train: {text}}}\n")
        assert line.endswith("found 'a.csv'. Write {path: a.csv}.")


def test_long_paths_are_refused() -> None:
    for path in ("x" * 300, "x/" * 600):
        (line,) = faults(f"{GOOD}output: {{dir: {path}}}\n")
        assert "At most 1000 and 200 fit." in line


def test_all_faults_are_told_at_once_in_the_order_of_the_file() -> None:
    lines = faults(
        "model: {nam: x}\n"
        "data:\n"
        "  train:\n"
        "    - {path: a, wieght: 2}\n"
        "    - {template: 3}\n"
        "training: {max_steps: -2,\n"
        "  seed: x}\n"
        "output: 3\n"
    )
    assert [line.split(": ")[:2] for line in lines] == [
        ["x.yaml:1", "model"],
        ["x.yaml:1", "model.nam"],
        ["x.yaml:4", "data.train.0.wieght"],
        ["x.yaml:5", "data.train.1.path"],
        ["x.yaml:5", "data.train.1.template"],
        ["x.yaml:6", "training.max_steps"],
        ["x.yaml:7", "training.seed"],
        ["x.yaml:8", "output"],
    ]
    assert "is missing. Add it: A repository on the hub" in lines[3]


def test_sections_that_are_missing_are_told() -> None:
    lines = faults("training: {}\n")
    assert [line.split(": ")[1] for line in lines] == ["model", "data"]
    assert all(line.startswith("x.yaml:1: ") for line in lines)


def test_a_section_left_empty_has_its_defaults() -> None:
    assert recipes.loads(TRAINING + "adapter:\noutput:\n") == recipes.loads(GOOD)


def test_name_and_from_scratch_exclude_each_other() -> None:
    scratch = "{model_type: llama, tokenizer: some/tokenizer}"
    data = "data: {train: {path: a}}\n"
    (line,) = faults(f"model:\n  name: x\n  from_scratch: {scratch}\n{data}")
    assert line == (
        "x.yaml:3: model.from_scratch: given (line 3) together with model.name (line 2). Keep one."
    )
    (line,) = faults(f"model: {{dtype: auto}}\n{data}")
    assert "neither name nor from_scratch" in line


def test_max_steps_and_epochs_exclude_each_other_naming_both_lines() -> None:
    (line,) = faults(TRAINING + "  max_steps: 3\n  num_train_epochs: 1\n")
    assert "(line 6) together with training.max_steps (line 5). Keep one." in line


def test_the_fields_of_a_config_are_free_but_the_tokenizer_is_not() -> None:
    text = (
        "model:\n"
        "  from_scratch: {model_type: llama, hidden_size: 96, rope: {theta: 1e3},\n"
        "    tokenizer: TOKENIZER}\n"
        "data: {train: {path: a.txt}}\n"
    )
    scratch = recipes.loads(text.replace("TOKENIZER", "{vocab_size: 512}")).model.from_scratch
    assert scratch is not None
    assert scratch.config == {"hidden_size": 96, "rope": {"theta": 1000.0}}
    assert scratch.tokenizer == recipes.TokenizerRecipe(algorithm="bpe", vocab_size=512)
    named = recipes.loads(text.replace("TOKENIZER", "some/folder")).model.from_scratch
    assert named is not None
    assert named.tokenizer == "some/folder"
    (line,) = faults(text.replace("TOKENIZER", "{vocab_size: 2}"))
    assert line.startswith("x.yaml:3: model.from_scratch.tokenizer.vocab_size: expected a whole")
    (line,) = faults(text.replace("TOKENIZER", "{vocabsize: 2, vocab_size: 99}"))
    assert "tokenizer.vocabsize: unknown key. Did you mean 'vocab_size'?" in line
    (line,) = faults(text.replace(",\n    tokenizer: TOKENIZER", ""))
    assert "model.from_scratch.tokenizer: is missing" in line


def test_a_source_has_a_template_or_a_format() -> None:
    text = "model: {name: m}\ndata:\n  train: [{path: a}, {path: b, format: alpaca}]\n"
    assert [each.format for each in recipes.loads(text, command="tune").data.train] == [
        None,
        "alpaca",
    ]
    (line,) = faults(text.replace("format: alpaca", "format: alpaca, template: chat"), "tune")
    assert line.startswith("x.yaml:3: data.train.1.format: given (line 3) together with")


def test_a_template_that_is_not_there_is_told_before_anything_runs() -> None:
    with pytest.raises(errors.RecipeError, match="Did you mean 'sentiment'"):
        load(GOOD.replace("sentiment", "sentimant"), command="tune")


def test_no_training_source_is_told() -> None:
    assert "expected at least one source" in faults("model: {name: m}\ndata: {train: []}\n")[0]


@pytest.mark.parametrize("command", ["pretrain", "tune", "eval", "generate"])
def test_a_section_that_nothing_implements_is_refused(command: str) -> None:
    text = GOOD + "budget: {price_per_hour: 2}\n"
    assert "budget: unknown key" in faults(text, command)[0]


# --- secrets ------------------------------------------------------------------------------------

SECRET = "hf_AbCdEfGh0123456789"


@pytest.mark.parametrize(
    "text",
    [
        f"hub_token: {SECRET}",
        f"generation: {{note: see {SECRET}}}",
        "tracking: {api_key: canary}",
        "tracking: {wandb_api_key: canary}",
        "generation: {deep: [{password: canary}]}",
        "adapter: {peft_type: lora, client_secret: canary}",
        "output: {dir: 'https://me:canary@host/x'}",
        f"training: {{seed: {SECRET}}}",
        f"training: [x, # {SECRET}",
        f"{SECRET}: 1",
    ],
)
def test_secrets_are_refused_and_never_echoed(text: str) -> None:
    told = "\n".join(faults(f"{GOOD}{text}\n"))
    assert "canary" not in told
    assert SECRET not in told


def test_a_secret_is_told_as_such_once() -> None:
    assert faults(f"{GOOD}hub_token: x\n") == [
        "x.yaml:4: hub_token: secrets do not belong in a recipe. Set them in the environment "
        "(HF_TOKEN)."
    ]


def test_a_secret_in_an_override_is_not_echoed() -> None:
    for each in (f"model.revision={SECRET}", "hub_token=canary", "model.token=canary"):
        told = "\n".join(override_faults(GOOD, each))
        assert "secrets do not belong" in told
        assert "canary" not in told
        assert SECRET not in told


def test_keys_about_tokens_are_no_secrets() -> None:
    text = GOOD + "generation: {eos_token_id: 2, use_cls_token: true, pad_token: x}\n"
    assert recipes.loads(text).generation["use_cls_token"] is True
    text = GOOD.replace("template:", "rename: {token: text}, template:")
    assert recipes.loads(text).data.train[0].rename == {"token": "text"}


# --- overrides ----------------------------------------------------------------------------------


def test_overrides_are_yaml_and_win_over_the_file() -> None:
    recipe = load(
        TRAINING + "  seed: 3\n",
        "training.seed=4",
        "training.learning_rate=1e-5",
        "evaluation.metrics=[f1, accuracy]",
        "data.train.path=*.jsonl",
        "data.train.split=test[:2000]",
        "adapter.peft_type=lora",
        "generation.temperature=0.7",
    )
    assert recipe.training.seed == 4
    assert recipe.training.learning_rate == 1e-5
    assert recipe.evaluation.metrics == ("f1", "accuracy")
    assert recipe.data.train[0].path == "*.jsonl"
    assert recipe.data.train[0].split == "test[:2000]"
    assert recipe.adapter is not None
    assert recipe.adapter["peft_type"] == "lora"
    assert recipe.generation == {"temperature": 0.7}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}),
        ({"r": 32}, {"r": 32, "lora_alpha": 64, "target_modules": "all-linear"}),
        ({"r": 4, "lora_alpha": 4}, {"r": 4, "lora_alpha": 4, "target_modules": "all-linear"}),
        ({"target_modules": ["q"]}, {"r": 8, "lora_alpha": 16, "target_modules": ["q"]}),
        ({"use_rslora": True}, {"r": 8, "target_modules": "all-linear", "use_rslora": True}),
        ({"target_parameters": ["w"]}, {"r": 8, "lora_alpha": 16, "target_parameters": ["w"]}),
    ],
)
def test_lora_goes_into_every_linear_layer_with_twice_its_rank(
    given: dict[str, Any], wanted: dict[str, Any]
) -> None:
    made = recipes.loads(GOOD + f"adapter: {json.dumps({'peft_type': 'lora', **given})}\n")
    assert made.adapter == {"peft_type": "lora", **wanted}
    other = recipes.loads(GOOD + "adapter: {peft_type: ia3}\n")
    assert other.adapter == {"peft_type": "ia3"}


def test_null_takes_a_section_out() -> None:
    assert load(GOOD + "adapter: {peft_type: lora}\n", "adapter=null").adapter is None


@pytest.mark.parametrize("key", ["data.train.path", "data.train.0.path"])
@pytest.mark.parametrize("written", ["{path: a}", "[{path: a}]"])
def test_the_index_of_an_only_source_may_be_left_out(key: str, written: str) -> None:
    text = f"model: {{name: m}}\ndata: {{train: {written}}}\n"
    assert load(text, f"{key}=b").data.train == (recipes.Source(path="b"),)


def test_one_of_several_sources_needs_its_index() -> None:
    text = "model: {name: m}\ndata: {train: [{path: a}, {path: b}]}\n"
    assert [s.path for s in load(text, "data.train.1.path=c").data.train] == ["a", "c"]
    for each in ("data.train.path=c", "data.train.2.path=c"):
        (line,) = override_faults(text, each)
        assert line.startswith(f"--set {each}: data.train is a list of 2. Give an index, from 0")


def test_options_of_the_command_line_replace_the_other_way_to_stop() -> None:
    steps = load(TRAINING + "  num_train_epochs: 3\n", "training.max_steps=5").training
    assert (steps.max_steps, steps.num_train_epochs) == (5, 1.0)
    epochs = load(TRAINING + "  max_steps: 5\n", "training.num_train_epochs=2").training
    assert (epochs.max_steps, epochs.num_train_epochs) == (-1, 2.0)
    (line,) = override_faults(GOOD, "training.max_steps=5", "training.num_train_epochs=2")
    assert "Keep one." in line


OVERRIDES = {
    "training.leraning_rate=1": "unknown key. Did you mean 'learning_rate'?",
    "training.learning_rate=abc": "expected a number > 0 and <= 10, found 'abc'.",
    "training": "expected key=value, such as training.max_steps=100.",
    "=1": "expected key=value",
    "a..b=1": "expected key=value",
    "model.name.x=1": "model.name is 'some/model', not a section.",
    "training.seed=[": "not YAML, near '[': a value is missing.",
    "training.seed=!!int 3": "the tag 'tag:yaml.org,2002:int' is not allowed",
    "generation.x={a: 1, a: 2}": "a key is given twice. Keep one.",
    "nosuch.key=1": "unknown key. Known: adapter, data",
    "training.seed=null": "found nothing. Give a value or leave the key out.",
    "learning_rate=1e-4": "unknown key. Here it is training.learning_rate.",
    "model=runs/x": "expected a mapping of keys, found 'runs/x'. Write {name: runs/x}.",
    "data=rows.csv": "expected a mapping of keys, found 'rows.csv'. Write {train: {path: rows.csv",
    "data.train.1.limit=5": "data.train is one source, not a list. Write data.train.limit; several",
    "output=3": "expected a mapping of keys, found 3.",
}


@pytest.mark.parametrize("text", OVERRIDES)
def test_a_fault_of_an_override_has_it_as_its_place(text: str) -> None:
    (line,) = override_faults(GOOD, text)
    assert line.startswith(f"--set {text}: ")
    assert OVERRIDES[text] in line


def test_output_wins_and_is_checked() -> None:
    Path("x.yaml").write_text(GOOD + "output: {dir: a}\n", encoding="utf-8")
    assert recipes.load("x.yaml", output=Path("b")).output.dir == Path("b")
    with pytest.raises(errors.RecipeError, match=r"^--output \.: '\.' is no folder"):
        recipes.load("x.yaml", output=Path())


# --- finding ------------------------------------------------------------------------------------


def test_a_recipe_is_found_here_then_in_recipes_then_among_the_shipped() -> None:
    assert recipes.load("imdb").output.dir == Path("runs/imdb")
    Path("recipes/deep").mkdir(parents=True)
    Path("recipes/imdb.yaml").write_text(GOOD, encoding="utf-8")
    Path("recipes/deep/er.yml").write_text(GOOD, encoding="utf-8")
    assert recipes.load("imdb").model.name == "some/model"
    for name in ("deep/er", "deep-er", "recipes/deep/er.yml"):
        assert recipes.load(name).name == "deep-er"
    Path("imdb.yaml").write_text(GOOD.replace("some", "other"), encoding="utf-8")
    assert recipes.load("imdb").model.name == "other/model"


def test_shipped_recipes_in_folders_are_found_by_slash_and_dash() -> None:
    for name in ("quickstart/pretrain", "quickstart-pretrain", "recipes/quickstart/pretrain.yaml"):
        recipe = recipes.load(name, command="pretrain")
        assert recipe.name == "quickstart-pretrain"
        assert recipe.output.dir == Path("runs/quickstart-pretrain")


def test_a_recipe_that_is_not_there_is_told_with_the_nearest() -> None:
    Path("mine").mkdir()
    Path("mine/reviews.yaml").write_text(GOOD, encoding="utf-8")
    for name, told in (
        ("imbd", "imbd: no such recipe. Did you mean 'imdb'?"),
        ("mine/review.yaml", "no such recipe. Did you mean 'mine/reviews.yaml'?"),
        ("zzzz", "zzzz: no such recipe. Known: alpaca, "),
        ("mine", "mine: a folder, not a recipe. It holds mine/reviews.yaml."),
        ("", "'': not the name of a file."),
        ("a\0b", "not the name of a file."),
    ):
        with pytest.raises(errors.RecipeError) as caught:
            recipes.load(name)
        assert told in str(caught.value)


def test_no_recipe_at_all_names_the_shipped() -> None:
    with pytest.raises(errors.RecipeError, match=r"no recipe\. Give --recipe .* Known: alpaca"):
        recipes.load(None)
    alone = recipes.load(None, overrides=["model.name=m", "data.train={path: a, template: chat}"])
    assert alone.data.train[0].template == "chat"


def test_the_recipe_of_a_run_has_the_name_of_the_run() -> None:
    recipe = recipes.loads(GOOD, "runs/imdb/recipe.yaml")
    assert recipe.name == "imdb"
    assert recipe.output.dir == Path("runs/imdb")


# --- writing and comparing ----------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
SMALL = st.floats(1e-9, 1, exclude_max=True)
FREE = st.dictionaries(TEXT.filter(lambda key: not checks.SECRET_KEY.search(key)), JSON, max_size=3)


def taken(free: dict[str, Any]) -> dict[str, Any]:
    """What an adapter's section takes: it refuses numbers in quotes and names of elsewhere."""
    return {
        key: value
        for key, value in free.items()
        if key not in elsewhere.LORA
        and (not isinstance(value, str) or isinstance(yamls.resolve(value.strip()), str | None))
    }


SOURCES = st.lists(
    st.builds(
        recipes.Source,
        path=TEXT,
        split=st.none() | TEXT,
        weight=SMALL,
        data_files=st.none() | TEXT | st.lists(TEXT, max_size=2).map(tuple),
        rename=st.dictionaries(TEXT, TEXT, max_size=2),
    ),
    min_size=1,
    max_size=3,
).map(tuple)
RECIPES = st.builds(
    recipes.Recipe,
    name=st.just("x"),
    model=st.builds(recipes.Model, name=TEXT, dtype=st.sampled_from(["auto", "float16"]))
    | st.builds(
        recipes.Model,
        from_scratch=st.builds(
            recipes.FromScratch,
            model_type=TEXT,
            tokenizer=TEXT | st.builds(recipes.TokenizerRecipe, vocab_size=st.integers(16, 99999)),
            hidden_size=st.integers(min_value=1),
        ),
    ),
    data=st.builds(recipes.Data, train=SOURCES, eval=SOURCES),
    adapter=st.none() | FREE.map(lambda free: {**taken(free), "peft_type": "lora"}),
    generation=FREE,
    training=st.builds(
        recipes.Training,
        learning_rate=SMALL,
        save_steps=SMALL | st.integers(1, 1000),
        warmup_steps=SMALL | st.integers(0, 1000),
    )
    | st.builds(recipes.Training, max_steps=st.integers(1, 99)),
    output=st.builds(recipes.Output, dir=st.just(Path("runs/a b")), merge=st.booleans()),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(RECIPES)
def test_a_recipe_written_out_is_the_same_recipe(recipe: recipes.Recipe) -> None:
    again = recipes.loads(recipes.dump(recipe), "x.yaml")
    assert again == recipe
    assert recipes.digest(again) == recipes.digest(recipe)
    assert recipes.diff(again, recipe) == []
    assert recipes.dump(again) == recipes.dump(recipe)


def test_every_default_is_written_out() -> None:
    data = yamls.parse(recipes.dump(recipes.loads(GOOD)), "x.yaml", errors.RecipeError).data
    assert set(data) == set(records.keys_of(recipes.Recipe))
    assert set(data["training"]) == set(recipes.Training.model_fields)


def test_the_digest_knows_what_decides_a_result() -> None:
    same = [
        "data: {train: {template: sentiment, path: rows.jsonl}}\nmodel: {name: some/model}\n",
        GOOD + "output: {dir: elsewhere, merge: true}\n",
        GOOD + "tracking: {log_with: [tensorboard]}\n",
        GOOD + "launch: {num_processes: 2}\n",
        TRAINING + "  {logging_steps: 9, save_steps: 9, save_total_limit: 9}\n",
        TRAINING + "  {seed: 17}\n",
        GOOD + "generation: {num_beams: 2}\n",
        GOOD + "evaluation: {metrics: [f1]}\n",
    ]
    digest = recipes.digest(recipes.loads(GOOD))
    assert {recipes.digest(recipes.loads(text)) for text in same} == {digest}
    other = [
        GOOD.replace("some", "other"),
        TRAINING + "  {seed: 18}\n",
        TRAINING + "  {max_steps: 7}\n",
        GOOD + "adapter: {peft_type: lora}\n",
        GOOD + "quantization: {quant_method: torchao}\nadapter: {peft_type: lora}\n",
    ]
    digests = {recipes.digest(recipes.loads(text)) for text in other}
    assert digest not in digests
    assert len(digests) == len(other)


def test_diff_lists_dotted_keys_with_both_values() -> None:
    old = recipes.loads(TRAINING + "  {seed: 1}\nevaluation: {metrics: [f1]}\n")
    new = recipes.loads(
        TRAINING.replace("rows.jsonl", "b") + "  {seed: 2}\nadapter: {peft_type: lora}\n"
    )
    assert sorted(recipes.diff(old, new)) == [
        ("adapter.lora_alpha", None, 16),
        ("adapter.peft_type", None, "lora"),
        ("adapter.r", None, 8),
        ("adapter.target_modules", None, "all-linear"),
        ("data.train.0.path", "rows.jsonl", "b"),
        ("evaluation.metrics", ["f1"], []),
        ("training.seed", 1, 2),
    ]


def test_recipes_are_never_changed() -> None:
    recipe = recipes.loads(GOOD)
    with pytest.raises(ValueError, match="frozen"):
        recipe.training.seed = 3


# --- reference ----------------------------------------------------------------------------------


def sections() -> set[type[records.Record]]:
    found: set[type[records.Record]] = {recipes.Recipe}
    waiting = [recipes.Recipe]
    while waiting:
        for info in waiting.pop().model_fields.values():
            record = records.record_in(info.annotation)
            if record is not None and record not in found:
                found.add(record)
                waiting.append(record)  # type: ignore[arg-type]
    return found


def test_every_field_is_told_by_its_docstring() -> None:
    assert len(sections()) == 13
    for record in sections():
        for key, info in record.model_fields.items():
            assert info.description, f"{record.__name__}.{key}"
            assert info.description.strip()[-1] in ".", f"{record.__name__}.{key}"


@pytest.mark.parametrize(
    ("made", "name"), [("page", "recipe.md"), ("template_page", "template.md")]
)
def test_the_reference_pages_are_those_that_are_generated(made: str, name: str) -> None:
    page = runpy.run_path(str(ROOT / "docs" / "make_recipe.py"))[made]()
    committed = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert page == committed, "run: python docs/make_recipe.py"


def test_the_schema_describes_the_file() -> None:
    schema = recipes.schema()
    assert json.loads(json.dumps(schema)) == schema
    assert set(schema["properties"]) == set(records.keys_of(recipes.Recipe))
    assert schema["required"] == ["model", "data"]
    assert {"$ref": "#/$defs/Source"} in schema["$defs"]["Data"]["properties"]["train"]["anyOf"]
    assert (
        "learning rate" in schema["$defs"]["Training"]["properties"]["learning_rate"]["description"]
    )


HEAVY = ("torch", "transformers", "datasets", "peft", "accelerate", "evaluate", "numpy")


def test_a_recipe_is_checked_at_once_without_anything_heavy() -> None:
    """Processor seconds of a new process, Python's own start included: the machine may be busy."""
    program = (
        "import sys, time\n"
        "from itune import recipes, templates\n"
        "recipes.load('imdb')\n"
        "templates.load('sentiment')\n"
        f"print(time.process_time(), *(n for n in {HEAVY!r} if n in sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    seconds, *heavy = done.stdout.split()
    assert not heavy
    assert float(seconds) < 1
