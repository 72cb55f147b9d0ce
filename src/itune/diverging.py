"""What a user is told when the loss stays non-finite: after which rows, and what is whole."""

from __future__ import annotations

import itertools

import numpy as np

from itune import beats, checkpoints, errors, jobs, plans, runs

MAX_BAD_STEPS = 3
NAMED = 8  # chosen: rows that are named; a step may have thousands


def error(
    job: jobs.Job, run: runs.Run, step: plans.Step, number: int, found: str, rate: float
) -> errors.Diverged:
    """The error after the last of the bad steps, of that number; `found`: its loss and gradient."""
    return errors.Diverged(
        f"{run.dir}: the loss is not finite for {MAX_BAD_STEPS} steps running, the last of them "
        f"{number} ({found}), of {_rows(job, step)}. {_whole(run)} Look at these rows, lower "
        f"training.learning_rate ({rate}), and start with --fresh."
    )


def _rows(job: jobs.Job, step: plans.Step) -> str:
    """The rows of a step, by source and number as an editor counts them."""
    corpus, batches = job.corpus, itertools.chain.from_iterable(step.ranks)
    # Each visit of an example that changes has a number of its own.
    examples = np.concatenate([*batches, np.zeros(0, np.int64)]) % len(corpus)
    found = sorted({(int(corpus.source[k]), int(corpus.row[k]) + 1) for k in examples})
    named = [
        f"{corpus.sources[source].path} row{'s' * (len(some) > 1)} {', '.join(map(str, some))}"
        for source, group in itertools.groupby(found[:NAMED], lambda each: each[0])
        for some in ([row for _, row in group],)
    ]
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return f"{'; '.join(named)}{more}"


def _whole(run: runs.Run) -> str:
    try:
        with beats.PULSE.working(False):  # as long as a large one takes to be read
            path, _ = checkpoints.latest(run.checkpoints, str(run.manifest["id"]))
    except errors.RunError:
        path = None
    return "No checkpoint is whole." if path is None else f"The last good checkpoint is {path}."
