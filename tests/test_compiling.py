"""Compiled layers: the same numbers as plain ones, checked by the run itself, gone when it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from test_training import folder_with, losses_of

Cli = Callable[..., Any]
COMPILED = ("-s", "training.torch_compile=true", "-s", "training.torch_compile_backend=aot_eager")
SHORT = ("tune", "-r", "tune.yaml", "-s", "training.max_steps=4")


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("training.gradient_checkpointing=true",)], ids=["", "again"])
def test_a_compiled_run_gives_the_losses_of_a_plain_one(
    more: tuple[str, ...], tmp_path: Path, tiny_model_dir: Path, cli: Cli
) -> None:
    folder_with(tmp_path, tiny_model_dir)
    options = [word for setting in more for word in ("-s", setting)]
    plain = cli(*SHORT, "-s", "adapter.lora_dropout=0", *options, "-o", "runs/plain")
    assert plain.code == 0, plain.err
    made = cli(*SHORT, "-s", "adapter.lora_dropout=0", *options, *COMPILED, "-o", "runs/compiled")
    assert made.code == 0, made.err
    assert "compiled: 2 layers by aot_eager, compared with plain computing" in made.err
    wanted = losses_of(tmp_path / "runs/plain")
    assert losses_of(tmp_path / "runs/compiled") == [pytest.approx(x, rel=1e-4) for x in wanted]
    kept = json.loads((tmp_path / "runs/compiled/run.json").read_text())
    assert kept["state"] == "finished"


@pytest.mark.slow
def test_layers_that_compute_something_else_are_not_used(
    tmp_path: Path, tiny_model_dir: Path, cli: Cli
) -> None:
    folder_with(tmp_path, tiny_model_dir)

    def faulty(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        return lambda *given: tuple(
            x * 1.01 if torch.is_tensor(x) and x.is_floating_point() else x for x in graph(*given)
        )

    torch._dynamo.register_backend(faulty, name="faulty")
    ended = cli(*SHORT, *COMPILED[:3], "training.torch_compile_backend=faulty")
    assert ended.code == 3, ended.err
    assert "training.torch_compile: the compiled layers (faulty) do not serve: off by" in ended.err


def test_a_backend_that_is_not_there_is_named(
    tmp_path: Path, tiny_model_dir: Path, cli: Cli
) -> None:
    folder_with(tmp_path, tiny_model_dir)
    ended = cli(*SHORT, COMPILED[0], COMPILED[1], "-s", "training.torch_compile_backend=inducter")
    assert ended.code == 2
    assert "training.torch_compile_backend: unknown 'inducter'" in ended.err
    assert "inductor" in ended.err
