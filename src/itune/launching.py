"""Several processes: started through Accelerate's launcher, and counted once they are there."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from itune import errors


def ensure(processes: int | None, arguments: Sequence[str]) -> None:
    """Start itune again under a launcher when several processes are asked for; else return.

    The present process is replaced, so that signals and the terminal stay where they are. Under
    a launcher already, nothing happens.
    """
    if processes is None or processes <= 1 or "LOCAL_RANK" in os.environ:
        return
    import torch

    environment = dict(os.environ)
    if torch.cuda.is_available():
        if torch.cuda.device_count() < processes:
            raise errors.EnvironmentRefusal(
                f"--processes {processes}: this machine has {torch.cuda.device_count()} GPUs. Ask "
                "for as many, or use accelerate launch over several machines."
            )
        launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
        launcher += ["--num_processes", str(processes), "--mixed_precision", "no"]
        launcher += ["--dynamo_backend", "no", "--main_process_port", "0"]
    else:
        # accelerate launch --cpu starts one process whatever number it is given.
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        environment["ACCELERATE_USE_CPU"] = "true"
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    line = [sys.executable, "-m", *launcher, "-m", "itune", *arguments]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, line, environment)


def check(accelerator: Any) -> None:
    """Refuse to run when fewer processes joined than were started: each would train alone."""
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != wanted:
        raise errors.EnvironmentRefusal(
            f"{wanted} processes were started, but {accelerator.num_processes} joined. On a CPU "
            "start them with --processes N, or set ACCELERATE_USE_CPU=true."
        )


def is_main() -> bool:
    """Whether this process speaks for the others."""
    return int(os.environ.get("RANK", "0")) == 0


# --- the first before the others ----------------------------------------------------------


@contextlib.contextmanager
def first_prepares(folder: Path) -> Iterator[None]:
    """The body runs in the first process of each machine, and then in the others.

    It holds before the processes are joined, so that no collective operation runs out of time
    however long the first one takes. The others notice when it fails or dies. Raises
    EnvironmentRefusal in them.
    """
    mark = folder / f".prepared-{socket.gethostname()}"
    # What the processes of one start have in common, and those of another start do not.
    start = f"{os.getppid()}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
    elif int(os.environ.get("LOCAL_RANK", "0")) == 0:
        _write(mark, start, "preparing")
        try:
            yield
        except BaseException:
            _write(mark, start, "failed")
            raise
        _write(mark, start, "done")
    else:
        _wait(mark, start)
        yield


def _write(mark: Path, start: str, state: str) -> None:
    beside = mark.with_name(f"{mark.name}.{os.getpid()}")
    beside.write_text(json.dumps({"start": start, "state": state, "process": os.getpid()}))
    beside.replace(mark)


def _wait(mark: Path, start: str, seconds: float = 120.0, pause: float = 0.1) -> None:
    """Wait for the first process; `seconds` for it to begin, then for as long as it lives."""
    parent, deadline = os.getppid(), time.monotonic() + seconds
    while True:
        said = json.loads(mark.read_text()) if mark.is_file() else {}
        state = said.get("state") if said.get("start") == start else None
        if state == "done":
            return
        if state == "failed":
            raise errors.EnvironmentRefusal("the first process failed; it says why.")
        if state == "preparing" and not _alive(said["process"]):
            raise errors.EnvironmentRefusal(
                "the first process died while it prepared the data. Was there enough memory?"
            )
        if state is None and (time.monotonic() > deadline or os.getppid() != parent):
            raise errors.EnvironmentRefusal("the first process never began to prepare the data.")
        time.sleep(pause)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:  # one that has ended and that its parent has not yet taken note of
        return ") Z" not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return True
