"""Metrics from the user's own file or the hub, opened with `evaluate.load`: code that runs."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from itune import errors
from itune.metrics import sufficient


class UserMetric:
    """A metric that gives values and no statistics; each other set of rows is computed anew."""

    def __init__(self, path: str, module: Any, name: str = "") -> None:
        self.path = path
        self.module = module
        self.signature = f"{name or Path(path).name}|evaluate:{sufficient.evaluate.__version__}"

    def compute(
        self, predictions: Sequence[str], references: sufficient.References
    ) -> dict[str, float | sufficient.Array]:
        """Its numbers by key: one for all rows, or an array [rows] where the file gives a list.

        What is no number is left out. Raises UserError when its code fails or gives none.
        """
        sufficient.check_rows(predictions, references)
        try:
            found = self.module.compute(
                predictions=list(predictions), references=self._shaped(references)
            )
        except errors.ItuneError:
            raise
        except Exception as error:
            raise _failed(self.path, "does not compute", error) from error
        numbers_found = _numbers(found, len(predictions))
        if not numbers_found:
            raise errors.UserError(
                f"metric {self.path}: gives {errors.shown(found)}, which holds no number. "
                "Return a mapping of names to numbers, or to lists of one number a row."
            )
        return numbers_found

    def checked(
        self, predictions: Sequence[str], references: sufficient.References
    ) -> dict[str, float | sufficient.Array]:
        """What `compute` gives. Raises UserError too where a number of it is not finite."""
        found = self.compute(predictions, references)
        for key, value in found.items():
            self.refuse_undefined(key, value)
        return found

    def refuse_undefined(self, key: str, value: float | sufficient.Array) -> None:
        """Raises UserError for a value that is not finite, in the row where it is one of many."""
        bad = np.flatnonzero(~np.isfinite(value))
        if len(bad) == 0:
            return
        where = f" in row {bad[0]}" if np.ndim(value) else ""
        raise errors.UserError(
            f"metric {self.path}: its value {errors.shown(key)} is {np.ravel(value)[bad[0]]}{where}"
            ", no finite number. Return a number for every set of answers, or leave the key out."
        )

    def _shaped(self, references: sufficient.References) -> list[Any]:
        """References as its features want them: a list of texts a row, or one text a row."""
        wanted = self.module.features
        options = wanted if isinstance(wanted, list) else [wanted]
        kinds = (datasets.List, datasets.LargeList, list)
        if any(isinstance(option.get("references"), kinds) for option in options):
            return [list(answers) for answers in references]
        for row, answers in enumerate(references):
            if len(answers) > 1:
                raise errors.UserError(
                    f"metric {self.path}: row {row} has {len(answers)} references, but its "
                    "features take one. Declare references as a list of strings."
                )
        return [answers[0] for answers in references]


def load(path: str) -> sufficient.SufficientMetric | UserMetric:
    """The metric in a Python file, or NAME@REVISION of the hub. **Its code runs.**

    Raises UserError when it cannot be loaded, EnvironmentRefusal when the hub cannot be reached.
    """
    name, script = "", path
    if not path.endswith(".py"):
        name, script = _fetched(path)
    elif not Path(path).is_file():
        raise errors.UserError(f"metric {path}: there is no such file. Give the path of a metric.")
    try:
        module = sufficient.evaluate.load(script, keep_in_memory=True)
    except Exception as error:
        raise _failed(path, "does not load", error) from error
    if isinstance(module, sufficient.SufficientMetric):
        return module
    return UserMetric(path, module, name)


def _fetched(wanted: str) -> tuple[str, str]:
    """(its name with the commit, the script) of a metric of the hub, as that revision has it.

    Not by `evaluate.load` itself: it takes any revision that it finds in its cache when the one
    that was asked for cannot be reached.
    """
    import huggingface_hub

    name, _, revision = wanted.partition("@")
    repository = name if "/" in name else f"evaluate-metric/{name}"
    try:
        folder = huggingface_hub.snapshot_download(
            repository, repo_type="space", revision=revision, allow_patterns="*.py"
        )
    except (
        huggingface_hub.errors.RepositoryNotFoundError,
        huggingface_hub.errors.RevisionNotFoundError,
    ) as error:
        raise errors.UserError(
            f"metric {wanted}: the hub has no space {repository} with the revision "
            f"{errors.shown(revision)}. Check both."
        ) from error
    except (OSError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise errors.EnvironmentRefusal(
            f"metric {wanted}: the hub cannot be reached and the cache holds no such revision. "
            "Go online, or give the path of a file."
        ) from error
    script = Path(folder) / f"{repository.split('/')[1]}.py"
    if not script.is_file():
        raise errors.UserError(f"metric {wanted}: its repository has no {script.name}.")
    return f"{repository}@{Path(folder).name}", str(script)


def _failed(path: str, what: str, error: Exception) -> errors.UserError:
    said = errors.inert(f"{type(error).__name__}: {error}".splitlines()[0])
    return errors.UserError(f"metric {path}: {what}: {said}. Mend the file.")


def _numbers(found: Any, n_rows: int) -> dict[str, float | sufficient.Array]:
    """What of a result is a number, or a list of one for each row."""
    kept: dict[str, float | sufficient.Array] = {}
    for key, value in (found if isinstance(found, dict) else {}).items():
        if isinstance(value, numbers.Real) or (isinstance(value, np.ndarray) and value.ndim == 0):
            kept[str(key)] = float(value)
        elif isinstance(value, list | tuple | np.ndarray) and len(value) == n_rows:
            rows = np.asarray(value)
            if rows.dtype.kind in "biuf" and rows.ndim == 1:
                kept[str(key)] = rows.astype(np.float64)
    return kept
