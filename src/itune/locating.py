"""Where a model is: a folder, that of a run, a repository of the hub; and what is missing there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from itune import errors, origins, recipes, records, weights

# Ends of files that stand where a folder should. No other: Qwen3-0.6B has a dot as well.
FILES = (
    *(".bin", ".ckpt", ".gguf", ".h5", ".json", ".onnx", ".pt", ".pth", ".safetensors"),
    *(".tar", ".gz", ".yaml", ".yml", ".zip"),
)
# What is said of the kind of file that llama.cpp and Ollama read.
GGUF = (
    "a kind that is not read, as none of it can be tuned. Name the model that {} made from: its "
    "folder, or its name on the hub."
)
MOST_INSIDE = 5


def resolve(name: str, revision: str | None = None) -> str:
    """The folder or hub id that a recipe's `model.name` means; a run's folder means its model.

    An adapter of the hub is fetched, so that it is a folder as any other: there its base is found.
    Raises ModelError for a path that is not there or holds no model.
    """
    if (found := local(name)) is not None:
        return found
    fetched = from_library(name, lambda: origins.fetched_adapter(name, revision))
    if fetched is None:
        return name
    weights.check(fetched)
    return str(fetched)


def local(name: str) -> str | None:
    """The folder here that a recipe's `model.name` means; None where it is a name of the hub.

    Raises ModelError for a path that is not there or holds no model.
    """
    path = Path(name).expanduser()
    if (path / "run.json").is_file():
        if not (path / "model").is_dir():
            raise errors.ModelError(
                f"{name}: this run has no model yet, it is not finished. Run it again to finish it."
            )
        weights.check(str(path / "model"))
        return str(path / "model")
    if path.is_dir():
        if not _holds_model(path):
            raise errors.ModelError(f"{name}: {_no_model(path)}")
        weights.check(str(path))
        return str(path)
    starts = (".", "/", "~", "runs/")
    looks_like_path = name.startswith(starts) or name.count("/") > 1 or path.suffix.lower() in FILES
    if looks_like_path or (path.parent.is_dir() and "/" in name and str(path.parent) != "."):
        if path.is_file():
            raise errors.ModelError(f"{name}: {_file(path)}")
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        near = [other.name for other in beside if _holds_model(other)]
        raise errors.ModelError(
            f"{name}: no such folder, in {Path.cwd()}.{errors.nearest(path.name, near)}"
            f"{_making(path)}"
        )
    return None


def _file(path: Path) -> str:
    """What is said of a file where a folder is meant."""
    if path.suffix.lower() == ".gguf":
        return f"a file of GGUF, {GGUF.format('it was')}"
    beside = (path.parent / "config.json").is_file() or (path.parent / origins.ADAPTER).is_file()
    where = str(path.parent) if beside else "the one with config.json and the tokenizer in it"
    return f"a file, and a model is a folder. Name the folder that holds the file: {where}."


def _no_model(path: Path) -> str:
    """What is said of a folder that holds no model."""
    whole = path.absolute()
    for run in list(whole.parents)[:2]:
        if (run / "run.json").is_file() and whole.relative_to(run).parts[0] == "checkpoints":
            here = Path.cwd()
            shown = run.relative_to(here) if run.is_relative_to(here) else run
            return (
                "what a run keeps to go on with it, and no model. Name the run itself, which "
                f"stands for its model: {shown}."
            )
    what = "a folder without config.json or adapter_config.json, so no model."
    if any(path.glob("*.gguf")):
        return f"{what} It holds files of GGUF, {GGUF.format('they were')}"
    inside = sorted(each.name for each in path.iterdir() if _holds_model(each))
    if inside:
        listed = ", ".join(str(path / each) for each in inside[:MOST_INSIDE])
        return f"{what} There are models in it: name one, such as {listed}."
    return f"{what} Name the folder that holds the model's files."


def _making(path: Path) -> str:
    """The recipe that would make a run's folder, where one is here or shipped."""
    if path.parent != Path("runs"):
        return ""
    for folder in (Path("recipes"), recipes.shipped("recipes")):
        for name, file in records.names_in(folder).items():
            if recipes.name_of(file.absolute()) == path.name:
                return f" Run the recipe that makes it first: {name}."
    return ""


# What the libraries raise for files that are not what they take them for: peft and torch
# RuntimeErrors for other shapes, transformers what follows from a value of another kind; and
# tokenizers raises Exception itself.
BROKEN = (
    OSError, ValueError, ImportError, RuntimeError, KeyError, AttributeError, TypeError,
)  # fmt: skip


def from_library(name: str, call: Any) -> Any:
    """`call()`, with what the library raises for a missing or broken model put in our words."""
    try:
        return call()
    except Exception as error:
        if not isinstance(error, BROKEN) and type(error) is not Exception:
            raise
        unknown = f"it asks for {error}, which is unknown"
        text = unknown if isinstance(error, KeyError) else " ".join(str(error).split())
        if "offline" in text.lower() or "connect" in text.lower():
            raise errors.EnvironmentRefusal(
                f"{name}: no such folder here, and the hub cannot be reached. Name a local folder "
                "with --set model.name=DIR, or go online; for later work offline, fetch it "
                f"beforehand: hf download {name}"
            ) from error
        raise errors.ModelError(f"{name}: cannot be loaded: {text[:400]}") from error


def adapter_of(location: str) -> dict[str, Any] | None:
    """The adapter_config.json of a local adapter folder, or None when it is a whole model."""
    path = Path(location) / origins.ADAPTER
    if not path.is_file():
        return None
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return settings


def _holds_model(path: Path) -> bool:
    """Whether a folder is a model's, an adapter's, or that of a run which has one."""
    if (path / "run.json").is_file():
        path = path / "model"
    return any((path / known).is_file() for known in ("config.json", origins.ADAPTER))
