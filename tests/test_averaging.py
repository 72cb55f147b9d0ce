"""The mean of the weights over the last steps: what it is, what it survives, where it counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.kills import LORA, prepare
from safetensors.torch import load_file

Cli = Callable[..., Any]


def tuned(cli: Cli, name: str, *sets: str) -> dict[str, torch.Tensor]:
    kept = ("training.save_steps=1", "training.save_total_limit=20", *sets)
    given = [each for value in (LORA, *kept) for each in ("-s", value)]
    done = cli("tune", "-r", "run.yaml", "-o", f"runs/{name}", *given)
    assert done.code == 0, done.err
    return load_file(f"runs/{name}/model/adapter_model.safetensors")


def test_the_result_is_the_mean_of_the_last_steps(
    tmp_path: Path, tiny_model_dir: Path, cli: Cli
) -> None:
    prepare(tmp_path, tiny_model_dir)
    plain, mean = tuned(cli, "plain"), tuned(cli, "mean", "training.swa_start=0.5")
    steps = [
        load_file(f"runs/plain/checkpoints/{step:06d}/weights.safetensors") for step in range(7, 13)
    ]
    assert len(mean) == len(steps[0]) > 0
    for name, found in mean.items():
        (own,) = (key for key in steps[0] if key.replace(".default", "") == name)
        wanted = torch.stack([each[own] for each in steps]).mean(0)
        assert torch.allclose(found, wanted, atol=1e-6), name
        assert not torch.allclose(plain[name], wanted, atol=1e-6), "or nothing is shown"
    logs = [
        [json.loads(line) for line in Path(f"runs/{name}/log.jsonl").read_text().splitlines()]
        for name in ("plain", "mean")
    ]
    for one, other in zip(*logs, strict=True):
        assert one["loss"] == other["loss"], "averaging changes no step"
        if "heldout_loss" in one:
            same = one["heldout_loss"] == other["heldout_loss"]
            assert same == (one["step"] <= 6), "what is measured is the mean, once there is one"


def test_a_mean_goes_on_after_a_kill(
    tmp_path: Path, tiny_model_dir: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from itune import training

    prepare(tmp_path, tiny_model_dir)
    averaged = ("training.swa_start=4", "training.save_steps=3")
    straight = tuned(cli, "straight", *averaged)
    real = training._Loop._apply

    def torn(self: Any, *given: Any) -> Any:
        if self.at.step == 10:
            raise KeyboardInterrupt
        return real(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(training._Loop, "_apply", torn)
        with pytest.raises(AssertionError):
            tuned(cli, "torn", *averaged)
    again = tuned(cli, "torn", *averaged)
    assert all(torch.equal(again[name], tensor) for name, tensor in straight.items())
