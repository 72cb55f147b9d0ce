"""PEFT adapters: attached by the recipe's words, saved portable, merged and proved equal.

Needs torch.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from itune import errors


def config(settings: Mapping[str, Any]) -> Any:
    """The peft config that a recipe's `adapter` section names. Raises RecipeError."""
    import peft

    given = dict(settings)
    kind = str(given.pop("peft_type", "")).upper()
    known = {k.value if hasattr(k, "value") else str(k): v for k, v in _kinds().items()}
    if kind not in known:
        names = [name.lower() for name in known]
        raise errors.RecipeError(
            f"adapter.peft_type: unknown {settings.get('peft_type')!r}."
            f"{errors.nearest(kind.lower(), names)}"
        )
    fields = inspect.signature(known[kind]).parameters
    errors.refuse_unknown("adapter", given, fields, known[kind].__name__)
    try:
        return known[kind](task_type=peft.TaskType.CAUSAL_LM, **given)
    except (ValueError, TypeError) as error:
        raise errors.RecipeError(f"adapter: {' '.join(str(error).split())}") from error


def _kinds() -> dict[Any, Any]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return dict(PEFT_TYPE_TO_CONFIG_MAPPING)


def attach(model: Any, settings: Mapping[str, Any] | None, *, base: str, seed: int) -> Any:
    """The model with a fresh adapter, its base frozen; without settings, the model itself.

    `base` is written into the adapter's own config, so that it loads by `peft` alone.
    """
    if settings is None:
        return model
    import peft

    wanted = config(settings)
    model.config.name_or_path = model.name_or_path = base
    torch.manual_seed(seed)
    try:
        return peft.get_peft_model(model, wanted)
    except (ValueError, TypeError, AttributeError) as error:
        raise errors.RecipeError(
            f"adapter: does not go with {type(model).__name__}: {' '.join(str(error).split())}"
        ) from error


def on_base(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A saved adapter on its base as that was published, not quantised."""
    import peft

    return peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)


def refuse_unmergeable(model: Any) -> None:
    """Raise RecipeError before a run whose adapter could not be folded into its base after it."""
    if not hasattr(model, "merge_and_unload"):
        raise errors.RecipeError(
            "output.merge: this adapter cannot be folded into its base. Set output.merge: false."
        )


def merged(model: Any) -> Any:
    """A model with its adapter folded into the base; raises RecipeError where it cannot be."""
    refuse_unmergeable(model)
    return model.merge_and_unload(safe_merge=True)


@torch.no_grad()
def merge_and_prove(model: Any, ids: torch.Tensor, folder: Path) -> float:
    """Fold the adapter in, save the whole model, and return the largest difference of its logits.

    ids int64 [1, tokens]: a sample prompt. Raises ModelError when the merged model answers
    otherwise than base and adapter did.
    """
    model.eval()
    before = model(input_ids=ids, use_cache=False).logits
    whole = merged(model)
    after = whole(input_ids=ids, use_cache=False).logits
    difference = float((before - after).abs().max())
    scale = float(before.abs().max())
    tolerance = (1e-4 if before.dtype == torch.float32 else 5e-2) * max(scale, 1.0)
    if difference > tolerance:
        raise errors.ModelError(
            f"{folder}: the merged model's logits differ by {difference:.2g} from the adapter's, "
            "so it was not saved. Serve the adapter on its base."
        )
    whole.save_pretrained(folder)
    return difference


def folded(base: Any, location: str) -> Any:
    """The base with the adapter of a folder folded into its own weights: no second copy.

    An adapter that cannot be folded, such as a prompt, stays on it. Raises ModelError where the
    adapter does not go with its base.
    """
    import peft

    try:
        loaded = peft.PeftModel.from_pretrained(base, location)
    except (ValueError, RuntimeError, KeyError) as error:
        raise errors.ModelError(
            f"{location}: this adapter does not go with its base: {' '.join(str(error).split())}"
        ) from error
    return loaded.merge_and_unload() if hasattr(loaded, "merge_and_unload") else loaded


@contextlib.contextmanager
def folded_in(model: Any) -> Iterator[Any]:
    """The model beneath an adapter, with the adapter folded into its weights for a while.

    Afterwards all weights are what they were, to the bit: they were kept, not computed back. What
    cannot be folded exactly (few bits, prompts learnt) is given as it is, adapter beside it; a
    model without an adapter too.
    """
    layers = _foldable(model)
    if not layers:
        yield model
        return
    kept = [p.detach().clone() for each in layers for p in each.get_base_layer().parameters()]
    model.merge_adapter()
    try:
        yield model.get_base_model()
    finally:
        model.unmerge_adapter()
        with torch.no_grad():
            own = (p for each in layers for p in each.get_base_layer().parameters())
            for parameter, before in zip(own, kept, strict=True):
                parameter.copy_(before)


def _foldable(model: Any) -> list[Any]:
    """The adapted layers of a model whose adapter can be folded in and out; else none."""
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model, peft.PeftModel) or not hasattr(model.base_model, "merge_adapter"):
        return []
    layers = [each for each in model.modules() if isinstance(each, BaseTunerLayer)]
    for each in layers:
        weights = list(each.get_base_layer().parameters())
        if not hasattr(each, "merge") or each.merged or not weights:
            return []
        if not all(p.is_floating_point() for p in weights):
            return []
    return layers
