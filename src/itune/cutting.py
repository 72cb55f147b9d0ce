"""Where a conversation is cut into prompts and answers, and what the chat template writes there."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from itune import chats, errors, formats, guarding, tokenizing

Messages = Sequence[formats.Message]


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a rendered conversation that is tokenised by itself."""

    text: str
    answer: bool


@dataclass(frozen=True, slots=True)
class Cuts:
    """Where a conversation is cut: at these answers, and at its end for one more prompt."""

    answers: tuple[int, ...]
    final: bool

    def answer(self, number: int) -> int | None:
        """The message that a piece is the answer of; None where it is a prompt."""
        return self.answers[number // 2] if number % 2 else None


@dataclass(frozen=True, slots=True)
class Tail:
    """What the template writes after an answer, and how much of it up to its stop token; 0 where
    it writes no control token there."""

    text: str
    kept: int


class Cutter:
    """Renders conversations and cuts them where a prompt ends and where an answer ends.

    `allowed`: control tokens that answers may hold.
    """

    def __init__(self, chat: chats.Chat, texts: tokenizing.Tokenizing) -> None:
        self.chat = chat
        self.texts = texts
        self.allowed = guarding.Allowed({})
        self._tails: dict[tuple[str, ...], Tail] = {}
        self._shapes: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}

    def cut(self, messages: Messages, cuts: Cuts) -> list[Piece]:
        """A prompt and an answer for each cut; with `final`, one generation prompt at the end."""
        pieces: list[Piece] = []
        done = ""
        for i in cuts.answers:
            before = self.chat.render(messages[:i], prompt=True)
            answer = self._answer(messages[: i + 1], before, alone=len(cuts.answers) == 1)
            if not before.startswith(done):
                raise _rewritten(i)
            pieces += [Piece(before[len(done) :], answer=False), Piece(answer, answer=True)]
            done = before + answer
        if cuts.final:
            before = self.chat.render(messages, prompt=True)
            if not before.startswith(done):
                raise _rewritten(len(messages))
            pieces.append(Piece(before[len(done) :], answer=False))
        return pieces

    def _answer(self, messages: Messages, before: str, *, alone: bool) -> str:
        """The last message as the template writes it after its prompt, to its stop token."""
        tail = self.tail(tuple(message.role for message in messages))
        if not tail.kept and not alone:
            raise errors.DataError(
                "the model's chat template writes no control token after an answer, so its "
                "earlier answers would be trained on otherwise than they are served. "
                "Set training.train_on: last."
            )
        after = self.chat.render(messages, prompt=False)
        if after.startswith(before) and after.endswith(tail.text):
            end = len(after) - len(tail.text) + tail.kept
            if end >= len(before):
                return after[len(before) : end]
        if not alone:
            raise _rewritten(len(messages) - 1)
        # A template may open the answer in a prompt otherwise than in a conversation, with a
        # thought for example. The prompt is what is served, so the answer follows that.
        return self.allowed.continued(messages[-1].content, before) + tail.text[: tail.kept]

    def tail(self, roles: tuple[str, ...]) -> Tail:
        if roles not in self._tails:
            placed = guarding.placed([formats.Message(role, "x") for role in roles])
            text = guarding.PLACE.split(self.chat.render(placed, prompt=False))[-1]
            encoding = self.texts.backend(bare=False, inner=True).encode(
                text, add_special_tokens=False
            )
            ends = [
                end
                for id_, (_, end) in zip(encoding.ids, encoding.offsets, strict=True)
                if id_ in self.texts.control
            ]
            self._tails[roles] = Tail(text, ends[0] if ends else 0)
        return self._tails[roles]

    def controls(self, messages: Messages, cuts: Cuts) -> list[tuple[int, ...]]:
        """The control tokens that the template writes in each piece, whatever the texts are."""
        shape = (tuple((m.role, bool(m.content.strip())) for m in messages), cuts)
        if shape not in self._shapes:
            pieces = self.cut(guarding.placed(messages), cuts)
            self._check_whole(messages, pieces, cuts)
            self._shapes[shape] = [
                tuple(
                    itertools.chain.from_iterable(
                        self.texts.controls_in(ids)
                        for ids in self.texts.ids(guarding.PLACE.split(piece.text)[::2], inner=True)
                    )
                )
                for piece in pieces
            ]
        return self._shapes[shape]

    def _check_whole(self, messages: Messages, pieces: Sequence[Piece], cuts: Cuts) -> None:
        """Raise DataError where the template leaves a message out without a word."""
        written = set(guarding.PLACE.findall("".join(piece.text for piece in pieces)))
        end = len(messages) if cuts.final else max(cuts.answers) + 1
        for i, message in enumerate(messages[:end]):
            # Earlier answers and thoughts are left out by design: what was asked never is.
            if message.role != "assistant" and message.content.strip() and str(i) not in written:
                cure = "Put its text into the user's turn" if message.role == "system" else ""
                raise errors.DataError(
                    f"turn {i + 1}: the model's chat template leaves out what the "
                    f"{message.role} says. {cure or 'Take the row out, or take another model'}."
                )


def _rewritten(turn: int) -> errors.DataError:
    return errors.DataError(
        f"turn {turn + 1}: the model's chat template rewrites earlier turns, so their answers "
        "cannot be trained on as they will be served. Set training.train_on: last."
    )
