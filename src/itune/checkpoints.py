"""Checkpoints: staged, sealed with a manifest, published by one rename, found, rotated.

Needs torch. Nothing in a checkpoint is code: tensors are safetensors, the rest is JSON. Where a
model is cut over processes each writes its own rows, and any number of processes goes on from them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from itune import errors, pieces, storage

VERSION = 2  # 2: the best step
MANIFEST = "manifest.json"
PARTS = ("rng.safetensors", "state.json")
WEIGHTS, MOMENTS = "weights", "optimizer"  # kinds of tensors that are written in pieces too
AVERAGE = "average"  # beside them where the weights are averaged
Tensors = dict[str, torch.Tensor]
Listed = dict[str, dict[str, Any]]  # of each file its bytes and sha256
Take = Callable[[pieces.Pieces, str], torch.Tensor]


@dataclass(frozen=True)
class State:
    """All that a run needs to go on as if it had never stopped.

    weights: the trainable parameters by name; of a cut model, and of the optimizer's state, what
    this process has of them. optimizer, scheduler: their state_dict. rng: what `generators.state`
    gave on each rank. meta: step, tokens, seconds and what else is counted; JSON.
    average: the mean of the weights so far, by name; empty where none is kept or none is begun.
    """

    step: int
    weights: Mapping[str, torch.Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    rng: list[Tensors]
    meta: dict[str, Any]
    average: Tensors = field(default_factory=dict)


# --- saving -------------------------------------------------------------------------------------


def save(
    folder: Path,
    state: State,
    *,
    run_id: str,
    keep: int,
    best: int = 0,
    peers: pieces.Peers = pieces.ALONE,
) -> Path:
    """Publish a checkpoint under `folder`, then remove older ones of this run beyond `keep`.

    best: the step whose checkpoint is kept as long as this one is; 0 where there is none.
    peers: the processes that call this together, each with the rows that it has of the weights
    and the optimizer's state; the first has what is not cut besides, and publishes.

    A checkpoint with its final name is whole: files are on disk before the manifest with their
    sha256, the manifest before the rename. A published one is never written to again. Raises
    Diverged for weights that are not finite; EnvironmentRefusal when it cannot be written: what
    was staged is removed, older checkpoints are untouched.
    """
    first = peers.index == 0
    final = folder / f"{state.step:06d}"
    staged = folder / f".staged-{run_id}-{state.step:06d}"
    broken = next((n for n, t in state.weights.items() if not torch.isfinite(t).all()), None)
    if broken := next(filter(None, peers.gathered([broken])), None):
        raise errors.Diverged(
            f"step {state.step}: {broken} holds numbers that are not finite, so no checkpoint "
            "was written. The one before is whole: lower training.learning_rate and start "
            "with --fresh."
        )

    def begin() -> None:
        storage.DISK.make_folder(folder)
        _clear(folder, run_id)
        storage.DISK.make_folder(staged)

    def publish(listed: Listed) -> None:
        _seal(staged, state, run_id, best, listed)
        if final.exists():  # one that was passed over as broken: never deleted
            storage.DISK.rename(final, _aside(final))
        storage.DISK.rename(staged, final)
        storage.DISK.sync(folder)

    try:
        _together(peers, begin if first else None)
        listed: Listed = {}
        for each in _together(peers, lambda: _write(staged, state, peers)):
            listed |= each
        _together(peers, (lambda: publish(listed)) if first else None)
    except _WriteError as error:
        if first:
            shutil.rmtree(staged, ignore_errors=True)
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        raise errors.EnvironmentRefusal(
            f"{final}: the checkpoint could not be written ({error}; {free / 1e6:.0f} MB "
            "free). Earlier checkpoints are whole: make room and run the same command again."
        ) from error
    if first:
        _rotate(folder, run_id, keep)
    return final


class _WriteError(Exception):
    """What a disk said, to whichever process."""


def _together(peers: pieces.Peers, work: Callable[[], Any] | None) -> list[Any]:
    """What the work of every process gives; where that of one fails, all raise _WriteError."""
    given, said, cause = None, None, None
    try:
        given = None if work is None else work()
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors report a full disk as errors of their own.
        said, cause = _short(error), error
    found = peers.gathered([(given, said)])
    if why := next((said for _, said in found if said is not None), None):
        raise _WriteError(why) from cause
    return [given for given, _ in found]


def _clear(folder: Path, run_id: str) -> None:
    """Remove what a killed save or rotation of this run left behind."""
    for path in [*folder.glob(f".staged-{run_id}-*"), *folder.glob(f".trash-{run_id}-*")]:
        storage.DISK.remove(path)


def _aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f".broken-{path.name}-{number}")).exists():
        number += 1
    return aside


def _write(folder: Path, state: State, peers: pieces.Peers) -> Listed:
    """Write what is this process's to write, and tell of it as the manifest does."""
    moments, settings = _split(state.optimizer)
    paths = [folder / pieces.name(kind, peers) for kind in (WEIGHTS, MOMENTS)]
    for path, tensors in zip(paths, (state.weights, moments), strict=True):
        _write_tensors(path, tensors)
    if peers.index == 0:
        rng = {
            f"{rank}.{name}": t for rank, each in enumerate(state.rng) for name, t in each.items()
        }
        paths += [folder / name for name in PARTS]
        _write_tensors(folder / "rng.safetensors", rng)
        plain = {"optimizer": settings, "scheduler": state.scheduler, "meta": state.meta}
        _write_json(folder / "state.json", plain)
        if state.average:
            paths.append(folder / pieces.name(AVERAGE, pieces.ALONE))
            _write_tensors(paths[-1], state.average)
    listed = {}
    for path in sorted(paths):
        storage.DISK.sync(path)
        listed[path.name] = {"bytes": path.stat().st_size, "sha256": storage.sha256(path)}
    return listed


def _seal(folder: Path, state: State, run_id: str, best: int, listed: Listed) -> None:
    """Write the manifest, once all that it lists is on the disk."""
    manifest = {
        "version": VERSION,
        "run": run_id,
        "step": state.step,
        "best": best,
        "processes": len(state.rng),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "files": dict(sorted(listed.items())),
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


def fault(folder: Path, run_id: str, peers: pieces.Peers = pieces.ALONE) -> str | None:
    """Why a checkpoint cannot be used, or None when it is whole and of this run.

    peers: the processes that ask together, each of which reads some of its files.
    """
    return next(filter(None, peers.gathered([_fault(folder, run_id, peers)])), None)


def _fault(folder: Path, run_id: str, peers: pieces.Peers) -> str | None:
    """What this process finds, of its share of the files."""
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
    needed = [pieces.missing(kind, listed) for kind in (WEIGHTS, MOMENTS)]
    needed += [name for name in PARTS if name not in listed]
    if missing := next(filter(None, needed), None):
        return f"its {MANIFEST} does not list {missing}"
    mine = list(listed)[peers.index :: peers.count]
    return next(filter(None, (_differs(folder / name, *listed[name]) for name in mine)), None)


def _differs(path: Path, size: int, digest: str) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != size:
        return f"{path.name} has {path.stat().st_size} bytes instead of {size}"
    try:
        same = storage.sha256(path) == digest
    except OSError as error:
        return f"{path.name} cannot be read ({_short(error)})"
    if not same:
        return f"{path.name} was changed, its sha256 differs"
    return None


def latest(
    folder: Path, run_id: str, peers: pieces.Peers = pieces.ALONE
) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, and a warning for each newer one passed over.

    peers: as `fault` has them. Raises RunError when there are checkpoints but none is whole:
    starting anew would lose them.
    """
    warnings: list[str] = []
    # The first process's list: another machine may not see yet what is new.
    found = [folder / n for n in peers.gathered([[p.name for p in storage.numbered(folder)]])[0]]
    for path in found:
        why = fault(path, run_id, peers)
        if why is None:
            return path, warnings
        warnings.append(f"{path}: passed over, {why}.")
    if found:
        raise errors.RunError(
            f"{folder}: none of {len(found)} checkpoints can be used ({warnings[0]}) "
            "Start anew with --fresh; this run is then moved aside."
        )
    return None, warnings


def load(path: Path, take: Take = pieces.Pieces.__getitem__) -> State:
    """A checkpoint read back, tensors on the CPU; weights when they are asked for.

    take: what is to be had of each tensor of the optimizer's state, which is named by
    `parameter.field`.
    """
    saved = json.loads((path / "state.json").read_text(encoding="utf-8"))
    rng: dict[int, Tensors] = {}
    for key, tensor in load_file(path / "rng.safetensors").items():
        rank, _, name = key.partition(".")
        rng.setdefault(int(rank), {})[name] = tensor
    moments = pieces.Pieces(path, MOMENTS)
    average = path / pieces.name(AVERAGE, pieces.ALONE)
    return State(
        step=int(path.name),
        weights=pieces.Pieces(path, WEIGHTS),
        optimizer=_joined({key: take(moments, key) for key in moments}, saved["optimizer"]),
        scheduler=saved["scheduler"],
        rng=[rng[rank] for rank in sorted(rng)],
        meta=saved["meta"],
        average=load_file(average) if average.is_file() else {},
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
