"""Which metrics there are, by name; nothing is imported before one is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from itune import errors

if TYPE_CHECKING:
    from itune.metrics.sufficient import SufficientMetric
    from itune.metrics.user import UserMetric

# Name -> the module of this folder and its class. A new metric is one file there and one line here.
METRICS = {
    "f1": "f1:F1",
    "accuracy": "accuracy:Accuracy",
    "exact_match": "exact_match:ExactMatch",
    "final_number": "final_number:FinalNumber",
    "bleu": "bleu:Bleu",
    "chrf": "chrf:Chrf",
    "ter": "ter:Ter",
    "rouge": "rouge:Rouge",
    "rouge1": "rouge:Rouge1",
    "rouge2": "rouge:Rouge2",
    "rougeL": "rouge:RougeL",
    "rougeLsum": "rouge:RougeLsum",
    "squad": "squad:Squad",
    "squad_em": "squad:SquadEm",
    "squad_f1": "squad:SquadF1",
}


def names() -> list[str]:
    """The metrics that can be asked for by name."""
    return list(METRICS)


def check(name: str, where: str = "metric") -> None:
    """Raises UserError when no metric has this name; imports nothing. A path is not opened."""
    if name not in METRICS and not name.endswith(".py"):
        hint = errors.nearest(name, METRICS)
        raise errors.UserError(
            f"{where}: no metric is called {errors.shown(name)}.{hint} "
            f"A path that ends in .py loads your own."
        )


def load(name: str, *, choices: Sequence[str] = ()) -> SufficientMetric | UserMetric:
    """The metric of this name, ready to use, without a network; choices: see `f1`.

    A path that ends in .py is opened with `evaluate.load`: **the code in it runs**, with the rights
    of whoever asked. Raises UserError for an unknown name and for a file that does not load.
    """
    check(name)
    if name.endswith(".py"):
        user = importlib.import_module("itune.metrics.user")
        own: SufficientMetric | UserMetric = user.load(name)
        return own
    module, _, kind = METRICS[name].partition(":")
    metric = getattr(importlib.import_module(f"itune.metrics.{module}"), kind)
    made: SufficientMetric = metric(choices=choices) if name == "f1" else metric()
    return made
