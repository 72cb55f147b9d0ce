"""What `itune eval` does: predictions of a model or a file, their scores, and the comparison."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from itune import contamination, errors, recipes, runs, scoring, storage
from itune import metrics as metric_names

if TYPE_CHECKING:
    from itune import data

DEFAULT_METRICS = {
    "classification": ("f1", "accuracy"),
    "qa": ("squad",),
    "translation": ("bleu", "chrf"),
    "summarization": ("rouge",),
    "generation": ("rougeL",),
    "chat": ("rougeL",),
}

Say = Callable[[str], None]


@dataclass(frozen=True)
class _Rival:
    """What a result is compared with: predictions by task, and how it is called."""

    name: str
    predictions: Mapping[str, Sequence[scoring.Prediction]]


# --- a file of predictions ------------------------------------------------------------------


def of_file(path: Path, metrics: Sequence[str], against: str | None) -> dict[str, Any]:
    """Scores of a JSONL file with `prediction` and `reference` or `references` on each line."""
    started = time.monotonic()
    for name in metrics:
        metric_names.check(name, "--metric")
    rows = _read_predictions(path)
    rival = None
    if against is not None:
        rival = _Rival(against, {"predictions": _read_predictions(Path(against))})
    task = _scored("predictions", str(path), rows, metrics, rival, recipes.Evaluation(), ())
    return {
        "run": None,
        "seconds": round(time.monotonic() - started, 3),
        "tokens_per_second": None,
        "tasks": {"predictions": task},
    }


def _read_predictions(path: Path) -> list[scoring.Prediction]:
    return [
        scoring.Prediction(
            row=int(line.get("row", number)),
            wording=int(line.get("wording", 0)),
            prediction=_text(line, "prediction", path, number),
            references=_references(line, path, number),
        )
        for number, line in _lines(path)
    ]


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        raise errors.DataError(f"{path}: no such file, in {Path.cwd()}. Check the path.")
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except ValueError as error:
                raise errors.DataError(
                    f"{path}:{number}: not JSON: {error}. Mend the line."
                ) from error
            if not isinstance(line, dict):
                raise errors.DataError(
                    f"{path}:{number}: expected an object {{...}}. Mend the line."
                )
            yield number, line


def _text(line: Mapping[str, Any], key: str, path: Path, number: int) -> str:
    value = line.get(key)
    if not isinstance(value, str):
        raise errors.DataError(
            f"{path}:{number}: {key}: expected a text, found {errors.shown(value)}. The line has "
            f"{', '.join(sorted(line))}."
        )
    return value


def _references(line: Mapping[str, Any], path: Path, number: int) -> tuple[str, ...]:
    several = line.get("references")
    if several is None:
        return (_text(line, "reference", path, number),)
    if not isinstance(several, list) or not all(isinstance(each, str) for each in several):
        raise errors.DataError(
            f"{path}:{number}: references: expected a list of texts, found {errors.shown(several)}."
        )
    return tuple(several)


# --- a model --------------------------------------------------------------------------------


def of_model(
    recipe: recipes.Recipe,
    run: runs.Run | None,
    *,
    model: str | None,
    metrics: Sequence[str],
    against: str | None,
    limit: int | None,
    folder: Path | None,
    say: Say,
) -> dict[str, Any]:
    """Scores of a run's model, or of an untuned one, on the recipe's evaluation data.

    Writes predictions.jsonl and scores.json under the run's evals/ (or `folder`).
    Raises RecipeError when the recipe has no evaluation data.
    """
    if not recipe.data.eval:
        raise errors.RecipeError(
            "data.eval: this recipe has none, so there is nothing to score on. "
            "Name some with --set data.eval.path=FILE and --set data.eval.template=NAME."
        )
    started = time.monotonic()
    location = model if run is None else str(run.dir)
    answerer = _Answerer(recipe, location or "", limit, say)
    made = answerer.predictions()
    rival = _rival(recipe, answerer, against, say)
    tasks: dict[str, Any] = {}
    for task in answerer.tasks:
        names = metrics or task.template.metrics or DEFAULT_METRICS[task.template.task]
        tasks[task.name] = _scored(
            task.name,
            task.path,
            made[task.name],
            names,
            rival,
            recipe.evaluation,
            task.template.choices,
            prompts=task.template.prompts,
        )
    tasks.update(answerer.perplexities())
    found = None if run is None else contamination.of_scoring(recipe, run, say)
    _name_contamination(tasks, recipe, found, limit)
    seconds = time.monotonic() - started
    result = {
        "run": None if run is None else str(run.dir),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(answerer.tokens / answerer.seconds, 1)
        if answerer.seconds
        else None,
        "tasks": tasks,
    }
    if folder is None and run is not None:
        folder = run.dir / "evals" / ("all" if limit is None else f"first-{limit}")
    if folder is not None:
        _keep(folder, answerer, made, rival, result)
        say(f"scores and predictions: {folder}")
    return result


def _name_contamination(
    tasks: Mapping[str, dict[str, Any]],
    recipe: recipes.Recipe,
    found: contamination.Found | None,
    limit: int | None,
) -> None:
    """Put beside each score how many of its rows are in the training data; None = not known."""
    left = list(enumerate(recipe.data.eval))
    for task in tasks.values():
        place = next(each for each in left if each[1].path == task["data"])
        left.remove(place)
        task["contamination"] = None if found is None else found.counts(place[0], limit)


class _Answerer:
    """A loaded model, its encoder, and the tasks it is asked."""

    def __init__(
        self,
        recipe: recipes.Recipe,
        location: str,
        limit: int | None,
        say: Say,
        tasks: list[data.Task] | None = None,
        encoder: Any = None,
    ) -> None:
        from itune import data, decoding, encoding, models

        self.recipe, self.location, self.limit, self.say = recipe, location, limit, say
        named = recipes.Model(name=location, dtype=recipe.model.dtype)
        place = models.placement(named)
        self.encoder = encoder or encoding.Encoder(models.tokenizer(location))
        self.model = models.load(named, place)
        self.model.eval()
        models.take_threads(self.model, place)
        self.wanted = decoding.settings(recipe.generation, self.encoder)
        room = min(decoding.context(self.model), 1 << 20)
        longest = room - min(int(self.wanted.max_new_tokens), room // 2)
        self.tasks = tasks or data.tasks(
            recipe.data.eval, self.encoder, max_prompt=longest, limit=limit
        )
        self.tokens = 0
        self.seconds = 0.0

    def predictions(self) -> dict[str, list[scoring.Prediction]]:
        """The model's answer to every case, by task."""
        from itune import decoding

        out = {}
        for task in self.tasks:
            started = time.monotonic()

            def count(_index: int, completion: decoding.Completion) -> None:
                self.tokens += completion.tokens

            answers = decoding.answers(
                self.model,
                self.encoder,
                task,
                self.wanted,
                decide=self.recipe.evaluation.decide,
                done=count,
            )
            self.seconds += time.monotonic() - started
            self.say(
                f"{self.location}: {task.name}: {len(answers)} answers in "
                f"{time.monotonic() - started:.1f} s"
            )
            out[task.name] = [
                scoring.Prediction(case.row, case.wording, answer, case.references)
                for case, answer in zip(task.cases, answers, strict=True)
            ]
        return out

    def perplexities(self) -> dict[str, Any]:
        """Perplexity a token on each evaluation source of plain text, with its interval."""
        import torch

        from itune import batches, data, losses

        out = {}
        for source in self.recipe.data.eval:
            if not data.is_text(source):
                continue
            limited = source.model_copy(update={"limit": self.limit or source.limit})
            corpus = data.corpus([limited], self.encoder, self.recipe.training)
            sums = np.zeros((len(corpus), 2))
            for index in range(len(corpus)):
                batch = batches.padded(corpus, np.array([index]), self.encoder.eos_id)
                with torch.inference_mode():
                    loss = losses.summed(self.model, batch.to(self.model.device))
                sums[index] = float(loss), corpus.targets[index]
            out[Path(source.path).stem] = {
                "data": source.path,
                "rows": len(corpus),
                "scores": {"perplexity": _perplexity(sums, self.recipe.evaluation)},
                "wordings": [],
            }
        return out


def _perplexity(sums: np.ndarray, settings: recipes.Evaluation) -> dict[str, Any]:
    """exp of the mean loss; sums [rows, 2] hold each text's loss in nats and its tokens."""
    draws = np.random.default_rng(0)
    values = []
    for _ in range(settings.resamples):
        nats, tokens = sums[draws.integers(0, len(sums), len(sums))].sum(0)
        values.append(math.exp(nats / tokens))
    tail = (1 - settings.confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    nats, tokens = sums.sum(0)
    return {
        "value": math.exp(nats / tokens),
        "low": float(low),
        "high": float(high),
        "signature": "perplexity|per:token",
    }


def _rival(
    recipe: recipes.Recipe, answerer: _Answerer, against: str | None, say: Say
) -> _Rival | None:
    if against is None:
        return None
    if against.endswith(".jsonl"):
        grouped: dict[str, list[scoring.Prediction]] = {}
        path = Path(against)
        for (_, line), row in zip(_lines(path), _read_predictions(path), strict=True):
            grouped.setdefault(str(line.get("task", "predictions")), []).append(row)
        return _Rival(against, grouped)
    location = recipe.model.name if against == "base" else str(runs.find(Path(against)).dir)
    if location is None:
        say("against base: this model began from random weights, so there is no base to compare")
        return None
    # The same prompts, to the last token: both models are asked what the tuned one was trained on.
    encoder = answerer.encoder if against == "base" else None
    tasks = answerer.tasks if against == "base" else None
    other = _Answerer(recipe, location, answerer.limit, say, tasks, encoder)
    return _Rival(against, other.predictions())


# --- scores -----------------------------------------------------------------------------------


def _scored(
    name: str,
    path: str,
    rows: Sequence[scoring.Prediction],
    metrics: Sequence[str],
    rival: _Rival | None,
    settings: recipes.Evaluation,
    choices: Sequence[str],
    *,
    prompts: Sequence[str] = (),
) -> dict[str, Any]:
    options: dict[str, Any] = {
        "confidence": settings.confidence,
        "resamples": settings.resamples,
        "choices": choices,
    }
    made: dict[str, Any] = {
        "data": path,
        "rows": len({row.row for row in rows}),
        "scores": {k: asdict(v) for k, v in scoring.score(rows, metrics, **options).items()},
    }
    by_wording = scoring.by_wording(rows, metrics, choices=choices) if len(prompts) > 1 else []
    made["wordings"] = [
        {"prompt": prompt, "scores": values}
        for prompt, values in zip(prompts, by_wording, strict=False)
    ]
    if rival is not None:
        if name not in rival.predictions:
            raise errors.DataError(
                f"{rival.name}: no predictions for {name}.{errors.nearest(name, rival.predictions)}"
            )
        theirs = rival.predictions[name]
        made["against"] = {
            "name": rival.name,
            "scores": {k: asdict(v) for k, v in scoring.score(theirs, metrics, **options).items()},
            "difference": {
                k: asdict(v) for k, v in scoring.compare(rows, theirs, metrics, **options).items()
            },
        }
    return made


def _keep(
    folder: Path,
    answerer: _Answerer,
    made: Mapping[str, Sequence[scoring.Prediction]],
    rival: _Rival | None,
    result: Mapping[str, Any],
) -> None:
    lines = []
    for task in answerer.tasks:
        other = {
            (row.row, row.wording): row.prediction
            for row in (rival.predictions.get(task.name, ()) if rival else ())
        }
        for case, row in zip(task.cases, made[task.name], strict=True):
            line = {
                "task": task.name,
                "row": row.row,
                "wording": row.wording,
                "prompt": "\n".join(message.content for message in case.messages),
                "prediction": row.prediction,
                "references": row.references,
            }
            if rival is not None:
                line["against"] = other[row.row, row.wording]
            lines.append(runs.to_json(line) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    storage.write(folder / "predictions.jsonl", "".join(lines))
    storage.write(folder / "scores.json", runs.to_json(result, indent=2) + "\n")


# --- what is shown ------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows) of each table: the scores, and their spread over wordings."""
    compared = next(
        (t["against"]["name"] for t in result["tasks"].values() if "against" in t), None
    )
    columns = ["task", "metric", "rows", "score", "interval"]
    if compared is not None:
        columns += [compared, "interval", "difference", "interval", "p"]
    rows = []
    for name, task in result["tasks"].items():
        for metric, score in task["scores"].items():
            row = [name, metric, str(task["rows"]), _number(score["value"]), _interval(score)]
            if "against" in task:
                theirs = task["against"]["scores"][metric]
                gain = task["against"]["difference"][metric]
                row += [_number(theirs["value"]), _interval(theirs)]
                row += [f"{gain['value']:+.4g}", _interval(gain), _chance(gain["p_value"])]
            rows.append(row)
    yield "", columns, rows
    spread = [
        [name, metric, str(len(values)), _number(min(values)), _number(max(values))]
        for name, task in result["tasks"].items()
        if len(task["wordings"]) > 1
        for metric in task["scores"]
        for values in [[w["scores"][metric] for w in task["wordings"]]]
    ]
    if spread:
        yield "", ["task", "metric", "wordings", "worst", "best"], spread
    leaked = [
        [name, "held-out rows", str(task["rows"]), str(counts["exact"]), str(counts["ngram"])]
        for name, task in result["tasks"].items()
        if (counts := task.get("contamination")) and any(counts.values())
    ]
    if leaked:
        yield "", ["task", "also in the training data", "rows", "exact", "13 words"], leaked


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"


def _interval(score: Mapping[str, float]) -> str:
    return f"[{_number(score['low'])}, {_number(score['high'])}]"


def _chance(p_value: float) -> str:
    return f"{p_value:.3f}" if p_value >= 0.0015 else "0.001"
