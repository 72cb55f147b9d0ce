"""The folder of a run: its state, its lock, its log, and which run is the newest."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import math
import os
import platform
import re
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import itune
from itune import contrasts, errors, recipes, storage

ROOT = Path("runs")
# What decides which weights there are: a run never goes on with another one.
FIXED = ("adapter", "quantization", "model.from_scratch", "model.family")
LOCK = ".lock"
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "evaluate", "tokenizers")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of ours. Raises RunError when it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise errors.RunError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise errors.RunError(f"{path}: expected an object, found a {type(value).__name__}.")
    return value


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON in which a number that is not finite is its name, as strict readers need.

    What is not to be seen is escaped, as controls of a terminal are, which JSON lets stand.
    """
    text = json.dumps(_strict(value), ensure_ascii=False, indent=indent, allow_nan=False)
    return text if text.isprintable() else re.sub(r"[^ -~\n]", _escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return found[0] if contrasts.seen(found[0]) else json.dumps(found[0])[1:-1]


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


@dataclass(frozen=True)
class Run:
    """A run's folder, whether it is being made or only read."""

    dir: Path

    @property
    def manifest(self) -> dict[str, Any]:
        """What run.json says: state, versions, seed, hardware, tokens, seconds and more."""
        return read_json(self.dir / "run.json")

    @property
    def recipe(self) -> recipes.Recipe:
        """The resolved recipe that the run was made by. Raises RunError as `recipe_path` does."""
        return recipes.loads((path := self.recipe_path()).read_text(encoding="utf-8"), str(path))

    def recipe_path(self) -> Path:
        """Where the run's recipe stands. Raises RunError when it is gone, torn or edited."""
        path = self.dir / "recipe.yaml"
        fault = "is missing from this run"
        if path.is_file():
            if storage.intact(path.read_bytes()) or not self.manifest.get("sealed"):
                return path
            fault = "is damaged or was edited, the sha256 on its last line is not that of the rest"
        raise errors.RunError(
            f"{path}: {fault}. Put it back from a copy, or move the run aside with --fresh."
        )

    @property
    def model_dir(self) -> Path:
        """Where the result lies: adapter or weights, tokenizer, generation config."""
        return self.dir / "model"

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.dir / "checkpoints"

    @property
    def untried(self) -> bool:
        """Whether a run is there that took no step: nothing would be lost with it."""
        tried = any(self.checkpoints.glob("[!.]*")) or bool(self.log_lines())
        made = (self.dir / "run.json").is_file()
        return made and not tried and self.manifest["state"] != "finished"

    def update(self, **fields: Any) -> None:
        """Set fields of run.json."""
        storage.write(self.dir / "run.json", to_json({**self.manifest, **fields}, indent=2) + "\n")

    # --- log ---

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to log.jsonl."""
        storage.DISK.append(self.dir / "log.jsonl", to_json(record) + "\n")

    def log_lines(self) -> list[dict[str, Any]]:
        """The lines of log.jsonl; what a kill tore at its end is left out.

        Raises RunError for a line that is damaged before others that are not.
        """
        path = self.dir / "log.jsonl"
        if not path.is_file():
            return []
        found = [_record(line) for line in path.read_bytes().split(b"\n")[:-1]]
        while found and found[-1] is None:
            found.pop()
        whole = [line for line in found if line is not None]
        if len(whole) < len(found):
            raise errors.RunError(
                f"{path}: line {found.index(None) + 1} is damaged. Put the file back from a copy, "
                "or move the run aside with --fresh."
            )
        return whole

    def cut_log(self, step: int) -> None:
        """Take the lines after a step out: they were logged, then lost with a kill.

        Raises RunError where a step up to it has no line, and leaves the file as it is.
        """
        kept = [line for line in self.log_lines() if line["step"] <= step]
        for number, line in enumerate([*kept, None][:step], 1):
            if line is None or line["step"] != number:
                raise errors.RunError(
                    f"{self.dir / 'log.jsonl'}: step {number} is missing, and the checkpoint is of "
                    f"step {step}. Put the file back from a copy, or move the run aside with "
                    "--fresh."
                )
        storage.write(self.dir / "log.jsonl", "".join(to_json(line) + "\n" for line in kept))


def _record(line: bytes) -> dict[str, Any] | None:
    """A line of the log, or None where it is none."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None


# --- opening ------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(
    recipe: recipes.Recipe,
    command: str,
    *,
    fresh: bool = False,
    allowed: Sequence[str] = (),
    launch: str = "",
) -> Iterator[tuple[Run, str]]:
    """The folder for a recipe's run, and its state: `new`, `unfinished` or `finished`.

    An unfinished run of the same recipe is resumed, a finished one left alone. `fresh` moves
    whatever run is there aside. The folder is held alone until the block ends, but for a finished
    run, of which no byte is touched. `launch` marks the run as opened, see `joined`. Raises
    RunError for a foreign folder or another recipe's run, with what differs (`allowed` names keys
    that may); EnvironmentRefusal when another process holds the folder.
    """
    run = Run(recipe.output.dir)
    fresh = refuse(run, recipe, command, fresh=fresh, allowed=allowed)
    if not fresh and (run.dir / "run.json").is_file() and run.manifest["state"] == "finished":
        yield run, "finished"
        return
    if fresh and (run.dir / "run.json").is_file():
        with locked(run):
            run.dir.replace(_aside(run.dir))
    _make(run)
    with locked(run):
        state = "unfinished" if (run.dir / "run.json").is_file() else "new"
        if state == "new":
            _create(run, recipe, command)
        else:  # perhaps opened by another since it was looked at
            _refuse_another(run, recipe, command, allowed)
            state = "finished" if run.manifest["state"] == "finished" else state
        if state == "unfinished":
            _write_recipe(run, recipe)
        if state != "finished":
            run.update(launch=launch)
        yield run, state


def refuse(
    run: Run, recipe: recipes.Recipe, command: str, *, fresh: bool, allowed: Sequence[str]
) -> bool:
    """Raise RunError where a recipe cannot be run in a folder; touches nothing.

    Returns whether what is there would be moved aside.
    """
    _refuse_foreign(run)
    if not fresh and (run.dir / "run.json").is_file():
        _refuse_damaged(run)
    # What failed before its first step, in its data say, is in nobody's way once it is mended.
    fresh = fresh or (run.untried and not _same(run, recipe, command))
    if not fresh and (run.dir / "run.json").is_file():
        _refuse_another(run, recipe, command, allowed)
    return fresh


def _refuse_damaged(run: Run) -> None:
    """Refuse a run.json without what every run has in it."""
    manifest = run.manifest
    for name in ("state", "command", "id"):
        if not isinstance(manifest.get(name), str):
            raise errors.RunError(
                f"{run.dir / 'run.json'}: is damaged, it has no {name}. Put it back from a copy, "
                "or move the run aside with --fresh."
            )


def _same(run: Run, recipe: recipes.Recipe, command: str) -> bool:
    same = run.manifest.get("command") == command
    return same and recipes.digest(run.recipe) == recipes.digest(recipe)


def _refuse_foreign(run: Run) -> None:
    """Refuse a folder that holds something, but nothing of ours."""
    if run.dir.exists() and not run.dir.is_dir():
        raise errors.RunError(f"{run.dir}: a file. Choose a folder with --output.")
    ours = ("run.json", LOCK)
    held = [path.name for path in run.dir.iterdir()] if run.dir.is_dir() else []
    if held and not any(name in ours for name in held):
        raise errors.RunError(
            f"{run.dir}: a folder with other files in it, not a run. Choose another with --output."
        )


def _refuse_another(run: Run, recipe: recipes.Recipe, command: str, allowed: Sequence[str]) -> None:
    made_by = run.manifest.get("command")
    if made_by != command:
        raise errors.RunError(
            f"{run.dir}: holds a run of `itune {made_by}`. Choose another folder "
            "with --output, or move it aside with --fresh."
        )
    _refuse_changes(run, recipe, allowed)


def _refuse_changes(run: Run, recipe: recipes.Recipe, allowed: Sequence[str]) -> None:
    if recipes.digest(run.recipe) == recipes.digest(recipe):
        return
    given = [change for change in recipes.diff(run.recipe, recipe) if recipes.decides(change[0])]
    changes = [change for change in given if change[0] not in allowed]
    finished = run.manifest["state"] == "finished"
    # Whatever is allowed: its weights would have no place in what is trained now.
    if fixed := [each for each in given if finished or each[0].startswith(FIXED)]:
        kind = "a finished run" if finished else "a run"
        raise errors.RunError(
            f"{run.dir}: holds {kind} of another recipe ({_told(fixed)}), which cannot go on with "
            "that. Choose another folder with --output, or move that run aside with --fresh."
        )
    done = max((int(path.name) for path in storage.numbered(run.checkpoints)), default=0)
    if 0 < recipe.training.max_steps < done:
        raise errors.RunError(
            f"{run.dir}: has {done:,} steps already, and the recipe asks for "
            f"{recipe.training.max_steps:,}. Ask for as many at least, or begin anew with --fresh."
        )
    if changes:
        raise errors.RunError(
            f"{run.dir}: holds a run of another recipe ({_told(changes)}). Choose another folder "
            "with --output, move that run aside with --fresh, or go on with "
            f"{' '.join(f'--allow-change {key}' for key, *_ in changes[:5])}."
        )


def _told(changes: Sequence[tuple[str, Any, Any]]) -> str:
    return "; ".join(f"{key}: {old!r} there, {new!r} now" for key, old, new in changes[:5])


def _aside(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    return aside


def _make(run: Run) -> None:
    try:
        run.dir.mkdir(parents=True, exist_ok=True)
        (run.dir / LOCK).touch()
    except OSError as error:
        raise errors.EnvironmentRefusal(
            f"{run.dir}: cannot be made: {error.strerror}. Choose another folder with --output."
        ) from error


def _write_recipe(run: Run, recipe: recipes.Recipe) -> None:
    storage.write(run.dir / "recipe.yaml", storage.sealed(recipes.dump(recipe)))


def _create(run: Run, recipe: recipes.Recipe, command: str) -> None:
    _write_recipe(run, recipe)
    storage.write(
        run.dir / "run.json",
        to_json(
            {
                "id": uuid.uuid4().hex,
                "command": command,
                "state": "running",
                "created": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
                "itune": itune.__version__,
                "versions": {name: metadata.version(name) for name in LIBRARIES},
                "python": platform.python_version(),
                "hardware": {"machine": platform.machine(), "cores": os.cpu_count()},
                "recipe_digest": recipes.digest(recipe),
                "sealed": True,  # recipe.yaml tells whether it is whole; early runs have none such
                "seed": recipe.training.seed,
            },
            indent=2,
        )
        + "\n",
    )


@contextlib.contextmanager
def locked(run: Run) -> Iterator[None]:
    """Hold a run's folder alone. Raises EnvironmentRefusal naming who holds it."""
    import fcntl

    moved = errors.EnvironmentRefusal(
        f"{run.dir}: was moved aside by another process just now. Run the same command again."
    )
    path = run.dir / LOCK
    try:
        file = path.open("a+", encoding="utf-8")
    except FileNotFoundError as error:
        raise moved from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise errors.EnvironmentRefusal(
                    f"{run.dir}: its disk locks no files ({error.strerror}), so two runs could "
                    "write there at once. Choose another with --output, or have it mounted with "
                    "locks (Lustre: -o flock)."
                ) from error
            file.seek(0)
            raise errors.EnvironmentRefusal(
                f"{run.dir}: in use by {file.read().strip() or 'another process'}. Wait for it, "
                "or choose another folder with --output."
            ) from error
        held = os.fstat(file.fileno())
        if not path.is_file() or not os.path.samestat(held, path.stat()):
            raise moved
        file.truncate(0)
        since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}")
        file.flush()
        yield


def joined(run: Run, launch: str, *, fresh: bool, seconds: float = 120.0) -> str:
    """The state of the run that the first process of this launch opens, once it has.

    Raises RunError when it never does.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (run.dir / "run.json").is_file():
            manifest = run.manifest
            if manifest["state"] == "finished" and not fresh:
                return "finished"
            if manifest.get("launch") == launch:
                return "unfinished"
        time.sleep(0.05)
    raise errors.RunError(f"{run.dir}: was not opened by the first process.")


# --- finding ------------------------------------------------------------------------------


def find(folder: Path) -> Run:
    """A finished run in a folder. Raises RunError when there is none."""
    if not (folder / "run.json").is_file():
        raise errors.RunError(
            f"{folder}: not a run, it holds no run.json. Known runs: "
            f"{', '.join(str(run.dir) for run in known()) or 'none'}."
        )
    run = Run(folder)
    _refuse_damaged(run)
    if run.manifest["state"] != "finished":
        raise errors.RunError(
            f"{folder}: this run is {run.manifest['state']}, not finished. "
            f"Finish it with `itune {run.manifest['command']} --recipe {folder}/recipe.yaml`."
        )
    return run


def known(root: Path = ROOT) -> list[Run]:
    """Every finished run under `root`, the newest last."""
    finished = []
    for path in sorted(root.glob("**/run.json")) if root.is_dir() else []:
        try:
            manifest = read_json(path)
        except errors.RunError:
            continue  # damaged, so not finished; it is told of when it is named
        if manifest.get("state") == "finished":
            finished.append((str(manifest.get("finished", "")), Run(path.parent)))
    return [run for _, run in sorted(finished, key=lambda pair: (pair[0], str(pair[1].dir)))]


def newest(root: Path = ROOT) -> Run:
    """The run finished last under `root`. Raises RunError when there is none."""
    runs = known(root)
    if not runs:
        raise errors.RunError(
            f"{root}/: no finished run here, in {Path.cwd()}. Run `itune tune` first, or name one "
            "with --run DIR."
        )
    return runs[-1]
