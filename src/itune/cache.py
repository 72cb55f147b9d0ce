"""Prepared data on disk, each in a folder of its own: made once, whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

DONE = "done.json"


def root() -> Path:
    """The folder of all that itune prepares, beside the cache of `datasets`."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "itune"


def fingerprint(parts: Any) -> str:
    """The name of what follows from `parts`, which must be plain data."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def entry(kind: str, name: str, make: Callable[[Path], Any]) -> tuple[Path, Any]:
    """The folder of a name, and what `make` returned when it filled it (plain data).

    `make` is called with an empty folder when there is no whole one yet. Processes that want the
    same wait for the first, and read what it made; where it died, the next one makes it.
    """
    folder = root() / kind / name
    if not (folder / DONE).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with held(folder.with_name(f".{name}.lock")):
            if not (folder / DONE).is_file():
                _fill(folder, make)
    return folder, json.loads((folder / DONE).read_text(encoding="utf-8"))


def _fill(folder: Path, make: Callable[[Path], Any]) -> None:
    staged = folder.with_name(f".{folder.name}.part")
    for old in (staged, folder):  # what a kill left behind
        shutil.rmtree(old, ignore_errors=True)
    staged.mkdir()
    try:
        said = make(staged)
        (staged / DONE).write_text(json.dumps(said), encoding="utf-8")
        staged.replace(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a lock, waiting for it; the system frees it when its process ends, however it ends."""
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def digest(path: Path) -> str:
    """The sha256 of a file's content; remembered while size, times and place stay the same.

    The time of the last change of state is among them, which no program can set back.
    """
    state = path.stat()
    key = [str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
    known = root() / "digests" / fingerprint(key)
    if known.is_file():
        return known.read_text(encoding="utf-8")
    with path.open("rb") as file:
        made = _digest(file)
    known.parent.mkdir(parents=True, exist_ok=True)
    beside = known.with_name(f".{known.name}.{os.getpid()}")
    beside.write_text(made, encoding="utf-8")
    beside.replace(known)
    return made


def _digest(file: IO[bytes]) -> str:
    made = hashlib.sha256()
    while block := file.read(1 << 20):
        made.update(block)
    return made.hexdigest()
