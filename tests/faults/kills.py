"""Kills real runs at random moments, resumes them, and compares them with one never killed.

    python tests/faults/kills.py --kills 200 [--seed 7] [--recipe NAME ...] [--naive]

Each run is a process of its own, forked once the libraries are imported, so that a kill costs less
than a second. A checkpoint is written after every step, and kills are aimed at saves whenever too
few have landed inside one. Prints a line a recipe; exit code 1 when a resumed run differed in its
log or its weights, or needed a human; 3 when fewer than a quarter of the kills landed inside a
save, which is no evidence. `--naive` shows that the kills find what they are for: checkpoints are
then saved as many programs save them, and the code must be 1.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FEWER = ["-s", "training.max_steps=10"]
LEAST = 0.25  # of the kills inside a save, or they are no evidence
AIM = 0.4  # while fewer are, kills wait for the next save
NO_EVIDENCE = 3
LAST = "state.json"  # of a checkpoint's files but the manifest
LORA = "adapter={peft_type: lora, r: 4, target_modules: all-linear, lora_dropout: 0.1}"
MIXTURE = (
    "data.train=[{path: rows.jsonl, template: ./ask.yaml, weight: 1.5}, "
    "{path: more.jsonl, template: ./ask.yaml, weight: 0.5}]"
)
RECIPES = {
    "lora": ("tune", ["-s", LORA]),
    "full": ("tune", []),
    "accumulated": ("tune", ["-s", LORA, "-s", "training.micro_batch_tokens=70"]),
    "padded": ("tune", ["-s", "training.packing=false"]),
    "mixture": ("tune", ["-s", MIXTURE]),
    "pretrain": ("pretrain", ["-s", "data.train=[{path: text.jsonl}]"]),
    "stream": (
        "pretrain",
        ["-s", "data.train=[{path: text.jsonl, streaming: true, limit: 30}]"],
    ),
}
TUNE = """
model: {name: model}
data:
  train: [{path: rows.jsonl, template: ./ask.yaml}]
  eval: {path: held.jsonl, template: ./ask.yaml}
training:
  {max_steps: 12, tokens_per_step: 150, max_length: 128, save_steps: 1, eval_steps: 5}
"""
ASK = """
task: qa
prompts: ["Where is {{ who }}?", "{{ who }} is where?"]
response: "{{ where }}"
metrics: [exact_match]
"""


def prepare(folder: Path, model: Path) -> None:
    """Data, template, recipe and model of the runs."""
    for name, first, n in (("rows", 0, 60), ("more", 100, 40), ("held", 200, 8)):
        rows = [{"who": f"cat {first + i}", "where": f"in room {i % 7}"} for i in range(n)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"text": f"Cat {i} sleeps in room {i % 7}, and so on. " * 3} for i in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (folder / "ask.yaml").write_text(ASK)
    (folder / "run.yaml").write_text(TUNE)
    shutil.copytree(model, folder / "model")


def save_naively() -> None:
    """Have checkpoints written straight into the folder of their final name, without a manifest,
    at the pace of a model that is not tiny; and the highest step taken for whole."""
    from itune import checkpoints, storage

    whole_save = checkpoints.save

    def save(folder: Path, state: Any, *, run_id: str, keep: int, **_: Any) -> Path:
        final = folder / f"{state.step:06d}"
        final.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=".") as beside:
            whole = whole_save(Path(beside), state, run_id=run_id, keep=1)
            for path in [*sorted(whole.glob("*.safetensors")), whole / LAST]:
                time.sleep(0.01)
                shutil.copy(path, final)
        for old in storage.numbered(folder)[keep:]:
            shutil.rmtree(old)
        return final

    def latest(folder: Path, run_id: str, _: Any = None) -> tuple[Path | None, list[str]]:
        return next(iter(storage.numbered(folder)), None), []

    checkpoints.save, checkpoints.latest = save, latest
    checkpoints.fault = lambda *_: None


def begun(run: Path) -> dict[Path, int]:
    """Checkpoints begun and not whole, staged or naive ones without their last file, each with
    when it was last changed: what an earlier kill left is not what this process is writing."""
    folder, found = run / "checkpoints", {}
    naive = (path for path in folder.glob("[0-9]*") if not (path / LAST).exists())
    for path in (*folder.glob(".staged*"), *naive):
        with contextlib.suppress(FileNotFoundError):  # published or removed just now
            found[path] = path.stat().st_mtime_ns
    return found


def saving(run: Path, left: dict[Path, int]) -> bool:
    """Whether a checkpoint is being written; `left`: what was begun before the process was."""
    return any(left.get(path) != changed for path, changed in begun(run).items())


def start(arguments: list[str], disk: Any = None) -> int:
    """A forked process that runs itune, on another disk where one is given; returns its number."""
    child = os.fork()
    if child:
        return child
    if disk is not None:
        from itune import storage

        storage.DISK = disk
    os.setsid()
    quiet = os.open(os.devnull, os.O_RDWR)
    errors = os.open("stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream, target in ((0, quiet), (1, quiet), (2, errors)):
        os.dup2(target, stream)
    sys.stderr = os.fdopen(2, "w", closefd=False)  # whatever it was, as under a test
    from itune.cli import main

    sys.argv = ["itune", *arguments]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def outcome(run: Path) -> dict[str, object]:
    """What must not depend on kills: every line of the log but its time, and the weights."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    weights = next((run / "model").glob("*model.safetensors"))
    return {
        "log": [{k: v for k, v in line.items() if k != "seconds"} for line in lines],
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "state": json.loads((run / "run.json").read_text())["state"],
    }


@dataclass
class Round:
    """What a recipe's kills came to."""

    kills: int = 0
    in_a_save: int = 0
    runs: int = 0
    differing: int = 0
    stuck: int = 0

    @property
    def share(self) -> float:
        """Of the kills, those that landed inside a save."""
        return self.in_a_save / max(1, self.kills)

    @property
    def code(self) -> int:
        """The exit code."""
        if self.differing or self.stuck:
            return 1
        return NO_EVIDENCE if self.share < LEAST else 0


def kill_at_random(recipe: str, kills: int, draw: random.Random, straight_s: float) -> Round:
    """Runs killed and resumed until `kills` have been dealt, each then compared."""
    command, options = RECIPES[recipe]
    wanted = outcome(Path("straight"))
    done = Round()
    while done.kills < kills:
        run = Path(f"killed-{done.runs}")
        line = [command, "-r", "run.yaml", *options, *FEWER, "-o", str(run), "-q"]
        while True:
            fresh, left, since = not run.exists(), begun(run), time.monotonic()
            child = start(line)
            deadline = since + draw.uniform(0.05, 0.9) * straight_s
            aimed, ended = done.in_a_save <= AIM * done.kills, 0
            while not ended and (
                done.kills >= kills or not _due(child, run, left, deadline, aimed)
            ):
                ended, status = os.waitpid(child, os.WNOHANG)
                time.sleep(0.0005)
            if ended:
                if fresh:  # faster than the first, whose rows no cache had
                    straight_s = min(straight_s, time.monotonic() - since)
                code = os.waitstatus_to_exitcode(status)
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            done.kills += 1
            done.in_a_save += saving(run, left)
        done.runs += 1
        done.stuck += code != 0
        done.differing += code == 0 and outcome(run) != wanted
        if code == 0:
            shutil.rmtree(run)
    return done


def _due(child: int, run: Path, left: dict[Path, int], deadline: float, aimed: bool) -> bool:
    """Whether the moment to kill has come; an aimed kill waits until a save is surely under way."""
    if time.monotonic() < deadline or not aimed:
        return time.monotonic() >= deadline
    if not saving(run, left):
        return False
    time.sleep(random.uniform(0, 0.004))  # anywhere in the save
    os.kill(child, signal.SIGSTOP)  # or the save would be over when the kill arrives
    while _state(child) not in "TtZX":
        time.sleep(0.0002)
    if saving(run, left):
        return True
    os.kill(child, signal.SIGCONT)
    return False


def _state(child: int) -> str:
    """The letter that the system has for what a process does; it may have several threads."""
    return Path(f"/proc/{child}/stat").read_text().rpartition(") ")[2][0]


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def deal(recipe: str, kills: int, draw: random.Random, model: Path) -> Round:
    """A recipe's kills, in a folder of their own; prints a line of what came of them."""
    with tempfile.TemporaryDirectory(prefix=f"itune-kills-{recipe}-") as temporary:
        prepare(Path(temporary), model)
        with inside(Path(temporary)):
            since = time.monotonic()
            command, options = RECIPES[recipe]
            child = start([command, "-r", "run.yaml", *options, *FEWER, "-o", "straight", "-q"])
            _, status = os.waitpid(child, 0)
            if status:
                sys.exit(Path("stderr.txt").read_text())
            done = kill_at_random(recipe, kills, draw, time.monotonic() - since)
            said = Path("stderr.txt").read_text() if done.stuck else ""
    print(
        f"{recipe}: {done.kills} kills, {done.in_a_save} inside a save, {done.runs} runs, "
        f"{done.differing} differing, {done.stuck} stuck {said[-400:]}",
        flush=True,
    )
    return done


def tiny_model(folder: Path) -> Path:
    """The tests' own tiny model, made anew."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from conftest import saved

    return saved(folder, "causal")


def main() -> int:
    """Reads the command line, deals the kills, prints what came of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="in all, over the recipes")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--recipe", action="append", choices=sorted(RECIPES))
    parser.add_argument("--model", type=Path, help="folder of a tiny model; made when not given")
    parser.add_argument("--naive", action="store_true", help="save as many programs do")
    given = parser.parse_args()
    seed = given.seed if given.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed {seed}", flush=True)
    import peft  # noqa: F401 - imported before forking, as are torch and the rest
    import transformers  # noqa: F401

    from itune import commands, decoding, training  # noqa: F401

    if given.naive:
        save_naively()
    draw, total = random.Random(seed), Round()
    names = given.recipe or sorted(RECIPES)
    with tempfile.TemporaryDirectory(prefix="itune-kills-model-") as folder:
        model = given.model.resolve() if given.model else tiny_model(Path(folder))
        for number, recipe in enumerate(names):
            share = (number + 1) * given.kills // len(names) - number * given.kills // len(names)
            done = deal(recipe, share, draw, model)
            for field in vars(total):
                setattr(total, field, getattr(total, field) + getattr(done, field))
    print(
        f"all: {total.kills} kills, {total.share:.0%} inside a save, {total.runs} runs, "
        f"{total.differing} differing, {total.stuck} stuck",
        flush=True,
    )
    if total.code == NO_EVIDENCE:
        print("fewer than a quarter of the kills landed inside a save: this is no evidence")
    return total.code


if __name__ == "__main__":
    sys.exit(main())
