"""Examples become token ids with the exact mask of what is learnt; text never becomes control."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from itune import chats, errors, formats, tokenizing

Messages = Sequence[formats.Message]

# Two private-use characters around a number stand for a message's content, so that what the
# chat template itself writes can be told from what the data wrote.
_PLACE = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of one example, and for each whether it is learnt (`supervised`).

    `guarded`: its text holds control strings of the model, which were encoded as text.
    """

    ids: list[int]
    supervised: list[bool]
    guarded: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a rendered conversation that is tokenised by itself."""

    text: str
    answer: bool


@dataclass(frozen=True, slots=True)
class _Cuts:
    """Where a conversation is cut: at these answers, and at its end for one more prompt."""

    answers: tuple[int, ...]
    final: bool


@dataclass(frozen=True, slots=True)
class _Tail:
    """What the template writes after an answer, and how much of it up to its stop token; 0 where
    it writes no control token there."""

    text: str
    kept: int


class Encoder:
    """Encodes conversations with a tokenizer and its chat template.

    A conversation is cut where a prompt ends and where an answer ends, and each piece is
    tokenised alone: so the ids before an answer are the ids of that generation prompt, in
    training, in `itune generate` and in any server alike, and the mask needs no search.

    This is the encoder of a decoder; `families` has those of the others. family: for which it
    is. even: whether an answer takes the same room whatever it says. opening: how many control
    tokens an answer begins with. room: tokens that each piece of a document has besides its text.
    """

    family = "causal"
    even = False
    opening = 0
    room = 0

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.chat = chats.Chat(tokenizer)
        self.texts = tokenizing.Tokenizing(tokenizer)
        self.control = self.texts.control
        self._tails: dict[tuple[str, ...], _Tail] = {}
        self._shapes: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}
        self.stop_id: int = -1
        self._prepare()

    def _prepare(self) -> None:
        """Find out what follows from the tokenizer alone."""
        probe = [formats.Message("user", "a"), formats.Message("assistant", "b")]
        self.stop_id = self.conversation(probe, train_on="last").ids[-1]

    def answering(self, choices: Sequence[str]) -> Encoder:
        """The encoder for prompts that have these choices; a decoder's is the same for all."""
        return self

    # --- cutting ---------------------------------------------------------------------------

    def _cut(self, messages: Messages, cuts: _Cuts) -> list[Piece]:
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
        tail = self._tail(tuple(message.role for message in messages))
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
        return messages[-1].content + tail.text[: tail.kept]

    def _tail(self, roles: tuple[str, ...]) -> _Tail:
        if roles not in self._tails:
            placed = _placed([formats.Message(role, "x") for role in roles])
            text = _PLACE.split(self.chat.render(placed, prompt=False))[-1]
            encoding = self.texts.backend(bare=False, inner=True).encode(
                text, add_special_tokens=False
            )
            ends = [
                end
                for id_, (_, end) in zip(encoding.ids, encoding.offsets, strict=True)
                if id_ in self.control
            ]
            self._tails[roles] = _Tail(text, ends[0] if ends else 0)
        return self._tails[roles]

    def _controls(self, messages: Messages, cuts: _Cuts) -> list[tuple[int, ...]]:
        """The control tokens that the template writes in each piece, whatever the texts are."""
        shape = (tuple((m.role, bool(m.content.strip())) for m in messages), cuts)
        if shape not in self._shapes:
            pieces = self._cut(_placed(messages), cuts)
            self._check_whole(messages, pieces, cuts)
            self._shapes[shape] = [
                tuple(
                    itertools.chain.from_iterable(
                        self.texts.controls_in(ids)
                        for ids in self.texts.ids(_PLACE.split(piece.text)[::2], inner=True)
                    )
                )
                for piece in pieces
            ]
        return self._shapes[shape]

    def _check_whole(self, messages: Messages, pieces: Sequence[Piece], cuts: _Cuts) -> None:
        """Raise DataError where the template leaves a message out without a word."""
        written = set(_PLACE.findall("".join(piece.text for piece in pieces)))
        end = len(messages) if cuts.final else max(cuts.answers) + 1
        for i, message in enumerate(messages[:end]):
            # Earlier answers and thoughts are left out by design: what was asked never is.
            if message.role != "assistant" and message.content.strip() and str(i) not in written:
                cure = "Put its text into the user's turn" if message.role == "system" else ""
                raise errors.DataError(
                    f"turn {i + 1}: the model's chat template leaves out what the "
                    f"{message.role} says. {cure or 'Take the row out, or take another model'}."
                )

    # --- tokenising ------------------------------------------------------------------------

    def _tokenize_pieces(self, rows: Sequence[Sequence[Piece]]) -> list[list[list[int]]]:
        """Ids of each piece, as they are in the midst of the whole text."""
        flat = iter(self.texts.ids([piece.text for pieces in rows for piece in pieces]))
        alone = [[next(flat) for _ in pieces] for pieces in rows]
        if self.texts.prefix == "never":
            return alone
        flat = iter(self.texts.ids([p.text for pieces in rows for p in pieces[1:]], inner=True))
        within = [[ids[0], *(next(flat) for _ in ids[1:])] for ids in alone]
        return [
            [
                ids[0],
                *(one if self.texts.opens(ids[k]) else two for k, (one, two) in enumerate(rest)),
            ]
            for ids, rest in (
                (a, list(zip(a[1:], w[1:], strict=True)))
                for a, w in zip(alone, within, strict=True)
            )
        ]

    # --- control strings in the text -------------------------------------------------------

    def _guarded(
        self, messages: Messages, cuts: _Cuts, number: int, before: list[int]
    ) -> list[int]:
        """Ids of a piece whose text holds control strings: what the template wrote and what the
        data wrote are tokenised apart. `before`: the ids of the piece before it."""
        piece = self._cut(messages, cuts)[number]
        placed = self._cut(_placed(messages), cuts)[number]
        ids: list[int] = []
        for written, text in _aligned(placed.text, piece.text, messages):
            if text:
                inner = not self.texts.opens(ids or before)
                if written:
                    ids += self.texts.ids([text], inner=inner)[0]
                else:
                    ids += self.texts.bare(text, inner=inner)
        if self.texts.controls_in(ids) != self._controls(messages, cuts)[number]:
            raise errors.DataError(
                "the text turns into control tokens of the model. Take the row out."
            )
        return ids

    def _history(self, messages: Messages) -> tuple[list[int], bool]:
        """Ids of the generation prompt of messages that hold control strings: cut as in training,
        where the template allows that."""
        answers = tuple(i for i, m in enumerate(messages) if m.role == "assistant" and i)
        cuts = _Cuts(answers, final=True)
        try:
            pieces = self._cut(messages, cuts)
        except errors.DataError:
            cuts = _Cuts((), final=True)
            pieces = self._cut(messages, cuts)
        parts = self._checked(
            messages, cuts, pieces, self._tokenize_pieces([pieces])[0], whole=False
        )
        return list(itertools.chain.from_iterable(parts[0])), parts[1]

    def _checked(
        self,
        messages: Messages,
        cuts: _Cuts,
        pieces: Sequence[Piece],
        ids: list[list[int]],
        *,
        whole: bool = True,
    ) -> tuple[list[list[int]], bool]:
        """The ids of the pieces, where no text is control, and whether some had to be mended."""
        mended = False
        out: list[list[int]] = []
        for k, controls in enumerate(self._controls(messages, cuts)):
            one = ids[k]
            if self.texts.forged(pieces[k].text, one, controls):
                if k == 0 and whole:
                    asked = messages if cuts.final else messages[: cuts.answers[0]]
                    one, _ = self._history(asked)
                else:
                    one = self._guarded(messages, cuts, k, out[-1] if out else [])
                mended = mended or one != ids[k]
            out.append(one)
        return out, mended

    # --- conversations ---------------------------------------------------------------------

    def _cuts(self, messages: Messages, train_on: str, *, prompt: bool) -> _Cuts:
        if prompt:
            return _Cuts((), final=True)
        # What the assistant says before anybody else answers no prompt.
        answers = tuple(i for i, m in enumerate(messages) if m.role == "assistant" and i)
        if not answers:
            raise errors.DataError(
                "no assistant's turn that follows another: there is nothing to learn. "
                "Take the row out, or check the roles."
            )
        return _Cuts(answers[-1:] if train_on == "last" else answers, final=False)

    def conversations(
        self, batch: Sequence[Messages], *, train_on: str = "assistant", prompt: bool = False
    ) -> list[Tokens]:
        """Tokens of each conversation; with `prompt`, those of its generation prompt.

        `train_on`: `assistant` supervises every answer, `last` the last one alone. An answer is
        supervised with its stop token and no further. Raises DataError for a conversation that
        the chat template cannot render faithfully.
        """
        cuts = [self._cuts(messages, train_on, prompt=prompt) for messages in batch]
        cut = [self._cut(*each) for each in zip(batch, cuts, strict=True)]
        return [
            self._joined(messages, pieces, *self._checked(messages, where, pieces, ids))
            for messages, where, pieces, ids in zip(
                batch, cuts, cut, self._tokenize_pieces(cut), strict=True
            )
        ]

    def conversation(self, messages: Messages, *, train_on: str = "assistant") -> Tokens:
        """Tokens of one conversation, see `conversations`."""
        return self.conversations([messages], train_on=train_on)[0]

    def prompt(self, messages: Messages) -> list[int]:
        """Ids of the generation prompt after these messages."""
        return self.conversations([messages], prompt=True)[0].ids

    def _joined(
        self, messages: Messages, pieces: Sequence[Piece], ids: list[list[int]], guarded: bool
    ) -> Tokens:
        out: list[int] = []
        supervised: list[bool] = []
        for piece, piece_ids in zip(pieces, ids, strict=True):
            out += piece_ids
            supervised += [piece.answer] * len(piece_ids)
        if pieces[-1].answer:
            end = max(i for i, m in enumerate(messages) if m.role == "assistant")
            if not self._tail(tuple(m.role for m in messages[: end + 1])).kept:
                out, supervised = [*out, self.eos_id], [*supervised, True]
        return Tokens(out, supervised, guarded)

    # --- plain text ------------------------------------------------------------------------

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text in which nothing is control, whatever strings it holds."""
        return self.texts.texts([text])[0][0]

    def document(self, text: str) -> list[int]:
        """Ids of a text to pretrain on: all of it, then the end-of-sequence token."""
        return self.documents([text])[0].ids

    def pieces(self, text: str, longest: int) -> list[Tokens]:
        """A text to pretrain on in pieces of at most `longest` tokens; the last has its end."""
        (whole,) = self.documents([text])
        return [
            Tokens(part, [True] * len(part), whole.guarded and not first)
            for first in range(0, len(whole.ids), longest)
            for part in [whole.ids[first : first + longest]]
        ]

    def documents(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of each text to pretrain on, see `document`."""
        end = self.eos_id
        return [
            Tokens([*ids, end], [True] * (len(ids) + 1), guarded)
            for ids, guarded in self.texts.texts(texts)
        ]

    @property
    def eos_id(self) -> int:
        """The id of the end-of-sequence token. Raises ModelError when the tokenizer has none."""
        if self.tokenizer.eos_token_id is None:
            raise errors.ModelError(
                "the tokenizer has no end-of-sequence token, so an answer could never end. "
                "Set eos_token in its tokenizer_config.json."
            )
        return int(self.tokenizer.eos_token_id)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without control tokens and without space around it."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


# --- what the template wrote, and what the data ---------------------------------------------------


def _placed(messages: Messages) -> list[formats.Message]:
    return [
        replace(m, content=f"\ue000{i}\ue001") if m.content.strip() else m
        for i, m in enumerate(messages)
    ]


def _rewritten(turn: int) -> errors.DataError:
    return errors.DataError(
        f"turn {turn + 1}: the model's chat template rewrites earlier turns, so their answers "
        "cannot be trained on as they will be served. Set training.train_on: last."
    )


# What a template may do to a text before it writes it.
_CHANGES: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    lambda text: text.strip(),
    lambda text: text.lstrip(),
    lambda text: text.rstrip(),
)


def _aligned(placed: str, text: str, messages: Messages) -> list[tuple[bool, str]]:
    """The text of a piece in parts, each with whether the template wrote it.

    Raises DataError where that cannot be told for certain: a text that repeats what the template
    writes around it, in a template that also changes texts.
    """
    parts = _PLACE.split(placed)
    for mine, others in itertools.product(_CHANGES, _CHANGES):
        filled = [
            part
            if k % 2 == 0
            else (mine if messages[int(part)].role == "assistant" else others)(
                messages[int(part)].content
            )
            for k, part in enumerate(parts)
        ]
        if "".join(filled) == text:
            return [(k % 2 == 0, part) for k, part in enumerate(filled)]
    first, last = (
        re.fullmatch(gap.join(f"({re.escape(part)})" for part in parts[::2]), text, re.DOTALL)
        for gap in ("(.*?)", "(.*)")
    )
    if first is None or last is None or first.groups() != last.groups():
        raise errors.DataError(
            "the text holds control strings of the model and its chat template rewrites "
            "texts, so they cannot be kept apart. Take the row out."
        )
    return [(k % 2 == 0, part) for k, part in enumerate(first.groups())]
