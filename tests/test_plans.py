"""The plan of steps: every row once an epoch, full steps, the same whatever the number of ranks."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


def of_step(step: plans.Step) -> list[int]:
    return [int(row) for rank in step.ranks for part in rank for row in part]


def rows(made: plans.Plan) -> list[int]:
    return [row for step in steps(made) for row in of_step(step)]


def shuffled(count: int, seed: int) -> Callable[[int], np.ndarray]:
    return lambda epoch: np.random.default_rng([seed, epoch]).permutation(count)


def one_by_one(orders: list[np.ndarray], lengths: np.ndarray, limit: int) -> list[list[int]]:
    """The rule in its plainest words: a row that does not fit any more begins the next step."""
    made: list[list[int]] = []
    held = limit + 1
    for row in np.concatenate(orders).tolist():
        if not made or held + lengths[row] > limit:
            made.append([])
            held = 0
        made[-1].append(row)
        held += lengths[row]
    return made


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    limit=st.integers(1, 200),
    micro=st.integers(1, 120),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 9),
    padded=st.booleans(),
)
def test_what_a_step_sees_follows_from_lengths_seed_epoch_and_tokens_alone(
    lengths: list[int], limit: int, micro: int, epochs: int, seed: int, padded: bool
) -> None:
    sizes = np.array(lengths)
    orders = shuffled(len(sizes), seed)
    expected = one_by_one([orders(epoch) for epoch in range(epochs)], sizes, limit)
    for world, one_micro in ((1, micro), (2, micro), (4, 1000), (8, micro)):
        made = plans.plan(
            orders,
            sizes,
            sizes - 1,
            tokens_per_step=limit,
            micro_batch_tokens=one_micro,
            epochs=epochs,
            world=world,
            padded=padded,
        )
        found = steps(made)
        assert [sorted(of_step(step)) for step in found] == [sorted(part) for part in expected]
        assert [step.tokens for step in found] == [int(sizes[part].sum()) for part in expected]
        assert [step.targets for step in found] == [
            int((sizes[part] - 1).sum()) for part in expected
        ]
        assert sorted(rows(made)) == sorted([*range(len(sizes))] * epochs)
        for step in found:
            for rank in step.ranks:
                for part in rank:
                    cost = sizes[part].max() * len(part) if padded else sizes[part].sum()
                    assert cost <= one_micro or len(part) == 1
        assert found[-1].epoch == epochs


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=8, max_size=60),
    world=st.sampled_from([2, 4, 8]),
)
def test_ranks_finish_together(lengths: list[int], world: int) -> None:
    sizes = np.array(lengths)
    made = plans.plan(
        shuffled(len(sizes), 0),
        sizes,
        sizes,
        tokens_per_step=10_000,
        micro_batch_tokens=50,
        world=world,
    )
    for step in steps(made):
        loads = [sum(int(sizes[part].sum()) for part in rank) for rank in step.ranks]
        assert max(loads) - min(loads) <= sizes.max()
        # As many micro-batches as the others, unless it has fewer rows than these.
        counts = [len(rank) for rank in step.ranks]
        whole = [sum(map(len, rank)) for rank in step.ranks]
        assert counts == [min(max(counts), rows_) for rows_ in whole]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_step_alone_is_the_step_of_the_whole(draw: st.DataObject) -> None:
    """Resuming asks for step k first; the order in which steps are asked for changes nothing."""
    made, again = (
        plans.plan(
            shuffled(200, 1),
            LENGTHS,
            TARGETS,
            tokens_per_step=300,
            micro_batch_tokens=100,
            epochs=4,
            world=2,
        )
        for _ in range(2)
    )
    known = steps(made)
    for number in draw.draw(st.lists(st.integers(0, len(known) - 1), min_size=1, max_size=8)):
        assert of_step(again.step(number)) == of_step(known[number])


def test_max_steps_and_parts_of_epochs() -> None:
    assert len(plan(max_steps=3)) == 3
    assert len(plan(max_steps=100)) == 100
    assert len(rows(plan(epochs=0.5))) == 100
    assert steps(plan(epochs=1.5))[-1].epoch == pytest.approx(1.5, abs=0.01)


def test_a_step_may_see_several_epochs_of_few_rows() -> None:
    made = plan(tokens_per_step=int(LENGTHS.sum()) * 3, epochs=7)
    assert len(made) == 3
    assert sorted(rows(made)) == sorted([*range(200)] * 7)


@pytest.mark.parametrize("at_once", [1, 7, 64])
def test_rows_are_cut_the_same_however_many_at_once(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = plan(epochs=3)
    monkeypatch.setattr(plans, "_AT_ONCE", at_once)
    parts = plan(epochs=3)
    assert parts.cuts.tolist() == whole.cuts.tolist()
    assert parts.tokens_at.tolist() == whole.tokens_at.tolist()
    assert parts.targets_at.tolist() == whole.targets_at.tolist()
    assert rows(parts) == rows(whole)


def test_a_thousand_ranks_hardly_wait_for_the_slowest() -> None:
    """Also where attention counts, which grows with the square of a row's length: a model 2,048
    wide, 16,384 tokens a rank, rows of up to 2,048."""
    world, draw = 1024, np.random.default_rng(0)
    sizes = np.clip(draw.lognormal(5.0, 0.8, 150_000), 8, 2048).astype(np.int64)
    made = plans.plan(
        lambda _epoch: np.arange(len(sizes)),
        sizes,
        sizes,
        tokens_per_step=world * 16_384,
        micro_batch_tokens=8192,
        max_steps=1,
        world=world,
    )
    (step,) = steps(made)
    for costs in (sizes, sizes * (1 + sizes / (12 * 2048))):
        loads = np.array([sum(costs[part].sum() for part in rank) for rank in step.ranks])
        assert 1 - loads.mean() / loads.max() < 0.01


def test_a_plan_takes_no_object_a_row() -> None:
    """A million rows in under 100 MB: ten million in under a gigabyte."""
    count = 1_000_000
    lengths = np.random.default_rng(0).integers(20, 400, count)
    order = np.random.default_rng(1).permutation(count)
    tracemalloc.start()
    try:
        made = plans.plan(
            lambda _epoch: order,
            lengths,
            lengths,
            tokens_per_step=16_384,
            micro_batch_tokens=8192,
            epochs=2,
        )
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000_000
    assert kept < 10_000_000
    assert made.tokens == 2 * lengths.sum()
