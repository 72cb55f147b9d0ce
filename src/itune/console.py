"""What the user sees: progress, tables, the preview; text from models and data shown inert."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from itune import errors


def inert(text: str) -> str:
    """The text with everything that could drive a terminal spelt out; newlines and tabs stay."""
    return "".join(each if each in "\n\t" else errors.inert(each) for each in text)


class Screen:
    """The user's terminal: everything but results goes to standard error."""

    def __init__(self, *, quiet: bool = False, silent: bool = False) -> None:
        self.quiet = quiet or silent
        self.silent = silent
        self.err = Console(stderr=True, highlight=False, soft_wrap=True)
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

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table on standard output: names at the left, numbers at the right."""
        if self.silent:
            return
        table = Table(title=Text(inert(title)), title_justify="left", box=None, pad_edge=False)
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number < 2 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(inert(cell)) for cell in row))
        # Where the output is no terminal, rich would fold the table to 80 columns.
        Console(highlight=False, width=None if self.out.is_terminal else 160).print(table)

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

    def preview(self, number: int, tokens: Sequence[tuple[str, bool]]) -> None:
        """One example as its tokens, those that are learnt in green and underlined."""
        if self.silent:
            return
        learnt = sum(flag for _, flag in tokens)
        text = Text()
        text.append(f"example {number}: {len(tokens)} tokens, {learnt} learnt\n", style="bold")
        for piece, flag in tokens:
            text.append(inert(piece), style="underline green" if flag else "dim")
        self.out.print(text)
        if not self.out.is_terminal:  # colours are lost in a file: say it in words
            said = "".join(piece for piece, flag in tokens if flag)
            self.out.print(Text(f"learnt: {inert(said)}"))
        self.out.print()


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
        left = (self.tokens - record["tokens"]) / rate if rate else 0.0
        text = f"loss {record['loss']:.4f}  {rate:,.0f} tokens/s  {_clock(left)} left"
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
