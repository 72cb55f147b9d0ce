"""The same job by every launcher: as many processes as were asked for, the same log and weights."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.kills import LORA, MIXTURE, prepare
from test_elastic import assert_the_same, line

from itune import launching

PYTHON = sys.executable
ACCELERATE = [PYTHON, "-m", "accelerate.commands.launch"]
TORCHRUN = [PYTHON, "-m", "torch.distributed.run", "--standalone"]
ITUNE = ["-m", "itune"]
CPU = {"ACCELERATE_USE_CPU": "true"}
TWO = ["launch.num_processes=2"]
# How two processes are asked for: the launcher, options of itune's, the environment.
WAYS: dict[str, tuple[list[str], list[str], dict[str, str]]] = {
    "recipe": ([PYTHON, *ITUNE], ["-s", *TWO], {}),
    "torchrun": ([*TORCHRUN, "--nproc_per_node", "2", *ITUNE], [], {}),
    "accelerate multi_gpu": ([*ACCELERATE, "--multi_gpu", "--num_processes", "2", *ITUNE], [], CPU),
    "accelerate cpu": ([*ACCELERATE, "--cpu", "--num_processes", "2", *ITUNE], [], {}),
    "accelerate settings": ([*ACCELERATE, "--config_file", "two.yaml", *ITUNE], ["-p", "2"], {}),
}
SETTINGS = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
mixed_precision: 'no'
num_machines: 1
num_processes: 2
use_cpu: true
"""


@pytest.fixture
def ready(tmp_path: Path, tiny_model_dir: Path) -> Path:
    prepare(tmp_path, tiny_model_dir)
    rows = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:53]))
    (tmp_path / "two.yaml").write_text(SETTINGS)
    return tmp_path


def start(
    folder: Path, launcher: list[str], given: list[str], env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*launcher, *given], cwd=folder, capture_output=True, text=True, timeout=300,
        check=False, env={**os.environ, **env},
    )  # fmt: skip


def left(run: Path) -> dict[str, Any]:
    logged = [json.loads(each) for each in (run / "log.jsonl").read_text().splitlines()]
    (weights,) = (run / "model").glob("*model.safetensors")
    return {
        "log": [{k: v for k, v in each.items() if k != "seconds"} for each in logged],
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "processes": json.loads((run / "run.json").read_text())["processes"],
    }


def test_two_launches_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate's launcher calls each launch none:127.0.0.1:29500."""
    given = {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
    for name, value in (given | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("ITUNE_SUPERVISED", raising=False)
    names = []
    for _ in range(2):
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        monkeypatch.setenv("MASTER_PORT", str(store.port))
        for rank in "01":
            monkeypatch.setenv("RANK", rank)
            launching._drawn.cache_clear()
            names.append(launching.launch_id().replace(str(store.port), "29500"))
    launching._drawn.cache_clear()
    assert names[0] == names[1] != names[2] == names[3]


@pytest.mark.parametrize(
    ("said", "gone"),
    [
        ("ncclRemoteError: a remote process exited or there was a network error", True),
        ("Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1a000", False),
        ("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1", True),
    ],
)
def test_a_fault_of_the_group_is_not_taken_for_a_process_that_is_gone(
    said: str, gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert launching.lost_peer(torch.distributed.DistBackendError(said)) is gone


@pytest.mark.slow
def test_every_launcher_runs_the_same_job(ready: Path) -> None:
    given = ["tune", "-r", "run.yaml", "-q", "-s", LORA]
    first = start(ready, [PYTHON, *ITUNE], [*given, "-p", "2", "-o", "runs/p"], {})
    assert first.returncode == 0, first.stderr
    wanted = left(ready / "runs/p")
    assert wanted["processes"] == 2
    for number, (name, (launcher, more, env)) in enumerate(WAYS.items()):
        ended = start(ready, launcher, [*given, *more, "-o", f"runs/{number}"], env)
        assert ended.returncode == 0, f"{name}: {ended.stderr}"
        assert left(ready / f"runs/{number}") == wanted, name


@pytest.mark.parametrize(
    ("launcher", "env", "there"),
    [
        (TORCHRUN, {}, 1),
        ([*ACCELERATE, "--cpu", "--num_processes", "3"], {}, 3),
        pytest.param(
            [*ACCELERATE, "--multi_gpu", "--num_processes", "3"], CPU, 3, marks=pytest.mark.slow
        ),
        pytest.param(
            [*ACCELERATE, "--config_file", "two.yaml", "--num_processes", "3"], {}, 3,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["torchrun", "accelerate cpu", "accelerate multi_gpu", "accelerate settings"],
)  # fmt: skip
def test_another_number_than_the_launcher_s_is_refused(
    launcher: list[str], env: dict[str, str], there: int, ready: Path
) -> None:
    ended = start(ready, [*launcher, *ITUNE], ["tune", "-r", "run.yaml", "-s", *TWO], env)
    # A launcher has codes of its own: that of the process stands in what it says.
    assert ended.returncode != 0
    assert "error: 2 processes are asked for by --processes or launch.num_processes, and " in (
        ended.stderr
    )
    assert f"and {there} by the launcher" in ended.stderr
    assert "3" in ended.stderr.split("xit")[-1]
    assert not (ready / "runs").exists()


def under(monkeypatch: pytest.MonkeyPatch, **env: str) -> None:
    for name, value in {"ACCELERATE_DYNAMO_BACKEND": "NO", **env}.items():
        monkeypatch.setenv(name, value)


def test_several_that_cannot_be_counted_are_refused(
    ready: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the launcher is no process of this machine's that can be read."""
    under(monkeypatch, MASTER_PORT="29500", MASTER_ADDR="127.0.0.1")
    ended = cli("tune", "-r", "run.yaml")
    assert ended.code == 3
    assert "several processes and started one. Start them with itune --processes N" in ended.err
    assert not (ready / "runs").exists()


def test_processes_of_mpi_are_refused(
    ready: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    under(monkeypatch, OMPI_COMM_WORLD_SIZE="2")
    ended = cli("tune", "-r", "run.yaml")
    assert ended.code == 3
    assert "started 2 processes by MPI" in ended.err
    assert not (ready / "runs").exists()


COMBINED = {
    "full": [],
    "lora": [LORA.replace("lora_dropout: 0.1", "lora_dropout: 0")],
    "accumulated": ["training.micro_batch_tokens=70"],
    "padded": ["training.packing=false"],
    "mixture": [MIXTURE],
    "lora, padded, accumulated": [
        LORA.replace("lora_dropout: 0.1", "lora_dropout: 0"),
        "training.packing=false",
        "training.micro_batch_tokens=70",
    ],
    "fewer rows than processes": ["training.tokens_per_step=40"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMBINED)
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_train_what_one_does(
    processes: int, name: str, ready: Path, cli: Callable[..., Any], itune: Callable[..., Any]
) -> None:
    """Losses to 1e-5, gradient norms to 1e-4, weights to 1e-5; the very rows in each step."""
    more = [each for s in COMBINED[name] for each in ("-s", s)]
    given = line("full", "-q", *more)
    assert cli(*given, "-o", "runs/one").code == 0
    ended = itune(*given, "-o", "runs/many", "-p", str(processes))
    assert ended.returncode == 0, ended.stderr
    assert json.loads((ready / "runs/many/run.json").read_text())["processes"] == processes
    assert_the_same(ready / "runs/many", ready / "runs/one")
