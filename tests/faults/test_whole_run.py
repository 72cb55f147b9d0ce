"""Every change that a whole run makes to the disk fails once: the same command puts it right."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from .disks import FaultyDisk
from .kills import LORA, outcome, prepare, start

LINE = ["tune", "-r", "run.yaml", "-q", "-s", LORA, "-s", "training.row_losses=true"]
LINE += ["-s", "output.merge=true", "-s", "training.max_steps=3", "-s", "training.eval_steps=1"]
LINE += ["-s", "training.load_best_model_at_end=true", "-s", "training.save_total_limit=1"]
RUN = Path("runs/run")
EVERY = int(os.environ.get("ITUNE_SWEEP_EVERY", "29"))  # 1 fails each operation, in half an hour


def ended(disk: FaultyDisk | None = None) -> int:
    """How a run ended: its exit code, or the negative number of a signal."""
    Path("stderr.txt").write_text("")
    _, status = os.waitpid(start(LINE, disk), 0)
    return os.waitstatus_to_exitcode(status)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "full"])
def test_a_run_that_met_a_fault_ends_as_one_that_met_none(
    kind: str, tmp_path: Path, tiny_model_dir: Path
) -> None:
    prepare(tmp_path, tiny_model_dir)
    assert ended() == 0, Path("stderr.txt").read_text()
    straight, at = outcome(RUN), 1
    while True:
        shutil.rmtree("runs")
        disk = FaultyDisk(kind, at, torn=True, told=Path("failed.txt"))
        code, said = ended(disk), Path("stderr.txt").read_text()
        if not Path("failed.txt").exists():
            break  # so many operations a run does not have
        Path("failed.txt").unlink()
        assert code in ((-signal.SIGKILL,) if kind == "kill" else (0, 3)), (at, code, said)
        assert "Traceback" not in said, (at, said)
        code = ended()
        assert code == 0, (at, Path("stderr.txt").read_text())
        assert outcome(RUN) == straight, at
        at += EVERY
    assert outcome(RUN) == straight
    assert at > 100, "fewer operations than a run has: do all go through the seam?"
