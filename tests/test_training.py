"""The loss and its gradient against plain transformers; resuming against never stopping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model

from itune import batches, checkpoints, data, encoding, errors, losses, probing


def corpus(lengths: list[int], seed: int = 0) -> data.Corpus:
    draw = np.random.default_rng(seed)
    examples = []
    for n in lengths:
        learnt = [k >= n // 2 for k in range(n)]
        examples.append(encoding.Tokens(draw.integers(4, 320, n).tolist(), learnt))
    return data.from_tokens(examples)


def reference(model: Any, made: data.Corpus) -> torch.Tensor:
    """Mean loss over the whole batch, one example at a time, by the model's own forward."""
    total = torch.zeros(())
    for k in range(len(made)):
        span = slice(int(made.starts[k]), int(made.starts[k + 1]))
        ids = torch.from_numpy(made.ids[span].astype(np.int64))[None]
        labels = ids.masked_fill(~torch.from_numpy(made.supervised[span])[None], -100)
        logits = model(input_ids=ids, use_cache=False).logits
        total = total + F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
    return total / int(made.targets.sum())


LENGTHS = [37, 2, 25, 60, 5, 1, 18, 90, 44, 9]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("micro", [1000, 70, 30])
def test_the_gradient_is_that_of_the_full_batch(packed: bool, micro: int) -> None:
    made, model = corpus(LENGTHS), tiny_model("causal")
    expected = reference(model, made)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    collate = batches.packed if packed else batches.padder(0)
    if packed:
        assert probing.choose(model, 90).layout == probing.ROWS
    total = 0.0
    for rows in batches.micro_batches(list(range(len(made))), made.lengths, micro):
        loss = losses.summed(model, collate(made, rows)) / int(made.targets.sum())
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(expected.item(), abs=1e-6)
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys()
    scale = max(float(g.abs().max()) for g in wanted.values())
    for name, gradient in wanted.items():
        assert float((got[name] - gradient).abs().max()) / scale < 1e-6, name


def test_a_batch_without_targets_has_no_loss() -> None:
    made = data.from_tokens([encoding.Tokens([5, 6, 7], [False] * 3)])
    loss = losses.summed(tiny_model("causal"), batches.padded(made, np.arange(1), 0))
    assert loss.item() == 0.0


def test_checkpoints_are_whole_or_not_there(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"

    def state(step: int) -> checkpoints.State:
        weights = {"w": torch.full((3,), float(step))}
        return checkpoints.State(
            step, weights, {"s": torch.ones(2)}, {}, [torch.get_rng_state()], {}
        )

    for step in (1, 2, 3, 4):
        checkpoints.save(folder, state(step), run_id="mine", keep=2)
    assert [p.name for p in checkpoints.steps(folder)] == ["000004", "000003"]
    found, warnings = checkpoints.latest(folder, "mine")
    assert found == folder / "000004"
    assert not warnings
    assert torch.equal(checkpoints.load(found).weights["w"], torch.full((3,), 4.0))

    spoilt = folder / "000004" / "weights.safetensors"
    spoilt.write_bytes(spoilt.read_bytes()[:-1] + b"x")
    found, warnings = checkpoints.latest(folder, "mine")
    assert found == folder / "000003"
    assert "sha256" in warnings[0]

    (folder / "000003" / "manifest.json").unlink()
    with pytest.raises(errors.RunError, match="none of 2 checkpoints"):
        checkpoints.latest(folder, "mine")


def test_rotation_leaves_what_another_made(tmp_path: Path) -> None:
    foreign = tmp_path / "000900"
    foreign.mkdir()
    (foreign / "precious.txt").write_text("keep me")
    weights = {"w": torch.ones(1)}
    for step in (1, 2, 3):
        state = checkpoints.State(step, weights, {}, {}, [torch.get_rng_state()], {})
        checkpoints.save(tmp_path, state, run_id="mine", keep=1)
    assert (foreign / "precious.txt").read_text() == "keep me"


RECIPE = """
model: {{name: {model}}}
adapter: {{peft_type: lora, r: 4, target_modules: all-linear, lora_dropout: 0.1}}
data:
  train: {{path: rows.jsonl, template: ./ask.yaml}}
  eval: {{path: rows.jsonl, template: ./ask.yaml, limit: 8}}
training:
  {{max_steps: 12, tokens_per_step: 300, micro_batch_tokens: 120, max_length: 128, save_steps: 4}}
"""
TEMPLATE = """
task: qa
prompts: ["Where is {{ who }}?", "{{ who }} is where?"]
response: "{{ where }}"
metrics: [exact_match]
"""


def folder_with(tmp_path: Path, model: Path) -> None:
    rows = [{"who": f"cat {i}", "where": f"in room {i % 7}"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ask.yaml").write_text(TEMPLATE)
    (tmp_path / "tune.yaml").write_text(RECIPE.format(model=model))


def losses_of(run: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def test_a_killed_run_goes_on_as_if_it_had_never_stopped(
    tmp_path: Path, tiny_model_dir: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_with(tmp_path, tiny_model_dir)
    assert cli("tune", "-r", "tune.yaml", "-o", "runs/straight").code == 0

    from itune import training

    real = training._Loop._step

    def dies_in_step_seven(self: Any, step: Any) -> Any:
        if self.at.step == 6:
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(training._Loop, "_step", dies_in_step_seven)
    cli("tune", "-r", "tune.yaml", "-o", "runs/killed")
    monkeypatch.setattr(training._Loop, "_step", real)
    again = cli("tune", "-r", "tune.yaml", "-o", "runs/killed")
    assert again.code == 0
    assert "resuming after step 4 of 12" in again.err
    assert losses_of(tmp_path / "runs/killed") == losses_of(tmp_path / "runs/straight")
    ours, theirs = (
        (tmp_path / "runs" / name / "model" / "adapter_model.safetensors").read_bytes()
        for name in ("killed", "straight")
    )
    assert ours == theirs


def test_a_finished_run_does_nothing_and_another_recipe_is_refused(
    tmp_path: Path, tiny_model_dir: Path, cli: Any
) -> None:
    folder_with(tmp_path, tiny_model_dir)
    short = ("--set", "training.max_steps=2")
    assert cli("tune", "-r", "tune.yaml", *short).code == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    again = cli("tune", "-r", "tune.yaml", *short)
    assert again.code == 0
    assert "already complete" in again.err
    assert before == {
        p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*") if p.is_file()
    }
    other = cli("tune", "-r", "tune.yaml", *short, "--set", "training.learning_rate=0.5")
    assert other.code == 2
    assert "training.learning_rate" in other.err
    assert "--fresh" in other.err


def test_a_loss_that_is_not_finite_ends_the_run(
    tmp_path: Path, tiny_model_dir: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_with(tmp_path, tiny_model_dir)
    real = losses.summed
    monkeypatch.setattr(losses, "summed", lambda *a, **k: real(*a, **k) * float("nan"))
    ended = cli("tune", "-r", "tune.yaml")
    assert ended.code == 4
    assert "not finite" in ended.err
    assert json.loads((tmp_path / "runs/tune/run.json").read_text())["state"] == "diverged"
