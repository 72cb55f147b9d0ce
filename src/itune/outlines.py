"""Models from their config alone: on the meta device or with random weights, whole or cut short.

Needs torch. What is asked of them is what does not follow from the numbers in the weights: counts,
bytes, shapes, speed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from itune import adapters, configs, families, locating, losses, models, recipes

# What configs call the number of layers; of an encoder-decoder each side has a number of its own.
LAYERS = (
    "num_hidden_layers",
    "num_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
)
ABSMAX = 64  # weights that share a scale in bitsandbytes' 4 bits


def config(recipe: recipes.Recipe, tokenizer: Any) -> Any:
    """The config of the model that a recipe names. Raises ModelError."""
    scratch = recipe.model.from_scratch
    if scratch is not None:
        return configs.blank_config(scratch, tokenizer)
    return copy.deepcopy(configs.config_of(recipe.model))


def layers(settings: Any) -> int | None:
    """How many layers a config asks for; None where it does not say so."""
    found = getattr(settings.get_text_config(decoder=True), LAYERS[0], None)
    return found if isinstance(found, int) else None


def cut(settings: Any, count: int) -> Any:
    """A config of the same model with so many layers, on each side where there are two."""
    made = copy.deepcopy(settings)
    text = made.get_text_config(decoder=True)
    for name in LAYERS:
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, count)
    if isinstance(getattr(text, "layer_types", None), list):
        text.layer_types = text.layer_types[:count]
    return made


def model(
    recipe: recipes.Recipe, settings: Any, place: models.Placement, device: torch.device
) -> Any:
    """The model of a config on a device, with the recipe's adapter, not quantised.

    On the meta device it has no weights at all, elsewhere random ones.
    """
    kind = families.chosen(recipe.model.family, settings)
    auto = getattr(transformers, models.CLASSES[kind])
    options: dict[str, Any] = {"dtype": weights_dtype(recipe, place)}
    if recipe.model.attn_implementation:
        options["attn_implementation"] = recipe.model.attn_implementation
    name = recipe.model.name or "from_scratch"
    with torch.device(device):
        made = locating.from_library(name, lambda: auto.from_config(settings, **options))
        if recipe.adapter is not None:
            seed = recipe.training.seed
            made = adapters.attach(
                made, adapters.blank(recipe.adapter), base="", seed=seed, family=kind
            )
    if recipe.training.gradient_checkpointing:
        models.recompute(made)
    return made


def weights_dtype(recipe: recipes.Recipe, place: models.Placement) -> torch.dtype:
    """In what a recipe's weights are kept."""
    whole = recipe.adapter is None or recipe.model.from_scratch is not None
    return torch.float32 if whole else place.dtype


def weights_bytes(made: Any, quantization: Mapping[str, Any] | None) -> int:
    """Bytes of all weights and buffers, as they are kept."""
    every = {id(t): t for t in (*made.parameters(), *made.buffers())}
    if quantization is None:
        return sum(t.nbytes for t in every.values())
    few = {id(each) for each in _quantized(made)}
    bits = _bits(quantization)
    kept = 0.0
    for number, tensor in every.items():
        if number in few:
            kept += tensor.numel() * bits / 8
        else:  # the rest is prepared for training in float32
            kept += tensor.numel() * (4 if tensor.is_floating_point() else tensor.element_size())
    return int(kept)


def _quantized(made: Any) -> list[torch.Tensor]:
    """The matrices that are kept in few bits: of all linear layers but the last one."""
    head = losses.output_layer(made)
    return [
        module.weight
        for name, module in made.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module is not head
        and not module.weight.requires_grad
        and "lora_" not in name
    ]


def _bits(quantization: Mapping[str, Any]) -> float:
    """Bits of a quantised weight, its share of the scales among them."""
    if not quantization.get("load_in_4bit"):
        return 8.0
    nested = bool(quantization.get("bnb_4bit_use_double_quant"))
    return 4 + (8 / ABSMAX + 32 / (ABSMAX * 256) if nested else 32 / ABSMAX)


def unpacked_bytes(made: Any) -> int:
    """Bytes of the largest matrix that is unpacked to be computed with, where all are quantised."""
    return max((w.numel() * w.element_size() for w in _quantized(made)), default=0)
