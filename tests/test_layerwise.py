"""A model that is read layer by layer is, bit for bit, the one that the library loads whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import saved, tiny_tokenizer
from safetensors.torch import load_file, save_file

from itune import adapters, errors, layerwise, models, recipes, sections

LORA = {"peft_type": "lora", "r": 4, "target_modules": "all-linear"}
FLOAT = models.Placement(torch.device("cpu"), torch.float32, "float32")
HALF = models.Placement(torch.device("cpu"), torch.bfloat16, "bfloat16")


def recipe_of(folder: Path, adapter: dict[str, Any] | None = None, **more: Any) -> recipes.Recipe:
    """A recipe of a model, of which the model and the adapter alone are asked."""
    model = sections.Model(name=str(folder), **more)
    training, launch = sections.Training(), sections.Launch()
    return recipes.Recipe.model_construct(
        model=model, adapter=adapter, training=training, launch=launch, quantization=None
    )


def gemma(folder: Path) -> Path:
    """Seven layers, of which the sixth alone looks at everything; embeddings that are scaled."""
    config = transformers.Gemma3TextConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=7, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=8, max_position_embeddings=64,
    )  # fmt: skip
    transformers.Gemma3ForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def gpt2(folder: Path) -> Path:
    """Weights under the names without the model's own prefix, as GPT-2 has them on the hub."""
    config = transformers.GPT2Config(vocab_size=320, n_embd=32, n_layer=4, n_head=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    path = folder / "model.safetensors"
    kept = {key.removeprefix("transformer."): value for key, value in load_file(path).items()}
    save_file(kept, path, metadata={"format": "pt"})
    return folder


def headless(folder: Path) -> Path:
    """An encoder that was saved without the head that fills masks, as embeddings are."""
    saved(folder, "masked")
    transformers.BertModel.from_pretrained(folder).save_pretrained(folder)
    return folder


def sharded(folder: Path) -> Path:
    """Weights in several files, embeddings and head of their own."""
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


MADE = {
    "llama": lambda folder: saved(folder, "causal"),
    "t5": lambda folder: saved(folder, "seq2seq"),
    "bert": lambda folder: saved(folder, "masked"),
    "gemma": gemma,
    "gpt2": gpt2,
    "headless": headless,
    "sharded": sharded,
}


def same(one: Any, other: Any) -> None:
    """Parameters and buffers, what of them is trained, and which are one, are the same."""
    for every in ("named_parameters", "named_buffers"):
        first, second = (dict(getattr(m, every)(remove_duplicate=False)) for m in (one, other))
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            assert tensor.dtype == second[name].dtype, name
            assert torch.equal(tensor, second[name]), name
            assert tensor.requires_grad == second[name].requires_grad, name
            assert tensor.is_contiguous()
        tied = [{frozenset(k for k in m if m[k] is t) for t in m.values()} for m in (first, second)]
        assert tied[0] == tied[1]
    assert one.training == other.training


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("made", MADE)
def test_what_is_read_layer_by_layer_is_what_the_library_loads(
    made: str, adapter: dict[str, Any] | None, tmp_path: Path
) -> None:
    """Also tied weights, buffers that no file holds, a head that is drawn, and LoRA on top."""
    recipe, place = recipe_of(MADE[made](tmp_path / "made"), adapter), HALF if adapter else FLOAT
    assert layerwise.why_whole(recipe) is None
    if made == "headless" and adapter:
        with pytest.raises(errors.ModelError, match="its head is drawn, and trained whole"):
            layerwise.read(recipe, place)
        return
    read = layerwise.read(recipe, place)
    model, whole = read.model, models.load(recipe.model, place, full=adapter is None)
    if adapter:
        family = "masked" if made == "bert" else "causal"
        model, whole = (
            adapters.attach(m, adapter, base="base", seed=5, family=family) for m in (model, whole)
        )
    assert sum(p.untyped_storage().nbytes() for p, _ in read.blank.values()) < 2000
    layers = layerwise.compiling.repeated(model)
    assert len(layers) == len(layerwise.compiling.repeated(whole))
    for module in (*layers, model):
        read.fill(module, torch.device("cpu"))
    same(model, whole)
    assert model.config.to_dict() == whole.config.to_dict()


def test_a_stand_in_has_a_layer_of_each_kind(tmp_path: Path) -> None:
    """Of a Gemma, the sixth is the first that looks at all; of a Llama, two do."""
    for made, depth in ((gemma, 6), (sharded, 2)):
        read = layerwise.read(recipe_of(made(tmp_path / str(depth))), FLOAT)
        assert len(layerwise.compiling.repeated(read.stand_in)) == depth


def filled(folder: Path) -> Any:
    read = layerwise.read(recipe_of(folder), FLOAT)
    read.fill(read.model, torch.device("cpu"))
    return read.model


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    """A name that the library would translate, and a weight that is missing or not finite."""
    folder = sharded(tmp_path / "made")
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    key = "model.layers.3.mlp.up_proj.weight"
    path = folder / names[key]
    held = load_file(path)
    for change, said in (
        ({key: held[key] * torch.inf}, "holds numbers that are not finite"),
        ({f"{key}_": held[key]}, f"no file of it holds {key} under this name"),
        ({key: held[key][1:]}, "They do not belong together"),
    ):
        others = {name: tensor for name, tensor in held.items() if name != key}
        save_file({**others, **change}, path, metadata={"format": "pt"})
        with pytest.raises(errors.ModelError, match=said):
            filled(folder)


@pytest.mark.parametrize(
    ("adapter", "why"),
    [
        ({**LORA, "init_lora_weights": "pissa"}, "its adapter may start from"),
        ({**LORA, "use_dora": True}, "its adapter may start from"),
        ({"peft_type": "vera"}, "its adapter may start from"),
    ],
)
def test_what_starts_from_the_whole_model_is_read_whole(
    adapter: dict[str, Any], why: str, tiny_model_dir: Path
) -> None:
    found = layerwise.why_whole(recipe_of(tiny_model_dir, adapter))
    assert found is not None
    assert found.startswith(why)


def test_a_model_fits_whole_where_twice_its_weights_are_free(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each process of the machine: 115,008 weights of four bytes, or of two for an adapter."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    full, lora = recipe_of(tiny_model_dir), recipe_of(tiny_model_dir, LORA)
    for free, wanted in ((1_840_128, (True, True)), (1_840_127, (False, True)), (1, (False,) * 2)):
        monkeypatch.setattr(layerwise.memory, "host", lambda free=free: free)
        assert (layerwise.fits(full, FLOAT), layerwise.fits(lora, HALF)) == wanted
