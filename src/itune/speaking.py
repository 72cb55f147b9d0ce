"""A model that answers for `itune generate`: loaded once, asked many times, heard as it speaks.

Needs torch.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np

from itune import (
    configs,
    decoding,
    encoding,
    engines,
    errors,
    explaining,
    families,
    fingerprints,
    fitting,
    formats,
    generation,
    likelihoods,
    locating,
    models,
    prompting,
    recipes,
    runs,
    sharing,
    templates,
)

CHUNK = 256  # chosen: so many answers of `generate` are the most that a kill loses
SEED = 17  # of a model that is no run's
WRITTEN = "generate"  # as evaluation.decide calls answers that are written

T = TypeVar("T")


class Read(NamedTuple):
    """What is asked, as the model reads it: the messages, cut where they had to be, and their ids.

    The prompt of an answer that is picked has the places of that answer, where the model is masked.
    """

    messages: Sequence[formats.Message]
    ids: Sequence[int]


class Picked(NamedTuple):
    """The choice that is picked, and the probability of each among them; these sum to 1."""

    text: str
    chances: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Speaker:
    """A model with what it is asked by. wanted: a GenerationConfig; name: where it is from.

    choices: one of them is picked, by `decide`, and no answer written, where there are any.
    """

    name: str
    model: Any
    encoder: encoding.Encoder
    wanted: Any
    seed: int
    choices: tuple[str, ...] = ()
    decide: str = "likelihood"

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

    def read(self, waiting: Sequence[prompting.Conversation], say: decoding.Say) -> list[Read]:
        """All prompts as the model reads them.

        One that a template made is cut where it is too long, as in training. Raises DataError, with
        its place, for one that leaves no room to answer.
        """
        if self.encoder.family == families.MASKED:  # the place of the answer is in the prompt
            longest = models.positions(self.model)
        else:
            room = decoding.context(self.model)
            longest = room - min(int(self.wanted.max_new_tokens), room // 2)
        found, cut = [], 0
        for asked in waiting:
            with prompting.located(asked.where):
                read = Read(asked.messages, self.encoder.prompt(asked.messages))
                if len(read.ids) > longest and asked.how is not None:
                    whole = asked.how.example(asked.row)
                    shorter = fitting.prompt(whole, asked.how, asked.row, 0, self.encoder, longest)
                    read, cut = Read(*shorter) if shorter else read, cut + bool(shorter)
                if not self.choices or len(read.ids) > longest:
                    decoding.room_left(self.model, read.ids)
            found.append(read)
        if cut:
            say(
                f"{cut:,} of {len(found):,} prompts are cut to the {longest:,} tokens that fit "
                "beside an answer"
            )
        return found

    def answers(
        self,
        asked: Sequence[Read],
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

        def written(start: int, places: Sequence[int]) -> list[decoding.Completion]:
            return decoding.generate(
                self.model,
                self.encoder,
                [asked[place].ids for place in places],
                self.wanted,
                lambda place, completion: done(),
                order=decoding.Order(self.seed, [first + place for place in places], told=told),
                say=say if start == 0 else None,
            )

        more = int(self.wanted.max_new_tokens)
        yield from self._in_order([len(read.ids) + more for read in asked], written)

    def picks(
        self, asked: Sequence[Read], *, done: Callable[[], None], say: decoding.Say
    ) -> Iterator[Picked]:
        """The choice that is picked for each prompt, in order, as `itune eval` picks it."""

        def picked(start: int, places: Sequence[int]) -> list[Picked]:
            found: dict[int, Picked] = {}

            def keep(place: int, best: int, nats: np.ndarray) -> None:
                each = np.exp(nats - np.logaddexp.reduce(nats)).tolist()
                chances = dict(zip(self.choices, each, strict=True))
                found[place] = Picked(self.choices[best], chances)
                done()

            likelihoods.choose(
                self.model,
                self.encoder,
                [asked[place].messages for place in places],
                self.choices,
                decide=self.decide,
                done=keep,
                say=say if start == 0 else None,
            )
            return [found[place] for place in range(len(places))]

        yield from self._in_order([len(read.ids) for read in asked], picked)

    def _in_order(
        self, costs: Sequence[float], make: Callable[[int, Sequence[int]], Sequence[T]]
    ) -> Iterator[T]:
        """What `make(start, places)` makes of every place, in order, a chunk after the other."""
        served = isinstance(self.model, engines.Served)
        size = engines.CHUNK if served else CHUNK * sharing.world()
        for start in range(0, len(costs), size):
            share = [start + place for place in sharing.mine(costs[start : start + size])]
            made = make(start, share)
            found = dict(
                each
                for part in sharing.gathered(list(zip(share, made, strict=True)))
                for each in part
            )
            yield from (found[place] for place in range(start, min(start + size, len(costs))))


def loaded(asked: prompting.Asked, given: Mapping[str, Any], say: decoding.Say) -> Speaker:
    """The model of a run, or another. `given`: generation's fields of the command line."""
    settled = _settled(asked, given, say)
    location, choices = settled.location, settled.choices
    named = recipes.Model(name=location)
    encoder = configs.encoder(named).answering(choices)
    if not choices:
        generation.refuse_masked(encoder, location)
    wanted = generation.settings(settled.fields, encoder)
    if asked.seed is not None and not wanted.do_sample:
        raise errors.OptionError(
            "--seed: the likeliest token is taken each time, whatever the seed is. Have answers "
            "drawn: --set generation.do_sample=true, or leave it out."
        )
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
    return Speaker(location, model, encoder, wanted, settled.seed, choices, settled.decide)


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
    settled = _settled(asked, given, lambda _: None)
    location, seed = settled.location, settled.seed
    named = recipes.Model(name=location)
    wanted = generation.settings(settled.fields, configs.encoder(named))
    dtype = str(models.placement(named).dtype)
    mark = fingerprints.of_asking(location, None, dtype, wanted, seed) | {"engine": asked.engine}
    if settled.choices:
        mark |= {"choices": settled.choices, "decide": settled.decide}
    return [
        fingerprints.digest({**mark, "asked": [[m.role, m.content] for m in each.messages]})[:16]
        for each in conversations
    ]


class _Settled(NamedTuple):
    """Where the model is that answers, and by what: its seed, generation's fields, choices."""

    location: str
    seed: int
    fields: dict[str, Any]
    choices: tuple[str, ...]
    decide: str


def _settled(asked: prompting.Asked, given: Mapping[str, Any], say: decoding.Say) -> _Settled:
    if asked.model is not None:
        location, seed, fields, decide = asked.model, SEED, dict(given), "likelihood"
    else:
        run = runs.find(asked.run) if asked.run is not None else runs.newest()
        say(f"run: {run.dir}")
        recipe = run.recipe
        location, seed, decide = str(run.dir), recipe.training.seed, recipe.evaluation.decide
        fields = {**recipe.generation, **given}
    decide = asked.decide or decide
    choices: tuple[str, ...] = ()
    if asked.template is not None and decide != WRITTEN:
        choices = tuple(templates.load(asked.template).choices)
    if choices:
        _refuse_unpicked(asked)
    return _Settled(location, seed if asked.seed is None else asked.seed, fields, choices, decide)


def _refuse_unpicked(asked: prompting.Asked) -> None:
    """Raise OptionError for what has no meaning where a choice is picked and nothing written."""
    given = {
        "--explain": asked.explain,
        "--engine": asked.engine is not None,
        "--seed": asked.seed is not None,
    }
    for name, value in given.items():
        if value:
            raise errors.OptionError(
                f"{name}: the likeliest of the choices of {asked.template} is picked, and nothing "
                "is written. Leave it out, or have the answer written: "
                "--set evaluation.decide=generate."
            )
