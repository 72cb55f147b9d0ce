"""What a run leaves: its model, the base it needs, the card, and the adapter folded in.

Needs torch.
"""

from __future__ import annotations

import datetime
import math
import resource
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from itune import (
    adapters,
    cards,
    configs,
    encoding,
    errors,
    families,
    folding,
    generation,
    locating,
    memory,
    models,
    origins,
    recipes,
    reports,
    runs,
    storage,
    watching,
)

Say = Callable[[str], None]
ROOM = 1.2  # chosen: of a model's weights, for one that answers a few short prompts
START = ".start"  # an adapter before its first step, where saving needs it
# What a merged model is tried on. chosen: a question, a word alone, scripts, numbers and signs.
SAMPLES = (
    "What is shown here?",
    "yes",
    "Zwölf Boxkämpfer jagen 17.5 % der Füchse; 你好, 世界!",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 40))\n",
)
NO_CACHE: dict[str, Any] = {"use_cache": False}


def base_of(
    recipe: recipes.Recipe, run: runs.Run, model: Any, tokenizer: Any, *, keep: bool
) -> str:
    """The name of the model that an adapter goes on, as its config keeps it: an id or a folder.

    Where the recipe names an adapter, it was folded into its own base: that is written to the
    run's `base/`, since nobody else has it (by the process that is told to `keep` it). Random
    weights are too.
    """
    if recipe.adapter is None:
        return recipe.name
    if recipe.model.name is not None:
        location = locating.resolve(recipe.model.name, recipe.model.revision)
        if locating.adapter_of(location) is None:
            # A path relative to where one stands would be found from there alone.
            return str(Path(location).absolute()) if Path(location).is_dir() else location
    folder = run.dir / "base"
    if keep and not folder.is_dir():
        staged = run.dir / ".base"
        storage.DISK.produce(staged, model.save_pretrained)
        storage.DISK.produce(staged, tokenizer.save_pretrained)
        storage.publish(staged, folder)
    return str(folder.absolute())


def finish(
    recipe: recipes.Recipe,
    run: runs.Run,
    model: Any,
    encoder: encoding.Encoder,
    outcome: watching.Outcome,
    say: Say,
) -> None:
    """Write the model, say that the run is finished, and merge where that is asked for.

    Raises ModelError when the merged model would answer otherwise; the run is finished then too.
    """
    staged = run.dir / ".model"
    model.eval()
    if encoder.family != families.MASKED:
        model.generation_config = generation.settings(recipe.generation, encoder)
        start = getattr(model.config, "decoder_start_token_id", None)
        model.generation_config.decoder_start_token_id = start
        model.config.use_cache = True
    start = run.dir / START
    storage.DISK.produce(staged, lambda there: adapters.save(model, recipe.adapter, there, start))
    if encoder.family != families.MASKED:
        storage.DISK.produce(staged, model.generation_config.save_pretrained)
    storage.DISK.produce(staged, encoder.tokenizer.save_pretrained)
    run.update(
        origin=origins.of(recipe, encoder.family),
        memory=_memory(),
        **asdict(outcome),
    )
    kind = cards.ADAPTER if recipe.adapter else cards.WHOLE
    storage.write(staged / cards.NAME, cards.render(run, kind))
    if run.model_dir.is_dir():  # of a run that was killed before it said that it is finished
        storage.DISK.remove(run.model_dir)
    storage.publish(staged, run.model_dir)
    if (run.dir / START).is_dir():
        storage.DISK.remove(run.dir / START)
    now = datetime.datetime.now(datetime.timezone.utc)
    run.update(state="finished", finished=now.isoformat("T", "microseconds"))
    heldout = "" if outcome.heldout_loss is None else f", held-out loss {outcome.heldout_loss:.4f}"
    if heldout and run.manifest["command"] == "pretrain":
        # Of hidden tokens alone where the model is no decoder.
        name = "perplexity" if encoder.family == families.CAUSAL else "pseudo-perplexity"
        heldout += f", {name} {math.exp(min(outcome.heldout_loss or 0.0, 700.0)):.2f}"
    say(
        f"done: {outcome.steps} steps, {outcome.tokens:,} tokens in {outcome.seconds:.0f} s "
        f"({outcome.tokens / max(outcome.seconds, 1e-9):,.0f} a second)"
    )
    if planned := run.manifest.get("planned"):
        say(_beside(planned, run.manifest["memory"], outcome.seconds))
    say(f"loss {outcome.loss:.4f} over the last twentieth{heldout}{_chosen(outcome)}")
    if recipe.output.merge and recipe.adapter is not None:
        merge(run, say)
    say(f"the model is in {run.model_dir}, a report in {reports.write(run)}")


def _chosen(outcome: watching.Outcome) -> str:
    if outcome.best_step is None:
        return ""
    return (
        f", the lowest: the weights are those of step {outcome.best_step}. The held-out rows chose "
        "them, so a score on other rows says more"
    )


def _beside(planned: Mapping[str, Any], held: Mapping[str, int], seconds: float) -> str:
    """What a run took beside what its plan said."""
    took = held["device"] or held["process"]
    return (
        f"as planned, and as it was: {planned['seconds']:.0f} and {seconds:.0f} s, "
        f"{planned['memory_bytes']['peak'] / 1e9:.2f} and {took / 1e9:.2f} GB at most"
    )


def _memory() -> dict[str, int]:
    """The most that this process held at any time, in bytes: of the machine and of its device."""
    unit = 1 if sys.platform == "darwin" else 1024
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {
        "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "device": device,
    }


def merge(run: runs.Run, say: Say) -> None:
    """Fold a finished run's adapter into its base, as the base was before any quantisation.

    What was saved is read again, and has to answer as the adapter on its base does: raises
    ModelError where it does not, and leaves no merged folder of it.
    """
    named = recipes.Model(name=str(run.model_dir))
    encoder, place = configs.encoder(named), _roomy(named)
    model = models.adapted(str(run.dir), str(run.model_dir), named, place)
    staged, folder = run.dir / ".merged", run.dir / "merged"
    samples = [_sample(encoder, text, place) for text in SAMPLES]
    wanted = folding.logits(model, samples)
    storage.DISK.produce(staged, folding.merged(model).save_pretrained)
    del model  # one of the two at a time in memory
    try:
        whole = models.load(recipes.Model(name=str(staged)), place)
        difference = folding.proved(wanted, folding.logits(whole, samples), folder)
    except errors.ModelError:
        storage.DISK.remove(staged)
        raise
    storage.DISK.produce(staged, encoder.tokenizer.save_pretrained)
    if encoder.family != families.MASKED:
        shutil.copy(run.model_dir / "generation_config.json", staged)
    storage.write(staged / cards.NAME, cards.render(run, cards.MERGED))
    if folder.is_dir():
        storage.DISK.remove(folder)
    storage.publish(staged, folder)
    say(f"merged: logits within {difference:.1e} of the adapter's; the model is in {folder}")


def _roomy(named: recipes.Model) -> models.Placement:
    """Where a model fits beside the trained one, which is in memory still: a GPU, or the CPU."""
    place = models.placement(named)
    room = memory.left(place.device)
    if room is None or ROOM * models.size(named) * place.dtype.itemsize < room:
        return place
    return replace(place, device=torch.device("cpu"))


def _sample(encoder: encoding.Encoder, text: str, place: models.Placement) -> dict[str, Any]:
    """What a model of the encoder's family is called with for a text."""
    ids = torch.tensor([encoder.text_ids(text)], device=place.device)
    made: dict[str, Any] = {"input_ids": ids}
    if encoder.family != families.MASKED:
        made.update(NO_CACHE)
    if encoder.family == families.SEQ2SEQ:
        made["decoder_input_ids"] = ids
    return made
