"""One source's rows become tokens in files of itune's cache, a batch at a time."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import mmap
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import itune
from itune import (
    cache,
    cases,
    collecting,
    encoding,
    errors,
    fitting,
    formats,
    recipes,
    signals,
    sources,
    spreading,
    templates,
)
from itune.collecting import Encoded as Encoded

BATCH = 1000
TEXTS = 100  # rows of plain text may be whole books
CHARACTERS = 1 << 19  # chosen: of documents that are tokenised together
# chosen: from here on several processes are worth the time that it takes to start them.
LARGE = 8 << 20
LARGE_STREAM = 1_000_000
# chosen: so many batches of rows are a few megabytes of what stays mapped.
RELEASED = 10
# Linux's number for "these pages are not needed soon"; their content stays what it is.
MADV_PAGEOUT = 21
_read_so_far = itertools.count()  # batches, in this process
Numbered = tuple[int, Mapping[str, Any]]  # a row and its number, from 0


@dataclass(frozen=True)
class Part:
    """One source as it was prepared: its folder, what is known of it, and how it was read."""

    folder: Path
    known: dict[str, Any]
    rows: sources.Rows
    reading: formats.Reading

    def column(self, name: str, dtype: str = "int32") -> np.ndarray:
        """A file of the folder as a flat array that is mapped, not read."""
        path = self.folder / f"{name}.bin"
        if path.stat().st_size == 0:
            return np.zeros(0, dtype)
        return np.memmap(path, dtype, "r")


def prepared(
    source: recipes.Source,
    encoder: encoding.Encoder,
    training: recipes.Training,
    *,
    visits: int | None,
    command: str,
) -> Part:
    """A source read, rendered and encoded; from the cache where nothing has changed.

    `visits`: how many wordings a row is seen in; None for all. Raises DataError.
    """
    rows = sources.read(source)
    how = cases.reading(rows, command)
    job = Job(rows, how, encoder, training, visits if how.wordings > 1 else None)
    folder, known = cache.entry("tokens", job.fingerprint(), job.write)
    return Part(folder, known, rows, how)


# The modules by which a row's tokens are decided: with other code the cache is another.
DECIDING = (
    "cases",
    "chats",
    "collecting",
    "cutting",
    "encoding",
    "families",
    "files",
    "fitting",
    "formats",
    "guarding",
    "preparing",
    "sandbox",
    "sources",
    "expressions",
    "templates",
    "tokenizing",
    "unpacking",
)


@functools.lru_cache(maxsize=1)
def _code() -> str:
    """The digest of the code that decides what a row's tokens are."""
    made = hashlib.sha256(itune.__version__.encode())
    for name in DECIDING:
        made.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return made.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """The digest of all of a tokenizer that decides which ids a text has."""
    special = sorted((key, str(value)) for key, value in tokenizer.special_tokens_map.items())
    text = f"{tokenizer.backend_tokenizer.to_str()}{tokenizer.chat_template}{special}"
    return hashlib.sha256(text.encode()).hexdigest()


def release(data: Any) -> None:
    """Let the system take back the memory of rows that are mapped from files.

    What was read once otherwise counts as ours until memory is short: a job limited to so much
    memory would look as if it held the whole file. Systems without this advice ignore it.
    """
    if not sys.platform.startswith("linux"):
        return
    advise = ctypes.CDLL(None).madvise
    for column in data.data.table.columns:
        for chunk in column.chunks:
            for buffer in filter(None, chunk.buffers()):
                start = -(-buffer.address // mmap.PAGESIZE) * mmap.PAGESIZE
                end = (buffer.address + buffer.size) // mmap.PAGESIZE * mmap.PAGESIZE
                if end > start:
                    advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_PAGEOUT)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A row in one wording, to be encoded; `cut`: without its last turns, which cannot fit.

    `hopeless`: its answer cannot fit, so it is not encoded at all.
    """

    index: int
    row: Mapping[str, Any]
    wording: int
    example: formats.Example
    cut: bool = False
    hopeless: bool = False


@dataclass(frozen=True)
class Job:
    """What is to be prepared, and all that it follows from."""

    rows: sources.Rows
    reading: formats.Reading
    encoder: encoding.Encoder
    training: recipes.Training
    visits: int | None

    @functools.cached_property
    def _encoder(self) -> encoding.Encoder:
        """The encoder, told of the choices that the template has and of what answers may hold."""
        return cases.bound(self.encoder, self.rows, self.reading)

    @property
    def budget(self) -> int | None:
        """Tokens that a stream is read for; None for all of it."""
        training = self.training
        if not self.rows.source.streaming or training.max_steps <= 0:
            return None
        return training.max_steps * training.tokens_per_step

    def fingerprint(self) -> str:
        """The name of the result in the cache."""
        template = self.reading.template
        return cache.fingerprint(
            {
                "code": _code(),
                "rows": self.rows.identity,
                "template": None if template is None else template.model_dump(mode="json"),
                "format": self.reading.format,
                "family": self.encoder.family,
                "tokenizer": tokenizer_digest(self.encoder.tokenizer),
                "max_length": self.training.max_length,
                "train_on": self.training.train_on,
                "allow_control_tokens": sorted(self.rows.source.allow_control_tokens),
                "seed": None if self.visits is None else self.training.seed,
                "visits": self.visits,
                "budget": self.budget,
            }
        )

    def write(self, folder: Path) -> dict[str, Any]:
        """Fill a folder; returns what is known of it, as plain data."""
        made = spreading.in_order(self._made, self._pieces(), self._workers())
        with collecting.Writer(folder) as out, contextlib.closing(made):
            for batch in made:
                signals.LISTENER.check()
                out.add(batch)
                read = out.whole.tally.tokens
                if self.budget and read >= self.budget * self.reading.wordings:
                    break
            return out.known()

    def _workers(self) -> int:
        source, data = self.rows.source, self.rows.data
        if source.streaming:
            large = self.budget is None or self.budget >= LARGE_STREAM
        else:
            large = data.data.nbytes >= LARGE
        return spreading.workers(source.num_proc, large=large)

    def examples(self, numbered: Sequence[Numbered]) -> list[Encoded]:
        """What training makes of a few rows; one that is dropped gives none."""
        out = collecting.Few()
        self._encode(out, numbered)
        return out.kept

    def _pieces(self) -> Iterator[range | list[Numbered]]:
        """Which rows are encoded together: by their numbers, those of a stream themselves."""
        size = TEXTS if self.reading.is_text else BATCH
        if self.rows.source.streaming:
            waiting = enumerate(self.rows.each())
            while batch := list(itertools.islice(waiting, size)):
                yield batch
            return
        for start in range(0, len(self.rows.data), size):
            yield range(start, min(start + size, len(self.rows.data)))

    def _made(self, piece: range | list[Numbered]) -> collecting.Batch:
        out = collecting.Batch()
        self._encode(out, self._read(piece) if isinstance(piece, range) else piece)
        return out

    def _read(self, numbers: range) -> list[Numbered]:
        if next(_read_so_far) % RELEASED == 0:
            release(self.rows.data)
        columns = self.rows.data[numbers.start : numbers.stop]
        values = zip(*columns.values(), strict=True)
        return [
            (k, dict(zip(columns, each, strict=True)))
            for k, each in zip(numbers, values, strict=True)
        ]

    def _encode(self, out: collecting.Out, batch: Sequence[Numbered]) -> None:
        (self._documents if self.reading.is_text else self._conversations)(out, batch)

    def _documents(self, out: collecting.Out, batch: Sequence[Numbered]) -> None:
        waiting: list[tuple[int, str]] = []
        for index, row in batch:
            if formats.is_blank(row):
                out.tally.empty += 1
                out.row("")
                continue
            text = cases.placed(self.rows, self.reading, index, row, 0).text or ""
            out.row(text)
            self._note(out, index, text)
            waiting.append((index, text))
            if sum(len(each) for _, each in waiting) > CHARACTERS:
                self._keep_documents(out, waiting)
                waiting.clear()
        self._keep_documents(out, waiting)

    def _keep_documents(self, out: collecting.Out, numbered: Sequence[tuple[int, str]]) -> None:
        made = self.encoder.pieces([text for _, text in numbered], self.training.max_length)
        for (index, _), pieces in zip(numbered, made, strict=True):
            for piece in pieces:
                out.keep(piece, index, 0, False)
            out.tally.kept += 1

    def _conversations(self, out: collecting.Out, batch: Sequence[Numbered]) -> None:
        jobs = [
            self._asked(index, row, wording)
            for index, row in batch
            for wording in self._needed(index)
        ]
        train_on = self.reading.train_on(self.training.train_on)
        encoded = iter(self._encoded([job for job in jobs if not job.hopeless], train_on))
        pairs = ((job, None if job.hopeless else next(encoded)) for job in jobs)
        for _, wordings in itertools.groupby(pairs, key=lambda pair: pair[0].index):
            self._keep_row(out, list(wordings), train_on)

    def _asked(self, index: int, row: Mapping[str, Any], wording: int) -> _Asked:
        """A row in a wording, without what is so far beyond what fits that it is cut anyhow."""
        limit, encoder, reading = self.training.max_length, self._encoder, self.reading
        near = fitting.near_row(row, reading, encoder, limit)
        example = cases.placed(self.rows, reading, index, near, wording)
        chat = reading.is_chat and not reading.prompt_columns()
        shorter = fitting.near_chat(example, encoder, limit) if chat else example
        if shorter is None or fitting.hopeless(shorter.messages[-1].content, encoder, limit):
            return _Asked(index, near, wording, example, hopeless=True)
        return _Asked(index, near, wording, shorter, cut=shorter is not example)

    def _keep_row(
        self,
        out: collecting.Out,
        wordings: list[tuple[_Asked, encoding.Tokens | None]],
        train_on: str,
    ) -> None:
        """One row in each of its wordings, cut where it is too long, left out where it must be."""
        limit, kept, too_long = self.training.max_length, False, False
        first = wordings[0][0].example
        text = "\x00".join(f"{m.role}\x00{m.content}" for m in first.messages)
        out.row(text)
        self._note(out, wordings[0][0].index, text)
        for job, tokens in wordings:
            out.full.append(2 * limit if tokens is None else len(tokens.ids))
            fitted = tokens
            if tokens is not None and len(tokens.ids) > limit:
                fitted = fitting.example(
                    job.example, self.reading, job.row, job.wording, self._encoder, limit, train_on
                )
            too_long |= fitted is None
            if fitted is not None and any(fitted.supervised[1:]):
                out.keep(fitted, job.index, job.wording, job.cut or fitted is not tokens)
                self._note_held(out, job.example, fitted)
                kept = True
        out.tally.kept += kept
        out.tally.too_long += too_long and not kept
        if kept and (answer := first.messages[-1].content) in self.reading.choices:
            out.tally.answers[answer] = out.tally.answers.get(answer, 0) + 1

    def _note(self, out: collecting.Out, index: int, text: str) -> None:
        """Count a row whose text shows in another order than the model reads it."""
        if sign := cases.turned(text):
            out.tally.turned += 1
            out.tally.turned_at = out.tally.turned_at or f"{self.rows.place(index)}: {sign}"

    def _note_held(
        self, out: collecting.Out, example: formats.Example, tokens: encoding.Tokens
    ) -> None:
        """Count the control strings that answers hold as text, where they need not."""
        if tokens.guarded:
            answers = [m.content for m in example.messages if m.role == "assistant"]
            for text in self._encoder.allowable:
                if any(text in answer for answer in answers):
                    out.tally.held[text] = out.tally.held.get(text, 0) + 1

    def _encoded(self, jobs: list[_Asked], train_on: str) -> list[encoding.Tokens]:
        try:
            return self._encoder.conversations(
                [job.example.messages for job in jobs], train_on=train_on
            )
        except errors.DataError:
            for job in jobs:  # which one is it?
                try:
                    self._encoder.conversation(job.example.messages, train_on=train_on)
                except errors.DataError as error:
                    raise errors.DataError(f"{self.rows.place(job.index)}: {error}") from error
            raise

    def _needed(self, row: int) -> list[int]:
        count, seed = self.reading.wordings, self.training.seed
        if self.visits is None or self.visits >= count:
            return list(range(count))
        return sorted({templates.wording_of(count, seed, n, row) for n in range(self.visits)})
