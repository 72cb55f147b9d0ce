"""Examples become token ids with the exact mask of what is learnt; text never becomes control."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from itune import errors, formats

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Messages = Sequence[formats.Message]

# Two private-use characters around a number stand for a message's content, so that what the
# chat template itself writes can be told from what the data wrote.
_PLACE = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of one example, and for each whether it is learnt (`supervised`)."""

    ids: list[int]
    supervised: list[bool]


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a rendered conversation that is tokenised by itself."""

    text: str
    answer: bool


@dataclass(frozen=True, slots=True)
class _Literals:
    """A template's own tokens: how many control, and for each piece how many follow its stop
    token (None where it writes none)."""

    controls: int
    beyond: list[int | None]


class Encoder:
    """Encodes conversations with a tokenizer and its chat template.

    A conversation is cut where a prompt ends and where an answer ends, and each piece is
    tokenised alone: so the ids before an answer are the ids of that generation prompt, in
    training, in `itune generate` and in any server alike, and the mask needs no search.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        unknown = tokenizer.unk_token_id
        self.control = frozenset(id_ for id_ in tokenizer.added_tokens_decoder if id_ != unknown)
        self._bare: Tokenizer | None = None
        self._known: dict[tuple[tuple[str, bool], ...], _Literals] = {}
        probe = [formats.Message("user", "a"), formats.Message("assistant", "b")]
        ids = self.conversation(probe, train_on="assistant").ids
        self.stop_id: int = ids[-1]

    # --- rendering -------------------------------------------------------------------------

    def _render(self, messages: Messages, *, prompt: bool) -> str:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            rendered = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # the template is the model's, and may raise anything
            if type(error).__module__.split(".")[0] not in {"jinja2", "builtins"}:
                raise
            raise errors.DataError(
                f"the model's chat template refuses a conversation of "
                f"{', '.join(m.role for m in messages)}: {error}"
            ) from error
        return str(rendered)

    def _pieces(self, messages: Messages, train_on: str, *, prompt: bool) -> list[Piece]:
        """The conversation cut at each answer; with `prompt`, one generation prompt at its end."""
        answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
        if train_on == "last" and not prompt:
            answers = answers[-1:]
        pieces: list[Piece] = []
        done = ""
        for i in answers:
            before = self._render(messages[:i], prompt=True)
            after = self._render(messages[: i + 1], prompt=False)
            if not before.startswith(done) or not after.startswith(before):
                raise errors.DataError(
                    f"turn {i + 1}: the model's chat template rewrites earlier turns, so their "
                    "answers cannot be trained on as they will be served. Set "
                    "training.train_on: last."
                )
            pieces.append(Piece(before[len(done) :], answer=False))
            pieces.append(Piece(after[len(before) :], answer=True))
            done = after
        if prompt:
            before = self._render(messages, prompt=True)
            # A template that rewrites earlier turns is served whole.
            if not before.startswith(done):
                return [Piece(before, answer=False)]
            pieces.append(Piece(before[len(done) :], answer=False))
        return pieces

    # --- tokenising ------------------------------------------------------------------------

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return [list(ids) for ids in encoded["input_ids"]]

    def _literals(self, messages: Messages, train_on: str, *, prompt: bool) -> _Literals:
        """What the template alone writes around a conversation of such a shape."""
        shape = (*((m.role, bool(m.content.strip())) for m in messages), (train_on, prompt))
        if shape not in self._known:
            pieces = self._pieces(_placed(messages), train_on, prompt=prompt)
            parts = [_PLACE.split(piece.text) for piece in pieces]
            written = [part for each in parts for part in each[::2]]
            self._known[shape] = _Literals(
                controls=sum(map(self._controls, self._tokenize(written))),
                beyond=[self._beyond_stop(each[-1]) for each in parts],
            )
        return self._known[shape]

    def _controls(self, ids: Iterable[int]) -> int:
        return sum(id_ in self.control for id_ in ids)

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text in which nothing is control, whatever strings it holds."""
        (ids,) = self._tokenize([text])
        return self._bare_ids(text) if self._controls(ids) else ids

    def _bare_ids(self, text: str) -> list[int]:
        if self._bare is None:
            from tokenizers import Tokenizer

            spec = json.loads(self.tokenizer.backend_tokenizer.to_str())
            spec["added_tokens"], spec["post_processor"] = [], None
            self._bare = Tokenizer.from_str(json.dumps(spec))
        encoding = self._bare.encode(text, add_special_tokens=False)
        for id_, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            # A vocabulary may hold a control string as an ordinary entry: cut it in two.
            if id_ in self.control and end - start > 1:
                return self._bare_ids(text[: start + 1]) + self._bare_ids(text[start + 1 :])
        return list(encoding.ids)

    def _apart(self, messages: Messages, train_on: str, *, prompt: bool) -> list[list[int]]:
        """Ids a piece, the template's text and the data's text tokenised apart."""
        pieces = self._pieces(_placed(messages), train_on, prompt=prompt)
        plain = self._pieces(messages, train_on, prompt=prompt)
        for contents in ([m.content for m in messages], [m.content.strip() for m in messages]):
            filled = [_PLACE.sub(lambda m, c=contents: c[int(m[1])], p.text) for p in pieces]  # type: ignore[misc]
            if filled == [piece.text for piece in plain]:
                break
        else:
            raise errors.DataError(
                "the text holds control strings of the model and its chat template rewrites "
                "texts, so they cannot be kept apart. Take the row out."
            )
        out = []
        for piece in pieces:
            parts = _PLACE.split(piece.text)
            ids: list[int] = []
            for number, part in enumerate(parts):
                literal = number % 2 == 0
                ids += self._tokenize([part])[0] if literal else self._bare_ids(contents[int(part)])
            out.append(ids)
        return out

    def conversations(
        self, batch: Sequence[Messages], *, train_on: str = "assistant", prompt: bool = False
    ) -> list[Tokens]:
        """Tokens of each conversation; with `prompt`, those of its generation prompt.

        `train_on`: `assistant` supervises every answer, `last` the last one alone. An answer is
        supervised with its stop token and no further. Raises DataError for a conversation that
        the chat template cannot render faithfully.
        """
        cut = [self._pieces(messages, train_on, prompt=prompt) for messages in batch]
        flat = self._tokenize([piece.text for pieces in cut for piece in pieces])
        out, start = [], 0
        for messages, pieces in zip(batch, cut, strict=True):
            ids = flat[start : start + len(pieces)]
            start += len(pieces)
            literals = self._literals(messages, train_on, prompt=prompt)
            if sum(map(self._controls, ids)) != literals.controls:
                ids = self._apart(messages, train_on, prompt=prompt)
                if sum(map(self._controls, ids)) != literals.controls:
                    raise errors.DataError(
                        "the text turns into control tokens of the model. Take the row out."
                    )
            out.append(self._joined(pieces, ids, literals, prompt=prompt))
        return out

    def conversation(self, messages: Messages, *, train_on: str = "assistant") -> Tokens:
        """Tokens of one conversation, see `conversations`."""
        return self.conversations([messages], train_on=train_on)[0]

    def prompt(self, messages: Messages) -> list[int]:
        """Ids of the generation prompt after these messages."""
        return self.conversations([messages], prompt=True)[0].ids

    def _joined(
        self, pieces: list[Piece], ids: list[list[int]], literals: _Literals, *, prompt: bool
    ) -> Tokens:
        out, supervised = [], []
        for number, (piece, piece_ids) in enumerate(zip(pieces, ids, strict=True)):
            if not piece.answer:
                out += piece_ids
                supervised += [False] * len(piece_ids)
                continue
            beyond = literals.beyond[number]
            if beyond is None:  # a template that ends an answer with no token of its own
                stop, piece_ids = len(piece_ids), [*piece_ids, self.eos_id]
            else:
                stop = len(piece_ids) - 1 - beyond
            last = number == len(pieces) - 1 and not prompt
            kept = piece_ids[: stop + 1] if last else piece_ids
            out += kept
            supervised += [k <= stop for k in range(len(kept))]
        return Tokens(out, supervised)

    def _beyond_stop(self, tail: str) -> int | None:
        """How many tokens of what follows an answer come after its stop token."""
        (ids,) = self._tokenize([tail])
        stops = [k for k, id_ in enumerate(ids) if id_ in self.control]
        return len(ids) - 1 - stops[-1] if stops else None

    # --- plain text ------------------------------------------------------------------------

    def document(self, text: str) -> list[int]:
        """Ids of a text to pretrain on: all of it, then the end-of-sequence token."""
        return [*self.text_ids(text), self.eos_id]

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


def _placed(messages: Messages) -> list[formats.Message]:
    return [
        formats.Message(m.role, f"\ue000{i}\ue001" if m.content.strip() else m.content)
        for i, m in enumerate(messages)
    ]
