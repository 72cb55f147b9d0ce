"""What editors and shells know of a recipe: its JSON schema, and completion."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Itune
from test_startup import HEAVY, imports

from itune import recipes, yamls

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SCHEMA = ROOT / "recipes/recipe.schema.json"
KINDS: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,),
    "null": (type(None),), "integer": (int,), "number": (int, float),
}  # fmt: skip
# Keywords that only describe; all others are checked below, and an unknown one is an error.
TOLD = {"title", "description", "default", "format", "$schema", "$defs"}
HOLD = {"type", "items", "properties", "required", "additionalProperties"}
LIMITS = {
    "minimum": lambda value, most: value >= most,
    "maximum": lambda value, most: value <= most,
    "exclusiveMinimum": lambda value, most: value > most,
    "exclusiveMaximum": lambda value, most: value < most,
    "minLength": lambda value, most: len(value) >= most,
    "minItems": lambda value, most: len(value) >= most,
    "enum": lambda value, known: value in known,
    "const": lambda value, known: value == known,
}


def faults(value: Any, schema: Any, whole: Any, place: str = "") -> list[str]:
    """Where a value is not as the schema has it, in that part of JSON Schema that ours uses."""
    if schema is True:
        return []
    kinds = schema.get("type")
    if kinds and (
        (kinds == "boolean") != isinstance(value, bool) or not isinstance(value, KINDS[kinds])
    ):
        return [f"{place}: not {kinds}"]
    found: list[str] = []
    for key, said in schema.items():
        if key in LIMITS:
            found += [] if LIMITS[key](value, said) else [f"{place}: {key} {said}"]
        elif key == "$ref":
            found += faults(value, whole["$defs"][said.removeprefix("#/$defs/")], whole, place)
        elif key in ("anyOf", "oneOf"):
            each = [faults(value, one, whole, place) for one in said]
            found += [] if not all(each) else min(each, key=len)
        else:
            assert key in TOLD or key in HOLD, f"{key} is not checked here"
    return found + held(value, schema, whole, place)


def held(value: Any, schema: Any, whole: Any, place: str) -> list[str]:
    """The faults of what a list or a mapping holds."""
    if isinstance(value, list):
        items = schema.get("items", True)
        return [
            f for i, each in enumerate(value) for f in faults(each, items, whole, f"{place}.{i}")
        ]
    if not isinstance(value, dict):
        return []
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    found = [f"{place}.{name}: missing" for name in schema.get("required", ()) if name not in value]
    for name, each in value.items():
        if name not in known and others is False:
            found.append(f"{place}.{name}: unknown")
        else:
            found += faults(each, known.get(name, others), whole, f"{place}.{name}")
    return found


def described(schema: Any) -> Iterator[tuple[str, bool]]:
    for name, part in (("Recipe", schema), *schema["$defs"].items()):
        for key, told in part["properties"].items():
            held = [told, *told.get("anyOf", ())]
            held += [
                schema["$defs"][each["$ref"].split("/")[-1]] for each in held if "$ref" in each
            ]
            yield f"{name}.{key}", any(each.get("description", "").strip() for each in held)


@pytest.mark.parametrize("command", ["pretrain", "tune", "eval"])
def test_a_command_prints_the_schema_and_nothing_else(command: str, itune: Itune) -> None:
    done = itune(command, "--schema")
    assert done.returncode == 0
    assert done.stderr == ""
    assert json.loads(done.stdout) == recipes.schema()


def test_the_schema_is_printed_without_anything_heavy() -> None:
    names, said = imports("tune", "--schema")
    assert "pydantic" in names, "nothing was measured"
    assert not names & HEAVY
    assert '"Recipe"' in said


def test_the_schema_that_ships_is_the_programs_own() -> None:
    made = runpy.run_path(str(ROOT / "docs/make_recipe.py"))["schema_file"]()
    assert SCHEMA.read_text(encoding="utf-8") == made, "run: python docs/make_recipe.py"
    assert json.loads(made) == recipes.schema()


def test_every_key_of_the_schema_is_described() -> None:
    told = dict(described(recipes.schema()))
    assert len(told) > 80
    assert [key for key, said in told.items() if not said] == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_recipe_that_ships_names_the_schema_and_fits_it(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    named = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert named, first
    assert (path.parent / named[1]).resolve() == SCHEMA
    schema = recipes.schema()
    written = yaml.safe_load(recipes.dump(recipes.load(path)))  # as it lies in the run's folder
    document = yamls.parse(path.read_text(encoding="utf-8"), str(path), ValueError).data
    assert faults(document, schema, schema) == []
    assert faults(written, schema, schema) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training", {"leraning_rate": 1e-4}),
        ("training", {"learning_rate": "fast"}),
        ("training", {"learning_rate": -1.0}),
        ("training", {"lr_scheduler_type": "cosin"}),
        ("data", {"eval": {"path": "x.jsonl"}}),
        ("data", {"train": {"path": "x.jsonl", "tempalte": "y"}}),
        ("model", "HuggingFaceTB/SmolLM2-135M"),
        ("modle", {}),
    ],
)
def test_what_a_recipe_may_not_hold_the_schema_refuses(key: str, value: Any) -> None:
    good: dict[str, Any] = {"model": {"name": "x"}, "data": {"train": {"path": "x.jsonl"}}}
    schema = recipes.schema()
    assert faults(good, schema, schema) == []
    assert faults({**good, "training": None, "adapter": None}, schema, schema) == []
    assert faults({**good, key: value}, schema, schema) != []


# --- shells --------------------------------------------------------------------------------------

KINDS_OF_LR = {"training.lr_scheduler_type=", "training.lr_scheduler_kwargs="}


@pytest.fixture
def offered(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What bash would offer after these words, by the protocol that the printed script speaks."""

    def ask(words: str) -> list[str]:
        line = f"itune {words}"
        with monkeypatch.context() as bash:
            bash.setenv("_ITUNE_COMPLETE", "complete_bash")
            bash.setenv("COMP_WORDS", line)
            bash.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
            ended = cli()
        assert ended.err == ""
        return list(ended.out.split())

    return ask


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", {"pretrain", "tune", "eval", "generate"}),
        ("tune --pre", {"--preview"}),
        ("tune --recipe quick", {"quickstart/pretrain", "quickstart/tune"}),
        ("tune -r mult", {"multi30k"}),
        ("tune --set training.lr_s", KINDS_OF_LR),
        ("tune --set data.train.temp", {"data.train.template="}),
        ("generate --template sent", {"sentiment"}),
        ("eval --metric rougeL", {"rougeL", "rougeLsum"}),
        ("eval --run runs/a", {"runs/alpha"}),
    ],
)
def test_bash_completes(
    words: str, expected: set[str], offered: Callable[..., list[str]],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "runs/alpha").mkdir(parents=True)
    (tmp_path / "runs/alpha/run.json").write_text("{}")
    (tmp_path / "runs/another").mkdir()
    monkeypatch.chdir(tmp_path)
    assert set(offered(words)) == expected


def test_a_recipe_of_ones_own_is_offered_too(
    offered: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/mine.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    assert offered("tune -r mi") == ["mine"]


def test_the_script_for_a_shell_is_printed(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And bash takes it: the function that it defines is the one that completes `itune`."""
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    said = cli("--show-completion", "bash")
    assert said.code == 0, said.err
    line = ["bash", "-c", f"{said.out}\ncomplete -p itune"]
    asked = subprocess.run(line, capture_output=True, text=True, check=True)
    assert asked.stdout.split() == ["complete", "-o", "default", "-F", "_itune_completion", "itune"]


def test_completing_imports_nothing_heavy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv[0] = 'itune'\n"
        "try:\n    from itune.cli import main; main()\n"
        "finally:\n    print(sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "_ITUNE_COMPLETE": "complete_bash", "COMP_CWORD": "3",
             "COMP_WORDS": "itune tune --set training.le"},
    )  # fmt: skip
    assert done.stdout.split() == ["training.learning_rate="]
    assert not HEAVY & set(re.findall(r"'(\w+)'", done.stderr))
