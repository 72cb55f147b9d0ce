"""The plan of steps: every row once an epoch, full steps, the same whatever the number of ranks."""

from __future__ import annotations

import numpy as np
import pytest

from itune import plans

LENGTHS = np.random.default_rng(0).integers(3, 60, 200)
TARGETS = LENGTHS // 2


def plan(**changes: object) -> plans.Plan:
    options: dict[str, object] = {
        "tokens_per_step": 400,
        "micro_batch_tokens": 150,
        "epochs": 2,
        **changes,
    }
    return plans.plan(lambda _epoch: np.arange(200), LENGTHS, TARGETS, **options)  # type: ignore[arg-type]


def steps(made: plans.Plan) -> list[plans.Step]:
    return [made.step(number) for number in range(len(made))]


def rows(made: plans.Plan) -> list[int]:
    return [int(r) for step in steps(made) for rank in step.ranks for part in rank for r in part]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_row_is_seen_once_an_epoch(world: int) -> None:
    assert sorted(rows(plan(world=world))) == sorted([*range(200)] * 2)


def test_the_number_of_processes_does_not_change_what_a_step_sees() -> None:
    one, three = plan(), plan(world=3)
    assert len(one) == len(three)
    for a, b in zip(steps(one), steps(three), strict=True):
        assert (a.targets, a.tokens) == (b.targets, b.tokens)


def test_steps_and_micro_batches_keep_their_limits() -> None:
    for step in steps(plan()):
        assert step.tokens <= 400
        for part in step.ranks[0]:
            assert LENGTHS[part].sum() <= 150 or len(part) == 1
    for step in steps(plan(padded=True)):
        for part in step.ranks[0]:
            assert LENGTHS[part].max() * len(part) <= 150 or len(part) == 1


def test_max_steps_and_parts_of_epochs() -> None:
    assert len(plan(max_steps=3)) == 3
    assert len(plan(max_steps=100)) == 100
    assert len(rows(plan(epochs=0.5))) == 100
    assert steps(plan(epochs=1.5))[-1].epoch == pytest.approx(1.5, abs=0.01)
