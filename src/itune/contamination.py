"""Held-out rows that are in the training data too: the same row, or thirteen words in a row of it.

The smaller, held-out side is indexed and the training side streams past, so memory follows from the
held-out rows alone. Templates are left out of the words: what every prompt says is no leak.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from itune import errors, formats, recipes, runs, samples, sources, storage
from itune.metrics import words as word_cutter

N = 13  # words: Brown et al. 2020, appendix C
NAMED = 3  # training rows that are named beside a held-out one
BATCH = 1000
FILE = "contamination.jsonl"
FACTOR = 0x9E3779B97F4A7C15  # odd, so that no power of it loses a bit


@dataclass(frozen=True, slots=True)
class Place:
    """A row, from 0, of a source: its number in the recipe, from 0, and its path."""

    source: int
    path: str
    row: int

    def __str__(self) -> str:
        return f"{self.path} row {self.row + 1}"


@dataclass(frozen=True, slots=True)
class Pair:
    """A held-out row and a training row that has it (`exact`) or a passage of it (`ngram`)."""

    kind: str
    eval: Place
    train: Place
    words: str


@dataclass(frozen=True)
class Found:
    """Every held-out row that was met in training, with up to NAMED training rows each.

    `rows`: how many rows each held-out source has. A row that is exact is not listed as ngram.
    """

    rows: tuple[int, ...]
    pairs: tuple[Pair, ...]

    def counts(
        self, source: int | None = None, among: Container[int] | None = None
    ) -> dict[str, int]:
        """Held-out rows by kind: of all sources or one, of all its rows or those `among` these."""
        return {
            kind: len(
                {
                    (pair.eval.source, pair.eval.row)
                    for pair in self.pairs
                    if pair.kind == kind
                    and source in (None, pair.eval.source)
                    and (among is None or pair.eval.row in among)
                }
            )
            for kind in ("exact", "ngram")
        }


def together(found: Sequence[Found | None]) -> Found | None:
    """What any of several trainings met of the same held-out rows; None where one is not known."""
    known = [each for each in found if each is not None]
    if len(known) < len(found):
        return None
    pairs = [pair for each in known for pair in each.pairs]
    whole = {pair.eval for pair in pairs if pair.kind == "exact"}
    return Found(known[0].rows, tuple(p for p in pairs if p.kind == "exact" or p.eval not in whole))


# --- what is compared ---------------------------------------------------------------------


class _Side(samples.Opened):
    """The rows of a source as texts to compare."""

    def place(self, row: int) -> Place:
        """Where a row of this source is."""
        return Place(self.number, self.source.path, self.number_of(row))

    def texts(self) -> Iterator[tuple[int, bytes, list[str]]]:
        """For each row its number, a digest of prompt and answer, and its passages."""
        for start, batch in self.batches(BATCH):
            for index, row in enumerate(batch, start):
                if self.plain and formats.is_blank(row):
                    continue
                example = self.example(index, row, 0)
                yield index, _digest(example), self._passages(row, example)

    def _passages(self, row: Mapping[str, Any], example: formats.Example) -> list[str]:
        """The texts of a row itself: the columns that its template reads, or what is said."""
        if example.text is not None:
            return [example.text]
        if self.columns:
            return [text for name in self.columns for text in _strings(row.get(name))]
        return [message.content for message in example.messages if message.role != "system"]


def _digest(example: formats.Example) -> bytes:
    said = [f"{m.role}: {m.content}" for m in example.messages if m.role != "system"]
    text = " ".join((example.text or "\n".join(said)).split())
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _strings(each)


# --- finding ------------------------------------------------------------------------------


def find(train: Sequence[recipes.Source], held: Sequence[recipes.Source]) -> Found:
    """Every held-out row that the training data has, whole or in part.

    Exact: prompt and answer are the same, but for white space. N-grams are compared as words in
    lower case, without punctuation; of scripts without spaces a character is a word. Raises
    DataError for a broken row.
    """
    return _find([_Side(*each) for each in enumerate(train)], [_Side(*e) for e in enumerate(held)])


def _find(train: Sequence[_Side], held: Sequence[_Side]) -> Found:
    index = _Index(held)
    for side in train:
        index.meet(side)
    return Found(tuple(len(side) for side in held), tuple(index.pairs(train)))


def _hashes(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each N words begin that hold no 0, and a hash of 64 bits of them."""
    if len(ids) < N:
        return np.zeros(0, np.int64), np.zeros(0, np.uint64)
    state = ids.astype(np.uint64) * np.uint64(0xD6E8FEB86659FD93)
    state ^= state >> np.uint64(32)
    state *= np.uint64(0xD6E8FEB86659FD93)
    state ^= state >> np.uint64(29)
    count = len(ids) - N + 1
    sums = np.zeros(count, np.uint64)
    for k in range(N):
        sums = sums * np.uint64(FACTOR) + state[k : k + count]
    sums ^= sums >> np.uint64(32)
    breaks = np.concatenate([[0], np.cumsum(ids == 0)])
    starts = np.flatnonzero(breaks[N:] == breaks[:count])
    return starts, sums[starts]


class _Index:
    """Digests and n-grams of the held-out rows, and where in training each was met first."""

    def __init__(self, held: Sequence[_Side]) -> None:
        self.words = [""]  # 0 stands for a word that no held-out row has, and for a border
        self.numbers: dict[str, int] = {}
        self.places: list[Place] = []
        self.digests: list[bytes] = []
        ids: list[np.ndarray] = []
        lengths: list[int] = []
        for side in held:
            for row, digest, passages in side.texts():
                self.places.append(side.place(row))
                self.digests.append(digest)
                numbers = self._numbered(passages, self._learn)
                ids.append(np.array(numbers, np.int32))
                lengths.append(len(numbers))
        self.ids = np.concatenate(ids) if ids else np.zeros(0, np.int32)
        self.row_starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.starts, grams = _hashes(self.ids)
        self.grams, self.gram_at = np.unique(grams, return_inverse=True)
        self.met = np.full(len(self.grams), -1, np.int64)
        self.exact: dict[bytes, list[tuple[int, int]]] = {each: [] for each in self.digests}

    def _learn(self, word: str) -> int:
        if word not in self.numbers:
            self.numbers[word] = len(self.words)
            self.words.append(word)
        return self.numbers[word]

    def _numbered(self, passages: Sequence[str], number: Callable[[str], int]) -> list[int]:
        out: list[int] = []
        for passage in passages:
            out += map(number, word_cutter.words(passage))
            out.append(0)
        return out

    def meet(self, side: _Side) -> None:
        """Note what of the held-out rows this training source has."""
        numbers = self.numbers

        def known(word: str) -> int:
            return numbers.get(word, 0)

        flat: list[int] = []
        begins: list[int] = []
        first = 0
        for row, digest, passages in side.texts():
            places = self.exact.get(digest)
            if places is not None and len(places) < NAMED:
                places.append((side.number, row))
            begins.append(len(flat))
            flat += self._numbered(passages, known)
            if len(begins) == BATCH:
                self._note(side, first, flat, begins)
                flat, begins, first = [], [], row + 1
        self._note(side, first, flat, begins)

    def _note(self, side: _Side, first: int, flat: list[int], begins: list[int]) -> None:
        starts, grams = _hashes(np.array(flat, np.int32))
        if not len(grams) or not len(self.grams):
            return
        found = np.minimum(np.searchsorted(self.grams, grams), len(self.grams) - 1)
        hit = self.grams[found] == grams
        new, at = np.unique(found[hit], return_index=True)
        rows = first + np.searchsorted(begins, starts[hit][at], side="right") - 1
        fresh = self.met[new] < 0
        self.met[new[fresh]] = side.number << 40 | rows[fresh]

    def pairs(self, train: Sequence[_Side]) -> Iterator[Pair]:
        """The pairs found, in the order of the held-out rows."""
        borders = np.searchsorted(self.starts, self.row_starts)
        for k, place in enumerate(self.places):
            exact = self.exact[self.digests[k]]
            for number, row in exact:
                words = self._words(self.row_starts[k], self.row_starts[k + 1])
                yield Pair("exact", place, train[number].place(row), words)
            if exact:
                continue
            inside = slice(borders[k], borders[k + 1])
            met = self.met[self.gram_at[inside]]
            names, counts = np.unique(met[met >= 0], return_counts=True)
            for name in names[np.argsort(-counts, kind="stable")][:NAMED]:
                start, end = _longest(self.starts[inside][met == name])
                where = train[int(name) >> 40].place(int(name) & (1 << 40) - 1)
                yield Pair("ngram", place, where, self._words(start, end + N))

    def _words(self, start: int, end: int) -> str:
        return " ".join(self.words[id_] for id_ in self.ids[start:end] if id_)


def _longest(starts: np.ndarray) -> tuple[int, int]:
    """First and last of the longest run of numbers that follow each other."""
    runs_of = np.split(starts, np.flatnonzero(np.diff(starts) != 1) + 1)
    best = max(runs_of, key=len)
    return int(best[0]), int(best[-1])


# --- kept in the run's folder -------------------------------------------------------------


def of_training(recipe: recipes.Recipe, run: runs.Run, *, keep: bool = True) -> Found | None:
    """What training meets of the held-out rows; None where the recipe has none of these.

    Written to the run's folder with `keep`, and read from there as long as the data is the same.
    """
    if not recipe.data.eval:
        return None
    train, held = _sides(recipe.data.train), _sides(recipe.data.eval)
    marks = {"train": [side.mark for side in train], "eval": [side.mark for side in held]}
    kept = _read(run)
    if kept is not None and kept[0] == marks:
        return kept[1]
    found = _find(train, held)
    if keep:
        write(run.dir / FILE, found)
        run.update(contamination={"marks": marks, "rows": found.rows, **found.counts()})
    return found


def of_scoring(recipe: recipes.Recipe, run: runs.Run, say: Callable[[str], None]) -> Found | None:
    """The same for scores: as training left it, or found anew where the held-out data is other.

    None, and why is said, where the training data cannot be read any more.
    """
    held = _sides(recipe.data.eval)
    kept = _read(run)
    if kept is not None and kept[0]["eval"] == [side.mark for side in held]:
        return kept[1]
    try:
        train = _sides(recipe.data.train)
    except (errors.UserError, errors.EnvironmentRefusal) as error:
        say(f"contamination: not looked for, the training data cannot be read: {error}")
        return None
    return _find(train, held)


def _sides(sources: Sequence[recipes.Source]) -> list[_Side]:
    return [_Side(number, source) for number, source in enumerate(sources)]


def write(path: Path, found: Found) -> None:
    """A line for each pair: `kind`, `eval`, `train`, `words`; rows count from 0."""
    lines = [
        runs.to_json(
            {"kind": pair.kind, "eval": _named(pair.eval), "train": _named(pair.train)}
            | {"words": pair.words}
        )
        for pair in found.pairs
    ]
    storage.write(path, "".join(f"{line}\n" for line in lines))


def _named(place: Place) -> dict[str, Any]:
    return {"source": place.source, "path": place.path, "row": place.row}


def _read(run: runs.Run) -> tuple[dict[str, Any], Found] | None:
    record, path = run.manifest.get("contamination"), run.dir / FILE
    if record is None or not path.is_file():
        return None
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            pair = json.loads(line)
            pairs.append(
                Pair(pair["kind"], Place(**pair["eval"]), Place(**pair["train"]), pair["words"])
            )
        except (ValueError, TypeError, KeyError) as error:
            raise errors.RunError(
                f"{path}:{number}: damaged. Delete the file, and it is made anew."
            ) from error
    return record["marks"], Found(tuple(record["rows"]), tuple(pairs))


# --- what is said -------------------------------------------------------------------------


def check(recipe: recipes.Recipe, run: runs.Run, say: Callable[[str], None], *, keep: bool) -> None:
    """Look for held-out rows in what a run trains on; those of `pretrain` are never refused."""
    found = of_training(recipe, run, keep=keep)
    if found is not None:
        allowed = recipe.data.allow_overlap or run.manifest["command"] == "pretrain"
        cure = _of_one_split(recipe) if found.counts()["exact"] and not allowed else ""
        heed(found, run.dir, say, allowed=allowed, cure=cure)


def _of_one_split(recipe: recipes.Recipe) -> str:
    """What to do where the same split of the same source stands on both sides."""
    for held in recipe.data.eval:
        for train in recipe.data.train:
            one, other = (
                each.model_dump(include={"path", "name", "revision", "data_files", "field"})
                for each in (held, train)
            )
            split = held.split or "train"
            if one != other or split != (train.split or "train") or "[" in split:
                continue
            others = [each for each in sources.splits(held) if each != split]
            if others:
                default = "" if held.split else ", as no other is named"
                return (
                    f"Both sides read the split {split} of {held.path}{default}: set that of "
                    f"data.eval to {' or '.join(others)}"
                )
            return (
                f"Both sides read all of {held.path}: give each a part, such as split: "
                f'"{split}[:90%]" for data.train and split: "{split}[90%:]" for data.eval'
            )
    return ""


def heed(
    found: Found, folder: Path, say: Callable[[str], None], *, allowed: bool, cure: str = ""
) -> None:
    """Say what was found. Raises DataError for rows on both sides, unless that is allowed.

    `cure`: what to do about them, where more is known than that they are there.
    """
    counts, total, path = found.counts(), sum(found.rows), folder / FILE
    if counts["exact"]:
        text = (
            f"data.eval: {counts['exact']:,} of its {total:,} rows are in data.train too: "
            f"{'; '.join(_first_pairs(found))}."
        )
        if not allowed:
            raise errors.DataError(
                f"{text} A score on rows that were trained on proves nothing. "
                f"{cure or 'Take them out of one side'}, or set data.allow_overlap: true. "
                f"All are in {path}."
            )
        say(f"warning: {text} All are in {path}.")
    if counts["ngram"]:
        say(
            f"contamination: {counts['ngram']:,} of {total:,} held-out rows share {N} words or "
            f"more with training rows; they are in {path}"
        )
    if not any(counts.values()):
        say(f"contamination: none of {total:,} held-out rows was found in the training data")


def _first_pairs(found: Found) -> list[str]:
    first: dict[Place, Place] = {}
    for pair in found.pairs:
        if pair.kind == "exact":
            first.setdefault(pair.eval, pair.train)
    return [f"{held} = {train}" for held, train in list(first.items())[:3]]
