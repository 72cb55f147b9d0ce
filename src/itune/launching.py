"""Several processes: started through Accelerate's launcher, and counted once they are there."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
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
