"""`itune pretrain` and `itune tune`, in order, and what all commands have in common.

Everything heavy is imported when it is needed.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itune import console, errors, launching, recipes, runs, signals


@dataclass(frozen=True, slots=True)
class Common:
    """The options that every command has."""

    recipe: str | None = None
    sets: tuple[str, ...] = ()
    output: Path | None = None
    processes: int | None = None
    json: bool = False
    quiet: bool = False
    verbose: bool = False

    def screen(self) -> console.Screen:
        """Where this command speaks; under several processes the first alone does."""
        return console.Screen(quiet=self.quiet, silent=self.json or not launching.is_main())

    def load(self, command: str) -> recipes.Recipe:
        """The recipe of the options."""
        return recipes.load(self.recipe, overrides=self.sets, output=self.output, command=command)


def still() -> None:
    """Silence the libraries' own bars and advice: what matters, itune says itself."""
    import logging

    import datasets
    import transformers

    # transformers warns of a name that peft still uses; nobody who tunes can do anything about it.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
    warnings.showwarning = launching.warn_of_library
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()


def emit(common: Common, value: Mapping[str, Any]) -> None:
    if common.json and launching.is_main():
        sys.stdout.write(runs.to_json(value) + "\n")
        sys.stdout.flush()


# --- pretrain and tune --------------------------------------------------------------------


def train(
    command: str,
    common: Common,
    arguments: Sequence[str],
    *,
    preview: int = 0,
    plan: bool = False,
    fresh: bool = False,
    allowed: Sequence[str] = (),
) -> None:
    """`itune pretrain` and `itune tune`: one loop, from a recipe to a run's folder."""
    recipe = common.load(command)
    screen = common.screen()
    if preview and plan:
        raise errors.OptionError("--preview and --plan: each shows and stops. Ask one at a time.")
    if preview:
        _preview(recipe, command, common, screen, preview)
        return
    if plan:
        _plan(recipe, command, common, screen)
        try:
            runs.refuse(runs.Run(recipe.output.dir), recipe, command, fresh=fresh, allowed=allowed)
        except errors.RunError as error:
            launching.warn(f"as things are, the run itself would be refused: {error}")
        return
    hang = recipe.launch.hang_timeout
    wanted = common.processes or recipe.launch.num_processes
    launching.ensure(wanted, arguments, folder=recipe.output.dir, hang_timeout=hang)
    with _opened(recipe, command, fresh=fresh, allowed=allowed) as (run, state):
        if state == "finished":
            screen.say(f"{run.dir}: already complete. Start it anew with --fresh.")
            _merge_late(recipe, run, screen)
        else:
            screen.say(f"{command}: {recipe.name} in {run.dir}")
            with launching.heard(run.dir, hang):
                _watched(recipe, run, screen)
        if not launching.is_main():  # the first process may be at it still
            return
        screen.say(f"next: {_following(run)}")
        emit(common, _summary(run))
        if recipe.output.push:
            from itune import pushing

            pushing.push(run, recipe, screen.say)


def _following(run: runs.Run) -> str:
    """What is done with a run that is finished, as it is typed."""
    folder = shlex.quote(str(run.dir))
    if run.manifest["command"] == "pretrain":
        return f"itune tune --recipe FILE --set model.name={folder}"
    ask = f"itune generate --run {folder} PROMPT"
    base = " --against base" if run.recipe.model.name else ""
    score = f"itune eval --run {folder}{base}"
    if (run.manifest.get("origin") or {}).get(
        "family"
    ) == "masked":  # it fills in masks and writes no text
        return score
    return f"{score}, {ask}" if run.recipe.data.eval else ask


def _merge_late(recipe: recipes.Recipe, run: runs.Run, screen: console.Screen) -> None:
    """Merge what a finished run left, where that is asked for only now."""
    wanted = recipe.output.merge and recipe.adapter is not None and launching.is_main()
    if wanted and not (run.dir / "merged").is_dir():
        from itune import finishing

        still()
        with runs.locked(run):
            finishing.merge(run, screen.say)


@contextlib.contextmanager
def _opened(
    recipe: recipes.Recipe, command: str, *, fresh: bool, allowed: Sequence[str]
) -> Iterator[tuple[runs.Run, str]]:
    launch = launching.launch_id()
    if launching.is_main():
        with runs.opened(recipe, command, fresh=fresh, allowed=allowed, launch=launch) as held:
            yield held
    else:
        run = runs.Run(recipe.output.dir)
        yield run, runs.joined(run, launch, fresh=fresh)


def _watched(recipe: recipes.Recipe, run: runs.Run, screen: console.Screen) -> None:
    """Train, and have run.json say how it ended."""
    state = "failed"
    try:
        _refuse_missing(recipe)
        from itune import tuning

        still()
        tuning.tune(recipe, run, screen)
    except errors.Diverged:
        state = "diverged"
        raise
    except (errors.Interrupted, signals.Stopped):
        state = "interrupted"
        raise
    finally:
        screen.end()
        if launching.is_main() and run.manifest["state"] != "finished":
            with contextlib.suppress(OSError):  # a disk that refuses this has refused more
                run.update(state=state)
            if state != "failed":
                _report(run, screen)


def _refuse_missing(recipe: recipes.Recipe) -> None:
    """Refuse files that are not there at once: torch takes seconds to load."""
    from itune import locating, sources

    if recipe.model.name is not None:
        locating.local(recipe.model.name)
    sources.refuse_missing([*recipe.data.train, *recipe.data.eval])


def _report(run: runs.Run, screen: console.Screen) -> None:
    """The page of a run that did not finish; why it did not matters more than a page."""
    import jinja2

    from itune import reports

    try:
        screen.say(f"a report of what it did: {reports.write(run)}")
    except (OSError, ValueError, LookupError, jinja2.TemplateError) as error:
        screen.say(f"no report of it: {error}")


def _summary(run: runs.Run) -> dict[str, Any]:
    manifest = run.manifest
    names = ("state", "steps", "tokens", "seconds", "loss", "heldout_loss")
    return {"run": str(run.dir), **{name: manifest.get(name) for name in names}}


def _preview(
    recipe: recipes.Recipe, command: str, common: Common, screen: console.Screen, number: int
) -> None:
    _without_torch()
    from itune import configs, doctor, families, previewing

    still()
    family = configs.family_of(recipe.model)
    families.refuse_idle(family, recipe.training)
    encoder = families.encoder(family, configs.asked_tokenizer(recipe, None, command))
    shown = previewing.show(
        recipe, encoder, number, screen, command=command, verbose=common.verbose
    )
    doctor.check(recipe, encoder, screen.say)
    emit(common, shown)


def _without_torch() -> None:
    """Have transformers take torch for absent in this process, unless it is loaded already.

    Tokenizers, configs and templates need none of it, and loading it is half of what a preview of
    a small file takes.
    """
    if "torch" in sys.modules:
        return
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # it would tell of the absence
    sys.modules["torch"] = None  # type: ignore[assignment]  # Python's sign for what is not there
    try:
        import transformers

        transformers.is_torch_available()  # asked once, remembered from then on
    finally:
        del sys.modules["torch"]


def _plan(recipe: recipes.Recipe, command: str, common: Common, screen: console.Screen) -> None:
    from itune import costing, forecasting

    still()
    processes = common.processes or recipe.launch.num_processes or 1
    found = costing.forecast(recipe, command, processes, screen.say)
    screen.table(f"{command}: {recipe.name}", ("what", "as planned"), forecasting.rows(found))
    emit(common, found.plain())
