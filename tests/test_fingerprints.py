"""What a model is known by: any change of its files is seen, and no large file is read whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training import folder_with

from itune import fingerprints

LARGE = 40 << 20


def of(folder: Path) -> dict[str, Any]:
    return fingerprints.of(str(folder), None)


@pytest.fixture
def copied(tmp_path: Path, tiny_model_dir: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "copied"))


def test_a_copy_is_the_same_model_and_a_changed_one_names_the_file(
    copied: Path, tiny_model_dir: Path
) -> None:
    assert of(copied) == of(tiny_model_dir)
    os.utime(copied / "model.safetensors", (1, 1))
    (copied / "README.md").write_text("about it")
    assert of(copied) == of(tiny_model_dir)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        before = of(copied)
        content = (copied / name).read_bytes()
        last = content[-1:] + b" " if name.endswith("json") else bytes([content[-1] ^ 1])
        (copied / name).write_bytes(content[:-1] + last)
        assert fingerprints.differing(before, of(copied)) == [name]


def test_other_weights_of_the_same_shape_are_another_model(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, seed in ((one, 0), (two, 1)):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        weights = torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed))
        save_file({"w": weights}, folder / "model.safetensors")
    assert fingerprints.digest(of(one)) != fingerprints.digest(of(two))
    weights = load_file(one / "model.safetensors")["w"]
    save_file({"v": weights}, two / "model.safetensors")
    assert of(one) != of(two), "another name"


def test_a_large_file_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(LARGE // 4)}, path)
    before, read = of(tmp_path), []
    real = Path.open

    class Counting:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Counting:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def read(self, size: int = -1) -> bytes:
            found: bytes = self.file.read(size)
            read.append(len(found))
            return found

    monkeypatch.setattr(Path, "open", lambda self, *a, **k: Counting(real(self, *a, **k)))
    assert of(tmp_path) == before
    assert 0 < sum(read) < 1 << 20
    monkeypatch.undo()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    assert of(tmp_path) != before, "the last block is always looked at"


def test_a_run_does_not_go_on_from_another_base(
    tmp_path: Path, copied: Path, cli: Callable[..., Any]
) -> None:
    folder_with(tmp_path, copied)
    short = ("tune", "-r", "tune.yaml", "-s", "training.max_steps=2")
    assert cli(*short).code == 0
    kept = tmp_path / "runs/tune/run.json"
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "state": "interrupted"}))
    weights = load_file(copied / "model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + 1e-3
    original = (copied / "model.safetensors").read_bytes()
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    before = {p: p.read_bytes() for p in (tmp_path / "runs/tune/checkpoints").rglob("*.*")}
    ended = cli(*short)
    assert ended.code == 2
    assert "the base model has changed since this run began" in ended.err
    assert "then, " in ended.err
    assert "model.safetensors)" in ended.err
    assert before
    assert before == {p: p.read_bytes() for p in before}
    (copied / "model.safetensors").write_bytes(original)
    assert cli(*short).code == 0


def test_a_run_without_steps_takes_the_base_as_it_is_now(
    tmp_path: Path, copied: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from itune import training

    folder_with(tmp_path, copied)
    short = ("tune", "-r", "tune.yaml", "-s", "training.max_steps=1")
    with monkeypatch.context() as patched:
        patched.setattr(training._Loop, "train", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cli(*short)
    settings = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(settings))  # laid out otherwise
    assert cli(*short).code == 0


def test_a_model_of_the_hub_is_known_by_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "models--org--small"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for commit in ("a" * 40, "b" * 40):
        (kept / "snapshots" / commit).mkdir(parents=True)
        (kept / "snapshots" / commit / "config.json").write_text("{}")
    (kept / "refs").mkdir()
    found = []
    for commit in ("a" * 40, "b" * 40):
        (kept / "refs/main").write_text(commit)
        found.append(fingerprints.of("org/small", None))
    assert [each["commit"] for each in found] == ["a" * 40, "b" * 40]
    assert fingerprints.differing(*found) == ["commit"]
