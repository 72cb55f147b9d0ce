"""What `itune eval` does: predictions of a model or a file, their scores, and the comparison."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from itune import (
    cards,
    contamination,
    ensembles,
    errors,
    memorising,
    memory,
    predictions,
    recipes,
    reports,
    results,
    runs,
    scoring,
    sharing,
    storage,
    templates,
)
from itune import metrics as metric_names
from itune.answering import Answerer, Asked, Say
from itune.cases import is_text

DEFAULT_METRICS = {
    "classification": ("f1", "accuracy"),
    "qa": ("squad",),
    "translation": ("bleu", "chrf"),
    "summarization": ("rouge",),
    "generation": ("rougeL",),
    "chat": ("rougeL",),
}


# Predictions and losses of the model, and what they are compared with.
Answered = tuple[results.Predictions, results.Losses, results.Rival | None]


def metrics_of(template: templates.Template, wanted: Sequence[str]) -> tuple[str, ...]:
    """The metrics of a template's answers: those that are wanted, else its own, else its task's."""
    _, wanted = memorising.asked(wanted)
    return tuple(wanted or template.metrics or DEFAULT_METRICS[template.task])


# --- a file of predictions ------------------------------------------------------------------


def of_file(
    path: Path, metrics: Sequence[str], against: str | None, settings: recipes.Evaluation
) -> dict[str, Any]:
    """Scores of a JSONL file with `prediction` and `reference` or `references` on each line."""
    started = time.monotonic()
    for name in metrics:
        metric_names.check(name, "--metric")
    made = predictions.read(path)
    rival = None if against is None else _other_file(against)
    way = results.Way(metrics, settings)
    tasks = {name: results.scored(name, str(path), rows, way, rival) for name, rows in made.items()}
    return _result(None, started, None, tasks)


def _other_file(against: str) -> results.Rival:
    """What a file of predictions is compared with: another one."""
    if against == "base" or Path(against).is_dir():
        what = "is known of no file" if against == "base" else "is a folder"
        raise errors.OptionError(
            f"--against: {errors.inert(against)} {what}; beside --predictions no model is "
            "asked. Name a file of answers, such as runs/NAME/evals/all/predictions.jsonl."
        )
    return results.Rival(against, predictions.read(Path(against)), {})


def _result(
    run: runs.Run | None,
    started: float,
    rate: float | None,
    tasks: dict[str, Any],
    others: Sequence[runs.Run] = (),
) -> dict[str, Any]:
    results.adjust(tasks)
    return {
        "run": None if run is None else str(run.dir),
        **({"ensemble": [str(each.dir) for each in others]} if others else {}),
        "seconds": round(time.monotonic() - started, 3),
        "tokens_per_second": rate,
        "tasks": tasks,
    }


# --- a model --------------------------------------------------------------------------------


def of_model(
    recipe: recipes.Recipe,
    run: runs.Run | None,
    others: Sequence[runs.Run] = (),
    *,
    model: str | None,
    metrics: Sequence[str],
    against: str | None,
    asked: Asked,
    folder: Path | None,
    say: Say,
) -> dict[str, Any]:
    """Scores of a run's model, or of an untuned one, on the recipe's evaluation data.

    others: runs that answer with this one, as one; all tasks have choices then.

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
    members = [str(each.dir) for each in (run, *others) if each is not None] or [model or ""]
    ours = sharing.first_before_others(
        lambda: (
            ensembles.Ensemble(recipe, members, asked, say)
            if others
            else Answerer(recipe, members[0], asked, say)
        )
    )
    by_heart, metrics = memorising.asked(metrics)
    alone = by_heart and not metrics  # then nothing is answered
    if by_heart:
        memorising.check(ours, recipe)
    if alone and against is not None:
        say(f"{memorising.NAME}: of this model alone, so {against} is not asked")
    ways = {} if alone else _ways(ours, recipe, metrics)
    if folder is None:
        say("answers and scores are kept nowhere; --output DIR keeps them")
    else:
        _make(folder)
    answered = None if alone else _answered(ours, recipe, against, folder)
    learnt = memorising.measured(ours, recipe, run) if by_heart else {}
    if sharing.rank() > 0:  # what follows is written, and takes no model
        return {}
    tasks = {} if answered is None else _scored(ours, recipe, run, others, ways, answered)
    tasks |= learnt
    rate = round(ours.tokens / ours.seconds, 1) if ours.tokens else None
    result = _result(run, started, rate, tasks, others)
    if folder is not None:
        if answered is not None:
            _keep(folder, ours, answered)
        _keep_scores(folder / "scores.json", result, say)
        say(f"scores and predictions: {folder}")
    if run is not None and folder is not None and folder.parent == run.dir / "evals":
        cards.write(run)
        _track(recipe, run, folder.name, result["tasks"], say)
        say(f"report: {reports.write(run)}")
    return result


def _scored(
    ours: Answerer,
    recipe: recipes.Recipe,
    run: runs.Run | None,
    others: Sequence[runs.Run],
    ways: Mapping[str, results.Way],
    answered: Answered,
) -> dict[str, Any]:
    """The tasks of scores.json that are scored by their answers, and those of plain text."""
    made, losses, rival = answered
    tasks: dict[str, Any] = {}
    for task in ours.tasks:
        tasks[task.name] = results.scored(
            task.name, task.path, made[task.name], ways[task.name], rival
        )
        tasks[task.name]["task"] = task.template.task
        if task.duplicated:
            tasks[task.name]["duplicated"] = task.duplicated
    for name, (path, sums) in losses.items():
        tasks[name] = results.perplexity(
            name, path, sums, rival, results.Way((), recipe.evaluation)
        )
    found = None
    if run is not None:
        trained = [(recipe, run), *((_trained_as(each, recipe), each) for each in others)]
        found = contamination.together(
            [contamination.of_scoring(one, each, ours.say) for one, each in trained]
        )
    _name_contamination(tasks, recipe, found, ours)
    return tasks


def _trained_as(other: runs.Run, recipe: recipes.Recipe) -> recipes.Recipe:
    """The recipe with the training data of another run."""
    train = {"train": other.recipe.data.train}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=train)})


def _track(
    recipe: recipes.Recipe, run: runs.Run, name: str, tasks: Mapping[str, Any], say: Say
) -> None:
    if recipe.tracking.log_with:
        from itune import jobs

        jobs.track_scores(recipe, run, name, tasks, say)


def _ways(ours: Answerer, recipe: recipes.Recipe, metrics: Sequence[str]) -> dict[str, results.Way]:
    """How each task is scored. Raises UserError where that cannot be: before hours of answering."""
    _refuse_unserved(ours, recipe)
    if metrics and not ours.tasks:
        raise errors.OptionError(
            f"--metric {metrics[0]}: data.eval is plain text, which is measured by its perplexity. "
            "Leave --metric out, or name a run that answers prompts with --run."
        )
    ways = {
        task.name: results.Way(
            metrics_of(task.template, metrics),
            recipe.evaluation,
            task.template.choices,
            task.template.prompts[: ours.asked.wordings],
            ours.asked.decide != "generate",
        )
        for task in ours.tasks
    }
    for task in ours.tasks:
        way = ways[task.name]
        golds = [case.references for case in task.cases]
        scoring.check_references(golds, way.metrics, choices=way.choices)
    return ways


def _refuse_unserved(ours: Answerer, recipe: recipes.Recipe) -> None:
    """Raise OptionError for what an engine that only writes answers cannot be asked."""
    if ours.asked.engine is None:
        return
    chosen = [task.name for task in ours.tasks if ours.chosen(task)]
    texts = [source.path for source in recipe.data.eval if is_text(source)]
    if chosen or texts:
        why = (
            f"{chosen[0]}: one of its choices is picked by likelihood, which itune computes "
            "itself. Have it written with --set evaluation.decide=generate"
            if chosen
            else f"{texts[0]}: plain text is measured by its loss, which itune computes itself. "
            "Take it out of data.eval"
        )
        raise errors.OptionError(
            f"--engine {ours.asked.engine.name}: {why}, or leave --engine out."
        )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.EnvironmentRefusal(
            f"{folder}: cannot be made: {error.strerror}. Choose another folder with --output."
        ) from error


def _name_contamination(
    tasks: Mapping[str, dict[str, Any]],
    recipe: recipes.Recipe,
    found: contamination.Found | None,
    ours: Answerer,
) -> None:
    """Put beside each score how many of its rows are in the training data; None = not known."""
    asked = {task.name: {case.row for case in task.cases} for task in ours.tasks}
    left = list(enumerate(recipe.data.eval))
    for name, task in tasks.items():
        place = next(each for each in left if each[1].path == task["data"])
        left.remove(place)
        among = asked.get(name) or ours.numbers(place[1])
        task["contamination"] = None if found is None else found.counts(place[0], among)


def _answered(
    ours: Answerer, recipe: recipes.Recipe, against: str | None, folder: Path | None
) -> Answered:
    """Our predictions and losses, and what they are compared with; one model in memory at a time.

    The base of an adapter answers first; then the adapter is folded into that same model.
    """
    mine = predictions.Kept(folder, "predictions.jsonl", ours.mark)
    rival, other = _rival(ours, recipe, against)
    if other is None:
        return ours.answers(mine), ours.losses(), rival
    from itune import locating

    theirs = predictions.Kept(folder, "against.jsonl", other.mark)
    texts = any(map(is_text, recipe.data.eval))
    shared = against == "base" and _adapts(ours, other)
    other.awaited = locating.resolve(ours.location) if shared else None
    if shared and not (other.complete(theirs) and ours.complete(mine) and not texts):
        answered, losses = other.answers(theirs), other.losses()
        if texts or not ours.complete(mine):
            ours.tune(other)
        made = ours.answers(mine), ours.losses()
    else:
        made = ours.answers(mine), ours.losses()
        ours.release()
        memory.free()
        answered, losses = other.answers(theirs), other.losses()
    other.release()
    return *made, results.Rival(str(against), answered, losses)


def _rival(
    ours: Answerer, recipe: recipes.Recipe, against: str | None
) -> tuple[results.Rival | None, Answerer | None]:
    """What to compare with: read from a file, or to be asked."""
    if against is None:
        return None, None
    if against.endswith(".jsonl"):
        found = predictions.read(Path(against))
        if len(ours.tasks) == 1 and len(found) == 1:
            found = {ours.tasks[0].name: next(iter(found.values()))}
        read = results.Rival(against, found, {})
        for task in ours.tasks:  # before hours of answering
            results.check_paired(task.name, ours.blank(task), read)
        return read, None
    if against != "base":
        location = str(runs.find(Path(against)).dir)
        return None, sharing.first_before_others(
            lambda: Answerer(recipe, location, ours.asked, ours.say)
        )
    if recipe.model.name is None:
        ours.say("against base: this model began from random weights, so there is none to compare")
        return None, None
    # The same prompts, to the last token: both are asked what the tuned one was trained on.
    return None, Answerer(recipe, recipe.model.name, ours.asked, ours.say, like=ours)


def _adapts(ours: Answerer, base: Answerer) -> bool:
    """Whether ours is an adapter on that very base, and the only one."""
    from itune import locating

    if isinstance(ours, ensembles.Ensemble):
        return False
    adapter = locating.adapter_of(locating.resolve(ours.location))
    if adapter is None:
        return False
    return locating.resolve(base.location) == str(adapter["base_model_name_or_path"])


def _keep(folder: Path, ours: Answerer, answered: Answered) -> None:
    lines = []
    made, _, rival = answered
    for task in ours.tasks:
        other = {
            (row.row, row.wording): row.prediction
            for row in (rival.predictions.get(task.name, ()) if rival else ())
        }
        for case, row in zip(task.cases, made[task.name], strict=True):
            line = predictions.line_of(task, case, row.prediction, stop=row.stop)
            if rival is not None:
                line["against"] = other[row.row, row.wording]
            lines.append(line)
    predictions.write(folder / "predictions.jsonl", lines)


def _keep_scores(scores: Path, result: Mapping[str, Any], say: Say) -> None:
    if scores.is_file() and _lasting(runs.read_json(scores)) != _lasting(result):
        aside = predictions.spare(scores)
        storage.DISK.rename(scores, aside)
        say(f"other scores were there; they are kept in {aside}")
    storage.write(scores, runs.to_json(result, indent=2) + "\n")


def _lasting(result: Mapping[str, Any]) -> Any:
    """A result as its file has it, but for what differs from time to time."""
    timed = ("seconds", "tokens_per_second", "run")
    return json.loads(runs.to_json({k: v for k, v in result.items() if k not in timed}))
