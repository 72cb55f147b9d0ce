"""The job for SLURM in the documentation: run with stand-ins for SLURM and for itune."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "docs/tune.sbatch"
# Ends at once with CODE, or at a signal with 75 after some time, as a run that finishes its step.
ITUNE = """\
#!/bin/bash
echo "$@" > called
trap 'sleep 0.3; exit 75' USR1 TERM
touch begun
[ -n "$CODE" ] && exit "$CODE"
while :; do sleep 0.05; done
"""


def job(folder: Path, code: str = "") -> subprocess.Popen[bytes]:
    for name, text in (("itune", ITUNE), ("scontrol", '#!/bin/bash\necho "$@" > requeued\n')):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "41",
        "SLURM_GPUS_ON_NODE": "2",
        "CODE": code,
    }
    line = ["bash", str(SCRIPT), "tune.yaml", "--quiet"]
    return subprocess.Popen(line, cwd=folder, env=environment)


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_that_is_stopped_in_time_is_put_back(tmp_path: Path, sent: signal.Signals) -> None:
    started = job(tmp_path)
    deadline = time.monotonic() + 20
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    started.send_signal(sent)
    assert started.wait(20) == 75
    assert (tmp_path / "requeued").read_text() == "requeue 41\n"


@pytest.mark.parametrize("code", ["0", "2", "3", "4"])
def test_a_job_that_ends_by_itself_is_not_put_back(tmp_path: Path, code: str) -> None:
    assert job(tmp_path, code).wait(20) == int(code)
    assert not (tmp_path / "requeued").exists()


def test_its_command_line_is_one_of_itune_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from itune import cli, commands

    job(tmp_path, "0").wait(20)
    asked = []
    monkeypatch.setattr(commands, "train", lambda *given, **_: asked.append(given))
    cli.app((tmp_path / "called").read_text().split(), standalone_mode=False)
    ((command, common, _),) = asked
    assert (command, common.processes, common.quiet) == ("tune", 2, True)


NODES = SCRIPT.with_name("tune-nodes.sbatch")
# As SLURM's: runs what follows its options, and passes signals on.
SRUN = """\
#!/bin/bash
while [[ $1 == --* ]]; do shift; done
"$@" &
trap 'kill -USR1 $!' USR1
trap 'kill -TERM $!' TERM
wait $!
code=$?
while kill -0 $! 2>/dev/null; do wait $!; code=$?; done
exit $code
"""
# Ends with 1 as torchrun does, once a signal had itune write a checkpoint; or at once with CODE.
TORCHRUN = """\
#!/bin/bash
echo "$@" > called
env | grep -c "SIGNALS_TO_HANDLE=.*SIGUSR1" > passed
mkdir -p runs/it
echo '{"state": "running"}' > runs/it/run.json
stopped() { sleep 0.3; echo '{"state": "interrupted"}' > runs/it/run.json; exit 1; }
trap stopped USR1 TERM
touch begun
[ -n "$CODE" ] && exit "$CODE"
while :; do sleep 0.05; done
"""


def job_of_nodes(folder: Path, code: str = "") -> subprocess.Popen[bytes]:
    scontrol = '#!/bin/bash\n[ "$1" = show ] && printf "one\\ntwo\\n" || echo "$@" > requeued\n'
    for name, text in (("srun", SRUN), ("torchrun", TORCHRUN), ("scontrol", scontrol)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "41",
        "SLURM_JOB_NODELIST": "one,two",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "CODE": code,
    }
    line = ["bash", str(NODES), "tune.yaml", "runs/it", "--quiet"]
    return subprocess.Popen(line, cwd=folder, env=environment)


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_of_several_machines_is_put_back(tmp_path: Path, sent: signal.Signals) -> None:
    started = job_of_nodes(tmp_path)
    deadline = time.monotonic() + 20
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)
    started.send_signal(sent)
    assert started.wait(20) == 75
    assert (tmp_path / "requeued").read_text() == "requeue 41\n"
    assert (tmp_path / "passed").read_text() == "2\n"


@pytest.mark.parametrize("code", ["0", "1"])
def test_a_job_of_several_machines_that_ends_is_not_put_back(tmp_path: Path, code: str) -> None:
    assert job_of_nodes(tmp_path, code).wait(20) == int(code)
    assert not (tmp_path / "requeued").exists()


def test_its_launcher_meets_on_the_first_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed import run

    from itune import cli, commands

    job_of_nodes(tmp_path, "0").wait(20)
    parsed = run.parse_args((tmp_path / "called").read_text().split())
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.module) == ("2", "8", True)
    assert (parsed.rdzv_endpoint, parsed.rdzv_id) == ("one:29500", "41")
    asked = []
    monkeypatch.setattr(commands, "train", lambda *given, **_: asked.append(given))
    cli.app(parsed.training_script_args, standalone_mode=False)
    ((command, common, _),) = asked
    assert (command, str(common.output), common.quiet) == ("tune", "runs/it", True)
