"""How answers are generated: what a recipe's `generation` section means to transformers.

Needs transformers, not torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers

from itune import encoding, errors, families

SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff"),
)
# What transformers does by code of others, fetched, or would give back besides the answer.
FETCHED = ("penalty_alpha", "dola_layers", "constraints", "force_words_ids", "num_beam_groups")
BESIDES = ("return_dict_in_generate",)
MAX_NEW_TOKENS = 128


def settings(fields: Mapping[str, Any], encoder: encoding.Encoder) -> Any:
    """A GenerationConfig from a recipe's `generation` section: greedy, unless it asks to sample.

    It stops at the end-of-sequence token and at the token that ends an answer in training.
    Raises RecipeError for an unknown field or a value that transformers refuses.
    """
    known = transformers.GenerationConfig().to_dict()
    errors.refuse_unknown("generation", fields, known, "GenerationConfig")
    given = {"max_new_tokens": MAX_NEW_TOKENS, **fields}
    if given.get("num_return_sequences", 1) != 1:
        raise errors.RecipeError(
            f"generation.num_return_sequences: {given['num_return_sequences']}, and each prompt "
            "gets one answer. Leave it out, or ask several times with do_sample."
        )
    _refuse_fields(given)
    if "do_sample" not in given:
        given["do_sample"] = any(given.get(name) is not None for name in SAMPLING)
    own = given.get("eos_token_id")
    more = own if isinstance(own, list) else [] if own is None else [own]
    given["eos_token_id"] = sorted({encoder.stop_id, encoder.eos_id, *more})
    given["pad_token_id"] = encoder.tokenizer.pad_token_id
    try:
        made = transformers.GenerationConfig(**given)
        made.validate(strict=True)
    except (ValueError, TypeError) as error:
        raise errors.RecipeError(f"generation: {' '.join(str(error).split())}") from error
    return made


def _refuse_fields(given: Mapping[str, Any]) -> None:
    for name in (*FETCHED, *BESIDES):
        value = given.get(name)
        if not value or (name == "num_beam_groups" and value == 1):
            continue
        why = "needs code that transformers would fetch" if name in FETCHED else "gives no answer"
        raise errors.RecipeError(f"generation.{name}: {value} {why}. Leave it out.")


def refuse_masked(encoder: encoding.Encoder, name: str) -> None:
    """Raise OptionError for a model that can only fill in what is masked."""
    if encoder.family == families.MASKED:
        raise errors.OptionError(
            f"{name}: a masked language model, which fills in masks and writes no text. Ask it for "
            "one of a template's choices with itune eval, or name a causal or seq2seq model."
        )
