"""What a launcher that is not itune's own was asked for, and whether that is what there is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from itune import errors

MARK = "ACCELERATE_DYNAMO_BACKEND"  # set for whatever `accelerate launch` starts
MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
# What cuts a model here, by the names that DeepSpeed has for it.
ZERO = (
    "What ZeRO-3 does is launch.fsdp: true in the recipe (--set launch.fsdp=true), ZeRO-2 is that "
    "with launch.reshard_after_forward: false, and ZeRO-Offload with launch.cpu_offload: true."
)
NAMES = ("accelerate-launch", "accelerate.commands.launch", "launch")


def started() -> int:
    """Processes of the launch that this one belongs to; 1 where nobody launched it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_cpu() -> bool:
    """Whether whoever launches wants no GPU, as Accelerate reads it."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")


def asked() -> int | None:
    """Processes that `accelerate launch` was asked for where it started one and said nothing, as
    it does on a CPU; None where it started them, was asked for none, or is not there.

    The number stands on its command line or in its settings' file alone. Raises EnvironmentRefusal
    for several machines, and where there are to be several processes and their number is not found.
    """
    if "WORLD_SIZE" in os.environ or MARK not in os.environ:
        return None
    for name in MPI:
        if int(os.environ.get(name, "1")) > 1:
            raise errors.EnvironmentRefusal(
                f"accelerate launch: started {os.environ[name]} processes by MPI, which itune does "
                "not use. Start them with torchrun instead (docs/cluster.md)."
            )
    found = _of_parent()
    if found is None and "MASTER_PORT" in os.environ:  # set for several alone
        raise errors.EnvironmentRefusal(
            "accelerate launch: was asked for several processes and started one. Start them with "
            "itune --processes N instead, or with torchrun."
        )
    number, machines = found or (None, 1)
    if machines > 1:
        raise errors.EnvironmentRefusal(
            f"accelerate launch: was asked for {machines} machines and started one process here, "
            "as it does on a CPU. Use torchrun on each machine instead (docs/cluster.md)."
        )
    return number


def refuse_another(wanted: int | None, of_launcher: int | None) -> None:
    """Raise EnvironmentRefusal where a launcher has another number of processes than is wanted."""
    there = int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else of_launcher
    if there is not None and wanted is not None and there != wanted:
        raise errors.EnvironmentRefusal(
            f"{wanted} process{'es are' if wanted > 1 else ' is'} asked for by --processes or "
            f"launch.num_processes, and {there} by the launcher. Give both the same number, or "
            "leave one out."
        )


def _of_parent() -> tuple[int | None, int] | None:
    """(processes, machines) that the accelerate launch which started this process was asked for."""
    import psutil

    with contextlib.suppress(psutil.Error):
        parent = psutil.Process().parent()
        if parent is not None and (options := _options(parent.cmdline())) is not None:
            return _read(options, parent.cwd())
    return None


def _options(line: Sequence[str]) -> list[str] | None:
    """What follows `accelerate launch` on a command line; None where it is another command."""
    accelerate = any("accelerate" in Path(word).name for word in line[:3])
    for place, word in enumerate(line[:4] if accelerate else ()):
        if Path(word).name in NAMES:
            return list(line[place + 1 :])
    return None


def _read(options: Sequence[str], folder: str) -> tuple[int | None, int] | None:
    """By the launcher's own reading of its options and of its settings' file."""
    from accelerate.commands import launch
    from accelerate.commands.config import config_args

    try:
        given, _ = launch.launch_command_parser().parse_known_args(list(options))
        number, machines = given.num_processes, given.num_machines
        path = given.config_file or config_args.default_config_file
        if given.config_file or (not given.cpu and Path(path).is_file()):
            kept = config_args.load_config_from_file(str(Path(folder) / path))
            number = number or kept.num_processes
            machines = machines or getattr(kept, "num_machines", None)
    except (SystemExit, OSError, ValueError):
        return None
    return number, machines or 1
