"""A run's folder that something damaged: told in one line, and nothing of it is lost."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.kills import prepare
from test_training import folder_with, losses_of

from itune import errors, runs

Cli = Callable[..., Any]


@pytest.fixture
def unfinished(tmp_path: Path, tiny_model_dir: Path, cli: Cli) -> Path:
    """A run with all its steps and checkpoints that has yet to say that it is finished."""
    folder_with(tmp_path, tiny_model_dir)
    assert cli("tune", "-r", "tune.yaml").code == 0
    manifest = json.loads((tmp_path / "runs/tune/run.json").read_text())
    manifest["state"] = "running"
    (tmp_path / "runs/tune/run.json").write_text(json.dumps(manifest))
    return tmp_path / "runs/tune"


def test_a_log_is_cut_at_its_torn_end_alone(unfinished: Path, cli: Cli) -> None:
    log = unfinished / "log.jsonl"
    whole = log.read_bytes()
    lines = whole.splitlines(keepends=True)
    for spoilt in (b"X" + lines[2][1:], b"3\n", b"\xff\n", b""):
        damaged = b"".join([*lines[:2], spoilt, *lines[3:]])
        log.write_bytes(damaged)
        ended = cli("tune", "-r", "tune.yaml")
        assert ended.code == 2, ended.err
        assert "log.jsonl" in ended.err
        assert "line 3" in ended.err or "step 3" in ended.err
        assert "Traceback" not in ended.err
        assert log.read_bytes() == damaged
    wanted = [json.loads(line)["loss"] for line in lines]
    log.write_bytes(whole + b'{"step": 13, "lo')
    assert cli("tune", "-r", "tune.yaml").code == 0
    assert [loss for _, loss, _ in losses_of(unfinished)] == wanted


@pytest.mark.parametrize(
    ("content", "said"),
    [("{}", "has no state"), ('{"state": 3, "command": "tune", "id": "a"}', "has no state")],
)
def test_a_manifest_without_its_state_is_damaged(
    content: str, said: str, unfinished: Path, cli: Cli
) -> None:
    (unfinished / "run.json").write_text(content)
    for command in (["tune", "-r", "tune.yaml"], ["eval", "--run"], ["generate", "hi", "--run"]):
        ended = cli(*command, *(["runs/tune"] if command[-1] == "--run" else []))
        assert ended.code == 2, ended.err
        assert "run.json" in ended.err
        assert said in ended.err
    assert cli("tune", "-r", "tune.yaml", "--fresh").code == 0
    assert (unfinished.with_name("tune.old-1") / "log.jsonl").is_file()


def test_a_run_without_its_recipe_says_so(unfinished: Path, cli: Cli) -> None:
    (unfinished / "recipe.yaml").unlink()
    ended = cli("tune", "-r", "tune.yaml")
    assert ended.code == 2, ended.err
    assert "recipe.yaml: is missing" in ended.err


def test_a_recipe_that_was_torn_or_edited_is_no_other_recipe(unfinished: Path, cli: Cli) -> None:
    """A torn one reads as a recipe with defaults: nothing may be trained or scored by it."""
    path = unfinished / "recipe.yaml"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    edited = whole.replace(b"max_length: 128", b"max_length: 127")
    assert edited != whole
    for content in (b"".join(lines[:-1]), b"".join(lines[:9]), whole[:-9], edited, b"", b"\xff"):
        path.write_bytes(content)
        for command in (
            ["tune", "-r", "tune.yaml"],
            ["tune", "-r", "runs/tune/recipe.yaml"],
            ["eval", "--run", "runs/tune"],
        ):
            if command[0] == "eval":
                manifest = json.loads((unfinished / "run.json").read_text())
                (unfinished / "run.json").write_text(json.dumps({**manifest, "state": "finished"}))
            ended = cli(*command)
            assert ended.code == 2, (content, command, ended.err)
            assert "recipe.yaml" in ended.err
            assert "Traceback" not in ended.err
            assert "another recipe" not in ended.err
            if command[2] != "runs/tune/recipe.yaml":
                assert "damaged or was edited" in ended.err
                assert "--fresh" in ended.err
        (unfinished / "run.json").write_text(json.dumps({**manifest, "state": "running"}))
    path.write_bytes(whole)
    assert cli("tune", "-r", "runs/tune/recipe.yaml").code == 0


def test_other_folders_among_the_checkpoints_are_passed_over(unfinished: Path, cli: Cli) -> None:
    for name in ("²", "٣", "notes"):
        (unfinished / "checkpoints" / name).mkdir()
    ended = cli("tune", "-r", "tune.yaml")
    assert ended.code == 0, ended.err
    assert "resuming after step 12 of 12" in ended.err


def test_a_checkpoint_passed_over_is_told_to_those_who_want_quiet_too(
    unfinished: Path, cli: Cli
) -> None:
    newest = max((unfinished / "checkpoints").iterdir())
    (newest / "rng.safetensors").unlink()
    ended = cli("tune", "-r", "tune.yaml", "-q")
    assert ended.code == 0, ended.err
    (said,) = ended.err.splitlines()
    assert str(newest.relative_to(newest.parents[3])) in said
    assert "rng.safetensors is missing" in said


def test_a_lock_on_a_folder_that_was_moved_aside_holds_nothing(
    unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real, moved = runs.Run(unfinished), fcntl.flock, unfinished.with_name("moved")

    def slow(file: Any, how: int) -> None:
        """Another start with --fresh comes between the opening of the lock and the lock."""
        if not moved.exists():
            unfinished.replace(moved)
            shutil.copytree(moved, unfinished)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with pytest.raises(errors.EnvironmentRefusal, match="moved aside"), runs.locked(run):
        pass
    with runs.locked(run):
        pass
    shutil.rmtree(unfinished)
    with pytest.raises(errors.EnvironmentRefusal, match="moved aside"), runs.locked(run):
        pass


def test_a_disk_without_locks_is_told_as_such(
    unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(file: Any, how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", none)
    run = runs.Run(unfinished)
    with pytest.raises(errors.EnvironmentRefusal, match="locks no files"), runs.locked(run):
        pass


@pytest.fixture
def begun(tmp_path: Path, tiny_model_dir: Path, cli: Cli) -> Path:
    """A run with all its steps, of rows, held-out rows and a template in files of their own."""
    prepare(tmp_path, tiny_model_dir)
    assert cli("tune", "-r", "run.yaml").code == 0
    path = tmp_path / "runs/run/run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "state": "interrupted"}))
    return tmp_path


def test_what_training_and_its_held_out_losses_follow_from_is_the_same_to_the_end(
    begun: Path, cli: Cli
) -> None:
    for name, old, new, said in (
        ("ask.yaml", "Where is {{ who }}?", "Where was {{ who }}?", "rows.jsonl: its template ask"),
        ("ask.yaml", "{{ where }}", "{{ where }}!", "rows.jsonl: its template ask"),
        ("rows.jsonl", "cat 7", "dog 7", "rows.jsonl: its rows"),
        ("held.jsonl", "cat 203", "dog 203", "held.jsonl: its rows"),
    ):
        path = begun / name
        whole = path.read_text()
        assert old in whole
        path.write_text(whole.replace(old, new))
        kept = {each: each.read_bytes() for each in (begun / "runs/run/checkpoints").glob("*/*")}
        ended = cli("tune", "-r", "run.yaml")
        assert ended.code == 2, (name, ended.err)
        assert re.search(
            rf"{said} (has|have) changed since this run began \([0-9a-f]{{12}} then, "
            r"[0-9a-f]{12} now",
            ended.err,
        ), ended.err
        assert {each: each.read_bytes() for each in kept} == kept
        path.write_text(whole)
    # What decides no row may change: a comment, or what is scored in the end.
    text = (begun / "ask.yaml").read_text()
    (begun / "ask.yaml").write_text("# mine\n" + text.replace("[exact_match]", "[squad]"))
    assert cli("tune", "-r", "run.yaml").code == 0


def test_what_a_run_cannot_go_on_with_is_refused_whatever_is_allowed(
    unfinished: Path, cli: Cli
) -> None:
    def changed(key: str, value: object, *more: str) -> str:
        given = ("-s", f"{key}={value}", *more, "--allow-change", key)
        ended = cli("tune", "-r", "tune.yaml", *given)
        assert ended.code == 2, ended.err
        return str(ended.err)

    recipe = (unfinished / "recipe.yaml").read_bytes()
    assert "lora_alpha: 8 there, 16 now), which cannot go on" in changed("adapter.r", 8)
    assert "has 12 steps already, and the recipe asks for 5" in changed("training.max_steps", 5)
    assert (unfinished / "recipe.yaml").read_bytes() == recipe
    assert cli("tune", "-r", "tune.yaml").code == 0
    assert "holds a finished run of another recipe" in changed("training.max_steps", 20)
