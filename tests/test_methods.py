"""PEFT's methods on every family: trained, saved, read back, merged; frozen weights untouched."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from accelerate.state import AcceleratorState
from conftest import sentences, tiny_model, tiny_tokenizer

from itune import (
    adapters,
    batches,
    data,
    errors,
    families,
    folding,
    formats,
    likelihoods,
    losses,
    models,
    objectives,
    probing,
    recipes,
    vocabularies,
)

PLACE = models.Placement(torch.device("cpu"), torch.float32, "as tests are")
FAMILIES = ("causal", "seq2seq", "masked")
# What a method needs to be told at this size; the rest have defaults of their own.
FIELDS: dict[str, dict[str, Any]] = {
    "adaption_prompt": {"adapter_len": 4, "adapter_layers": 1},
    "boft": {"boft_block_size": 4},
    "c3a": {"block_size": 8},
    "cartridge": {"num_virtual_tokens": 4},
    "cpt": {"cpt_token_ids": [5, 6], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
    "fourierft": {"n_frequency": 8},
    "ln_tuning": {"target_modules": "(.*LayerNorm|.*layernorm|.*layer_norm)"},
    "lora": {"target_modules": "all-linear"},
    "oft": {"oft_block_size": 8},
    "p_tuning": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "prefix_tuning": {"num_virtual_tokens": 4},
    "prompt_tuning": {"num_virtual_tokens": 4},
    "randlora": {"r": 4},
    "road": {"group_size": 8},
    "shira": {"r": 2},
    "trainable_tokens": {"token_indices": [5, 6]},
    "vblora": {"vector_length": 16, "num_vectors": 16, "topk": 2},
    "vera": {"r": 8},
    "waveft": {"n_frequency": 64},
}
# What peft has for some architectures alone; it says so itself.
NOT_FOR = {
    ("seq2seq", "adaption_prompt"),
    ("masked", "adaption_prompt"),
    ("seq2seq", "cpt"),
    ("masked", "cpt"),
    ("seq2seq", "shadow"),
    ("masked", "shadow"),
}
# beft is a bias, and folds into a layer that has one.
UNMERGED = {("causal", "beft"), ("seq2seq", "beft"), ("causal", "shadow")} | {
    (family, "lily") for family in FAMILIES
}


def kinds() -> list[str]:
    names = [str(getattr(k, "value", k)).lower() for k in adapters._kinds()]
    return sorted(set(names) - {name.lower() for name in adapters.REFUSED})


def digest(named: Any) -> dict[str, str]:
    return {
        name: hashlib.sha256(p.detach().numpy().tobytes()).hexdigest()
        for name, p in named
        if not p.requires_grad
    }


def rows_for(family: str) -> tuple[Any, data.Corpus]:
    choices = ["sad", "very glad"]
    tokenizer = vocabularies.with_template(tiny_tokenizer(), family)
    encoder = families.encoder(family, tokenizer).answering(choices)
    rows = [
        [formats.Message("user", text), formats.Message("assistant", choices[k % 2])]
        for k, text in enumerate(sentences(8))
    ]
    return encoder, data.from_tokens(encoder.conversations(rows))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_on_every_family(family: str, kind: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model(family).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    named = recipes.Model(name=str(base))
    place = models.placement(named)
    encoder, corpus = rows_for(family)
    asked = {"peft_type": kind, **FIELDS.get(kind, {})}

    def attached() -> Any:
        model = models.load(named, place)
        return adapters.attach(model, asked, base=str(base), seed=1, family=family)

    if (family, kind) in NOT_FOR:
        with pytest.raises(errors.RecipeError, match="adapter: "):
            attached()
        return
    model = attached()
    frozen = digest(model.named_parameters())
    padding = objectives.collate(encoder, model, recipes.Training())
    if padding is None and adapters.prepends(model):
        padding = batches.padder(2, places=False)
    path = probing.choose(model, 64, padding=padding)
    batch = path.collate(2)(corpus, np.arange(8))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    before = [p.detach().clone() for p in trained]
    with torch.inference_mode(), folding.folded_in(model):
        pass  # as for answers in the midst of a run: it must train on as if nothing had been
    assert digest(model.named_parameters()) == frozen
    model.train()
    for _ in range(3):
        loss = losses.summed(model, batch, head=path.head) / int(corpus.targets.sum())
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert any(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    assert digest(model.named_parameters()) == frozen
    saved_and_merged(
        model.eval(), path, batch, tmp_path / "adapter", unmerged=(family, kind) in UNMERGED
    )


@torch.no_grad()
def saved_and_merged(
    model: Any, path: probing.Path, batch: batches.Batch, folder: Path, *, unmerged: bool
) -> None:
    model.save_pretrained(folder)
    named = recipes.Model(name=str(folder))
    place = models.placement(named)
    again = models.adapted(str(folder), str(folder), named, place).eval()
    again.set_attn_implementation(model.config._attn_implementation)
    wanted = model(**batch.inputs()).logits
    assert float((again(**batch.inputs()).logits - wanted).abs().max()) == 0.0
    whole = models.load(named, place).eval()  # folded in where that can be
    whole.set_attn_implementation(model.config._attn_implementation)
    found = whole(**batch.inputs()).logits
    # float32 on another path: a random basis of many parts (randlora) adds up the most.
    assert float((found - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max()) + 1e-5
    if unmerged:
        with pytest.raises(errors.RecipeError, match="cannot be folded"):
            folding.merged(again)
    elif not adapters.prepends(model) and hasattr(model, "merge_and_unload"):
        assert not hasattr(whole, "peft_config")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"peft_type": "xlora"}, "Use lora"),
        ({"peft_type": "adalora"}, "Use lora"),
        ({"peft_type": "poly"}, "Use lora"),
        ({"peft_type": "multitask_prompt_tuning"}, "Use prompt_tuning"),
        ({"peft_type": "lora", "init_lora_weights": "eva"}, "set it to pissa"),
        ({"peft_type": "lora", "init_lora_weights": "loftq"}, "set it to pissa"),
    ],
)
def test_what_is_known_not_to_work_is_refused(fields: dict[str, Any], said: str) -> None:
    if fields.get("init_lora_weights") == "loftq" and torch.cuda.is_available():
        adapters.config(fields)
        return
    with pytest.raises(errors.RecipeError, match=said):
        adapters.config(fields)


def test_it_is_refused_before_a_row_is_read(
    tiny_model_dir: Path, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = {
        "model": {"name": str(tiny_model_dir)},
        "adapter": {"peft_type": "xlora"},
        "data": {"train": {"path": "broken.jsonl"}},
    }
    Path("tune.yaml").write_text(json.dumps(recipe))
    Path("broken.jsonl").write_text("no row\n")
    ended = cli("tune", "-r", "tune.yaml")
    assert ended.code == 2
    assert "adapter.peft_type: xlora" in ended.err
    assert "broken" not in ended.err


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_virtual_tokens_shift_no_target(family: str) -> None:
    """The loss under prompt tuning is that of peft's own model at the right places."""
    encoder, corpus = rows_for(family)
    fields = {"peft_type": "prompt_tuning", "num_virtual_tokens": 4}
    model = adapters.attach(tiny_model(family), fields, base="x", seed=1, family=family).eval()
    collate = objectives.collate(encoder, model, recipes.Training())
    batch = (collate or batches.padder(2, places=False))(corpus, np.arange(3))
    logits = model(**batch.inputs()).logits[:, -batch.targets.shape[1] :]
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), reduction="sum"
    )
    for head in (losses.TARGETS, losses.FULL):
        found = losses.summed(model, batch, head=head)
        assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    # Choices are told apart by the same numbers.
    prompts = [[formats.Message("user", text)] for text in sentences(3)]
    chances = likelihoods.chances(model, encoder, prompts, ["sad", "very glad"])
    mine = sum(chances.nats[k, k % 2] for k in range(3))
    assert -mine == pytest.approx(float(wanted.detach()), rel=1e-5)


TASK = """
task: classification
choices: [sad, very glad]
prompts: ["{{ text }} How is it?"]
response: "{{ choices[label] }}"
metrics: [accuracy]
"""


@pytest.mark.parametrize(
    "family", ["causal", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES[1:])]
)
@pytest.mark.filterwarnings("ignore")
def test_soft_prompts_go_through_the_commands(
    family: str, tmp_path: Path, cli: Any, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue({"causal": "tiny_model_dir"}.get(family, f"tiny_{family}_dir"))
    rows = [{"text": text, "label": int("likes" in text)} for text in sentences(30)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("ask.yaml").write_text(TASK)
    source = {"path": "rows.jsonl", "template": "./ask.yaml"}
    recipe = {
        "model": {"name": str(model)},
        "adapter": {"peft_type": "prompt_tuning", "num_virtual_tokens": 4},
        "data": {"train": source, "eval": {**source, "limit": 4}, "allow_overlap": True},
        "training": {"max_steps": 3, "tokens_per_step": 400, "max_length": 100},
        "generation": {"max_new_tokens": 3},
        "evaluation": {"against": "base"},
    }
    Path("tune.yaml").write_text(json.dumps(recipe))
    ended = cli("tune", "-r", "tune.yaml", "-o", "runs/soft", "-s", "output.merge=true")
    assert ended.code == 2
    assert "output.merge" in ended.err
    ended = cli("tune", "-r", "tune.yaml", "-o", "runs/soft", "--fresh")
    assert ended.code == 0, ended.err
    scores = cli("eval", "--run", "runs/soft", "--json")
    assert scores.code == 0, scores.err
    assert json.loads(scores.out)["tasks"]["ask"]["rows"] == 4
    asked = cli("generate", "--run", "runs/soft", "the cat", "--json")
    assert asked.code == (2 if family == "masked" else 0), asked.err


@pytest.fixture
def another_precision() -> Iterator[None]:
    """Accelerate keeps the first one of a process, which a run has for itself."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("another_precision")
@pytest.mark.filterwarnings("ignore")
def test_what_is_trained_whole_beside_an_adapter_takes_steps_that_16_bits_would_round_away(
    tmp_path: Path, cli: Any, tiny_model_dir: Path
) -> None:
    rows = [{"prompt": text, "completion": text[::-1]} for text in sentences(30)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"name": str(tiny_model_dir), "dtype": "bfloat16"},
        "adapter": {"peft_type": "lora", "modules_to_save": ["lm_head"]},
        "data": {"train": {"path": "rows.jsonl"}, "eval": {"path": "rows.jsonl", "limit": 2}},
        "training": {"max_steps": 2, "tokens_per_step": 400, "learning_rate": 1e-7},
        "generation": {"max_new_tokens": 3},
    }
    recipe["data"]["allow_overlap"] = True
    Path("tune.yaml").write_text(json.dumps(recipe))
    ended = cli("tune", "-r", "tune.yaml", "-o", "runs/half")
    assert ended.code == 0, ended.err
    assert "computing in bfloat16" in ended.err
    saved = safetensors.torch.load_file("runs/half/model/adapter_model.safetensors")
    (head,) = (value for name, value in saved.items() if "lm_head" in name)
    base = models.load(recipes.Model(name=str(tiny_model_dir), dtype="float32"), PLACE)
    moved = head - base.lm_head.weight.bfloat16()
    assert 0 < float(moved.abs().max()) < 1e-6
    assert cli("eval", "--run", "runs/half", "--json").code == 0


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_model_trains_on_after_its_adapter_was_folded_in_for_answers(kind: str) -> None:
    _, corpus = rows_for("causal")
    model = adapters.attach(tiny_model("causal"), {"peft_type": kind}, base="x", seed=1)
    frozen = digest(model.named_parameters())
    batch = batches.padded(corpus, np.arange(2), 2)
    with torch.inference_mode(), folding.folded_in(model) as folded:
        assert folded is model.get_base_model()
        folded(**batch.inputs())
    assert digest(model.named_parameters()) == frozen
    losses.summed(model, batch).backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert any(grad is not None and bool(grad.any()) for grad in grads)
    assert not hasattr(folding.merged_or_not(model), "merge_adapter")  # and says nothing of it


def test_an_adapter_that_is_refused_only_as_a_whole_stays_with_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapters.attach(tiny_model("causal"), {"peft_type": "lora"}, base="x", seed=1)

    def refused() -> None:
        raise ValueError("not this one")

    monkeypatch.setattr(model.base_model, "merge_and_unload", refused)
    assert folding.merged_or_not(model) is model
    assert "this adapter (lora) cannot be folded into its base" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_a_stop_token_that_an_adapter_can_never_learn_is_told_of(
    tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole, tokenizer = tiny_model("causal"), vocabularies.with_template(tiny_tokenizer())
    stop = families.encoder("causal", tokenizer).stop_id
    fields = {"peft_type": "lora", "target_modules": "all-linear"}

    def said(**more: Any) -> str:
        copied = tiny_model("causal")
        copied.load_state_dict(whole.state_dict())
        model = adapters.attach(copied, {**fields, **more}, base="x", seed=1)
        return "".join(adapters.unheard_stop(model, stop))

    assert not said()
    with torch.no_grad():
        table = whole.get_output_embeddings().weight
        table[[stop, 40, 41]] = table[40].clone()
    found = said()
    assert f"(id {stop}) looks like 2 other tokens" in found
    assert f"Add trainable_token_indices: [{stop}] to the adapter" in found
    other = said(peft_type="ia3", feedforward_modules=[])
    assert f"Use lora with trainable_token_indices: [{stop}], or train all weights." in other
    assert not said(trainable_token_indices=[stop])
    assert not said(modules_to_save=["lm_head"])

    whole.save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    rows = [{"prompt": text, "completion": "yes"} for text in sentences(30)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"name": "base"},
        "adapter": fields,
        "data": {"train": {"path": "rows.jsonl"}},
        "training": {"max_steps": 1, "tokens_per_step": 200},
    }
    Path("stop.yaml").write_text(json.dumps(recipe))
    ended = cli("tune", "-r", "stop.yaml")
    assert ended.code == 0, ended.err
    assert "answers will not stop by themselves" in ended.err


# --- an encoder that was saved without its head -----------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_an_encoder_saved_without_its_head_is_tuned_with_a_new_one(
    tmp_path: Path, cli: Any
) -> None:
    import peft

    whole = tiny_model("masked")
    whole.base_model.save_pretrained("headless")
    tiny_tokenizer().save_pretrained("headless")
    before = hashlib.sha256(Path("headless/model.safetensors").read_bytes()).hexdigest()
    rows = [{"text": text, "label": int("likes" in text)} for text in sentences(30)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("ask.yaml").write_text(TASK)
    source = {"path": "rows.jsonl", "template": "./ask.yaml"}
    recipe = {
        "model": {"name": "headless"},
        "adapter": {"peft_type": "lora", "r": 4},
        "data": {"train": source, "eval": {**source, "limit": 6}, "allow_overlap": True},
        "training": {"max_steps": 3, "tokens_per_step": 400, "learning_rate": 1e-2},
        "output": {"merge": True},
    }
    Path("tune.yaml").write_text(json.dumps(recipe))
    Path("broken.jsonl").write_text("no row\n")
    refused = cli("tune", "-r", "tune.yaml", "-o", "runs/no", "-s", "output.merge=false", "-s",
                  "adapter={peft_type: trainable_tokens, token_indices: [5]}", "-s",
                  "data.train.path=broken.jsonl")  # fmt: skip
    assert refused.code == 2
    assert "trainable_tokens trains no layer of the model" in refused.err
    ended = cli("tune", "-r", "tune.yaml", "-o", "runs/new")
    assert ended.code == 0, ended.err
    assert "headless: it was saved without the head that fills masks" in ended.err
    assert hashlib.sha256(Path("headless/model.safetensors").read_bytes()).hexdigest() == before
    scores = cli("eval", "--run", "runs/new", "--against", "base", "--json")
    assert scores.code == 0, scores.err
    assert json.loads(scores.out)["tasks"]["ask"]["rows"] == 6

    ids = torch.arange(5, 25)[None]
    named = recipes.Model(name="runs/new/model")
    found = [models.adapted("runs/new", "runs/new/model", named, models.placement(named))]
    torch.manual_seed(99)  # whoever loads it draws another head first, which the saved one replaces
    base = transformers.AutoModelForMaskedLM.from_pretrained("headless")
    found.append(peft.PeftModel.from_pretrained(base, "runs/new/model"))
    found.append(transformers.AutoModelForMaskedLM.from_pretrained("runs/new/merged"))
    with torch.no_grad():
        ours, theirs, merged = (model.eval()(input_ids=ids).logits for model in found)
    assert torch.equal(ours, theirs)
    assert float((ours - merged).abs().max()) < 1e-4

    weights = [models.load(recipes.Model(name="headless"), models.placement(named))]
    torch.manual_seed(7)
    weights.append(models.load(recipes.Model(name="headless"), models.placement(named)))
    drawn, again = (model.cls.predictions.transform.dense.weight for model in weights)
    assert torch.equal(drawn, again)


def test_only_a_head_may_be_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    monkeypatch.chdir(tmp_path)
    whole, named = tiny_model("masked"), recipes.Model(name="cut")
    for lost in ("encoder.layer.1.output.dense.weight", "embeddings.word_embeddings.weight"):
        whole.base_model.save_pretrained("cut")
        kept = safetensors.torch.load_file("cut/model.safetensors")
        del kept[lost]
        safetensors.torch.save_file(kept, "cut/model.safetensors", {"format": "pt"})
        with pytest.raises(errors.ModelError, match="weights are missing"):
            models.load(named, models.placement(named))
    whole.config.tie_word_embeddings = False
    whole.base_model.save_pretrained("cut")
    with pytest.raises(errors.ModelError, match=r"weights are missing: cls\.predictions"):
        models.load(named, models.placement(named))


def test_an_adapter_whose_folding_fails_half_way_answers_as_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft
    from peft.tuners.lora import Linear

    tiny_model("causal").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(
        base, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    wrapped.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(3, 30)[None]
    with torch.inference_mode():
        expected = wrapped.eval()(input_ids=ids).logits
    merge, calls = Linear.merge, []

    def failing(self: Any, *given: Any, **named: Any) -> None:
        calls.append(1)
        if len(calls) > 4:
            raise NotImplementedError("no such layer")
        merge(self, *given, **named)

    monkeypatch.setattr(Linear, "merge", failing)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    made = folding.folded(again, str(tmp_path / "adapter"))
    assert len(calls) == 5
    with torch.inference_mode():
        assert torch.equal(made.eval()(input_ids=ids).logits, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_an_adapter_on_tied_weights_stays_beside_them(layer: str) -> None:
    torch.manual_seed(1)
    config = tiny_model("causal").config
    config.tie_word_embeddings = True
    fields = {"peft_type": "lora", "r": 4, "target_modules": ["q_proj", layer]}
    base = transformers.LlamaForCausalLM(config)
    model = adapters.attach(base, {**fields, "init_lora_weights": False}, base="x", seed=1).eval()
    ids = torch.arange(3, 30)[None]
    with torch.inference_mode():
        wanted = model(input_ids=ids).logits
        with folding.folded_in(model) as answering:
            assert torch.equal(answering(input_ids=ids).logits, wanted)
    with pytest.raises(
        errors.RecipeError, match=f"output.merge: {layer} has its weights in common"
    ):
        folding.refuse_unmergeable(model)
    assert folding.merged_or_not(model) is model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "whole"), [("masked", ["cls"]), ("causal", ["lm_head"]), ("seq2seq", ["lm_head"])]
)
def test_a_tied_layer_trained_whole_is_saved_whole(
    family: str, whole: list[str], tmp_path: Path
) -> None:
    model = tiny_model(family)
    config = model.config
    config.tie_word_embeddings = True
    fields = {"peft_type": "lora", "r": 4, "modules_to_save": whole}
    made = adapters.attach(type(model)(config), fields, base="x", seed=1, family=family).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        ids = {"input_ids": torch.arange(3, 30)[None]}
        if family == "seq2seq":
            ids["decoder_input_ids"] = ids["input_ids"]
        wanted = made(**ids).logits
        folding.merged(made).save_pretrained(tmp_path / "merged")
        tiny_tokenizer().save_pretrained(tmp_path / "merged")
        named = recipes.Model(name=str(tmp_path / "merged"))
        again = models.load(named, models.placement(named)).eval()
        assert float((again(**ids).logits - wanted).abs().max()) <= 1e-4
