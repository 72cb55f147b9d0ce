"""What an evaluation finds of a task, as scores.json has it: scores, wordings, comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from itune import errors, intervals, recipes, resampling, scoring
from itune.intervals import Array

CHANGED = 10  # chosen: rows that are listed of those that changed, each way
PROMPT_START = 200  # chosen: characters

Predictions = Mapping[str, Sequence[scoring.Prediction]]
Losses = Mapping[str, tuple[str, Array]]


@dataclass(frozen=True)
class Rival:
    """What a result is compared with: how it is called, its predictions and losses by task."""

    name: str
    predictions: Predictions
    losses: Losses


@dataclass(frozen=True)
class Way:
    """How one task is scored."""

    metrics: Sequence[str]
    settings: recipes.Evaluation
    choices: Sequence[str] = ()
    prompts: Sequence[str] = ()
    decided: bool = False
    """Whether answers were picked among the choices, so that each is one of them."""

    @property
    def options(self) -> dict[str, Any]:
        """The numbers behind each interval."""
        return {"confidence": self.settings.confidence, "resamples": self.settings.resamples}


def scored(
    name: str,
    path: str,
    rows: Sequence[scoring.Prediction],
    way: Way,
    rival: Rival | None,
) -> dict[str, Any]:
    """The scores of a task, over its wordings, and against the rival, as scores.json has them."""
    made: dict[str, Any] = {
        "data": path,
        "rows": len({row.row for row in rows}),
        "scores": _scores(rows, way),
        **_faults(rows, way),
    }
    wordings: list[dict[str, float]] = []
    if len(way.prompts) > 1:
        wordings = scoring.by_wording(rows, way.metrics, choices=way.choices)
    made["wordings"] = [
        {"prompt": prompt, "scores": values}
        for prompt, values in zip(way.prompts, wordings, strict=False)
    ]
    if wordings:
        made["spread"] = _spread(wordings)
    if rival is not None:
        made["against"] = _against(rival.name, rows, _of_rival(rival, name), way)
    return made


def check_paired(name: str, rows: Sequence[scoring.Prediction], rival: Rival) -> None:
    """Raises DataError where a rival did not answer these rows, whatever the answers are."""
    scoring.paired(rows, _of_rival(rival, name))


def _of_rival(rival: Rival, name: str) -> Sequence[scoring.Prediction]:
    if name not in rival.predictions:
        raise errors.DataError(
            f"{rival.name}: no predictions for {name}.{errors.nearest(name, rival.predictions)}"
        )
    return rival.predictions[name]


def _scores(rows: Sequence[scoring.Prediction], way: Way) -> dict[str, Any]:
    found = scoring.score(rows, way.metrics, choices=way.choices, **way.options)
    details = scoring.details(rows, way.metrics, choices=way.choices)
    return {
        key: {**asdict(each), **({"details": details[key]} if key in details else {})}
        for key, each in found.items()
    }


def _faults(rows: Sequence[scoring.Prediction], way: Way) -> dict[str, dict[str, float | int]]:
    """How many answers are none of the choices (`unparseable`), and were `cut` before their end.

    Both count as what they are: most often as wrong.
    """
    found = {}
    if way.choices and not way.decided:
        known = {choice.strip() for choice in way.choices}
        found["unparseable"] = sum(row.prediction.strip() not in known for row in rows)
    if any(row.stop for row in rows):
        found["cut"] = sum(row.stop == "length" for row in rows)
    return {key: {"count": count, "share": count / len(rows)} for key, count in found.items()}


def _spread(wordings: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Of each value over the wordings: mean, worst, best, and how far these two are apart."""
    spread = {}
    for key in wordings[0]:
        values = [each[key] for each in wordings]
        worst, best = min(values), max(values)
        if key in scoring.LESS_IS_BETTER:
            worst, best = best, worst
        spread[key] = {
            "mean": sum(values) / len(values),
            "worst": worst,
            "best": best,
            "spread": abs(best - worst),
        }
    return spread


def _against(
    name: str,
    rows: Sequence[scoring.Prediction],
    theirs: Sequence[scoring.Prediction],
    way: Way,
) -> dict[str, Any]:
    if not name.endswith(".jsonl"):
        # Rows and wordings of the same data, by construction; prompts may be cut at other places
        # where the two models read more or less at once.
        theirs = [replace(row, prompt=None) for row in theirs]
    options = {"choices": way.choices, **way.options}
    differences = scoring.compare(rows, theirs, way.metrics, **options)
    made: dict[str, Any] = {
        "name": name,
        "scores": _scores(theirs, way),
        "difference": {key: asdict(each) for key, each in differences.items()},
        "changed": _changed(rows, theirs, way),
        **_faults(theirs, way),
    }
    return made


def _changed(
    rows: Sequence[scoring.Prediction], theirs: Sequence[scoring.Prediction], way: Way
) -> dict[str, Any]:
    """The rows that changed most, both ways, and how many did."""
    key, found = scoring.changes(rows, theirs, way.metrics, choices=way.choices)
    better = [each for each in found if each.gain > 0]
    worse = [each for each in found if each.gain < 0]
    return {
        "metric": key,
        "count": {
            "better": len(better),
            "worse": len(worse),
            "same": len(rows) - len(found),
        },
        "better": _listed(better),
        "worse": _listed(worse[::-1]),
    }


def _listed(changes: Sequence[scoring.Change]) -> list[dict[str, Any]]:
    """The first of them, a row once: in another wording it is seldom another finding."""
    once = {change.ours.row: change for change in reversed(changes)}
    first = [change for change in changes if once[change.ours.row] is change]
    return [_shown(each) for each in first[:CHANGED]]


def _shown(change: scoring.Change) -> dict[str, Any]:
    ours = change.ours
    return {
        "row": ours.row,
        "wording": ours.wording,
        "prompt": None if ours.prompt is None else ours.prompt[:PROMPT_START],
        "prediction": ours.prediction,
        "against": change.theirs.prediction,
        "references": list(ours.references),
        "gain": change.gain,
    }


def perplexity(name: str, path: str, sums: Array, rival: Rival | None, way: Way) -> dict[str, Any]:
    """The perplexity of a source of plain text, from the loss and the tokens of each text.

    And its bits per byte, where a third column has the bytes that the loss is over.
    """
    from itune.metrics.perplexity import BitsPerByte, Perplexity

    columns = [(Perplexity(), [0, 1]), (BitsPerByte(), [0, 2])][: sums.shape[1] - 1]
    made: dict[str, Any] = {"data": path, "rows": len(sums), "wordings": []}
    made["scores"] = _foretold(sums, columns, way)
    if rival is not None and name in rival.losses:
        theirs = rival.losses[name][1]
        if len(theirs) != len(sums) or (theirs[:, 1] != sums[:, 1]).any():
            made["notes"] = [_apart(rival.name, theirs, columns, way)]
            return made
        differences: dict[str, Any] = {}
        for metric, these in columns:
            differences |= resampling.compare(
                metric, sums[:, these], theirs[:, these], **way.options
            )
        made["against"] = {
            "name": rival.name,
            "scores": _foretold(theirs, columns, way),
            "difference": {key: asdict(each) for key, each in differences.items()},
        }
    return made


def _apart(name: str, theirs: Array, columns: Any, way: Way) -> str:
    """What is said of a rival whose tokens are others: its numbers, without a paired test."""
    said = f"{name} reads these texts as other tokens, so there is no test in pairs"
    found = _foretold(theirs, columns, way).get("bits_per_byte")
    if found is None:
        return f"{said}, and its perplexity is of another measure"
    value, low, high = (f"{found[key]:.3f}" for key in ("value", "low", "high"))
    return f"{said}; its bits_per_byte are {value} [{low}, {high}]"


def _foretold(sums: Array, columns: Any, way: Way) -> dict[str, Any]:
    scores: dict[str, Any] = {}
    for metric, these in columns:
        scores |= resampling.score(metric, sums[:, these], **way.options)
    return {key: asdict(each) for key, each in scores.items()}


def adjust(tasks: Mapping[str, Any]) -> None:
    """Beside each p-value of a difference, that of all tests of the evaluation together (Holm)."""
    found = {
        (name, key): difference
        for name, task in tasks.items()
        for key, difference in task.get("against", {}).get("difference", {}).items()
    }
    together = intervals.holm({place: each["p_value"] for place, each in found.items()})
    for place, each in found.items():
        each["p_holm"] = together[place]
