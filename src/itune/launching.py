"""Several processes: started through Accelerate's launcher, and counted once they are there."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from itune import beats, errors, launchers, runs, signals

# Set for processes whose launcher is itune itself, to a name of that launch alone.
SUPERVISED = "ITUNE_SUPERVISED"
TELLING = 10.0  # chosen: seconds in which a process that failed has told why and ended
# What torch's launcher reads: a signal goes to every process, which may finish its step and write
# a checkpoint before it is killed, in seconds. Its own 30 are too few for a large model.
SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1800"
# What gloo and NCCL say where a process of the group is gone, and of no other fault.
GONE = re.compile(
    r"\[gloo|by peer|broken pipe|connection (closed|reset)|ncclRemoteError|remote process exit",
    re.IGNORECASE,
)
SIGNALS = "PET_SIGNALS_TO_HANDLE", "TORCHELASTIC_SIGNALS_TO_HANDLE"  # torch 2.13, and before


def ensure(
    processes: int | None,
    arguments: Sequence[str],
    *,
    folder: Path | None = None,
    hang_timeout: float = 600.0,
) -> None:
    """Run itune again in several processes when that is asked for, and end with their exit code.

    Returns when one process does, and under a launcher, which has started them already. `folder`:
    where they are `heard`, so that one which stands still for `hang_timeout` seconds ends them all.
    Raises EnvironmentRefusal where a launcher was given another number.
    """
    _refuse_sharding()
    left_to_us = launchers.asked()
    launchers.refuse_another(processes, left_to_us)
    processes = left_to_us or processes
    if processes is None or processes <= 1 or "LOCAL_RANK" in os.environ:
        return
    import torch

    sys.stdout.flush()
    sys.stderr.flush()
    os.environ[SUPERVISED] = uuid.uuid4().hex
    os.environ.setdefault(*SHUTDOWN)
    for name in SIGNALS:
        os.environ.setdefault(name, ",".join(each.name for each in signals.asking()))
    on_gpus = torch.cuda.is_available() and not launchers.on_cpu()
    start = (_on_gpus if on_gpus else _on_cpu)(processes, arguments)
    watch = None if folder is None else beats.Hang(folder, launch_id(), processes, hang_timeout)
    sys.exit(_supervised(start, watch))


def _refuse_sharding() -> None:
    """Refuse what the launcher asks for and this loop would not do; on a CPU nothing would tell."""
    for kind in ("deepspeed", "fsdp", "megatron_lm"):
        if os.environ.get(f"ACCELERATE_USE_{kind.upper()}", "false").lower() == "true":
            cure = (
                launchers.ZERO
                if kind == "deepspeed"
                else "Set launch.fsdp: true in the recipe (or --set launch.fsdp=true): weights, "
                "gradients and moments are then cut over the processes."
            )
            raise errors.EnvironmentRefusal(
                f"accelerate launch: asks for {kind}, which itune does not take from there. Launch "
                f"without it. {cure}"
            )


def _on_gpus(processes: int, arguments: Sequence[str]) -> Callable[[], None]:
    import torch
    from accelerate.commands import launch

    if torch.cuda.device_count() < processes:
        raise errors.EnvironmentRefusal(
            f"--processes {processes}: this machine has {torch.cuda.device_count()} GPUs. Ask "
            "for as many, or use accelerate launch over several machines."
        )
    line = ["--multi_gpu", "--num_machines", "1", "--num_processes", str(processes)]
    line += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    line += ["--gpu_ids", "all"]  # else those of the user's default_config.yaml
    # The launcher would give each process one thread: too few where a part computes on the CPU.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    parsed = launch.launch_command_parser().parse_args([*line, "-m", "itune"])
    parsed.training_script_args = list(arguments)  # --run would be read as the parser's --run_path
    return lambda: launch.launch_command(parsed)


def _on_cpu(processes: int, arguments: Sequence[str]) -> Callable[[], None]:
    from torch.distributed import run

    # accelerate launch --cpu starts one process whatever number it is given.
    os.environ["ACCELERATE_USE_CPU"] = "true"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    line = ["--standalone", "--nproc_per_node", str(processes), "-m", "itune"]
    parsed = run.parse_args(line)
    parsed.training_script_args = list(arguments)  # --run would be read as the parser's --run-path
    return lambda: run.run(parsed)


def _supervised(start: Callable[[], None], hang: beats.Hang | None) -> int:
    """The exit code of processes that are started and waited for.

    It is that of the process which failed first, or of the hang that they were ended for; its
    message is told once.
    """
    with contextlib.nullcontext() if hang is None else hang.watched(_kill_all):
        code = _waited_for(start, hang)
    if hang is not None:
        _note(hang, code)
    return code


def _note(hang: beats.Hang, code: int) -> None:
    """Have run.json say how a run ended whose processes were killed before they could."""
    run = runs.Run(hang.folder)
    with contextlib.suppress(errors.RunError, OSError):  # what ended it has been told already
        manifest = run.manifest
        if manifest.get("state") == "running" and manifest.get("launch") == launch_id():
            stopped = hang.found is not None or code == errors.Interrupted.exit_code
            run.update(state="interrupted" if stopped else "failed")


def _kill_all(hang: beats.Hang) -> None:
    """End processes of which one stands still: a stopped one hears no other signal."""
    for beat in hang.watch.last():
        with contextlib.suppress(ProcessLookupError):
            os.kill(beat.pid, signal.SIGKILL)


def _waited_for(start: Callable[[], None], hang: beats.Hang | None) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # The launcher would tell of each failure in a traceback of its own.
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        start()
    except ChildFailedError as error:
        if hang is not None and hang.found is not None:
            sys.stderr.write(f"error: {hang.found}\n")
            return hang.found.exit_code
        rank, failure = error.get_first_failure()
        if failure.exitcode in errors.EXIT_CODES:
            _tell(failure.error_file_data, failure.message)
            return int(failure.exitcode)
        if failure.exitcode == -signal.SIGKILL:
            sys.stderr.write(
                f"error: process {rank} of the run was killed, as by a system that is out of "
                "memory; the others were stopped. What was finished is kept, and checkpoints are "
                "whole: run the same command again to go on.\n"
            )
            return errors.EnvironmentRefusal.exit_code
        how = f"with signal {-failure.exitcode}" if failure.exitcode < 0 else "by a fault"
        sys.stderr.write(
            f"error: process {rank} of the run ended {how}; the others were stopped.\n"
        )
        return errors.ItuneError.exit_code
    except SignalException as stopped:
        if stopped.sigval in signals.ASKING:
            sys.stderr.write(f"error: {signals.told(stopped.sigval.name)}\n")
            return errors.Interrupted.exit_code
        return 128 + int(stopped.sigval)
    return 0


def _tell(data: Any, message: Any) -> None:
    said = data.get("message", message) if isinstance(data, dict) else message
    sys.stderr.write(str(said.get("message", "") if isinstance(said, dict) else said))


def lost_peer(error: BaseException) -> bool:
    """Whether an error says no more than that another process of the run is gone."""
    text = str(error)
    return "LOCAL_RANK" in os.environ and GONE.search(text) is not None


def tell(message: str) -> None:
    """Tell the user of an error: once, however many processes meet it.

    Under a supervisor each process leaves it in a file, of which the supervisor shows the first.
    """
    message = errors.masked(message)
    left = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if os.environ.get(SUPERVISED) and left:
        Path(left).parent.mkdir(parents=True, exist_ok=True)
        stamp = str(int(time.time()))
        said = {"message": message, "extraInfo": {"timestamp": stamp}}
        Path(left).write_text(json.dumps({"message": said}), encoding="utf-8")
        return
    sys.stderr.write(message if is_main() else f"process {os.environ['RANK']}: {message}")


def warn(message: str) -> None:
    """Tell the user of something that is no error, whatever else is shown."""
    if is_main():
        sys.stderr.write(f"warning: {errors.inert(errors.masked(message))}\n")


def warn_of_library(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """What is put in the place of `warnings.showwarning`: one line, once for each message.

    Neither the file nor the line of a library helps a user, so it is named alone.
    """
    parts = Path(filename).parts
    inside = [parts.index(each) for each in ("site-packages", "dist-packages") if each in parts]
    name = parts[inside[0] + 1] if inside else Path(filename).stem
    _warn_once(f"{name}: {' '.join(str(message).split())}")


_warn_once = functools.lru_cache(maxsize=100)(warn)


def end_with_launcher() -> None:
    """Have this process ended by the system when the process that started it is gone (Linux)."""
    if os.environ.get(SUPERVISED) and "LOCAL_RANK" in os.environ:
        end_with_parent()


def end_with_parent() -> None:
    """Have this process ended by the system when its parent is gone, however that ended (Linux)."""
    if sys.platform == "linux":
        import ctypes

        asked_of_the_kernel = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(asked_of_the_kernel, signal.SIGKILL)


def check(accelerator: Any) -> None:
    """Refuse to run when fewer processes joined than were started: each would train alone."""
    wanted = launchers.started()
    if accelerator.num_processes != wanted:
        raise errors.EnvironmentRefusal(
            f"{wanted} processes were started, but {accelerator.num_processes} joined. On a CPU "
            "start them with --processes N, or set ACCELERATE_USE_CPU=true."
        )


def launch_id() -> str:
    """A name that the processes of one launch share, and as far as can be no other launch has."""
    if os.environ.get(SUPERVISED):
        return os.environ[SUPERVISED]
    known = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    given = ":".join(os.environ.get(name, "") for name in known)
    return given if launchers.started() == 1 else f"{given}:{_drawn()}"


@functools.cache
def _drawn() -> str:
    """A word that the first process draws and the launcher's own store passes on.

    What a launcher calls a launch may be the same each time. "" where it keeps no store.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return ""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False)
    key = f"itune/launch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if is_main():
        store.set(key, uuid.uuid4().hex)
    while not store.check([key]):  # signals are heard meanwhile
        time.sleep(0.05)
    return str(store.get(key).decode())


def is_main() -> bool:
    """Whether this process speaks for the others."""
    return int(os.environ.get("RANK", "0")) == 0


# --- one that stands still ---------------------------------------------------------------


@contextlib.contextmanager
def heard(folder: Path, seconds: float) -> Iterator[None]:
    """Have this process's beats in the run's folder, where there are several processes.

    Where itune's own launcher does not watch them, each watches all, and ends itself when one
    stands still for so many seconds.
    """
    world, rank = launchers.started(), int(os.environ.get("RANK", "0"))
    if world == 1:
        yield
        return
    alone = bool(os.environ.get(SUPERVISED))
    hang = beats.Hang(folder, launch_id(), world, seconds)
    with (
        beats.PULSE.written(folder, launch_id(), rank, seconds),
        contextlib.nullcontext() if alone else hang.watched(_end_myself),
    ):
        yield


def _end_myself(hang: beats.Hang) -> None:
    """End this process, whatever its main thread waits for, and who stands still beside it."""
    assert hang.found is not None
    tell(f"error: {hang.found}\n")
    sys.stderr.flush()
    for beat in hang.watch.last():
        if beat.host == socket.gethostname()[:100] and beat.pid != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(beat.pid, signal.SIGKILL)
    noting = threading.Thread(target=_note, args=(hang, hang.found.exit_code), daemon=True)
    noting.start()
    noting.join(TELLING)  # a disk that stands still must not keep this process
    os._exit(hang.found.exit_code)


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
    if launchers.started() == 1:
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
        failed = time.monotonic()
        said = json.loads(mark.read_text()) if mark.is_file() else {}
        state = said.get("state") if said.get("start") == start else None
        if state == "done":
            return
        if state == "failed":
            # Its message comes first, or the launcher takes this process for the cause.
            while _alive(said["process"]) and time.monotonic() < failed + TELLING:
                time.sleep(pause)
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
