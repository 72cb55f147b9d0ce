"""All engines on one workload, interleaved, medians, one table. See README.md beside this file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import workload

HERE = Path(__file__).resolve().parent
# engine: (runner, mode, the module that it needs)
ENGINES = {
    "itune": ("run_itune.py", "packed", "itune"),
    "itune-padded": ("run_itune.py", "padded", "itune"),
    "trainer-pad": ("run_trainer.py", "pad", "transformers"),
    "trainer-group": ("run_trainer.py", "group", "transformers"),
    "trainer-flat": ("run_trainer.py", "flat", "transformers"),
    "trl-pad": ("run_trl.py", "pad", "trl"),
    "trl-pack": ("run_trl.py", "pack", "trl"),
    "trl-padfree": ("run_trl.py", "padfree", "trl"),
    "llamafactory-neat": ("run_llamafactory.py", "neat", "llamafactory"),
}
PACKAGES = (
    "itune",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "trl",
    "llamafactory",
)
COLUMNS = (
    ("real tok/s", "real", "{:.0f}"),
    ("learnt tok/s", "learnt", "{:.0f}"),
    ("MFU", "mfu", "{:.2f}"),
    ("peak MB", "peak_mb", "{:.0f}"),
    ("first step s", "first_step", "{:.1f}"),
    ("prepared rows/s", "prepared", "{:.0f}"),
    ("of itune", "ratio", "{:.2f}"),
)
PEAK = """
import time, torch
torch.set_num_threads(1)
best = 0.0
for n, k, m in [(1024, 256, 256), (512, 512, 512), (1024, 256, 688), (256, 256, 32000)]:
    a, b = torch.randn(n, k), torch.randn(k, m)
    for _ in range(8):
        start = time.process_time()
        for _ in range(4):
            a @ b
        best = max(best, 4 * 2 * n * k * m / max(time.process_time() - start, 1e-9))
print(best)
"""


def environment(folder: Path, *, out: Path | None, seconds: float, steps: int) -> dict[str, str]:
    """One thread, no network, and the probe on the path."""
    path = [str(HERE / "probe"), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "BENCH_OUT": "" if out is None else str(out),
        "BENCH_SECONDS": str(seconds),
        "BENCH_STEPS": str(steps),
    }


def pinned(command: Sequence[str], core: int | None) -> list[str]:
    """The command on one core, where the system can pin it."""
    on_one = core is not None and Path("/usr/bin/taskset").is_file()
    return ["taskset", "-c", str(core), *command] if on_one else list(command)


def run(engine: str, given: argparse.Namespace, folder: Path, **limits: Any) -> dict[str, Any]:
    """One training process; its steps as the probe wrote them. Raises SystemExit if it failed."""
    runner, mode, _ = ENGINES[engine]
    out = folder / "probe.json"
    out.unlink(missing_ok=True)
    rows = limits.pop("rows", "rows")
    command = [python_of(engine, given), str(HERE / runner), str(folder), mode, "--rows", rows]
    command += ["--full"] if given.full else []
    limits = {"seconds": 1e9, "steps": 0, **limits}
    with (folder / f"{engine}.log").open("w") as log:
        ended = subprocess.run(
            pinned(command, given.core),
            env=environment(folder, out=out, **limits),
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if not out.is_file():
        tail = (folder / f"{engine}.log").read_text()[-800:]
        raise SystemExit(f"{engine}: ended with {ended.returncode} and no steps.\n{tail}")
    return json.loads(out.read_text())


def python_of(engine: str, given: argparse.Namespace) -> str:
    """The interpreter of an engine's own environment, or this one."""
    needs = ENGINES[engine][2]
    return str(Path(given.venvs[needs]) / "bin/python") if needs in given.venvs else sys.executable


def installed(engine: str, given: argparse.Namespace) -> bool:
    """Whether an engine can be imported where it would run."""
    found = f"importlib.util.find_spec({ENGINES[engine][2]!r})"
    code = f"import importlib.util, sys; sys.exit({found} is None)"
    env = environment(Path(), out=None, seconds=0, steps=0)
    return (
        subprocess.run([python_of(engine, given), "-c", code], env=env, check=False).returncode == 0
    )


def measured(seen: dict[str, Any]) -> dict[str, float]:
    """Rates from the third step to the last, and what the start cost."""
    steps = seen["steps"]
    first, last = steps[2], steps[-1]
    return {
        "real": (last[1] - first[1]) / (last[0] - first[0]),
        "fill": (last[1] - first[1]) / (last[2] - first[2]),
        "first_step": steps[0][0],
        "peak_mb": seen["peak_kb"] / 1024,
    }


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


def peak(core: int | None) -> float:
    """The best float32 matrix product of one core, in FLOP a CPU second."""
    command = pinned([sys.executable, "-c", PEAK], core)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return float(
        subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    )


def versions(given: argparse.Namespace) -> dict[str, str]:
    """What each environment holds."""
    code = (
        "import importlib.metadata as m, json\n"
        f"print(json.dumps({{d.name.lower(): d.version for d in m.distributions() "
        f"if d.name and d.name.lower() in {PACKAGES!r}}}))"
    )
    found: dict[str, str] = {}
    for python in {python_of(engine, given) for engine in given.engines}:
        text = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        found |= json.loads(text)
    return found


def machine() -> str:
    """The processor by name, where the system tells."""
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (info.read_text().splitlines() if info.is_file() else [])
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


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
        peaks.append(peak(given.core))
        for engine in given.engines:
            found[engine].append(measured(run(engine, given, folder, seconds=given.seconds)))
            said = {key: round(value, 2) for key, value in found[engine][-1].items()}
            print(f"round {number + 1} {engine}: {said}", flush=True)
    results = {}
    for engine, rounds in found.items():
        middle = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        middle["learnt"] = middle["real"] * stats["learnt"] / stats["tokens"]
        if not given.full:
            middle["mfu"] = middle["real"] * stats["work"] / max(peaks)
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
    parser.add_argument("--engines", default=",".join(ENGINES), help="some of: %(default)s")
    parser.add_argument("--venv", action="append", default=[], metavar="MODULE=DIR")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=["small", "full"], default="small")
    parser.add_argument("--seconds", type=float, help="CPU seconds a run is measured")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--full", action="store_true", help="train all weights, no adapter")
    parser.add_argument("--core", type=int, default=None, help="pin every run to this core")
    parser.add_argument("--preparation", action="store_true", help="measure preparation too")
    given = parser.parse_args()
    given.venvs = dict(item.split("=", 1) for item in given.venv)
    given.engines = given.engines.split(",")
    unknown = [engine for engine in given.engines if engine not in ENGINES]
    if unknown:
        parser.error(f"--engines: unknown {unknown[0]!r}. Known: {', '.join(ENGINES)}")
    given.seconds = given.seconds or {"small": 5.0, "full": 30.0}[given.size]
    return given


def main() -> None:
    """Write the workload once, run, print and keep the table."""
    given = options()
    folder = given.folder.resolve() / str(given.vocabulary)
    kept = folder / "stats.json"
    stats = (
        json.loads(kept.read_text())
        if kept.is_file()
        else workload.write(folder, vocabulary=given.vocabulary)
    )
    missing = [engine for engine in given.engines if not installed(engine, given)]
    given.engines = [engine for engine in given.engines if engine not in missing]
    if missing:
        print(f"not installed, left out: {', '.join(missing)}")
    made = measure(given, folder, stats)
    made |= {"versions": versions(given), "machine": machine(), "python": platform.python_version()}
    made |= {"workload": stats, "seconds": given.seconds, "all_weights": given.full}
    text = (
        f"{table(made['results'])}\n\n{machine()}; one thread, float32, CPU seconds; best matrix "
        f"product {made['peak_gflops']:.0f} GFLOP/s; medians of {given.rounds}; "
        + ", ".join(f"{name} {version}" for name, version in sorted(made["versions"].items()))
    )
    print(f"\n{text}")
    name = time.strftime("results-%Y%m%d-%H%M%S")
    (given.folder / f"{name}.json").write_text(json.dumps(made, indent=1))
    (given.folder / f"{name}.md").write_text(f"{text}\n")
    print(f"\nwritten to {given.folder / name}.md and .json")


if __name__ == "__main__":
    main()
