"""What became of the rows of a source: kept, cut, left out, empty, the same as others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from itune import cache, errors, preparing, recipes, templates


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of the rows: how many, how many tokens, how many of them are learnt.

    `read` = `rows` (kept) + `dropped` + `empty`. Of those dropped, `too_long` do not fit with
    their answer whole, the others have nothing to learn. `duplicated` rows say what an earlier
    one says; they are kept. `guarded` examples hold control strings of the model, kept as text;
    `allowed` ones hold control tokens in answers, as their source allows.
    """

    rows: int
    tokens: int
    supervised: int
    truncated: int
    dropped: int
    read: int = 0
    too_long: int = 0
    empty: int = 0
    duplicated: int = 0
    guarded: int = 0
    allowed: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """What became of a source. `rows`: a digest that changes when the rows do; `template`: one of
    what is made of them. `held`: control strings that answers hold as text though they could be
    allowed, and in how many examples each. `answers`: of how many rows each of the template's
    choices is the answer; empty where it has none.
    """

    path: str
    read_as: str
    commit: str | None
    counts: Counts
    rows: str = ""
    notes: tuple[str, ...] = ()
    held: Mapping[str, int] = dataclasses.field(default_factory=dict)
    template: str = ""
    answers: Mapping[str, int] = dataclasses.field(default_factory=dict)


def repeats(keys: np.ndarray) -> int:
    """How many of the digests of rows stand before an equal one."""
    ordered = np.sort(keys)
    return int((ordered[1:] == ordered[:-1]).sum())


def dropped(part: preparing.Part) -> int:
    """Rows of a source that are left out, though they are not empty."""
    return int(part.known["read"] - part.known["kept"] - part.known["empty"])


def report(part: preparing.Part) -> Report:
    """What became of a source's rows, and what tells whether they are the same another time."""
    known, keys = part.known, part.column("keys", "uint64")
    return Report(
        path=part.rows.source.path,
        read_as=part.reading.told or f"template {part.reading.task.name}",
        commit=part.rows.commit,
        counts=Counts(
            rows=known["kept"],
            tokens=known["tokens"],
            supervised=int(part.column("targets").sum()),
            truncated=int(part.column("truncated").sum()),
            dropped=dropped(part),
            duplicated=repeats(keys) - max(0, known["empty"] - 1),
            **{name: known[name] for name in ("read", "too_long", "empty", "guarded", "allowed")},
        ),
        rows=cache.fingerprint(part.rows.identity)[:32],
        notes=(*part.rows.notes, *_turned(known)),
        held=known["held"],
        template=_template(part.reading.template),
        answers={text: known["answers"].get(text, 0) for text in part.reading.choices},
    )


def _template(template: templates.Template | None) -> str:
    """The digest of all of a template that decides what a row becomes; "" where there is none."""
    if template is None:
        return ""
    return cache.fingerprint(template.model_dump(mode="json", exclude={"metrics"}))[:32]


def _turned(known: dict[str, Any]) -> Iterator[str]:
    if known["turned"]:
        yield (
            f"{known['turned_at']} shows text in another order than the model reads it; "
            f"{known['turned']:,} such row{'s' * (known['turned'] > 1)}. Look at what it hides."
        )


def refuse_loss(
    part: preparing.Part, training: recipes.Training, max_dropped: float | None
) -> None:
    """Raise DataError where more of a source is left out than may be, or all of it."""
    known, path = part.known, part.rows.source.path
    lost = dropped(part)
    if known["kept"] and (max_dropped is None or lost <= max_dropped * known["read"]):
        return
    low, middle, most, longest = known["lengths"]
    cure = (
        f"Their lengths in tokens: {low} (5%), {middle} (half), {most} (95%), {longest} (longest). "
        f"training.max_length: {most} keeps 95% of them whole"
    )
    if known["kept"]:
        raise errors.DataError(
            f"{path}: {lost:,} of {known['read']:,} rows would be left out, more than "
            f"data.max_dropped ({max_dropped:g}): {known['too_long']:,} do not fit "
            f"training.max_length ({training.max_length}) with their answer whole, "
            f"{lost - known['too_long']:,} have nothing to learn. {cure}; or set "
            "data.max_dropped."
        )
    if not lost:
        raise errors.DataError(f"{path}: 0 rows, all {known['read']:,} are empty.")
    if not known["too_long"]:
        raise errors.DataError(
            f"{path}: none of its {known['read']:,} rows has anything to learn: the answers are "
            "empty. Check the template."
        )
    raise errors.DataError(
        f"{path}: none of its {known['read']:,} rows fits training.max_length "
        f"({training.max_length} tokens) with its answer whole. {cure}."
    )
