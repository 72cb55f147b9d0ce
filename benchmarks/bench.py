"""All engines on one workload, interleaved, medians, one table. See README.md beside this file."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import engines
import workload

COLUMNS = (
    ("real tok/s", "real", "{:.0f}"),
    ("learnt tok/s", "learnt", "{:.0f}"),
    ("MFU", "mfu", "{:.2f}"),
    ("peak MB", "peak_mb", "{:.0f}"),
    ("first step s", "first_step", "{:.1f}"),
    ("prepared rows/s", "prepared", "{:.0f}"),
    ("of itune", "ratio", "{:.2f}"),
)


def run(engine: str, given: argparse.Namespace, folder: Path, **limits: Any) -> dict[str, Any]:
    """One training process; its steps as the probe wrote them. Raises Failed if it took none."""
    options = ["--rows", limits.pop("rows", "rows"), *(["--full"] if given.full else [])]
    python = python_of(engine, given)
    return engines.run(engine, folder, options, python=python, core=given.core, **limits)


def python_of(engine: str, given: argparse.Namespace) -> str:
    """The interpreter of the environment that an engine runs in."""
    return engines.python_of(engines.ENGINES[engine][2], given.venvs)


def prepared(engine: str, given: argparse.Namespace, folder: Path, rows: int) -> float:
    """Rows a CPU second from file to tokens: all rows against a tenth, both with nothing cached."""
    spent = []
    for name in ("rows", "tenth"):
        cache = folder / "cache"
        cache.rename(folder / "cache.aside")
        try:
            spent.append(run(engine, given, folder, rows=name, steps=1)["steps"][0][0])
        finally:
            shutil.rmtree(cache, ignore_errors=True)
            (folder / "cache.aside").rename(cache)
    return 0.9 * rows / max(spent[0] - spent[1], 1e-3)


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown, an engine a line."""
    lines = ["| engine | " + " | ".join(title for title, _, _ in COLUMNS) + " |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    for engine, values in results.items():
        cells = [form.format(values[key]) if key in values else "" for _, key, form in COLUMNS]
        lines.append(f"| {engine} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(given: argparse.Namespace, folder: Path, stats: dict[str, Any]) -> dict[str, Any]:
    """Every round of every engine; medians over rounds, the peak over all."""
    found: dict[str, list[dict[str, float]]] = {engine: [] for engine in given.engines}
    peaks = []
    for engine in given.engines:
        run(engine, given, folder, steps=1)  # from now on its data is prepared
    for number in range(given.rounds):
        peaks.append(engines.peak(given.core))
        for engine in given.engines:
            seen = run(engine, given, folder, seconds=given.seconds)
            found[engine].append(engines.measured(seen))
            said = {key: round(value, 2) for key, value in found[engine][-1].items()}
            print(f"round {number + 1} {engine}: {said}", flush=True)
    results = {}
    for engine, rounds in found.items():
        middle = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        middle["learnt"] = middle["real"] * stats["learnt"] / stats["tokens"]
        useful = stats["full_work" if given.full else "work"]
        middle["mfu"] = middle["real"] * useful / max(peaks)
        if given.preparation:
            middle["prepared"] = prepared(engine, given, folder, stats["rows"])
        results[engine] = middle
    base = results.get("itune")
    for values in results.values():
        if base is not None:
            values["ratio"] = values["real"] / base["real"]
    return {"results": results, "rounds": found, "peak_gflops": max(peaks) / 1e9}


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="workload and results")
    parser.add_argument("--engines", default=",".join(engines.ENGINES), help="some of: %(default)s")
    parser.add_argument("--venv", action="append", default=[], metavar="MODULE=DIR")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=["small", "full"], default="small")
    parser.add_argument("--seconds", type=float, help="CPU seconds a run is measured")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--full", action="store_true", help="train all weights, no adapter")
    parser.add_argument("--core", type=int, default=None, help="pin every run to this core")
    parser.add_argument("--preparation", action="store_true", help="measure preparation too")
    given = parser.parse_args()
    given.venvs = engines.venvs(given.venv)
    given.engines = given.engines.split(",")
    unknown = [engine for engine in given.engines if engine not in engines.ENGINES]
    if unknown:
        parser.error(f"--engines: unknown {unknown[0]!r}. Known: {', '.join(engines.ENGINES)}")
    given.seconds = given.seconds or {"small": 5.0, "full": 30.0}[given.size]
    return given


def main() -> None:
    """Write the workload once, run, print and keep the table."""
    given = options()
    folder = given.folder.resolve() / str(given.vocabulary)
    kept = folder / "stats.json"
    stats = json.loads(kept.read_text()) if kept.is_file() else {}
    if "full_work" not in stats:  # or one that an older version of this file wrote
        stats = workload.write(folder, vocabulary=given.vocabulary)
    missing = [
        engine
        for engine in given.engines
        if not engines.installed(engines.ENGINES[engine][2], python_of(engine, given))
    ]
    given.engines = [engine for engine in given.engines if engine not in missing]
    if missing:
        print(f"not installed, left out: {', '.join(missing)}")
    try:
        made = measure(given, folder, stats)
    except engines.Failed as error:
        raise SystemExit(str(error)) from error
    made["versions"] = engines.versions(python_of(engine, given) for engine in given.engines)
    made |= {"machine": engines.machine(), "python": platform.python_version()}
    made |= {"workload": stats, "seconds": given.seconds, "all_weights": given.full}
    text = (
        f"{table(made['results'])}\n\n{made['machine']}; one thread, float32, CPU seconds; "
        f"best matrix product {made['peak_gflops']:.0f} GFLOP/s; medians of {given.rounds}; "
        + ", ".join(f"{name} {version}" for name, version in sorted(made["versions"].items()))
    )
    print(f"\n{text}")
    name = time.strftime("results-%Y%m%d-%H%M%S")
    (given.folder / f"{name}.json").write_text(json.dumps(made, indent=1))
    (given.folder / f"{name}.md").write_text(f"{text}\n")
    print(f"\nwritten to {given.folder / name}.md and .json")


if __name__ == "__main__":
    main()
