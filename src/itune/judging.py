"""What `itune eval` does: predictions of a model or a file, their scores, and the comparison."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itune import errors, intervals, predictions, recipes, resampling, runs, scoring
from itune import metrics as metric_names
from itune.answering import Answerer, Asked, Say, free

if TYPE_CHECKING:
    from itune.intervals import Array

DEFAULT_METRICS = {
    "classification": ("f1", "accuracy"),
    "qa": ("squad",),
    "translation": ("bleu", "chrf"),
    "summarization": ("rouge",),
    "generation": ("rougeL",),
    "chat": ("rougeL",),
}
CHANGED = 10  # chosen: rows that are listed of those that changed, each way
PROMPT_START = 200  # chosen: characters

Predictions = Mapping[str, Sequence[scoring.Prediction]]


@dataclass(frozen=True)
class _Rival:
    """What a result is compared with: how it is called, its predictions and losses by task."""

    name: str
    predictions: Predictions
    losses: Mapping[str, tuple[str, Array]]


@dataclass(frozen=True)
class _Way:
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


# --- a file of predictions ------------------------------------------------------------------


def of_file(
    path: Path, metrics: Sequence[str], against: str | None, settings: recipes.Evaluation
) -> dict[str, Any]:
    """Scores of a JSONL file with `prediction` and `reference` or `references` on each line."""
    started = time.monotonic()
    for name in metrics:
        metric_names.check(name, "--metric")
    made = predictions.read(path)
    rival = None if against is None else _Rival(against, predictions.read(Path(against)), {})
    way = _Way(metrics, settings)
    tasks = {name: _scored(name, str(path), rows, way, rival) for name, rows in made.items()}
    return _result(None, started, None, tasks)


def _result(
    run: runs.Run | None, started: float, rate: float | None, tasks: dict[str, Any]
) -> dict[str, Any]:
    _adjust(tasks)
    return {
        "run": None if run is None else str(run.dir),
        "seconds": round(time.monotonic() - started, 3),
        "tokens_per_second": rate,
        "tasks": tasks,
    }


def _adjust(tasks: Mapping[str, Any]) -> None:
    """Beside each p-value of a difference, that of all tests of the evaluation together (Holm)."""
    found = {
        (name, key): difference
        for name, task in tasks.items()
        for key, difference in task.get("against", {}).get("difference", {}).items()
    }
    together = intervals.holm({place: each["p_value"] for place, each in found.items()})
    for place, each in found.items():
        each["p_holm"] = together[place]


# --- a model --------------------------------------------------------------------------------


def of_model(
    recipe: recipes.Recipe,
    run: runs.Run | None,
    *,
    model: str | None,
    metrics: Sequence[str],
    against: str | None,
    asked: Asked,
    folder: Path | None,
    say: Say,
) -> dict[str, Any]:
    """Scores of a run's model, or of an untuned one, on the recipe's evaluation data.

    Writes predictions.jsonl and scores.json under the run's evals/ (or `folder`); answers that are
    there already, of the same model to the same prompts, are not asked again.
    Raises RecipeError when the recipe has no evaluation data.
    """
    if not recipe.data.eval:
        raise errors.RecipeError(
            "data.eval: this recipe has none, so there is nothing to score on. "
            "Name some with --set data.eval.path=FILE and --set data.eval.template=NAME."
        )
    started = time.monotonic()
    if folder is None and run is not None:
        folder = run.dir / "evals" / asked.name
    location = model if run is None else str(run.dir)
    ours = Answerer(recipe, location or "", asked, say)
    ways = {
        task.name: _Way(
            metrics or task.template.metrics or DEFAULT_METRICS[task.template.task],
            recipe.evaluation,
            task.template.choices,
            task.template.prompts[: asked.wordings],
            asked.decide != "generate",
        )
        for task in ours.tasks
    }
    for task in ours.tasks:  # before hours of answering
        way = ways[task.name]
        golds = [case.references for case in task.cases]
        scoring.check_references(golds, way.metrics, choices=way.choices)
    made, losses, rival = _answered(ours, recipe, against, folder)
    tasks: dict[str, Any] = {}
    for task in ours.tasks:
        tasks[task.name] = _scored(task.name, task.path, made[task.name], ways[task.name], rival)
    for name, (path, sums) in losses.items():
        tasks[name] = _perplexity(name, path, sums, rival, _Way((), recipe.evaluation))
    rate = round(ours.tokens / ours.seconds, 1) if ours.tokens else None
    result = _result(run, started, rate, tasks)
    if folder is not None:
        _keep(folder, ours, made, rival, result)
        say(f"scores and predictions: {folder}")
    return result


Losses = Mapping[str, tuple[str, "Array"]]


def _answered(
    ours: Answerer, recipe: recipes.Recipe, against: str | None, folder: Path | None
) -> tuple[Predictions, Losses, _Rival | None]:
    """Our predictions and losses, and what they are compared with; one model in memory at a time.

    The base of an adapter answers first; then the adapter is folded into that same model.
    """
    mine = predictions.Kept(folder, "predictions.jsonl", ours.mark)
    rival, other = _rival(ours, recipe, against)
    if other is None:
        return ours.answers(mine), ours.losses(), rival
    theirs = predictions.Kept(folder, "against.jsonl", other.mark)
    texts = any(source.template is None for source in recipe.data.eval)
    shared = against == "base" and _adapts(ours, other)
    if shared and not (other.complete(theirs) and ours.complete(mine) and not texts):
        answered, losses = other.answers(theirs), other.losses()
        ours.tune(other)
        made = ours.answers(mine), ours.losses()
    else:
        made = ours.answers(mine), ours.losses()
        ours.release()
        free()
        answered, losses = other.answers(theirs), other.losses()
    other.release()
    return *made, _Rival(str(against), answered, losses)


def _rival(
    ours: Answerer, recipe: recipes.Recipe, against: str | None
) -> tuple[_Rival | None, Answerer | None]:
    """What to compare with: read from a file, or to be asked."""
    if against is None:
        return None, None
    if against.endswith(".jsonl"):
        found = predictions.read(Path(against))
        if len(ours.tasks) == 1 and len(found) == 1:
            found = {ours.tasks[0].name: next(iter(found.values()))}
        return _Rival(against, found, {}), None
    if against != "base":
        location = str(runs.find(Path(against)).dir)
        return None, Answerer(recipe, location, ours.asked, ours.say)
    if recipe.model.name is None:
        ours.say("against base: this model began from random weights, so there is none to compare")
        return None, None
    # The same prompts, to the last token: both are asked what the tuned one was trained on.
    return None, Answerer(recipe, recipe.model.name, ours.asked, ours.say, like=ours)


def _adapts(ours: Answerer, base: Answerer) -> bool:
    """Whether ours is an adapter on that very base."""
    from itune import models

    adapter = models.adapter_of(models.resolve(ours.location))
    if adapter is None:
        return False
    return models.resolve(base.location) == str(adapter["base_model_name_or_path"])


# --- scores -----------------------------------------------------------------------------------


def _scored(
    name: str,
    path: str,
    rows: Sequence[scoring.Prediction],
    way: _Way,
    rival: _Rival | None,
) -> dict[str, Any]:
    made: dict[str, Any] = {
        "data": path,
        "rows": len({row.row for row in rows}),
        "scores": _scores(rows, way),
    }
    if way.choices and not way.decided:
        made["unparseable"] = _unparseable(rows, way.choices)
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
        if name not in rival.predictions:
            raise errors.DataError(
                f"{rival.name}: no predictions for {name}.{errors.nearest(name, rival.predictions)}"
            )
        made["against"] = _against(rival.name, rows, rival.predictions[name], way)
    return made


def _scores(rows: Sequence[scoring.Prediction], way: _Way) -> dict[str, Any]:
    found = scoring.score(rows, way.metrics, choices=way.choices, **way.options)
    details = scoring.details(rows, way.metrics, choices=way.choices)
    return {
        key: {**asdict(each), **({"details": details[key]} if key in details else {})}
        for key, each in found.items()
    }


def _unparseable(
    rows: Sequence[scoring.Prediction], choices: Sequence[str]
) -> dict[str, float | int]:
    """How many answers are none of the choices; they count as wrong."""
    known = {choice.strip() for choice in choices}
    count = sum(row.prediction.strip() not in known for row in rows)
    return {"count": count, "share": count / len(rows)}


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
    way: _Way,
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
    }
    if way.choices and not way.decided:
        made["unparseable"] = _unparseable(theirs, way.choices)
    return made


def _changed(
    rows: Sequence[scoring.Prediction], theirs: Sequence[scoring.Prediction], way: _Way
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
        "better": [_shown(each) for each in better[:CHANGED]],
        "worse": [_shown(each) for each in worse[::-1][:CHANGED]],
    }


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


def _perplexity(
    name: str, path: str, sums: Array, rival: _Rival | None, way: _Way
) -> dict[str, Any]:
    """The perplexity of a source of plain text, from the loss and the tokens of each text."""
    from itune.metrics.perplexity import Perplexity

    metric = Perplexity()
    made: dict[str, Any] = {"data": path, "rows": len(sums), "wordings": []}
    scores = resampling.score(metric, sums, **way.options)
    made["scores"] = {key: asdict(each) for key, each in scores.items()}
    if rival is not None and name in rival.losses:
        theirs = rival.losses[name][1]
        if len(theirs) != len(sums) or (theirs[:, 1] != sums[:, 1]).any():
            return made  # other tokens: a perplexity a token says nothing there
        scores = resampling.score(metric, theirs, **way.options)
        differences = resampling.compare(metric, sums, theirs, **way.options)
        made["against"] = {
            "name": rival.name,
            "scores": {key: asdict(each) for key, each in scores.items()},
            "difference": {key: asdict(each) for key, each in differences.items()},
        }
    return made


def _keep(
    folder: Path,
    ours: Answerer,
    made: Predictions,
    rival: _Rival | None,
    result: Mapping[str, Any],
) -> None:
    lines = []
    for task in ours.tasks:
        other = {
            (row.row, row.wording): row.prediction
            for row in (rival.predictions.get(task.name, ()) if rival else ())
        }
        for case, row in zip(task.cases, made[task.name], strict=True):
            line = predictions.line_of(task, case, row.prediction)
            if rival is not None:
                line["against"] = other[row.row, row.wording]
            lines.append(line)
    folder.mkdir(parents=True, exist_ok=True)
    predictions.write(folder / "predictions.jsonl", lines)
    runs.write(folder / "scores.json", runs.to_json(result, indent=2) + "\n")
