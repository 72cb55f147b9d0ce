"""The recipes run as they are against a hub that has tiny models and data under their names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from conftest import ROOT, Itune, sentences, tiny_model, tiny_tokenizer
from hub import serving

from itune import recipes

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
Env = dict[str, "str | None"]
Rows = list[dict[str, Any]]
SOME = 60  # rows a split, so that 2 % of them is one


def texts(first: int) -> list[str]:
    return [f"{text} {first + k}" for k, text in enumerate(sentences(SOME))]


def turns(text: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"{text}?"},
        {"role": "assistant", "content": text},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": f"again {text}"},
    ]


def rows_of(name: str, first: int) -> Rows:
    """Rows with the columns that a data set has on the hub."""
    every = enumerate(texts(first))
    match name:
        case "stanfordnlp/imdb" | "fancyzhx/ag_news":
            return [{"text": text, "label": k % 2} for k, text in every]
        case "bentrevett/multi30k":
            return [{"en": text, "de": text.upper()} for _, text in every]
        case "tatsu-lab/alpaca":
            return [
                {"instruction": f"say {text}", "input": "" if k % 2 else "now", "output": text}
                | {"text": f"say {text} {text}"}
                for k, text in every
            ]
        case "HuggingFaceH4/ultrachat_200k":
            return [
                {"prompt": text, "prompt_id": str(k), "messages": turns(text)} for k, text in every
            ]
        case "rajpurkar/squad":
            return [
                {"id": str(first + k), "title": "t", "context": text, "question": f"what is {k}?"}
                | {"answers": {"text": [text.split()[0]], "answer_start": [0]}}
                for k, text in every
            ]
        case "knkarthick/dialogsum":
            return [
                {"id": str(k), "dialogue": f"#Person1#: {text}", "summary": text, "topic": "t"}
                for k, text in every
            ]
        case "euclaise/writingprompts":
            return [{"prompt": f"[ WP ] {text}", "story": f"{text} and on"} for _, text in every]
        case "openai/gsm8k":
            return [
                {"question": f"{text} and {k}?", "answer": f"it is {k}\n#### {k}"}
                for k, text in every
            ]
        case "Salesforce/wikitext":
            return [{"text": text if k % 3 else ""} for k, text in every]
    raise AssertionError(f"what columns has {name}?")


def publish(folder: Path, name: str, config: str | None, splits: set[str]) -> None:
    """A data set as the hub keeps it: Parquet files, and a card that lists the configurations."""
    where = config or "default"
    files = []
    for number, split in enumerate(sorted(splits)):
        path = f"{where}/{split}-00000-of-00001.parquet"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows_of(name, 1000 * number)), folder / path)
        files.append(f"  - split: {split}\n    path: {where}/{split}-*\n")
    card = f"---\nconfigs:\n- config_name: {where}\n  data_files:\n{''.join(files)}---\n"
    (folder / "README.md").write_text(card, encoding="utf-8")


def split_names(source: recipes.Source) -> set[str]:
    return {part.partition("[")[0] for part in (source.split or "train").split("+")}


def fill(root: Path) -> None:
    """Models and data sets under all the names in the recipes."""
    wanted: dict[tuple[str, str | None], set[str]] = {}
    for path in RECIPES:
        recipe = load(path)
        folder = root / "models" / (recipe.model.name or "")
        if not folder.is_dir():
            model = tiny_model("masked" if "BERT" in folder.name else "causal", positions=2048)
            model.save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
        for source in (*recipe.data.train, *recipe.data.eval):
            key = source.path, source.name
            wanted[key] = wanted.get(key, set()) | split_names(source)
    for (name, config), splits in wanted.items():
        publish(root / "datasets" / name, name, config, splits)


def load(path: Path) -> recipes.Recipe:
    return recipes.load(path, command=command(path))


def command(path: Path) -> str:
    return "pretrain" if path.stem.startswith("pretrain") else "tune"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Env]]:
    """The hub of all recipes and an empty cache; each test starts its own processes."""
    folder = tmp_path_factory.mktemp("recipes-hub")
    fill(folder / "hub")
    with serving(folder / "hub") as url:
        yield folder / "hub", reach(url, folder / "hf-home")


def reach(url: str, home: Path) -> Env:
    return {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": None, "HF_HOME": str(home)}


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_as_it_is_and_is_scored(
    path: Path, itune: Itune, shared: tuple[Path, Env]
) -> None:
    _, env = shared
    done = itune(command(path), "-r", path, "-o", "run", "--json", env=env)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["state"] == "finished"
    assert made["steps"] >= 1
    done = itune("eval", "--run", "run", "--limit", "8", "--json", env=env)
    assert done.returncode == 0, done.stderr
    for scores in json.loads(done.stdout)["tasks"].values():
        assert scores["rows"] > 0
        assert scores["against"]["scores"]


@pytest.mark.slow
def test_what_was_fetched_once_needs_no_hub(itune: Itune, tmp_path: Path) -> None:
    """From an empty cache; then with nobody there at all; and before, what is said of that."""
    fill(tmp_path / "hub")
    recipe = ROOT / "recipes" / "dialogsum.yaml"
    line = ("tune", "-r", recipe, "-s", "training.max_steps=2", "--json")
    with serving(tmp_path / "hub") as url:
        env = reach(url, tmp_path / "hf-home")
        done = itune(*line, "-o", "first", env=env)
        assert done.returncode == 0, done.stderr
        first = json.loads(done.stdout)
    for offline in ("1", None):  # told so, and found out
        done = itune(*line, "-o", f"again-{offline}", env={**env, "HF_HUB_OFFLINE": offline})
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["loss"] == first["loss"]
        assert "Warning" not in done.stderr
    done = itune(*line, "-o", "none", env={**env, "HF_HOME": str(tmp_path / "empty")})
    assert done.returncode == 3
    assert "HuggingFaceTB/SmolLM2-135M" in done.stderr
    assert "Traceback" not in done.stderr
    assert "beforehand: hf download HuggingFaceTB/SmolLM2-135M" in done.stderr


@pytest.mark.slow
def test_a_repository_that_one_must_be_let_into_is_told_of(itune: Itune, tmp_path: Path) -> None:
    fill(tmp_path / "hub")
    (tmp_path / "hub/private").write_text("models/HuggingFaceTB/SmolLM2-135M\n")
    (tmp_path / "hub/readers").write_text("hf_friend\n")
    line = ("tune", "-r", ROOT / "recipes" / "multi30k.yaml", "-s", "training.max_steps=1")
    with serving(tmp_path / "hub") as url:
        env = reach(url, tmp_path / "hf-home")
        done = itune(*line, "-o", "run", env=env)
        assert done.returncode in (2, 3)
        assert "HuggingFaceTB/SmolLM2-135M" in done.stderr
        assert "HF_TOKEN" in done.stderr or "hf auth login" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        done = itune(*line, "-o", "run", env={**env, "HF_TOKEN": "hf_friend"})
        assert done.returncode == 0, done.stderr
        left = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
        assert not any(b"hf_friend" in path.read_bytes() for path in left)


@pytest.mark.slow
def test_a_download_that_is_cut_goes_on_where_it_was(itune: Itune, tmp_path: Path) -> None:
    fill(tmp_path / "hub")
    folder = tmp_path / "hub/models/HuggingFaceTB/SmolLM2-135M"
    config = transformers.LlamaConfig.from_pretrained(folder)
    config.intermediate_size = 20_000  # clients keep what they have by 10 MB
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    weights = folder / "model.safetensors"
    half = weights.stat().st_size // 2
    (tmp_path / "hub/cut").write_text("HuggingFaceTB/SmolLM2-135M/model.safetensors\n")
    line = ("tune", "-r", ROOT / "recipes" / "multi30k.yaml", "-s", "training.max_steps=1")
    with serving(tmp_path / "hub") as url:
        done = itune(*line, "-o", "run", env=reach(url, tmp_path / "hf-home"))
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "hub/cut.ranges").read_text().split()
    assert asked[0] == "0"
    assert 0 < int(asked[1]) <= half, "begun anew instead"
    (kept,) = (tmp_path / "hf-home").rglob("model.safetensors")
    assert kept.read_bytes() == weights.read_bytes()
    shutil.rmtree(tmp_path / "hf-home")
