"""The four commands: what each does, in order. Everything heavy is imported when it is needed."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itune import console, errors, launching, prompting, recipes, runs, sharing, signals

if TYPE_CHECKING:
    pass


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
    fresh: bool = False,
    allowed: Sequence[str] = (),
) -> None:
    """`itune pretrain` and `itune tune`: one loop, from a recipe to a run's folder."""
    recipe = common.load(command)
    screen = common.screen()
    if preview:
        _preview(recipe, command, common, screen, preview)
        return
    launching.ensure(common.processes or recipe.launch.num_processes, arguments)
    with _opened(recipe, command, fresh=fresh, allowed=allowed) as (run, state):
        if state == "finished":
            screen.say(f"{run.dir}: already complete. Start it anew with --fresh.")
            _merge_late(recipe, run, screen)
        else:
            screen.say(f"{command}: {recipe.name} in {run.dir}")
            _watched(recipe, run, screen)
    emit(common, _summary(run))


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
        _train(recipe, run, screen)
    except errors.Diverged:
        state = "diverged"
        raise
    except (errors.Interrupted, signals.Stopped):
        state = "interrupted"
        raise
    finally:
        screen.end()
        if launching.is_main() and run.manifest["state"] != "finished":
            run.update(state=state)


def _train(recipe: recipes.Recipe, run: runs.Run, screen: console.Screen) -> None:
    from itune import (
        adapters,
        batches,
        doctor,
        finishing,
        jobs,
        models,
        objectives,
        probing,
        rehearsing,
        starting,
        training,
    )

    still()
    place = models.placement(recipe.model)
    settings = recipe.training
    with launching.first_prepares(run.dir):
        encoder, corpus, heldout = starting.prepared(recipe, run, screen.say)
    tokenizer = encoder.tokenizer
    for line in (*starting.counted(corpus, settings.seed), *starting.mixed(recipe, corpus)):
        screen.say(line)
    accelerator = jobs.accelerator(recipe, place)
    launching.check(accelerator)
    doctor.check(recipe, encoder, screen.say)
    model = starting.untrained(recipe, tokenizer, place)
    base = finishing.base_of(recipe, run, model, tokenizer, keep=accelerator.is_main_process)
    models.check_fits(model, corpus, settings.max_length)
    screen.say(f"computing in {place.why}{models.take_threads(model, place)}")
    model = adapters.attach(
        model, recipe.adapter, base=base, seed=settings.seed, family=encoder.family
    )
    if recipe.output.merge and recipe.adapter is not None:
        adapters.refuse_unmergeable(model)
    kernel = model.config._attn_implementation
    objective = objectives.of(encoder, settings)
    padding = objectives.collate(encoder, model, settings)
    if adapters.prepends(model) and padding is None:
        padding = batches.padder(tokenizer.pad_token_id, places=False)
    path = probing.choose(
        model,
        int(corpus.lengths.max()),
        packing=settings.packing,
        autocast=accelerator.autocast,
        padding=padding,
    )
    screen.say(path.why)
    if settings.gradient_checkpointing:
        models.recompute(model)
    total, trainable = models.count(model)
    screen.say(f"model: {total:,} parameters, {trainable:,} of them trained")
    plan = starting.planned(
        settings,
        corpus,
        world=accelerator.num_processes,
        padded=path.padded,
        changing=objective is not None and any(corpus.plain),
    )
    job = jobs.Job(model, corpus, heldout, plan, path.collate(tokenizer.pad_token_id), path)
    if accelerator.is_main_process:
        run.update(
            state="running",
            base=recipe.model.name,
            computing=place.why,
            processes=accelerator.num_processes,
            parameters=total,
            trainable=trainable,
            packed=not path.padded,
            path={"layout": path.layout, "head": path.head, "why": path.why},
            data={"train": starting.for_the_record(recipe, corpus)},
            steps=len(plan),
        )
    rehearsing.rehearse(recipe, run, job, encoder, accelerator, kernel, screen.say)
    outcome = training.fit(job, settings, run, accelerator, screen)
    screen.end()
    if accelerator.is_main_process:
        model.set_attn_implementation(kernel)  # that of packed rows is no part of the result
        finishing.finish(recipe, run, model, encoder, outcome, screen.say)
    accelerator.wait_for_everyone()


def _summary(run: runs.Run) -> dict[str, Any]:
    manifest = run.manifest
    names = ("state", "steps", "tokens", "seconds", "loss", "heldout_loss")
    return {"run": str(run.dir), **{name: manifest.get(name) for name in names}}


def _preview(
    recipe: recipes.Recipe, command: str, common: Common, screen: console.Screen, number: int
) -> None:
    from itune import doctor, families, models, previewing, starting

    still()
    made = starting.tokenizer(recipe, None, command)
    encoder = families.encoder(models.family_of(recipe.model), made)
    shown = previewing.show(
        recipe, encoder, number, screen, command=command, verbose=common.verbose
    )
    doctor.check(recipe, encoder, screen.say)
    emit(common, shown)


# --- generate -----------------------------------------------------------------------------


def generate(common: Common, asked: prompting.Asked, arguments: Sequence[str] = ()) -> None:
    """`itune generate`: one answer a prompt, in their order; or a talk."""
    fields = _generation(common.sets)
    prompting.check(asked, common.output)
    if asked.chat and (common.processes or 1) > 1:
        raise errors.OptionError("--processes: with --chat? One process talks. Leave it out.")
    launching.ensure(common.processes, arguments)
    with sharing.joined():
        _generate(common, asked, fields)


def _generate(common: Common, asked: prompting.Asked, fields: Mapping[str, Any]) -> None:
    screen = common.screen()
    if asked.chat:
        if common.json:
            raise errors.OptionError("--chat: with --json? Keep one; /save FILE writes JSON.")
        from itune import chatting, speaking

        still()
        chatting.Chat(speaking.loaded(asked, fields, screen.say), screen, asked.system).run()
        return
    conversations = sharing.of_first(lambda: prompting.conversations(asked))
    finished = 0
    if asked.input is not None and (path := common.output) is not None:
        prompts = [each.prompt for each in conversations]
        finished = sharing.of_first(lambda: prompting.answered(path, prompts))
    if finished:
        screen.say(f"{common.output}: {finished} of {len(conversations)} are answered already")
    waiting = conversations[finished:]
    if waiting:
        _answer(common, asked, fields, waiting, finished)
    if common.output is not None:
        screen.say(f"{len(waiting)} answers written to {common.output}")


def _answer(
    common: Common,
    asked: prompting.Asked,
    fields: Mapping[str, Any],
    waiting: Sequence[prompting.Conversation],
    finished: int,
) -> None:
    from itune import speaking

    still()
    screen = common.screen()
    speaker = sharing.first_before_others(lambda: speaking.loaded(asked, fields, screen.say))
    prompts = speaker.read(waiting)
    streams = len(waiting) == 1 and common.output is None and sys.stdout.isatty()
    heard = speaking.Heard(speaker.encoder, screen.part) if streams else None
    with screen.counting(len(waiting) if common.output is not None else 0) as done:
        answers = speaker.answers(
            prompts, finished, told=heard.told if heard else None, done=done, say=screen.say
        )
        for each, completion in zip(waiting, answers, strict=True):
            if sharing.rank() > 0:
                continue
            if heard is not None and not common.json:
                heard.end()
                screen.part("\n")
            else:
                _tell(common, screen, each.prompt, completion, alone=len(waiting) == 1)


def _tell(
    common: Common, screen: console.Screen, prompt: str, completion: Any, *, alone: bool
) -> None:
    """Write an answer where it belongs."""
    answer = {
        "prompt": prompt,
        "response": completion.text,
        "stop": completion.stop,
        "tokens": completion.tokens,
    }
    if common.output is not None:
        with common.output.open("a", encoding="utf-8") as file:
            file.write(runs.to_json(answer) + "\n")
    elif common.json:
        emit(common, answer)
    else:
        screen.result(completion.text if alone else f"> {prompt}\n{completion.text}\n")


def _generation(sets: Sequence[str]) -> dict[str, Any]:
    from itune import yamls

    fields = {}
    for item in sets:
        key, sign, value = item.partition("=")
        section, _, name = key.partition(".")
        if not sign or section != "generation" or not name:
            raise errors.OptionError(
                f"--set {item}: itune generate takes generation.FIELD=VALUE alone."
            )
        fields[name] = yamls.parse_value(value, f"--set {item}", errors.OptionError)
    return fields
