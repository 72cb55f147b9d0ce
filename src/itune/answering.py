"""One model and what it is asked: answers to every case, kept as they come; losses of texts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from itune import (
    engines,
    errors,
    fingerprints,
    predictions,
    recipes,
    scoring,
    sharing,
    signals,
    sources,
)

if TYPE_CHECKING:
    import torch

    from itune import batches, data

Say = Callable[[str], None]
Each = Callable[[Any, "batches.Batch"], "torch.Tensor"]  # a model, and what it is asked

MOST_WORDINGS = 1 << 16
SAID_EVERY = 30.0  # chosen: seconds between two lines of progress


@dataclass(frozen=True, slots=True)
class Asked:
    """How much of the evaluation data is asked, and how: what names the folder of the answers."""

    limit: int | None = None
    """Rows of each task; all when left out."""
    shots: int = 0
    """Solved examples before each question."""
    wordings: int | None = None
    """The first wordings of each template, this many; all when left out."""
    decide: str = "likelihood"
    """How one of a template's choices is picked."""
    engine: engines.Engine | None = None
    """What answers in itune's place."""
    beside: str = ""
    """Which other runs answer with this one, as one: `with-seed-18-1f0c9a`."""
    otherwise: str = ""
    """What of the recipe is not as the run was trained: `max-new-tokens-64-1f0c9a`."""

    @property
    def name(self) -> str:
        """`all`, or what is not asked as usual: `limit-20-shots-3`."""
        parts = [
            "" if self.limit is None else f"limit-{self.limit}",
            f"shots-{self.shots}" if self.shots else "",
            "" if self.wordings is None else f"wordings-{self.wordings}",
            "" if self.decide == "likelihood" else self.decide.replace("_", "-"),
            "" if self.engine is None else self.engine.name,
            self.beside,
            self.otherwise,
        ]
        return "-".join(filter(None, parts)) or "all"


class Answerer:
    """A model, loaded when it is first needed, and the tasks it is asked."""

    def __init__(
        self,
        recipe: recipes.Recipe,
        location: str,
        asked: Asked,
        say: Say,
        *,
        like: Answerer | None = None,
    ) -> None:
        """like: take its tokenizer and its prompts, to the last token: those of the tuned model."""
        from itune import configs, generation, models

        self.recipe, self.location, self.asked, self.say = recipe, location, asked, say
        revision = recipe.model.revision if location == recipe.model.name else None
        self.named = recipes.Model(name=location, dtype=recipe.model.dtype, revision=revision)
        self.place = models.placement(self.named)
        self.config = configs.config_of(self.named)
        if like is None:
            self.encoder = configs.encoder(self.named)
        else:
            self.encoder = like.encoder
        self.wanted = generation.settings(recipe.generation, self.encoder)
        self.tasks: list[data.Task] = self._tasks() if like is None else like.tasks
        self.tokens = 0
        self.seconds = 0.0
        self._model: Any = None
        self.awaited: str | None = None  # the folder of an adapter that its engine will serve too
        self._said: set[str] = set()

    def _tasks(self) -> list[data.Task]:
        from itune import data, decoding, families, models, shots

        room = min(decoding.context(self), 1 << 20)
        longest = room - min(int(self.wanted.max_new_tokens), room // 2)
        if self.encoder.family == families.MASKED:  # the place of the answer is in the prompt
            longest = min(models.positions(models.outline(self.named)), 1 << 20)
        tasks = data.tasks(
            self.recipe.data.eval, self.encoder, max_prompt=longest, limit=self.asked.limit
        )
        for task in tasks:
            if task.truncated:
                self.say(
                    f"{task.name}: {task.truncated:,} of {len(task.cases):,} prompts are cut to "
                    f"the {longest:,} tokens that fit beside an answer"
                )
        if (most := self.asked.wordings) is not None:
            tasks = [
                dataclasses.replace(task, cases=tuple(c for c in task.cases if c.wording < most))
                for task in tasks
            ]
        if self.asked.shots:
            tasks = shots.add(
                tasks,
                self.recipe,
                self.encoder,
                self.asked.shots,
                max_prompt=longest,
                say=self.say,
            )
        return tasks

    # --- the model in memory ---

    @property
    def model(self) -> Any:
        """The model, loaded at the first call."""
        if self._model is None:
            from itune import models

            engine = self.asked.engine
            self._hold(self._served(engine) if engine else models.load(self.named, self.place))
        return self._model

    def _served(self, engine: engines.Engine) -> engines.Served:
        from itune import locating

        return engines.serve(
            engine,
            locating.resolve(self.location, self.named.revision),
            self.wanted,
            dtype=str(self.place.dtype).removeprefix("torch."),
            family=self.encoder.family,
            revision=self.named.revision,
            adapter=self.awaited,
        )

    def _hold(self, model: Any) -> None:
        from itune import models

        self._model = model
        if not isinstance(model, engines.Served):
            model.eval()
            models.take_threads(model, self.place)

    def release(self) -> Any:
        """Let go of the model and return it: dropped by the caller, its memory is free."""
        model, self._model = self._model, None
        return model

    def tune(self, base: Answerer) -> None:
        """Take the base's model out of its hands and fold this one's adapter into it."""
        from itune import folding, locating

        location = locating.resolve(self.location, self.named.revision)
        shared = isinstance(base.model, engines.Served)
        self._hold(base.model.adapted(location) if shared else folding.folded(base.model, location))
        base.release()

    # --- what decides its answers ---

    @property
    def mark(self) -> dict[str, Any]:
        """All that decides the answers but the prompts: the same mark, the same answers."""
        mark = {
            **fingerprints.of_asking(
                self.location,
                self.named.revision,
                str(self.place.dtype).removeprefix("torch."),
                self.wanted,
                self.recipe.training.seed,
            ),
            "decide": self.asked.decide,
        }
        if self.asked.engine is not None:
            mark["engine"] = dataclasses.asdict(self.asked.engine)
        return mark

    # --- asking ---

    def complete(self, kept: predictions.Kept) -> bool:
        """Whether every answer is known, so that no model is needed."""
        return all(not self._missing(task, kept) for task in self.tasks)

    def _missing(self, task: data.Task, kept: predictions.Kept) -> list[data.Case]:
        return [case for case in task.cases if kept.answer(task, case) is None]

    def chosen(self, task: data.Task) -> bool:
        """Whether an answer is one of the template's choices, picked by likelihood."""
        return bool(task.template.choices) and self.asked.decide != "generate"

    def answers(self, kept: predictions.Kept) -> dict[str, list[scoring.Prediction]]:
        """The model's answer to every case, by task: those that are kept, the others asked now."""
        if kept.changed:
            self.say(
                f"{kept.path}: answers by another {', '.join(kept.changed)}; asked anew, "
                f"and those are kept in {kept.aside}"
            )
        at = ""
        try:
            for task in self.tasks:
                at = task.name
                self._answered(task, kept)
            kept.settle(self.tasks)
        except (KeyboardInterrupt, signals.Stopped) as stop:
            if kept.path is None:
                raise
            raise errors.Interrupted(
                f"{at}: stopped; {len(kept.answers):,} answers are kept in "
                f"{kept.path}. Run the same command again to go on from there."
            ) from stop
        self.tokens, self.seconds = self._rate()
        return {
            task.name: [
                dataclasses.replace(
                    blank, prediction=kept.answer(task, case) or "", stop=kept.stop(task, case)
                )
                for case, blank in zip(task.cases, self.blank(task), strict=True)
            ]
            for task in self.tasks
        }

    def blank(self, task: data.Task) -> list[scoring.Prediction]:
        """What is asked in a task, with no answer yet."""
        return [
            scoring.Prediction(case.row, case.wording, "", case.references, predictions.shown(case))
            for case in task.cases
        ]

    def _answered(self, task: data.Task, kept: predictions.Kept) -> None:
        """Ask what is missing of a task; of several processes each asks its share."""
        missing = self._missing(task, kept)
        if len(missing) < len(task.cases):
            self.say(
                f"{task.name}: {len(task.cases) - len(missing)} of {len(task.cases)} answers "
                f"are kept in {kept.path}"
            )
        # Of an answer nobody knows the length beforehand, so each counts as the longest.
        written = 0 if self.chosen(task) else int(self.wanted.max_new_tokens)
        share = [missing[i] for i in sharing.mine([len(c.ids) + written for c in missing])]
        if share:
            self._ask(task, share, kept)

    def _rate(self) -> tuple[int, float]:
        """The tokens that all processes wrote, and the seconds that the slowest took."""
        rates = sharing.gathered((self.tokens, self.seconds))
        return sum(tokens for tokens, _ in rates), max(seconds for _, seconds in rates)

    def _ask(self, task: data.Task, cases: list[data.Case], kept: predictions.Kept) -> None:
        from itune import decoding, generation, likelihoods

        model, started = self.model, time.monotonic()
        told = self.counting(task.name, len(cases), "answers")

        def keep(place: int, answer: str, nats: Sequence[float] = (), stop: str = "") -> None:
            kept.add(task, cases[place], answer, nats, stop)
            told()

        if not self.chosen(task):
            generation.refuse_masked(self.encoder, self.location)
        if self.chosen(task):
            choices = task.template.choices
            likelihoods.choose(
                model,
                self.encoder,
                [case.messages for case in cases],
                choices,
                decide=self.asked.decide,
                done=lambda place, best, nats: keep(place, choices[best], nats.tolist()),
                say=self.say,
            )
        else:

            def done(place: int, completion: decoding.Completion) -> None:
                self.tokens += completion.tokens
                keep(place, completion.text, stop=completion.stop)

            decoding.generate(
                model,
                self.encoder,
                [case.ids for case in cases],
                self.wanted,
                done,
                order=decoding.Order(self.recipe.training.seed, [_key(case) for case in cases]),
                say=self._say_once,
            )
        seconds = time.monotonic() - started
        self.seconds += seconds
        of_all = f" by this one of {sharing.world()} processes" if sharing.world() > 1 else ""
        many = f"{len(cases)} answer{'s' * (len(cases) != 1)}"
        self.say(f"{self.location}: {task.name}: {many} in {seconds:.1f} s{of_all}")

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    def counting(self, name: str, total: int, things: str) -> Callable[[], None]:
        """To be called for each of them: says now and then how many there are, what is left."""
        begun = said = time.monotonic()
        count = 0

        def told() -> None:
            nonlocal count, said
            count += 1
            now = time.monotonic()
            if now - said >= SAID_EVERY and count < total:
                said = now
                left = (now - begun) / count * (total - count)
                self.say(f"{name}: {count:,} of {total:,} {things}, {left / 60:.0f} min left")

        return told

    def losses(self) -> dict[str, tuple[str, np.ndarray]]:
        """(path, [texts, 2 or 3]) of each source of plain text, by name.

        The columns: summed loss in nats, tokens, and of a decoder the bytes that they stand for.
        """
        from itune import cases, data, objectives

        out: dict[str, tuple[str, np.ndarray]] = {}
        for source in self.recipe.data.eval:
            if not data.is_text(source):
                continue
            training = self.recipe.training
            corpus = data.corpus([self._limited(source)], self.encoder, training)
            objective = objectives.of(self.encoder, training)
            corpus = objectives.counted(corpus, objective, self.encoder.room)
            if objective is not None:
                self.say(
                    f"{source.path}: a pseudo-perplexity, of the {training.mlm_probability:.0%} "
                    "of its tokens that are hidden; not to be held beside a decoder's"
                )
            sums = np.column_stack([self.summed(corpus), corpus.targets])
            if objective is None:
                sums = np.column_stack([sums, data.bytes_of(corpus)])
            taken = {*out, *(task.name for task in self.tasks)}
            name = cases.unused(Path(source.path).stem, source, taken)
            out[name] = (source.path, sums[sums[:, 1] > 0])
        return out

    def summed(self, corpus: data.Corpus, of: Each | None = None) -> np.ndarray:
        """The summed loss of each example in nats, [examples], in batches of like lengths.

        `of`: what to sum over an example's targets instead, such as `losses.surprises`.
        """
        import torch

        from itune import adapters, batches, losses, objectives

        collate = objectives.collate(self.encoder, self.model, self.recipe.training)
        collate = collate or batches.padder(
            self.encoder.eos_id, places=not adapters.prepends(self.model)
        )
        lengths, found = corpus.lengths, np.zeros(len(corpus))
        order = np.argsort(-lengths, kind="stable")
        parts = batches.micro_batches(order, lengths, batches.MICRO_TOKENS, padded=True)
        # Whole batches are shared, so that each sum is the same to the bit with any number.
        for place in sharing.mine([float(lengths[rows].sum()) for rows in parts]):
            rows = parts[place]
            batch = collate(corpus, rows).to(self.model.device)
            with torch.inference_mode():
                each = (of or losses.nats)(self.model, batch)
            owners = batch.owners().cpu().numpy()
            values = each.double().cpu().numpy()
            found[rows] = np.bincount(owners, weights=values, minlength=len(rows))
        return np.asarray(np.sum(sharing.gathered(found), axis=0))

    def _limited(self, source: recipes.Source) -> recipes.Source:
        return source.model_copy(update={"limit": self.asked.limit or source.limit})

    def numbers(self, source: recipes.Source) -> set[int]:
        """The numbers, from 0, of the rows of a source of plain text that are measured."""
        rows = sources.read(self._limited(source))
        return {rows.number(index) for index in range(len(rows.data))}


def _key(case: data.Case) -> int:
    """The same for a row and its wording wherever it is asked: what its draws follow from."""
    return case.row * MOST_WORDINGS + case.wording
