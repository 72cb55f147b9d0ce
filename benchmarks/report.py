"""The tables of `gpu.py`, as Markdown, and what in them cannot be compared."""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from typing import Any

import engines
from contenders import AGAIN, CONTENDERS, WAYS, Size

# Dense bfloat16 FLOP a second by NVIDIA's data sheets, of the SXM card where there are several.
PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "L40S": 362e12,
    "A100": 312e12,
    "A10": 125e12,
    "L4": 121e12,
}
APART = 0.1  # chosen: so much may a contender's tokens a step differ from the first one's
TRAINING = (
    ("tokens/s", "real", "{:,.0f}"),
    ("supervised tokens/s", "learnt", "{:,.0f}"),
    ("MFU", "mfu", "{:.3f}"),
    ("peak GB", "peak_gb", "{:.2f}"),
    ("tokens a step", "a_step", "{:,.0f}"),
    ("rounds", "rounds", "{:.0f}"),
)
ANSWERING = (
    ("tokens/s", "rate", "{:,.0f}"),
    ("seconds", "seconds", "{:.1f}"),
    ("peak GB", "peak_gb", "{:.2f}"),
    ("rounds", "rounds", "{:.0f}"),
)


@dataclass(frozen=True)
class Facts:
    """What a figure means nothing without. peak: FLOP a second, None where it is not known."""

    device: str
    versions: dict[str, str]
    peak: float | None
    seconds: float


def peak(card: str, asked: float | None) -> float | None:
    """FLOP a second of a card by its name, or as asked in TFLOPS."""
    if asked is not None:
        return asked * 1e12
    return next((value for name, value in PEAKS.items() if name in card), None)


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """The medians over rounds, and how many there were."""
    middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    if "peak_mb" in middle:
        middle["peak_gb"] = middle["peak_mb"] * 2**20 / 1e9
    return middle | {"rounds": len(runs)}


def trained(
    runs: dict[str, list[dict[str, float]]], stats: dict[str, Any], work: float, peak: float | None
) -> dict[str, dict[str, float]]:
    """What each contender reached on one model. work: useful FLOP a token."""
    rows = {}
    for name, each in runs.items():
        row = medians(each)
        row["learnt"] = row["real"] * stats["learnt"] / stats["tokens"]
        if peak is not None:
            row["mfu"] = row["real"] * work / peak
        rows[name] = row
    return rows


def table(first: str, columns: Any, rows: dict[str, dict[str, float]]) -> str:
    """Markdown, a row a line; what was not measured stays empty."""
    lines = [f"| {first} | " + " | ".join(title for title, _, _ in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name, row in rows.items():
        cells = [form.format(row[key]) if key in row else "" for _, key, form in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def beside(rows: dict[str, dict[str, float]]) -> str:
    """The fastest of itune beside the fastest of each other tool, in a sentence."""
    fastest: dict[str, str] = {}
    for name in sorted(rows, key=lambda name: rows[name]["learnt"]):
        fastest[CONTENDERS[name.removesuffix(AGAIN)].tool] = name
    own = fastest.pop("itune", None)
    if own is None or not fastest:
        return ""
    said = [
        f"{rows[own]['learnt'] / rows[other]['learnt']:.2f} times the supervised tokens/s of "
        f"{tool}'s fastest ({other}) at {rows[own]['peak_mb'] / rows[other]['peak_mb']:.2f} of its "
        "peak memory"
        for tool, other in fastest.items()
    ]
    return f"itune ({own}): {'; '.join(said)}."


def written(
    found: Any, stats: dict[str, Any], size: Size, given: argparse.Namespace, facts: Facts
) -> str:
    """All tables, and what they were measured by."""
    day = f"{time.localtime().tm_mday} {time.strftime('%B %Y')}"
    kept = ", ".join(f"{name} {version}" for name, version in sorted(facts.versions.items()))
    dtype = "bfloat16 over float32 weights" if size.gpu and not given.lora else "float32"
    dtype = "bfloat16" if size.gpu and given.lora else dtype
    unit = "the clock" if size.gpu else "CPU seconds, one thread"
    what = "LoRA r=16 on all linear layers" if given.lora else "all weights"
    best = "not known" if facts.peak is None else f"{facts.peak / 1e12:,.3g} TFLOPS"
    parts = [
        f"{day}; {facts.device}; {kept}. {what.capitalize()} trained, {dtype}; {given.steps} steps "
        f"of about {size.tokens:,} tokens after {given.warm} that are not counted, by {unit}; "
        f"medians over rounds; peak for the MFU {best}; {facts.seconds / 60:.1f} minutes in all."
    ]
    if not size.gpu:
        parts.append("**A check of the script on a CPU, with a toy model: no figure to judge by.**")
    for shape, runs in found.trained.items():
        work = stats[shape]["work" if given.lora else "full_work"]
        rows = trained(runs, stats[shape], work, facts.peak)
        parts += [table(f"training {shape}", TRAINING, rows), beside(rows)]
    prompts, new = size.answers
    for shape, runs in found.answered.items():
        rows = {f"{WAYS[way.split()[0]]}": medians(each) for way, each in runs.items()}
        title = f"answers of {shape}, {prompts} prompts, at most {new} tokens"
        parts.append(table(title, ANSWERING, rows))
    left_out = [f"{name} ({', '.join(modules)})" for name, modules in found.absent.items()]
    if left_out:
        parts.append(f"Left out, as what they need is not installed: {', '.join(left_out)}.")
    parts += [f"Failed: {line}." for line in faults(found, short=True)]
    return "\n\n".join(filter(None, parts)) + "\n"


def faults(found: Any, *, short: bool = False) -> list[str]:
    """What failed, or took other steps than the rest.

    A contender that is short of memory is in the table with activations recomputed; `short` names
    it all the same.
    """
    lines = [f"{key}: {why}" for key, why in found.failed.items() if short or why != engines.SHORT]
    for shape, runs in found.trained.items():
        steps = {name: medians(each)["a_step"] for name, each in runs.items()}
        first = next(iter(steps.values()))
        lines += [
            f"{shape} {name}: {step:,.0f} tokens a step, where the first has {first:,.0f}"
            for name, step in steps.items()
            if abs(step / first - 1) > APART
        ]
    return lines
