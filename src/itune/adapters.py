"""PEFT adapters: attached by the recipe's words, saved portable, merged and proved equal.

Needs torch.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from itune import errors, families

START = "start"  # of an adapter that is not saved as it is trained
# What peft calls a family's task. It has none for masks, and its model for features hands on
# whatever its base gives.
TASKS = {
    families.CAUSAL: "CAUSAL_LM",
    families.SEQ2SEQ: "SEQ_2_SEQ_LM",
    families.MASKED: "FEATURE_EXTRACTION",
}


# What does not come out right whatever the recipe says: why, and what to take instead.
REFUSED = {
    "XLORA": "its saved router is not what is loaded again, so the result would answer otherwise. "
    "Use lora",
    "ADALORA": "its ranks are shared out by a call in each step that is part of no other method, "
    "and a loaded adapter fails on labels. Use lora, with use_rslora for a high rank",
    "POLY": "it needs a number for the task of each row. Use lora",
    "MULTITASK_PROMPT_TUNING": "it needs a number for the task of each row. Use prompt_tuning",
}

# What depends on the text in each layer; peft refuses to fold these only when it is asked to.
NEVER_FOLDED = {"LILY", "SHADOW"}

MOST_LAYERS = 12  # names in a message
# chosen: output rows this near to each other, relatively, were never told apart in training.
ALIKE = 1e-2


def _refuse_broken(kind: str, given: Mapping[str, Any]) -> None:
    """Raise RecipeError for what is known not to work, with the reason and what to use instead."""
    why = REFUSED.get(kind)
    if why is not None:
        raise errors.RecipeError(f"adapter.peft_type: {kind.lower()}: {why}.")
    if given.get("init_lora_weights") == "loftq" and not torch.cuda.is_available():
        raise errors.RecipeError(
            "adapter.init_lora_weights: loftq: peft computes it on a GPU alone, and there is none. "
            "Leave it out, or set it to pissa."
        )
    start = given.get("init_lora_weights")
    if start in ("eva", "corda", "lora_ga"):
        raise errors.RecipeError(
            f"adapter.init_lora_weights: {start}: it looks at training rows before the first step, "
            "which no recipe can tell it. Leave it out, or set it to pissa."
        )
    unkept = [name for name in UNKEPT if given.get(name) not in (None, False, "none")]
    if given.get("use_rslora") and (given.get("rank_pattern") or given.get("alpha_pattern")):
        unkept.append("use_rslora with a pattern")
    if changes_base(given) and unkept:
        raise errors.RecipeError(
            f"adapter.init_lora_weights: {start}: beside {unkept[0]} it cannot be saved as a plain "
            "LoRA for the base as others have it. Leave one of the two out."
        )


# What peft leaves out when it turns such an adapter into a plain one.
UNKEPT = ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias", "bias")


def changes_base(settings: Mapping[str, Any]) -> bool:
    """Whether a method takes a part out of the base's own weights and trains that: PiSSA, OLoRA."""
    return str(settings.get("init_lora_weights")).lower().startswith(("pissa", "olora"))


def config(settings: Mapping[str, Any], family: str = families.CAUSAL) -> Any:
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
    _refuse_broken(kind, given)
    errors.refuse_unknown("adapter", given, fields, known[kind].__name__)
    whole = given.get("modules_to_save")
    if isinstance(whole, str):  # peft would take it letter by letter
        raise errors.RecipeError(f"adapter.modules_to_save: {whole}: not a list. Write [{whole}].")
    if "task_type" in given:
        raise errors.RecipeError(
            "adapter.task_type: it follows from the model's family. Leave it out; model.family "
            "says it otherwise."
        )
    try:
        return known[kind](task_type=peft.TaskType[TASKS[family]], **given)
    except (ValueError, TypeError) as error:
        raise errors.RecipeError(f"adapter: {' '.join(str(error).split())}") from error


def _kinds() -> dict[Any, Any]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return dict(PEFT_TYPE_TO_CONFIG_MAPPING)


def attach(
    model: Any,
    settings: Mapping[str, Any] | None,
    *,
    base: str,
    seed: int,
    family: str = families.CAUSAL,
    revision: str | None = None,
) -> Any:
    """The model with a fresh adapter, its base frozen; without settings, the model itself.

    `base` is written into the adapter's own config, so that it loads by `peft` alone; with the
    commit (`revision`) of a model of the hub, so that it goes on these very weights.
    """
    if settings is None:
        return model
    import peft

    wanted = config(_with_head(model, settings), family)
    _refuse_unmatched(model, wanted)
    model.config.name_or_path = model.name_or_path = base
    torch.manual_seed(seed)
    try:
        with (
            warnings.catch_warnings()
        ):  # GPT-2's layers have their weights transposed: peft sees it
            warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)
            made = peft.get_peft_model(model, wanted, revision=revision)
    except (ValueError, AttributeError, RuntimeError, TypeError, IndexError) as error:
        text = f"adapter: does not go with {type(model).__name__}: {' '.join(str(error).split())}"
        if isinstance(error, TypeError) and "NoneType" in text:  # peft has no default for it
            empty = [name for name in _own_fields(type(wanted)) if getattr(wanted, name) is None]
            text += f". Of its fields these are not set: {', '.join(empty) or 'none'}."
        raise errors.RecipeError(text) from error
    for p in made.parameters():
        if p.requires_grad and p.dtype.itemsize < 4:
            # peft leaves what is trained whole, and norms, as the base has them: 16 bits would
            # round small steps away.
            p.data = p.data.float()
    return made


def _refuse_unmatched(model: Any, wanted: Any) -> None:
    """Raise RecipeError for a layer to be adapted or trained whole that is none, or such a token.

    peft passes over a layer as long as another one is there, and counts a token below 0 from the
    end, in training alone.
    """
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    _refuse_no_target(model, modules, getattr(wanted, "target_modules", None))
    for asked in getattr(wanted, "modules_to_save", None) or ():
        if not any(name.endswith(asked) for name in modules):
            near = sorted({name.rpartition(".")[2] for name in modules if name})
            raise errors.RecipeError(
                f"adapter.modules_to_save: the model has no {asked!r}.{errors.nearest(asked, near)}"
            )
    for field in ("trainable_token_indices", "token_indices"):
        given = getattr(wanted, field, None)
        groups = given.values() if isinstance(given, Mapping) else [given or []]
        if not all(
            isinstance(ids, list) and all(isinstance(each, int) and each >= 0 for each in ids)
            for ids in groups
        ):
            raise errors.RecipeError(
                f"adapter.{field}: {given}: expected a list of token numbers from 0, as [2]."
            )


def _refuse_no_target(model: Any, modules: Sequence[str], targets: Any) -> None:
    parts = [name.split(".") for name in modules]
    ends = {".".join(each[k:]) for each in parts for k in range(len(each))}
    if not isinstance(targets, str):
        absent = [each for each in sorted(targets or ()) if each not in ends]
    elif targets.lower() == "all-linear" or _matches(targets, modules):
        return
    elif targets in ends:  # peft takes a text for a pattern of whole names
        raise errors.RecipeError(
            f"adapter.target_modules: {targets}: not a list. Write [{targets}]."
        )
    else:
        absent = [targets]
    if absent:
        layers = {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if getattr(module, "weight", None) is not None and module.weight.dim() > 1
        }
        hint = errors.nearest(absent[0], layers)
        names = sorted(layers)[:MOST_LAYERS]
        raise errors.RecipeError(
            f"adapter.target_modules: the model has no {errors.shown(absent[0])}."
            f"{hint if 'Did you mean' in hint else ''} Its layers are {', '.join(names)}; "
            "all-linear stands for those that are linear."
        )


def _matches(pattern: str, names: Sequence[str]) -> bool:
    """Whether a pattern is that of a whole name. Raises RecipeError for what is no pattern."""
    try:
        return any(re.fullmatch(pattern, name) for name in names)
    except re.error as error:
        raise errors.RecipeError(
            f"adapter.target_modules: {errors.shown(pattern)}: no pattern: "
            f"{errors.one_line(error)} Write a list of names, or all-linear."
        ) from error


def _own_fields(kind: type) -> list[str]:
    """The fields that a method's config adds to those of every method."""
    import peft

    common = {each.name for each in dataclasses.fields(peft.PeftConfig)}
    return [each.name for each in dataclasses.fields(kind) if each.name not in common]


def blank(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """An adapter that starts from random numbers, whatever it is to be computed from."""
    if isinstance(settings.get("init_lora_weights"), str):
        return {key: value for key, value in settings.items() if key != "init_lora_weights"}
    return settings


def keep_start(model: Any, settings: Mapping[str, Any], folder: Path) -> None:
    """Keep a fresh adapter that changed its base: `save` needs what it took out."""
    if changes_base(settings):
        model.save_pretrained(folder / START, save_embedding_layers=False)


def save(model: Any, settings: Mapping[str, Any] | None, folder: Path, start: Path) -> None:
    """Save an adapter, or a whole model where there are no settings.

    One that changed its base is turned into a plain LoRA of twice the rank for the base as it was:
    W + AB - A0 B0 (https://huggingface.co/docs/peft, `path_initial_model_for_weight_conversion`).
    start: the folder that `keep_start` was given.
    """
    if settings is None:
        model.save_pretrained(folder)
        return
    for wanted in model.peft_config.values():
        for name, value in vars(wanted).items():
            if isinstance(value, set):  # else a file of the same adapter differs from run to run
                setattr(wanted, name, sorted(value))
    # No vocabulary is resized here, so embeddings need no copy; left to itself, peft asks the hub.
    if not changes_base(settings):
        model.save_pretrained(folder, save_embedding_layers=False)
        return
    with warnings.catch_warnings():
        # Of the gap under few bits, which merging into the float base leaves too; and that the two
        # adapters do not go together, which for this moment are not used.
        warnings.filterwarnings("ignore", "Note that Quant", UserWarning)
        warnings.filterwarnings("ignore", ".*changes the base weights", UserWarning)
        model.save_pretrained(
            folder,
            save_embedding_layers=False,
            path_initial_model_for_weight_conversion=str(start / START),
        )


def _with_head(model: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with layers that were drawn for want of saved ones trained and saved whole."""
    given, drawn = dict(settings), getattr(model, "drawn", ())
    if not drawn:
        return given
    refuse_no_head(settings)
    return {**given, "modules_to_save": [*(given.get("modules_to_save") or ()), *drawn]}


def refuse_no_head(settings: Mapping[str, Any]) -> None:
    """Raise RecipeError for a method that could not train the head which an encoder lacks."""
    kind = str(settings.get("peft_type", "")).upper()
    cls = {str(getattr(k, "value", k)): v for k, v in _kinds().items()}.get(kind)
    if cls is not None and "modules_to_save" not in inspect.signature(cls).parameters:
        raise errors.RecipeError(
            f"adapter.peft_type: {kind.lower()} trains no layer of the model, and this one was "
            "saved without the head that fills masks. Use lora, or leave the adapter out."
        )


def unheard_stop(model: Any, stop_id: int) -> Iterator[str]:
    """Why an adapter can never learn to stop, and what to do, if so.

    A token that its base never saw has the output row of the other such tokens, and as long as
    that row is frozen they get the same logit whatever the adapter does.
    """
    layer = model.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    embeddings = model.get_input_embeddings().parameters()
    adapted = type(layer) is not torch.nn.Linear or any(p.requires_grad for p in embeddings)
    if weight is None or adapted or weight.requires_grad or not weight.is_floating_point():
        return
    like = _alike(weight.detach(), stop_id)
    if not like:
        return
    fields = inspect.signature(type(model.active_peft_config)).parameters
    cure = f"trainable_token_indices: [{stop_id}]"
    able = "trainable_token_indices" in fields
    cure = f"Add {cure} to the adapter" if able else f"Use lora with {cure}"
    yield (
        f"the stop token (id {stop_id}) looks like {like:,} other tokens to the model, which never "
        "learnt it, and the adapter leaves that frozen: answers will not stop by themselves. "
        f"{cure}, or train all weights."
    )


@torch.no_grad()
def _alike(weight: torch.Tensor, row: int) -> int:
    """How many other rows of a matrix are within a hundredth of this one."""
    each = weight.float()
    mine = each[row]
    apart = (each.square().sum(1) + mine.square().sum() - 2 * (each @ mine)).clamp(min=0)
    return int((apart <= ALIKE**2 * mine.square().sum().clamp(min=1e-12)).sum()) - 1


def prepends(model: Any) -> bool:
    """Whether an adapter sets tokens of its own before a text, so that places are its business."""
    settings = getattr(model, "active_peft_config", None)
    return settings is not None and bool(settings.is_prompt_learning)


def refuse_unfoldable(place: str, settings: Mapping[str, Any] | None, so: str) -> None:
    """Raise RecipeError for an adapter that by its settings alone cannot be folded into any base.

    settings: a recipe's section or an adapter_config.json. `so` says what follows, and what to do.
    """
    if settings is not None and not folds(settings):
        kind = str(settings.get("peft_type", "")).lower()
        raise errors.RecipeError(
            f"{place}: its adapter ({kind}) cannot be folded into its base, so {so}"
        )


def folds(settings: Mapping[str, Any]) -> bool:
    """Whether an adapter may be folded into a base, as far as its settings tell."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    kind = str(settings.get("peft_type", "")).upper()
    tuners = {str(getattr(k, "value", k)): v for k, v in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    tuner = tuners.get(kind)
    if tuner is None:  # unknown: others say so
        return True
    # A LoRA that wakes at certain tokens is no part of a weight either.
    wakes = settings.get("alora_invocation_tokens") is not None
    return hasattr(tuner, "merge_and_unload") and kind not in NEVER_FOLDED and not wakes
