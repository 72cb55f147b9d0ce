"""What a model's folder is known by: small files whole, weights by size, header and samples.

Cheap for a model of any size: to hash all of it would take as long as to load it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from itune import errors, locating, origins, storage

SMALL = (".json", ".jinja", ".model", ".txt")
WEIGHTS = (".safetensors", ".bin")
WHOLE = 1 << 20  # chosen: weights up to a megabyte are read whole
BLOCKS, BLOCK = 64, 4096  # chosen: of each larger file; another training changes every one of them


def of(location: str, revision: str | None) -> dict[str, Any]:
    """The fingerprint of the model at a folder or hub id, and of an adapter's base. JSON.

    `revision`: as it is asked for; one of the hub is known by the commit that it stood for.
    """
    folder = Path(locating.resolve(location, revision))
    if not folder.is_dir():
        return {"name": str(folder), "commit": origins.commit(location, revision)}
    found: dict[str, Any] = {"files": _files(folder)}
    adapter = locating.adapter_of(str(folder))
    if adapter is not None:
        found["base"] = of(str(adapter["base_model_name_or_path"]), adapter.get("revision"))
    return found


def digest(fingerprint: Mapping[str, Any]) -> str:
    """A fingerprint as one word."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def of_asking(
    location: str, revision: str | None, dtype: str, wanted: Any, seed: int
) -> dict[str, Any]:
    """What decides answers beside the prompts: the model, its dtype, `wanted`, a GenerationConfig.

    And the seed, where answers are drawn. JSON.
    """
    generation = {k: v for k, v in wanted.to_dict().items() if v is not None}
    generation.pop("transformers_version", None)
    mark = {"model": digest(of(location, revision)), "dtype": dtype, "generation": generation}
    return {**mark, "seed": seed} if wanted.do_sample else mark


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What two fingerprints disagree on: names of files, or `name`, `commit`, `base`."""
    before, after = dict(_flat(old)), dict(_flat(new))
    both = dict.fromkeys([*before, *after])
    return [name for name in both if before.get(name) != after.get(name)]


def refuse_another(name: str, began: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on from a base model that is not the one a run began with."""
    if other := differing(began, now):
        named = errors.inert(", ".join(other[:3])) + (" and more" if len(other) > 3 else "")
        raise errors.ModelError(
            f"{name}: the base model has changed since this run began (fingerprint "
            f"{digest(began)[:12]} then, {digest(now)[:12]} now; {named}). Put it back, or start "
            "anew with --fresh."
        )


def _flat(fingerprint: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in fingerprint.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}/{k}" if key == "base" else k, v) for k, v in _flat(value))
        else:
            yield key, value


def _files(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in WEIGHTS:
            found[path.name] = _sampled(path)
        elif path.suffix in SMALL:
            found[path.name] = storage.sha256(path)[:16]
    return found


def _sampled(path: Path) -> str:
    """A digest of the size, the header of safetensors and blocks spread over the rest."""
    size = path.stat().st_size
    made = hashlib.sha256(f"{size} bytes".encode())
    with path.open("rb") as file:
        if size <= WHOLE:
            made.update(file.read())
            return made.hexdigest()[:16]
        length = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else 0
        start = 8 + length if length < size else 0
        file.seek(0)
        made.update(file.read(start))
        for number in range(BLOCKS):
            file.seek(start + (size - BLOCK - start) * number // (BLOCKS - 1))
            made.update(file.read(BLOCK))
    return made.hexdigest()[:16]
