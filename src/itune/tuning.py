"""A run from its recipe to its result: its parts put together, tried, trained, saved.

Needs torch.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import asdict
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from itune import (
    adapters,
    compiling,
    data,
    doctor,
    encoding,
    families,
    finishing,
    folding,
    forecasting,
    gradients,
    jobs,
    launching,
    layerwise,
    models,
    objectives,
    optimizers,
    origins,
    plans,
    probing,
    pushing,
    recipes,
    rehearsing,
    runs,
    sharding,
    sizing,
    starting,
    suiting,
    training,
    watching,
)


def tune(recipe: recipes.Recipe, run: runs.Run, screen: watching.Watcher) -> None:
    """Train what a recipe says, from where the run's folder stands, to a model in it.

    Every process calls it. Raises what its parts raise: UserError for what the recipe, the data or
    the model have wrong, EnvironmentRefusal, Interrupted with a checkpoint, Diverged.
    """
    if launching.is_main():
        pushing.check(recipe)
    place, settings = models.placement(recipe.model), recipe.training
    suiting.refuse(recipe)
    optimizers.refuse_schedule(settings)
    with launching.first_prepares(run.dir):
        encoder, corpus, heldout = starting.prepared(recipe, run, screen.say)
    lines = (
        *starting.counted(corpus, settings.seed), *starting.mixed(recipe, corpus),
        *starting.few_steps(settings, corpus), *starting.left_out(heldout),
    )  # fmt: skip
    for line in lines:
        screen.say(line)
    accelerator = jobs.accelerator(recipe, run, place)
    with jobs.tracked(accelerator, screen.say):
        _tuned(recipe, run, screen, accelerator, encoder, corpus, heldout)


def _tuned(
    recipe: recipes.Recipe,
    run: runs.Run,
    screen: watching.Watcher,
    accelerator: Accelerator,
    encoder: encoding.Encoder,
    corpus: data.Corpus,
    heldout: data.Corpus | None,
) -> None:
    place, settings = models.placement(recipe.model), recipe.training
    launching.check(accelerator)
    doctor.check(recipe, encoder, screen.say)
    files = starting.base_files(recipe, run)
    cut = _is_cut(recipe, accelerator, screen)
    read = (
        layerwise.read(recipe, place)
        if cut and _reads(recipe, place, accelerator, screen)
        else None
    )
    model, tried = _models(recipe, run, encoder, corpus, place, accelerator, screen, read)
    kernel = tried.config._attn_implementation
    path = starting.path(tried, encoder, corpus, settings, accelerator.autocast)
    screen.say(path.why)
    if tried is not model:
        model.set_attn_implementation(tried.config._attn_implementation)
    if settings.gradient_checkpointing:
        for each in {id(one): one for one in (model, tried)}.values():
            models.recompute(each)
    total, trainable = starting.refuse_untrained(model)
    screen.say(f"model: {total:,} parameters, {trainable:,} of them trained")
    objective = objectives.of(encoder, settings)
    plan = plans.of_run(
        settings,
        corpus,
        world=accelerator.num_processes,
        padded=path.padded,
        alone=path.layout == probing.ALONE,
        changing=objectives.changing(corpus, objective),
    )
    pad_id = encoder.tokenizer.pad_token_id
    job = jobs.Job(model, corpus, heldout, plan, path.collate(pad_id), path)
    if accelerator.is_main_process:
        run.update(
            state="running",
            base=recipe.model.name,
            base_files=files,
            computing=place.why,
            processes=accelerator.num_processes,
            parameters=total,
            trainable=trainable,
            packed=not path.padded,
            path={"layout": path.layout, "head": path.head, "why": path.why},
            data={
                "train": starting.for_the_record(recipe, corpus),
                "heldout": [] if heldout is None else starting.watched(heldout),
            },
            steps=len(plan),
            planned=forecasting.kept(recipe, accelerator.num_processes),
        )
    result = model
    if read is not None:
        result = _cut(recipe, run, job, accelerator, screen, read, tried)
    rehearsing.rehearse(
        recipe, run, job, encoder, accelerator, kernel, screen.say,
        outline=result, answering=tried, cut=cut,
    )  # fmt: skip
    if read is not None:
        sharding.let_go(model)  # held-out rows have left the root whole, which is not trained
        read = tried = None  # the stand-in has served
    elif cut:
        result = _cut(recipe, run, job, accelerator, screen)
    else:
        job = sizing.fitted(job, settings, run, accelerator, screen.say)
    with compiling.layers(job, settings, kernel, accelerator.autocast, screen.say):
        outcome = training.fit(job, settings, run, accelerator, screen)
    screen.end()
    if result is not model:
        sharding.fill(result, model, keep=accelerator.is_main_process)
    if accelerator.is_main_process:
        result.set_attn_implementation(kernel)  # that of packed rows is no part of the result
        finishing.finish(recipe, run, result, encoder, outcome, screen.say)
        # The others have left: what is merged here may take longer than a group waits for one.
        jobs.track_result(accelerator, outcome.steps, asdict(outcome), screen.say)


def _is_cut(recipe: recipes.Recipe, accelerator: Accelerator, screen: watching.Watcher) -> bool:
    if recipe.launch.fsdp and accelerator.num_processes == 1:
        screen.say("launch.fsdp: one process, which holds the whole model; nothing is cut")
        return False
    if recipe.launch.cpu_offload and accelerator.device.type == "cpu":
        screen.say(
            "launch.cpu_offload: this computes on a CPU, in whose memory all parts are anyway"
        )
    return recipe.launch.fsdp


def _cut(
    recipe: recipes.Recipe,
    run: runs.Run,
    job: jobs.Job,
    accelerator: Accelerator,
    screen: watching.Watcher,
    read: layerwise.Read | None = None,
    tried: Any = None,
) -> Any:
    """Cut the model over the processes; returns what its weights are put into when it is trained.

    A whole model has been tried by now for what it is tried for. Of one that is read as it is cut,
    a copy of its stand-in (`tried`) shows that cutting changes nothing.
    """
    result = sharding.outline(job.model)
    layers, lengths = compiling.repeated(job.model), job.corpus.lengths
    middle = np.argsort(lengths, kind="stable")[len(lengths) // 2][None]
    shown = job.model if read is None else copy.deepcopy(tried)
    sharding.cut(
        shown,
        compiling.repeated(shown),
        job.collate(job.corpus, middle).to(accelerator.device),
        job.path.head,
        accelerator,
        recipe.launch,
    )
    if read is not None:
        del shown
        fill = functools.partial(read.fill, device=accelerator.device)
        sharding.cut_as_read(job.model, layers, fill, accelerator, recipe.launch)
    kept = gather_object([sharding.kept(job.model)])
    screen.say(
        f"launch.fsdp: cut over {len(kept)} processes, each keeps up to {max(kept):,} parameters "
        f"and gathers the rest, {len(layers)} layers one by one"
    )
    if accelerator.is_main_process:
        run.update(fsdp={"kept": kept, "layers": len(layers)})
    return result


def _reads(
    recipe: recipes.Recipe,
    place: models.Placement,
    accelerator: Accelerator,
    screen: watching.Watcher,
) -> bool:
    """Whether the model is read as it is cut: where it does not fit each process whole."""
    whole = recipe.model.name is None or layerwise.fits(recipe, place)
    if gradients.least(int(whole), accelerator):  # of all, for they read together
        return False
    why = layerwise.why_whole(recipe)
    if why is not None:
        screen.say(
            f"launch.fsdp: each process has to hold the whole model before it is cut, for {why}; "
            "what is free may not do"
        )
    return why is None


def _models(
    recipe: recipes.Recipe,
    run: runs.Run,
    encoder: encoding.Encoder,
    corpus: data.Corpus,
    place: models.Placement,
    accelerator: Accelerator,
    screen: watching.Watcher,
    read: layerwise.Read | None,
) -> tuple[Any, Any]:
    """The model with its adapter, in what it computes in, and what speaks against it said.

    And the one that is tried for it: the same, or a stand-in of one that is `read` later.
    """
    first, tokenizer = accelerator.is_main_process, encoder.tokenizer
    if read is None:
        model = tried = starting.untrained(recipe, tokenizer, place)
    else:
        model, tried = read.model, read.stand_in
        screen.say(
            "launch.fsdp: too large to be whole in each process, so read layer by layer; tried "
            f"beforehand are {len(compiling.repeated(tried))} of its "
            f"{len(compiling.repeated(model))} layers"
        )
    base = finishing.base_of(recipe, run, model, tokenizer, keep=first)
    models.check_fits(model, corpus, recipe.training.max_length)
    screen.say(f"computing in {place.why}{models.take_threads(model, place)}")
    if recipe.adapter is None:
        return model, tried
    made = [
        adapters.attach(
            each,
            recipe.adapter,
            base=base,
            seed=recipe.training.seed,
            family=encoder.family,
            revision=origins.commit(base, recipe.model.revision),
        )
        for each in ([model] if read is None else [model, tried])
    ]
    model, tried = made[0], made[-1]
    if first:
        adapters.keep_start(model, recipe.adapter, run.dir / finishing.START)
    if recipe.output.merge:
        folding.refuse_unmergeable(tried)
    if encoder.family != families.MASKED:
        for why in adapters.unheard_stop(tried, encoder.stop_id):
            launching.warn(why)
    return model, tried
