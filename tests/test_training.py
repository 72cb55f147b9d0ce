"""Whole runs: resuming against never stopping, what is watched changes nothing, bad losses."""

from __future__ import annotations

import gc
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from itune import checkpoints, errors, generators, losses, pieces, rowlosses, sharding, storage


def test_checkpoints_are_whole_or_not_there(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"

    def state(step: int) -> checkpoints.State:
        weights = {"w": torch.full((3,), float(step))}
        return checkpoints.State(
            step,
            weights,
            {"state": {0: {"s": torch.ones(2)}}},
            {},
            [generators.state()],
            {},
        )

    for step in (1, 2, 3, 4):
        checkpoints.save(folder, state(step), run_id="mine", keep=2)
    assert [p.name for p in storage.numbered(folder)] == ["000004", "000003"]
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
        state = checkpoints.State(step, weights, {}, {}, [generators.state()], {})
        checkpoints.save(tmp_path, state, run_id="mine", keep=1)
    assert (foreign / "precious.txt").read_text() == "keep me"


RECIPE = """
model: {{name: {model}}}
adapter: {{peft_type: lora, r: 4, target_modules: all-linear, lora_dropout: 0.1}}
data:
  train: {{path: rows.jsonl, template: ./ask.yaml}}
  eval: {{path: rows.jsonl, template: ./ask.yaml, limit: 8}}
  allow_overlap: true
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
    assert " 0 tokens/s" not in again.err
    assert losses_of(tmp_path / "runs/killed") == losses_of(tmp_path / "runs/straight")
    ours, theirs = (
        (tmp_path / "runs" / name / "model" / "adapter_model.safetensors").read_bytes()
        for name in ("killed", "straight")
    )
    assert ours == theirs


def test_a_checkpoint_of_other_parameters_is_refused(
    tmp_path: Path, tiny_model_dir: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from itune import training

    folder_with(tmp_path, tiny_model_dir)
    with monkeypatch.context() as dying:
        dying.setattr(training._Loop, "_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        cli("tune", "-r", "tune.yaml", "-o", "runs/killed")
    run = tmp_path / "runs/killed"
    run_id = json.loads((run / "run.json").read_text())["id"]
    other = {"w": torch.ones(2)}, {"state": {99: {"exp_avg": torch.ones(2)}}, "param_groups": []}
    state = checkpoints.State(3, *other, {}, [generators.state()], {})
    checkpoints.save(run / "checkpoints", state, run_id=run_id, keep=1)
    ended = cli("tune", "-r", "tune.yaml", "-o", "runs/killed")
    assert ended.code == 2
    assert "000003: holds other parameters." in ended.err


@pytest.mark.parametrize("written", [1, 2, 3, 5])
@pytest.mark.parametrize("read", [1, 2, 4, 7])
def test_any_number_of_processes_reads_what_any_number_wrote(
    written: int, read: int, tmp_path: Path
) -> None:
    """Fewer rows than processes, and what has none, among it. Each has its share as FSDP2 cuts."""
    whole = {
        "seven": torch.arange(21.0).view(7, 3),
        "one": torch.ones(1, 2),
        "vector": torch.arange(4),
        "scalar": torch.tensor(5.0),
    }
    for index in range(written):
        peers = pieces.Peers(index, written, list)
        mine = {key: pieces.own(tensor, peers).contiguous() for key, tensor in whole.items()}
        save_file(mine, tmp_path / pieces.name("weights", peers))
    if written == 2:  # what a launch that was killed left
        save_file({"seven": torch.zeros(7, 3)}, tmp_path / "weights-00002-of-00003.safetensors")
    held = pieces.Pieces(tmp_path, "weights")
    for key, tensor in whole.items():
        assert torch.equal(held[key], tensor)
        assert held.shape(key) == tensor.shape
        for index in range(read if tensor.dim() else 0):
            chunks = torch.chunk(tensor, read)
            share = chunks[index] if index < len(chunks) else tensor[:0]
            assert torch.equal(held.own(key, pieces.Peers(index, read, list)), share)


def test_what_was_read_does_not_hold_a_checkpoint_on_the_disk(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4096)}, tmp_path / "weights.safetensors")
    held = pieces.Pieces(tmp_path, "weights")
    read = sharding.part(held, "w", torch.zeros(4096), pieces.ALONE)
    del held
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert read.sum() == 4096


def test_watching_changes_no_bit(tmp_path: Path, tiny_model_dir: Path, cli: Any) -> None:
    folder_with(tmp_path, tiny_model_dir)
    short = ("--set", "training.max_steps=7")
    watched = (*short, "--set", "training.row_losses=true", "--set", "training.profile=true")
    assert cli("tune", "-r", "tune.yaml", "-o", "runs/plain", *short).code == 0
    ended = cli("tune", "-r", "tune.yaml", "-o", "runs/watched", *watched)
    assert ended.code == 0
    ours, theirs = (tmp_path / "runs" / name for name in ("watched", "plain"))
    weights = "model/adapter_model.safetensors"
    assert (ours / weights).read_bytes() == (theirs / weights).read_bytes()
    assert losses_of(ours) == losses_of(theirs)

    # Every line of the log is the mean of its rows, weighed by their targets.
    lines = [json.loads(line) for line in (ours / "row_losses.jsonl").read_text().splitlines()]
    assert not (theirs / "row_losses.jsonl").exists()
    for step, loss, _ in losses_of(ours):
        rows = [line for line in lines if line["step"] == step]
        total = sum(line["loss"] * line["tokens"] for line in rows)
        assert total / sum(line["tokens"] for line in rows) == pytest.approx(loss, abs=1e-5)
    first = [line["row"] for line in lines if line["epoch"] <= 1.0]
    assert len(set(first)) == len(first) > 0
    assert {line["path"] for line in lines} == {"rows.jsonl"}

    trace = json.loads((ours / "trace.json").read_text())
    assert any("aten::" in event.get("name", "") for event in trace["traceEvents"])
    assert "Where the time went" in ended.out + ended.err
    assert "backward" in ended.out + ended.err


def test_how_a_step_is_cut_changes_no_gradient(
    tmp_path: Path, tiny_model_dir: Path, cli: Any
) -> None:
    """Gradients of micro-batches are divided by the targets of the whole step."""
    folder_with(tmp_path, tiny_model_dir)
    same = ("-s", "training.max_steps=3", "-s", "adapter.lora_dropout=0")
    for name, tokens in (("whole", 300), ("cut", 70)):
        cut = ("-s", f"training.micro_batch_tokens={tokens}")
        assert cli("tune", "-r", "tune.yaml", *same, *cut, "-o", f"runs/{name}").code == 0
    wanted = losses_of(tmp_path / "runs/whole")
    assert losses_of(tmp_path / "runs/cut") == [pytest.approx(x, rel=1e-4) for x in wanted]


def test_a_killed_run_keeps_each_row_loss_once(
    tmp_path: Path, tiny_model_dir: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_with(tmp_path, tiny_model_dir)
    rows = ("--set", "training.row_losses=true")
    assert cli("tune", "-r", "tune.yaml", "-o", "runs/straight", *rows).code == 0
    from itune import training

    real = training._Loop._step

    def dies_in_step_seven(self: Any, step: Any) -> Any:
        if self.at.step == 6:
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(training._Loop, "_step", dies_in_step_seven)
    cli("tune", "-r", "tune.yaml", "-o", "runs/killed", *rows)
    monkeypatch.setattr(training._Loop, "_step", real)
    with (tmp_path / "runs/killed/row_losses.jsonl").open("a") as file:
        file.write('{"step": 7, "row')
    assert cli("tune", "-r", "tune.yaml", "-o", "runs/killed", *rows).code == 0
    killed, straight = (
        (tmp_path / "runs" / name / "row_losses.jsonl").read_text()
        for name in ("killed", "straight")
    )
    assert killed == straight


def test_row_losses_are_on_the_disk_before_the_checkpoint_that_counts_on_them(
    tmp_path: Path, tiny_model_dir: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_with(tmp_path, tiny_model_dir)
    done: list[str] = []

    class Told(storage.Disk):
        def sync(self, path: Path) -> None:
            done.append(path.name)
            super().sync(path)

        def rename(self, old: Path, new: Path) -> None:
            done.append(new.name)
            super().rename(old, new)

    monkeypatch.setattr(storage, "DISK", Told())
    rows = ("--set", "training.row_losses=true")
    assert cli("tune", "-r", "tune.yaml", "-o", "runs/one", *rows).code == 0
    ends = [done.index(f"{step:06}") for step in (4, 8, 12)]
    for begin, end in zip([0, *ends], ends, strict=False):
        assert {"row_losses.jsonl", "log.jsonl"} <= set(done[begin:end])


def test_what_a_power_cut_left_behind_a_checkpoint_is_taken_out(tmp_path: Path) -> None:
    path = tmp_path / rowlosses.NAME
    whole = '{"step": 1, "row": 1}\n{"step": 2, "row": 2}\n'
    for lost in ("\0\0\0\n", '{"step": 3}\n', '{"st\n{"step": 2, "row": 9}\n', "[]\n", "5\n"):
        path.write_text(whole + lost)
        rowlosses.File(tmp_path, 2, writes=False)
        assert path.read_text() == whole + lost, "another process has no business in it"
        rowlosses.File(tmp_path, 2, writes=True)
        assert path.read_text() == whole


def test_the_run_says_how_it_computes(tmp_path: Path, tiny_model_dir: Path, cli: Any) -> None:
    folder_with(tmp_path, tiny_model_dir)
    short = ("--set", "training.max_steps=1")
    ended = cli("tune", "-r", "tune.yaml", *short, "--set", "training.packing=false")
    assert "batches: padding, fused loss at the targets (training.packing is off)" in ended.err
    kept = json.loads((tmp_path / "runs/tune/run.json").read_text())
    assert kept["path"]["layout"] == "padding"
    assert kept["path"]["why"] in ended.err
    assert 0 <= kept["waited"] <= kept["seconds"]
    ended = cli(
        "tune", "-r", "tune.yaml", *short, "--fresh", "-s", "training.gradient_checkpointing=true"
    )
    assert ended.code == 0
    assert "batches: per-row attention, fused loss at the targets" in ended.err


def test_a_model_that_padding_changes_trains_one_row_at_a_time(
    tmp_path: Path, tiny_model_dir: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.AutoConfig.for_model(
        "roberta", **sizes, num_attention_heads=4, vocab_size=320, pad_token_id=2, is_decoder=True
    )
    folder = tmp_path / "roberta"
    shutil.copytree(tiny_model_dir, folder)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    folder_with(tmp_path, folder)
    real, rows = losses.summed, []

    def seen(model: Any, batch: Any, **given: Any) -> Any:
        if model.training:
            rows.append(len(batch.lengths))
        return real(model, batch, **given)

    monkeypatch.setattr(losses, "summed", seen)
    short = ("--set", "training.max_steps=2", "--set", "model.family=causal")
    ended = cli("tune", "-r", "tune.yaml", *short)
    assert ended.code == 0, ended.err
    assert "batches: one row at a time, fused loss at the targets (" in ended.err
    assert len(rows) > 10
    assert set(rows) == {1}
    kept = json.loads((tmp_path / "runs/tune/run.json").read_text())
    assert (kept["path"]["layout"], kept["packed"]) == ("alone", False)


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


def _bad_at(patch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """The loss of these steps, counted from one, is no number."""
    from itune import training

    real = training._Loop._backward

    def spoilt(self: Any, *given: Any) -> Any:
        return real(self, *given) * (math.nan if self.at.step + 1 in steps else 1.0)

    patch.setattr(training._Loop, "_backward", spoilt)


def test_a_step_that_is_not_finite_is_logged_as_it_is_and_not_applied(
    tmp_path: Path, tiny_model_dir: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_with(tmp_path, tiny_model_dir)
    _bad_at(monkeypatch, {5, 6, 8})
    ended = cli("tune", "-r", "tune.yaml", "-q")
    assert ended.code == 0, ended.err
    assert ended.err.count("not finite, so the step is not applied") == 3
    log = (tmp_path / "runs/tune/log.jsonl").read_text()
    lines = [json.loads(each) for each in log.splitlines()]
    assert [each["step"] for each in lines if each["loss"] == "nan"] == [5, 6, 8]


def test_three_steps_that_are_not_finite_end_a_run_and_are_told_with_their_rows(
    tmp_path: Path, tiny_model_dir: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_with(tmp_path, tiny_model_dir)
    options = ("-s", "training.save_steps=3")
    with monkeypatch.context() as patched:
        _bad_at(patched, {5, 6, 7})
        ended = cli("tune", "-r", "tune.yaml", *options)
    assert ended.code == 4, ended.err
    said = ended.err.splitlines()[-1]
    assert "the last of them 7 (loss nan" in said
    assert re.search(r"of rows\.jsonl rows? \d+[, \d]*( and \d+ more)?\. ", said), said
    assert "The last good checkpoint is runs/tune/checkpoints/000006." in said
    assert json.loads((tmp_path / "runs/tune/run.json").read_text())["state"] == "diverged"
    weights = load_file(tmp_path / "runs/tune/checkpoints/000006/weights.safetensors")
    assert all(torch.isfinite(each).all() for each in weights.values())
    before = load_file(tmp_path / "runs/tune/checkpoints/000003/weights.safetensors")
    assert any(not torch.equal(weights[name], before[name]) for name in weights), "step 4"


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
    assert "not finite" in (tmp_path / "runs/tune/report.html").read_text()
