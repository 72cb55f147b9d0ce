"""Files that are whole or not there: a kill, a full disk or a power cut leaves the old or the new.

Whatever changes a disk goes through `DISK`, one operation a call, so that a test can make any one
of them fail.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

# What a disk refuses with: full, over a quota, a file too large, read-only, broken.
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def refusal(error: BaseException) -> str | None:
    """What a disk says that refuses to be written to, and of which file; None for other errors.

    Libraries that are not Python's have their own errors, with the system's number in the text.
    """
    said = re.search(r"\((?:os error|errno) (\d+)\)|\[[Ee]rrno (\d+)\]", str(error))
    number = getattr(error, "errno", None) or (said and int(said[1] or said[2]))
    if number not in REFUSALS:
        return None
    place = getattr(error, "filename", None)
    return f"{place}: {os.strerror(number)}" if place else os.strerror(number)


class Disk:
    """The operations that change a disk. Each raises OSError, or does all it says."""

    def make_folder(self, path: Path) -> None:
        """Make a folder and those above it."""
        path.mkdir(parents=True, exist_ok=True)

    def produce(self, path: Path, produce: Callable[[Path], object]) -> None:
        """Have a file, or what is in a folder, written by `produce(path)`."""
        produce(path)

    def append(self, path: Path, text: str) -> None:
        """Write a text behind what a file holds."""
        with path.open("a", encoding="utf-8") as file:
            file.write(text)

    def sync(self, path: Path) -> None:
        """Have what was written to a file or folder on the disk, not only on its way there."""
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, old: Path, new: Path) -> None:
        """Give a file or folder a new name, at once."""
        old.replace(new)

    def remove(self, path: Path) -> None:
        """Take away a file, or a folder with all in it."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


DISK = Disk()


def publish(staged: Path, folder: Path) -> None:
    """Give a folder its final name, once all that is in it is on the disk."""
    for path in staged.rglob("*"):
        DISK.sync(path)
    DISK.sync(staged)
    DISK.rename(staged, folder)
    DISK.sync(folder.parent)


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all: beside it first, on the disk, then renamed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        DISK.produce(beside, lambda place: _put(place, text))
        DISK.sync(beside)
        DISK.rename(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    DISK.sync(path.parent)


def _put(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)


# The last line of a text that tells whether it is whole; to YAML a comment.
SEAL = b"# sha256 of the lines above: "


def sealed(text: str) -> str:
    """A text of whole lines, and a last one with its sha256."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}{SEAL.decode()}{digest}\n"


def intact(content: bytes) -> bool:
    """Whether a file's content is what `sealed` gave: neither torn nor edited."""
    text, _, digest = content.rpartition(SEAL)
    return digest == hashlib.sha256(text).hexdigest().encode() + b"\n"


def sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def numbered(folder: Path) -> list[Path]:
    """What a folder holds whose name is a number, such as checkpoints, the highest first."""
    held = folder.iterdir() if folder.is_dir() else ()
    found = [path for path in held if path.name.isascii() and path.name.isdigit()]
    return sorted(found, key=lambda path: -int(path.name))
