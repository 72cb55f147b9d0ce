"""Answers from a model: by itune's own loop where that is exact, else by `transformers.generate`.

A model that another engine serves answers there.

Needs torch.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from itune import (
    adapters,
    encoding,
    engines,
    errors,
    families,
    folding,
    generators,
    picking,
    slots,
    stepping,
)

BATCH_TOKENS = 16384  # chosen: of the library's loop, which sets all of them aside at once

Done = Callable[[int, "Completion"], None]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer: its text, how many tokens it took, and why it ended (`stop` or `length`).

    ids: its tokens, with the one that ended it.
    """

    text: str
    tokens: int
    stop: str
    ids: tuple[int, ...] = ()


# --- answers --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Order:
    """How prompts are gone through.

    seed, keys: where answers are drawn, each from numbers of its own: of the seed and its key, its
    place where there are no keys. window: so many prompts are sorted by length at a time; all,
    where it is None. told(place, token): hears of each token as it comes.
    """

    seed: int = 0
    keys: Sequence[int] | None = None
    window: int | None = None
    told: stepping.Told | None = None


def generate(
    model: Any,
    encoder: encoding.Encoder,
    prompts: Sequence[Sequence[int]],
    wanted: Any,
    done: Done | None = None,
    *,
    order: Order | None = None,
    say: Say | None = None,
) -> list[Completion]:
    """The completion of each prompt, in their order.

    `wanted`: a GenerationConfig from `settings`. `done(index, completion)` is told of each one
    as soon as it is there, the longest prompts first. An adapter on the model is folded in
    meanwhile. `say` hears why the library's own loop was taken, where it was.
    Raises DataError for a prompt that leaves no room to answer.
    """
    for prompt in prompts:
        room_left(model, prompt)
    out: dict[int, Completion] = {}

    def note(place: int, completion: Completion) -> None:
        out[place] = completion
        if done is not None:
            done(place, completion)

    if isinstance(model, engines.Served):
        _Job(model, encoder, prompts, wanted, order or Order(), note).by_engine()
        return [out[place] for place in range(len(prompts))]
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), folding.folded_in(model) as plain:
            job = _Job(plain, encoder, prompts, wanted, order or Order(), note)
            why = job.library
            if why and say is not None:
                say(f"decoding by transformers' own loop: {why}")
            (job.by_library if why else job.by_steps)()
    finally:
        model.train(was_training)
    return [out[place] for place in range(len(prompts))]


@dataclass(frozen=True, slots=True)
class _Job:
    """Prompts to be answered, by one of three ways."""

    model: Any
    encoder: encoding.Encoder
    prompts: Sequence[Sequence[int]]
    wanted: Any
    order: Order
    note: Done

    # --- our own loop ---

    @property
    def fields(self) -> dict[str, Any]:
        """The settings as `transformers.generate` would resolve them."""
        return picking.resolved(self.model, self.wanted)

    @property
    def library(self) -> str:
        """Why our own loop would not do; nothing where it does."""
        if not self.prompts:
            return ""
        refused = picking.refused(self.fields)
        if refused:
            return f"it knows what generation.{refused} asks for"
        return unslotted(self.model, self.prompts[0])

    def by_steps(self) -> None:
        """Rows in slots: those that end give way to those that wait."""
        seed, window = self.order.seed, self.order.window or len(self.prompts) or 1
        keys = self.order.keys or range(len(self.prompts))
        most = self.wanted.max_new_tokens
        rows = [
            stepping.Row(
                place,
                list(prompt),
                len(prompt),
                min(most, context(self.model) - len(prompt)),
                picking.draws(seed, keys[place]),
            )
            for place, prompt in enumerate(self.prompts)
        ]
        rows.sort(key=lambda row: (row.place // window, -row.begin, row.place))

        def ended(place: int, ids: list[int], stopped: bool) -> None:
            self._note(place, ids[:-1] if stopped else ids, ids)

        told = self.order.told or (lambda place, token: None)
        prefix = list(self.prompts[0][: stepping.shared(self.prompts)]) if rows else []
        if rows:
            stepping.Stepper(self.model, self.fields, told, ended).run(rows, prefix)

    # --- another engine's ---

    def by_engine(self) -> None:
        """All at once, as they come: it batches by itself."""
        keys, stops = self.order.keys or range(len(self.prompts)), set(self.wanted.eos_token_id)
        fields = self.fields
        asked = [
            engines.sampling(
                fields,
                min(self.wanted.max_new_tokens, context(self.model) - len(prompt)),
                int(picking.draws(self.order.seed, key).integers(1 << 62)),
            )
            for prompt, key in zip(self.prompts, keys, strict=True)
        ]
        for place, ids in enumerate(self.model.answers(self.prompts, asked)):
            kept = ids[:-1] if ids and ids[-1] in stops else ids
            self._heard(place, kept)
            self._note(place, kept, ids)

    # --- the library's ---

    def by_library(self) -> None:
        """Batches of like length; one prompt at a time where answers are drawn."""
        for rows in self._batches():
            self._by_library(rows)

    def _batches(self) -> Iterator[list[int]]:
        lengths = [len(prompt) for prompt in self.prompts]
        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        alone = self.fields["do_sample"] or self.wanted.prompt_lookup_num_tokens
        while order:
            width = lengths[order[0]] + self.wanted.max_new_tokens
            size = max(1, min(stepping.BATCH_ROWS, BATCH_TOKENS // width))
            size = 1 if alone else size
            yield order[:size]
            order = order[size:]

    def _by_library(self, rows: list[int]) -> None:
        width = max(len(self.prompts[i]) for i in rows)
        ids = torch.full((len(rows), width), self.encoder.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        apart = self.encoder.family == families.SEQ2SEQ  # the answer is a text of its own
        for k, i in enumerate(rows):
            begin = 0 if apart else width - len(self.prompts[i])
            ids[k, begin : begin + len(self.prompts[i])] = torch.tensor(self.prompts[i])
            mask[k, begin : begin + len(self.prompts[i])] = 1
        # What the model's positions have no room for is not asked for; `stop` then says `length`.
        within = copy.copy(self.wanted)
        begun = 1 if apart else width
        within.max_new_tokens = min(within.max_new_tokens, context(self.model) - begun)
        device = self.model.device
        keys = self.order.keys or range(len(self.prompts))
        drawn = picking.draws(self.order.seed, keys[rows[0]])
        with warnings.catch_warnings(), generators.forked():
            warnings.simplefilter("ignore", UserWarning)
            torch.manual_seed(int(drawn.integers(1 << 62)))
            made = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=within,
                tokenizer=self.encoder.tokenizer,
            )
        stops = set(self.wanted.eos_token_id)
        for i, new in zip(rows, made[:, begun:].tolist(), strict=True):
            end = next((k for k, id_ in enumerate(new) if id_ in stops), None)
            kept = new if end is None else new[:end]
            self._heard(i, kept)
            self._note(i, kept, new if end is None else new[: end + 1])

    def _heard(self, place: int, kept: list[int]) -> None:
        if self.order.told is not None:
            for token in kept:
                self.order.told(place, token)

    def _note(self, place: int, kept: list[int], ids: list[int]) -> None:
        stop = "length" if len(kept) == len(ids) else "stop"
        text = self.encoder.decode(kept)
        self.note(place, Completion(text, len(ids), stop, tuple(ids)))


_unslotted: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def unslotted(model: Any, ids: Sequence[int]) -> str:
    """Why our own loop does not go with a model; nothing where a trial agrees. Asked once each."""
    if adapters.prepends(model):
        return "its adapter puts vectors of its own before the prompt"
    if model not in _unslotted:
        _unslotted[model] = slots.refused(model) or slots.disagrees(model, list(ids))
    return _unslotted[model]


def room_left(model: Any, prompt: Sequence[int]) -> int:
    """How many tokens an answer may have after a prompt. Raises DataError where that is none."""
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
