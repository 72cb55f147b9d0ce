"""A finished run's model on the Hugging Face hub, and its card whenever that changes.

Needs the network. The token is huggingface_hub's own business: it is never read here.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils.tqdm import disable_progress_bars

import itune
from itune import cards, errors, launching, origins, recipes, runs

Say = Callable[[str], None]
# What a model's own earlier upload may have left, and a loader would still find.
STALE = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json")
CURES = {
    401: "the hub does not know you. Log in with `hf auth login`, or set HF_TOKEN to a token "
    "that may write",
    403: "your token may not write there. Take one that may, or another name",
    404: "there is no such place that you may see. Check the name and your token",
}


class _Unreachable(Exception):
    """The hub does not answer at all; told to the user as an EnvironmentRefusal or a warning."""


def check(recipe: recipes.Recipe) -> None:
    """Make the repositories of a run before its first step, so that a refusal costs nothing.

    A hub that cannot be reached is told of and no more: it may be there at the end. Raises
    EnvironmentRefusal where it refuses, RecipeError where a private model would be public.
    """
    if recipe.output.push is None:
        return
    names = [recipe.output.push]
    if recipe.output.merge and recipe.adapter is not None:
        names.append(f"{recipe.output.push}-merged")
    for name in names:
        try:
            _made(name, private=recipe.output.private)
        except _Unreachable as error:
            launching.warn(f"{error} It is tried again when the run is finished.")
            return


def push(run: runs.Run, recipe: recipes.Recipe, say: Say) -> None:
    """Upload a finished run's model, and the merged one where there is one.

    Raises EnvironmentRefusal where the hub refuses or is not there: the run is finished and whole,
    and the same command pushes it later.
    """
    name = recipe.output.push
    if name is None:
        return
    try:
        _made(name, private=recipe.output.private)
        run.update(pushed=name)
        cards.write(run)
        for folder, kind in _models(run):
            place = str(cards.repository(run, kind))
            _made(place, private=recipe.output.private)
            url = _upload(
                place, _files(folder, run), f"itune {run.manifest['command']}: {recipe.name}"
            )
            say(f"pushed: {folder} to {url}")
    except (errors.EnvironmentRefusal, _Unreachable) as error:
        raise errors.EnvironmentRefusal(
            f"{error} The run is finished and whole in {run.dir}; the same command pushes it again."
        ) from error
    _name_the_base(run, say)


def push_cards(run: runs.Run, say: Say) -> None:
    """Upload the cards of a run that was pushed, after they changed. Raises EnvironmentRefusal."""
    if run.manifest.get("pushed") is None:
        return
    for folder, kind in _models(run):
        place = str(cards.repository(run, kind))
        card = {cards.NAME: (folder / cards.NAME).read_bytes()}
        try:
            say(f"pushed: the scores to {_upload(place, card, 'itune eval')}")
        except _Unreachable as error:
            raise errors.EnvironmentRefusal(
                f"{error} The scores are in {run.dir}; the same command pushes them."
            ) from error


def _models(run: runs.Run) -> Iterator[tuple[Path, str]]:
    yield run.model_dir, cards.ADAPTER if run.recipe.adapter else cards.WHOLE
    if (run.dir / "merged").is_dir():
        yield run.dir / "merged", cards.MERGED


def _name_the_base(run: runs.Run, say: Say) -> None:
    origin = run.manifest.get("origin", {})
    if run.recipe.adapter and origin.get("kind") not in (None, origins.HUB):
        whole = cards.repository(run, cards.MERGED)
        there = (run.dir / "merged").is_dir()
        cure = f"{whole} is whole" if there else "output.merge: true pushes a whole model too"
        say(
            f"its base, {origin['name']}, is on no hub: others cannot load the adapter without a "
            f"copy of it. {cure}."
        )


def _files(folder: Path, run: runs.Run) -> dict[str, Any]:
    """The files of a model by name; of an adapter's config without a path of this machine.

    A base that is on no hub has a name there which nobody can have given to a repository.
    """
    files: dict[str, Any] = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    config = folder / "adapter_config.json"
    if config.is_file():
        settings = json.loads(config.read_text(encoding="utf-8"))
        base = str(settings["base_model_name_or_path"])
        if Path(base).is_absolute():
            name = run.manifest.get("origin", {}).get("name") or base
            settings["base_model_name_or_path"] = origins.as_folder(name)
        files[config.name] = (json.dumps(settings, indent=2) + "\n").encode()
    return files


def _api() -> huggingface_hub.HfApi:
    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return huggingface_hub.HfApi(library_name="itune", library_version=itune.__version__)


def _made(name: str, *, private: bool) -> None:
    """Have the repository; refuse a public one for what is to be private."""
    api = _api()
    with _told(name):
        api.create_repo(name, private=private, exist_ok=True)
        public = not api.model_info(name).private
    if private and public:
        raise errors.RecipeError(
            f"output.push: {name} is public on the hub, and output.private is true. Name another, "
            "or set output.private: false."
        )


def _upload(name: str, files: dict[str, Any], message: str) -> str:
    """One commit with these files, and without weights of before; returns where it is."""
    api = _api()
    add = [
        huggingface_hub.CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)
        for path, content in files.items()
    ]
    with _told(name):
        there = api.list_repo_files(name) if len(files) > 1 else []
        stale = [
            huggingface_hub.CommitOperationDelete(path_in_repo=path)
            for path in there
            if path not in files and any(fnmatch.fnmatch(path, each) for each in STALE)
        ]
        api.create_commit(name, [*add, *stale], commit_message=message)
    return f"{api.endpoint}/{name}"


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Put what the hub's library raises in our words. Raises EnvironmentRefusal, _Unreachable."""
    try:
        yield
    except Exception as error:
        place = f"output.push: {name}: "
        chain = list(_causes(error))
        for each in chain:
            if isinstance(each, HfHubHTTPError) and each.response is not None:
                status = each.response.status_code
                said = CURES.get(status, "the hub refuses. Try again later")
                raise errors.EnvironmentRefusal(f"{place}{said} ({status}).") from error
        if any(isinstance(each, OfflineModeIsEnabled) for each in chain):
            raise _Unreachable(f"{place}HF_HUB_OFFLINE is set, so nothing is sent.") from error
        # The library's HTTP client has its own errors, those of large files are RuntimeErrors.
        foreign = type(error).__module__.partition(".")[0].startswith(("httpx", "huggingface_hub"))
        if not foreign and not isinstance(error, OSError | RuntimeError):
            raise
        text = errors.inert(errors.masked(" ".join(str(chain[-1]).split())))[:200]
        raise _Unreachable(f"{place}the hub cannot be reached: {text}.") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
