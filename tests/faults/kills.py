"""Kills real runs at random moments, resumes them, and compares them with one never killed.

    python tests/faults/kills.py --kills 200 [--seed 7] [--recipe NAME ...]

Each run is a process of its own, forked once the libraries are imported, so that a kill costs less
than a second. A checkpoint is written after every step, so that many kills land inside a save; a
round in which fewer than a quarter do is no evidence, and says so. Prints a line a recipe; exit
code 1 when a resumed run differed in its log or its weights, or needed a human.
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


def start(arguments: list[str]) -> int:
    """A forked process that runs itune; returns its number."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    quiet = os.open(os.devnull, os.O_RDWR)
    errors = os.open("stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream, target in ((0, quiet), (1, quiet), (2, errors)):
        os.dup2(target, stream)
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


def kill_at_random(recipe: str, kills: int, draw: random.Random, straight_s: float) -> Round:
    """Runs killed and resumed until `kills` have been dealt, each then compared."""
    command, options = RECIPES[recipe]
    wanted = outcome(Path("straight"))
    done = Round()
    while done.kills < kills:
        run = Path(f"killed-{done.runs}")
        line = [command, "-r", "run.yaml", *options, "-o", str(run), "-q"]
        while True:
            child = start(line)
            # Later than it takes to begin, or nothing would ever be saved.
            deadline = time.monotonic() + draw.uniform(0.2, 0.9) * straight_s
            aimed, ended = draw.random() < 0.4, 0
            while not ended and (done.kills >= kills or not _due(run, deadline, aimed)):
                ended, status = os.waitpid(child, os.WNOHANG)
                time.sleep(0.0005)
            if aimed:
                time.sleep(draw.uniform(0, 0.004))
            if ended:
                code = os.waitstatus_to_exitcode(status)
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            done.kills += 1
            done.in_a_save += bool(list(run.glob("checkpoints/.staged*")))
        done.runs += 1
        done.stuck += code != 0
        done.differing += code == 0 and outcome(run) != wanted
        if code == 0:
            shutil.rmtree(run)
    return done


def _due(run: Path, deadline: float, aimed: bool) -> bool:
    """Whether the moment to kill has come; an aimed kill waits for the next save."""
    late = time.monotonic() >= deadline
    return late and (not aimed or bool(list(run.glob("checkpoints/.staged*"))))


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def main() -> int:
    """Reads the command line, deals the kills, prints what came of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="in all, over the recipes")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--recipe", action="append", choices=sorted(RECIPES))
    parser.add_argument("--model", type=Path, required=True, help="folder of a tiny model")
    given = parser.parse_args()
    seed = given.seed if given.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed {seed}", flush=True)
    import peft  # noqa: F401 - imported before forking, as are torch and the rest
    import transformers  # noqa: F401

    from itune import commands, decoding, training  # noqa: F401

    draw, failed, total = random.Random(seed), False, Round()
    names = given.recipe or sorted(RECIPES)
    for number, recipe in enumerate(names):
        share = (number + 1) * given.kills // len(names) - number * given.kills // len(names)
        with tempfile.TemporaryDirectory(prefix=f"itune-kills-{recipe}-") as temporary:
            prepare(Path(temporary), given.model.resolve())
            with inside(Path(temporary)):
                begun = time.monotonic()
                command, options = RECIPES[recipe]
                child = start([command, "-r", "run.yaml", *options, "-o", "straight", "-q"])
                _, status = os.waitpid(child, 0)
                if status:
                    print(Path("stderr.txt").read_text())
                    return 1
                done = kill_at_random(recipe, share, draw, time.monotonic() - begun)
                said = Path("stderr.txt").read_text() if done.stuck else ""
        print(
            f"{recipe}: {done.kills} kills, {done.in_a_save} inside a save, {done.runs} runs, "
            f"{done.differing} differing, {done.stuck} stuck {said[-400:]}",
            flush=True,
        )
        for field in vars(total):
            setattr(total, field, getattr(total, field) + getattr(done, field))
        failed |= bool(done.differing or done.stuck)
    share_in = total.in_a_save / max(1, total.kills)
    print(f"all: {total.kills} kills, {share_in:.0%} inside a save, {total.runs} runs", flush=True)
    if share_in < 0.25:
        print("fewer than a quarter of the kills landed inside a save: this is no evidence")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
