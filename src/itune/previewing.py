"""What `--preview` shows: the first examples of the first epoch as tokens, and a table of all.

Nothing but what is shown is encoded. The order of an epoch follows from row numbers alone, so the
examples are the very first ones that training sees; the table is made from the rows that come first
in that order, as many as a second or two can encode.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from itune import canaries, console, data, encoding, firsts, recipes

SAMPLE_ROWS = 2000  # chosen: a share of it is known to within two points
SAMPLE_TOKENS = 2_000_000  # chosen: about a second of tokenizing
CHUNK = 100
BINS = 16


# --- the table ----------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of the rows looked at, of one source, in one wording of it or in all; of a
    stream (`streamed`) those are among its first rows."""

    source: str
    wording: int | None
    streamed: bool = False
    rows: int = 0
    supervised: int = 0
    truncated: int = 0
    dropped: int = 0
    empty: int = 0
    guarded: int = 0
    allowed: int = 0
    lengths: list[int] = field(default_factory=list)

    def add(self, made: Sequence[data.Encoded], *, empty: bool = False) -> None:
        """Count one row by its examples; without any it is dropped, if it was not empty."""
        self.rows += bool(made)
        self.empty += empty
        self.dropped += not made and not empty
        for each in made:
            self.lengths.append(len(each.tokens.ids))
            self.supervised += sum(each.tokens.supervised[1:])  # nothing predicts the first token
            self.truncated += each.truncated
            self.guarded += each.tokens.guarded
            self.allowed += each.tokens.allowed > 0

    @property
    def tokens(self) -> int:
        """Tokens of all the examples."""
        return sum(self.lengths)

    def quantiles(self) -> list[int]:
        """Lengths in tokens: the least, median, 90%, 99%, the greatest."""
        if not self.lengths:
            return [0] * 5
        found = np.quantile(self.lengths, [0, 0.5, 0.9, 0.99, 1], method="inverted_cdf")
        return [int(each) for each in found]


@dataclass
class Table:
    """Tallies over a sample of each source: `looked` of `total` rows, which of a stream are those
    that come first: how many more there are nobody knows (`whole.streamed`)."""

    looked: int
    total: int
    whole: Tally
    parts: list[Tally]

    @property
    def edges(self) -> np.ndarray:
        """Borders of the bins that lengths are sorted into, in tokens."""
        return np.linspace(0, max(self.whole.lengths, default=1), BINS + 1)


def tally(sources: Sequence[firsts.Rows]) -> Table:
    """Count what became of the rows: of all in a small source, of a sample in a large one."""
    table = Table(0, sum(len(source) for source in sources), Tally("all", None), [])
    table.whole.streamed = any(source.source.streaming for source in sources)
    names = _names([source.source for source in sources])
    for source, name in zip(sources, names, strict=True):
        sample = _sample(source, max(CHUNK, SAMPLE_ROWS // len(sources)), len(sources))
        table.looked += len(sample)
        every = Tally(name, None, source.source.streaming)
        for row in sample:
            made = source.known[row]
            empty = not made and source.is_empty(row)
            every.add(made, empty=empty)
            table.whole.add(made, empty=empty)
        table.parts.append(every)
        if source.n_wordings > 1:
            table.parts += _by_wording(source, name, sample)
    return table


def _sample(source: firsts.Rows, count: int, share: int) -> list[int]:
    """Encode the rows that come first in the epoch, until there are enough rows or tokens."""
    wanted = source.first(source.training.seed, count)
    tokens = 0
    for start in range(0, len(wanted), CHUNK):
        chunk = wanted[start : start + CHUNK]
        source.encode(chunk)
        tokens += sum(len(each.tokens.ids) for row in chunk for each in source.known[row])
        if tokens > SAMPLE_TOKENS // share:
            return wanted[: start + CHUNK]
    return wanted


def _by_wording(source: firsts.Rows, name: str, sample: Sequence[int]) -> list[Tally]:
    out = [Tally(name, wording, source.source.streaming) for wording in range(source.n_wordings)]
    visits = range(math.ceil(source.source.weight))
    for row in sample:
        for wording in {source.wording(visit, row) for visit in visits}:
            out[wording].add([each for each in source.known[row] if each.wording == wording])
    return out


def _names(sources: Sequence[recipes.Source]) -> list[str]:
    """A name for each source: its path, and what tells it from another of the same path."""
    paths = Counter(source.path for source in sources)
    return [
        " ".join([source.path, *filter(None, [source.name, source.split, source.template])])
        if paths[source.path] > 1
        else source.path
        for source in sources
    ]


# --- what is shown ------------------------------------------------------------------------


def show(
    recipe: recipes.Recipe,
    encoder: encoding.Encoder,
    number: int,
    screen: console.Screen,
    *,
    command: str = "",
    verbose: bool = False,
) -> dict[str, Any]:
    """Show `number` examples and the table; returns both as plain data.

    `command`: for which the rows are read, as `formats.reading` takes it. `verbose`: every token
    apart, with its id. Raises DataError for a broken row, or one that the command cannot use.
    """
    sources = [
        firsts.Rows(k, source, encoder, recipe.training, command)
        for k, source in enumerate(canaries.planted(recipe, encoder.family, command=command))
    ]
    shown = firsts.first(sources, number)
    for source in sources:
        for line in source.told:
            screen.say(line)
    screen.legend()
    for k, (source, example) in enumerate(shown, 1):
        title = _title(k, len(shown), source, example)
        screen.example(title, stretches(encoder, example.tokens, single=verbose))
    table = tally(sources)
    _show_table(table, screen)
    for line in _besides(table.whole):
        screen.say(line)
    for line in _refused(table, recipe.data.max_dropped):
        screen.say(line)
    return {
        "examples": [_plain(encoder, *each) for each in shown],
        "counts": counts(table),
    }


def _title(k: int, of: int, source: firsts.Rows, example: data.Encoded) -> str:
    parts = [f"example {k} of {of}", f"{_row(source, example)}"]
    if source.n_wordings > 1:
        parts.append(f"wording {example.wording + 1} of {source.n_wordings}")
    pieces = source.known[example.row]
    if source.plain and len(pieces) > 1:  # text longer than training.max_length, cut as trained on
        which = next(n for n, piece in enumerate(pieces, 1) if piece is example)
        parts.append(f"piece {which} of {len(pieces)}")
    ids, learnt = example.tokens.ids, sum(example.tokens.supervised[1:])
    parts.append(f"{len(ids)} tokens, {learnt} supervised")
    if example.truncated:
        parts.append("truncated")
    return ", ".join(parts)


def _row(source: firsts.Rows, example: data.Encoded) -> str:
    return f"{source.source.path} row {source.number_of(example.row) + 1}"


def _plain(encoder: encoding.Encoder, source: firsts.Rows, example: data.Encoded) -> dict[str, Any]:
    return {
        "text": _decoded(encoder, example.tokens.ids),
        "ids": example.tokens.ids,
        "supervised": example.tokens.supervised,
        "source": source.source.path,
        "row": source.number_of(example.row),
        "wording": example.wording,
    }


def _decoded(encoder: encoding.Encoder, ids: Sequence[int]) -> str:
    return str(encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def stretches(
    encoder: encoding.Encoder, tokens: encoding.Tokens, *, single: bool = False
) -> list[console.Stretch]:
    """Neighbouring tokens of one kind as their text; each control token, or `single`, all, apart.

    Texts are what the ids decode to as a whole, so that a space which a tokenizer drops at the
    start of a text is where the model has it.
    """
    ids, supervised = tokens.ids, tokens.supervised
    controls = [id_ in encoder.control for id_ in ids]
    out, start = [], 0
    for end in range(1, len(ids) + 1):
        kind = (supervised[start], controls[start])
        if end < len(ids) and kind == (supervised[end], controls[end]) and not (single or kind[1]):
            continue
        text = _text_of(encoder, ids, start, end)
        out.append(console.Stretch(text, *kind, ids[start] if single else None))
        start = end
    return out


def _text_of(encoder: encoding.Encoder, ids: Sequence[int], start: int, end: int) -> str:
    near = max(0, start - 8)  # enough to know the space before, and quick for long examples
    before, whole = _decoded(encoder, ids[near:start]), _decoded(encoder, ids[near:end])
    text = whole[len(before) :] if whole.startswith(before) else _decoded(encoder, ids[start:end])
    if text and "\ufffd" not in text:
        return text
    if end > start + 1:  # a part of a character at one end: each token as far as it goes
        return "".join(_text_of(encoder, ids, k, k + 1) for k in range(start, end))
    return str(encoder.tokenizer.convert_ids_to_tokens(ids[start]))


def counts(table: Table) -> dict[str, Any]:
    """The table as plain data; `sampled` of `of` rows were looked at, which are the first of a
    stream and not all of it where it is `streamed`."""
    edges = table.edges
    return {
        "sampled": table.looked,
        "of": table.total,
        **_counted(table.whole, edges),
        "sources": [
            {"source": part.source, "wording": part.wording, **_counted(part, edges)}
            for part in table.parts
        ],
    }


def _counted(part: Tally, edges: np.ndarray) -> dict[str, Any]:
    least, median, p90, p99, greatest = part.quantiles()
    return {
        "streamed": part.streamed,
        "rows": part.rows,
        "tokens": part.tokens,
        "supervised": part.supervised,
        "truncated": part.truncated,
        "dropped": part.dropped,
        "empty": part.empty,
        "guarded": part.guarded,
        "allowed": part.allowed,
        "lengths": {"min": least, "median": median, "p90": p90, "p99": p99, "max": greatest},
        "histogram": {
            "edges": [round(float(edge), 1) for edge in edges],
            "counts": np.histogram(part.lengths, edges)[0].tolist(),
        },
    }


def _besides(whole: Tally) -> Iterator[str]:
    """What became of empty rows and of the control strings in texts."""
    if whole.empty:
        rows = "1 of these rows is" if whole.empty == 1 else f"{whole.empty:,} of these rows are"
        yield f"{rows} empty, such as blank lines, and left out."
    if whole.guarded:
        yield (
            f"{whole.guarded:,} of these examples hold control strings of the model, which stay "
            "text; those of answers may be learnt as tokens, see allow_control_tokens."
        )
    if whole.allowed:
        yield f"{whole.allowed:,} of these examples hold control tokens in answers, as allowed."


def _refused(table: Table, most: float) -> Iterator[str]:
    """What the command would refuse to begin with, going by the rows looked at."""
    for part in table.parts:
        looked = part.rows + part.dropped + part.empty
        if part.wording is None and part.dropped > most * looked:
            yield (
                f"warning: {part.source}: {part.dropped:,} of the {looked:,} rows looked at would "
                f"be left out, more than data.max_dropped ({most:g}), which ends the command. "
                "Raise training.max_length, or take them out."
            )


def _show_table(table: Table, screen: console.Screen) -> None:
    several = len({part.source for part in table.parts}) > 1
    parts = [*table.parts, table.whole] if several else table.parts
    if table.whole.streamed:
        title = f"training data, from {table.looked:,} of the first {table.total:,} rows read"
    elif table.looked < table.total:
        title = f"training data, from {table.looked:,} of {table.total:,} rows"
    else:
        title = f"training data, all {table.total:,} rows"
    names = [(console.elided(part.source, 24), _wording(part)) for part in parts]
    screen.table(
        title,
        ["source", "wording", "rows", "tokens", "supervised", "truncated", "dropped"],
        [
            [
                *name,
                f"{part.rows:,}",
                f"{part.tokens:,}",
                f"{part.supervised / max(1, part.tokens):.1%}",
                f"{part.truncated:,}",
                f"{part.dropped:,}",
            ]
            for name, part in zip(names, parts, strict=True)
        ],
    )
    edges = table.edges
    screen.table(
        f"\nlengths in tokens; the bars go from 0 to {edges[-1]:,.0f}",
        ["source", "wording", "min", "median", "90%", "99%", "max", "examples by length"],
        [
            [
                *name,
                *(f"{each:,}" for each in part.quantiles()),
                screen.bars(np.histogram(part.lengths, edges)[0].tolist()),
            ]
            for name, part in zip(names, parts, strict=True)
        ],
    )


def _wording(part: Tally) -> str:
    return "all" if part.wording is None else str(part.wording + 1)
