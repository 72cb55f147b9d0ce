"""Examples become token ids with the exact mask of what is learnt; text never becomes control."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from itune import chats, cutting, errors, formats, guarding, tokenizing

Messages = Sequence[formats.Message]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of one example, and for each whether it is learnt (`supervised`).

    `guarded`: its text holds control strings of the model, which were encoded as text. `allowed`:
    how many control strings of its answers became tokens, as its source allows.
    """

    ids: list[int]
    supervised: list[bool]
    guarded: bool = False
    allowed: int = 0


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
        self.cutter = cutting.Cutter(self.chat, self.texts)
        self.stop_id: int = -1
        self._prepare()

    def _prepare(self) -> None:
        """Find out what follows from the tokenizer alone."""
        probe = [formats.Message("user", "a"), formats.Message("assistant", "b")]
        self.stop_id = self.conversation(probe, train_on="last").ids[-1]

    def answering(self, choices: Sequence[str]) -> Encoder:
        """The encoder for prompts that have these choices; a decoder's is the same for all."""
        return self

    def allowing(self, names: Sequence[str]) -> Encoder:
        """The encoder for conversations whose answers may hold these control tokens.

        Raises DataError for one that is no added token of the tokenizer, or that ends a text, pads
        it, or opens or closes a turn.
        """
        if not names:
            return self
        bound = copy.copy(self)
        bound.cutter = copy.copy(self.cutter)
        bound.cutter.allowed = guarding.allowed(names, self.tokenizer, self._taken())
        return bound

    @functools.cached_property
    def allowable(self) -> tuple[str, ...]:
        """The control strings that answers could hold as tokens and do not."""
        taken = self._taken()
        known = self.tokenizer.added_tokens_decoder
        return tuple(
            str(known[id_])
            for id_ in sorted(self.control)
            if id_ not in taken and id_ not in self.cutter.allowed.known and str(known[id_])
        )

    def _taken(self) -> dict[int, str]:
        """The ids that no answer may hold, and what each of them does."""
        marks = [
            *self.texts.ids([self.chat.render([formats.Message("user", "a")], prompt=False)])[0],
            self.stop_id,
        ]
        tokenizer = self.tokenizer
        return {
            **dict.fromkeys(self.texts.controls_in(marks), "opens or closes a turn"),
            tokenizer.pad_token_id: "is the tokenizer's pad_token",
            tokenizer.bos_token_id: "is the tokenizer's bos_token",
            tokenizer.eos_token_id: "is the tokenizer's eos_token",
        }

    # --- tokenising ------------------------------------------------------------------------

    def _tokenize_pieces(self, rows: Sequence[Sequence[cutting.Piece]]) -> list[list[list[int]]]:
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
        self, messages: Messages, cuts: cutting.Cuts, number: int, before: list[int]
    ) -> list[int]:
        """Ids of a piece whose text holds control strings: what the template wrote and what the
        data wrote are tokenised apart. `before`: the ids of the piece before it."""
        ids: list[int] = []
        for owner, text in self._parts(messages, cuts, number):
            inner = not self.texts.opens(ids or before)
            if owner is not None and owner.role == "assistant":
                ids += self._spoken(text, ids or before)
            elif owner is not None:
                ids += self.texts.bare(text, inner=inner)
            elif text:
                ids += self.texts.ids([text], inner=inner)[0]
        if self._own(ids) != self._own(self.cutter.controls(messages, cuts)[number]):
            raise errors.DataError(
                "the text turns into control tokens of the model. Take the row out."
            )
        return ids

    def _spoken(self, answer: str, before: Sequence[int]) -> list[int]:
        """Ids of an answer, or a part of one: text, and the control tokens that it may hold."""
        allowed, ids = self.cutter.allowed, list[int]()
        for part in allowed.split(answer):
            if part in allowed.ids:
                ids.append(allowed.ids[part])
            else:
                ids += self.texts.bare(part, inner=not self.texts.opens(ids or before))
        return ids

    def _own(self, ids: Sequence[int]) -> list[int]:
        """The control tokens among ids that no answer may hold."""
        return self.cutter.allowed.others(self.texts.controls_in(ids))

    def _parts(self, messages: Messages, cuts: cutting.Cuts, number: int) -> list[guarding.Part]:
        """What the template wrote of a piece and what the data did.

        A template that takes texts apart at control strings is shown none where it must be.
        """
        marked = self.cutter.cut(guarding.placed(messages), cuts)[number].text
        try:
            pieces = self.cutter.cut(messages, cuts)
            if not self._lost(messages, cuts, pieces, number):
                return guarding.aligned(marked, pieces[number].text, messages)
        except errors.DataError:
            pass
        veil = guarding.Veil(messages, self.texts.strings)
        text = self.cutter.cut(veil.messages, cuts)[number].text
        return veil.lifted(guarding.aligned(marked, text, veil.messages))

    def _lost(
        self,
        messages: Messages,
        cuts: cutting.Cuts,
        pieces: Sequence[cutting.Piece],
        number: int,
    ) -> bool:
        """Whether the template took an answer apart at control strings and left some of it out."""
        answer = cuts.answer(number)
        if answer is None:
            return False
        said, text = messages[answer].content, pieces[number].text
        return (
            guarding.lost(said, text)
            and any(each in said for each in self.texts.strings)
            and guarding.lost(said, self.cutter.allowed.opened(pieces[number - 1].text) + text)
        )

    def _forged(self, piece: cutting.Piece, ids: list[int], controls: tuple[int, ...]) -> bool:
        """Whether a piece has control tokens that neither the template wrote nor its source may."""
        if piece.answer and self.cutter.allowed:
            ids = self.cutter.allowed.others(ids)
            controls = tuple(self.cutter.allowed.others(controls))
        return self.texts.forged(piece.text, ids, controls)

    def _history(self, messages: Messages) -> tuple[list[int], bool]:
        """Ids of the generation prompt of messages that hold control strings: cut as in training,
        where the template allows that."""
        answers = tuple(i for i, m in enumerate(messages) if m.role == "assistant" and i)
        for cuts in (cutting.Cuts(answers, final=True), cutting.Cuts((), final=True)):
            try:
                pieces = self.cutter.cut(messages, cuts)
                ids = self._tokenize_pieces([pieces])[0]
                parts, mended = self._checked(messages, cuts, pieces, ids, whole=False)
                return list(itertools.chain.from_iterable(parts)), mended
            except errors.DataError:
                if not cuts.answers:
                    raise
        raise AssertionError("the second way returns or raises")

    def _checked(
        self,
        messages: Messages,
        cuts: cutting.Cuts,
        pieces: Sequence[cutting.Piece],
        ids: list[list[int]],
        *,
        whole: bool = True,
    ) -> tuple[list[list[int]], bool]:
        """The ids of the pieces, where no text is control, and whether some had to be mended."""
        mended, allowed = False, self.cutter.allowed
        out: list[list[int]] = []
        for k, controls in enumerate(self.cutter.controls(messages, cuts)):
            one = ids[k]
            forged = self._forged(pieces[k], one, controls)
            forged = forged or self._lost(messages, cuts, pieces, k)
            if forged or (pieces[k].answer and allowed.missed(pieces[k].text, one)):
                if k == 0 and whole:
                    asked = messages if cuts.final else messages[: cuts.answers[0]]
                    one, _ = self._history(asked)
                else:
                    one = self._guarded(messages, cuts, k, out[-1] if out else [])
                mended = mended or (forged and one != ids[k])
            out.append(one)
        return out, mended

    # --- conversations ---------------------------------------------------------------------

    def _cuts(self, messages: Messages, train_on: str, *, prompt: bool) -> cutting.Cuts:
        if prompt:
            return cutting.Cuts((), final=True)
        # What the assistant says before anybody else answers no prompt.
        answers = tuple(i for i, m in enumerate(messages) if m.role == "assistant" and i)
        if not answers:
            raise errors.DataError(
                "no assistant's turn that follows another: there is nothing to learn. "
                "Take the row out, or check the roles."
            )
        return cutting.Cuts(answers[-1:] if train_on == "last" else answers, final=False)

    def conversations(
        self, batch: Sequence[Messages], *, train_on: str = "assistant", prompt: bool = False
    ) -> list[Tokens]:
        """Tokens of each conversation; with `prompt`, those of its generation prompt.

        `train_on`: `assistant` supervises every answer, `last` the last one alone. An answer is
        supervised with its stop token and no further. Raises DataError for a conversation that
        the chat template cannot render faithfully.
        """
        cuts = [self._cuts(messages, train_on, prompt=prompt) for messages in batch]
        cut = [self.cutter.cut(*each) for each in zip(batch, cuts, strict=True)]
        return [
            self._joined(messages, where, pieces, *self._checked(messages, where, pieces, ids))
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
        self,
        messages: Messages,
        cuts: cutting.Cuts,
        pieces: Sequence[cutting.Piece],
        ids: list[list[int]],
        guarded: bool,
    ) -> Tokens:
        out: list[int] = []
        supervised: list[bool] = []
        allowed = 0
        for k, (piece, piece_ids) in enumerate(zip(pieces, ids, strict=True)):
            out += piece_ids
            supervised += [piece.answer] * len(piece_ids)
            answer = cuts.answer(k)
            if self.cutter.allowed and answer is not None:
                allowed += self.cutter.allowed.learnt(messages[answer].content, piece_ids)
        if pieces[-1].answer:
            end = cuts.answers[-1]
            if not self.cutter.tail(tuple(m.role for m in messages[: end + 1])).kept:
                out, supervised = [*out, self.eos_id], [*supervised, True]
        return Tokens(out, supervised, guarded, allowed)

    # --- plain text ------------------------------------------------------------------------

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text in which nothing is control, whatever strings it holds."""
        return self.texts.texts([text])[0][0]

    def document(self, text: str) -> list[int]:
        """Ids of a text to pretrain on: all of it, then the end-of-sequence token."""
        return self.documents([text])[0].ids

    def pieces(self, texts: Sequence[str], longest: int) -> list[list[Tokens]]:
        """Each text to pretrain on in pieces of at most `longest` tokens, the first `guarded`."""
        return [self._parted(*each, longest) for each in self.texts.texts(texts)]

    def _parted(self, ids: list[int], guarded: bool, longest: int) -> list[Tokens]:
        """The pieces of a text; the last has its end."""
        whole = [*ids, self.eos_id]
        return [
            Tokens(part, [True] * len(part), guarded and not first)
            for first in range(0, len(whole), longest)
            for part in [whole[first : first + longest]]
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
