"""The benchmark's simulations hold what is promised."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
from conftest import ROOT

METRICS = ("accuracy", "f1", "bleu", "rougeL", "squad_f1")


@pytest.fixture(scope="module")
def simulations() -> ModuleType:
    spec = importlib.util.spec_from_file_location("coverage", ROOT / "benchmarks" / "coverage.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("size", [200, 1000])
@pytest.mark.parametrize("name", METRICS)
def test_intervals_hold_the_truth(name: str, size: int, simulations: ModuleType) -> None:
    assert 0.93 <= simulations.coverage(name, size) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("size", [200, 1000])
def test_intervals_of_memorisation_hold_the_truth(size: int, simulations: ModuleType) -> None:
    assert 0.93 <= simulations.by_heart(size) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("size", [200, 1000])
@pytest.mark.parametrize("name", METRICS)
def test_alike_systems_are_seldom_called_different(
    name: str, size: int, simulations: ModuleType
) -> None:
    assert 0.03 <= simulations.alike(name, size) <= 0.07


def test_the_simulation_sees_a_wrong_interval(
    simulations: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With half the width the truth is missed far more often: the check can fail."""
    whole = simulations.coverage("accuracy", 200, trials=60)
    score = simulations.resampling.score

    def narrow(*arguments: object, **options: object) -> object:
        return score(*arguments, confidence=0.67, **options)

    monkeypatch.setattr(simulations.resampling, "score", narrow)
    assert simulations.coverage("accuracy", 200, trials=60) < 0.85 < whole
