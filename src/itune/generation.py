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
# What transformers finds out when it draws, or never: `no` is a text in YAML 1.2, and true.
WHOLE = {"max_new_tokens": 1, "min_new_tokens": 0, "num_beams": 1, "top_k": 0}
WHOLE |= {"max_length": 1, "min_length": 0, "no_repeat_ngram_size": 0}
ABOVE_ZERO = ("temperature", "repetition_penalty", "encoder_repetition_penalty")
SHARES = ("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
TRUTHS = ("do_sample", "use_cache", "remove_invalid_values", "renormalize_logits")


def settings(fields: Mapping[str, Any], encoder: encoding.Encoder) -> Any:
    """A GenerationConfig from a recipe's `generation` section: greedy, unless it asks to sample.

    It stops at the end-of-sequence token and at the token that ends an answer in training.
    Raises RecipeError for an unknown field or a value that transformers refuses.
    """
    known = transformers.GenerationConfig().to_dict()
    errors.refuse_unknown("generation", fields, known, "GenerationConfig")
    _refuse_kinds(fields)
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


def _refuse_kinds(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name in WHOLE:
            wanted = f"a whole number from {WHOLE[name]}"
            right = number and isinstance(value, int) and value >= WHOLE[name]
        elif name in ABOVE_ZERO:
            wanted, right = "a number above 0", number and value > 0
        elif name in SHARES:
            wanted, right = "a number from 0 to 1", number and 0 <= value <= 1
        elif name in TRUTHS:
            wanted, right = "true or false", isinstance(value, bool)
        else:
            continue
        if value is not None and not right:
            cold = name == "temperature" and value == 0
            greedy = " For the likeliest answer write do_sample: false." * cold
            raise errors.RecipeError(
                f"generation.{name}: expected {wanted}, found {errors.shown(value)}.{greedy}"
            )


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
            f"{name}: a masked language model, which fills in masks and writes no text. It "
            "picks one of a template's choices (itune generate --template NAME); to have texts "
            "written, name a causal or seq2seq model."
        )
