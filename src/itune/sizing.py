"""How many tokens of a micro-batch a GPU holds: one is tried, and what it took is measured.

Needs torch. Only how a step is cut follows from it, not which rows it has; a CPU's memory is shared
with everything else, and more tokens at a time are no faster there, so it keeps the plan's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator

from itune import (
    batches,
    errors,
    gradients,
    jobs,
    losses,
    memory,
    optimizers,
    probing,
    recipes,
    runs,
)

SHARE = 0.9  # of the free memory is filled. chosen: allocators lose some of it between blocks


def fitted(
    job: jobs.Job,
    settings: recipes.Training,
    run: runs.Run,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> jobs.Job:
    """The job with micro-batches as large as every process's memory holds, tried on this one's.

    A run that goes on keeps those that it began with. `training.micro_batch_tokens` decides where
    it is set. Gradients and random state are as before. Raises EnvironmentRefusal for a row that
    does not fit alone.
    """
    given = settings.micro_batch_tokens is not None or job.path.layout == probing.ALONE
    if given or memory.left(accelerator.device) is None:
        return job
    chosen = int(run.manifest.get("micro_batch_tokens", 0))
    if not chosen:
        own, why = _tried(job, settings, accelerator)
        chosen = gradients.least(own, accelerator)
        say(f"micro-batches: up to {chosen:,} tokens ({why})")
        if accelerator.is_main_process:
            run.update(micro_batch_tokens=chosen)
    return replace(job, plan=replace(job.plan, micro_batch_tokens=chosen))


def _tried(job: jobs.Job, settings: recipes.Training, accelerator: Accelerator) -> tuple[int, str]:
    """Tokens that this process's memory holds, and how that was found."""
    plan, device = job.plan, accelerator.device
    trained = sum(p.nbytes for p in job.model.parameters() if p.requires_grad)
    kept = trained + optimizers.state_bytes(job.model, settings)  # gradients and moments, to come
    rows = plan.rows(0)
    rows = rows[(-plan.lengths[rows]).argsort(kind="stable")]
    while True:
        limit = plan.micro_batch_tokens
        first = batches.micro_batches(rows, plan.lengths, limit, padded=plan.padded)[0]
        try:
            took = _took(job, first, accelerator)
            break
        except (RuntimeError, MemoryError) as error:
            if not memory.is_short(error):
                raise
            why = memory.told(error)
        memory.free()
        half = plan.half(first)
        if not half:
            raise errors.EnvironmentRefusal(alone(job, int(first[0]), settings, device, why))
        plan = replace(plan, micro_batch_tokens=half)
    cost = plan.cost(first)
    free = memory.left(device) or 0
    room = SHARE * free - kept
    most = -(-settings.tokens_per_step // plan.world)
    held = int(room * cost / max(took, 1))
    found = f"{cost:,} took {took / 1e9:.2f} GB of the {free / 1e9:.1f} GB that are free"
    return max(1, min(most, held)), found


def alone(
    job: jobs.Job, row: int, settings: recipes.Training, device: torch.device, why: str
) -> str:
    """What the user is told of a row that does not fit the memory alone."""
    corpus = job.corpus
    row %= len(corpus)  # each visit of an example that changes has a number of its own
    path = corpus.sources[int(corpus.source[row])].path
    return (
        f"{path} row {int(corpus.row[row]) + 1}: its {int(corpus.lengths[row]):,} tokens alone do "
        f"not fit the memory of {device} ({why}). Lower training.max_length "
        f"({settings.max_length}), set training.gradient_checkpointing, or train an adapter."
    )


def _took(job: jobs.Job, rows: np.ndarray, accelerator: Accelerator) -> int:
    """Bytes beyond weights and gradients that a micro-batch needs at most."""
    drawn, training = memory.Drawn(), job.model.training
    job.model.train()
    try:
        # There from the start, as for all but a step's first: the most memory is in use when some
        # of them are not made yet.
        for p in job.model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        with memory.Peak(accelerator.device) as peak:
            batch = job.collate(job.corpus, rows).to(accelerator.device)
            with accelerator.autocast():
                loss = losses.summed(job.model, batch, head=job.path.head)
            loss.backward()
        return peak.bytes
    finally:
        job.model.train(training)
        for p in job.model.parameters():
            p.grad = None
        drawn.restore()
