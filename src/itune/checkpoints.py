"""Checkpoints: staged, sealed with a manifest, published by one rename, found, rotated.

Needs torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from itune import errors

VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class State:
    """All that a run needs to go on as if it had never stopped.

    weights: the trainable parameters by name. rng: torch's state a rank, uint8 tensors. meta:
    step, tokens, seconds and what else the loop counts; JSON.
    """

    step: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    rng: list[torch.Tensor]
    meta: dict[str, Any]


def save(folder: Path, state: State, *, run_id: str, keep: int) -> Path:
    """Publish a checkpoint under `folder`, then remove older ones of this run beyond `keep`.

    A checkpoint with its final name is whole: files are on disk before the manifest with their
    sha256, the manifest before the rename. Raises EnvironmentRefusal when there is no room; what
    was staged is removed, older checkpoints are untouched.
    """
    final = folder / f"{state.step:06d}"
    if final.exists():  # a step is saved once; a run killed after this one trains the same again
        shutil.rmtree(final)
    staged = folder / f".staged-{state.step:06d}"
    shutil.rmtree(staged, ignore_errors=True)
    try:
        staged.mkdir(parents=True)
        _write(staged, state, run_id)
        staged.rename(final)
        _sync(folder)
    except (OSError, RuntimeError) as error:
        # torch and safetensors report a full disk as RuntimeErrors of their own.
        shutil.rmtree(staged, ignore_errors=True)
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        raise errors.EnvironmentRefusal(
            f"{final}: the checkpoint could not be written ({_short(error)}; {free / 1e6:.0f} MB "
            "free). Earlier checkpoints are whole: make room and run the same command again."
        ) from error
    _rotate(folder, run_id, keep)
    return final


def _write(folder: Path, state: State, run_id: str) -> None:
    weights = {name: tensor.detach().contiguous() for name, tensor in state.weights.items()}
    save_file(weights, folder / "weights.safetensors")
    torch.save(state.optimizer, folder / "optimizer.pt")
    torch.save(state.rng, folder / "rng.pt")
    with (folder / "state.json").open("w", encoding="utf-8") as file:
        json.dump({"scheduler": state.scheduler, "meta": state.meta}, file)
    files = {}
    for path in sorted(folder.iterdir()):
        _sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = {"version": VERSION, "run": run_id, "step": state.step, "files": files}
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
    _sync(folder / MANIFEST)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _manifest(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return value


def fault(folder: Path, run_id: str) -> str | None:
    """Why a checkpoint cannot be used, or None when it is whole and of this run."""
    try:
        manifest = _manifest(folder)
    except (OSError, ValueError) as error:
        return f"its manifest cannot be read ({_short(error)})"
    if manifest.get("version") != VERSION:
        return f"its format is version {manifest.get('version')}, known is {VERSION}"
    if manifest.get("run") != run_id:
        return "it belongs to another run"
    for name, wanted in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != wanted["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {wanted['bytes']}"
        if _sha256(path) != wanted["sha256"]:
            return f"{name} was changed, its sha256 differs"
    return None


def steps(folder: Path) -> list[Path]:
    """The published checkpoints, the newest step first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: -int(p.name))


def latest(folder: Path, run_id: str) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, and a warning for each newer one passed over.

    Raises RunError when there are checkpoints but none is whole: starting anew would lose them.
    """
    warnings: list[str] = []
    found = steps(folder)
    for path in found:
        why = fault(path, run_id)
        if why is None:
            return path, warnings
        warnings.append(f"{path}: passed over, {why}.")
    if found:
        raise errors.RunError(
            f"{folder}: none of {len(found)} checkpoints can be used ({warnings[0]}) "
            "Start anew with --fresh; this run is then moved aside."
        )
    return None, warnings


def load(path: Path) -> State:
    """A checkpoint read back, tensors on the CPU. Nothing in it is ever unpickled as code."""
    saved = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return State(
        step=int(path.name),
        weights=load_file(path / "weights.safetensors"),
        optimizer=torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True),
        scheduler=saved["scheduler"],
        rng=torch.load(path / "rng.pt", map_location="cpu", weights_only=True),
        meta=saved["meta"],
    )


def _rotate(folder: Path, run_id: str, keep: int) -> None:
    """Remove this run's checkpoints beyond the newest `keep`; never what another made."""
    for path in steps(folder)[max(1, keep) :]:
        try:
            mine = _manifest(path).get("run") == run_id
        except (OSError, ValueError):
            mine = False
        if mine:
            trash = path.with_name(f".trash-{path.name}")
            path.rename(trash)
            shutil.rmtree(trash)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
