"""Every operation of a save fails once, in every way: what is found afterwards is always whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from itune import checkpoints, errors, generators, storage

from .disks import KINDS, FaultyDisk

RUN = "mine"
Save = Callable[[Path, checkpoints.State], object]


def state(step: int) -> checkpoints.State:
    return checkpoints.State(
        step=step,
        weights={"w": torch.full((40,), float(step)), "v": torch.full((3, 5), -float(step))},
        optimizer={
            "state": {0: {"step": torch.tensor(float(step)), "exp_avg": torch.ones(40) * step}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0]}],
        },
        scheduler={"last_epoch": step},
        rng=[generators.state()],
        meta={"step": step},
    )


def same(path: Path, step: int) -> bool:
    """Whether a checkpoint reads back as the state of that step, all of it."""
    found, wanted = checkpoints.load(path), state(step)
    return (
        all(torch.equal(found.weights[name], wanted.weights[name]) for name in wanted.weights)
        and torch.equal(
            found.optimizer["state"][0]["exp_avg"], wanted.optimizer["state"][0]["exp_avg"]
        )
        and found.optimizer["param_groups"] == wanted.optimizer["param_groups"]
        and (found.scheduler, found.meta) == (wanted.scheduler, wanted.meta)
        and set(found.rng[0]) == set(wanted.rng[0])
    )


def saved(folder: Path, made: checkpoints.State) -> None:
    checkpoints.save(folder, made, run_id=RUN, keep=1)


def naive(folder: Path, made: checkpoints.State) -> None:
    """What many programs do: files written straight into the folder with the final name."""
    final = folder / f"{made.step:06d}"
    storage.DISK.make_folder(final)
    storage.DISK.produce(final / "weights.safetensors", lambda p: save_file(made.weights, p))
    storage.DISK.produce(final / "state.json", lambda p: p.write_text('{"meta": {}}') and None)
    size = (final / "weights.safetensors").stat().st_size
    listed = {"weights.safetensors": {"bytes": size, "sha256": "-"}}
    manifest = {"version": checkpoints.VERSION, "run": RUN, "step": made.step, "files": listed}
    storage.DISK.produce(
        final / "manifest.json", lambda p: p.write_text(json.dumps(manifest)) and None
    )


def outcome(folder: Path, save: Save, disk: FaultyDisk) -> tuple[str, bool]:
    """How a save of step 2 ended in a process of its own: saved, refused or killed; was it hit."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        storage.DISK = disk
        ended = "saved"
        try:
            save(folder, state(2))
        except (errors.EnvironmentRefusal, OSError):
            ended = "refused"
        except BaseException as error:
            ended = f"raised {type(error).__name__}: {error}"
        os.write(writing, f"{ended}\n{disk.failed}".encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    ended, _, hit = said.partition("\n")
    return (ended, hit == "True") if said else ("killed", True)


def spoilt(folder: Path, ended: str) -> str | None:
    """What is wrong after a fault, or None: the newest is whole, before or after; OK is after."""
    try:
        found, _ = checkpoints.latest(folder, RUN)
    except errors.RunError as error:
        return f"nothing to go on from: {error}"
    if found is None or found.name not in ("000001", "000002"):
        return f"found {found}"
    if not same(found, int(found.name)):
        return f"{found} reads back as something else"
    if ended == "saved" and found.name != "000002":
        return "the save succeeded, but the older state is found"
    return None if ended in ("saved", "refused", "killed") else ended


def sweep(tmp_path: Path, save: Save, kind: str, torn: bool) -> tuple[int, list[str]]:
    """Fault at operation 1, 2, 3 ... until one save meets none: their number, and what broke."""
    found: list[str] = []
    for at in range(1, 200):
        folder = tmp_path / f"{kind}-{at}"
        saved(folder, state(1))
        ended, hit = outcome(folder, save, FaultyDisk(kind, at, torn))
        if not hit:
            assert ended == "saved"
            return at - 1, found
        if wrong := spoilt(folder, ended):
            found.append(f"operation {at}: {wrong}")
        # Whatever happened, the next save goes through and is what is found.
        saved(folder, state(3))
        newest, _ = checkpoints.latest(folder, RUN)
        assert newest is not None
        assert newest.name == "000003", f"{kind} at operation {at}"
        leftover = [p.name for p in folder.iterdir() if p.name.startswith((".staged", ".trash"))]
        assert not leftover, f"{kind} at operation {at}"
        shutil.rmtree(folder)
    raise AssertionError("the sweep found no end")


@pytest.mark.parametrize("torn", [False, True], ids=["before", "midway"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_fault_leaves_a_torn_checkpoint(tmp_path: Path, kind: str, torn: bool) -> None:
    operations, found = sweep(tmp_path, saved, kind, torn)
    assert operations >= 15
    assert not found


def test_the_sweep_finds_what_is_wrong_with_a_naive_save(tmp_path: Path) -> None:
    def first_naive(folder: Path, made: checkpoints.State) -> None:
        naive(folder, made)

    for at in (1, 2, 3, 4):
        folder = tmp_path / str(at)
        saved(folder, state(1))
        shutil.rmtree(folder / "000001")  # a program that keeps one, and makes room first
        ended, hit = outcome(folder, first_naive, FaultyDisk("kill", at, torn=True))
        assert hit
        assert spoilt(folder, ended) is not None


PARTS = (
    "weights.safetensors",
    "optimizer.safetensors",
    "rng.safetensors",
    "state.json",
    "manifest.json",
)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


SPOILS: dict[str, Callable[[Path], object]] = {
    "flip-first": lambda p: flip(p, 0),
    "flip-late": lambda p: flip(p, -2),
    "cut": lambda p: os.truncate(p, p.stat().st_size // 2),
    "empty": lambda p: os.truncate(p, 0),
    "remove": lambda p: p.unlink(),
    "swap": lambda p: shutil.copy(p.parent.with_name("000001") / p.name, p),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("spoil", SPOILS)
def test_a_spoilt_file_is_named_and_the_older_checkpoint_taken(
    tmp_path: Path, part: str, spoil: str
) -> None:
    for step in (1, 2):
        checkpoints.save(tmp_path, state(step), run_id=RUN, keep=2)
    spoiled = tmp_path / "000002" / part
    before = spoiled.read_bytes()
    SPOILS[spoil](spoiled)
    if spoiled.is_file() and spoiled.read_bytes() == before:
        return  # both steps have the same bytes there
    found, warnings = checkpoints.latest(tmp_path, RUN)
    assert found == tmp_path / "000001"
    assert same(found, 1)
    assert len(warnings) == 1
    assert "000002" in warnings[0]
    assert part in warnings[0] or "of step 1" in warnings[0]
    assert (tmp_path / "000002").is_dir()
    # Saved again, the broken one is kept beside the new.
    checkpoints.save(tmp_path, state(2), run_id=RUN, keep=2)
    assert checkpoints.latest(tmp_path, RUN) == (tmp_path / "000002", [])
    assert list(tmp_path.glob(".broken-000002-*"))


@pytest.mark.parametrize("part", PARTS[:-1])
def test_a_manifest_that_lists_too_little_vouches_for_nothing(tmp_path: Path, part: str) -> None:
    for step in (1, 2):
        checkpoints.save(tmp_path, state(step), run_id=RUN, keep=2)
    manifest = tmp_path / "000002" / "manifest.json"
    said = json.loads(manifest.read_text())
    del said["files"][part]
    manifest.write_text(json.dumps(said))
    (tmp_path / "000002" / part).unlink()
    found, warnings = checkpoints.latest(tmp_path, RUN)
    assert found == tmp_path / "000001"
    assert f"manifest.json does not list {part}" in warnings[0]
