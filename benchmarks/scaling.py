"""How the cost of a run grows: with rows, lengths, vocabulary, processes and failures.

    python benchmarks/scaling.py                       # every table, rows up to 1e7
    python benchmarks/scaling.py --parts rows --most 1e8
    python benchmarks/scaling.py --parts ranks,failures

Prints the tables of docs/scaling.md. Lengths are drawn, everything that is measured is itune's own
code: the order of an epoch, the plan of steps, how ranks share a step, the loss at the head. Time
is CPU time of one thread; memory is the peak of a process of its own (Linux). Nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

LONGEST = 2048
TOKENS = 16_384  # a rank and step
MICRO = 8192
WORLDS = (1, 8, 64, 256, 1024)
WIDTH = 2048  # of the model whose attention is reckoned with: about a billion parameters


def lengths_of(kind: str, count: int, seed: int = 0, mean: float = 200.0) -> np.ndarray:
    """Tokens an example, int64: `even`, `usual` (lognormal) or `wild` (a heavy tail)."""
    draw = np.random.default_rng(seed)
    if kind == "even":
        drawn = draw.uniform(0.1 * mean, 1.9 * mean, count)
    elif kind == "usual":
        drawn = draw.lognormal(np.log(mean) - 0.32, 0.8, count)
    else:
        drawn = (draw.pareto(1.2, count) * 0.3 + 0.08) * mean
    return np.clip(drawn, 8, LONGEST).astype(np.int64)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)
    print()


# --- rows and lengths ---------------------------------------------------------------------


def planned(count: int, mean: float, world: int) -> dict[str, float]:
    """Order an epoch of so many rows and plan its steps, here; seconds, bytes, steps."""
    from itune import data, memory, plans, recipes

    lengths = lengths_of("usual", count, mean=mean)
    starts = np.zeros(count + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    zeros, rows = np.zeros(count, np.int32), np.arange(count, dtype=np.int32)
    source = recipes.Source(path="rows")
    corpus = data.Corpus(
        None, None, starts, zeros, rows, zeros, zeros, (source,), (1,), 0, learnt=lengths
    )
    held = memory.held()

    def timed(work: object) -> tuple[object, float, int]:
        Path("/proc/self/clear_refs").write_text("5")  # of proc(5): the peak begins anew
        before, began = memory.held(), time.process_time()
        made = work()  # type: ignore[operator]
        return made, time.process_time() - began, memory.held("VmHWM") - before

    order, ordering, order_peak = timed(lambda: corpus.epoch(0, 17))
    made, planning, plan_peak = timed(
        lambda: plans.plan(
            lambda _epoch: order,
            lengths,
            lengths,
            tokens_per_step=world * TOKENS,
            micro_batch_tokens=MICRO,
            world=world,
        )
    )
    began = time.process_time()
    made.step(len(made) // 2)  # type: ignore[attr-defined]
    return {
        "ordering": ordering,
        "planning": planning,
        "step": time.process_time() - began,
        "order_peak": order_peak,
        "plan_peak": plan_peak,
        "held": held,
        "steps": len(made),  # type: ignore[arg-type]
    }


def apart(count: int, mean: float = 200.0, world: int = 8) -> dict[str, float]:
    """`planned` in a process of its own, whose memory is its own."""
    line = [sys.executable, __file__, "--one", f"{count},{mean},{world}"]
    said = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    found: dict[str, float] = json.loads(said)
    return found


def rows(most: float) -> None:
    print("## Rows: an epoch of lognormal lengths, mean 200 tokens, 8 ranks")
    columns = ("rows", "steps", "order, s", "plan, s", "order, peak MB", "plan, peak MB")

    def lines() -> Iterable[Sequence[object]]:
        count = 1000
        while count <= most:
            found = apart(count)
            yield (
                f"{count:,}", f"{found['steps']:,}", f"{found['ordering']:.3f}",
                f"{found['planning']:.3f}", f"{found['order_peak'] / 1e6:,.0f}",
                f"{found['plan_peak'] / 1e6:,.0f}",
            )  # fmt: skip
            count *= 10

    table(columns, lines())


def lengths(most: float) -> None:
    print("## Lengths: a million rows, 8 ranks")
    columns = ("mean tokens", "steps", "plan, s", "a step is looked up in, ms")

    def lines() -> Iterable[Sequence[object]]:
        for mean in (25, 50, 100, 200, 400, 800):
            found = apart(min(10**6, int(most)), mean)
            yield (
                mean, f"{found['steps']:,}", f"{found['planning']:.2f}",
                f"{1000 * found['step']:.1f}",
            )  # fmt: skip

    table(columns, lines())


# --- vocabulary ---------------------------------------------------------------------------


def vocabulary(_most: float) -> None:
    import torch

    from itune import losses, memory

    torch.set_num_threads(1)
    hidden, targets = 256, 1024
    print(f"## Vocabulary: the head's loss and gradient, {targets} targets, {hidden} wide, float32")
    columns = ("entries", "seconds", "peak MB", "logits of all targets, MB")
    losses.head_loss(  # what the first call of all takes is no part of it
        torch.randn(2, hidden), torch.randn(9, hidden), None, torch.zeros(2, dtype=torch.long)
    )

    def lines() -> Iterable[Sequence[object]]:
        for entries in (1000, 8000, 32_000, 128_000, 256_000):
            states = torch.randn(targets, hidden, requires_grad=True)
            weight = torch.randn(entries, hidden, requires_grad=True)
            wanted = torch.randint(entries, (targets,))
            with memory.Peak(torch.device("cpu")) as peak:
                began = time.process_time()
                losses.head_loss(states, weight, None, wanted).backward()
                took = time.process_time() - began
            logits = 4 * targets * entries / 1e6
            yield f"{entries:,}", f"{took:.2f}", f"{peak.bytes / 1e6:,.0f}", f"{logits:,.0f}"
            del states, weight

    table(columns, lines())


# --- ranks --------------------------------------------------------------------------------


def skew(kind: str, world: int, tokens: int, steps: int = 3) -> dict[str, float]:
    """How long ranks wait for the slowest of a step: shares of the time, by two measures.

    `tokens`: time goes by tokens alone. `work`: attention within each example too, which grows
    with the square of its length.
    """
    from itune import plans

    count = int((steps + 1) * world * tokens / 100)
    drawn = lengths_of(kind, count)
    made = plans.plan(
        lambda _epoch: np.arange(count),
        drawn,
        drawn,
        tokens_per_step=world * tokens,
        micro_batch_tokens=MICRO,
        max_steps=steps,
        world=world,
    )
    # A token costs 12 x width^2 products a layer, and its attention width x length (causal).
    work = drawn * (1 + drawn / (12 * WIDTH))
    idle: dict[str, list[float]] = {"tokens": [], "work": [], "seconds": []}
    for number in range(steps):
        began = time.process_time()
        step = made.step(number)
        idle["seconds"].append(time.process_time() - began)
        for name, costs in (("tokens", drawn), ("work", work)):
            loads = np.array([sum(costs[part].sum() for part in rank) for rank in step.ranks])
            idle[name].append(1 - loads.mean() / loads.max())
    return {name: float(np.max(values)) for name, values in idle.items()}


def ranks(_most: float) -> None:
    print(f"## Ranks: the worst idle share of 3 steps, {TOKENS:,} tokens a rank, rows to {LONGEST}")
    columns = ("ranks", "lengths", "idle by tokens", "idle by work", "planning a step, ms")
    table(columns, (
        (world, kind, f"{found['tokens']:.3%}", f"{found['work']:.3%}",
         f"{1000 * found['seconds']:.0f}")
        for world in WORLDS
        for kind in ("even", "usual", "wild")
        for found in [skew(kind, world, TOKENS)]
    ))  # fmt: skip
    print(f"## Tokens a rank and step, at 1,024 ranks, lengths `usual`, rows to {LONGEST}")
    columns = ("tokens a rank", "of the longest row", "idle by tokens", "idle by work")
    table(columns, (
        (f"{tokens:,}", f"{tokens / LONGEST:g}", f"{found['tokens']:.2%}", f"{found['work']:.2%}")
        for tokens in (1024, 2048, 4096, 8192, 16_384)
        for found in [skew("usual", 1024, tokens)]
    ))  # fmt: skip


# --- failures -----------------------------------------------------------------------------


def failures(_most: float) -> None:
    from itune import pacing

    print("## Failures: 50,000 h between failures of one device, 300 s from a failure to a step")
    columns = (
        "devices", "a failure every, h", "a checkpoint takes, s", "one every, min",
        "time lost", "lost at one every 4 h",
    )  # fmt: skip

    def lines() -> Iterable[Sequence[object]]:
        for devices in (1, 8, 64, 1024, 16_384):
            mean = 3600 * 50_000 / devices
            for takes in (5.0, 60.0):
                every = pacing.interval(takes, mean)
                yield (
                    f"{devices:,}", f"{mean / 3600:,.3g}", f"{takes:g}", f"{every / 60:,.0f}",
                    f"{pacing.lost(every, takes, mean, 300.0):.2%}",
                    f"{pacing.lost(14_400.0, takes, mean, 300.0):.2%}",
                )  # fmt: skip

    table(columns, lines())


PARTS = {
    "rows": rows,
    "lengths": lengths,
    "vocabulary": vocabulary,
    "ranks": ranks,
    "failures": failures,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="tables to print")
    parser.add_argument("--most", type=float, default=1e7, help="rows of the largest plan")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        count, mean, world = given.one.split(",")
        print(json.dumps(planned(int(count), float(mean), int(world))))
        return
    print(f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}")
    for name in given.parts.split(","):
        PARTS[name](given.most)


if __name__ == "__main__":
    main()
