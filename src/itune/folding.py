"""An adapter folded into its base: for good and proved equal, or for a while and exactly undone.

Needs torch.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from itune import adapters, errors, launching

# What folds in now and then, or not out again: peft says so only half way through.
NOT_IN_AND_OUT = {"BEFT", "OSF"}


# What follows for a model that is an adapter on a base, and is to be tuned.
NOTHING_ON_TOP = "nothing can be tuned on top of it. Name its base."


def refuse_unmergeable(model: Any, *, tied: bool = True) -> None:
    """Raise RecipeError before a run whose adapter could not be folded into its base after it.

    Tried on a copy of one layer of each kind; few bits are passed over, for they are merged as
    floats. On the meta device only what peft refuses whatever the numbers are is found; there
    `tied` says whether weights are in common when they are loaded.
    """
    _refuse_whole(model)
    if name := tied and _tied(model):
        raise errors.RecipeError(
            f"output.merge: {name} has its weights in common with another layer, so an adapter "
            "cannot be folded into it. Take it out of adapter.target_modules, or set output.merge: "
            "false."
        )
    layers = [each for each in model.modules() if _is_adapted(each) and _is_float(each)]
    for layer in {_kind(each): each for each in layers}.values():
        with _told(), _without_numbers(layer):
            copy.deepcopy(layer).merge()


def refuse_below(name: str, model: Any, *, tied: bool) -> None:
    """Raise RecipeError for a model whose adapter stays beside its base, see above."""
    try:
        refuse_unmergeable(model, tied=tied)
    except errors.RecipeError as error:
        raise errors.RecipeError(
            f"model.name: {name}: its adapter cannot be folded into its base, so {NOTHING_ON_TOP}"
        ) from error


@contextlib.contextmanager
def _without_numbers(layer: Any) -> Iterator[None]:
    """What the meta device cannot compute is passed over: it is no word of peft's."""
    try:
        yield
    except RuntimeError as error:
        bare = any(p.is_meta for p in layer.parameters())
        if not (bare and "meta" in str(error).lower()):
            raise


def _refuse_whole(model: Any) -> None:
    if adapters.prepends(model) or not hasattr(model, "merge_and_unload"):
        raise errors.RecipeError(
            "output.merge: this adapter cannot be folded into its base. Set output.merge: false."
        )


def merged(model: Any) -> Any:
    """A model with its adapter folded into the base; raises RecipeError where it cannot be."""
    _refuse_whole(model)
    with _told():
        return _unloaded(model, safe_merge=True)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What peft refuses to fold, in our words."""
    try:
        yield
    except (NotImplementedError, ValueError) as error:
        raise errors.RecipeError(
            f"output.merge: this adapter cannot be folded into its base: "
            f"{' '.join(str(error).split())[:200].rstrip('.')}. Set output.merge: false."
        ) from error


def _unloaded(model: Any, **how: bool) -> Any:
    """The base with its adapter folded in; what is no longer tied in its config is parted.

    Where a layer that was tied is trained whole, peft unties the config and leaves other weights in
    common: of these a saved model would hold one, and be read for two.
    """
    tied = getattr(model.config, "tie_word_embeddings", False)
    whole = model.merge_and_unload(**how)
    if not tied or whole.config.tie_word_embeddings:
        return whole
    still, seen = set(whole.get_expanded_tied_weights_keys(all_submodels=True)), set()
    for name, weight in list(whole.named_parameters(remove_duplicate=False)):
        if id(weight) in seen and name not in still:
            owner, _, last = name.rpartition(".")
            copied = torch.nn.Parameter(weight.detach().clone(), weight.requires_grad)
            setattr(whole.get_submodule(owner), last, copied)
        seen.add(id(weight))
    return whole


def _tied(model: Any) -> str:
    """The name of an adapted layer whose weights are another's too, or nothing.

    What is folded into the one would change the other. Single tokens are trained in both.
    """
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, layer in model.named_modules():
        if not _is_adapted(layer) or isinstance(layer, TrainableTokensLayer):
            continue
        if any(owners[id(p)] > 1 for p in layer.get_base_layer().parameters()):
            return str(name).rpartition(".")[2]
    return ""


def _is_adapted(module: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _is_float(layer: Any) -> bool:
    return all(p.is_floating_point() for p in layer.get_base_layer().parameters())


def _kind(layer: Any) -> tuple[Any, ...]:
    """What decides whether a layer's adapter folds: its class, and the parts that its base has."""
    base = layer.get_base_layer()
    return (type(layer), type(base), *(name for name, _ in base.named_parameters()))


@torch.no_grad()
def logits(model: Any, samples: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
    """What a model makes of each sample, called with it by name."""
    model.eval()
    return [model(**sample).logits for sample in samples]


def proved(wanted: Sequence[torch.Tensor], found: Sequence[torch.Tensor], folder: Path) -> float:
    """The largest difference of the logits of an adapter on its base and of both merged.

    Raises ModelError where it is more than rounding: of the largest logit 1e-4 in float32, 5e-2
    in 16 bits.
    """
    difference = max(float((a - b).abs().max()) for a, b in zip(wanted, found, strict=True))
    scale = max(float(each.abs().max()) for each in wanted)
    tolerance = (1e-4 if wanted[0].dtype == torch.float32 else 5e-2) * max(scale, 1.0)
    if not difference <= tolerance:
        raise errors.ModelError(
            f"{folder}: the merged model's logits differ by {difference:.2g} from the adapter's, "
            "so it is not kept. Serve the adapter on its base."
        )
    return difference


def folded(base: Any, location: str) -> Any:
    """The base with the adapter of a folder folded into its own weights: no second copy.

    What cannot be folded in stays an adapter on the base. Raises ModelError where the adapter does
    not go with it.
    """
    import peft

    try:
        loaded = peft.PeftModel.from_pretrained(base, location)
    except (ValueError, RuntimeError, KeyError) as error:
        raise errors.ModelError(
            f"{location}: this adapter does not go with its base: {' '.join(str(error).split())}"
        ) from error
    return merged_or_not(loaded)


def merged_or_not(loaded: Any) -> Any:
    """An adapter on its base, folded in; as it was where it cannot be folded in."""
    if adapters.prepends(loaded):
        return loaded  # tokens that are set before a text are no part of any weight
    if hasattr(loaded, "merge_and_unload") and _folds(loaded):
        with contextlib.suppress(NotImplementedError, ValueError):
            return _unloaded(loaded)  # refused, if at all, before any layer is touched
    kind = str(getattr(loaded.active_peft_config.peft_type, "value", "")).lower()
    launching.warn(
        f"this adapter ({kind}) cannot be folded into its base, so it stays beside it: the "
        "same answers, a little slower."
    )
    return loaded


def _folds(model: Any) -> bool:
    """Whether every adapted layer can be folded in, tried one by one and each put back to the bit.

    Where folding fails half way, peft leaves some layers folded and others not.
    """
    if _tied(model):
        return False
    for layer in [each for each in model.modules() if _is_adapted(each)]:
        kept = [(p, p.detach().clone()) for p in layer.get_base_layer().parameters()]
        try:
            layer.merge()
            with _unsaid():
                layer.unmerge()
        except (NotImplementedError, ValueError):
            return False
        finally:
            with torch.no_grad():
                for parameter, before in kept:
                    parameter.copy_(before)
    return True


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
    with _recorded():
        model.merge_adapter()
    try:
        yield model.get_base_model()
    finally:
        with _recorded():
            with _unsaid():
                model.unmerge_adapter()
            own = (p for each in layers for p in each.get_base_layer().parameters())
            for parameter, before in zip(own, kept, strict=True):
                parameter.copy_(before)


@contextlib.contextmanager
def _unsaid() -> Iterator[None]:
    """What peft computes back may be inexact, and it says so; here it is not what stays."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@contextlib.contextmanager
def _recorded() -> Iterator[None]:
    """Tensors made within can be trained later, though the caller is in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _foldable(model: Any) -> list[Any]:
    """The adapted layers of a model whose adapter can be folded in and out; else none."""
    if "peft" not in sys.modules:  # seconds to import, and it made no part of this model
        return []
    import peft

    if not isinstance(model, peft.PeftModel) or not hasattr(model.base_model, "merge_adapter"):
        return []
    settings = model.active_peft_config.to_dict()
    kind = getattr(settings["peft_type"], "value", settings["peft_type"])
    if kind in NOT_IN_AND_OUT or not adapters.folds({**settings, "peft_type": kind}):
        return []
    if _tied(model):
        return []
    layers: list[Any] = [each for each in model.modules() if _is_adapted(each)]
    for each in layers:
        weights = list(each.get_base_layer().parameters())
        if not hasattr(each, "merge") or each.merged or not weights or not _is_float(each):
            return []
    return layers
