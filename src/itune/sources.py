"""Where rows come from: files, folders, what `datasets` saved, and data sets of the hub."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from itune import cache, errors, fetching, files, folders, recipes, tables, unpacking, verbatim

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Rows:
    """The rows of a source and what is known of them.

    `data` is a `datasets.Dataset`, or an IterableDataset where the source is streamed. `identity`
    is plain data that differs whenever the rows do. `commit` is that of a hub data set. `notes`
    are for the user. `lines` are files of JSONL, or of a `table`, that hold all rows in order.
    `taken` are the numbers that the rows have in the whole source where a limit left some out.
    """

    source: recipes.Source
    data: Any
    identity: Any
    commit: str | None = None
    notes: tuple[str, ...] = ()
    lines: tuple[tuple[str, Path], ...] = ()
    taken: np.ndarray | None = None
    table: tables.Table | None = None

    def number(self, index: int) -> int:
        """The number, from 0, that a row of `data` has in the whole source."""
        return index if self.taken is None else int(self.taken[index])

    def each(self) -> Iterator[Mapping[str, Any]]:
        """Every row in order. Raises DataError where a stream cannot be read on."""
        number = 0
        try:
            for row in self.data:
                number += 1
                yield row
        except (ValueError, OSError) as error:  # pyarrow's and pandas' own are ValueErrors
            if not self.source.streaming:
                raise
            after = f" on after row {number}" if number else ""
            raise errors.DataError(
                f"{self.source.path}: cannot be read{after}: {errors.one_line(error)} "
                "Mend it; without streaming the file and line are told."
            ) from error

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        names: Any = self.data.column_names
        return list(next(self.each(), {}) if names is None else names)

    def place(self, index: int) -> str:
        """Where a row stands, for messages: its file and line where they are known."""
        number = self.number(index)
        paths = [path for _, path in self.lines]
        line_of = files.line_of if self.table is None else self.table.line_of
        found = line_of(paths, number) if paths else None
        if found is None:
            return f"{self.source.path} row {number + 1}"
        return f"{self.lines[found[0]][0]}:{found[1]}"


def refuse_missing(given: Sequence[recipes.Source]) -> None:
    """Raise DataError for a path that leads to nothing here and cannot be of the hub.

    `read` would say the same, after all that is loaded before it.
    """
    for source in given:
        if not Path(source.path).expanduser().exists() and not glob.has_magic(source.path):
            fetching.refuse_name(source)


def splits(source: recipes.Source) -> list[str]:
    """The splits that a source is known to have: by its files' names, or as `datasets` knows."""
    path = Path(source.path).expanduser()
    if path.is_file() or source.data_files is not None:
        return []
    if path.is_dir() and not (path / "dataset_dict.json").is_file():
        return folders.splits(path)
    if path.is_dir():
        return sorted(each.name for each in path.iterdir() if each.is_dir())
    return [str(each) for each in read(source).data.info.splits or ()]


def load(source: recipes.Source) -> datasets.Dataset:
    """The rows of a source, as a `datasets.Dataset`; see `read`."""
    return read(source.model_copy(update={"streaming": False})).data


def read(source: recipes.Source) -> Rows:
    """The rows of a source: a file, a glob, a folder or a data set of the hub.

    A file stands for whatever split the source names, so that `test[:100]` works on it too.
    Raises DataError with the file and line where a row is broken, EnvironmentRefusal when the
    hub cannot be reached.
    """
    split = source.split or "train"
    if source.streaming and "[" in split:
        raise errors.DataError(
            f"{source.path}: split {split!r}: a stream has no slices. Use limit, or leave out "
            "streaming."
        )
    path = Path(source.path).expanduser()
    if path.is_dir():
        saved = [path / name for name in ("state.json", "dataset_dict.json")]
        whole = any(each.is_file() for each in saved)
        rows = _saved(source, path, split) if whole else _folder(source, path, split)
    elif path.is_file():  # also one whose name looks like a pattern
        rows = _files(source, [str(path)], split)
    elif glob.has_magic(source.path):
        # The pattern as the user typed it, relative or absolute: Path.glob takes relative alone.
        every = glob.glob(str(path), recursive=True)  # noqa: PTH207
        found = sorted(each for each in every if Path(each).is_file())
        if not found:
            raise errors.DataError(
                f"{source.path}: no file matches, in {Path.cwd()}. Check the pattern."
            )
        rows = _files(source, found, split)
    else:
        rows = _hub(source, split)
    return _shaped(rows)


# --- folders ------------------------------------------------------------------------------


def _saved(source: recipes.Source, path: Path, split: str) -> Rows:
    """A folder that `save_to_disk` wrote, of one split or of several."""
    import datasets

    try:
        made = datasets.load_from_disk(str(path))
    except (ValueError, OSError, KeyError) as error:
        raise errors.DataError(
            f"{source.path}: a folder that save_to_disk wrote, but not a whole one: "
            f"{errors.one_line(error)} Was the copy cut? Fetch it again."
        ) from error
    name = folders.split_name(split, source.path)
    splits = dict(made) if isinstance(made, datasets.DatasetDict) else {name: made}
    rows = _sliced(source, split, splits)
    content = [
        [str(each.relative_to(path)), cache.digest(each)]
        for each in sorted(path.rglob("*"))
        if each.suffix in (".arrow", ".json") and not each.name.startswith("cache-")
    ]
    data = rows.to_iterable_dataset() if source.streaming else rows
    return Rows(source, data, ["saved", content, split])


def _sliced(source: recipes.Source, split: str, splits: Mapping[Any, Any]) -> Any:
    """The rows that a split such as test[:100]+test[-100:] names."""
    import datasets

    name = folders.split_name(split, source.path)
    if name not in splits:
        raise errors.DataError(
            f"{source.path}: no split {name!r}.{errors.nearest(name, map(str, splits))}"
        )
    try:
        wanted = datasets.ReadInstruction.from_spec(split).to_absolute(
            {str(key): len(each) for key, each in splits.items()}
        )
    except (ValueError, AssertionError) as error:
        raise errors.DataError(
            f"{source.path}: split {split!r}: {errors.one_line(error)}"
        ) from error
    parts = [splits[each.splitname].select(range(each.from_, each.to)) for each in wanted]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _folder(source: recipes.Source, path: Path, split: str) -> Rows:
    """A folder of files of one kind; where their names tell splits apart, those of the split."""
    if source.data_files is not None:
        return _files(source, folders.named(source, path, split), split)
    chosen, left = folders.of_split(source, path, split)
    rows = _files(source, chosen, split)
    if not left:
        return rows
    names = ", ".join(Path(each).relative_to(path).as_posix() for each in left[:3])
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    said = f"{source.path}: {names}{more} not read, as other files there name their split"
    return replace(rows, notes=(*rows.notes, said))


# --- files --------------------------------------------------------------------------------


def _files(source: recipes.Source, names: list[str], split: str) -> Rows:
    suffix = folders.one_kind(source, names)
    _refuse_keys(source, suffix)
    options: dict[str, Any] = {}
    if source.field is not None:
        options["field"] = source.field
    if suffix == ".txt" and source.sample_by is not None:
        options["sample_by"] = source.sample_by
    if source.streaming:
        return _stream(source, names, suffix, options, split)
    builder = files.BUILDERS[suffix]
    paths = [unpacking.unpacked(Path(each)) for each in names]
    looks = files.check(paths, names, suffix, source.field)
    notes = tuple(_told(source, names, suffix, looks))
    digests = [cache.digest(each) for each in paths]
    content: list[Any] = [*digests]
    features: Any = None
    table: tables.Table | None = None
    if builder == "csv":
        table = tables.look(paths, names, suffix)
        if source.template is None:  # a format's columns are texts, whatever they look like
            table.columns = dict.fromkeys(table.columns, "string")
        content.append(sorted(table.columns.items()))
        features = tables.features(table)
        options |= tables.options(table)
        notes += tuple(f"{source.path}: {each}" for each in tables.told(table, suffix))
    as_texts = builder == "json" and any(look.dated or source.field for look in looks)
    if as_texts:
        content.append("texts")
    # Kept by what is in the files: `datasets` itself goes by their time of change alone.
    kept = cache.root() / "rows" / cache.fingerprint([builder, content, options])
    cache.use(kept)
    if as_texts:
        rows = _verbatim(source, split, paths, names, looks, kept)
    else:
        rows = _built(
            source, builder, split, paths, cache_dir=str(kept), features=features, **options
        )
    for path, name, digest in zip(paths, names, digests, strict=True):
        if cache.digest(path) != digest:
            raise errors.DataError(
                f"{name}: changed while it was read (sha256 {digest[:12]} before, "
                f"{cache.digest(path)[:12]} now). Let whoever writes it finish, then run again."
            )
    lined = suffix == ".jsonl" and not any(look.listed for look in looks)
    plain = (table is not None or lined) and "[" not in split
    identity = ["files", builder, content, options, split if "[" in split else None, False]
    lines = tuple(zip(names, paths, strict=True)) if plain else ()
    return Rows(source, rows, identity, notes=notes, lines=lines, table=table)


def _told(
    source: recipes.Source, names: Sequence[str], suffix: str, looks: Sequence[files.Look]
) -> Iterator[str]:
    """What the user should know of how files are read; of tables, `tables.told` says it."""
    if any(look.listed for look in looks):
        yield f"{source.path}: a JSON list, read as one although its name says lines"
    if fractions := sorted({column for look in looks for column in look.fractions}):
        yield (
            f"{source.path}: whole numbers and others in {', '.join(map(repr, fractions))}: 3 is "
            "read as 3.0; write them as texts where a prompt shows them"
        )
    if suffix == ".txt" and source.sample_by is None and len(names) > 1:
        yield (
            f"{source.path}: {len(names)} files, each line of them a row; sample_by: document "
            "makes one of each file"
        )


def _stream(
    source: recipes.Source, names: list[str], suffix: str, options: dict[str, Any], split: str
) -> Rows:
    import datasets

    packed = next((each for each in names if each.lower().endswith(".zst")), None)
    if packed and not datasets.config.ZSTANDARD_AVAILABLE:
        raise errors.DataError(
            f"{packed}: a stream of .zst needs one more package: pip install zstandard. Or leave "
            "streaming out, or pack it as .gz."
        )
    builder = files.BUILDERS[suffix]
    states = [Path(each).stat() for each in names]
    content = [[each.st_size, each.st_mtime_ns, each.st_ctime_ns] for each in states]
    if builder == "csv":
        with unpacking.opened(Path(names[0])) as file:
            options["sep"] = tables.separator(file, suffix)
    rows = _built(source, builder, split, [Path(each) for each in names], streaming=True, **options)
    timed = [name for name, kind in (rows.features or {}).items() if "timestamp" in str(kind)]
    if builder == "json" and timed:
        raise errors.DataError(
            f"{source.path}: column {timed[0]!r} holds texts that look like dates, which a stream "
            "of JSON changes. Leave out streaming, or save it as CSV."
        )
    return Rows(source, rows, ["files", builder, content, options, None, True])


def _refuse_keys(source: recipes.Source, suffix: str) -> None:
    if source.field is not None and suffix not in (".json", ".jsonl"):
        raise errors.DataError(f"{source.path}: field is for JSON, not for {suffix}. Delete it.")
    if source.sample_by is not None and suffix != ".txt":
        raise errors.DataError(f"{source.path}: sample_by is for .txt, not {suffix}. Delete it.")


def _built(
    source: recipes.Source, builder: str, split: str, paths: Sequence[Path], **options: Any
) -> Any:
    import datasets

    # A name with brackets in it is that name, not a pattern.
    found = {folders.split_name(split, source.path): [glob.escape(str(each)) for each in paths]}
    try:
        return datasets.load_dataset(builder, data_files=found, split=split, **options)
    except (datasets.exceptions.DatasetGenerationError, ValueError, StopIteration) as error:
        raise _unreadable(source, builder, error) from error


def _verbatim(
    source: recipes.Source,
    split: str,
    paths: Sequence[Path],
    names: Sequence[str],
    looks: Sequence[files.Look],
    folder: Path,
) -> Any:
    import datasets

    try:
        whole = verbatim.read(paths, names, looks, source.field, folder)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise _unreadable(source, "json", error) from error
    return _sliced(source, split, {folders.split_name(split, source.path): whole})


def _unreadable(source: recipes.Source, builder: str, error: Exception) -> errors.DataError:
    cause = error.__cause__ or error
    if isinstance(cause, errors.DataError):
        return cause
    if "column names don't match" in str(cause):
        return errors.DataError(
            f"{source.path}: its files do not have the same columns: "
            f"{errors.one_line(cause).partition(' because ')[0]}. Make a source of each kind, "
            "with rename where it is needed."
        )
    return errors.DataError(
        f"{source.path}: cannot be read as {builder}: {errors.one_line(cause)} "
        "Check the file and data.*.split."
    )


# --- the hub ------------------------------------------------------------------------------


def _hub(source: recipes.Source, split: str) -> Rows:
    found = fetching.fetched(source, split)
    asked = [source.path, source.name, source.model_dump(mode="json")["data_files"], split]
    identity = ["hub", *asked, found.commit, source.streaming]
    return Rows(source, found.data, identity, found.commit, found.notes)


# --- columns and limits -------------------------------------------------------------------


def _shaped(rows: Rows) -> Rows:
    source, data = rows.source, rows.data
    columns = rows.columns
    missing = sorted(set(source.rename) - set(columns))
    if missing:
        raise errors.DataError(
            f"{source.path}: rename: no column {missing[0]!r}.{errors.nearest(missing[0], columns)}"
        )
    if len(set(source.rename.values())) < len(source.rename):
        raise errors.DataError(
            f"{source.path}: rename: two columns would be called the same. Choose other names."
        )
    taken = sorted(set(source.rename.values()) & (set(columns) - set(source.rename)))
    if taken:
        raise errors.DataError(
            f"{source.path}: rename: there is a column {taken[0]!r} already. Rename that one too."
        )
    if source.rename:
        data = data.rename_columns(dict(source.rename))
    if not columns or not (source.streaming or len(data)):
        raise errors.DataError(f"{source.path}: 0 rows in split {source.split!r}.")
    kept = None
    if source.limit is not None and source.streaming:
        data = data.take(source.limit)
    elif source.limit is not None and source.limit < len(data):
        kept = spread(len(data), source.limit)
        data = data.select(kept)
    identity = [rows.identity, sorted(source.rename.items()), source.limit]
    return replace(rows, data=data, identity=identity, taken=kept)


def spread(count: int, limit: int) -> np.ndarray:
    """So many of `count` row numbers, ascending, as far apart as they can be.

    Files are often sorted, by their label above all: their first rows say little of the whole.
    """
    return np.arange(limit, dtype=np.int64) * count // limit
