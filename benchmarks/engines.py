"""Every engine in a process of its own: how it is started, and what the probe saw of its steps.

`bench.py` and `gpu.py` share this. An engine is a runner of this folder in one of its modes; it
runs in the environment that holds it, with `probe/` on its path, which counts in all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

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
    "liger-kernel",
    "flash-attn",
    "llamafactory",
)
SHORT = "out of memory"
WARM = 3  # steps before the window, in which nothing is measured
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


class Failed(Exception):
    """An engine that took no steps: which, and the end of what it wrote."""

    def __init__(self, engine: str, why: str, log: str) -> None:
        super().__init__(f"{engine}: {why}\n{log[-800:]}")
        self.why, self.log = why, log

    @property
    def short(self) -> bool:
        """Whether it is memory that ran out."""
        return SHORT in self.log.lower() or "does not fit the memory" in self.log

    @property
    def line(self) -> str:
        """Why, in a line."""
        if self.short:
            return SHORT
        said = [line.strip() for line in self.log.splitlines() if line.strip()]
        return f"{self.why}: {said[-1][:160]}" if said else self.why


def environment(folder: Path, *, gpu: bool = False, **probe: Any) -> dict[str, str]:
    """One thread or one GPU, no network, and the probe on the path.

    probe: its settings: `out`, `seconds`, `steps`, `warm`; without `out` it does nothing.
    """
    path = [str(HERE / "probe"), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if gpu else ""
    threads = {} if gpu else {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    settings = {f"BENCH_{name.upper()}": str(value) for name, value in probe.items()}
    return {
        **os.environ,
        **threads,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "TOKENIZERS_PARALLELISM": "true" if gpu else "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "CUDA_VISIBLE_DEVICES": visible,
        "BENCH_CLOCK": "wall" if gpu else "cpu",
        **settings,
    }


def pinned(command: Sequence[str], core: int | None) -> list[str]:
    """The command on one core, where the system can pin it."""
    on_one = core is not None and shutil.which("taskset") is not None
    return ["taskset", "-c", str(core), *command] if on_one else list(command)


def run(
    engine: str,
    folder: Path,
    options: Sequence[str] = (),
    *,
    python: str = sys.executable,
    core: int | None = None,
    gpu: bool = False,
    timeout: float | None = None,
    **probe: Any,
) -> dict[str, Any]:
    """One training process on a workload; its steps as the probe wrote them.

    probe: as for `environment`. Raises Failed where there are none.
    """
    runner, mode, _ = ENGINES[engine]
    out, log = folder / "probe.json", folder / f"{engine}.log"
    out.unlink(missing_ok=True)
    command = [python, str(HERE / runner), str(folder), mode, *options]
    settings = {"seconds": 1e9, "steps": 0, "warm": WARM, **probe, "out": out}
    with log.open("w") as file:
        try:
            ended = subprocess.run(
                pinned(command, core),
                env=environment(folder, gpu=gpu, **settings),
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=timeout,
            )
            why = f"ended with {ended.returncode} and no steps"
        except subprocess.TimeoutExpired:
            why = f"not done after {timeout:.0f} s"
    if not out.is_file():
        raise Failed(engine, why, log.read_text(errors="replace"))
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def venvs(items: Iterable[str]) -> dict[str, str]:
    """Environments by the module that each is for, from MODULE=DIR."""
    return dict(item.split("=", 1) for item in items)


def python_of(module: str, known: dict[str, str]) -> str:
    """The interpreter of a module's own environment, or this one."""
    return str(Path(known[module]) / "bin/python") if module in known else sys.executable


def installed(module: str, python: str) -> bool:
    """Whether a module can be imported by an interpreter."""
    found = f"importlib.util.find_spec({module!r})"
    code = f"import importlib.util, sys; sys.exit({found} is None)"
    return (
        subprocess.run([python, "-c", code], env=environment(Path()), check=False).returncode == 0
    )


def measured(seen: dict[str, Any]) -> dict[str, float]:
    """Rates from the last step of the warm-up to the last of all, and what the start cost.

    real, fill: tokens a second, and the share of them that is no padding. A GPU's peak is what
    torch had given out in the window, a CPU's what the process held at all.
    """
    steps, warm = seen["steps"], seen["warm"]
    first, last = steps[warm - 1], steps[-1]
    gpu = seen.get("gpu_bytes")
    return {
        "real": (last[1] - first[1]) / (last[0] - first[0]),
        "fill": (last[1] - first[1]) / (last[2] - first[2]),
        "a_step": (last[1] - first[1]) / (len(steps) - warm),
        "first_step": steps[0][0],
        "peak_mb": seen["peak_kb"] / 1024 if gpu is None else gpu / 2**20,
    }


def peak(core: int | None = None) -> float:
    """The best float32 matrix product of one core, in FLOP a CPU second."""
    command = pinned([sys.executable, "-c", PEAK], core)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return float(
        subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    )


def versions(pythons: Iterable[str]) -> dict[str, str]:
    """What the environments hold of what decides speed; itune as it is here."""
    # By name, so that of two on the path it is the one that is imported.
    code = (
        "import contextlib, importlib.metadata as m, itune, json\n"
        "found = {}\n"
        f"for name in {PACKAGES!r}:\n"
        "    with contextlib.suppress(m.PackageNotFoundError):\n"
        "        found[name] = m.version(name)\n"
        "print(json.dumps({**found, 'itune': itune.__version__}))"
    )
    found: dict[str, str] = {}
    for python in dict.fromkeys(pythons):
        text = subprocess.run(
            [python, "-c", code],
            env=environment(Path()),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for name, version in json.loads(text).items():
            if version not in found.get(name, "").split(" and "):
                found[name] = f"{found[name]} and {version}" if name in found else version
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


def asked(about: str, modes: Sequence[str]) -> argparse.Namespace:
    """The command line of every runner."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("folder", type=Path)
    parser.add_argument("mode", choices=modes)
    parser.add_argument("--rows", default="rows", choices=["rows", "tenth"])
    parser.add_argument("--full", action="store_true", help="all weights instead of an adapter")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence at most")
    parser.add_argument("--batch", type=int, help="rows or sequences of a micro-batch")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--tokens", type=int, default=1280, help="of a step, where it is asked for")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing")
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--attention", help="as transformers calls it")
    given = parser.parse_args()
    os.chdir(given.folder)
    return given


def dtype(given: argparse.Namespace) -> str:
    """What weights are kept in: those that are trained in float32, as bfloat16 rounds steps away.

    It is what itune does by itself; adapters are in float32 with each engine.
    """
    return "bfloat16" if given.device == "cuda" and not given.full else "float32"


def of_trainer(given: argparse.Namespace) -> dict[str, Any]:
    """What `TrainingArguments` and those who inherit it are told alike."""
    settings: dict[str, Any] = {
        "num_train_epochs": 1,
        "learning_rate": 2e-4,
        "save_strategy": "no",
        "report_to": "none",
        "gradient_accumulation_steps": given.accumulate,
        "gradient_checkpointing": given.recompute,
        "torch_compile": given.compile,
        "use_liger_kernel": given.liger,
        "bf16": given.device == "cuda",
        "use_cpu": given.device == "cpu",
    }
    if given.recompute:
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return settings
