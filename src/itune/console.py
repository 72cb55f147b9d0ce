"""What the user sees: progress, tables, the preview; text from models and data shown inert."""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from itune import errors


def inert(text: str) -> str:
    """The text with everything that could drive a terminal spelt out; newlines and tabs stay."""
    return "".join(each if each in "\n\t" else errors.inert(each) for each in text)


def elided(text: str, width: int) -> str:
    """The text in at most `width` characters; of a long one the end, where names differ."""
    return text if len(text) <= width else f"...{text[3 - width :]}"


def spelt(text: str) -> str:
    """The text on one line, as Python would write it: spaces at its ends can be seen."""
    return repr(inert(text))


class Stretch(NamedTuple):
    """Text of neighbouring tokens of one kind; with `id` it is the token of that id."""

    text: str
    supervised: bool
    control: bool
    id: int | None = None


class Shade(NamedTuple):
    """A token in a style, and what is told of it."""

    text: str
    control: bool
    style: str
    note: str


class Signs(NamedTuple):
    """How a preview marks things where colour does not say it."""

    learnt: tuple[str, str]
    control: tuple[str, str]
    line: str
    tab: str
    space: str
    bars: str


SIGNS = Signs(("⟦", "⟧"), ("⟪", "⟫"), "↵", "⇥", "␣", "·▁▂▃▄▅▆▇█")
ASCII_SIGNS = Signs(("[[", "]]"), ("<<", ">>"), "\\n", "\\t", "_", ".123456789")
PROMPT, LEARNT, CONTROL = "dim", "green", "dim reverse"
# Spaces that one would not see: at either end of a line or of a stretch, and two or more.
SPACES = re.compile(r"(?m)^ +| +$| {2,}")
# Printable by Unicode's tables, yet nothing to see: fillers and joiners. And our own signs.
SPELT = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0⟦⟧⟪⟫")


class _Progress(Console):
    """Standard error: a run goes on when nobody reads it any more, as after `| head`."""

    def on_broken_pipe(self) -> None:
        """Say nothing from here on."""
        self.quiet = True
        self.file = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


class Screen:
    """The user's terminal: everything but results goes to standard error."""

    def __init__(self, *, quiet: bool = False, silent: bool = False) -> None:
        self.quiet = quiet or silent
        self.silent = silent
        self.err = _Progress(stderr=True, highlight=False, soft_wrap=True)
        self.out = Console(highlight=False, soft_wrap=True)
        self._progress: _Bar | None = None

    def say(self, text: str) -> None:
        """A sentence, unless the user wants quiet."""
        if not self.quiet:
            self.err.print(Text(inert(text)))

    def result(self, text: str) -> None:
        """A result, on standard output; inert where that is a terminal."""
        if not self.silent:
            sys.stdout.write((inert(text) if sys.stdout.isatty() else text) + "\n")
            sys.stdout.flush()

    def part(self, text: str) -> None:
        """A part of a result, at once, with no end of line; inert where that is a terminal."""
        if not self.silent:
            sys.stdout.write(inert(text) if sys.stdout.isatty() else text)
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        """What went wrong and ends nothing; said to those who want quiet too."""
        self.err.print(Text(inert(f"error: {text}")))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table on standard output: names at the left, numbers at the right."""
        if self.silent:
            return
        table = Table(box=None, pad_edge=False)
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number < 2 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(inert(cell)) for cell in row))
        # Where the output is no terminal, rich would fold the table to 80 columns.
        out = self.out if self.out.is_terminal else Console(highlight=False, width=160)
        if title:
            out.print(Text(inert(title)), soft_wrap=True)
        out.print(table, soft_wrap=False)

    @contextlib.contextmanager
    def counting(self, total: int) -> Iterator[Callable[[], None]]:
        """Show how many of `total` answers are there; what it gives is called for each one.

        A live line in a terminal, a line at each tenth elsewhere; nothing for fewer than two.
        """
        if self.quiet or total < 2:
            yield lambda: None
            return
        bar = Progress(
            TextColumn("answer {task.completed}/{task.total}"),
            BarColumn(),
            TimeRemainingColumn(),
            console=self.err,
            disable=not self.err.is_terminal,
        )
        task, done, every = bar.add_task("", total=total), 0, max(1, total // 10)

        def one() -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done)
            if not self.err.is_terminal and (done % every == 0 or done == total):
                self.err.print(Text(f"answer {done}/{total}"))

        with bar:
            yield one

    # --- training ---

    def begin(self, steps: int, tokens: int, done_steps: int, done_tokens: int) -> None:
        """Show the bar of a run that has `done_steps` behind it."""
        if done_steps:
            self.say(f"resuming after step {done_steps} of {steps}")
        if not self.quiet:
            self._progress = _Bar(self.err, steps, tokens, done_steps, done_tokens)

    def step(self, record: Mapping[str, Any]) -> None:
        """One step further."""
        if self._progress is not None:
            self._progress.step(record)

    def end(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.close()
            self._progress = None

    # --- preview ---

    def legend(self) -> None:
        """What the colours and signs of the examples mean."""
        if self.silent:
            return
        signs = self._signs
        text = Text().append("prompt", style=PROMPT)
        text.append("  ").append(f"{signs.learnt[0]}supervised{signs.learnt[1]}", LEARNT)
        text.append("  ").append(f"{signs.control[0]}control token{signs.control[1]}", CONTROL)
        text.append(f"  {signs.line} new line  {signs.tab} tab  {signs.space} space\n")
        self._wrapped(text)

    def example(self, title: str, stretches: Sequence[Stretch]) -> None:
        """One example: the prompt grey, what is supervised green, control tokens reversed.

        Signs say the same where there is no colour. Where a stretch has its id, it follows as #id.
        """
        if self.silent:
            return
        self._wrapped(Text(self._encodable(inert(title)), style="bold"))
        signs, text, learning = self._signs, Text(), False
        for stretch in stretches:
            style = LEARNT if stretch.supervised else PROMPT
            if stretch.supervised != learning:
                text.append(signs.learnt[not stretch.supervised], style=LEARNT)
                learning = stretch.supervised
            shown = self._spelt(stretch.text)
            if stretch.control:
                shown, style = f"{signs.control[0]}{shown}{signs.control[1]}", f"{style} reverse"
            if stretch.id is None:
                text.append(shown, style=style)
                continue
            text.append(shown.rstrip("\n"), style=style)
            text.append(f"#{stretch.id} ", style="blue")
            text.append(shown[len(shown.rstrip("\n")) :])
        text.append(signs.learnt[1] if learning else "", style=LEARNT)
        self._wrapped(text)
        self.out.print()

    def shaded(self, title: str, tokens: Sequence[Shade]) -> None:
        """Tokens in their styles, each with its note in signs that no text can forge."""
        if self.silent:
            return
        self.out.print(Text(title, style="bold"))
        signs, text = self._signs, Text()
        for token in tokens:
            shown = self._spelt(token.text)
            if token.control:
                shown = f"{signs.control[0]}{shown}{signs.control[1]}"
            ended = len(shown.rstrip("\n"))
            text.append(shown[:ended], style=token.style)
            if token.note:
                text.append(f"{signs.learnt[0]}{token.note}{signs.learnt[1]}", style="blue")
            text.append(shown[ended:])
        self._wrapped(text)
        self.out.print()

    def bars(self, counts: Sequence[int]) -> str:
        """Counts as a row of bars, one character each; nothing is a dot."""
        levels, most = self._signs.bars, max(counts, default=0)
        return "".join(
            levels[math.ceil(count / most * (len(levels) - 1))] if count else levels[0]
            for count in counts
        )

    @property
    def _signs(self) -> Signs:
        return SIGNS if self._encodable(SIGNS.control[0]) == SIGNS.control[0] else ASCII_SIGNS

    def _spelt(self, text: str) -> str:
        """A token's text, inert, with the whitespace that matters shown and no sign forged."""
        signs = self._signs
        text = "".join(f"\\u{ord(each):04x}" if each in SPELT else each for each in inert(text))
        text = SPACES.sub(lambda found: signs.space * len(found[0]), text)
        text = text.replace("\t", signs.tab).replace("\n", f"{signs.line}\n")
        return self._encodable(text)

    def _encodable(self, text: str) -> str:
        """The text with what the output cannot show spelt out."""
        name = self.out.encoding or "utf-8"
        return text.encode(name, "backslashreplace").decode(name)

    def _wrapped(self, text: Text) -> None:
        """Print a text: in a terminal cut at words, elsewhere in the lines that it has."""
        self.out.print(text, soft_wrap=not self.out.is_terminal)


class _Bar:
    """The progress of training: a live line in a terminal, a line now and then elsewhere."""

    LINES = 10

    def __init__(self, console: Console, steps: int, tokens: int, done: int, had: int) -> None:
        self.console, self.steps, self.tokens = console, steps, tokens
        self.begun_tokens, self.begun_seconds = had, None if done else 0.0
        self.live = console.is_terminal
        self.every = max(1, steps // self.LINES)
        self.bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not self.live,
            transient=False,
        )
        self.task = self.bar.add_task("", total=steps, completed=done)
        self.bar.start()

    def step(self, record: Mapping[str, Any]) -> None:
        if self.begun_seconds is None:  # the first step after a resume sets the clock
            self.begun_tokens, self.begun_seconds = record["tokens"], record["seconds"]
        seconds = record["seconds"] - self.begun_seconds
        rate = (record["tokens"] - self.begun_tokens) / seconds if seconds > 0 else 0.0
        text = f"loss {record['loss']:.4f}"
        if rate:  # of one step alone nothing is known yet
            left = (self.tokens - record["tokens"]) / rate
            text += f"  {rate:,.0f} tokens/s  {_clock(left)} left"
        if "heldout_loss" in record:
            text += f"  held-out loss {record['heldout_loss']:.4f}"
        self.bar.update(self.task, completed=record["step"], description=text)
        last = record["step"] == self.steps
        if not self.live and (record["step"] % self.every == 0 or last):
            self.console.print(Text(f"step {record['step']}/{self.steps}  {text}"))

    def close(self) -> None:
        self.bar.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
