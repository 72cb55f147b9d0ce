"""A disk on which the k-th operation fails: killed, full or broken, once or from then on."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from itune import storage

KINDS = ("kill", "full", "full-for-good", "broken", "broken-for-good")
ERRORS = {"full": errno.ENOSPC, "broken": errno.EIO}


@dataclass
class FaultyDisk(storage.Disk):
    """Does what `storage.Disk` does until operation `at`, then fails as `kind` says.

    `torn`: the failing operation has begun: half of a file is there, or a folder is half removed.
    """

    kind: str
    at: int
    torn: bool
    told: Path | None = None  # is made when the fault comes, for another process to see
    done: int = 0
    failed: bool = False

    def _fail_now(self, half: Callable[[], object]) -> None:
        self.done += 1
        due = self.done >= self.at if self.kind.endswith("for-good") else self.done == self.at
        if not due:
            return
        self.failed = True
        if self.told is not None:
            self.told.touch()
        if self.torn:
            half()
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(ERRORS[self.kind.removesuffix("-for-good")], "injected")

    def make_folder(self, path: Path) -> None:
        self._fail_now(lambda: super(FaultyDisk, self).make_folder(path))
        super().make_folder(path)

    def produce(self, path: Path, produce: Callable[[Path], object]) -> None:
        def half() -> None:
            produce(path)
            made = [path] if path.is_file() else sorted(path.iterdir())[:1]
            for each in made:
                os.truncate(each, each.stat().st_size // 2)

        self._fail_now(half)
        super().produce(path, produce)

    def append(self, path: Path, text: str) -> None:
        self._fail_now(lambda: super(FaultyDisk, self).append(path, text[: len(text) // 2]))
        super().append(path, text)

    def sync(self, path: Path) -> None:
        self._fail_now(lambda: None)
        super().sync(path)

    def rename(self, old: Path, new: Path) -> None:
        self._fail_now(lambda: None)
        super().rename(old, new)

    def remove(self, path: Path) -> None:
        def half() -> None:
            for inside in sorted(path.iterdir())[:2] if path.is_dir() else []:
                super(FaultyDisk, self).remove(inside)

        self._fail_now(half)
        super().remove(path)
