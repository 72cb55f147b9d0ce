"""How often intervals hold the truth, how often alike systems are called different, and how fast.

python benchmarks/coverage.py [coverage|alike|speed]...

Sets of rows are drawn from a population of 20,000 whose scores are known, so each simulated set
has a truth: the metric over the whole population. `coverage`: the share of 95 % intervals that
hold it. `alike`: two systems that answer each row by the same chances; the share of trials with
p < 0.05.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from itune import metrics, resampling
from itune.metrics import perplexity, sufficient

METRICS = ("accuracy", "f1", "bleu", "rougeL", "squad_f1")
LOSSES = {"perplexity": perplexity.Perplexity, "bits_per_byte": perplexity.BitsPerByte}
SIZES = (200, 1000)
TRIALS = 500
POPULATION = 20_000
WORDS = ["the", "a", "cat", "dog", "sat", "on", "ran", "to", "old", "red", "house", "mat", "in"]
WORDS += ["of", "and", "with", "small", "garden", "today", "it"]


def texts(n: int, seed: int) -> tuple[list[str], list[list[str]]]:
    """Answers of unlike length and rightness to references of 5 to 20 words; some are perfect."""
    draw = random.Random(seed)
    golds_of = random.Random(1)
    said, golds = [], []
    for _ in range(n):
        gold = golds_of.choices(WORDS, k=golds_of.randint(5, 20))
        kept = draw.betavariate(2, 1)
        words = [word if draw.random() < kept else draw.choice(WORDS) for word in gold]
        said.append(" ".join(words[: draw.randint(len(words) // 2, len(words))]))
        golds.append([" ".join(gold)])
    return said, golds


def labels(n: int, seed: int) -> tuple[list[str], list[list[str]]]:
    """Answers to four classes of unlike size, the rarer the more often wrong."""
    draw, golds_of = random.Random(seed), random.Random(1)
    names, sizes, right = ["a", "b", "c", "d"], [50, 30, 13, 7], [0.95, 0.85, 0.8, 0.6]
    said, golds = [], []
    for _ in range(n):
        gold = golds_of.choices(range(4), sizes)[0]
        other = draw.choice([k for k in range(4) if k != gold])
        said.append(names[gold if draw.random() < right[gold] else other])
        golds.append([names[gold]])
    return said, golds


def losses(n: int, seed: int) -> tuple[list[float], list[list[int]]]:
    """Summed losses of texts of 20 to 500 tokens."""
    draw = random.Random(seed)
    tokens = [draw.randint(20, 500) for _ in range(n)]
    return [draw.gauss(3, 0.5) * count for count in tokens], [[count] for count in tokens]


def cases(name: str, n: int, seed: int) -> tuple[Any, Any]:
    """Predictions and references as a metric takes them."""
    if name in ("accuracy", "f1", "matthews_correlation"):
        return labels(n, seed)
    return losses(n, seed) if name in LOSSES else texts(n, seed)


def metric_of(name: str) -> sufficient.SufficientMetric:
    """A metric of itune's own, those of plain text too."""
    metric = LOSSES[name]() if name in LOSSES else metrics.load(name)
    assert isinstance(metric, sufficient.SufficientMetric)
    return metric


def population(name: str, seed: int) -> tuple[sufficient.SufficientMetric, np.ndarray]:
    """A metric and its statistics over all rows."""
    metric = metric_of(name)
    return metric, metric.statistics(*cases(name, POPULATION, seed)).astype(np.float64)


def coverage(name: str, size: int, trials: int = TRIALS) -> float:
    """The share of simulated sets whose 95 % interval holds the population's value."""
    metric, rows = population(name, seed=2)
    truth = float(metric.values(sufficient.total(rows))[name])
    draw, held = np.random.default_rng(size), 0
    for trial in range(trials):
        some = rows[draw.integers(0, len(rows), size)]
        found = resampling.score(metric, some, seed=trial)[name]
        held += found.low <= truth <= found.high
    return held / trials


def by_heart(size: int, trials: int = TRIALS) -> float:
    """The same for `memorisation`: the difference of two sets of rows, each asked in two wordings.

    Of training rows a third come back word for word, of held-out rows a tenth, some in one wording.
    """
    draw, held = np.random.default_rng(size), 0
    for trial in range(trials):
        sides = []
        for share in (1 / 3, 1 / 10):
            each = draw.beta(share, 1 - share, size)  # mean `share`; wordings of a row are alike
            sides.append(np.column_stack([draw.binomial(2, each), np.full(size, 2)]))
        found = resampling.apart(*sides, signature="x", bounds=(0.0, 1.0), seed=trial)
        held += found.low <= 1 / 3 - 1 / 10 <= found.high
    return held / trials


def alike(name: str, size: int, trials: int = TRIALS) -> float:
    """The share of trials with p < 0.05 where no system is better."""
    metric, ours = population(name, seed=2)
    _, theirs = population(name, seed=3)
    draw, called = np.random.default_rng(size), 0
    for trial in range(trials):
        some = draw.integers(0, len(ours), size)
        found = resampling.compare(metric, ours[some], theirs[some], seed=trial)[name]
        called += found.p_value < 0.05
    return called / trials


def speed(name: str, size: int = 10_000) -> tuple[float, float, float]:
    """Seconds to count what rows score, then for 1,000 resamples of all, and for a comparison."""
    metric = metric_of(name)
    rows = cases(name, size, 2)
    begun = time.process_time()
    statistics = metric.statistics(*rows)
    counted = time.process_time()
    resampling.score(metric, statistics)
    scored = time.process_time()
    others = metric.statistics(*cases(name, size, 3))
    ready = time.process_time()
    resampling.compare(metric, statistics, others)
    return counted - begun, scored - counted, time.process_time() - ready


def _rows(asked: list[str]) -> Iterator[str]:
    for what in asked or ["coverage", "alike", "speed"]:
        if what == "speed":
            yield "| CPU seconds | count 10,000 rows | 1,000 resamples | compare two |"
            yield "| --- | --- | --- | --- |"
            for name in (*metrics.names(), *LOSSES):
                yield "| `{}` | {:.2f} | {:.2f} | {:.2f} |".format(name, *speed(name))
            continue
        run = {"coverage": coverage, "alike": alike}[what]
        yield f"| {what} | n = 200 | n = 1000 |\n| --- | --- | --- |"
        for name in METRICS:
            yield f"| `{name}` | {' | '.join(f'{run(name, size):.1%}' for size in SIZES)} |"
        if what == "coverage":
            yield f"| `memorisation` | {' | '.join(f'{by_heart(size):.1%}' for size in SIZES)} |"


if __name__ == "__main__":
    for line in _rows(sys.argv[1:]):
        print(line, flush=True)
