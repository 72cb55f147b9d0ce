"""A model that answers for `itune generate`: loaded once, asked many times, heard as it speaks.

Needs torch.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from itune import (
    configs,
    decoding,
    encoding,
    engines,
    errors,
    explaining,
    fingerprints,
    generation,
    locating,
    models,
    prompting,
    recipes,
    runs,
    sharing,
)

CHUNK = 256  # chosen: so many answers of `generate` are the most that a kill loses


@dataclass(frozen=True, slots=True)
class Speaker:
    """A model with what it is asked by. wanted: a GenerationConfig; name: where it is from."""

    name: str
    model: Any
    encoder: encoding.Encoder
    wanted: Any
    seed: int

    def answer(
        self, ids: Sequence[int], key: int, told: Callable[[int, int], None] | None = None
    ) -> decoding.Completion:
        """The answer to one prompt. `told(place, token)` hears of each token as it comes."""
        order = decoding.Order(self.seed, [key], told=told)
        return decoding.generate(self.model, self.encoder, [ids], self.wanted, order=order)[0]

    def warm(self) -> None:
        """Answer a question with one token, unheard: what a first answer imports is there then.

        A signal in the middle of an import would leave a library behind that is half there.
        """
        from itune import formats

        few = copy.deepcopy(self.wanted)
        few.max_new_tokens, few.min_new_tokens, few.min_length = 1, None, 0
        with contextlib.suppress(errors.UserError):  # a real question says it with its place
            ids = self.encoder.prompt([formats.Message("user", "?")])
            decoding.generate(self.model, self.encoder, [ids], few)

    def explained(
        self, ids: Sequence[int], completion: decoding.Completion, *, drivers: bool
    ) -> explaining.Explanation:
        """How likely an answer's tokens were; `drivers`: and which of the prompt's drove it."""
        return explaining.explained(self.model, self.encoder, ids, completion.ids, drivers=drivers)

    def read(self, waiting: Sequence[prompting.Conversation]) -> list[list[int]]:
        """The ids of all prompts. Raises DataError, with its place, for one that leaves no room."""
        found = []
        for asked in waiting:
            with prompting.located(asked.where):
                ids = self.encoder.prompt(asked.messages)
                decoding.room_left(self.model, ids)
            found.append(ids)
        return found

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        first: int,
        *,
        told: Callable[[int, int], None] | None,
        done: Callable[[], None],
        say: decoding.Say,
    ) -> Iterator[decoding.Completion]:
        """The answer to each prompt in order. first: the key of the first; done: hears of each.

        A chunk at a time, so that what is answered is written before the rest is begun. Of several
        processes each answers a share of the chunk, and each gives the whole.
        """
        served = isinstance(self.model, engines.Served)
        size = engines.CHUNK if served else CHUNK * sharing.world()
        for start in range(0, len(prompts), size):
            chunk = prompts[start : start + size]
            share = sharing.mine([len(ids) + int(self.wanted.max_new_tokens) for ids in chunk])
            made = decoding.generate(
                self.model,
                self.encoder,
                [chunk[place] for place in share],
                self.wanted,
                lambda place, completion: done(),
                order=decoding.Order(
                    self.seed, [first + start + place for place in share], told=told
                ),
                say=say if start == 0 else None,
            )
            found = dict(
                each
                for part in sharing.gathered(list(zip(share, made, strict=True)))
                for each in part
            )
            yield from (found[place] for place in range(len(chunk)))


def loaded(asked: prompting.Asked, given: Mapping[str, Any], say: decoding.Say) -> Speaker:
    """The model of a run, or another. `given`: generation's fields of the command line."""
    location, seed, fields = _settled(asked, given, say)
    named = recipes.Model(name=location)
    encoder = configs.encoder(named)
    generation.refuse_masked(encoder, location)
    wanted = generation.settings(fields, encoder)
    place = models.placement(named)
    if engine := engines.asked(asked.engine):
        model: Any = engines.serve(
            engine,
            locating.resolve(location),
            wanted,
            dtype=str(place.dtype).removeprefix("torch."),
            family=encoder.family,
        )
    else:
        model = models.load(named, place)
        models.take_threads(model, place)
    return Speaker(location, model, encoder, wanted, seed)


@dataclass
class Heard:
    """The text of an answer as its tokens come: `write` gets each part, once it is sure.

    A character whose bytes are not all there is held back, and so is space that may be the last.
    """

    encoder: encoding.Encoder
    write: Callable[[str], None]
    ids: list[int] = field(default_factory=list)
    text: str = ""

    def told(self, _place: int, token: int) -> None:
        """One token more."""
        self.ids.append(token)
        self._grow(self.encoder.decode(self.ids).rstrip("\ufffd").rstrip())

    def end(self) -> str:
        """The whole text, with what was held back."""
        self._grow(self.encoder.decode(self.ids))
        return self.text

    def _grow(self, text: str) -> None:
        # A tokenizer that writes what went before anew is heard out first.
        if text.startswith(self.text) and len(text) > len(self.text):
            more, self.text = text[len(self.text) :], text
            self.write(more)  # last: a signal that comes meanwhile must not have it written twice


def system_taken(speaker: Speaker, system: str) -> None:
    """Refuse a system message that the model's chat template does not take, before any question."""
    from itune import formats

    with prompting.located("--system", kind=errors.OptionError):
        speaker.encoder.prompt([formats.Message("system", system), formats.Message("user", "?")])


def marks(
    asked: prompting.Asked,
    given: Mapping[str, Any],
    conversations: Sequence[prompting.Conversation],
) -> list[str]:
    """A word for each thing that is asked: the same word, the same answer. Loads no weights."""
    location, seed, fields = _settled(asked, given, lambda _: None)
    named = recipes.Model(name=location)
    wanted = generation.settings(fields, configs.encoder(named))
    dtype = str(models.placement(named).dtype)
    mark = fingerprints.of_asking(location, None, dtype, wanted, seed)
    return [
        fingerprints.digest(
            {**mark, "engine": asked.engine, "asked": [[m.role, m.content] for m in each.messages]}
        )[:16]
        for each in conversations
    ]


def _settled(
    asked: prompting.Asked, given: Mapping[str, Any], say: decoding.Say
) -> tuple[str, int, dict[str, Any]]:
    """Where the model is that answers, its seed, and the fields of generation."""
    if asked.model is not None:
        return asked.model, 17, dict(given)
    run = runs.find(asked.run) if asked.run is not None else runs.newest()
    say(f"run: {run.dir}")
    recipe = run.recipe
    return str(run.dir), recipe.training.seed, {**recipe.generation, **given}
