"""`itune generate --chat`: a talk with a model, a line at a time, from a terminal or a pipe."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from itune import console, decoding, errors, formats, prompting, signals, speaking, storage

if TYPE_CHECKING:
    from collections.abc import Callable

HELP = """\
/reset      forget what was said
/save FILE  write the talk as a row of `messages`, as `itune tune` and --input read it
/help       show this
/quit       end; so does the end of the input
Ctrl-C stops an answer. A line that begins with // is sent with one /."""


@dataclass
class Chat:
    """One talk: what was said, without the system message."""

    speaker: speaking.Speaker
    screen: console.Screen
    system: str | None = None
    said: list[formats.Message] = field(default_factory=list)
    saved: set[Path] = field(default_factory=set)
    answers: int = 0

    def run(self) -> None:
        """Talk until the user ends it, or the input ends."""
        if self.system:
            prompting.refuse_half_characters(self._messages([]), "--system")
            speaking.system_taken(self.speaker, self.system)
        self.speaker.warm()
        if sys.stdin.isatty():
            self.screen.say("/help shows the commands, /quit ends")
        while True:
            try:
                line = _line()
                if line is None or not self._heed(line.strip()):
                    return
            except signals.Stopped as stopped:
                if str(stopped) != "SIGINT":
                    raise
                signals.LISTENER.settle()
                self.screen.say("\n/quit ends the talk")

    def _heed(self, line: str) -> bool:
        """Do what a line asks; whether the talk goes on."""
        if line.startswith("//") or not line.startswith("/"):
            if line:
                self._ask(line.removeprefix("/"))
            return True
        name, _, rest = line.partition(" ")
        commands: dict[str, Callable[[], None]] = {
            "/reset": self._reset,
            "/save": lambda: self._save(rest.strip()),
            "/help": lambda: self.screen.say(HELP),
        }
        if name == "/quit":
            return False
        if name in commands:
            commands[name]()
        else:
            hint = errors.nearest(name, [*commands, "/quit"])
            self.screen.say(f"{name}: no such command.{hint}")
        return True

    # --- commands ---

    def _reset(self) -> None:
        self.said.clear()
        self.screen.say("forgotten")

    def _save(self, name: str) -> None:
        """Write the talk; a file that this talk did not write is left alone."""
        path = Path(name).expanduser().absolute()
        if not name:
            self.screen.say("/save: to which file? Name it: /save talk.jsonl")
        elif path.exists() and path not in self.saved:
            self.screen.say(f"/save {name}: is there already. Name another file.")
        else:
            turns = [{"role": m.role, "content": m.content} for m in self._messages(self.said)]
            try:
                storage.write(path, json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
            except OSError as error:
                self.screen.say(f"/save {name}: {error.strerror}. Name another file.")
                return
            self.saved.add(path)
            self.screen.say(f"{len(turns)} messages written to {name}")

    # --- questions ---

    def _messages(self, said: list[formats.Message]) -> list[formats.Message]:
        system = [formats.Message("system", self.system)] if self.system else []
        return [*system, *said]

    def _ask(self, question: str) -> None:
        """Answer a question as it is spoken. One that cannot be answered leaves no trace."""
        said = [*self.said, formats.Message("user", question)]
        try:
            prompting.refuse_half_characters(said[-1:], "the question")
            said, ids = self._fitted(said)
            heard = speaking.Heard(self.speaker.encoder, self.screen.part)
            stopped = False
            try:
                self.speaker.answer(ids, self.answers, heard.told)
            except signals.Stopped as stop:
                if str(stop) != "SIGINT":
                    raise
                signals.LISTENER.settle()
                stopped = True
            self.answers += 1
            answer = heard.end()
            self.screen.part("\n")
            if stopped:
                self.screen.say("(stopped)")
        except errors.UserError as error:
            self.screen.warn(str(error))
            return
        # An answer of nothing is no turn that a chat template takes.
        self.said = [*said, formats.Message("assistant", answer)] if answer else self.said

    def _fitted(self, said: list[formats.Message]) -> tuple[list[formats.Message], list[int]]:
        """What the model can read of a talk, and its ids: the oldest turns go first, said so."""
        context = decoding.context(self.speaker.model)
        room = context - min(self.speaker.wanted.max_new_tokens, context // 2)
        kept = said
        ids = self.speaker.encoder.prompt(self._messages(kept))
        while len(ids) > room and len(kept) > 2:
            kept = kept[2:]
            ids = self.speaker.encoder.prompt(self._messages(kept))
        decoding.room_left(self.speaker.model, ids)
        if len(kept) < len(said):
            self.screen.say(
                f"the talk is too long for the {context} tokens that the model reads: the oldest "
                f"{len(said) - len(kept)} messages are forgotten"
            )
        return kept, ids


def _line() -> str | None:
    """The next line of the input; None at its end. Raises DataError for bytes that are no text."""
    try:
        if not sys.stdin.isatty():
            return sys.stdin.readline() or None
        if sys.stdout.isatty():
            import readline  # noqa: F401  # so that a line can be edited, and an earlier one taken up

            return input("> ")
        sys.stderr.write("> ")  # answers alone go to a file
        sys.stderr.flush()
        return input()
    except EOFError:
        sys.stderr.write("\n")  # the shell's own prompt comes next
        return None
    except UnicodeDecodeError as error:
        raise errors.DataError(
            f"standard input: not {error.encoding}, byte 0x{error.object[error.start]:02x}. "
            "Convert it with iconv."
        ) from error
