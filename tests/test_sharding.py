"""A model that is cut over processes trains to what a whole one does. On a CPU, by gloo.

The same calls cut it on GPUs, which no test here shows.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import Itune, saved
from faults.kills import prepare
from safetensors.torch import load_file

from itune import errors, sharding

Cli = Callable[..., Any]
FSDP = ("-p", "2", "-s", "launch.fsdp=true")
LORA = ("-s", "adapter={peft_type: lora, r: 4, target_modules: all-linear}")
NEAR = 1e-5  # of losses, norms and weights. The order of sums alone differs: seen 8e-7


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    """A folder with data and recipe, and a tiny Llama of 115,008 parameters without dropout."""
    prepare(tmp_path, saved(tmp_path / "made", "causal"))
    return tmp_path


def line(*more: object) -> list[str]:
    return ["tune", "-r", "run.yaml", *map(str, more)]


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(each) for each in (run / "log.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    (path,) = (run / "model").glob("*model.safetensors")
    return load_file(path)


def same(one: Path, other: Path, near: float = NEAR) -> None:
    """Losses, gradient norms, held-out losses and weights are the same, within `near`."""
    first, second = log(one), log(other)
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        for key in {"loss", "grad_norm", "heldout_loss"} & {*a, *b}:
            assert b[key] == pytest.approx(a[key], rel=near)
        assert (a["tokens"], a["supervised_tokens"]) == (b["tokens"], b["supervised_tokens"])
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    assert max(float((left[k] - right[k]).abs().max()) for k in left) < near


def kept(run: Path) -> list[int]:
    """How many parameters each process held, by the sizes of its own tensors."""
    found: list[int] = json.loads((run / "run.json").read_text())["fsdp"]["kept"]
    return found


@pytest.mark.slow
def test_all_weights_are_trained_as_by_one_process(ready: Path, cli: Cli, itune: Itune) -> None:
    assert cli(*line("-q", "-o", "runs/one")).code == 0
    two = itune(*line("-o", "runs/two", *FSDP))
    assert two.returncode == 0, two.stderr
    assert "Warning" not in two.stderr
    same(ready / "runs/one", ready / "runs/two")
    assert kept(ready / "runs/two") == [57_504, 57_504]
    assert "each keeps up to 57,504 parameters" in two.stderr

    shutil.rmtree(ready / "model")  # the result needs nothing but itself
    model = transformers.AutoModelForCausalLM.from_pretrained(ready / "runs/two/model")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.architectures == ["LlamaForCausalLM"]
    trained = weights(ready / "runs/two")
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())


@pytest.mark.slow
def test_an_adapter_is_trained_as_by_one_process_where_one_of_two_has_no_rows(
    ready: Path, cli: Cli, itune: Itune
) -> None:
    """A step of one row is the first process's; the second gathers and gives weights all the same.
    What is computed again in the backward pass is gathered again. Parts are in the machine's memory
    anyway.
    """
    few = (*LORA, "-s", "training.tokens_per_step=20", "-s", "training.gradient_checkpointing=true")
    assert cli(*line("-q", "-o", "runs/one", *few)).code == 0
    two = itune(*line("-o", "runs/two", *few, *FSDP, "-s", "launch.cpu_offload=true"))
    assert two.returncode == 0, two.stderr
    assert "launch.cpu_offload: this computes on a CPU" in two.stderr
    same(ready / "runs/one", ready / "runs/two")
    assert kept(ready / "runs/two") == [61_600, 61_600]
    base = transformers.AutoModelForCausalLM.from_pretrained(ready / "model")
    tuned = peft.PeftModel.from_pretrained(base, ready / "runs/two/model")
    assert tuned(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_one_process_has_nothing_to_cut_and_says_so(ready: Path, cli: Cli) -> None:
    ended = cli(*line("-s", "launch.fsdp=true", "-s", "training.max_steps=1"))
    assert ended.code == 0, ended.err
    assert "launch.fsdp: one process, which holds the whole model" in ended.err


@pytest.mark.parametrize(
    ("said", "told"),
    [("Connection closed by peer", RuntimeError), ("It is a view", errors.ModelError)],
)
def test_a_process_that_is_gone_is_no_fault_of_the_model(
    said: str, told: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any) -> None:
        raise RuntimeError(said)

    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(sharding, "_shard", gone)
    monkeypatch.setattr(sharding, "_seen", lambda *_: [])
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(told, match=said):
        sharding.cut(layer, [], None, "full", None, None)  # type: ignore[arg-type]


SHORT = """
import os
from itune import cli, losses
import torch
real = losses.summed
def summed(model, batch, **given):
    loss = real(model, batch, **given)
    if "balance" in given and os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
    return loss
losses.summed = summed
cli.main()
"""
WRONG = """
from itune import cli, sharding
real = sharding._shard
def shard(model, *given):
    real(model, *given)
    model.set_gradient_divide_factor(2.0)
sharding._shard = shard
cli.main()
"""
TOLD = {
    SHORT: (3, "launch.fsdp: a micro-batch of 150 tokens does not fit the memory (CUDA out of "),
    WRONG: (2, "launch.fsdp: LlamaForCausalLM cannot be cut over processes: the gradient of "),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", TOLD, ids=["short of memory", "wrong gradients"])
def test_what_cannot_be_cut_ends_in_a_line(script: str, ready: Path) -> None:
    """Also where one process alone runs short, and the others wait for it."""
    code, said = TOLD[script]
    (ready / "script.py").write_text(script)
    ended = launched(ready, "script.py", "-o", "runs/ended")
    assert said in ended.stderr
    assert f"exitcode  : {code}" in ended.stderr
    assert not [*(ready / "runs/ended/checkpoints").glob("0*")]
    assert json.loads((ready / "runs/ended/run.json").read_text())["state"] == "failed"


def launched(
    folder: Path, script: str, *more: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A script that changes itune, by two processes."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    return subprocess.run(
        [sys.executable, *start, *line(*more, "-s", "launch.fsdp=true")],
        cwd=folder, capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", **environment},
    )  # fmt: skip


TORN = """
import os, signal
from itune import cli, training
real = training._Loop._apply
def torn(self, *given):
    if self.at.step == 5 and "KILLED" in os.environ:
        os._exit(9)
    if self.at.step == 8 and "STOPPED" in os.environ:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(self, *given)
training._Loop._apply = torn
cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), LORA], ids=["full", "lora"])
def test_a_run_that_went_on_is_the_one_that_never_stopped(
    more: tuple[str, ...], ready: Path, itune: Itune, cli: Cli
) -> None:
    """Killed after a checkpoint, stopped by a signal, and gone on with to the end: bit for bit."""
    more = (*more, "-s", "training.save_steps=4", "-s", "training.micro_batch_tokens=60", "-q")
    done = itune(*line("-o", "runs/straight", *more, *FSDP))
    assert done.returncode == 0, done.stderr
    (ready / "torn.py").write_text(TORN)
    for how, steps in (("KILLED", 5), ("STOPPED", 9)):
        ended = launched(ready, "torn.py", "-o", "runs/torn", *more, **{how: "yes"})
        assert ended.returncode != 0
        assert len(log(ready / "runs/torn")) == steps, ended.stderr
    assert "stopped by SIGTERM after step 9 of 12, with a checkpoint" in ended.stderr
    shutil.copytree(ready / "runs/torn", ready / "runs/whole")
    done = itune(*line("-o", "runs/torn", *more, *FSDP))
    assert done.returncode == 0, done.stderr

    def left(run: Path) -> object:
        logged = [{k: v for k, v in each.items() if k != "seconds"} for each in log(run)]
        (path,) = (run / "model").glob("*model.safetensors")
        return logged, hashlib.sha256(path.read_bytes()).hexdigest()

    assert left(ready / "runs/torn") == left(ready / "runs/straight")
    # What two processes wrote, any number reads: whole by two, cut by three, and by one.
    for name, go_on in (("two", ("-p", "2")), ("three", ("-p", "3", *FSDP[2:])), ("one", ())):
        shutil.copytree(ready / "runs/whole", ready / "runs" / name)
        done = itune(*line("-o", f"runs/{name}", *more, *go_on))
        assert done.returncode == 0, done.stderr
        same(ready / "runs" / name, ready / "runs/straight")
    assert kept(ready / "runs/three") != kept(ready / "runs/straight")
    assert cli(*line("-o", "runs/never", *more)).code == 0
    same(ready / "runs/never", ready / "runs/straight")


@pytest.mark.slow
def test_each_process_writes_its_own_rows_of_a_checkpoint(ready: Path, itune: Itune) -> None:
    """Half of every weight and moment; put together they are what one process writes."""
    more = ("-s", "training.save_steps=4", "-s", "training.max_steps=4", "-q")
    for name, parts in (("whole", ("-p", "2")), ("cut", FSDP)):
        done = itune(*line("-o", f"runs/{name}", *more, *parts))
        assert done.returncode == 0, done.stderr
    whole, cut = (ready / "runs" / name / "checkpoints/000004" for name in ("whole", "cut"))
    for kind in ("weights", "optimizer"):
        one = load_file(whole / f"{kind}.safetensors")
        halves = [load_file(cut / f"{kind}-0000{n}-of-00002.safetensors") for n in (1, 2)]
        assert not (cut / f"{kind}.safetensors").exists()
        for key, tensor in one.items():
            if tensor.dim() == 0:
                assert key in halves[0]
                assert key not in halves[1]
                continue
            first, second = (half[key] for half in halves)
            assert len(first) == -(-len(tensor) // 2)
            assert float((torch.cat([first, second]) - tensor).abs().max()) < NEAR


def ends(folder: Path, itune: Itune, *more: str) -> str:
    """Go on with a cut run to its end, each of whose steps is there once; what was said."""
    done = itune(*line(*more, *FSDP))
    assert done.returncode == 0, done.stderr
    assert [each["step"] for each in log(folder / "runs/run")] == [*range(1, 13)]
    said: str = done.stderr
    return said


FULL = """
import errno, os
from itune import cli, storage
class Full(storage.Disk):
    def produce(self, path, produce):
        if os.environ["RANK"] == "1" and "000008" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().produce(path, produce)
storage.DISK = Full()
cli.main()
"""


@pytest.mark.slow
def test_a_part_that_cannot_be_written_leaves_the_checkpoint_before(
    ready: Path, itune: Itune
) -> None:
    """The disk of the second process is full: each says so, and nothing half is left."""
    more = ("-o", "runs/run", "-s", "training.save_steps=4")
    (ready / "full.py").write_text(FULL)
    ended = launched(ready, "full.py", *more)
    assert "exitcode  : 3" in ended.stderr
    assert "000008: the checkpoint could not be written" in ended.stderr
    assert "No space left on device" in ended.stderr
    folder = ready / "runs/run/checkpoints"
    assert [path.name for path in sorted(folder.iterdir())] == ["000004"]
    ends(ready, itune, *more)


@pytest.mark.slow
def test_a_checkpoint_without_the_part_of_a_process_is_passed_over(
    ready: Path, itune: Itune
) -> None:
    more = ("-o", "runs/run", "-s", "training.save_steps=4")
    (ready / "torn.py").write_text(TORN)
    launched(ready, "torn.py", *more, STOPPED="yes")
    (ready / "runs/run/checkpoints/000009/weights-00002-of-00002.safetensors").unlink()
    said = ends(ready, itune, *more)
    assert "000009: passed over, weights-00002-of-00002.safetensors is missing" in said


READ = """
from itune import cli, layerwise
layerwise.fits = lambda *_: False
cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), LORA], ids=["full", "lora"])
def test_a_model_that_is_read_layer_by_layer_trains_to_the_same_bits(
    more: tuple[str, ...], ready: Path, itune: Itune
) -> None:
    """What is tried beforehand is tried on a stand-in; log, config and weights are the same."""
    config = transformers.LlamaConfig.from_pretrained(ready / "model")
    config.num_hidden_layers = 5
    (ready / "model/model.safetensors").unlink()
    transformers.LlamaForCausalLM(config).save_pretrained(ready / "model", max_shard_size="100KB")
    (ready / "script.py").write_text(READ)
    more = (*more, "-s", "training.max_steps=4", "-s", "training.save_steps=2")
    whole = itune(*line("-o", "runs/whole", *more, *FSDP))
    assert whole.returncode == 0, whole.stderr
    read = launched(ready, "script.py", "-o", "runs/read", *more)
    assert read.returncode == 0, read.stderr
    assert "tried beforehand are 2 of its 5 layers" in read.stderr

    def left(run: Path) -> object:
        logged = [{k: v for k, v in each.items() if k != "seconds"} for each in log(run)]
        paths = sorted(each for each in (run / "model").iterdir() if each.name != "README.md")
        return logged, [(p.name, hashlib.sha256(p.read_bytes()).hexdigest()) for p in paths]

    assert left(ready / "runs/read") == left(ready / "runs/whole")
    assert kept(ready / "runs/read") == kept(ready / "runs/whole")
