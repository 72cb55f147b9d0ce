"""A few micro-batches of a run, computed here with random weights: how long, in how much memory.

Needs torch. Random weights cost what trained ones do. A model that is too large to be tried whole
is tried with one layer and with two; each further layer costs what the second does.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from itune import (
    data,
    encoding,
    jobs,
    losses,
    memory,
    models,
    optimizers,
    outlines,
    plans,
    probing,
    recipes,
    starting,
)

LEAST, MOST = 3.0, 12.0  # chosen: seconds of trying that settle a mean, and that one waits for
LOOKED_AT = 100  # steps
NEARLY = 0.9  # of a micro-batch's tokens
PLACES = (1 / 6, 1 / 2, 5 / 6)  # of the run, at which steps are looked at


@dataclass(frozen=True, slots=True)
class Trial:
    """What a model was found to need. per_token: seconds for a token of a micro-batch, forward and
    backward; per_step: seconds for what is left of a step, the optimizer's part; held: bytes beyond
    those before there was a model, at most; layers: how many it had, None for all.
    """

    path: probing.Path
    per_token: float
    per_step: float
    held: int
    layers: int | None
    trained: int


def autocast(place: models.Placement) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """In what a run computes where that is not what its weights are kept in."""
    if not jobs.mixed(place):
        return contextlib.nullcontext
    return lambda: torch.autocast(place.device.type, torch.bfloat16)


def trial(make: Callable[[], Bench], place: models.Placement, layers: int | None) -> Trial:
    """Try what `make` gives, a model with so many layers (None: all) on the rows of a run.

    Raises what a model raises whose memory is too small.
    """
    with memory.Peak(place.device) as peak:
        bench = make()
        # The largest first: it shows the most memory, and what the first one costs beside.
        for _ in range(2):  # in the second, the optimizer's state is there
            bench.compute(heaviest(bench.plan))
            bench.step()
            bench.optimizer.zero_grad()
        per_token = _mean(typical(bench.plan), bench)
        per_step = sorted(bench.step() for _ in range(3))[1]
    path, trained = bench.path, models.count(bench.model)[1]
    del bench
    memory.free()
    return Trial(path, per_token, per_step, peak.bytes, layers, trained)


class Bench:
    """A model with random weights, and what is computed with it, timed.

    `planned`: the plan of steps for a path.
    """

    def __init__(
        self,
        recipe: recipes.Recipe,
        settings: Any,
        encoder: encoding.Encoder,
        corpus: data.Corpus,
        place: models.Placement,
        planned: Callable[[probing.Path], plans.Plan],
    ) -> None:
        self.place, self.corpus, self.training = place, corpus, recipe.training
        self.cast = autocast(place)
        self.model = outlines.model(recipe, settings, place, place.device)
        models.take_threads(self.model, place)
        self.path = starting.path(self.model, encoder, corpus, recipe.training, self.cast)
        self.collate = self.path.collate(encoder.tokenizer.pad_token_id)
        self.plan = planned(self.path)
        self.optimizer = optimizers.optimizer(self.model, recipe.training)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.model.train()

    def compute(self, rows: np.ndarray) -> float:
        """Add a micro-batch's gradient; returns the seconds it took."""
        batch = self.collate(self.corpus, rows).to(self.place.device)
        began = _now(self.place)
        with self.cast():
            loss = losses.summed(self.model, batch, head=self.path.head, balance=True)
        loss.backward()
        return _now(self.place) - began

    def step(self) -> float:
        """The optimizer's part of a step; returns the seconds it took."""
        began = _now(self.place)
        limit = self.training.max_grad_norm or math.inf
        torch.nn.utils.clip_grad_norm_(self.trained, limit)
        self.optimizer.step()
        return _now(self.place) - began


def _mean(parts: Sequence[np.ndarray], bench: Bench) -> float:
    """Seconds a token over micro-batches, again and again until they have taken long enough."""
    seconds, tokens, began = 0.0, 0, time.monotonic()
    while True:
        for rows in parts:
            seconds += bench.compute(rows)
            tokens += bench.plan.cost(rows)
            if tokens and time.monotonic() - began > MOST:
                return seconds / tokens
        if time.monotonic() - began > LEAST:
            return seconds / tokens


def _now(place: models.Placement) -> float:
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)
    return time.monotonic()


def typical(plan: plans.Plan) -> list[np.ndarray]:
    """The rows of a few micro-batches, long ones and short ones, from all over a run."""
    found = []
    for place in PLACES:
        parts = plan.step(int(place * (len(plan) - 1))).ranks[0]
        found += [parts[k] for k in sorted({0, len(parts) // 2, len(parts) - 1})]
    return found


def heaviest(plan: plans.Plan) -> np.ndarray:
    """The rows of the micro-batch that needs the most memory of some steps all over a run.

    Of those that have nearly as many tokens as the largest, the one with the longest rows:
    attention may hold a number for every two tokens of a row.
    """
    parts = _some(plan)
    least = NEARLY * max(map(plan.cost, parts))
    large = [part for part in parts if plan.cost(part) >= least]
    return max(large, key=lambda rows: _pairs(plan, rows))


def _pairs(plan: plans.Plan, rows: np.ndarray) -> int:
    """Pairs of tokens of a row, over the rows of a micro-batch, padding among them where it is."""
    lengths = plan.lengths[rows].astype(np.int64)
    return int(lengths.max() ** 2 * len(lengths) if plan.padded else np.square(lengths).sum())


def most_tokens(plan: plans.Plan) -> int:
    """The tokens of the largest micro-batch of some steps all over a run."""
    return max(map(plan.cost, _some(plan)))


def _some(plan: plans.Plan) -> list[np.ndarray]:
    """The micro-batches of some steps all over a run, the first and the last among them."""
    steps = np.unique(np.linspace(0, len(plan) - 1, min(LOOKED_AT, len(plan))).astype(int))
    return [part for k in steps for part in plan.step(int(k)).ranks[0]]


def operations_a_second(place: models.Placement) -> float:
    """What a device does at its best: a large matrix product, in the dtype of a run."""
    size = 8192 if place.device.type == "cuda" else 1024
    a = torch.randn(size, size, device=place.device, dtype=place.dtype)
    best = math.inf
    for _ in range(5):
        began = _now(place)
        for _ in range(3):
            a @ a
        best = min(best, (_now(place) - began) / 3)
    return 2 * size**3 / best


def tokens(parameters: int, speed: float) -> float:
    """Tokens of a micro-batch that is soon computed: six operations a token and parameter
    (https://arxiv.org/abs/2001.08361), of which those of the embeddings make up for what is lost.
    """
    return MOST * speed / (6 * parameters)
