"""What is packed in a file: gzip, bzip2, xz, zstd, a zip of one; never more than a disk takes."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import shutil
import zipfile
from pathlib import Path
from typing import IO, Any

from itune import cache, errors

PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")

# chosen: text shrinks 3 to 30 times; what grows more than this is made to fill a disk.
MOST_GROWTH = 200
SMALL = 1 << 24


def is_tar(path: str | Path) -> bool:
    """Whether a name is that of a tar archive, packed or not."""
    return re.search(r"\.(tar|tar\.\w+|tgz|tbz2?|txz)$", str(path).lower()) is not None


def unpacked(path: Path) -> Path:
    """The file itself, or what is packed in it, in itune's cache. Raises DataError."""
    if path.suffix.lower() not in PACKED:
        return path
    name = cache.fingerprint([cache.digest(path), path.stem])

    def make(folder: Path) -> dict[str, Any]:
        with opened(path) as packed, (folder / path.stem).open("wb") as out:
            _copy(path, packed, out)
        return {}

    try:
        folder, _ = cache.entry("unpacked", name, make)
    except (OSError, EOFError, lzma.LZMAError, zipfile.BadZipFile, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise errors.DataError(
            f"{path}: cannot be unpacked: {errors.one_line(error)} Was the copy cut? Fetch it "
            "again."
        ) from error
    return folder / path.stem


def opened(path: Path) -> IO[bytes]:
    """What is in a file, unpacked on the way where it is packed."""
    suffix = path.suffix.lower()
    if suffix not in PACKED:
        return path.open("rb")
    if suffix == ".zst":
        import pyarrow

        return pyarrow.input_stream(str(path), compression="zstd")  # type: ignore[no-any-return]
    if suffix == ".zip":
        return _member(path)
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[suffix]
    return opener(path, "rb")  # type: ignore[no-any-return]


def _member(path: Path) -> IO[bytes]:
    """The one file in a zip."""
    archive = zipfile.ZipFile(path)
    members = [
        each
        for each in archive.infolist()
        if not each.is_dir() and not each.filename.startswith("__MACOSX/")
    ]
    for each in members:
        link = (each.external_attr >> 16) & 0o170000 == 0o120000
        if link or ".." in Path(each.filename).parts or Path(each.filename).is_absolute():
            raise errors.DataError(
                f"{path}: member {errors.shown(each.filename)} is a link or lies outside of the "
                "archive. Unpack it by hand if you trust it."
            )
    if len(members) != 1:
        raise errors.DataError(
            f"{path}: {len(members)} files in it, expected one. Unpack it and name the folder."
        )
    return archive.open(members[0])


def _copy(path: Path, packed: IO[bytes], out: IO[bytes]) -> None:
    most = max(SMALL, MOST_GROWTH * path.stat().st_size)
    room = shutil.disk_usage(Path(out.name).parent).free
    size = 0
    while block := packed.read(1 << 20):
        size += len(block)
        if size > most:
            raise errors.DataError(
                f"{path}: grows more than {MOST_GROWTH} times when unpacked. Unpack it by hand "
                "if you trust it."
            )
        if size > room:
            raise errors.EnvironmentRefusal(f"{path}: no room to unpack it in {out.name}.")
        out.write(block)
