"""The next token of each row from its logits: what transformers would pick, row by row.

Needs torch. Each row draws its own random numbers, so an answer does not depend on which others
are under way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers

# What transformers takes for a field that neither the recipe nor the model sets.
DEFAULTS: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "use_cache": True,
    "num_beams": 1,
    "num_return_sequences": 1,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
}
# Fields that this file follows where they say something.
DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
FOLLOWED = {
    *("do_sample", *DRAWING, "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens"),
    *("max_new_tokens", "eos_token_id", "suppress_tokens"),
}
# Fields that change no greedy or drawn answer of a decoder.
WITHOUT_EFFECT = {
    *("bos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "early_stopping"),
    *("length_penalty", "cache_implementation", "cache_config", "transformers_version"),
    *("output_scores", "output_logits", "output_attentions", "output_hidden_states"),
    *("return_dict_in_generate", "remove_invalid_values", "disable_compile", "compile_config"),
    *("continuous_batching_config", "renormalize_logits", "num_assistant_tokens"),
    *("num_assistant_tokens_schedule", "assistant_confidence_threshold", "is_assistant"),
    *("target_lookbehind", "assistant_lookbehind", "prefill_chunk_size"),
}


def resolved(model: Any, wanted: Any) -> dict[str, Any]:
    """Each field of a GenerationConfig as `model.generate` would take it: the model's own where
    the config leaves it out."""
    own = model.generation_config.to_dict()
    fields = {**DEFAULTS, **{k: v for k, v in own.items() if v is not None}}
    return {**fields, **{k: v for k, v in wanted.to_dict().items() if v is not None}}


def refused(fields: Mapping[str, Any]) -> str:
    """The first field that this file does not follow, as NAME: VALUE; nothing where it can."""
    for name, value in sorted(fields.items()):
        if name in FOLLOWED or name in WITHOUT_EFFECT or name.startswith("_"):
            continue
        if value is not None and value != DEFAULTS.get(name, False):
            return f"{name}: {value}"
    return ""


class Picker:
    """Picks tokens by resolved fields of a GenerationConfig. Raises ValueError for bad values."""

    def __init__(self, fields: Mapping[str, Any], device: torch.device) -> None:
        self.samples = bool(fields["do_sample"])
        self.stops = list(fields["eos_token_id"])
        self.least = int(fields.get("min_new_tokens") or 0)
        self.by_text = _by_text(fields)
        self.by_logits = _by_logits(fields, device) if self.samples else []
        if fields.get("suppress_tokens"):
            kind = transformers.SuppressTokensLogitsProcessor
            self.by_logits.insert(0, kind(fields["suppress_tokens"], device=str(device)))

    @property
    def needs_text(self) -> bool:
        """Whether the tokens of the rows so far decide."""
        return bool(self.by_text)

    def scores(
        self, logits: torch.Tensor, texts: Sequence[Sequence[int]], new: Sequence[int]
    ) -> torch.Tensor:
        """The logits as they are chosen from, float32 [rows, vocabulary].

        texts: all tokens of each row, prompt and answer, where `needs_text`. new: how many of
        them are the answer's.
        """
        scores = logits.to(torch.float32, copy=True)
        for k, text in enumerate(texts if self.by_text else ()):
            ids = torch.tensor([text], device=scores.device)
            for process in self.by_text:
                scores[k] = process(ids, scores[k : k + 1])[0]
        if self.least:
            early = [k for k, count in enumerate(new) if count < self.least]
            for stop in self.stops:
                scores[early, stop] = -torch.inf
        ids = torch.empty((len(scores), 0), dtype=torch.long, device=scores.device)
        for process in self.by_logits:
            scores = process(ids, scores)
        return scores

    def pick(self, scores: torch.Tensor, draws: Sequence[np.random.Generator]) -> list[int]:
        """The likeliest token of each row, or one drawn with the row's own random numbers."""
        if not self.samples:
            return scores.argmax(-1).tolist()
        within = scores.softmax(-1).double().cumsum(-1)
        at = torch.tensor([[each.random()] for each in draws], dtype=torch.float64)
        found = torch.searchsorted(within, at.to(scores.device) * within[:, -1:], right=True)
        return found.squeeze(1).clamp(max=scores.shape[-1] - 1).tolist()


def draws(seed: int, key: int) -> np.random.Generator:
    """The random numbers of a row: those of its key, whatever the other rows are."""
    return np.random.default_rng([seed, key])


def _by_text(fields: Mapping[str, Any]) -> list[Any]:
    made: list[Any] = []
    if fields["repetition_penalty"] != 1.0:
        made.append(transformers.RepetitionPenaltyLogitsProcessor(fields["repetition_penalty"]))
    if fields["no_repeat_ngram_size"]:
        made.append(transformers.NoRepeatNGramLogitsProcessor(fields["no_repeat_ngram_size"]))
    return made


def _by_logits(fields: Mapping[str, Any], device: torch.device) -> list[Any]:
    """In the order of `generate`, which matters."""
    made: list[Any] = []
    if fields["temperature"] != 1.0:
        made.append(transformers.TemperatureLogitsWarper(float(fields["temperature"])))
    if fields["top_k"]:
        made.append(transformers.TopKLogitsWarper(fields["top_k"]))
    if fields["top_p"] < 1.0:
        made.append(transformers.TopPLogitsWarper(float(fields["top_p"])))
    if fields.get("min_p") is not None:
        made.append(transformers.MinPLogitsWarper(float(fields["min_p"])))
    if fields["typical_p"] < 1.0:
        made.append(transformers.TypicalLogitsWarper(float(fields["typical_p"])))
    if 0.0 < fields["epsilon_cutoff"] < 1.0:
        made.append(transformers.EpsilonLogitsWarper(float(fields["epsilon_cutoff"])))
    if 0.0 < fields["eta_cutoff"] < 1.0:
        made.append(transformers.EtaLogitsWarper(float(fields["eta_cutoff"]), device=str(device)))
    return made
