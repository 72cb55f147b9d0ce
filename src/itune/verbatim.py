"""JSON whose texts look like dates, read so that they stay the texts that they are.

The reader of `datasets` takes "2024-01-11" for a time (pyarrow infers it, and can be told of no
schema beforehand): a prompt would say "2024-01-11 00:00:00". To read rows one by one is slower, so
this is for files where `files.check` has seen such a text, and for values under a `field`, where
pandas makes times of numbers too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itune import errors, files

if TYPE_CHECKING:
    import datasets

LOOKED = 10_000  # chosen: the rows that tell what a column holds


def read(
    paths: Sequence[Path],
    names: Sequence[str],
    looks: Sequence[files.Look],
    field: str | None,
    folder: Path,
) -> datasets.Dataset:
    """The rows of JSON files as one table, kept in `folder`.

    Raises DatasetGenerationError, by a DataError where what is wrong is known.
    """
    import datasets

    first = list(itertools.islice(_rows(paths, names, looks, field, None), LOOKED))
    features = datasets.Dataset.from_list(first, on_mixed_types="use_json").features
    given = {"paths": paths, "names": names, "looks": looks, "field": field}
    return datasets.Dataset.from_generator(
        _rows,
        features=features,
        cache_dir=str(folder),
        gen_kwargs={**given, "columns": frozenset(features)},
        fingerprint=folder.name,
    )


def _rows(
    paths: Sequence[Path],
    names: Sequence[str],
    looks: Sequence[files.Look],
    field: str | None,
    columns: frozenset[str] | None,
) -> Iterator[dict[str, Any]]:
    for path, name, look in zip(paths, names, looks, strict=True):
        for number, row in enumerate(files.rows_of(path, name, look, field), 1):
            if columns is not None and (late := [key for key in row if key not in columns]):
                raise errors.DataError(
                    f"{name} row {number}: column {late[0]!r} is in none of the first rows. Give "
                    "it to them too, as null where it has no value."
                )
            yield row
