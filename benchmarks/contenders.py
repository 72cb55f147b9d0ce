"""Who takes part in `gpu.py`, in which settings, and how much of what is done."""

from __future__ import annotations

from dataclasses import dataclass

import workload


@dataclass(frozen=True)
class Contender:
    """A tool in one setting. micro: of a step, the share that is computed at a time: 1 / micro."""

    tool: str
    engine: str
    micro: int
    flags: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


LIGER, FLASH = ("--liger",), ("--attention", "flash_attention_2")
# Small micro-batches are for who pays for long ones: with padding, or a mask of all by all tokens.
CONTENDERS = {
    "itune": Contender("itune", "itune", 2),
    "itune-liger": Contender("itune", "itune", 2, LIGER, ("liger_kernel",)),
    "itune-compiled": Contender("itune", "itune", 2, ("--compile",)),
    "trl-pack": Contender("TRL", "trl-pack", 2),
    "trl-pack-small": Contender("TRL", "trl-pack", 8),
    "trl-pack-liger": Contender("TRL", "trl-pack", 8, LIGER, ("liger_kernel",)),
    "trl-pack-flash": Contender("TRL", "trl-pack", 2, FLASH, ("flash_attn",)),
    "trl-pack-flash-liger": Contender(
        "TRL", "trl-pack", 2, (*FLASH, *LIGER), ("flash_attn", "liger_kernel")
    ),
    "trl-pack-compiled": Contender("TRL", "trl-pack", 8, ("--compile",)),
    "trainer-pad": Contender("Trainer", "trainer-pad", 8),
    "trainer-group": Contender("Trainer", "trainer-group", 8),
    "trainer-flat": Contender("Trainer", "trainer-flat", 8),
    "trainer-flat-flash": Contender("Trainer", "trainer-flat", 2, FLASH, ("flash_attn",)),
}
UNASKED = ("itune-compiled", "trl-pack-compiled")  # compiling takes most of a minute
AGAIN = "-recomputed"  # behind the name of one that did not fit without
WAYS = {"itune": "itune", "batches": "model.generate"}


@dataclass(frozen=True)
class Size:
    """How much is done. tokens: of a step; answers: prompts, and tokens of an answer at most."""

    gpu: bool
    shapes: tuple[str, ...]
    vocabulary: int
    rows: int
    texts: workload.Texts
    tokens: int
    warm: int
    steps: int
    rounds: int
    answers: tuple[int, int]


SIZES = {
    "full": Size(
        gpu=True,
        shapes=("qwen3-0.6b", "qwen3-1.7b"),
        vocabulary=151_936,
        rows=3000,
        texts=workload.Texts((220, 40, 1500), (120, 10, 500), 2048),
        tokens=32_768,
        warm=5,
        steps=15,
        rounds=5,
        answers=(256, 128),
    ),
    "small": Size(
        gpu=False,
        shapes=("qwen3-tiny",),
        vocabulary=2000,
        rows=1000,
        texts=workload.Texts((40, 10, 150), (20, 5, 80), 256),
        tokens=4096,
        warm=2,
        steps=6,
        rounds=2,
        answers=(64, 32),
    ),
}
