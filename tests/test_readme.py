"""The README: its commands run, its recipe and template load, its targets are there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from test_commands import world

from itune import recipes, templates

README = (ROOT / "README.md").read_text(encoding="utf-8")
SPANS = re.findall(r"`([^`\n]+)`", README)
BLOCKS = dict(re.findall(r"```(\w+)\n(.*?)```", README, re.S))
COMMANDS = sorted({s for s in SPANS if s.startswith(("itune ", "accelerate launch"))})
OPTIONS = [span for span in SPANS if span.startswith("--")]
STARTS = ("pretrain", "tune", "eval", "generate", "accelerate")

SHORT = ["-s", "training.max_steps=2", "-s", "training.heldout_rows=0"]


def rows(path: Path, number: int) -> None:
    import datasets

    data = {"text": [f"It was number {k}." for k in range(number)], "label": [0, 1] * (number // 2)}
    datasets.Dataset.from_dict(data).to_parquet(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """Where the commands run: a recipe called FILE, and the files of one's own that are named."""
    made = tmp_path_factory.mktemp("readme")
    world(made)
    text = (made / "tune.yaml").read_text().replace("runs/base", str(tiny_model_dir))
    (made / "FILE").write_text(text)
    (made / "prompts").mkdir()
    (template,) = re.findall(r'```yaml title="prompts/verdict.yaml"\n(.*?)```', README, re.S)
    (made / "prompts/verdict.yaml").write_text(template)
    (made / "unlabelled.csv").write_text("review\nThe bar was not at all perfect.\n")
    rows(made / "train.parquet", 60)
    rows(made / "test.parquet", 20)
    return made


def run(line: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    program = {
        "itune": [sys.executable, "-m", "itune"],
        "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"],
    }[line[0]]
    return subprocess.run(
        [*program, *line[1:]], cwd=folder, env=os.environ, capture_output=True, text=True,
        timeout=240, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.slow
def test_every_command_of_the_readme_runs(
    folder: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    said = [shlex.split(command) for command in COMMANDS]
    lines = sorted(said, key=lambda line: STARTS.index(line[0 if line[0] != "itune" else 1]))
    assert {line[1] for line in lines if line[0] == "itune"} == set(STARTS[:4])
    for number, line in enumerate(lines):
        trains = {"pretrain", "tune"} & set(line)
        extra = [*SHORT, "-o", f"runs/{number}"] if trains else []
        if "pretrain" in line:
            extra += ["-s", "data={train: {path: text.jsonl}}"]
        if line[0] == "itune" and "--processes" not in line:
            ended = cli(*line[1:], *extra)
            assert ended.code == 0, f"{shlex.join(line)}\n{ended.err}"
        else:
            apart = run([*line, *extra], folder)
            assert apart.returncode == 0, f"{shlex.join(line)}\n{apart.stderr}"


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_the_readme_is_taken(
    option: str, folder: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
    tiny_model_dir: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    given = shlex.split(option)
    if given[0] == "--against":
        if not Path("runs").is_dir():  # where the test that trains runs in another process
            trained = cli("tune", "-r", "FILE", *SHORT, "-o", "runs/own")
            assert trained.code == 0, trained.err
        given = ["eval", *given, "--limit", "4"]
    elif given[0] == "--set" and any("parquet" in part for part in given):
        given = [
            "tune",
            "-r",
            "imdb",
            *given,
            "-s",
            f"model.name={tiny_model_dir}",
            "--preview",
            "1",
        ]
    else:
        given = ["tune", "-r", "FILE", *given]
        given += [] if {"--preview", "--plan"} & set(given) else ["--preview", "1"]
    ended = cli(*given)
    assert ended.code == 0, ended.err


def test_the_readmes_recipe_and_template_are_good(tmp_path: Path) -> None:
    shown = re.findall(r"```yaml\n(.*?)```", README, re.S)
    assert len(shown) == 2
    assert recipes.loads(shown[0], command="tune").adapter is not None
    (tmp_path / "shown.yaml").write_text(shown[1])
    assert templates.load("./shown.yaml").answer({"label": 1}) == "positive"


def test_the_readmes_make_targets_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    wanted = re.findall(r"^make (\w+)", BLOCKS["sh"], re.M)
    assert {"quickstart", "test"} <= set(wanted)
    for target in wanted:
        assert re.search(rf"^{target}:.*## ", makefile, re.M), target
    ci = (ROOT / ".ci" / "run").read_text()
    assert all(re.search(rf"^make {target}$", ci, re.M) for target in wanted)


def test_what_the_readme_says_is_scored_is_what_the_quick_start_scores() -> None:
    quick = recipes.load("quickstart/tune", command="eval")
    for source in quick.data.eval:
        template = templates.load(str(source.template))
        assert template.name.removeprefix("quickstart-") in README
    assert json.dumps(quick.training.seed) in README
