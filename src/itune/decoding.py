"""Answers from a model, generated in batches.

Needs torch.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from itune import encoding, errors, families

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
MAX_NEW_TOKENS = 128
BATCH_TOKENS = 16384  # chosen: keeps the cache of a batch small beside a small model's weights
BATCH_ROWS = 64


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer: its text, how many tokens it took, and why it ended (`stop` or `length`)."""

    text: str
    tokens: int
    stop: str


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
    if "do_sample" not in given:
        given["do_sample"] = any(given.get(name) is not None for name in SAMPLING)
    given["eos_token_id"] = sorted({encoder.stop_id, encoder.eos_id})
    given["pad_token_id"] = encoder.tokenizer.pad_token_id
    try:
        made = transformers.GenerationConfig(**given)
        made.validate(strict=True)
    except (ValueError, TypeError) as error:
        raise errors.RecipeError(f"generation: {' '.join(str(error).split())}") from error
    return made


def refuse_masked(encoder: encoding.Encoder, name: str) -> None:
    """Raise OptionError for a model that can only fill in what is masked."""
    if encoder.family == families.MASKED:
        raise errors.OptionError(
            f"{name}: a masked language model, which fills in masks and writes no text. Ask it for "
            "one of a template's choices with itune eval, or name a causal or seq2seq model."
        )


def _by_length(prompts: Sequence[Sequence[int]], extra: int) -> Iterator[list[int]]:
    """Indices of prompts in batches of like length, the longest first."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    batch: list[int] = []
    for i in order:
        width = len(prompts[(batch or [i])[0]]) + extra
        if batch and ((len(batch) + 1) * width > BATCH_TOKENS or len(batch) == BATCH_ROWS):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.inference_mode()
def generate(
    model: Any,
    encoder: encoding.Encoder,
    prompts: Sequence[Sequence[int]],
    wanted: Any,
    done: Callable[[int, Completion], None] | None = None,
) -> list[Completion]:
    """The completion of each prompt, in their order.

    `wanted`: a GenerationConfig from `settings`. `done(index, completion)` is told of each one
    as soon as it is there. Raises DataError for a prompt that leaves no room to answer.
    """
    model.eval()
    for prompt in prompts:
        _room_left(model, prompt)
    out: dict[int, Completion] = {}
    apart = encoder.family == families.SEQ2SEQ  # the answer is a text of its own
    pad = encoder.tokenizer.pad_token_id
    stops = set(wanted.eos_token_id)
    for rows in _by_length(prompts, wanted.max_new_tokens):
        width = max(len(prompts[i]) for i in rows)
        ids = torch.full((len(rows), width), pad)
        mask = torch.zeros_like(ids)
        for k, i in enumerate(rows):
            begin = 0 if apart else width - len(prompts[i])
            ids[k, begin : begin + len(prompts[i])] = torch.tensor(prompts[i])
            mask[k, begin : begin + len(prompts[i])] = 1
        # What the model's positions have no room for is not asked for; `stop` then says `length`.
        within = copy.copy(wanted)
        within.max_new_tokens = min(wanted.max_new_tokens, context(model) - (1 if apart else width))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            made = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=within,
            )
        for i, new in zip(rows, made[:, 1 if apart else width :].tolist(), strict=True):
            end = next((k for k, id_ in enumerate(new) if id_ in stops), None)
            kept = new if end is None else new[:end]
            completion = Completion(
                encoder.decode(kept),
                len(kept) + (end is not None),
                "length" if end is None else "stop",
            )
            out[i] = completion
            if done is not None:
                done(i, completion)
    return [out[i] for i in range(len(prompts))]


def _room_left(model: Any, prompt: Sequence[int]) -> int:
    room = context(model) - len(prompt)
    if room < 1:
        raise errors.DataError(
            f"a prompt of {len(prompt)} tokens fills the {context(model)} that the model reads, so "
            "no answer fits. Shorten it."
        )
    return room


def context(model: Any) -> int:
    """How many tokens the model reads at once; a large number where its config sets none."""
    return int(getattr(model.config, "max_position_embeddings", None) or 1 << 30)
