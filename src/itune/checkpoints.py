"""Checkpoints: staged, sealed with a manifest, published by one rename, found, rotated.

Needs torch. Nothing in a checkpoint is code: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from itune import errors, storage

VERSION = 2  # 2: the best step
MANIFEST = "manifest.json"
PARTS = ("optimizer.safetensors", "rng.safetensors", "state.json", "weights.safetensors")
AVERAGE = "average.safetensors"  # beside them where the weights are averaged
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class State:
    """All that a run needs to go on as if it had never stopped.

    weights: the trainable parameters by name. optimizer, scheduler: their state_dict. rng: what
    `random_state` gave on each rank. meta: step, tokens, seconds and what else is counted; JSON.
    average: the mean of the weights so far, by name; empty where none is kept or none is begun.
    """

    step: int
    weights: Tensors
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    rng: list[Tensors]
    meta: dict[str, Any]
    average: Tensors = field(default_factory=dict)


# --- random numbers -----------------------------------------------------------------------------


def random_state() -> Tensors:
    """The state of every generator of this process, as tensors on the CPU."""
    version, words, gauss = random.getstate()
    state = {"cpu": torch.get_rng_state(), "python": torch.tensor(words, dtype=torch.int64)}
    assert version == 3
    if gauss is not None:
        state["python_gauss"] = torch.tensor(gauss, dtype=torch.float64)
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Tensors) -> None:
    """Give this process's generators the state that `random_state` gave."""
    gauss = state.get("python_gauss")
    words = tuple(state["python"].tolist())
    random.setstate((3, words, None if gauss is None else float(gauss)))
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def go_on(state: State, rank: int, world: int, seed: int) -> str | None:
    """Give this process the random state of its rank, and say what differs for a run whose number
    of processes changed.

    A rank that was not there draws from (seed, step, rank), so that the same start gives the same.
    """
    if rank < len(state.rng):
        set_random_state(state.rng[rank])
    else:
        drawn = np.random.SeedSequence([seed, state.step, rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(drawn[0]))
        random.seed(int(drawn[0]))
    if world == len(state.rng):
        return None
    return (
        f"goes on after step {state.step} in {_processes(world)}, was "
        f"{_processes(len(state.rng))}: every step has the same rows; what is drawn at random in "
        "it, such as dropout, differs."
    )


def _processes(count: int) -> str:
    return f"{count} process{'es' * (count > 1)}"


# --- saving -------------------------------------------------------------------------------------


def save(folder: Path, state: State, *, run_id: str, keep: int, best: int = 0) -> Path:
    """Publish a checkpoint under `folder`, then remove older ones of this run beyond `keep`.

    best: the step whose checkpoint is kept as long as this one is; 0 where there is none.

    A checkpoint with its final name is whole: files are on disk before the manifest with their
    sha256, the manifest before the rename. A published one is never written to again. Raises
    Diverged for weights that are not finite; EnvironmentRefusal when it cannot be written: what
    was staged is removed, older checkpoints are untouched.
    """
    _refuse_non_finite(state)
    final = folder / f"{state.step:06d}"
    staged = folder / f".staged-{run_id}-{state.step:06d}"
    try:
        storage.DISK.make_folder(folder)
        _clear(folder, run_id)
        storage.DISK.make_folder(staged)
        _write(staged, state, run_id, best)
        if final.exists():  # one that was passed over as broken: never deleted
            storage.DISK.rename(final, _aside(final))
        storage.DISK.rename(staged, final)
        storage.DISK.sync(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors report a full disk as errors of their own.
        shutil.rmtree(staged, ignore_errors=True)
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        raise errors.EnvironmentRefusal(
            f"{final}: the checkpoint could not be written ({_short(error)}; {free / 1e6:.0f} MB "
            "free). Earlier checkpoints are whole: make room and run the same command again."
        ) from error
    _rotate(folder, run_id, keep)
    return final


def _refuse_non_finite(state: State) -> None:
    for name, tensor in state.weights.items():
        if not torch.isfinite(tensor).all():
            raise errors.Diverged(
                f"step {state.step}: {name} holds numbers that are not finite, so no checkpoint "
                "was written. The one before is whole: lower training.learning_rate and start "
                "with --fresh."
            )


def _clear(folder: Path, run_id: str) -> None:
    """Remove what a killed save or rotation of this run left behind."""
    for path in [*folder.glob(f".staged-{run_id}-*"), *folder.glob(f".trash-{run_id}-*")]:
        storage.DISK.remove(path)


def _aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f".broken-{path.name}-{number}")).exists():
        number += 1
    return aside


def _write(folder: Path, state: State, run_id: str, best: int) -> None:
    moments, settings = _split(state.optimizer)
    rng = {f"{rank}.{name}": t for rank, each in enumerate(state.rng) for name, t in each.items()}
    _write_tensors(folder / "weights.safetensors", state.weights)
    _write_tensors(folder / "optimizer.safetensors", moments)
    _write_tensors(folder / "rng.safetensors", rng)
    if state.average:
        _write_tensors(folder / AVERAGE, state.average)
    plain = {"optimizer": settings, "scheduler": state.scheduler, "meta": state.meta}
    _write_json(folder / "state.json", plain)
    listed = {}
    for path in sorted(folder.iterdir()):
        storage.DISK.sync(path)
        listed[path.name] = {"bytes": path.stat().st_size, "sha256": storage.sha256(path)}
    manifest = {
        "version": VERSION,
        "run": run_id,
        "step": state.step,
        "best": best,
        "processes": len(state.rng),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "files": listed,
    }
    _write_json(folder / MANIFEST, manifest)
    storage.DISK.sync(folder / MANIFEST)
    storage.DISK.sync(folder)


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    storage.DISK.produce(path, lambda place: save_file(whole, place))


def _write_json(path: Path, value: object) -> None:
    def put(place: Path) -> None:
        with place.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)

    storage.DISK.produce(path, put)


def _split(optimizer: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """An optimiser's state_dict as its tensors by `parameter.name`, and all that is plain."""
    tensors: Tensors = {}
    plain: dict[str, dict[str, Any]] = {}
    for number, fields in optimizer.get("state", {}).items():
        for name, value in fields.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{number}.{name}"] = value
            else:
                plain.setdefault(str(number), {})[name] = value
    return tensors, {"state": plain, "param_groups": optimizer.get("param_groups", [])}


def _joined(tensors: Tensors, plain: dict[str, Any]) -> dict[str, Any]:
    """What `_split` took apart."""
    state: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in plain["state"].items()}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    groups = [
        {k: tuple(v) if k == "betas" else v for k, v in group.items()}
        for group in plain["param_groups"]
    ]
    return {"state": dict(sorted(state.items())), "param_groups": groups}


# --- finding and loading --------------------------------------------------------------------------


def _manifest(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return value


def fault(folder: Path, run_id: str) -> str | None:
    """Why a checkpoint cannot be used, or None when it is whole and of this run."""
    try:
        manifest = _manifest(folder)
        known, owner, step = manifest["version"], manifest["run"], manifest["step"]
        listed = {str(k): (v["bytes"], v["sha256"]) for k, v in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read ({_short(error)})"
    if known != VERSION:
        return f"its format is version {known}, known is {VERSION}"
    if owner != run_id:
        return "it belongs to another run"
    if step != int(folder.name):
        return f"it is of step {step}"
    if missing := set(PARTS) - set(listed):
        return f"its {MANIFEST} does not list {min(missing)}"
    for name, (size, digest) in listed.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if storage.sha256(path) != digest:
            return f"{name} was changed, its sha256 differs"
    return None


def latest(folder: Path, run_id: str) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, and a warning for each newer one passed over.

    Raises RunError when there are checkpoints but none is whole: starting anew would lose them.
    """
    warnings: list[str] = []
    found = storage.numbered(folder)
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
    """A checkpoint read back, tensors on the CPU."""
    saved = json.loads((path / "state.json").read_text(encoding="utf-8"))
    rng: dict[int, Tensors] = {}
    for key, tensor in load_file(path / "rng.safetensors").items():
        rank, _, name = key.partition(".")
        rng.setdefault(int(rank), {})[name] = tensor
    return State(
        step=int(path.name),
        weights=load_file(path / "weights.safetensors"),
        optimizer=_joined(load_file(path / "optimizer.safetensors"), saved["optimizer"]),
        scheduler=saved["scheduler"],
        rng=[rng[rank] for rank in sorted(rng)],
        meta=saved["meta"],
        average=load_file(path / AVERAGE) if (path / AVERAGE).is_file() else {},
    )


def _rotate(folder: Path, run_id: str, keep: int) -> None:
    """Remove this run's checkpoints beyond the newest `keep`; never what another made.

    Nor the best of those that stay: each may be the one from which the run goes on.

    One that cannot be removed is left for the next time: the new one is published already.
    """
    own = [path for path in storage.numbered(folder) if _known(path, "run") == run_id]
    kept = max(1, keep)
    best = {_known(path, "best") for path in own[:kept]}
    for path in own[kept:]:
        if int(path.name) in best:
            continue
        trash = path.with_name(f".trash-{run_id}-{path.name}")
        try:
            storage.DISK.rename(path, trash)
            storage.DISK.remove(trash)
        except OSError:
            return


def _known(path: Path, key: str) -> Any:
    """A field of a checkpoint's manifest; None where it has none."""
    try:
        return _manifest(path).get(key)
    except (OSError, ValueError, AttributeError):
        return None


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
