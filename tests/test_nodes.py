"""Several machines: two launchers here that meet at one address, as two nodes would."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from faults.kills import prepare
from test_launching import left

LINE = ["tune", "-r", "run.yaml", "-q", "-o", "runs/nodes"]
# As docs/tune-nodes.sbatch has it: what torch's launcher passes on, and how long it waits then.
ASKING = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
PASSED_ON = {
    "PET_SIGNALS_TO_HANDLE": ASKING,
    "TORCHELASTIC_SIGNALS_TO_HANDLE": ASKING,
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1800",
}
Nodes = Callable[..., "list[subprocess.Popen[str]]"]


@pytest.fixture
def ready(tmp_path: Path, tiny_model_dir: Path) -> Path:
    prepare(tmp_path, tiny_model_dir)
    return tmp_path


@pytest.fixture
def nodes(ready: Path) -> Iterator[Nodes]:
    """Starts itune on two nodes of one process each; whatever is left is ended."""
    begun: list[subprocess.Popen[str]] = []

    def start(*more: str) -> list[subprocess.Popen[str]]:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
        launch += ["--rdzv-id", "41", "--nproc-per-node", "1", "--local-addr", "127.0.0.1"]
        made = [
            subprocess.Popen(
                [*launch, "-m", "itune", *LINE, *more], cwd=ready, text=True,
                env={**os.environ, **PASSED_ON}, stderr=subprocess.PIPE,
            )
            for _ in range(2)
        ]  # fmt: skip
        begun.extend(made)
        return made

    yield start
    for process in begun:
        for each in tree(process.pid):
            each.kill()
        process.communicate()


def tree(pid: int) -> list[psutil.Process]:
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.Error:
        return []


def ended(processes: list[subprocess.Popen[str]], seconds: float = 240) -> list[str]:
    return [process.communicate(timeout=seconds)[1] for process in processes]


def wait_for(folder: Path, steps: int) -> None:
    log, deadline = folder / "runs/nodes/log.jsonl", time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") >= steps):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "runs/nodes/run.json").read_text())
    return found


def steps_of(folder: Path) -> list[int]:
    lines = (folder / "runs/nodes/log.jsonl").read_text().splitlines()
    return [json.loads(each)["step"] for each in lines]


@pytest.mark.slow
def test_two_nodes_train_what_two_processes_do(ready: Path, nodes: Nodes, itune: Any) -> None:
    both = nodes()
    said = ended(both)
    assert [process.returncode for process in both] == [0, 0], said
    alone = itune("tune", "-r", "run.yaml", "-q", "-p", "2", "-o", "runs/alone")
    assert alone.returncode == 0, alone.stderr
    assert left(ready / "runs/nodes") == left(ready / "runs/alone")


@pytest.mark.slow
def test_a_signal_to_every_node_leaves_a_checkpoint(ready: Path, nodes: Nodes) -> None:
    both = nodes("-s", "training.max_steps=100000", "-s", "training.save_steps=100000")
    wait_for(ready, 5)
    for process in both:
        process.send_signal(signal.SIGUSR1)
    said = ended(both, 60)
    assert manifest(ready)["state"] == "interrupted", said
    last = steps_of(ready)[-1]
    assert (ready / f"runs/nodes/checkpoints/{last:06}").is_dir()


@pytest.mark.slow
def test_a_node_that_dies_ends_the_other_and_the_run_goes_on(ready: Path, nodes: Nodes) -> None:
    options = ["-s", "training.max_steps=300", "-s", "training.save_steps=20"]
    first, second = nodes(*options)
    wait_for(ready, 30)
    for each in tree(second.pid):
        each.kill()
    begun = time.monotonic()
    (said,) = ended([first], 60)
    # Ten seconds of itune's, and what the launcher takes to give its meeting up.
    assert time.monotonic() - begun < 10 + 15
    assert first.returncode == 1
    assert "another process of this run has ended, so this one stops too" in said
    done = steps_of(ready)[-1]
    assert 30 <= done < 300, "or nothing was interrupted"
    assert manifest(ready)["state"] != "finished"
    both = nodes(*options)
    said = "".join(ended(both))
    assert [process.returncode for process in both] == [0, 0], said
    assert steps_of(ready) == list(range(1, 301))
    assert manifest(ready)["state"] == "finished"
