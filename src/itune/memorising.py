"""`--metric memorisation`: training answers that come back word for word, and planted canaries.

Both are read off one pass over rows that are known, without writing an answer: what greedy decoding
would write is the answer itself where each of its tokens is the likeliest after those before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from itune import (
    canaries,
    cases,
    data,
    encoding,
    errors,
    families,
    losses,
    metrics,
    plans,
    recipes,
    resampling,
    results,
    runs,
    sources,
)
from itune.answering import Answerer

SHOWN = 10  # chosen: training answers that are listed, the longest of those reproduced
NAME = metrics.MEMORISATION
CANARIES = f"{NAME} of canaries"


def asked(names: Sequence[str]) -> tuple[bool, tuple[str, ...]]:
    """Whether memorisation is among the metrics, and the others."""
    return NAME in names, tuple(name for name in names if name != NAME)


def check(ours: Answerer, recipe: recipes.Recipe) -> None:
    """Raise OptionError where memorisation cannot be measured, before anything is computed."""
    if ours.encoder.family == families.MASKED:
        raise errors.OptionError(
            f"--metric {NAME}: a masked language model fills in one of a template's choices and "
            "writes no text, so there is none that it could have by heart. Leave it out."
        )
    if ours.asked.engine is not None:
        raise errors.OptionError(
            f"--metric {NAME}: itune computes it from likelihoods, which "
            f"{ours.asked.engine.name} is not asked for. Leave --engine out."
        )
    if ours.asked.shots:
        raise errors.OptionError(
            f"--metric {NAME}: prompts are asked as they were trained on, so without shots. "
            "Leave one of them out."
        )
    if not ours.tasks and recipe.data.canaries is None:
        raise errors.OptionError(
            f"--metric {NAME}: data.eval is plain text, which has no answers, and no canaries were "
            "planted (data.canaries). Leave it out, or name a run that answers prompts with --run."
        )


def measured(
    ours: Answerer, recipe: recipes.Recipe, run: runs.Run | None
) -> dict[str, dict[str, Any]]:
    """What is learnt by heart, as tasks of scores.json: of each task, and of the canaries.

    Every process calls it. Raises DataError where the training rows are not those of the run, or
    have none like the held-out ones.
    """
    train = (
        canaries.planted(recipe, ours.encoder.family)
        if run is None
        else canaries.trained_on(recipe, run)
    )
    corpus = canaries.corpus(recipe, train, ours.encoder)
    _refuse_others(corpus, run)
    chosen = _Training(corpus, recipe, ours)
    found = {}
    given = [source for source in recipe.data.eval if not cases.is_text(source)]
    for source, task in zip(given, ours.tasks, strict=True):
        found[f"{NAME} of {task.name}"] = _verbatim(ours, recipe, source, task, chosen)
    if recipe.data.canaries is None:
        for task_found in found.values():
            task_found["notes"].append(
                "no canaries were planted in the training data (data.canaries), so there is no "
                "exposure to tell"
            )
        return found
    return {**found, CANARIES: _exposures(ours, recipe, run)}


def _refuse_others(corpus: data.Corpus, run: runs.Run | None) -> None:
    """Refuse training rows that are not those that the run was trained on."""
    before = [] if run is None else run.manifest.get("data", {}).get("train", {}).get("sources", [])
    for old, new in zip(before, corpus.reports, strict=False):
        if old["rows"] != new.rows:
            raise errors.DataError(
                f"--metric {NAME}: {new.path} has other rows than the run was trained on "
                f"({old['rows'][:12]} then, {new.rows[:12]} now). Put them back, or name where "
                "they are with --set data.train.path=FILE."
            )


# --- answers word for word ------------------------------------------------------------------


class _Training:
    """The training examples that the steps of a run have seen, by the template of their source."""

    def __init__(self, corpus: data.Corpus, recipe: recipes.Recipe, ours: Answerer) -> None:
        self.corpus, self.most = corpus, ours.asked.wordings
        plan = plans.of_run(recipe.training, corpus, world=1, padded=False)
        steps = [plan.rows(step) for step in range(len(plan))]
        self.seen = np.unique(np.concatenate(steps))
        self.names = [
            None if cases.is_text(source) else _template(source) for source in recipe.data.train
        ]

    def like(self, task: data.Task, rows: int) -> np.ndarray:
        """Examples of so many rows with the task's template, spread evenly over those seen."""
        wanted = [k for k, name in enumerate(self.names) if name == task.template.name]
        which = self.seen[np.isin(self.corpus.source[self.seen], wanted)]
        if not len(which):
            known = ", ".join(dict.fromkeys(filter(None, self.names))) or "none, but plain text"
            raise errors.DataError(
                f"--metric {NAME}: data.train has no rows like those of {task.name} to compare "
                f"with (its templates: {known}). Leave it out, or evaluate on rows with the "
                "template of the training data."
            )
        which = _of_wordings(self.corpus, which, self.most)
        owners = self.corpus.source[which].astype(np.int64) << 32 | self.corpus.row[which]
        every = np.unique(owners)
        if len(every) > rows:
            every = every[sources.spread(len(every), rows)]
        return which[np.isin(owners, every)]


def _template(source: recipes.Source) -> str:
    return cases.reading(sources.read(source)).task.name


def _of_wordings(corpus: data.Corpus, which: np.ndarray, most: int | None) -> np.ndarray:
    return which if most is None else which[corpus.wording[which] < most]


def _verbatim(
    ours: Answerer,
    recipe: recipes.Recipe,
    source: recipes.Source,
    task: data.Task,
    chosen: _Training,
) -> dict[str, Any]:
    """The shares of training and of held-out answers that the model gives word for word."""
    limits = [each for each in (ours.asked.limit, source.limit) if each is not None]
    held_source = source.model_copy(
        update={"limit": min(limits, default=None), "weight": 1.0, "streaming": False}
    )
    held = data.corpus([held_source], ours.encoder, recipe.training, visits=None)
    which = _of_wordings(held, np.arange(len(held)), ours.asked.wordings)
    theirs = _Rows(held, which, ours)
    mine = _Rows(chosen.corpus, chosen.like(task, theirs.count), ours)
    signature = f"answers word for word|greedy|rows:{mine.count} trained, {theirs.count} held out"
    way: dict[str, Any] = {"bounds": (0.0, 1.0), **results.Way((), recipe.evaluation).options}
    scores = {
        "verbatim": resampling.mean(mine.sums, signature=signature, **way),
        "verbatim_heldout": resampling.mean(theirs.sums, signature=signature, **way),
        NAME: resampling.apart(mine.sums, theirs.sums, signature=signature, **way),
    }
    return {
        "data": task.path,
        "rows": mine.count,
        "heldout_rows": theirs.count,
        "scores": {key: asdict(each) for key, each in scores.items()},
        "wordings": [],
        "notes": [
            f"verbatim: of {mine.count:,} training rows; verbatim_heldout: of {theirs.count:,} "
            "held-out rows"
        ],
        "reproduced": mine.reproduced(),
    }


class _Rows:
    """Examples by the rows that they are of, and which the model reproduces.

    sums [rows, 2]: of each row how many wordings are answered word for word, of how many.
    """

    def __init__(self, corpus: data.Corpus, which: np.ndarray, ours: Answerer) -> None:
        self.corpus, self.which, self.tokenizer = corpus, which, ours.encoder.tokenizer
        some = data.from_tokens([encoding.Tokens(*_listed(corpus, k)) for k in which])
        self.whole = ours.summed(some, losses.surprises) == 0
        owners = corpus.source[which].astype(np.int64) << 32 | corpus.row[which]
        _, owner = np.unique(owners, return_inverse=True)
        self.sums = np.column_stack([np.bincount(owner, self.whole), np.bincount(owner)])

    @property
    def count(self) -> int:
        """How many rows there are."""
        return len(self.sums)

    def reproduced(self) -> list[dict[str, Any]]:
        """The longest of the answers that were reproduced, and where they stand."""
        found = []
        hits = self.which[self.whole]
        for k in hits[np.argsort(-self.corpus.targets[hits], kind="stable")][:SHOWN]:
            ids, learnt = self.corpus.example(int(k))
            answer = self.tokenizer.decode(ids[learnt].tolist(), skip_special_tokens=True)
            found.append(
                {
                    "path": self.corpus.sources[int(self.corpus.source[k])].path,
                    "row": self.corpus.number(int(k)),
                    "wording": int(self.corpus.wording[k]),
                    "answer": answer,
                    "tokens": int(learnt.sum()),
                }
            )
        return found


def _listed(corpus: data.Corpus, index: int) -> tuple[list[int], list[bool]]:
    ids, learnt = corpus.example(int(index))
    return ids.tolist(), learnt.tolist()


# --- canaries -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ranked:
    """A canary's place among the candidates, 1 the likeliest, and how many there are with it."""

    canary: canaries.Canary
    rank: int
    among: int
    nats: float

    @property
    def bits(self) -> float:
        """Its exposure: log2 of how many there are less log2 of its rank."""
        return math.log2(self.among) - math.log2(self.rank)


def _exposures(ours: Answerer, recipe: recipes.Recipe, run: runs.Run | None) -> dict[str, Any]:
    """The exposure of each canary, and its mean over all and over those of each repetition."""
    given = canaries.of_recipe(recipe, ours.encoder.family) if run is None else canaries.of_run(run)
    planted = {each.response for each in given}
    told = ours.counting(CANARIES, len(given), "canaries")
    ranked = []
    complete = True
    for each in given:
        others, every = canaries.candidates(
            each, planted, recipe.evaluation.candidates, recipe.training.seed
        )
        complete &= every
        ranked.append(_ranked(ours, recipe, each, others))
        told()
    way = results.Way((), recipe.evaluation).options
    most = max(math.log2(each.among) for each in ranked)
    kind = "all there are" if complete else "drawn at random"
    groups = {"exposure": ranked}
    for repeats in dict.fromkeys(each.canary.repeats for each in ranked):
        groups[f"exposure_x{repeats}"] = [r for r in ranked if r.canary.repeats == repeats]
    scores = {}
    for key, group in groups.items():
        signature = f"bits|rank among:{group[0].among} {kind}|most:{most:.2f}"
        rows = np.array([[each.bits, 1.0] for each in group])
        scores[key] = resampling.mean(rows, signature=signature, bounds=(0.0, most), **way)
    return {
        "data": canaries.NAME if run is None else str(run.dir / canaries.NAME),
        "rows": len(ranked),
        "scores": {key: asdict(each) for key, each in scores.items()},
        "wordings": [],
        "notes": [
            f"exposure in bits: {1 / math.log(2):.2f} on average for what was never learnt,",
            f"{most:.2f} at most, for the likeliest of {ranked[0].among:,} ({kind})",
        ],
        "canaries": [_told(each) for each in ranked],
    }


def _told(each: _Ranked) -> Mapping[str, Any]:
    return {
        "prompt": each.canary.prompt,
        "response": each.canary.response,
        "repeats": each.canary.repeats,
        "exposure": each.bits,
        "rank": each.rank,
        "among": each.among,
        "nats": each.nats,
    }


def _ranked(
    ours: Answerer, recipe: recipes.Recipe, canary: canaries.Canary, others: Sequence[str]
) -> _Ranked:
    """The canary and the others in the order of their loss; as likely as it counts as likelier."""
    texts = [canary.response, *others]
    if canary.plain:
        longest = recipe.training.max_length
        made = ours.encoder.pieces([canary.text(each) for each in texts], longest)
        rows = [piece for pieces in made for piece in pieces]
        owner = np.repeat(np.arange(len(made)), [len(pieces) for pieces in made])
    else:
        asked_of = [canary.example(each).messages for each in texts]
        rows = ours.encoder.conversations(asked_of, train_on="last")
        owner = np.arange(len(rows))
    nats = np.bincount(owner, ours.summed(data.from_tokens(rows)))
    rank = 1 + int((nats[1:] <= nats[0]).sum())
    return _Ranked(canary, rank, len(texts), float(nats[0]))
