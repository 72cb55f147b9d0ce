"""The order of the files: imports go one way, never in a circle, and stay light where it counts."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

SOURCE = ROOT / "src" / "itune"

# From the ground up. A new file gets its place here; `metrics` stands for the folder.
ORDER = (
    "__init__",
    "errors",
    "memory",
    "storage",
    "beats",
    "signals",
    "charts",
    "contrasts",
    "yamls",
    "elsewhere",
    "records",
    "sandbox",
    "launchers",
    "checks",
    "sections",
    "recipes",
    "expressions",
    "templates",
    "formats",
    "chats",
    "tokenizing",
    "guarding",
    "cutting",
    "encoding",
    "families",
    "runs",
    "origins",
    "launching",
    "sharing",
    "orders",
    "cache",
    "forecasting",
    "unpacking",
    "files",
    "tables",
    "folders",
    "fetching",
    "verbatim",
    "sources",
    "fitting",
    "cases",
    "collecting",
    "spreading",
    "preparing",
    "tallies",
    "joining",
    "data",
    "canaries",
    "samples",
    "batches",
    "objectives",
    "plans",
    "pacing",
    "losses",
    "attention",
    "quantization",
    "generators",
    "probing",
    "phrases",
    "vocabularies",
    "weights",
    "locating",
    "configs",
    "generation",
    "adapters",
    "folding",
    "models",
    "suiting",
    "outlines",
    "fingerprints",
    "pieces",
    "checkpoints",
    "bests",
    "sharding",
    "jobs",
    "diverging",
    "compiling",
    "layerwise",
    "averaging",
    "optimizers",
    "feeding",
    "gradients",
    "sizing",
    "rowlosses",
    "timing",
    "watching",
    "keeping",
    "training",
    "slots",
    "picking",
    "engines",
    "stepping",
    "decoding",
    "likelihoods",
    "metrics",
    "contamination",
    "doctor",
    "shots",
    "intervals",
    "resampling",
    "scoring",
    "predictions",
    "answering",
    "ensembles",
    "results",
    "memorising",
    "scoreboard",
    "reports",
    "cards",
    "judging",
    "console",
    "prompting",
    "starting",
    "finishing",
    "pushing",
    "rehearsing",
    "tuning",
    "portions",
    "simulating",
    "trying",
    "cheaper",
    "costing",
    "firsts",
    "previewing",
    "explaining",
    "shades",
    "speaking",
    "chatting",
    "commands",
    "evaluating",
    "generating",
    "completing",
    "cli",
    "__main__",
)
# Read for `itune --help` and for checking a recipe: what takes a second to import stays out.
LIGHT = (
    "errors",
    "prompting",
    "sections",
    "recipes",
    "expressions",
    "templates",
    "runs",
    "launching",
    "console",
    "engines",
    "commands",
    "cli",
)
HEAVY = {
    "accelerate",
    "datasets",
    "evaluate",
    "numpy",
    "pandas",
    "peft",
    "pyarrow",
    "rouge_score",
    "sacrebleu",
    "scipy",
    "sklearn",
    "tokenizers",
    "torch",
    "transformers",
}
# Where the name in `import` is not the one in pyproject.toml.
DISTRIBUTION = {"sklearn": "scikit-learn", "yaml": "pyyaml", "rouge_score": "rouge-score"}

PATHS = sorted(SOURCE.rglob("*.py"))


def module(path: Path) -> str:
    """`itune.metrics.bleu` of src/itune/metrics/bleu.py; a package is named by its folder."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in PATHS}


def layer(name: str) -> str:
    """The entry of ORDER that a module belongs to."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def statements(tree: ast.Module, *, everywhere: bool) -> Iterator[ast.stmt]:
    """The import statements of a file: all, or those that run when it is imported."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
            continue
        if everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def imported(path: Path, *, everywhere: bool) -> Iterator[str]:
    """Full names of the modules that a file imports; `from itune import data` is `itune.data`."""
    for node in statements(ast.parse(path.read_text(encoding="utf-8")), everywhere=everywhere):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write it from `itune`"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def ours(path: Path, *, everywhere: bool = True) -> set[str]:
    """The modules of itune which a file imports."""
    return {name for name in imported(path, everywhere=everywhere) if name.split(".")[0] == "itune"}


def roots(path: Path, *, everywhere: bool = True) -> set[str]:
    """First names of what a file imports."""
    return {name.split(".")[0] for name in imported(path, everywhere=everywhere)}


def test_all_files_were_seen() -> None:
    listed = {*SOURCE.glob("*.py"), *SOURCE.glob("*/*.py")}
    assert set(PATHS) == listed, "a folder in a folder? the house is flat"
    assert len(PATHS) >= 20
    assert {layer(name) for name in MODULES} == set(ORDER), "ORDER above names each file once"


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name: str) -> None:
    place = ORDER.index(layer(name))
    for other in ours(MODULES[name]):
        assert other in MODULES, f"{name} imports {other}, which is not there"
        if layer(other) == layer(name) == "metrics":
            continue
        assert ORDER.index(layer(other)) < place, f"{name} imports {other}, which stands below it"


def test_no_import_goes_in_a_circle() -> None:
    graph = {name: ours(path) - {name} for name, path in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def closure(name: str) -> set[str]:
    """The modules of itune that are read when this one is imported."""
    seen: set[str] = set()
    waiting = {name}
    while waiting:
        seen |= waiting
        waiting = {n for one in waiting for n in ours(MODULES[one], everywhere=False)} - seen
    return seen


@pytest.mark.parametrize("name", LIGHT)
def test_light_files_import_nothing_heavy(name: str) -> None:
    for one in closure(f"itune.{name}"):
        heavy = roots(MODULES[one], everywhere=False) & HEAVY
        assert not heavy, f"itune.{name} imports itune.{one}, which imports {sorted(heavy)}"


def test_all_that_is_imported_is_declared() -> None:
    declared = {
        match[1].lower().replace("_", "-")
        for match in re.finditer(
            r'^(?:  |\w+ = \[)"([A-Za-z0-9_-]+)[>=<"\[]',
            (ROOT / "pyproject.toml").read_text(encoding="utf-8"),
            re.MULTILINE,
        )
    }
    assert {"torch", "trackio", "ruff"} <= declared, "the pattern no longer reads pyproject.toml"
    used = set().union(*(roots(path) for path in PATHS)) - {"itune"} - set(sys.stdlib_module_names)
    missing = {DISTRIBUTION.get(name, name).replace("_", "-") for name in used} - declared
    assert not missing
