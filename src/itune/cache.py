"""Prepared data on disk, each in a folder of its own: made once, whole or not at all."""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from itune import storage

DONE = "done.json"
UNUSED = 30 * 24 * 3600  # chosen: seconds after which what nobody uses is removed
HELD = 256  # chosen: marks that a process holds; the system allows it some thousand files
UNMARKED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOLCK, errno.ENOTSUP),
    *(errno.ENOSYS, errno.EBADF),
)
_marks: dict[Path, IO[str]] = {}


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
    same wait for the first, and read what it made; where it died, the next one makes it. Who
    makes one removes what nobody has used for long.
    """
    folder = root() / kind / name
    use(folder)
    if not (folder / DONE).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with held(folder.with_name(f".{name}.lock")):
            if not (folder / DONE).is_file():
                _fill(folder, make)
                prune()
    return folder, json.loads((folder / DONE).read_text(encoding="utf-8"))


def _fill(folder: Path, make: Callable[[Path], Any]) -> None:
    staged = folder.with_name(f".{folder.name}.part")
    for old in (staged, folder):  # what a kill left behind
        shutil.rmtree(old, ignore_errors=True)
    staged.mkdir()
    try:
        said = make(staged)
        (staged / DONE).write_text(json.dumps(said), encoding="utf-8")
        storage.publish(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def use(folder: Path) -> None:
    """Mark a folder as used from now on, until this process ends: nobody removes it meanwhile."""
    mark = _mark(folder)
    try:
        if mark not in _marks:
            if not _marks:
                atexit.register(_let_go)
            mark.parent.mkdir(parents=True, exist_ok=True)
            file = mark.open("a+")  # NFS locks for reading what may be read alone
            fcntl.flock(file, fcntl.LOCK_SH)
            _marks[mark] = file
        os.utime(_marks[mark].fileno())
    except OSError as error:  # a cache that may only be read, or knows no locks, has no marks
        if error.errno not in UNMARKED:
            raise
    if len(_marks) > HELD:
        _marks.pop(next(iter(_marks))).close()


def _let_go() -> None:
    """Close the marks while Python still can: later it warns of each on the user's terminal."""
    while _marks:
        _marks.popitem()[1].close()


def prune() -> None:
    """Remove what nobody has used for `UNUSED` seconds and no process uses now."""
    for folder in root().glob("*/*"):
        if folder.is_dir() and not folder.name.startswith("."):
            try:
                _prune(folder)
            except PermissionError:  # of another user of the same cache, who prunes their own
                continue


def _prune(folder: Path) -> None:
    mark = _mark(folder)
    known = mark if mark.exists() else folder  # made before there were marks
    if known.stat().st_mtime > time.time() - UNUSED:
        return
    with mark.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        aside = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(aside, ignore_errors=True)  # what a kill left behind
        folder.replace(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _mark(folder: Path) -> Path:
    """The file that tells when a folder was last used; it stays, as a lock's file must."""
    return folder.with_name(f".{folder.name}.used")


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
