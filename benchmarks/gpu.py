"""itune beside TRL and plain Trainer on one GPU: training and answering, within ten minutes.

    make bench-gpu                               # a Qwen3 of 0.6B and one of 1.7B, all weights
    make bench-gpu BENCH="--lora --minutes 9"
    make bench-gpu BENCH="--size small"          # a tiny one on a CPU: shows that the script works

Models have random weights, rows are made up, nothing is downloaded. Every contender is a process of
its own, gets the same rows, numbers and tokens a step, and takes as many steps; those of the
warm-up are not counted. On the first model each runs in every setting that is installed; the
fastest setting of each tool then goes on to the other model and to further rounds, interleaved, as
long as the time allows. Medians are written as Markdown. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import engines

try:
    import report
    from contenders import AGAIN, CONTENDERS, SIZES, UNASKED, WAYS, Contender
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"{sys.executable} has no {missing.name}: name a Python that has torch and transformers "
        "by make bench-gpu PYTHON=…, or run make setup first."
    ) from None

CARD = (
    "import json, torch\n"
    "print(json.dumps(torch.cuda.get_device_name() if torch.cuda.is_available() else None))"
)
Runs = dict[str, dict[str, list[dict[str, float]]]]


ANSWERS = " answers"


@dataclass
class Found:
    """What was measured so far, by shape and contender or way of answering."""

    trained: Runs = field(default_factory=dict)
    answered: Runs = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # shape and contender: why
    absent: dict[str, list[str]] = field(default_factory=dict)  # contender: modules


class Bench:
    """All runs, within a limit of time."""

    def __init__(self, given: argparse.Namespace, begun: float) -> None:
        self.given, self.size, self.begun = given, SIZES[given.size], begun
        self.found = Found()
        self.took: dict[tuple[str, str], float] = {}
        self.stats: dict[str, dict[str, Any]] = {}

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return 60 * self.given.minutes - (time.monotonic() - self.begun)

    def prepare(self) -> None:
        """Write the workload of each shape; all at once, as each is a process of its own."""
        size, given = self.size, self.given
        started = {}
        for shape in size.shapes:
            command = [sys.executable, str(engines.HERE / "workload.py"), str(given.folder / shape)]
            command += ["--shape", shape, "--vocabulary", str(size.vocabulary)]
            command += ["--rows", str(size.rows), "--texts", json.dumps(asdict(size.texts))]
            command += ["--device", "cuda" if size.gpu else "cpu"]
            env = engines.environment(given.folder, gpu=size.gpu)
            started[shape] = subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        for shape, process in started.items():
            said, _ = process.communicate()
            if process.returncode:
                raise SystemExit(f"workload.py: ended with {process.returncode} for {shape}")
            self.stats[shape] = json.loads(said.splitlines()[-1])

    def run(self) -> None:
        """Every setting on the first model, then the best of each tool, round by round."""
        names, shapes = self._present(), self.size.shapes
        for shape in shapes:
            for name in names:
                self.train(shape, name)
            for way in WAYS:
                self.answer(shape, way)
            names = best(self.found.trained.get(shapes[0], {})) or names
        for _ in range(1, self.given.rounds):
            for shape in shapes:
                for name in names:
                    self.train(shape, name)
                for way in WAYS:
                    self.answer(shape, way)

    def _present(self) -> list[str]:
        """The contenders whose modules are there; notes the others."""
        for name in self.given.contenders:
            contender = CONTENDERS[name]
            tool = engines.ENGINES[contender.engine][2]
            python = engines.python_of(tool, self.given.venvs)
            needs = [m for m in (tool, *contender.needs) if not engines.installed(m, python)]
            if needs:
                self.found.absent[name] = needs
        return [name for name in self.given.contenders if name not in self.found.absent]

    def train(self, shape: str, name: str) -> None:
        """One run of a contender; where memory runs out, one with activations recomputed."""
        key = f"{shape} {name}"
        if key in self.found.failed:
            if self.found.failed[key] == engines.SHORT and not name.endswith(AGAIN):
                self.train(shape, name + AGAIN)
            return
        if self._has_time(shape, name):
            try:
                self._note(self.found.trained, shape, name, lambda: self._trained(shape, name))
            except engines.Failed as error:
                self.found.failed[key] = error.line
                print(f"{key}: {error.line}", flush=True)
                self.train(shape, name)

    def answer(self, shape: str, way: str) -> None:
        """One run of a way of answering."""
        key = f"{shape} {WAYS[way]}, answers"
        if key not in self.found.failed and self._has_time(shape, way + ANSWERS):
            try:
                self._note(
                    self.found.answered, shape, way + ANSWERS, lambda: self._answered(shape, way)
                )
            except engines.Failed as error:
                self.found.failed[key] = error.line
                print(f"{key}: {error.line}", flush=True)

    def _has_time(self, shape: str, name: str) -> bool:
        """Whether what is left is likely to do for a run, by what an earlier one took."""
        first = self.took.get((self.size.shapes[0], name), 0.0)
        return self.took.get((shape, name), first) < self.left

    def _note(self, where: Runs, shape: str, name: str, do: Callable[[], dict[str, float]]) -> None:
        began = time.monotonic()
        values = do()
        self.took[shape, name] = time.monotonic() - began
        where.setdefault(shape, {}).setdefault(name, []).append(values)
        said = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        print(f"{shape} {name}: {said}", flush=True)

    def _trained(self, shape: str, name: str) -> dict[str, float]:
        contender = CONTENDERS[name.removesuffix(AGAIN)]
        seen = engines.run(
            contender.engine,
            self.given.folder / shape,
            [*self.options(shape, contender), *["--recompute"] * name.endswith(AGAIN)],
            python=engines.python_of(engines.ENGINES[contender.engine][2], self.given.venvs),
            gpu=self.size.gpu,
            timeout=max(30.0, self.left),
            warm=self.given.warm,
            steps=self.given.warm + self.given.steps,
        )
        return engines.measured(seen)

    def options(self, shape: str, contender: Contender) -> list[str]:
        """A runner's command line: as many tokens a step as all others, in rows or sequences."""
        size = self.size
        micro, length = size.tokens // contender.micro, size.texts.length
        if contender.engine in ("itune", "trl-pack"):
            batch, accumulate = max(1, micro // length), contender.micro
        else:
            mean = self.stats[shape]["tokens"] / self.stats[shape]["rows"]
            batch = max(1, round(micro / mean))
            accumulate = round(size.tokens / (batch * mean))
        return [
            *("--device", "cuda" if size.gpu else "cpu", "--length", str(length)),
            *("--tokens", str(size.tokens), "--batch", str(batch)),
            *("--accumulate", str(accumulate), *contender.flags),
            *["--full"] * (not self.given.lora),
        ]

    def _answered(self, shape: str, way: str) -> dict[str, float]:
        rows, new = self.size.answers
        command = [sys.executable, str(engines.HERE / "decode.py"), "--size", shape]
        command += ["--vocabulary", str(self.size.vocabulary), "--ways", way, "--repeats", "1"]
        command += ["--dtype", "bfloat16" if self.size.gpu else "float32"]
        command += ["--rows", str(rows), "--new", str(new)]
        env = engines.environment(self.given.folder, gpu=self.size.gpu)
        limit = max(30.0, self.left)
        try:
            ended = subprocess.run(
                command, env=env, capture_output=True, text=True, check=False, timeout=limit
            )
        except subprocess.TimeoutExpired as error:
            raise engines.Failed(way, f"not done after {limit:.0f} s", "") from error
        if ended.returncode:
            raise engines.Failed(way, f"ended with {ended.returncode}", ended.stderr)
        said = json.loads(ended.stdout.splitlines()[-1])
        found = {"rate": said["tokens_per_second"][way], "seconds": said["seconds"][way][0]}
        return (
            found if said["gpu_bytes"] is None else found | {"peak_mb": said["gpu_bytes"] / 2**20}
        )


def best(trained: dict[str, list[dict[str, float]]]) -> list[str]:
    """The fastest setting of each tool."""
    rates = {name: statistics.median(r["real"] for r in runs) for name, runs in trained.items()}
    fastest: dict[str, str] = {}
    for name in sorted(rates, key=rates.__getitem__):
        fastest[CONTENDERS[name.removesuffix(AGAIN)].tool] = name
    return [name for name in trained if name in fastest.values()]


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(".bench/gpu"))
    parser.add_argument("--size", choices=tuple(SIZES), default="full")
    asked = ",".join(name for name in CONTENDERS if name not in UNASKED)
    parser.add_argument("--contenders", default=asked, help="some of: " + ", ".join(CONTENDERS))
    parser.add_argument("--venv", action="append", default=[], metavar="MODULE=DIR")
    parser.add_argument("--lora", action="store_true", help="an adapter instead of all weights")
    parser.add_argument("--minutes", type=float, default=9.0, help="no run is begun for later")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--warm", type=int, help="steps that are not counted")
    parser.add_argument("--steps", type=int, help="steps that are")
    parser.add_argument("--peak", type=float, metavar="TFLOPS", help="the card's, for the MFU")
    given = parser.parse_args(arguments)
    given.contenders = given.contenders.split(",")
    unknown = [name for name in given.contenders if name not in CONTENDERS]
    if unknown:
        parser.error(f"--contenders: unknown {unknown[0]!r}. Known: {', '.join(CONTENDERS)}")
    for name in ("rounds", "warm", "steps"):
        value = getattr(given, name)
        value = getattr(SIZES[given.size], name) if value is None else value
        if value < 1:
            parser.error(f"--{name}: {value} is too few. At least 1.")
        setattr(given, name, value)
    given.venvs = engines.venvs(given.venv)
    given.folder = given.folder.resolve()
    return given


def main() -> None:
    """Run all, and write the tables. Ends with 1 where something failed or is not comparable."""
    begun, given = time.monotonic(), options()
    for module in ("torch", "transformers"):
        if not engines.installed(module, sys.executable):
            raise SystemExit(f"{sys.executable} has no {module}: name one by PYTHON=…")
    card = json.loads(
        subprocess.run(
            [sys.executable, "-c", CARD],
            env=engines.environment(given.folder, gpu=True),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    size = SIZES[given.size]
    if size.gpu and card is None:
        raise SystemExit("no GPU: --size full needs one. Try the script itself by --size small.")
    given.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(given, begun)
    bench.prepare()
    bench.run()
    facts = report.Facts(
        device=card if size.gpu else engines.machine(),
        versions=engines.versions(
            [sys.executable, *(engines.python_of(module, given.venvs) for module in given.venvs)]
        ),
        peak=report.peak(card, given.peak) if size.gpu else engines.peak(),
        seconds=time.monotonic() - begun,
    )
    text = report.written(bench.found, bench.stats, size, given, facts)
    name = given.folder / time.strftime("results-%Y%m%d-%H%M%S")
    name.with_suffix(".md").write_text(text)
    kept = {**asdict(bench.found), "stats": bench.stats, **asdict(facts)}
    name.with_suffix(".json").write_text(json.dumps(kept, indent=1))
    print(f"\n{text}\nwritten to {name}.md and .json")
    if faults := report.faults(bench.found):
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    main()
