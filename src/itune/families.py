"""The families of models: what an example is for a decoder, an encoder-decoder and an encoder.

A decoder reads prompt and answer as one text. An encoder-decoder reads the prompt and writes the
answer. An encoder fills masks in the answer's place. All keep an example as one row of ids with
the answer's supervised, so that whatever counts, orders and caches rows knows one kind alone.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from itune import encoding, errors

if TYPE_CHECKING:
    from itune import recipes

CAUSAL, SEQ2SEQ, MASKED = "causal", "seq2seq", "masked"


def encoder(family: str, tokenizer: Any) -> encoding.Encoder:
    """The encoder of a family. Raises ModelError where the tokenizer lacks a token it needs."""
    return ENCODERS[family](tokenizer)


def decoder_inputs(model: Any, labels: Any) -> Any:
    """What the decoder of an encoder-decoder reads so as to write labels, of the same shape.

    labels int64 [examples, longest], -100 beyond an answer's end. Raises ModelError where the
    model's config does not say what the decoder begins with.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(inner, "prepare_decoder_input_ids_from_labels"):
        return inner.prepare_decoder_input_ids_from_labels(labels=labels)
    # M2M100, NLLB and Blenderbot have BART's rule inside their forward alone.
    start, pad = inner.config.decoder_start_token_id, inner.config.pad_token_id
    if start is None or pad is None:
        raise errors.ModelError(
            f"{type(inner).__name__}: its config names no decoder_start_token_id or pad_token_id, "
            "so what its decoder reads first is unknown. Set both in the model's config.json."
        )
    shifted = labels.roll(1, 1)
    shifted[:, 0] = start
    return shifted.masked_fill(shifted < 0, pad)


class _Apart(encoding.Encoder):
    """Prompt and answer are rendered apart, and a text has the tokenizer's own frame around it.

    prefix, suffix: the ids that the tokenizer sets before and after a text, such as [CLS] and
    [SEP]; none where it sets none.
    """

    def _prepare(self) -> None:
        self.prefix, self.suffix = _frame(self.tokenizer)

    def _framed(self, ids: Sequence[int], learnt: bool, guarded: bool) -> encoding.Tokens:
        whole = [*self.prefix, *ids, *self.suffix]
        supervised = [False] * len(whole)
        if learnt:
            supervised[len(self.prefix) : len(whole) - len(self.suffix)] = [True] * len(ids)
        return encoding.Tokens(whole, supervised, guarded)

    def _asked(
        self, batch: Sequence[encoding.Messages], *, prompt: bool
    ) -> tuple[list[encoding.Tokens], list[str]]:
        """The prompt of each conversation, and the answer to it: the last one of several."""
        if prompt:
            return super().conversations(batch, prompt=True), [""] * len(batch)
        ends = [self._cuts(messages, "last", prompt=False).answers[0] for messages in batch]
        before = [messages[:end] for messages, end in zip(batch, ends, strict=True)]
        answers = [messages[end].content for messages, end in zip(batch, ends, strict=True)]
        return super().conversations(before, prompt=True), answers


class Pairs(_Apart):
    """Encodes for an encoder-decoder: the prompt for its encoder, then the answer to learn.

    Both are texts of their own, framed as the tokenizer frames a text; an answer ends with the
    end-of-sequence token in any case. Of a conversation the last answer is learnt.
    """

    family = SEQ2SEQ

    def _prepare(self) -> None:
        super()._prepare()
        self.opening = len(self.prefix)
        ends = self.eos_id in self.suffix
        self.closing = self.suffix if ends else [*self.suffix, self.eos_id]
        self.stop_id = self.eos_id
        self.room = 1

    def conversations(
        self,
        batch: Sequence[encoding.Messages],
        *,
        train_on: str = "assistant",
        prompt: bool = False,
    ) -> list[encoding.Tokens]:
        """Tokens of each conversation, see `Encoder.conversations`; the last answer is learnt."""
        asked, answers = self._asked(batch, prompt=prompt)
        out = [self._framed(each.ids, False, each.guarded) for each in asked]
        if prompt:
            return out
        return [
            encoding.Tokens(
                [*before.ids, *self.prefix, *ids, *self.closing],
                [False] * len(before.ids)
                + [True] * (len(self.prefix) + len(ids) + len(self.closing)),
                before.guarded or guarded,
                self.cutter.allowed.learnt(answer, ids),
            )
            for answer, before, (ids, guarded) in zip(
                answers, out, self._texts(answers), strict=True
            )
        ]

    def _texts(self, answers: Sequence[str]) -> list[tuple[list[int], bool]]:
        """Ids of each answer and whether it held a control string that it may not."""
        if not self.cutter.allowed:
            return self.texts.texts(answers)
        return [
            (self._spoken(answer, []), bool(self._own(ids)))
            for answer, ids in zip(answers, self.texts.ids(answers), strict=True)
        ]

    def _parted(self, ids: list[int], guarded: bool, longest: int) -> list[encoding.Tokens]:
        """The pieces of a text, each with its end."""
        room = max(1, longest - 1)
        parts = [ids[k : k + room] for k in range(0, len(ids), room)]
        return [
            encoding.Tokens([*part, self.eos_id], [True] * (len(part) + 1), guarded and not number)
            for number, part in enumerate(parts)
        ]


class Cloze(_Apart):
    """Encodes for an encoder: the prompt, then a place for the answer that the model fills in.

    The place has as many tokens as the longest choice, whatever the answer is, so that its size
    tells nothing: what a shorter answer leaves is mask tokens without loss.
    """

    family = MASKED
    even = True

    def _prepare(self) -> None:
        super()._prepare()
        if self.tokenizer.mask_token_id is None:
            raise errors.ModelError(
                "the tokenizer has no mask token, which a masked language model fills in. "
                "Set mask_token in its tokenizer_config.json."
            )
        self.mask_id = int(self.tokenizer.mask_token_id)
        self.choices: tuple[str, ...] = ()
        self.width = 0
        self.stop_id = self.eos_id
        self.room = len(self.prefix) + len(self.suffix)

    @property
    def eos_id(self) -> int:
        """The id that ends a text, or the mask's where the tokenizer has none."""
        known = (self.tokenizer.sep_token_id, self.tokenizer.eos_token_id, self.mask_id)
        return int(next(id_ for id_ in known if id_ is not None))

    def answering(self, choices: Sequence[str]) -> encoding.Encoder:
        """The encoder for prompts that have these choices."""
        bound = copy.copy(self)
        bound.choices = tuple(choices)
        bound.width = max(map(len, bound.filled(bound.choices)), default=0)
        return bound

    def allowing(self, names: Sequence[str]) -> encoding.Encoder:
        """Raises DataError where there are names: an answer is one of the choices."""
        if names:
            raise errors.DataError(
                "allow_control_tokens: a masked language model fills in one of the template's "
                "choices, which hold none. Delete it."
            )
        return self

    def filled(self, answers: Sequence[str]) -> list[list[int]]:
        """The ids of answers as they stand after a prompt, in the midst of a text."""
        texts = [f" {answer.strip()}" for answer in answers]
        return [
            self.texts.bare(text, inner=True) if self.texts.forged(text, ids, ()) else ids
            for text, ids in zip(texts, self.texts.ids(texts, inner=True), strict=True)
        ]

    def conversations(
        self,
        batch: Sequence[encoding.Messages],
        *,
        train_on: str = "assistant",
        prompt: bool = False,
    ) -> list[encoding.Tokens]:
        """Tokens of each conversation, see `Encoder.conversations`; the last answer is learnt.

        Raises DataError where there are no choices, or the answer is none of them.
        """
        if not self.width:
            raise errors.DataError(
                "a masked language model fills in one of a template's choices, and there are "
                "none here. Take a template with choices, or a causal or seq2seq model."
            )
        asked, answers = self._asked(batch, prompt=prompt)
        out = []
        for before, answer, ids in zip(asked, answers, self.filled(answers), strict=True):
            if prompt:
                ids = []
            elif answer not in self.choices:
                raise errors.DataError(
                    f"the answer {errors.shown(answer)} is none of the template's choices. "
                    "Use choices in its response."
                )
            left = [self.mask_id] * (self.width - len(ids))
            whole = [*self.prefix, *before.ids, *ids, *left, *self.suffix]
            supervised = [False] * len(whole)
            start = len(self.prefix) + len(before.ids)
            supervised[start : start + len(ids)] = [True] * len(ids)
            out.append(encoding.Tokens(whole, supervised, before.guarded))
        return out

    def _parted(self, ids: list[int], guarded: bool, longest: int) -> list[encoding.Tokens]:
        """The pieces of a text, each framed as a text."""
        room = max(1, longest - self.room)
        return [
            self._framed(ids[k : k + room], True, guarded and not k)
            for k in range(0, len(ids), room)
        ]


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer sets before and after every text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for k in range(len(whole) - len(bare) + 1):
        if whole[k : k + len(bare)] == bare:
            return whole[:k], whole[k + len(bare) :]
    return [], []


ENCODERS: dict[str, type[encoding.Encoder]] = {
    CAUSAL: encoding.Encoder,
    SEQ2SEQ: Pairs,
    MASKED: Cloze,
}


# Settings of training that hide a part of a text: for which families.
HIDING = {
    "mlm_probability": (MASKED, SEQ2SEQ),
    "whole_word_mask": (MASKED,),
    "mask_replace_prob": (MASKED,),
    "random_replace_prob": (MASKED,),
    "prompt_mask_prob": (MASKED,),
    "mean_noise_span_length": (SEQ2SEQ,),
}


def refuse_idle(family: str, training: recipes.Training) -> None:
    """Raise RecipeError for a setting that would do nothing with a model of this family.

    One that has its default is let be: the recipe in a run's folder has all of them.
    """
    for name, able in HIDING.items():
        value = getattr(training, name)
        if family not in able and value != type(training).model_fields[name].default:
            raise errors.RecipeError(
                f"training.{name}: {errors.shown(value)}, and the model is {family}: it hides a "
                f"part of a text from a {' or '.join(able)} one alone. Take it out."
            )


# --- of which family a model is -----------------------------------------------------------------


def chosen(wanted: str | None, config: Any) -> str:
    """The family that is wanted, if transformers has a model of it, or the config's own."""
    if wanted is None:
        return family(config)
    if config.model_type not in _tables()[wanted]:
        raise errors.ModelError(
            f"model.family: {wanted}, but transformers has no {wanted} model of type "
            f"{config.model_type!r}. Leave it out."
        )
    return wanted


def family(config: Any) -> str:
    """causal, seq2seq or masked, by transformers' own tables of what a config's model may be."""
    kind, named, tables = config.model_type, set(config.architectures or ()), _tables()
    able = [name for name, table in tables.items() if kind in table]
    if not getattr(config, "is_encoder_decoder", False):
        able = [name for name in able if name != SEQ2SEQ]
    if CAUSAL in able and getattr(config, "is_decoder", False):
        return CAUSAL
    # A type may be several: what its checkpoint was decides, then the order above.
    was = [name for name in able if named & set(_listed(tables[name][kind]))]
    if able:
        return (was or able)[0]
    raise errors.ModelError(
        f"model type {kind!r}: neither a causal, a seq2seq nor a masked language "
        "model. Set model.family if it is one all the same."
    )


def _tables() -> dict[str, Any]:
    """For each family which class transformers has for a type of model."""
    known = importlib.import_module("transformers.models.auto.modeling_auto")
    return {
        SEQ2SEQ: known.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        MASKED: known.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        CAUSAL: known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }


def _listed(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
