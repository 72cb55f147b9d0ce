"""What a model was made from, by names that mean something on another machine.

What is on the hub has its id there; a folder has the last part of its path alone.
"""

from __future__ import annotations

import functools
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import yaml
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from itune import errors, recipes, runs, yamls

HUB, FOLDER, RUN, SCRATCH = "hub", "folder", "run", "scratch"
ADAPTED = "adapted"  # an adapter of the hub, folded into its base
ADAPTER = "adapter_config.json"
# What is fetched of an adapter of the hub: nothing pickled, and no checkpoints beneath it.
FETCHED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md")
MISSED = (HfHubHTTPError, HFValidationError, OSError)  # OSError: no network, and not kept here
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{1,40}")


def commit(name: str, revision: str | None) -> str | None:
    """The commit of a model of the hub that was loaded, from where the cache keeps it."""
    if Path(name).expanduser().is_dir():
        return None
    kept = _cached(name, "config.json", revision) or _cached(name, ADAPTER, revision)
    return kept.parent.name if kept else None


def _cached(name: str, file: str, revision: str | None) -> Path | None:
    found = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def fetched_adapter(name: str, revision: str | None) -> str | None:
    """The folder of an adapter of the hub, fetched; None for whatever else a name stands for.

    What is wrong with the name is told by the library that loads a model of it.
    """
    return _fetched_adapter(name, revision, huggingface_hub.constants.ENDPOINT)


@functools.lru_cache(maxsize=16)
def _fetched_adapter(name: str, revision: str | None, _hub: str) -> str | None:
    """The same commit all through a process, though the hub has another by then."""
    known = huggingface_hub.try_to_load_from_cache(name, ADAPTER, revision=revision)
    if known is None and _no_such_host():
        if _cached(name, "config.json", revision):
            return None
        raise ConnectionError("the hub cannot be connected to: its name leads nowhere from here")
    if known is None:
        try:
            huggingface_hub.hf_hub_download(name, ADAPTER, revision=revision)
        except MISSED:
            return None
    elif not isinstance(known, str):
        return None  # it is kept that the repository has none
    fetch: Callable[..., Any] = huggingface_hub.snapshot_download
    options = {"revision": revision, "allow_patterns": FETCHED, "ignore_patterns": "*/*"}
    return str(fetch(name, **options))


def _no_such_host() -> bool:
    """Whether the hub's name is unknown here, as without a network.

    Its library would try for most of a minute, with a dozen lines of warnings.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return False
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT).hostname, None)
    except socket.gaierror:
        return True
    return False


def refuse_absent_base(name: str, base: str) -> None:
    """Raise ModelError where an adapter's base is no folder that is here, nor can be on the hub."""
    if Path(base).is_dir():
        return
    try:
        validate_repo_id(base)
    except HFValidationError as error:
        cure = f"where it was pushed with output.merge: true ({name}-merged)"
        for run in (Path(name), Path(name).parent):  # a run, or the adapter in one
            if (run / "merged").is_dir():
                cure = str(run / "merged")
                break
        raise errors.ModelError(
            f"{name}: an adapter for {errors.shown(base)}, which is on no hub and not here. Name "
            f"the whole model instead, {cure}, or put a copy of that base there."
        ) from error


def of(recipe: recipes.Recipe, family: str) -> dict[str, Any]:
    """What run.json keeps of a base: its kind, its name, commit and license where known.

    `root` is the model of the hub at the bottom, through any number of runs; None where there is
    none. `stages`: of each of these runs, the first before the others, its name, command, base and
    training data.
    """
    name = recipe.model.name
    made: dict[str, Any] = {"family": family, "commit": None, "license": None, "root": None}
    made["stages"] = []
    if name is None:
        scratch = recipe.model.from_scratch
        return {**made, "kind": SCRATCH, "name": scratch.model_type if scratch else "nothing"}
    path = Path(name).expanduser()
    if not path.is_dir():
        found = commit(name, recipe.model.revision)
        card = _cached(name, "README.md", found)
        kind = ADAPTED if _cached(name, ADAPTER, found) else HUB
        made.update(kind=kind, name=name, root=name, commit=found)
        return {**made, "license": _license(card) if card else None}
    folder = path.absolute()
    made["license"] = _license(folder / "README.md")
    run = next((each for each in (folder, folder.parent) if (each / "run.json").is_file()), None)
    if run is None:
        return {**made, "kind": FOLDER, "name": folder.name}
    below = runs.Run(run)
    manifest = below.manifest
    before = manifest.get("origin") or {}
    made["license"] = made["license"] or before.get("license")
    sources = manifest.get("data", {}).get("train", {}).get("sources", [])
    hub = before.get("kind") in (HUB, ADAPTED, SCRATCH)
    stage = {
        "run": run.name,
        "command": manifest.get("command"),
        "base": before.get("name", "") if hub else as_folder(before.get("name", "")),
        "data": [public(each["path"]) for each in sources],
    }
    stages = [*before.get("stages", []), stage]
    return {**made, "kind": RUN, "name": run.name, "root": before.get("root"), "stages": stages}


def _license(card: Path) -> str | None:
    """The license that a model's card names, where it names one by its identifier."""
    if not card.is_file():
        return None
    try:
        found = huggingface_hub.ModelCard.load(card, ignore_metadata_errors=True).data.license
    except (ValueError, OSError, yaml.YAMLError):  # a card that cannot be read names no license
        return None
    return found if isinstance(found, str) and LICENSE.fullmatch(found) else None


def hub_id(path: str) -> str | None:
    """The path of a source where it is one of the hub, not a file or folder that is here."""
    suffixed = Path(path).suffix.lower() in (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
    here = suffixed or Path(path).expanduser().exists()
    return path if HUB_ID.fullmatch(path) and not here else None


def public(path: str) -> str:
    """A path as others may read it: of one that leads out of the working folder the last part."""
    bare = path.removeprefix("file://")
    place = Path(bare)
    leads_out = place.is_absolute() or bare.startswith("~") or ".." in place.parts
    return place.name if leads_out else path


def as_folder(name: str) -> str:
    """A name of what is on no hub that no repository can have: a word alone may be a stranger's."""
    return f"./{Path(name).name}"


def recipe_text(recipe: recipes.Recipe) -> str:
    """The recipe as YAML for others to read: no path of this machine, and nothing that is null."""
    shown = yamls.parse(recipes.dump(recipe), "recipe", errors.RecipeError)
    return yamls.dump(_public(shown.data)).strip()


def _public(value: Any) -> Any:
    if isinstance(value, str):
        return public(value)
    if isinstance(value, Mapping):
        items = {str(key): _public(each) for key, each in value.items()}
        return {key: each for key, each in items.items() if each not in (None, {}, [])}
    return [_public(each) for each in value] if isinstance(value, list) else value
