"""What a model's folder may not do: run code, lead out of itself, hold weights that are not whole.

A folder comes from somebody else. It is looked at before a library reads it, for there the same
things are a prompt, a traceback, random weights in place of missing ones, or nothing at all.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from itune import errors, launching

CONFIGS = (
    "config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "adapter_config.json",
)
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LONGEST_HEADER = 100_000_000  # bytes, as safetensors itself has it
MOST_NAMES = 3
HEAD_SEED = 0  # of a head that was not saved: the same whenever its model is loaded


def check(folder: str) -> None:
    """Refuse a model's or adapter's folder that holds what it may not. Raises ModelError.

    What is no folder here is a name on the hub, of which the library asks the same files.
    """
    place = Path(folder)
    if not place.is_dir():
        return
    for name in CONFIGS:
        if (place / name).is_file():
            _refuse_way_out(place / name)
            _check_config(place / name)
    for path in sorted(place.glob("*.index.json")):
        _check_index(path)
    whole = sorted(place.glob("*.safetensors"))
    for path in whole:
        _refuse_way_out(path)
        _check_whole(path)
    pickled = [path for pattern in PICKLED for path in sorted(place.glob(pattern))]
    if pickled and not whole:
        raise errors.ModelError(
            f"{pickled[0]}: pickled weights, which can run code when they are read, so itune does "
            "not. Where you trust them, load them once with transformers and save_pretrained, "
            "which writes safetensors."
        )


def _refuse_way_out(path: Path) -> None:
    """Refuse a link that leads out of the folder, but to where the hub's cache keeps its files."""
    home, real = path.parent.resolve(), path.resolve()
    cached = home.parent.name == "snapshots" and real.is_relative_to(home.parent.parent)
    if not (real.is_relative_to(home) or cached):
        raise errors.ModelError(
            f"{path}: a link to {errors.shown(str(real))}, outside of the folder. Copy the file "
            "there, or name the folder that holds it."
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise errors.ModelError(
            f"{path}: not JSON: {said}. Was the copy cut? Fetch it again."
        ) from error
    if not isinstance(value, dict):
        raise errors.ModelError(f"{path}: expected a mapping, found {errors.shown(value)}.")
    return value


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a mapping and of those in it, with its value."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            yield from each.items()
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each


def _names(value: Any) -> list[str]:
    """The texts in a value, whether it is one or holds some."""
    held = [each for _, each in _items(value)] if isinstance(value, dict) else [value]
    return [each for each in held if isinstance(each, str)]


def _check_config(path: Path) -> None:
    """No code of the folder's own, and no kernel by the name of a repository."""
    settings = _json(path)
    for key, value in _items(settings):
        if key == "trust_remote_code" and value:
            raise errors.ModelError(
                f"{path}: trust_remote_code is for whoever loads a model to say. Delete the key."
            )
        if not key.endswith(("_implementation", "_implementation_internal")):
            continue
        foreign = [each for each in _names(value) if "/" in each or ":" in each]
        if foreign or (key.endswith("_internal") and value is not None):
            raise errors.ModelError(
                f"{path}: {key}: {errors.shown(foreign[0] if foreign else value)} would load code "
                "from elsewhere. Delete the key."
            )
    if path.name == "config.json" and settings.get("auto_map"):
        _refuse_own_code(path, settings)


def _refuse_own_code(path: Path, settings: dict[str, Any]) -> None:
    """A model whose type the library knows is built by the library; any other would need code."""
    from transformers import CONFIG_MAPPING

    kind = settings.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise errors.ModelError(
            f"{path}: auto_map: a model with code of its own ({errors.shown(kind)}), which is not "
            "run. Take a model whose type transformers has."
        )


def _check_index(path: Path) -> None:
    """A list of shards names files of its own folder, and they are there."""
    _refuse_way_out(path)
    shards = _json(path).get("weight_map")
    if not isinstance(shards, dict):
        raise errors.ModelError(f"{path}: weight_map is missing. Fetch the file again.")
    for shard in sorted(set(_names(shards))):
        if Path(shard).name != shard or "\\" in shard or "\0" in shard:
            raise errors.ModelError(
                f"{path}: the shard {errors.shown(shard)} lies outside of the folder. Name a "
                "folder that holds its own weights."
            )
        if shard.endswith(".safetensors") and not (path.parent / shard).is_file():
            raise errors.ModelError(
                f"{path}: the shard {errors.shown(shard)} is not there. Fetch it again."
            )


def _check_whole(path: Path) -> None:
    """The file is as long as its own header says: https://huggingface.co/docs/safetensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if head == b"version ":
            raise errors.ModelError(
                f"{path}: a pointer of Git LFS, not the weights. Run `git lfs pull` in its folder."
            )
        length = int.from_bytes(head, "little")
        told = file.read(length) if length <= LONGEST_HEADER else b""
    try:
        header = json.loads(told)
        ends = [each["data_offsets"][1] for key, each in header.items() if key != "__metadata__"]
        wanted = 8 + length + max(ends, default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise errors.ModelError(
            f"{path}: no weights: {size} bytes without a whole header. Was the copy cut? Fetch it "
            "again."
        ) from error
    if size != wanted:
        raise errors.ModelError(
            f"{path}: {size} bytes, but its header tells of {wanted}. Was the copy cut? Fetch it "
            "again."
        )


def names(folder: str) -> set[str]:
    """The names of the weights in a folder that was checked; none of what is no folder here."""
    found: set[str] = set()
    for path in Path(folder).glob("*.safetensors"):
        with path.open("rb") as file:
            found |= json.loads(file.read(int.from_bytes(file.read(8), "little"))).keys()
    return found - {"__metadata__"}


# --- what was loaded ----------------------------------------------------------------------


def loaded(
    name: str,
    call: Callable[..., Any],
    *,
    head_may_be_new: bool = False,
    elsewhere: Collection[str] = (),
) -> Any:
    """The model that `call(**options)` loads, if all of its weights were there.

    With `head_may_be_new` a head that was not saved is drawn from a seed, always the same, and
    told of, if its output layer is the embeddings themselves: so an encoder that was saved without
    one can be tuned. The layers drawn are the model's `drawn`, a tuple of their names.

    Raises ModelError where weights are missing, of another shape or not finite: the library would
    draw them at random, and train on. Weights that the model has no place for are told of, but for
    those that have theirs `elsewhere`.
    """
    with _drawing(head_may_be_new):
        model, found = call(output_loading_info=True, ignore_mismatched_sizes=True)
    other = sorted(found["mismatched_keys"])
    if other:
        key, theirs, ours = other[0]
        raise errors.ModelError(
            f"{name}: weight {key} has the shape {tuple(theirs)}, but its config asks for "
            f"{tuple(ours)}{_more(other)}. config.json and weights do not belong together."
        )
    missing = sorted(found["missing_keys"])
    if missing and head_may_be_new and _is_head(model, missing):
        model.drawn = _layers_of(model, missing)
        launching.warn(
            f"{name}: it was saved without the head that fills masks, so that is drawn from a "
            f"seed: {_listed(missing)}. Untuned it answers by chance; tuning trains the head too."
        )
    elif missing:
        raise errors.ModelError(
            f"{name}: weights are missing: {_listed(missing)}. Fetch it again, or name a model "
            f"that was saved as a {type(model).__name__}."
        )
    extra = sorted(set(found["unexpected_keys"]) - set(elsewhere))
    if extra:
        launching.warn(
            f"{name}: weights that {type(model).__name__} has no place for are left out: "
            f"{_listed(extra)}."
        )
    refuse_non_finite(name, model.named_parameters())
    return model


@contextlib.contextmanager
def _drawing(seeded: bool) -> Iterator[None]:
    """What is drawn at random within is always the same, if so asked."""
    if not seeded:
        yield
        return
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(HEAD_SEED)
        yield


def _is_head(model: Any, missing: list[str]) -> bool:
    """Whether missing weights are of the head alone, and none is its output layer's matrix."""
    output, inside = model.get_output_embeddings(), f"{model.base_model_prefix}."
    matrices = {name for name, each in model.named_parameters() if each is output.weight}
    own = [name for name in missing if name.startswith(inside) or name in matrices]
    tied = output.weight is model.get_input_embeddings().weight
    return tied and not own


def _layers_of(model: Any, names: list[str]) -> tuple[str, ...]:
    """The layers that hold these weights, but for those about the output layer: its bias is 0."""
    output = model.get_output_embeddings()
    every = dict.fromkeys(name.rpartition(".")[0] for name in names)
    return tuple(
        layer
        for layer in every
        if all(m is not output for m in model.get_submodule(layer).modules())
    )


def _listed(names: list[str]) -> str:
    return errors.inert(", ".join(names[:MOST_NAMES])) + _more(names[MOST_NAMES - 1 :])


def _more(names: list[Any]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def refuse_non_finite(name: str, tensors: Iterable[tuple[str, Any]]) -> None:
    """Raise ModelError for weights, by their names, with numbers that are not finite."""
    import torch

    for key, tensor in tensors:
        if tensor.is_meta or tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            continue
        if tensor.numel() and not torch.isfinite(torch.stack(tensor.detach().aminmax())).all():
            raise errors.ModelError(
                f"{name}: weight {key} holds numbers that are not finite. Take a checkpoint from "
                "before they were."
            )
