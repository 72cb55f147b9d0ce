"""Whether a recipe's model and adapter go together, told before a row is read.

Needs torch. All of it follows from configs and names of weights: no weight is read.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from itune import adapters, configs, errors, families, folding, locating, models, recipes, weights


def refuse(recipe: recipes.Recipe) -> None:
    """Raise UserError for a model from scratch, its objective or an adapter that will not do.

    And EnvironmentRefusal for a tracker or kernels that are not here.
    """
    _refuse_trackers(recipe.tracking.log_with)
    if recipe.training.use_liger_kernel:
        models.refuse_liger(models.placement(recipe.model))
    if recipe.model.dtype == "float16":
        raise errors.RecipeError(
            "model.dtype: float16 is not trained in: small gradients are zero there, and large "
            "sums infinite. Write bfloat16 or float32, or leave it out. Answers may be given in it."
        )
    kind = configs.family_of(recipe.model)
    families.refuse_idle(kind, recipe.training)
    base, replaced = None, False
    if recipe.model.name is not None:
        base = locating.resolve(recipe.model.name, recipe.model.revision)
        if (below := locating.adapter_of(base)) is not None:
            _refuse_below(recipe.model, base, below)
            base = below.get("base_model_name_or_path")
            replaced = bool(below.get("modules_to_save"))
    if recipe.adapter is not None:
        _refuse_adapter(recipe, recipe.adapter, base, kind, replaced=replaced)
    elif recipe.model.from_scratch is not None:
        _outline(recipe.model)


def _refuse_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that Accelerate does not know or would leave out in silence."""
    from accelerate import tracking

    for name in names:
        if name not in tracking.LOGGER_TYPE_TO_CLASS:
            raise errors.RecipeError(
                f"tracking.log_with: unknown {name!r}."
                f"{errors.nearest(name, map(str, tracking.LOGGER_TYPE_TO_CLASS))}"
            )
        if name not in map(str, tracking.get_available_trackers()):
            raise errors.EnvironmentRefusal(
                f"tracking.log_with: {name} is not installed. Run: pip install {name}"
            )


def _refuse_below(wanted: recipes.Model, location: str, settings: Mapping[str, Any]) -> None:
    """Refuse to tune on top of an adapter that stays one: it is no part of any weight."""
    import peft

    place = f"model.name: {wanted.name}"
    adapters.refuse_unfoldable(place, settings, folding.NOTHING_ON_TOP)
    made = _outline(wanted)
    try:
        known = peft.PeftConfig.from_pretrained(location)
        known.base_model_name_or_path = None
        with _for_a_look():
            made = peft.get_peft_model(made, known)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError):
        return  # an adapter that does not go with its base is told of where it is loaded
    tied = _is_tied(made, settings.get("base_model_name_or_path"))
    folding.refuse_below(str(wanted.name), made, tied=tied)


def _refuse_adapter(
    recipe: recipes.Recipe,
    settings: Mapping[str, Any],
    base: str | None,
    kind: str,
    *,
    replaced: bool,
) -> None:
    """Refuse an adapter that does not go on the model, or that is to be merged and cannot be.

    base: whose saved weights tell of heads and ties, if `replaced` is not true of some of them.
    """
    adapters.config(settings, kind)
    if recipe.output.merge:
        cure = "nothing can be merged. Set output.merge: false."
        adapters.refuse_unfoldable("output.merge", settings, cure)
    made = _outline(recipe.model)
    if made is None:
        return
    if kind == families.MASKED and not replaced and _is_headless(made, base):
        adapters.refuse_no_head(settings)
    tied = not replaced and _is_tied(made, base)
    try:
        with _for_a_look():
            made = adapters.attach(made, adapters.blank(settings), base="", seed=0, family=kind)
    except errors.RecipeError as error:
        if isinstance(error.__cause__, RuntimeError):
            return  # for want of numbers, it may be: told of where there are some
        raise
    if recipe.output.merge:
        folding.refuse_unmergeable(made, tied=tied)


def _outline(wanted: recipes.Model) -> Any:
    """The model without numbers; None where its code asks for some."""
    try:
        return models.outline(wanted)
    except errors.ModelError as error:
        if isinstance(error.__cause__, RuntimeError):
            return None
        raise


@contextlib.contextmanager
def _for_a_look() -> Iterator[None]:
    """Without numbers, and without the warnings that come when the adapter is put on for good."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _names(base: str | None) -> set[str]:
    """The names of the weights that a model was saved with, where it is a folder here."""
    if base is None or not Path(base).is_dir():
        return set()
    weights.check(base)
    return weights.names(base)


def _is_tied(made: Any, base: str | None) -> bool:
    """Whether what a config ties is tied when it is loaded: not where both weights were saved."""
    inner = made.get_base_model() if hasattr(made, "get_base_model") else made
    saved = _names(base)
    return not any(
        one in saved and other in saved
        for one, other in inner.get_expanded_tied_weights_keys(all_submodels=True).items()
    )


def _is_headless(made: Any, base: str | None) -> bool:
    """Whether an encoder was saved without any part of its head."""
    saved = {name.partition(".")[0] for name in _names(base)}
    inside = f"{made.base_model_prefix}."
    head = {name.partition(".")[0] for name in made.state_dict() if not name.startswith(inside)}
    return bool(saved) and not head & saved
