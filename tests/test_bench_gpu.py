"""The GPU benchmark: its command line, its tables, its count of operations, and itself in small."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT

import itune

SCRIPT = ROOT / "benchmarks" / "gpu.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("gpu")


@pytest.fixture
def found(bench: ModuleType) -> Any:
    """Two rounds of three contenders on one model, and one that had no room."""

    def run(real: float, step: float = 4000, peak: float = 1000) -> dict[str, float]:
        return {"real": real, "fill": 1.0, "a_step": step, "first_step": 9.0, "peak_mb": peak}

    return bench.Found(
        trained={
            "qwen3-tiny": {
                "itune": [run(3000), run(3200, peak=800)],
                "trl-pack": [run(900)],
                "trl-pack-small": [run(1500), run(1600), run(1800)],
                "trainer-pad-recomputed": [run(1000, step=4300)],
            }
        },
        answered={"qwen3-tiny": {"itune answers": [{"rate": 500.0, "seconds": 2.0}]}},
        failed={"qwen3-tiny trainer-pad": "out of memory"},
        absent={"itune-liger": ["liger_kernel"]},
    )


def text_of(bench: ModuleType, found: Any, *arguments: str) -> str:
    given = bench.options(["--size", "small", *arguments])
    stats = {"qwen3-tiny": {"tokens": 100, "learnt": 25, "work": 4e5, "full_work": 6e5}}
    facts = bench.report.Facts("A card", {"torch": "2.11.0"}, 1e10, 90.0)
    return str(bench.report.written(found, stats, bench.SIZES["small"], given, facts))


def test_the_table_holds_medians_beside_the_fastest_of_each_tool(
    bench: ModuleType, found: Any
) -> None:
    text = text_of(bench, found)
    assert "| itune | 3,100 | 775 | 0.186 | 0.94 | 4,000 | 2 |" in text
    assert "| trl-pack-small | 1,600 | 400 | 0.096 | 1.05 | 4,000 | 3 |" in text
    assert "1.94 times the supervised tokens/s of TRL's fastest (trl-pack-small) at 0.90" in text
    assert "3.10 times the supervised tokens/s of Trainer's fastest (trainer-pad-recom" in text
    assert "| itune | 500 | 2.0 |  | 1 |" in text
    assert "A card; torch 2.11.0" in text
    assert "not installed: itune-liger (liger_kernel)." in text
    assert "Failed: qwen3-tiny trainer-pad: out of memory." in text
    assert "no figure to judge by" in text
    assert "| itune | 3,100 | 775 | 0.124 |" in text_of(bench, found, "--lora")


def test_best_settings_go_on(bench: ModuleType, found: Any) -> None:
    trained = found.trained["qwen3-tiny"]
    assert bench.best(trained) == ["itune", "trl-pack-small", "trainer-pad-recomputed"]


def test_what_cannot_be_compared_is_told_of(bench: ModuleType, found: Any) -> None:
    assert bench.report.faults(found) == []
    found.failed["qwen3-tiny trl-pack"] = "ended with 1 and no steps: KeyError: 'x'"
    found.trained["qwen3-tiny"]["trl-pack-small"] = [
        {"real": 1.0, "a_step": 3000.0, "peak_mb": 1.0}
    ]
    assert bench.report.faults(found) == [
        "qwen3-tiny trl-pack: ended with 1 and no steps: KeyError: 'x'",
        "qwen3-tiny trl-pack-small: 3,000 tokens a step, where the first has 4,000",
    ]


@pytest.mark.parametrize(
    ("card", "peak"),
    [("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12)],
)
def test_cards_are_known_by_name(bench: ModuleType, card: str, peak: float) -> None:
    assert bench.report.peak(card, None) == peak
    assert bench.report.peak(card, 5.0) == 5e12
    assert bench.report.peak("NVIDIA NoSuchCard", None) is None


def test_every_contender_has_an_engine_and_equal_tokens(bench: ModuleType) -> None:
    made = bench.Bench(bench.options([]), 0.0)
    made.stats = {"qwen3-0.6b": {"tokens": 400_000, "rows": 1000}}
    for contender in bench.CONTENDERS.values():
        line = made.options("qwen3-0.6b", contender)
        batch, times = (int(line[line.index(f) + 1]) for f in ("--batch", "--accumulate"))
        width = 2048 if contender.engine in ("itune", "trl-pack") else 400
        assert abs(batch * times * width / 32_768 - 1) < bench.report.APART
        assert contender.engine in bench.engines.ENGINES


def test_one_that_has_no_room_runs_with_activations_recomputed(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(engine: str, _folder: Any, options: list[str], **_limits: Any) -> dict[str, Any]:
        if "--recompute" not in options:
            raise bench.engines.Failed(engine, "ended with 1", "torch: CUDA out of memory. Tried")
        steps = [[1.0, 100, 100], [2.0, 200, 200], [3.0, 400, 400]]
        return {"steps": steps, "warm": 1, "peak_kb": 1024, "gpu_bytes": 2**21}

    monkeypatch.setattr(bench.engines, "run", run)
    made = bench.Bench(bench.options(["--size", "small"]), bench.time.monotonic())
    made.stats = {"qwen3-tiny": {"tokens": 60_000, "rows": 1000}}
    for _ in range(2):
        made.train("qwen3-tiny", "trl-pack")
    (name, runs), *others = made.found.trained["qwen3-tiny"].items()
    assert (name, others) == ("trl-pack-recomputed", [])
    assert [(run["real"], run["a_step"], run["peak_mb"]) for run in runs] == [(150, 150, 2)] * 2
    made.given.minutes = 0
    made.train("qwen3-tiny", "itune")
    assert list(made.found.trained["qwen3-tiny"]) == [name]


def test_versions_are_those_that_are_imported(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, version in (("first", "1.2"), ("second", "3.4")):
        info = tmp_path / folder / f"trl-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: trl\nVersion: {version}\n")
    both = os.pathsep.join(str(tmp_path / folder) for folder in ("first", "second"))
    monkeypatch.setenv("PYTHONPATH", both)
    found = bench.engines.versions([sys.executable])
    assert found["trl"] == "1.2"
    assert found["itune"] == itune.__version__


def test_an_unknown_contender_is_refused() -> None:
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), "--contenders", "itune,trl"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert "--contenders: unknown 'trl'. Known: itune, " in ended.stderr


def test_a_python_without_libraries_is_told_of() -> None:
    line = [sys.executable, "-S", str(SCRIPT)]
    ended = subprocess.run(line, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "has no numpy: name a Python that has torch" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_useful_work_is_what_torch_counts(bench: ModuleType) -> None:
    """On one row, all of it learnt. Attention is counted by torch without the half that is not
    causal, and apart.
    """
    import torch
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    workload = importlib.import_module("workload")
    shape, vocabulary, length = workload.SHAPES["qwen3-tiny"], 300, 32
    config = workload.config(shape, vocabulary, 64)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids = torch.arange(length)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    counted = counter.get_total_flops()
    wanted = length * workload.work(shape, length, length, 0, vocabulary, full=True)
    attention = 12 * length**2 * shape.heads * shape.size * shape.layers  # all pairs, both products
    assert counted == wanted + attention


@pytest.mark.slow
def test_the_small_size_runs(bench: ModuleType) -> None:
    command = [sys.executable, str(SCRIPT), "--size", "small", "--warm", "1", "--steps", "1"]
    command += ["--rounds", "1", "--contenders", "itune,trl-pack,trainer-flat"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "| itune | " in ended.stdout, ended.stderr[-800:]
    kept = json.loads(next(bench.Path(".bench/gpu").glob("results-*.json")).read_text())
    assert {"itune", "trainer-flat"} <= set(kept["trained"]["qwen3-tiny"])
    assert set(kept["answered"]["qwen3-tiny"]) == {"itune answers", "batches answers"}
    if importlib.util.find_spec("trl") is None:
        assert kept["absent"] == {"trl-pack": ["trl"]}
