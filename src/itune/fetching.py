"""Data sets of the hub: which commit is meant, and its rows, fetched or as they are kept here.

`datasets` takes any version that it has kept where the hub does not answer, whatever revision was
asked for. So the commit is found out first, and remembered for when the hub cannot be asked.
"""

from __future__ import annotations

import functools
import glob
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itune import cache, errors, files, recipes

COMMIT = re.compile(r"(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])")
PATIENCE = 30  # chosen: seconds that the hub has to say which commit a revision is


@dataclass(frozen=True)
class Fetched:
    """Rows of a data set of the hub, their commit, and what the user should know of them."""

    data: Any
    commit: str
    notes: tuple[str, ...] = ()


def fetched(source: recipes.Source, split: str) -> Fetched:
    """The rows of a source that is on the hub, of the commit that its revision stands for.

    Where the hub cannot be asked: what was loaded here of that commit. Raises DataError where
    there are no such rows, EnvironmentRefusal where only the hub has them.
    """
    import datasets

    refuse_name(source)
    offline = bool(datasets.config.HF_HUB_OFFLINE)
    commit, silence = _asked(source.path, source.revision, datasets.config.HF_ENDPOINT, offline)
    if silence is None:
        return Fetched(_loaded(source, split, str(commit)), str(commit))
    folder = _kept(source, commit, silence, offline=offline)
    note = (
        f"{source.path}: the hub cannot be reached ({silence}); its rows are those of commit "
        f"{folder.name[:12]}, loaded here before"
    )
    return Fetched(_of_folder(source, split, folder), folder.name, () if offline else (note,))


def refuse_name(source: recipes.Source) -> None:
    """Raise DataError for a path that leads to nothing here and cannot be of the hub."""
    path = Path(source.path).expanduser()
    if path.is_symlink():
        raise errors.DataError(
            f"{source.path}: leads to {path.readlink()}, which is not there. Mend the link."
        )
    if "://" in source.path:
        raise errors.DataError(
            f"{source.path}: an address, and rows are read from files and from the hub alone. "
            "Fetch it first, and name the file."
        )
    if files.kind(path) is not None:
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = [each for each in near if files.kind(each) is not None]
        raise errors.DataError(
            f"{source.path}: no such file, in {Path.cwd()}.{errors.nearest(path.name, near)} "
            "Start itune where it is, or give another with --set data.train.path=FILE or "
            "data.eval.path=FILE."
        )
    files.refuse_foreign(source.path)
    if source.path in files.BUILDERS.values():
        raise errors.DataError(
            f"{source.path}: the name of a kind of file, not of one. Set path to the file itself, "
            "a pattern or a folder, and leave data_files out."
        )
    _refuse_repository(source)


def _refuse_repository(source: recipes.Source) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(source.path)
    except HFValidationError as error:
        raise errors.DataError(
            f"{source.path}: no such file or folder, in {Path.cwd()}, and no name that a data set "
            f"of the hub can have (organisation/name).{_near(source.path)}"
        ) from error


def _near(path: str) -> str:
    """A hint at what stands where a path leads, if it is nearly called so."""
    place = Path(path).expanduser()
    try:
        names = [each.name for each in place.parent.iterdir()]
    except OSError:
        return ""
    hint = errors.nearest(place.name, names)
    return hint if hint.startswith(" Did") else ""


# --- which commit -------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _asked(
    path: str, revision: str | None, endpoint: str, offline: bool
) -> tuple[str | None, str | None]:
    """The commit of a revision, and why the hub could not be asked for it, None where it could.

    Where it could not, it is what the hub said last; None where it was never asked. The same all
    through a process, though the hub has another by then.
    """
    import huggingface_hub
    from huggingface_hub.errors import (
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    known = cache.root() / "commits" / cache.fingerprint([path, revision])
    api = huggingface_hub.HfApi(endpoint=endpoint)
    # Of the library that the hub's client speaks HTTP with, whichever that is.
    failures: tuple[Any, ...] = (OSError, *HfHubHTTPError.__bases__)
    try:
        commit = str(api.dataset_info(path, revision=revision, timeout=PATIENCE).sha)
    except RevisionNotFoundError as error:
        raise errors.DataError(
            f"{path}: the hub has no revision {revision!r} of it. Name a branch, a tag or a whole "
            "commit, or leave data.*.revision out for the newest."
        ) from error
    except RepositoryNotFoundError as error:
        raise _absent(path) from error
    except failures as error:
        silence = "HF_HUB_OFFLINE is set" if offline else errors.one_line(error).rstrip(".")
        if revision is not None and COMMIT.fullmatch(revision):
            return revision, silence
        return (known.read_text(encoding="utf-8") if known.is_file() else None), silence
    known.parent.mkdir(parents=True, exist_ok=True)
    known.write_text(commit, encoding="utf-8")
    return commit, None


def _absent(path: str) -> errors.DataError:
    return errors.DataError(
        f"{path}: neither a file or folder here ({Path.cwd()}) nor a data set that the hub shows "
        f"you.{_near(path)} Check the name; for a gated one, set HF_TOKEN."
    )


# --- fetching -----------------------------------------------------------------------------


def _loaded(source: recipes.Source, split: str, commit: str) -> Any:
    """The rows as `datasets` fetches them, or has them, of this very commit."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    failures: tuple[Any, ...] = (ConnectionError, TimeoutError, *HfHubHTTPError.__bases__)
    options: dict[str, Any] = {"streaming": True} if source.streaming else {}
    try:
        rows = datasets.load_dataset(
            source.path,
            source.name,
            data_files=source.data_files,
            revision=commit,
            split=split,
            **options,
        )
    except datasets.exceptions.DatasetNotFoundError as error:
        raise _absent(source.path) from error
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise errors.DataError(
            f"{source.path}: cannot be read: {errors.one_line(cause)} Name the files that can, "
            "with data.*.data_files, or another revision."
        ) from error
    except FileNotFoundError as error:
        raise _without_files(source) from error
    except (*failures, OSError) as error:
        raise errors.EnvironmentRefusal(
            f"{source.path}: the hub stopped answering ({errors.one_line(error)}). Run the "
            "command again."
        ) from error
    except (ValueError, RuntimeError) as error:
        if "find cache" in str(error) and source.data_files is not None:
            raise _without_files(source) from error
        raise _refused(source, error) from error
    other = None if source.streaming else _commit_of(rows)
    if other not in (None, commit):
        raise errors.EnvironmentRefusal(
            f"{source.path}: the hub does not give commit {commit}; what is kept here is commit "
            f"{other}. Run the command again, or set data.*.revision to that commit."
        )
    if not source.streaming:
        _remember(source, rows, commit)
    return rows


def _without_files(source: recipes.Source) -> errors.DataError:
    if source.data_files is not None:
        return errors.DataError(
            f"{source.path}: data_files: no file of it matches {errors.shown(source.data_files)}. "
            "Look at its files on the hub."
        )
    return errors.DataError(
        f"{source.path}: holds no files of rows. Look at its files on the hub, and name them with "
        "data.*.data_files."
    )


def _refused(source: recipes.Source, error: Exception) -> errors.DataError:
    text = errors.one_line(error)
    if "script" in text.lower():
        text += " Scripts are not run: ask for a version of it in Parquet."
    return errors.DataError(f"{source.path}: {text}")


def _commit_of(rows: Any) -> str | None:
    """The commit that rows are of: `datasets` keeps them in a folder named by it."""
    for file in rows.cache_files:
        if found := COMMIT.findall(file["filename"]):
            return str(found[-1])
    return None


# --- what is kept -------------------------------------------------------------------------


def _remember(source: recipes.Source, rows: Any, commit: str) -> None:
    """Write down where `datasets` keeps rows, which it does not find again itself where files of
    a repository were named."""
    files = getattr(rows, "cache_files", ())
    folders = {str(Path(each["filename"]).parent) for each in files}
    if len(folders) == 1:
        record = _record(source, commit)
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(folders.pop(), encoding="utf-8")


def _record(source: recipes.Source, commit: str) -> Path:
    what = [source.path, source.name, source.model_dump(mode="json")["data_files"], commit]
    return cache.root() / "kept" / cache.fingerprint(what)


def _kept(source: recipes.Source, commit: str | None, silence: str, *, offline: bool) -> Path:
    """The folder of rows that were loaded here, of a commit, or the newest where no revision is
    asked for. Raises EnvironmentRefusal or DataError where there is none."""
    if commit and (record := _record(source, commit)).is_file():
        folder = Path(record.read_text(encoding="utf-8"))
        if folder.is_dir():
            return folder
    every = _folders(source)
    found = every if commit is source.revision is None else [p for p in every if p.name == commit]
    if found:
        return _of_one_configuration(source, found)
    if source.revision is None or not every:
        raise errors.EnvironmentRefusal(
            f"{source.path}: no such file here and the hub cannot be reached ({silence})."
            f"{_near(source.path)} Name a local file with --set data.train.path=FILE, or go "
            "online; for later work offline, run this beforehand with --preview 1: it is then kept."
        )
    kind = errors.DataError if offline else errors.EnvironmentRefusal
    commits = list(dict.fromkeys(each.name for each in every))
    raise kind(
        f"{source.path}: revision {source.revision!r} was not loaded here, and the hub cannot be "
        f"reached ({silence}); what is kept is commit {' and '.join(commits)}. Go online once, or "
        "set data.*.revision to that commit."
    )


def _of_one_configuration(source: recipes.Source, found: list[Path]) -> Path:
    newest = found[-1]
    names = sorted({each.parts[-3] for each in found if each.name == newest.name})
    if len(names) > 1:
        raise errors.DataError(
            f"{source.path}: has several configurations. Choose with data.*.name: "
            f"{' or '.join(names)}."
        )
    return newest


def _folders(source: recipes.Source) -> list[Path]:
    """Where `datasets` keeps what was loaded of a source, the newest last: as
    NAME/CONFIGURATION/VERSION/COMMIT. Files that somebody named are not told apart there."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    if source.data_files is not None:
        return []
    *organisation, name = source.path.split("/")
    root = Path(datasets.config.HF_DATASETS_CACHE) / "___".join(
        [*organisation, camelcase_to_snakecase(name)]
    )
    whole = [
        each
        for each in root.glob(f"{glob.escape(source.name or '') or '*'}/*/*")
        if each.is_dir() and COMMIT.fullmatch(each.name) and _plain(each)
    ]
    return sorted(whole, key=lambda each: each.stat().st_mtime)


def _plain(folder: Path) -> bool:
    """Whether rows are those of a configuration as it is, not of files that somebody named."""
    try:
        known = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(known.get("config_name") == folder.parts[-3])


def _of_folder(source: recipes.Source, split: str, folder: Path) -> Any:
    """The rows that `datasets` keeps in a folder."""
    from datasets.packaged_modules.cache.cache import Cache

    config, version, commit = folder.parts[-3:]
    kept = Cache(
        dataset_name=source.path.rsplit("/", maxsplit=1)[-1],
        config_name=config,
        version=version,
        hash=commit,
        repo_id=source.path,
    )
    try:
        if source.streaming:
            return kept.as_streaming_dataset(split=split)
        kept.download_and_prepare()
        return kept.as_dataset(split=split)
    except (ValueError, OSError) as error:
        raise _refused(source, error) from error
