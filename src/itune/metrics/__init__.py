"""Which metrics there are, by name; nothing is imported before one is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from itune import errors

if TYPE_CHECKING:
    from itune.metrics.sufficient import SufficientMetric
    from itune.metrics.user import UserMetric

# Name -> the module of this folder and its class. A new metric is one file there and one line here.
METRICS = {
    "f1": "f1:F1",
    "accuracy": "accuracy:Accuracy",
    "matthews_correlation": "matthews_correlation:MatthewsCorrelation",
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
# Asked of a model and its training rows, not of answers: `itune.memorising` measures it.
MEMORISATION = "memorisation"
# Those that are told which labels there are.
LABELLED = ("f1", "matthews_correlation")
# How words are cut where that is not left to the script of the references: `bleu:zh`.
BLEU_WORDS = ("13a", "intl", "char", "none", "zh", "ja", "ko")
ROUGE_WORDS = ("jieba",)
WORDS = {
    "bleu": BLEU_WORDS,
    **dict.fromkeys(("rouge", "rouge1", "rouge2", "rougeL", "rougeLsum"), ROUGE_WORDS),
}


def names() -> list[str]:
    """The metrics that can be asked for by name."""
    return list(METRICS)


def fault(name: str) -> str:
    """What is wrong with a metric's name, and what to do; nothing where it may be asked for.

    Imports nothing, opens no file and asks no hub.
    """
    if name.endswith(".py"):
        return ""
    if "@" in name:
        place, _, revision = name.partition("@")
        known = place and revision and place.count("/") <= 1
        return "" if known else f"{errors.shown(name)} is no NAME@REVISION of the hub."
    if name in ("perplexity", "bits_per_byte"):
        return f"{name} is measured on sources without a template, unasked. Leave it out."
    if name == MEMORISATION:
        return (
            f"{name} is measured on a model and its training rows, not on answers. Ask for it with "
            "itune eval --metric memorisation, or in evaluation.metrics."
        )
    base, colon, words = name.partition(":")
    if base not in METRICS:
        if "/" in name:
            return (
                f"unknown metric {errors.shown(name)}. One of the hub needs its revision, "
                f"because its code runs: {errors.inert(name)}@COMMIT."
            )
        hint = errors.nearest(base, (*METRICS, MEMORISATION))
        own = "" if "Did" in hint else " A path that ends in .py loads your own."
        return f"unknown metric {errors.shown(name)}.{hint}{own}"
    if colon and words not in WORDS.get(base, ()):
        ways = ", ".join(f"{base}:{each}" for each in WORDS.get(base, ())) or base
        return f"{errors.shown(name)}: {base} cuts no words that way. Known: {ways}."
    return ""


def check(name: str, where: str = "metric") -> None:
    """Raises UserError when no metric has this name; imports nothing. A path is not opened."""
    if said := fault(name):
        raise errors.UserError(f"{where}: {said}")


def load(name: str, *, choices: Sequence[str] = ()) -> SufficientMetric | UserMetric:
    """The metric of this name, ready to use, without a network; choices: see `f1.Labelled`.

    After a colon stands how words are cut (`bleu:zh`, `rouge:jieba`). A path that ends in .py, and
    NAME@REVISION of the hub, is opened with `evaluate.load`: **the code in it runs**, with the
    rights of whoever asked. Raises UserError for an unknown name and for a file that does not load.
    """
    check(name)
    if name.endswith(".py") or "@" in name:
        user = importlib.import_module("itune.metrics.user")
        own: SufficientMetric | UserMetric = user.load(name)
        return own
    base, _, words = name.partition(":")
    module, _, kind = METRICS[base].partition(":")
    metric = getattr(importlib.import_module(f"itune.metrics.{module}"), kind)
    options: dict[str, Any] = {"choices": choices} if base in LABELLED else {}
    if words:
        options["cut"] = words
    made: SufficientMetric = metric(**options)
    return made
