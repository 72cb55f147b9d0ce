"""Predictions to scores with intervals, paired comparison of two systems, spread over wordings.

A row of the data may have been asked in several wordings; its answers are not independent, so what
is resampled and swapped is the row with all its wordings.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from itune import errors, intervals, metrics, resampling
from itune.intervals import Array
from itune.resampling import Difference as Difference
from itune.resampling import Score as Score

if TYPE_CHECKING:
    from itune.metrics.tables import Table

# The values of metrics that ship with itune of which the smaller is the better.
LESS_IS_BETTER = ("ter", "perplexity", "bits_per_byte")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a system answered to one row of the data in one wording of the prompt."""

    row: int
    """Which row of the data; the same number for all its wordings, and in both of two systems."""
    wording: int
    """Which of the template's prompts, from 0."""
    prediction: str
    """The answer; empty text is an answer too, and a wrong one."""
    references: tuple[str, ...]
    """What would have been right; at least one."""
    prompt: str | None = None
    """What was asked, where that is known; two systems that are compared were asked the same."""
    stop: str = ""
    """Why it ended, where that is known: `stop`, or `length` for one that was cut."""


@dataclasses.dataclass(frozen=True)
class Change:
    """Two answers to one prompt, one of which scores more."""

    ours: Prediction
    theirs: Prediction
    gain: float
    """By how much ours is better by the metric; below 0 it is worse."""


def score(
    rows: Sequence[Prediction],
    metric_names: Sequence[str],
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    choices: Sequence[str] = (),
) -> dict[str, Score]:
    """Each value of the metrics over all rows and wordings, by key, with its interval.

    The interval is the bootstrap over rows (Efron 1979; for such metrics Koehn 2004), corrected
    for bias, skew and few rows; see `intervals.interval`.
    Raises UserError: no rows, an unknown metric; DataError: the same row and wording twice.
    """
    intervals.check(confidence, resamples)
    ordered = _ordered(rows, "predictions")
    tables = _tables(ordered, metric_names, choices)
    return resampling.scores(tables, len(_starts(ordered)), confidence, resamples, seed)


def compare(
    ours: Sequence[Prediction],
    theirs: Sequence[Prediction],
    metric_names: Sequence[str],
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    choices: Sequence[str] = (),
) -> dict[str, Difference]:
    """Ours minus theirs for each value of the metrics, by key, paired by row.

    The interval is the bootstrap of the difference: both systems see the same resampled rows,
    those of `score` with the same seed (paired bootstrap, Koehn 2004, section 5). The p-value
    is that of approximate randomisation (Noreen 1989; Riezler and Maxwell 2005): the two answers to
    a row are swapped by the toss of a coin, and p = (swaps with at least the difference that was
    seen, either way, + 1) / (swaps + 1). So it is never below 1 / (resamples + 1).
    Raises what `score` raises; DataError where rows, wordings, prompts or references differ.
    """
    intervals.check(confidence, resamples)
    left, right = paired(ours, theirs)
    pairs = list(
        zip(
            _tables(left, metric_names, choices), _tables(right, metric_names, choices), strict=True
        )
    )
    return resampling.differences(pairs, len(_starts(left)), confidence, resamples, seed)


def changes(
    ours: Sequence[Prediction],
    theirs: Sequence[Prediction],
    metric_names: Sequence[str],
    *,
    choices: Sequence[str] = (),
) -> tuple[str, list[Change]]:
    """The key of the first metric that scores single answers, and the pairs that it tells apart.

    The largest gain first, the largest loss last. Raises what `compare` raises.
    """
    left, right = paired(ours, theirs)
    for mine, other in zip(
        _tables(left, metric_names, choices), _tables(right, metric_names, choices), strict=True
    ):
        each, others = mine.each(), other.each()
        if each is None or others is None:
            continue
        gains = (each - others) * (-1 if mine.less_is_better else 1)
        order = np.argsort(-gains, kind="stable")
        found = [
            Change(left[place], right[place], float(gains[place]))
            for place in order
            if abs(gains[place]) > intervals.NOISE
        ]
        return next(iter(mine.signatures)), found
    return "", []


def by_wording(
    rows: Sequence[Prediction], metric_names: Sequence[str], *, choices: Sequence[str] = ()
) -> list[dict[str, float]]:
    """The values of each wording alone, by its number; raises what `score` raises."""
    ordered = _ordered(rows, "predictions")
    tables = _tables(ordered, metric_names, choices)
    wordings = np.array([row.wording for row in ordered])
    return [
        {
            key: value
            for table in tables
            for key, value in table.values(np.flatnonzero(wordings == wording)).items()
        }
        for wording in np.unique(wordings)
    ]


def details(
    rows: Sequence[Prediction], metric_names: Sequence[str], *, choices: Sequence[str] = ()
) -> dict[str, Mapping[str, Any]]:
    """What a metric has to say beside its values, by key: for F1 its classes."""
    ordered = _ordered(rows, "predictions")
    found: dict[str, Mapping[str, Any]] = {}
    for table in _tables(ordered, metric_names, choices):
        for key in table.signatures:
            if table.details:
                found[key] = table.details
    return found


def check_references(
    references: Sequence[Sequence[str]], metric_names: Sequence[str], *, choices: Sequence[str] = ()
) -> None:
    """Raises UserError where a metric cannot score such references: before any answer is asked."""
    for name in dict.fromkeys(metric_names):
        metric = metrics.load(name, choices=choices)
        getattr(metric, "check_references", lambda _: None)(references)


# --- tables -------------------------------------------------------------------------------------


def _tables(
    ordered: Sequence[Prediction], metric_names: Sequence[str], choices: Sequence[str]
) -> list[Table]:
    """One table for each metric that has a value which those before it have not."""
    for name in metric_names:
        metrics.check(name)
    tables: list[Table] = []
    for name in dict.fromkeys(metric_names):
        table = _table(ordered, name, choices)
        known = {key for each in tables for key in each.signatures}
        taken = sorted(known & set(table.signatures)) if name.endswith(".py") else []
        if taken:
            raise errors.UserError(
                f"metric {name}: its value {errors.shown(taken[0])} has the name of another "
                "metric's that is asked for too. Rename it, or ask for one of them."
            )
        table.signatures = {k: each for k, each in table.signatures.items() if k not in known}
        if table.signatures:
            tables.append(table)
    return tables


def _table(ordered: Sequence[Prediction], name: str, choices: Sequence[str]) -> Table:
    texts = tuple(each.prediction for each in ordered)
    references = tuple(each.references for each in ordered)
    count = _counted.__wrapped__ if name.endswith(".py") or "@" in name else _counted
    # A copy, as its signatures are the caller's to choose from.
    return copy.copy(count(name, tuple(choices), texts, references, tuple(_starts(ordered))))


# An evaluation asks for the same table half a dozen times, and TER takes seconds to count.
@functools.lru_cache(maxsize=16)
def _counted(
    name: str,
    choices: tuple[str, ...],
    texts: tuple[str, ...],
    references: tuple[tuple[str, ...], ...],
    starts: tuple[int, ...],
) -> Table:
    from itune.metrics import tables

    metric = metrics.load(name, choices=choices)
    return tables.make(metric, texts, references, np.array(starts))


def _ordered(rows: Sequence[Prediction], where: str) -> list[Prediction]:
    """The predictions by row and wording, so that nothing depends on the order they came in."""
    if not rows:
        raise errors.UserError(f"{where}: there are no rows to score. Give at least one.")
    ordered = sorted(rows, key=lambda each: (each.row, each.wording))
    for one, other in itertools.pairwise(ordered):
        if (one.row, one.wording) == (other.row, other.wording):
            raise errors.DataError(
                f"{where}: row {one.row} in wording {one.wording} is there twice. Keep one of them."
            )
    return ordered


def _starts(ordered: Sequence[Prediction]) -> Array:
    """Where each row begins among the ordered predictions, [rows]."""
    rows = np.array([each.row for each in ordered])
    return np.flatnonzero(np.concatenate([[True], rows[1:] != rows[:-1]]))


def paired(
    ours: Sequence[Prediction], theirs: Sequence[Prediction]
) -> tuple[list[Prediction], list[Prediction]]:
    """Both by row and wording. Raises DataError, which names the first place where two systems
    were not asked the same."""
    left, right = _ordered(ours, "our predictions"), _ordered(theirs, "their predictions")
    here = {(each.row, each.wording) for each in left}
    there = {(each.row, each.wording) for each in right}
    for mine, others, only in ((here, there, "ours"), (there, here, "theirs")):
        missing = sorted(mine - others)
        if missing:
            row, wording = missing[0]
            raise errors.DataError(
                f"comparison: {len(missing)} of {len(mine)} answers are only in {only}, the first "
                f"to row {row} in wording {wording}. Compare answers to the same rows and wordings."
            )
    for one, other in zip(left, right, strict=True):
        place = f"comparison: row {one.row} in wording {one.wording}"
        if one.references != other.references:
            raise errors.DataError(
                f"{place} has other references in ours than in theirs. "
                "Compare answers to the same data."
            )
        if one.prompt != other.prompt and None not in (one.prompt, other.prompt):
            raise errors.DataError(
                f"{place} was asked otherwise: ours {errors.shown(_parting(one, other))}, theirs "
                f"{errors.shown(_parting(other, one))}. Compare answers to the same prompts."
            )
    return left, right


def _parting(one: Prediction, other: Prediction) -> str:
    """A prompt from a little before the place where it leaves the other."""
    mine, others = one.prompt or "", other.prompt or ""
    same = next((i for i, (a, b) in enumerate(zip(mine, others, strict=False)) if a != b), None)
    place = min(len(mine), len(others)) if same is None else same
    return mine[max(0, place - 20) :]
