"""What a recipe's model is, before any weight is read: its config, family and tokenizer.

Needs transformers, not torch.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError

from itune import (
    cache,
    data,
    encoding,
    errors,
    families,
    locating,
    origins,
    recipes,
    runs,
    storage,
    vocabularies,
)

# --- configs ------------------------------------------------------------------------------


def config_of(wanted: recipes.Model) -> Any:
    """The config of a model, of an adapter's base or of one from scratch; no weight is read."""
    if wanted.from_scratch is not None:
        chosen = wanted.from_scratch.tokenizer
        # Before there is a tokenizer; a type's own padding may lie beyond a small vocabulary.
        entries = {} if isinstance(chosen, str) else {"vocab_size": chosen.vocab_size}
        if entries or "vocab_size" in wanted.from_scratch.config:
            entries["pad_token_id"] = 0
        entries["eos_token_id"] = 0  # some cannot be without one
        return _blank_config(wanted.from_scratch, entries)
    name = wanted.name or ""
    location, revision = locating.resolve(name, wanted.revision), wanted.revision
    adapter = locating.adapter_of(location)
    if adapter is not None:
        location, revision = adapter["base_model_name_or_path"], adapter.get("revision")
        origins.refuse_absent_base(name, location)
    return locating.from_library(
        name,
        lambda: transformers.AutoConfig.from_pretrained(
            location, revision=revision, trust_remote_code=False
        ),
    )


def family_of(wanted: recipes.Model) -> str:
    """The family of the model that a recipe names. Raises ModelError."""
    return families.chosen(wanted.family, config_of(wanted))


def blank_config(scratch: recipes.FromScratch, loaded: Any) -> Any:
    """The config of a model from scratch with the ids of its tokenizer. Raises ModelError."""
    ids = _ids(scratch, loaded)
    for name, value in scratch.config.items():
        if name in ids and value != ids[name]:
            raise errors.ModelError(
                f"model.from_scratch.{name}: {value}, and by the tokenizer it is {ids[name]}. "
                "Leave it out."
            )
    return _blank_config(scratch, ids)


def _ids(scratch: recipes.FromScratch, loaded: Any) -> dict[str, Any]:
    """The fields of a config that follow from the tokenizer."""
    ids = {
        "vocab_size": len(loaded),
        "pad_token_id": loaded.pad_token_id,
        "bos_token_id": loaded.bos_token_id,
        "eos_token_id": loaded.eos_token_id,
    }
    blank = transformers.AutoConfig.for_model(scratch.model_type)
    for name in ("cls_token_id", "sep_token_id"):
        if hasattr(blank, name):
            ids[name] = getattr(loaded, name)
    if getattr(blank, "is_encoder_decoder", False):
        # BART's kind starts an answer from the end token, T5's from padding.
        start = getattr(blank, "decoder_start_token_id", None)
        ends = start is not None and start == blank.eos_token_id
        ids["decoder_start_token_id"] = loaded.eos_token_id if ends else loaded.pad_token_id
        if getattr(blank, "forced_eos_token_id", None) is not None:
            ids["forced_eos_token_id"] = loaded.eos_token_id
    return ids


def _blank_config(scratch: recipes.FromScratch, ids: dict[str, Any]) -> Any:
    """The config of a model from scratch, its fields checked. Raises ModelError."""
    known = list(transformers.CONFIG_MAPPING.keys())
    if scratch.model_type not in known:
        raise errors.ModelError(
            f"model.from_scratch.model_type: unknown {scratch.model_type!r}."
            f"{errors.nearest(scratch.model_type, known)}"
        )
    fields = dict(scratch.config)
    blank = transformers.AutoConfig.for_model(scratch.model_type)
    accepted = {name for name in (*blank.to_dict(), *vars(blank)) if name[0] != "_"}
    if not accepted.issuperset(fields):
        accepted |= _undeclared(blank)
    owner = type(blank).__name__
    errors.refuse_unknown("model.from_scratch", fields, accepted, owner, errors.ModelError)
    try:
        return transformers.AutoConfig.for_model(scratch.model_type, **{**fields, **ids})
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise unbuildable(scratch, error) from error


def _undeclared(blank: Any) -> set[str]:
    """The fields that a model's own code asks its config for, which the config does not declare.

    Not `head_dim`: rotary places ask for it in every model, attention in few, so the two may part.
    """
    folder = Path(inspect.getfile(type(blank))).parent
    asked = re.compile(r'getattr\(\s*(?:self\.)?config,\s*"([a-z]\w*)"')
    return {
        name
        for path in folder.glob("modeling_*.py")
        for name in asked.findall(path.read_text(encoding="utf-8"))
        if name != "head_dim"
    }


def refuse_unknown_activations(scratch: recipes.FromScratch) -> None:
    """Raise ModelError for a field that names a function which transformers does not have.

    Needs torch.
    """
    from transformers.activations import ACT2FN

    blank = transformers.AutoConfig.for_model(scratch.model_type).to_dict()
    for name, value in scratch.config.items():
        if isinstance(value, str) and ("act" in name or "proj" in name):
            plain = value.removeprefix("gated-")  # as T5's kind has it
            if str(blank.get(name)).removeprefix("gated-") in ACT2FN and plain not in ACT2FN:
                raise errors.ModelError(
                    f"model.from_scratch.{name}: unknown {errors.shown(value)}."
                    f"{errors.nearest(plain, list(ACT2FN))}"
                )


def unbuildable(scratch: recipes.FromScratch, error: Exception) -> errors.ModelError:
    return errors.ModelError(
        f"model.from_scratch: {scratch.model_type} cannot be built: {' '.join(str(error).split())}"
    )


# --- tokenizers ---------------------------------------------------------------------------


def encoder(wanted: recipes.Model) -> encoding.Encoder:
    """The encoder of the model that a recipe names, by its family and its tokenizer."""
    kind = family_of(wanted)
    made = tokenizer(wanted.name or "", revision=wanted.revision, kind=kind)
    return families.encoder(kind, made)


def tokenizer(name: str, *, revision: str | None = None, kind: str = families.CAUSAL) -> Any:
    """The tokenizer of a model or run, with a chat template: its own, or itune's for a family."""
    alone = (Path(name) / "tokenizer.json").is_file()
    location = name if alone else locating.resolve(name, revision)
    loaded = locating.from_library(
        name,
        lambda: transformers.AutoTokenizer.from_pretrained(
            location, revision=revision, trust_remote_code=False
        ),
    )
    if getattr(loaded, "backend_tokenizer", None) is None:
        raise errors.ModelError(
            f"{name}: its tokenizer has no fast version, which exact masks need. "
            "Convert it to tokenizer.json."
        )
    return vocabularies.with_template(loaded, kind)


def asked_tokenizer(recipe: recipes.Recipe, run: runs.Run | None, command: str = "") -> Any:
    """The tokenizer that a recipe names, or the one trained on its texts, kept with the run."""
    scratch, kind = recipe.model.from_scratch, family_of(recipe.model)
    if scratch is None:
        return tokenizer(recipe.model.name or "", revision=recipe.model.revision, kind=kind)
    if isinstance(scratch.tokenizer, str):
        return tokenizer(scratch.tokenizer, kind=kind)
    kept = None if run is None else run.dir / "tokenizer"
    if kept is not None and kept.is_dir():
        return tokenizer(str(kept), kind=kind)
    wanted = scratch.tokenizer

    def trained() -> Any:
        return vocabularies.train(wanted, lambda: data.texts(recipe.data.train, command), kind)

    if kept is None:
        return trained()
    # One machine trains it, the others of the run take what it has made.
    with cache.held(kept.with_name(".tokenizer.lock")):
        if kept.is_dir():
            return tokenizer(str(kept), kind=kind)
        made = trained()
        beside = kept.with_name(".tokenizer")
        made.save_pretrained(beside)
        storage.publish(beside, kept)
    return made
