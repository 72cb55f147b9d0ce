"""What is trained on what: the parts of a run put together, and its held-out loss.

Needs torch.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

from itune import batches, beats, errors, losses, models, plans, probing, recipes, runs, sharding

if TYPE_CHECKING:
    from itune import data


Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What is trained on what: everything but the settings."""

    model: Any
    corpus: data.Corpus
    heldout: data.Corpus | None
    plan: plans.Plan
    collate: batches.Collate
    path: probing.Path


def accelerator(recipe: recipes.Recipe, run: runs.Run, place: models.Placement) -> Accelerator:
    """Accelerate's handle on processes, precision and trackers, for a run of a recipe."""
    trackers = list(recipe.tracking.log_with)
    if recipe.launch.cpu_offload and place.device.type == "cuda" and "LOCAL_RANK" in os.environ:
        # Accelerate would make a group for GPUs alone, and parts on the CPU are summed too.
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=_longest_wait(recipe))
    made = Accelerator(
        cpu=place.device.type == "cpu",
        mixed_precision="bf16" if mixed(place) else "no",
        # What the environment says of these would be done beside what the recipe says.
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=trackers or None,
        project_dir=str(recipe.output.dir) if trackers else None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_longest_wait(recipe))],
    )
    if trackers:
        try:
            with _printing_aside():
                made.init_trackers(recipe.tracking.project_name, init_kwargs=_named(run))
        except Exception as error:  # each tracker has faults of its own kind
            said = _told(error)
            raise errors.EnvironmentRefusal(
                f"tracking.log_with: {', '.join(trackers)} cannot be started: {said}. Mend that, "
                "or leave it out."
            ) from error
    return made


def mixed(place: models.Placement) -> bool:
    """Whether trained weights are kept in more bits than they are computed with.

    So it is beside an adapter too: without it what the adapter adds would be computed in float32,
    and a base in few bits, whose norms are float32, would hand float32 to all that follows.
    """
    return place.dtype == torch.bfloat16


def _longest_wait(recipe: recipes.Recipe) -> datetime.timedelta:
    """How long a collective call may wait: for whom the beats do not tell of, such as a machine
    that is gone while the first process loads or saves. On a CPU the library would set none."""
    return datetime.timedelta(seconds=max(2 * recipe.launch.hang_timeout, 1800))


@contextlib.contextmanager
def tracked(accelerator: Accelerator, say: Say) -> Iterator[None]:
    """Close each tracker's run in the end, however that comes: what it was told is then kept.

    One that cannot is told of and in nobody's way; the process group stays for others to use.
    """
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            try:
                with _printing_aside():
                    tracker.finish()
            except Exception as error:  # each tracker has faults of its own kind
                say(f"{tracker.name}: its run was not closed: {_told(error)}")


def track_result(accelerator: Accelerator, step: int, result: Mapping[str, Any], say: Say) -> None:
    """Give each tracker the finite numbers of a finished run's result, as `final/NAME`."""
    numbers = {
        f"final/{name}": value
        for name, value in result.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    for tracker in accelerator.trackers:
        try:
            tracker.log(numbers, step=step)
        except Exception as error:  # the run is finished and stays so
            say(f"{tracker.name}: does not take the result: {_told(error)}")


def track_scores(
    recipe: recipes.Recipe, run: runs.Run, name: str, tasks: Mapping[str, Any], say: Say
) -> None:
    """Give each tracker of a run the finite scores of an evaluation, as `eval/TASK/METRIC`.

    `name`: the evaluation's folder; one that is not `all` is called so too. The process has no
    Accelerator, so each tracker is started for itself, beside what training told it.
    """
    from accelerate import PartialState, tracking

    head = "eval" if name == "all" else f"eval-{name}"
    scores = {
        f"{head}/{task.replace(' ', '-')}/{key}": score["value"]
        for task, found in tasks.items()
        for key, score in found["scores"].items()
        if math.isfinite(score["value"])
    }
    PartialState(cpu=True)  # the trackers' own log asks for it
    for each in recipe.tracking.log_with:
        try:
            kind: Any = tracking.LOGGER_TYPE_TO_CLASS[each]
            place = [str(run.dir)] if kind.requires_logging_directory else []
            tracker = kind(recipe.tracking.project_name, *place, **_named(run).get(each, {}))
            tracker.main_process_only = False  # this one is it, and there is no group to ask
            with _printing_aside():
                tracker.start()
                tracker.log(scores, step=run.manifest.get("steps"))
                tracker.finish()
        except Exception as error:  # the scores are kept in the run's folder all the same
            say(f"{each}: does not take the scores: {_told(error)}")


def _named(run: runs.Run) -> dict[str, dict[str, Any]]:
    """How trackers call the run that would draw a name for it, so that it goes on as the same."""
    name = f"{run.dir.name}-{str(run.manifest['id'])[:8]}"
    return {"trackio": {"name": name, "resume": "allow"}}


@contextlib.contextmanager
def _printing_aside() -> Iterator[None]:
    """What a tracker prints goes to standard error: standard output is for the result alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _told(error: Exception) -> str:
    return errors.shown(" ".join(str(error).split()) or type(error).__name__)


# --- measuring ----------------------------------------------------------------------------


@torch.compiler.set_stance("force_eager")  # type: ignore[untyped-decorator]
@torch.no_grad()
def measure(
    job: Job, corpus: data.Corpus, accelerator: Accelerator, *, most: int | None = None
) -> float:
    """Mean loss in nats over a corpus's targets, the same on every rank.

    `most`: take so many micro-batches a rank, those of the longest rows; the mean is theirs.
    """
    model = job.model
    was_training = model.training
    model.eval()
    lengths = corpus.lengths
    order = np.argsort(-lengths, kind="stable")
    limit = job.plan.micro_batch_tokens
    pieces = batches.micro_batches(order, lengths, limit, padded=job.path.padded)
    if most is not None:
        pieces = pieces[: most * accelerator.num_processes]
    total = torch.zeros((), dtype=torch.float64)
    own = pieces[accelerator.process_index :: accelerator.num_processes]
    # The processes of a cut model need each other in every pass.
    idle = -(-len(pieces) // accelerator.num_processes) - len(own) if sharding.is_cut(model) else 0
    for k, rows in enumerate([*own, *pieces[:1] * idle]):
        batch = job.collate(corpus, rows).to(accelerator.device)
        with accelerator.autocast():
            loss = losses.summed(model, batch, head=job.path.head)
        if k < len(own):
            total += loss.double().cpu()
        beats.PULSE.beat()
    model.train(was_training)
    with beats.PULSE.meeting():
        summed = accelerator.reduce(total.to(accelerator.device, torch.float64), "sum")
    return float(summed) / max(1, int(corpus.targets[np.concatenate(pieces)].sum()))
