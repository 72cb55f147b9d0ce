"""`report.html` in a run's folder: one page of all that the run has in its files, and no more.

It needs neither a network nor a script. Every text comes through Jinja's autoescape, and texts of
models and data through `contrasts` besides.
"""

from __future__ import annotations

import datetime
import functools
import heapq
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2

import itune
from itune import charts, contrasts, recipes, runs, scoreboard, scoring, storage

NAME = "report.html"
TEMPLATE = Path(__file__).with_name("report.html.jinja")
SAMPLES = 20  # shown of one evaluation
WORST = 20  # training rows of the highest loss
EVALUATIONS = 8  # the newest; each is a few hundred kB
SHORT = 300  # characters of a name
SURE = 0.05
Numbers = list[float]


def write(run: runs.Run) -> Path:
    """Write the page of a run anew, from what its folder holds now."""
    path = run.dir / NAME
    storage.write(path, render(run))
    return path


def render(run: runs.Run) -> str:
    """The page of a run as HTML."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        visible=contrasts.visible,
        cut=contrasts.cut,
        short=functools.partial(contrasts.cut, most=SHORT),
        size=_size,
        clock=_clock,
        python=_python,
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    manifest, log = run.manifest, run.log_lines()
    return template.render(
        run=run.dir,
        manifest=manifest,
        recipe=run.recipe,
        recipe_text=recipes.dump(run.recipe),
        version=itune.__version__,
        charts=_charts(manifest, log),
        reached=int(log[-1]["step"]) if log else 0,
        evaluations=list(_evaluations(run.dir / "evals")),
        worst=_worst(run.dir / "row_losses.jsonl"),
        loader=_loader(run),
    )


# --- training -----------------------------------------------------------------------------


def _charts(manifest: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    losses = _points(log, "loss")
    heldout = _points(log, "heldout_loss")
    times = [float(line["seconds"]) for line in log]
    each = [b - a for a, b in pairwise([0.0, *times])]
    found = {
        "Loss": charts.curves(
            [
                ("training, each step", "faint", losses),
                ("training", "ours", charts.smoothed(losses)),
                ("held out", "theirs", heldout),
            ],
            x_name="step",
            y_name="nats a token",
        ),
        "Learning rate": charts.curves(
            [("learning rate", "ours", _points(log, "learning_rate"))],
            x_name="step",
            y_name="learning rate",
        ),
        "Gradient norm": charts.curves(
            [("gradient norm", "ours", _points(log, "grad_norm"))],
            x_name="step",
            y_name="norm before clipping",
        ),
        "Time": charts.histogram(
            charts.binned([[one for one in each if one > 0]], 0.001),
            [("steps", "ours")],
            x_name="seconds a step",
            y_name="steps",
        ),
    }
    lengths = manifest.get("data", {}).get("train", {}).get("lengths")
    if lengths:
        found["Length of training examples"] = charts.histogram(
            charts.Bins(lengths["left"], lengths["width"], lengths["counts"]),
            [("examples", "ours")],
            x_name="tokens",
            y_name="examples",
        )
    return {name: chart for name, chart in found.items() if chart is not None}


def _points(log: Sequence[Mapping[str, Any]], key: str) -> list[charts.Point]:
    """A value over the steps; what is not finite is a text in the log, and becomes NaN again."""
    return [(float(line["step"]), float(line[key])) for line in log if key in line]


def _worst(path: Path) -> list[dict[str, Any]]:
    """The training rows with the highest loss at their last visit, the highest first."""
    if not path.is_file():
        return []
    last: dict[tuple[str, int, int], dict[str, Any]] = {}
    for record in _json_lines(path):
        last[record["path"], record["row"], record["wording"]] = record
    return heapq.nlargest(WORST, last.values(), key=lambda record: float(record["loss"]))


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file of ours, but a last line that a kill tore."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


# --- evaluations --------------------------------------------------------------------------


@dataclass(frozen=True)
class Answered:
    """What predictions.jsonl shows of a task: samples, and the lengths of all answers."""

    samples: Sequence[Mapping[str, Any]]
    lengths: charts.Chart | None


def _evaluations(folder: Path) -> Iterator[dict[str, Any]]:
    """Each evaluation of a run, the newest first, as the page shows it."""
    found = sorted(
        folder.glob("*/scores.json"), key=lambda path: path.stat().st_mtime, reverse=True
    )
    for path in found[:EVALUATIONS]:
        result = runs.read_json(path)
        answers = path.with_name("predictions.jsonl")
        by_task = _answered(answers) if answers.is_file() else {}
        yield {
            "name": path.parent.name,
            "made": _time(path.stat().st_mtime),
            "ensemble": result.get("ensemble", ()),
            "seconds": result["seconds"],
            "rate": result["tokens_per_second"],
            "tasks": [
                _task(name, task, by_task.get(name)) for name, task in result["tasks"].items()
            ],
        }


def _task(name: str, task: Mapping[str, Any], answered: Answered | None) -> dict[str, Any]:
    against = task.get("against")
    described = (each["details"] for each in task["scores"].values() if "details" in each)
    details: Mapping[str, Any] = next(described, {})
    confusion = details.get("confusion")
    return {
        "name": name,
        **{key: task.get(key) for key in ("data", "rows", "unparseable", "cut", "contamination")},
        "repeated": scoreboard.repeated(task),
        "rival": None if against is None else against["name"],
        "scores": list(_scores(task, against)),
        "differences": [] if against is None else list(_differences(against["difference"])),
        "wordings": task["wordings"],
        "spread": task.get("spread", {}),
        "classes": details.get("classes", {}),
        "confusion": None if confusion is None else _confusion(confusion),
        "changed": None if against is None else _changed(against.get("changed")),
        **{key: task.get(key, ()) for key in ("notes", "reproduced", "canaries")},
        "samples": [] if answered is None else answered.samples,
        "lengths": None if answered is None else answered.lengths,
    }


def _scores(task: Mapping[str, Any], against: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Each metric with the systems that it was computed for, on one axis."""
    for key, score in task["scores"].items():
        systems = [("tuned", score)]
        if against is not None:
            systems.append((_short(against["name"]), against["scores"][key]))
        ends = charts.scale(
            float(each[part]) for _, each in systems for part in ("value", "low", "high")
        )
        yield {
            "metric": key,
            "signature": score["signature"],
            "ends": [f"{end:g}" if abs(end) < 1e4 else f"{end:.2g}" for end in ends],
            "systems": [
                {
                    "name": name,
                    **{part: _number(float(each[part])) for part in ("value", "low", "high")},
                    "drawn": charts.interval(
                        float(each["value"]), float(each["low"]), float(each["high"]), ends
                    ),
                }
                for name, each in systems
            ],
        }


def _differences(differences: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for key, each in differences.items():
        gain = float(each["value"]) * (-1 if key in scoring.LESS_IS_BETTER else 1)
        sure = float(each["p_holm"]) < SURE
        yield {
            "metric": key,
            "value": f"{'+' if each['value'] >= 0 else ''}{_number(float(each['value']))}",
            "low": _number(float(each["low"])),
            "high": _number(float(each["high"])),
            "p": f"{each['p_value']:.3f}",
            "p_holm": f"{each['p_holm']:.3f}",
            "verdict": ("better" if gain > 0 else "worse") if sure else "not told apart",
        }


def _confusion(confusion: Mapping[str, Any]) -> dict[str, Any]:
    """The matrix with, beside each count, which share of its row it is."""
    return {
        "labels": confusion["labels"],
        "rows": [
            (label, [(count, round(count / max(1, sum(counts)), 3)) for count in counts])
            for label, counts in zip(confusion["labels"], confusion["counts"], strict=True)
        ],
    }


def _changed(changed: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not changed or not changed["metric"]:
        return None
    ways = {way: [_sample(row) for row in changed[way]] for way in ("better", "worse")}
    return {"metric": changed["metric"], "count": changed["count"], **ways}


def _answered(path: Path) -> dict[str, Answered]:
    """What to show of a file of predictions, task by task; read twice, never held whole."""
    lengths: dict[str, tuple[Numbers, Numbers]] = defaultdict(lambda: ([], []))
    for line in _json_lines(path):
        ours, theirs = lengths[line["task"]]
        ours.append(float(len(line["prediction"])))
        if "against" in line:
            theirs.append(float(len(line["against"])))
    each = max(2, SAMPLES // max(1, len(lengths)))
    wanted = {task: _spaced(len(ours), each) for task, (ours, _) in lengths.items()}
    samples: dict[str, list[dict[str, Any]]] = {task: [] for task in lengths}
    at: dict[str, int] = dict.fromkeys(lengths, 0)
    for line in _json_lines(path):
        if at[line["task"]] in wanted[line["task"]]:
            samples[line["task"]].append(_sample(line))
        at[line["task"]] += 1
    return {
        task: Answered(
            samples[task],
            charts.histogram(
                charts.binned([ours, theirs] if theirs else [ours], 1),
                [("tuned", "ours"), ("compared", "theirs")][: 1 + bool(theirs)],
                x_name="characters",
                y_name="answers",
            ),
        )
        for task, (ours, theirs) in lengths.items()
    }


def _spaced(total: int, count: int) -> set[int]:
    """At most `count` places among `total`, evenly spaced."""
    return {place * total // count for place in range(count)} if total > count else {*range(total)}


def _sample(line: Mapping[str, Any]) -> dict[str, Any]:
    references = line["references"]
    other = line.get("against")
    return {
        "row": line["row"],
        "wording": line["wording"],
        "gain": line.get("gain"),
        "prompt": line["prompt"],
        "references": references[:5],
        "tuned": contrasts.marked(line["prediction"], references),
        "other": None if other is None else contrasts.marked(other, references),
        "changed": other is not None and other != line["prediction"],
    }


# --- words and numbers --------------------------------------------------------------------


def _loader(run: runs.Run) -> dict[str, str]:
    """By which class of which library the model loads."""
    adapter, config = run.model_dir / "adapter_config.json", run.model_dir / "config.json"
    if adapter.is_file():
        task = str(runs.read_json(adapter).get("task_type"))
        kinds = {
            "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
            "CAUSAL_LM": "AutoPeftModelForCausalLM",
        }
        return {"library": "peft", "kind": kinds.get(task, "AutoPeftModel")}
    if not config.is_file():
        return {}
    made = " ".join(runs.read_json(config).get("architectures") or [])
    ends = {"ForConditionalGeneration": "Seq2SeqLM", "ForMaskedLM": "MaskedLM"}
    kind = next((name for end, name in ends.items() if made.endswith(end)), "CausalLM")
    return {"library": "transformers", "kind": f"AutoModelFor{kind}"}


def _short(name: str) -> str:
    return "base" if name == "base" else "other"


def _number(value: float) -> str:
    return (
        f"{value:.3f}"
        if abs(value) < 10
        else f"{value:.2f}"
        if abs(value) < 1000
        else f"{value:,.0f}"
    )


def _size(count: float) -> str:
    """Bytes in the largest unit that leaves a number above 1."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _clock(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def _python(text: object) -> str:
    """A text as Python writes it, so that it can be pasted."""
    return ascii(str(text))


def _time(stamp: float) -> str:
    return f"{datetime.datetime.fromtimestamp(stamp, datetime.timezone.utc):%Y-%m-%d %H:%M} UTC"
