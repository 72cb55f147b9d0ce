"""The hub of the tests: it answers what clients ask of the real one, and `itune` works with it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Itune

Hub = tuple[Path, dict[str, "str | None"]]

CLIENT = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from datasets import load_dataset
tokenizer = AutoTokenizer.from_pretrained("tiny/llama")
model = AutoModelForCausalLM.from_pretrained("tiny/llama", revision="main")
rows = load_dataset("tiny/reviews", split="train[:50%]")
try:
    AutoTokenizer.from_pretrained("tiny/nobody")
    missing = ""
except OSError as error:
    missing = type(error).__name__
print(json.dumps({
    "parameters": model.num_parameters(),
    "tokens": tokenizer("the cat").input_ids,
    "rows": rows.to_list(),
    "missing": missing,
}))
"""


@pytest.fixture
def filled(hub: Hub, tiny_model_dir: Path) -> Hub:
    """The hub with a model `tiny/llama` and a dataset `tiny/reviews` of 8 rows in two splits."""
    root, env = hub
    shutil.copytree(tiny_model_dir, root / "models" / "tiny" / "llama")
    reviews = root / "datasets" / "tiny" / "reviews"
    reviews.mkdir(parents=True)
    lines = [json.dumps({"text": f"film {i} was fine", "label": i % 2}) for i in range(8)]
    for split in ("train", "test"):
        (reviews / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root, env


@pytest.mark.slow
def test_the_clients_find_models_data_and_what_is_not_there(filled: Hub) -> None:
    _, env = filled
    changed = {**os.environ, **env}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT],
        env={name: value for name, value in changed.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["parameters"] > 100_000
    assert said["tokens"]
    assert said["rows"] == [{"text": f"film {i} was fine", "label": i % 2} for i in range(4)]
    assert said["missing"] == "OSError"


READER = """
import json, sys
from itune import errors, recipes, sources
out = []
for keys in json.loads(sys.argv[1]):
    try:
        rows = sources.read(recipes.Source(**keys))
        out.append([[row["text"] for row in rows.each()], rows.commit])
    except errors.ItuneError as error:
        out.append([type(error).__name__, str(error)])
print(json.dumps(out))
"""


def read(env: dict[str, str | None], *sources: dict[str, object]) -> list[tuple[object, str]]:
    """Texts and commit of each source, or the kind and text of its error; in one process."""
    changed = {**os.environ, **env}
    done = subprocess.run(
        [sys.executable, "-c", READER, json.dumps(sources)],
        env={name: value for name, value in changed.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[tuple[object, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


CARD = """---
configs:
- config_name: short
  data_files: [{split: train, path: short.jsonl}]
- config_name: long
  data_files: [{split: train, path: long.jsonl}]
---
"""


def test_sources_of_the_hub_are_read_pinned_sliced_and_kept(filled: Hub) -> None:
    from hub import Repository

    root, env = filled
    two = root / "datasets" / "tiny" / "two"
    two.mkdir()
    (two / "README.md").write_text(CARD, encoding="utf-8")
    for name in ("short", "long"):
        (two / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n", encoding="utf-8")
    script = root / "datasets" / "tiny" / "script"
    script.mkdir()
    (script / "script.py").write_text("raise SystemExit(9)\n", encoding="utf-8")
    commit = Repository("datasets", "tiny/reviews", root / "datasets" / "tiny" / "reviews").sha()
    films = [f"film {i} was fine" for i in range(8)]
    whole, part, pinned, files, stream, short, unnamed, unknown, missing, scripted, named = read(
        env,
        {"path": "tiny/reviews"},
        {"path": "tiny/reviews", "split": "train[:75%]", "limit": 5},
        {"path": "tiny/reviews", "split": "test", "revision": commit},
        {"path": "tiny/reviews", "data_files": "test.jsonl"},
        {"path": "tiny/reviews", "streaming": True, "limit": 2},
        {"path": "tiny/two", "name": "short"},
        {"path": "tiny/two"},
        {"path": "tiny/reviews", "split": "dev"},
        {"path": "tiny/nobody"},
        {"path": "tiny/script"},
        {"path": "tiny/reviews", "revision": "main"},
    )
    assert named == [films, commit]
    assert whole == [films, commit]
    assert part == [films[:5], commit]
    assert pinned == [films, commit]
    assert files == [films, commit]
    assert stream == [films[:2], commit]
    assert short[0] == ["short"]
    assert unnamed[0] == "DataError"
    assert "short" in unnamed[1]
    assert "long" in unnamed[1]
    assert unknown[0] == "DataError"
    assert "dev" in unknown[1]
    assert missing[0] == "DataError"
    assert missing[1].startswith("tiny/nobody: neither a file or folder here")
    assert scripted[0] == "DataError"
    assert "Scripts are not run" in scripted[1]

    offline = {**env, "HF_HUB_OFFLINE": "1"}
    again, never, main, other = read(
        offline,
        {"path": "tiny/reviews"},
        {"path": "tiny/never"},
        {"path": "tiny/reviews", "revision": "main"},
        {"path": "tiny/reviews", "revision": "v2"},
    )
    assert main == [films, commit]
    assert other[0] == "DataError"
    assert "revision 'v2' was not loaded here" in other[1]
    assert again == [films, commit]
    assert never[0] == "EnvironmentRefusal"
    assert "cannot be reached" in never[1]


def closed_port() -> str:
    """The address of a hub that does not answer."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.slow
def test_a_hub_that_is_down_never_gives_rows_of_another_revision(filled: Hub) -> None:
    from hub import Repository

    root, env = filled
    reviews = root / "datasets" / "tiny" / "reviews"
    repository = Repository("datasets", "tiny/reviews", reviews)
    first = repository.sha()
    films = [f"film {i} was fine" for i in range(8)]
    read(env, {"path": "tiny/reviews"}, {"path": "tiny/reviews", "revision": "v1"})
    (reviews / "train.jsonl").write_text('{"text": "newer", "label": 0}\n', encoding="utf-8")
    second = repository.sha()
    named = {"path": "tiny/reviews", "data_files": "train.jsonl"}
    read(env, {"path": "tiny/reviews", "revision": "v2"}, {**named, "revision": "v2"})

    down = {**env, "HF_ENDPOINT": closed_port()}
    offline = {**down, "HF_HUB_OFFLINE": "1"}
    for silent, kind in ((down, "EnvironmentRefusal"), (offline, "DataError")):
        newest, v1, v2, files, commit, other, files_of_v1 = read(
            silent,
            {"path": "tiny/reviews"},
            {"path": "tiny/reviews", "revision": "v1"},
            {"path": "tiny/reviews", "revision": "v2"},
            {**named, "revision": "v2"},
            {"path": "tiny/reviews", "revision": first},
            {"path": "tiny/reviews", "revision": "v3"},
            {**named, "revision": "v1"},
        )
        assert newest == [films, first]  # what the hub had as its newest when it was asked
        assert v1 == commit == [films, first]
        assert v2 == files == [["newer"], second]
        assert other[0] == kind
        assert "revision 'v3' was not loaded here" in other[1]
        assert first in other[1]
        assert files_of_v1[0] == "EnvironmentRefusal"

    for revision in (None, "v1"):
        empty = {**down, "HF_HOME": f"{root}-empty"}
        ((refusal, said),) = read(empty, {"path": "tiny/reviews", "revision": revision})
        assert refusal == "EnvironmentRefusal"
        assert "tiny/reviews" in said
        assert "the hub cannot be reached" in said


@pytest.mark.slow
def test_what_the_hub_cannot_give_is_named(filled: Hub) -> None:
    root, env = filled
    (root / "revisions").write_text("main\n", encoding="utf-8")
    for name, content in (("broken", '{"text": "a"}\n{"text": "b'), ("empty", "")):
        folder = root / "datasets" / "tiny" / name
        folder.mkdir()
        (folder / ("train.jsonl" if content else "README.md")).write_text(content, "utf-8")
    broken, stream, empty, unmatched, unknown, nested = read(
        env,
        {"path": "tiny/broken"},
        {"path": "tiny/broken", "streaming": True},
        {"path": "tiny/empty"},
        {"path": "tiny/reviews", "data_files": "nothing*"},
        {"path": "tiny/reviews", "revision": "v9"},
        {"path": "one/two/three"},
    )
    for kind, _ in (broken, stream, empty, unmatched, unknown, nested):
        assert kind == "DataError"
    assert "cannot be read" in broken[1]
    assert "cannot be read" in stream[1]
    assert "holds no files of rows" in empty[1]
    assert "no file of it matches 'nothing*'" in unmatched[1]
    assert "no revision 'v9'" in unknown[1]
    assert "one/two/three: no such file or folder" in nested[1]


@pytest.mark.slow
def test_tune_takes_model_and_data_from_the_hub(itune: Itune, filled: Hub) -> None:
    _, env = filled
    Path("recipe.yaml").write_text(
        "model: {name: tiny/llama}\n"
        "adapter: {peft_type: lora, r: 4, target_modules: all-linear}\n"
        "data:\n"
        "  train: {path: tiny/reviews, split: train, template: sentiment}\n"
        '  eval: {path: tiny/reviews, split: "test[:4]", template: sentiment}\n'
        "  allow_overlap: true\n"
        "training: {max_steps: 2, tokens_per_step: 256, max_length: 256}\n",
        encoding="utf-8",
    )
    done = itune("tune", "--recipe", "recipe.yaml", "--json", env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2


@pytest.mark.slow
def test_a_repository_that_is_not_there_is_one_line_and_exit_2_or_3(
    itune: Itune, filled: Hub
) -> None:
    _, env = filled
    done = itune("generate", "--model", "tiny/nobody", "hello", env=env)
    assert done.returncode in (2, 3), done.stderr
    assert "tiny/nobody" in done.stderr
    assert "Traceback" not in done.stderr


METRIC = """
import datasets
import evaluate
from .counting import length

class Brevity(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="",
            features=datasets.Features({"predictions": text, "references": text}))

    def _compute(self, predictions, references):
        return {"brevity": sum(map(length, predictions)) / len(predictions)}
"""


@pytest.mark.slow
def test_a_metric_of_the_hub_is_that_of_its_revision(
    hub: Hub, itune: Itune, tmp_path: Path
) -> None:
    root, env = hub
    space = root / "spaces" / "some" / "brevity"
    space.mkdir(parents=True)
    (space / "brevity.py").write_text(METRIC, encoding="utf-8")
    (space / "counting.py").write_text("def length(text):\n    return len(text)\n")
    (tmp_path / "p.jsonl").write_text('{"prediction": "four", "reference": "x"}\n' * 2)
    ask = ("eval", "--predictions", "p.jsonl", "--json", "--metric")
    done = itune(*ask, "some/brevity@v1", env=env)
    assert done.returncode == 0, done.stderr
    score = json.loads(done.stdout)["tasks"]["predictions"]["scores"]["brevity"]
    assert score["value"] == 4
    name, _, commit = score["signature"].partition("|")[0].partition("@")
    assert name == "some/brevity"
    assert len(commit) == 40
    missing = itune(*ask, "some/nothing@v1", env=env)
    assert missing.returncode == 2
    assert "the hub has no space some/nothing with the revision 'v1'" in missing.stderr
    unpinned = itune(*ask, "some/brevity", env=env)
    assert unpinned.returncode == 2
    assert "needs its revision" in unpinned.stderr
    offline = itune(*ask, "some/brevity@v2", env={**env, "HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 3, offline.stderr
    assert "the cache holds no such revision" in offline.stderr
