"""Texts to ids: as control where the template wrote them, never where the data did."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LONG = 1 << 20  # chosen: characters from which on a text is tokenised in stretches
NEAR = 256  # chosen: characters on each side in which a cut is tried
TRIES = 1000  # chosen: places to try before the rest of a text stays whole
# Between two words: only there can a cut be known to change nothing.
SEAM = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")


class Tokenizing:
    """A tokenizer asked for the ids of parts of a text.

    `control`: ids of the added tokens, which no text from data may become; `strings`: their texts.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # An unknown character has the unknown token's id too: that one is no forgery, unless the
        # tokenizer has the same token for its end (GPT-2).
        ends = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
        unknown = {tokenizer.unk_token_id} - ends
        self.control = frozenset(set(tokenizer.added_tokens_decoder) - unknown)
        added = tokenizer.added_tokens_decoder
        self.strings = [str(added[id_]) for id_ in sorted(self.control) if str(added[id_])]
        self._unknown: str | None = str(tokenizer.unk_token) if unknown - {None} else None
        self.prefix = _prefix_of(tokenizer.backend_tokenizer)
        self._made: dict[tuple[bool, bool], Tokenizer] = {}

    def backend(self, *, bare: bool, inner: bool) -> Tokenizer:
        """The tokenizer itself; `bare` without control tokens; `inner` for text that does not
        begin here, so without a space that the tokenizer sets before a text."""
        key = (bare, inner and self.prefix != "never")
        if key not in self._made:
            backend = self.tokenizer.backend_tokenizer
            if any(key):
                from tokenizers import Tokenizer

                spec = json.loads(backend.to_str())
                spec |= {"added_tokens": [], "post_processor": None} if bare else {}
                backend = Tokenizer.from_str(json.dumps(_unprefixed(spec) if key[1] else spec))
            self._made[key] = backend
        return self._made[key]

    def ids(
        self, texts: Sequence[str], *, bare: bool = False, inner: bool = False
    ) -> list[list[int]]:
        backend = self.backend(bare=bare, inner=inner)
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = False
        if inner and not bare and self.prefix == "always":
            return [self._within(backend, text) for text in texts]
        encoded = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def _within(self, backend: Tokenizer, text: str) -> list[int]:
        """Ids of a text that does not begin here, where what follows a control token does."""
        encoding = backend.encode(text, add_special_tokens=False)
        for k, (id_, (start, _)) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
            if id_ in self.control:
                return [*encoding.ids[:k], *self.ids([text[start:]])[0]]
        return list(encoding.ids)

    def opens(self, before: Sequence[int]) -> bool:
        """Whether what follows these ids begins with the tokenizer's own space."""
        return not before or (self.prefix == "always" and before[-1] in self.control)

    def controls_in(self, ids: Iterable[int]) -> tuple[int, ...]:
        control = self.control
        return tuple([id_ for id_ in ids if id_ in control])

    def forged(self, text: str, ids: Sequence[int], controls: tuple[int, ...]) -> bool:
        """Whether a text became control where the template did not write it."""
        return self.controls_in(ids) != controls or (
            self._unknown is not None and self._unknown in text
        )

    def texts(self, texts: Sequence[str]) -> list[tuple[list[int], bool]]:
        """Ids of each text and whether it held a control string."""
        whole = iter(self.ids([text for text in texts if len(text) <= LONG]))
        return [
            self._unforged(text, next(whole)) if len(text) <= LONG else self._long(text)
            for text in texts
        ]

    def _unforged(
        self, text: str, ids: list[int], *, inner: bool = False
    ) -> tuple[list[int], bool]:
        if self.forged(text, ids, ()):
            return self.bare(text, inner=inner), True
        return ids, False

    def bare(self, text: str, *, inner: bool = False) -> list[int]:
        encoding = self.backend(bare=True, inner=inner).encode(text, add_special_tokens=False)
        for id_, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            # A vocabulary may hold a control string as an ordinary entry: cut it in two.
            if id_ in self.control and end - start > 1:
                return [
                    *self.bare(text[: start + 1], inner=inner),
                    *self.bare(text[start + 1 :], inner=True),
                ]
        return list(encoding.ids)

    # --- long texts ------------------------------------------------------------------------

    def _long(self, text: str) -> tuple[list[int], bool]:
        """As `texts`, a stretch after the other: the library needs 200 bytes for a token."""
        ids, held = list[int](), False
        for number, part in enumerate(self._stretches(text)):
            inner = number > 0
            some, guarded = self._unforged(part, self.ids([part], inner=inner)[0], inner=inner)
            ids += some
            held |= guarded
        return ids, held

    def _stretches(self, text: str) -> Iterator[str]:
        """A long text cut where its tokens stay what they are; whole from where that ends."""
        start = 0
        while len(text) - start > LONG and (end := self._seam(text, start + LONG)):
            yield text[start:end]
            start = end
        yield text[start:]

    def _seam(self, text: str, after: int) -> int:
        """The first place from here on where a text can be cut; 0 where there is none.

        No token of the vocabulary may reach over it, so what is merged on one side never depends
        on the other; and the text around it, cut there, must have the ids that it has uncut.
        """
        if self._reaching:
            return 0
        for _, hit in zip(range(TRIES), SEAM.finditer(text, after), strict=False):
            at = hit.start()
            left, right = text[max(0, at - self._near) : at], text[at : at + self._near]
            near = left + right
            if any(each in near for each in self._watched):
                continue
            parts = self.ids([left])[0] + self.ids([right], inner=True)[0]
            if parts == self.ids([near])[0]:
                return at
        return 0

    @functools.cached_property
    def _watched(self) -> tuple[str, ...]:
        """The texts of all added tokens, which may take in the space beside them."""
        return (*self.strings, *filter(None, [self._unknown]))

    @functools.cached_property
    def _near(self) -> int:
        return max(NEAR, 2 * max(map(len, self._watched), default=0))

    @functools.cached_property
    def _reaching(self) -> bool:
        """Whether a token of the vocabulary reaches from one word into the next."""
        backend = self.tokenizer.backend_tokenizer
        probe = "x x"
        if backend.normalizer is not None:
            probe = backend.normalizer.normalize_str(probe)
        if backend.pre_tokenizer is not None:
            probe = "".join(part for part, _ in backend.pre_tokenizer.pre_tokenize_str(probe))
        spaces = re.escape("".join(set(probe) - {"x"}))  # as the vocabulary writes them
        if not spaces:
            return False
        over = re.compile(f"[^{spaces}][{spaces}]")
        return any(over.search(token) for token in backend.get_vocab(with_added_tokens=False))


# --- tokenizers that set a space before a text --------------------------------------------------


# Where words are cut at spaces first, each word has its own space, wherever a text begins.
_CUTTERS = frozenset({"WhitespaceSplit", "Whitespace"})


def _prefix_of(backend: Tokenizer) -> str:
    """When the tokenizer sets a space of its own before a text: never, first (of a whole text)
    or always (after a control token too)."""
    schemes = ["never"]
    for part in (backend.normalizer, backend.pre_tokenizer):
        for step in _steps(json.loads(part.__getstate__())) if part is not None else ():
            if step.get("type") in _CUTTERS:
                break
            schemes.append(_scheme(step))
    return max(schemes, key=("never", "first", "always").index)


def _steps(part: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, those of a sequence one by one."""
    inside = part.get("normalizers") or part.get("pretokenizers") or ()
    return [part, *(step for each in inside for step in _steps(each))]


def _scheme(step: dict[str, Any]) -> str:
    if step.get("type") == "Metaspace":
        return str(step.get("prepend_scheme", "always"))
    if step.get("type") == "Prepend" or step.get("add_prefix_space") is True:
        return "always"
    return "never"


def _unprefixed(spec: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's description without the space that it sets before a text."""
    for part in (spec["normalizer"], spec["pre_tokenizer"]):
        for step in _steps(part) if part else ():
            if step.get("type") == "Metaspace":
                step["prepend_scheme"] = "never"
            elif step.get("type") == "Prepend":
                step["prepend"] = ""
            elif "add_prefix_space" in step:
                step["add_prefix_space"] = False
    return spec
