"""`itune eval`: its options, the recipe and the run they mean, and what is shown of the result."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itune import (
    commands,
    engines,
    errors,
    launching,
    metrics,
    recipes,
    runs,
    sharing,
    templates,
)

ASKING = (
    "data.",
    "generation.",
    "model.",
    "training.seed",
)  # parts of a recipe that answers follow from
TRAINED = ("model.name", "model.revision", "model.from_scratch", "adapter")
ENSEMBLE = "evaluation.ensemble"
ALONE = f"--set {ENSEMBLE}=[] averages none."
NAMED = 40  # chosen: characters of a folder's name that tell of settings


@dataclass(frozen=True, slots=True)
class Judged:
    """What `itune eval` is asked to score, and how."""

    run: Path | None = None
    model: str | None = None
    predictions: Path | None = None
    metrics: tuple[str, ...] = ()
    against: str | None = None
    limit: int | None = None
    shots: int | None = None
    wordings: str | None = None
    engine: str | None = None


def evaluate(common: commands.Common, asked: Judged, arguments: Sequence[str] = ()) -> None:
    """`itune eval`: predictions, their scores with intervals, and the paired comparison."""
    if asked.predictions is not None:
        from itune import judging

        _refuse_beside_predictions(common, asked)
        settings = recipes.Evaluation()
        result = judging.of_file(asked.predictions, asked.metrics, asked.against, settings)
        _show(common, result, settings.confidence)
        return
    if asked.against and set(asked.metrics) == {metrics.MEMORISATION}:
        raise errors.OptionError(
            f"--against: {metrics.MEMORISATION} compares training rows with held-out rows of one "
            "model, and no two models. Leave --against out, or name another --metric beside it."
        )
    recipe, run = _judged(common, asked)
    others = _others(recipe, run, asked)
    engine = engines.asked(asked.engine, common.processes)
    if engine is None:
        wanted = sharing.affordable(common.processes, recipe.launch.num_processes)
        launching.ensure(wanted, arguments)
    with sharing.joined():
        result = _of_model(common, asked, recipe, run, others, engine)
    if launching.is_main():
        _show(common, result, recipe.evaluation.confidence)
        if result["run"] is not None:
            from itune import pushing

            pushing.push_cards(runs.Run(Path(result["run"])), common.screen().say)


def _of_model(
    common: commands.Common,
    asked: Judged,
    recipe: recipes.Recipe,
    run: runs.Run | None,
    others: Sequence[runs.Run],
    engine: engines.Engine | None,
) -> dict[str, Any]:
    from itune import sources

    sources.refuse_missing(recipe.data.eval)
    from itune import answering, judging

    commands.still()
    screen, settings = common.screen(), recipe.evaluation
    if run is not None:
        beside = f", as one with {', '.join(str(each.dir) for each in others)}" if others else ""
        screen.say(f"run: {run.dir}{beside}")
    return judging.of_model(
        recipe,
        run,
        others,
        model=asked.model,
        metrics=asked.metrics or settings.metrics,
        against=asked.against or settings.against,
        asked=answering.Asked(
            limit=asked.limit,
            shots=settings.shots if asked.shots is None else asked.shots,
            wordings=_wordings(asked.wordings),
            decide=settings.decide,
            engine=engine,
            beside=_beside(others),
            otherwise="" if run is None else sharing.of_first(lambda: otherwise(run, recipe)),
        ),
        folder=common.output,
        say=screen.say,
    )


def otherwise(run: runs.Run, recipe: recipes.Recipe) -> str:
    """What a recipe asks otherwise than its run's own, as part of a folder's name; "" if nothing.

    The beginning of it in words, and a digest of all: other settings have another name.
    """
    own = recipes.load(run.recipe_path(), command="eval")
    found = [
        (key, value)
        for key, _, value in recipes.diff(own, recipe)
        if key.startswith(ASKING) and (recipes.decides(key) or key.startswith("generation."))
    ]
    if not found:
        return ""
    told = [
        (key.split(".")[-1], str(value).split("/")[-1]) for key, value in found if value is not None
    ]
    words = "-".join(f"{key}-{value}" for key, value in told) or "fewer"  # sources were left out
    return _brief(words, found)


def _beside(others: Sequence[runs.Run]) -> str:
    """The runs that answer with another, as part of a folder's name; "" if there are none."""
    if not others:
        return ""
    words = "-".join(["with", *(each.dir.resolve().name for each in others)])
    return _brief(words, [str(each.dir) for each in others])


def _brief(words: str, meant: object) -> str:
    """The beginning of words as a part of a folder's name, and a digest of all that is meant."""
    brief = re.sub(r"[^a-z0-9.]+", "-", words.lower())[:NAMED].strip("-.")
    text = json.dumps(meant, sort_keys=True)
    return f"{brief}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _show(common: commands.Common, result: Mapping[str, Any], confidence: float) -> None:
    from itune import scoreboard

    screen = common.screen()
    for table in scoreboard.tables(result, confidence):
        if table.title:
            screen.result(table.title)
        if table.columns:
            screen.table("", table.columns, table.rows)
        screen.result("".join(f"{note}\n" for note in table.notes))
    commands.emit(common, result)


def _refuse_beside_predictions(common: commands.Common, asked: Judged) -> None:
    """Refuse options that say nothing about a file of answers, rather than leave them unheard."""
    if not asked.metrics:
        raise errors.OptionError("--predictions: which metric? Name it with --metric NAME.")
    given = {
        "--recipe": common.recipe,
        "--set": common.sets or None,
        "--output": common.output,
        "--processes": common.processes,
        "--run": asked.run,
        "--model": asked.model,
        "--limit": asked.limit,
        "--shots": asked.shots,
        "--wordings": asked.wordings,
        "--engine": asked.engine,
    }
    unheard = [name for name, value in given.items() if value is not None]
    if unheard:
        raise errors.OptionError(
            f"{unheard[0]}: has no meaning beside --predictions, whose answers are given. "
            "Leave one of them out."
        )


def _wordings(given: str | None) -> int | None:
    """How many of a template's wordings are asked; None for all."""
    if given in (None, "all"):
        return None
    if given == "first":
        return 1
    if not str(given).isdecimal() or int(str(given)) < 1:
        raise errors.OptionError(
            f"--wordings: expected all, first, or a number from 1, found {errors.shown(given)}."
        )
    return int(str(given))


def _judged(common: commands.Common, asked: Judged) -> tuple[recipes.Recipe, runs.Run | None]:
    if asked.model is not None:
        if common.recipe is None:
            raise errors.OptionError(
                "--model: on which data? Name a recipe that has data.eval with --recipe."
            )
        sets = (*common.sets, f"model.name={json.dumps(asked.model)}", "model.from_scratch=null")
        return recipes.load(common.recipe, overrides=sets, command="eval"), None
    for item in common.sets:
        if item.startswith(TRAINED):
            raise errors.OptionError(
                f"--set {item}: a run is scored with the model that it trained. Name another run "
                "with --run, or another model with --model, and --recipe for its data."
            )
    if asked.run is None and common.recipe is not None:
        recipe = recipes.load(common.recipe, overrides=common.sets, command="eval")
        return recipe, runs.find(recipe.output.dir)
    run = runs.find(asked.run) if asked.run is not None else runs.newest()
    return recipes.load(run.recipe_path(), overrides=common.sets, command="eval"), run


# --- several runs as one ---------------------------------------------------------------------


def _others(recipe: recipes.Recipe, run: runs.Run | None, asked: Judged) -> tuple[runs.Run, ...]:
    """The runs that answer with this one, as one (`evaluation.ensemble`).

    Raises UserError for what cannot be averaged, before anything is loaded.
    """
    if not recipe.evaluation.ensemble:
        return ()
    if run is None:
        raise errors.OptionError(
            "--model: evaluation.ensemble averages runs, and this is none. Name one with --run; "
            + ALONE
        )
    _refuse_unaveraged(recipe, asked)
    found: list[runs.Run] = []
    for name in recipe.evaluation.ensemble:
        try:
            other = runs.find(Path(name))
        except errors.RunError as error:
            raise errors.RunError(f"{ENSEMBLE}: {error}") from error
        for known in (run, *found):
            if other.dir.resolve() == known.dir.resolve():
                what = "the run that is scored" if known is run else "named before"
                raise errors.OptionError(
                    f"{ENSEMBLE}: {errors.inert(name)} is {what}, and would count twice. Take it "
                    f"out; {ALONE}"
                )
        if other.manifest.get("command") == "pretrain":
            launching.warn(
                f"{ENSEMBLE}: {errors.inert(name)} is pretrained alone, and has learnt none of "
                "these answers."
            )
        found.append(other)
    return tuple(found)


def _refuse_unaveraged(recipe: recipes.Recipe, asked: Judged) -> None:
    """Raise OptionError where answers are written, or measured otherwise than by choices."""
    wanted = asked.metrics or recipe.evaluation.metrics
    unfit = {
        f"--engine {asked.engine}: gives no likelihoods": asked.engine is not None,
        f"--metric {metrics.MEMORISATION}: is of one model": metrics.MEMORISATION in wanted,
        "evaluation.decide: generate has answers written": recipe.evaluation.decide == "generate",
    }
    for what, found in unfit.items():
        if found:
            raise errors.OptionError(
                f"{what}, and {ENSEMBLE} averages the likelihoods of choices. Leave one of them "
                f"out; {ALONE}"
            )
    for source in recipe.data.eval:
        if source.template is None or not templates.load(source.template).choices:
            named = "" if source.template is None else f" (template {source.template})"
            raise errors.OptionError(
                f"{ENSEMBLE}: {errors.inert(source.path + named)} has no choices, and texts of "
                "several models cannot be averaged. Take it out of data.eval, or score each run "
                f"by itself: {ALONE}"
            )
