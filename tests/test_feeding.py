"""Micro-batches made ahead: in order, from any step on, with what fails said where it is needed."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from itune import batches, data, encoding, feeding, plans

CPU = torch.device("cpu")


def corpus() -> data.Corpus:
    return data.from_tokens([encoding.Tokens([9] * n, [True] * n) for n in range(2, 40)])


def planned(made: data.Corpus) -> plans.Plan:
    return plans.plan(
        lambda epoch: np.random.default_rng(epoch).permutation(len(made)),
        made.lengths,
        made.targets,
        tokens_per_step=120,
        micro_batch_tokens=50,
        epochs=2,
        world=2,
    )


def feed(collate: batches.Collate = batches.packed, start: int = 0) -> feeding.Feed:
    made = corpus()
    return feeding.Feed(planned(made), made, collate, rank=1, start=start, device=CPU)


@pytest.mark.parametrize("start", [0, 3])
def test_it_gives_the_plan_s_micro_batches_in_order(start: int) -> None:
    made = corpus()
    plan = planned(made)
    with feed(start=start) as fed:
        for number in range(start, len(plan)):
            step = fed.step()
            assert step.tokens == plan.step(number).tokens
            mine = plan.step(number).ranks[1]
            for rows, (got, batch) in zip(mine, fed.batches(len(mine)), strict=True):
                assert got.tolist() == rows.tolist()
                assert torch.equal(batch.ids, batches.packed(made, rows).ids)
    assert fed.waited > 0


def test_it_ends_with_its_run_whether_or_not_all_was_used() -> None:
    with feed() as fed:
        fed.step()
    assert not any(thread.name == "itune-feed" for thread in threading.enumerate())


def test_what_fails_in_the_thread_is_raised_in_the_step() -> None:
    def broken(_corpus: data.Corpus, _rows: Any) -> batches.Batch:
        raise OSError("the disk is gone")

    with feed(broken) as fed:
        step = fed.step()
        with pytest.raises(OSError, match="the disk is gone"):
            list(fed.batches(len(step.ranks[1])))
