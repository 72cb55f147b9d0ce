"""Which files of a folder are read: those of one kind, and of the split that is asked for."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from itune import errors, files, recipes, unpacking

SPLITS = ("train", "test", "validation", "valid", "dev", "eval")


def split_name(split: str, where: str) -> str:
    """`test` of `test[:1000]`. Raises DataError."""
    name = re.match(r"\w+", split)
    if name is None:
        raise errors.DataError(
            f"{where}: split {split!r} names no split. Write it as train or test[:1000]."
        )
    return name[0]


def splits(folder: Path) -> list[str]:
    """The splits that the names of a folder's files tell of."""
    every = [each.relative_to(folder).as_posix().lower() for each in folder.rglob("*")]
    return [each for each in SPLITS if any(_says(name, each) for name in every)]


def _says(name: str, split: str) -> bool:
    return re.search(rf"(?<![a-z]){split}(?![a-z])", name) is not None


def of_split(source: recipes.Source, path: Path, split: str) -> tuple[list[str], list[str]]:
    """The files of a folder that a split has, and those that are of none where others name theirs.

    Raises DataError for a folder without files of rows, or without the split.
    """
    every = [str(each) for each in sorted(path.rglob("*")) if each.is_file()]
    every = [each for each in every if not any(p.startswith(".") for p in Path(each).parts[-2:])]
    found = [each for each in every if files.kind(each) is not None]
    scripts = [each for each in every if each.endswith(".py")]
    if scripts and (not found or Path(scripts[0]).stem == path.name):
        raise errors.DataError(
            f"{scripts[0]}: a script that makes a data set, and scripts are not run. Run it "
            "yourself and save what it makes as Parquet or JSONL."
        )
    if not found:
        raise errors.DataError(
            f"{source.path}: a folder without files of rows. Known kinds: "
            f"{', '.join(files.BUILDERS)}, each also packed as {', '.join(unpacking.PACKED)}."
        )

    def says(file: str, split: str) -> bool:
        return _says(Path(file).relative_to(path).as_posix().lower(), split)

    name = split_name(split, source.path)
    if chosen := [each for each in found if says(each, name.lower())]:
        return chosen, [each for each in found if not any(says(each, s) for s in (name, *SPLITS))]
    told = [split for split in SPLITS if any(says(each, split) for each in found)]
    if told:
        raise errors.DataError(
            f"{source.path}: no split {name!r}: its files are those of {', '.join(told)}. Set "
            "split to one of them."
        )
    return found, []


def named(source: recipes.Source, path: Path, split: str) -> list[str]:
    """The files that `data_files` names for a split. Raises DataError."""
    wanted: Any = source.data_files
    if isinstance(wanted, Mapping):
        name = split_name(split, source.path)
        if name not in wanted:
            raise errors.DataError(
                f"{source.path}: data_files has no split {name!r}.{errors.nearest(name, wanted)}"
            )
        wanted = wanted[name]
    out: list[str] = []
    for pattern in [wanted] if isinstance(wanted, str) else wanted:
        # The pattern as the user typed it, relative or absolute: Path.glob takes relative alone.
        every = glob.glob(str(path / pattern), recursive=True)  # noqa: PTH207
        found = sorted(each for each in every if Path(each).is_file())
        if not found:
            raise errors.DataError(f"{source.path}: data_files: no file matches {pattern!r}.")
        out += found
    return out


def one_kind(source: recipes.Source, names: Sequence[str]) -> str:
    """The kind of all these files, as `.jsonl`. Raises DataError for one that is not read."""
    kinds = {files.kind(each) or Path(each).suffix.lower(): each for each in reversed(names)}
    if len(kinds) > 1:
        (one, first), (other, second) = sorted(kinds.items())[:2]
        raise errors.DataError(
            f"{source.path}: files of two kinds, {one} ({first}) and {other} ({second}). Name one "
            "kind with a pattern such as *.jsonl, or make two sources."
        )
    (suffix,) = kinds
    if unpacking.is_tar(names[0]):
        raise errors.DataError(
            f"{names[0]}: a tar archive, which is not read. Unpack it and name the folder."
        )
    if suffix in unpacking.PACKED:
        raise errors.DataError(
            f"{names[0]}: its name does not say what is packed in it. Call it as in rows.jsonl"
            f"{suffix}."
        )
    files.refuse_foreign(names[0])
    if suffix not in files.BUILDERS:
        raise errors.DataError(
            f"{names[0]}: unknown kind of file {suffix!r}.{errors.nearest(suffix, files.BUILDERS)}"
        )
    return suffix
