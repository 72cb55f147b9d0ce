"""Metrics from the user's own file, opened with `evaluate.load`: code that runs."""

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

    def __init__(self, path: str, module: Any) -> None:
        self.path = path
        self.module = module
        self.signature = f"{Path(path).name}|evaluate:{sufficient.evaluate.__version__}"

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
    """The metric in a Python file. **Its code runs.** Raises UserError when it cannot be loaded."""
    if not Path(path).is_file():
        raise errors.UserError(f"metric {path}: there is no such file. Give the path of a metric.")
    try:
        module = sufficient.evaluate.load(path, keep_in_memory=True)
    except Exception as error:
        raise _failed(path, "does not load", error) from error
    return module if isinstance(module, sufficient.SufficientMetric) else UserMetric(path, module)


def _failed(path: str, what: str, error: Exception) -> errors.UserError:
    said = errors.inert(f"{type(error).__name__}: {error}".splitlines()[0])
    return errors.UserError(f"metric {path}: {what}: {said}. Mend the file.")


def _numbers(found: Any, n_rows: int) -> dict[str, float | sufficient.Array]:
    """What of a result is a finite number, or a list of one for each row."""
    kept: dict[str, float | sufficient.Array] = {}
    for key, value in (found if isinstance(found, dict) else {}).items():
        if isinstance(value, numbers.Real) or (isinstance(value, np.ndarray) and value.ndim == 0):
            kept[str(key)] = float(value)
        elif isinstance(value, list | tuple | np.ndarray) and len(value) == n_rows:
            rows = np.asarray(value)
            if rows.dtype.kind in "biuf" and rows.ndim == 1:
                kept[str(key)] = rows.astype(np.float64)
    return kept
