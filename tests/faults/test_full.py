"""Files that the system refuses to write: one line, exit code 3, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from itune import storage

from .kills import LORA, prepare, start

RUN = Path("runs/run")


@pytest.fixture
def ready(tmp_path: Path, tiny_model_dir: Path) -> Path:
    prepare(tmp_path, tiny_model_dir)
    return tmp_path


@pytest.fixture
def heedless() -> Iterator[None]:
    """A file that grows too large is an error, not a signal that kills."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGXFSZ, before)


def ended(*options: str, most: int = 0) -> tuple[int, str]:
    """Exit code and what was said by a run whose files may have `most` bytes; 0 is any."""
    Path("stderr.txt").write_text("")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most or soft, hard))
    child = start(["tune", "-r", "run.yaml", "-s", "training.max_steps=9", *options])
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), Path("stderr.txt").read_text()


# The manifest of the run, the weights, the optimiser's moments, of which Rust writes the last two.
@pytest.mark.parametrize("most", [2_000, 50_000, 600_000])
@pytest.mark.usefixtures("heedless")
def test_a_file_that_cannot_be_written_ends_the_run_in_order(ready: Path, most: int) -> None:
    code, said = ended(most=most)
    assert code == 3, said
    assert "Traceback" not in said
    assert "File too large" in said
    code, said = ended()
    assert code == 0, said
    assert not list(RUN.glob("**/.staged*"))


@pytest.mark.usefixtures("heedless")
def test_a_run_goes_on_once_its_checkpoints_can_be_written(
    ready: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk refuses in the middle of a run: what was published stays, to the last byte."""
    from itune import rehearsing

    with monkeypatch.context() as patched:
        patched.setattr(rehearsing, "_write_and_read", lambda *_: None)
        code, said = ended("-s", "training.save_steps=3", "-o", "runs/none", most=600_000)
        assert code == 3, said
        assert "000003: the checkpoint could not be written" in said
        assert "Traceback" not in said
        assert not list(Path("runs/none/checkpoints").iterdir())
        assert json.loads(Path("runs/none/run.json").read_text())["state"] == "failed"
    code, said = ended("-s", "training.save_steps=3", "-o", "runs/none")
    assert code == 0, said
    log = [json.loads(line) for line in Path("runs/none/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 10))


class Recorder(storage.Disk):
    """Notes what was on the disk when a folder got its final name."""

    def __init__(self) -> None:
        self.synced: set[Path] = set()
        self.unsynced: dict[str, list[str]] = {}
        self.parents: set[Path] = set()

    def sync(self, path: Path) -> None:
        super().sync(path)
        self.synced.add(path)

    def rename(self, old: Path, new: Path) -> None:
        if old.is_dir():
            held = [each for each in old.rglob("*") if each not in self.synced]
            self.unsynced[new.name] = [each.name for each in held]
            self.parents.add(new.parent)
        super().rename(old, new)


def test_whatever_gets_its_final_name_is_on_the_disk_before(
    ready: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a power cut leaves a run that says it is finished, and weights of zeros."""
    disk = Recorder()
    monkeypatch.setattr(storage, "DISK", disk)
    scratch = "model={from_scratch: {model_type: llama, hidden_size: 16, intermediate_size: 32, "
    scratch += "num_hidden_layers: 1, num_attention_heads: 2, tokenizer: {vocab_size: 300}}}"
    more = ["-s", LORA, "-s", "output.merge=true", "-s", "training.max_steps=1"]
    ended = cli("tune", "-r", "run.yaml", "-s", scratch, *more)
    assert ended.code == 0, ended.err
    assert {"model", "merged", "base", "tokenizer", "000001"} <= set(disk.unsynced)
    assert len(disk.unsynced) > 5, "and what is kept in the cache"
    assert not {name: held for name, held in disk.unsynced.items() if held}
    assert disk.parents <= disk.synced


def test_what_a_disk_refuses_with_is_told_from_other_errors() -> None:
    full = os.strerror(errno.ENOSPC)
    assert storage.refusal(OSError(errno.ENOSPC, full, "a.txt")) == f"a.txt: {full}"
    rust = SafetensorError(f"Error while serializing: I/O error: {full} (os error 28)")
    assert storage.refusal(rust) == full
    arrow = OSError(f"[Errno 28] Error writing bytes to file. Detail: [errno 28] {full}")
    assert storage.refusal(arrow) == full
    assert storage.refusal(FileNotFoundError(errno.ENOENT, "none", "a.txt")) is None
    assert storage.refusal(ValueError("row 28")) is None
