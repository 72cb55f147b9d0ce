"""Weights in few bits: the transformers config that a recipe's `quantization` section names.

Needs torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from itune import errors

REPACKS = "support_avx512bf16_for_cpu"


def config(fields: Mapping[str, Any], computing: torch.dtype) -> Any:
    """The config of `quant_method`, from its own fields. Raises RecipeError, EnvironmentRefusal.

    `computing`: the dtype that 4-bit weights are computed with, unless the section says otherwise.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
    from transformers.utils.import_utils import is_bitsandbytes_available

    given = dict(fields)
    kind = str(given.pop("quant_method"))
    known = {str(getattr(k, "value", k)): v for k, v in AUTO_QUANTIZATION_CONFIG_MAPPING.items()}
    if kind == "bitsandbytes":
        if not is_bitsandbytes_available():
            raise errors.EnvironmentRefusal(
                "quantization: bitsandbytes is not installed. Run: pip install 'itune[quant]'"
            )
        four = bool(given.get("load_in_4bit"))
        given.setdefault("load_in_8bit", not four)
        given.setdefault("bnb_4bit_compute_dtype", str(computing).removeprefix("torch."))
        kind += "_4bit" if four else "_8bit"
    if kind not in known:
        names = {name.removesuffix("_4bit").removesuffix("_8bit") for name in known}
        raise errors.RecipeError(
            f"quantization.quant_method: unknown {kind!r}.{errors.nearest(kind, names)}"
        )
    accepted = inspect.signature(known[kind]).parameters
    errors.refuse_unknown("quantization", given, accepted, known[kind].__name__)
    try:
        return known[kind](**given)
    except (ValueError, TypeError) as error:
        raise errors.RecipeError(f"quantization: {' '.join(str(error).split())}") from error


def keep_trainable(model: torch.nn.Module) -> None:
    """Keep a quantised model from switching to weights that have no gradient.

    bitsandbytes 0.50 repacks 4-bit weights at the first forward in evaluation mode on a CPU with
    AVX-512 bfloat16, and does not take it back when training goes on: the gradients are then wrong.
    """
    for module in model.modules():
        if getattr(module, REPACKS, False):
            setattr(module, REPACKS, False)
