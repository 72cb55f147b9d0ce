"""What a shell offers after TAB: recipes, templates, metrics, runs and the keys of a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import itune.metrics
from itune import recipes, records
from itune.records import Record


def recipe_names(incomplete: str) -> list[str]:
    """The recipes here and among the shipped; a shell adds the files when none begins so."""
    return _begun(incomplete, _named("recipes"))


def template_names(incomplete: str) -> list[str]:
    """The templates here and among the shipped."""
    return _begun(incomplete, _named("prompts"))


def metric_names(incomplete: str) -> list[str]:
    """The metrics that ship."""
    return _begun(incomplete, [*itune.metrics.names(), itune.metrics.MEMORISATION])


def run_folders(incomplete: str) -> list[str]:
    """The runs below runs/."""
    return _begun(incomplete, (str(each.parent) for each in Path("runs").glob("*/run.json")))


def settings(incomplete: str) -> list[str]:
    """The dotted keys of a recipe, up to the value: `training.learning_rate=`."""
    return _begun(incomplete, (f"{key}=" for key in _keys(recipes.Recipe)))


def _begun(incomplete: str, names: Iterable[str]) -> list[str]:
    return sorted(name for name in set(names) if name.startswith(incomplete))


def _named(kind: str) -> list[str]:
    return [*records.names_in(Path(kind)), *records.names_in(records.shipped(kind))]


def _keys(record: type[Record], before: str = "") -> Iterator[str]:
    for key in records.keys_of(record):
        inner = records.record_in(record.model_fields[key].annotation)
        if inner is None:
            yield f"{before}{key}"
        else:
            yield from _keys(inner, f"{before}{key}.")
