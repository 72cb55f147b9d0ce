"""What `itune eval` shows: tables that fit in 80 columns, and what must be said beside them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len, set_cell_size

from itune import contrasts, scoring

SHOWN = 3  # chosen: rows that changed most, each way; report.html has more
ODD = {
    "unparseable": "are none of the choices; they count as wrong",
    "cut": "did not end and are cut at generation.max_new_tokens",
}
WIDTH = 27  # columns of an answer: two of them, a row and its gain make 80


@dataclass(frozen=True)
class Table:
    """A line above, columns and rows, and lines below."""

    title: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()


def tables(result: Mapping[str, Any], confidence: float) -> Iterator[Table]:
    """For each task its scores, the differences, and the spread over wordings."""
    interval = f"{confidence * 100:g} % interval"
    if others := result.get("ensemble"):
        named = ", ".join(map(contrasts.visible, (result["run"], *others)))
        yield Table(f"{1 + len(others)} runs as one: {named}")
    tests = sum(len(t.get("against", {}).get("difference", {})) for t in result["tasks"].values())
    for name, task in result["tasks"].items():
        yield _scores(name, task, interval)
        if "against" in task:
            yield _differences(task["against"], interval, tests)
            yield from _changed(task["against"])
        if "spread" in task:
            yield _spread(task["spread"], len(task["wordings"]))
    if tests > 1:
        note = (
            f"p (Holm): p as it counts among all {tests} tests above; below 0.05 for all that may",
            "be called different, with one chance in 20 at most that any of them is not.",
        )
        yield Table("", notes=note)


def _scores(name: str, task: Mapping[str, Any], interval: str) -> Table:
    wordings = f" in {len(task['wordings'])} wordings" if len(task["wordings"]) > 1 else ""
    rows = "1 row" if task["rows"] == 1 else f"{task['rows']:,} rows"
    columns = ["metric", "score", interval]
    other = task.get("against")
    if other is not None:
        columns += [_called(other["name"]), interval]
    cells = []
    for key, score in task["scores"].items():
        cells.append([key, number(score["value"]), bounds(score)])
        if other is not None:
            theirs = other["scores"][key]
            cells[-1] += [number(theirs["value"]), bounds(theirs)]
    notes = [] if other is None else _odd(other, f"{_called(other['name'])}: ")
    notes = [
        *_turned(task["scores"]),
        *_odd(task, ""),
        *notes,
        *_leaked(task),
        *_wrapped(repeated(task)),
        *_wrapped(task.get("notes", ())),
    ]
    return Table(f"{name}: {rows}{wordings}", columns, cells, notes)


def _wrapped(notes: Iterable[str]) -> list[str]:
    """What else is said of a task, in lines that fit."""
    return [line for note in notes for line in textwrap.wrap(note, 80)]


def _turned(scores: Mapping[str, Any]) -> list[str]:
    """A line about values of which the smaller is the better, where there are any."""
    names = [key for key in scores if key in scoring.LESS_IS_BETTER]
    return [f"less is better: {', '.join(names)}"] if names else []


def _leaked(task: Mapping[str, Any]) -> list[str]:
    """A line about held-out rows that were trained on, where there are any."""
    counts = task.get("contamination")
    if not counts or not any(counts.values()):
        return []
    return [
        f"also in the training data: {counts['exact']:,} rows whole, "
        f"{counts['ngram']:,} more by a passage of 13 words"
    ]


def repeated(task: Mapping[str, Any]) -> list[str]:
    """A line about held-out rows that repeat others, where there are any."""
    count = task.get("duplicated")
    if not count:
        return []
    who = "1 row says" if count == 1 else f"{count:,} rows say"
    return [f"{who} what an earlier one does, though the intervals take all for new"]


def _odd(task: Mapping[str, Any], whose: str) -> list[str]:
    """Lines about answers that are none of the choices, and that were cut, where there are any."""
    return [
        line
        for key, said in ODD.items()
        if (odd := task.get(key)) and odd["count"]
        for line in _wrapped([f"{whose}{odd['count']:,} answers ({odd['share']:.1%}) {said}"])
    ]


def _differences(against: Mapping[str, Any], interval: str, tests: int) -> Table:
    columns = ["metric", "difference", interval, "p"] + (["p (Holm)"] if tests > 1 else [])
    rows = []
    for key, gain in against["difference"].items():
        rows.append([key, f"{gain['value']:+{_digits(gain['value'])}}", bounds(gain)])
        rows[-1].append(chance(gain["p_value"]))
        if tests > 1:
            rows[-1].append(chance(gain["p_holm"]))
    return Table(f"against {against['name']}", columns, rows, _counted(against))


def _counted(against: Mapping[str, Any]) -> list[str]:
    """A line about the rows that changed, for a task of predictions."""
    changed = against.get("changed")
    if not changed or not changed["metric"]:
        return []
    count = changed["count"]
    return [
        f"answers by {changed['metric']}: {count['better']:,} better, {count['worse']:,} worse, "
        f"{count['same']:,} the same"
    ]


def _changed(against: Mapping[str, Any]) -> Iterator[Table]:
    """The rows that changed most, both ways, for a task of predictions."""
    changed = against.get("changed")
    if not changed or not changed["metric"]:
        return
    for way in ("better", "worse"):
        rows = [
            [*map(_brief, (row["prediction"], row["against"])), str(row["row"]), _gain(row)]
            for row in changed[way][:SHOWN]
        ]
        if rows:
            title = f"{way} by {changed['metric']}, those that changed most"
            yield Table(title, ["tuned", _called(against["name"]), "row", "gain"], rows)


def _gain(row: Mapping[str, Any]) -> str:
    return f"{row['gain']:+.3g}"


def _brief(text: str) -> str:
    """The beginning of an answer on one line of its column."""
    line = contrasts.visible(" ".join(text[: 4 * WIDTH].split())) or "(empty)"
    if len(text) <= 4 * WIDTH and cell_len(line) <= WIDTH:
        return line
    return f"{set_cell_size(line, WIDTH - 3).rstrip()}..."


def _spread(spread: Mapping[str, Any], wordings: int) -> Table:
    columns = ["metric", "mean", "worst", "best", "spread"]
    rows = [[key, *(number(each[part]) for part in columns[1:])] for key, each in spread.items()]
    return Table(f"over {wordings} wordings", columns, rows)


def _called(name: str) -> str:
    """A rival's name as a column's: the base, or the other one."""
    return "base" if name == "base" else "other"


def number(value: float) -> str:
    """A value with the digits that say something beside its interval."""
    return f"{value:{_digits(value)}}"


def _digits(value: float) -> str:
    return ".3f" if abs(value) < 10 else ".2f" if abs(value) < 1000 else ",.0f"


def bounds(score: Mapping[str, float]) -> str:
    """An interval."""
    return f"[{number(score['low'])}, {number(score['high'])}]"


def chance(p_value: float) -> str:
    """A p-value: three digits."""
    return f"{p_value:.3f}" if p_value >= 0.001 else f"{p_value:.1e}"
