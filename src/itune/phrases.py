"""Tokens of two words: a byte-level BPE tokenizer that goes on merging where words end.

Source: SuperBPE (Liu et al. 2025, arXiv 2503.13423): words are learnt first and kept, then what
often stands beside each other. Text is in fewer tokens, and a phrase has a meaning of its own.
Unlike there a phrase ends with its second word: longer ones are rare in some megabytes of text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

WORDS = 2  # of a phrase; `'t` is a word here
LEAST_OFTEN = 5  # times that a pair is seen before it is a token
CONTRACTED = frozenset({"'s", "'t", "'m", "'d", "'re", "'ve", "'ll"})
# How bytes are written: spaces and line breaks as these four. What is no ASCII sign is in words.
_SPACES, _SIGNS = "ĠĊĉč", r"!-/:-@\[-`{-~"
# Words and numbers that follow each other are one stretch; all else is cut as GPT-2 cuts it.
STRETCH = (
    rf"(?:Ġ?[^{_SPACES}{_SIGNS}]+|'(?:[stmd]|re|ve|ll))+|Ġ?[{_SIGNS}]+|"
    rf"[{_SPACES}]+(?![^{_SPACES}])|[{_SPACES}]+"
)
# While pairs of words are counted, each word is one character from here on.
FIRST, LAST = 0x10000, 0x10FFFF


def added(words: Tokenizer, texts: Iterable[str], most: int) -> Tokenizer:
    """A tokenizer of single words with up to `most` phrases more, of the texts that taught it."""
    state = json.loads(words.to_str())
    vocabulary: dict[str, int] = state["model"]["vocab"]
    letters: dict[str, str] = {}
    pairs = Tokenizer(models.BPE())
    pairs.train_from_iterator(
        _stretches(words, vocabulary, texts, letters),
        trainers.BpeTrainer(
            vocab_size=len(vocabulary) + most,  # no more words than that stand for a character
            max_token_length=WORDS + 1,  # merges stop one before it
            min_frequency=LEAST_OFTEN,
            show_progress=False,
        ),
    )
    spelt = {letter: word for word, letter in letters.items()}
    end = len(vocabulary) + most
    for pair in json.loads(pairs.to_str())["model"]["merges"]:
        left, right = ("".join(map(spelt.__getitem__, part)) for part in pair)
        if left + right not in vocabulary:
            if len(vocabulary) == end:
                break
            vocabulary[left + right] = len(vocabulary)
        state["model"]["merges"].append([left, right])
    built = Tokenizer.from_str(json.dumps(state))
    # Bytes first: they alone can set a space before a text and not before each stretch of it.
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
            pre_tokenizers.Split(Regex(STRETCH), "isolated"),
        ]
    )
    return built


def _stretches(
    words: Tokenizer, vocabulary: Mapping[str, int], texts: Iterable[str], letters: dict[str, str]
) -> Iterator[str]:
    """Words that follow each other in the texts, each that is one token as one character.

    `letters` is filled with what stands for which.
    """
    for text in texts:
        small = text if words.normalizer is None else words.normalizer.normalize_str(text)
        stretch: list[str] = []
        end = 0
        for piece, (start, stop) in words.pre_tokenizer.pre_tokenize_str(small):
            core = small[start:stop].lstrip(" ")
            one = piece in vocabulary and (core.isalnum() or core in CONTRACTED)
            if one and piece not in letters:
                one = len(letters) <= LAST - FIRST
                if one:
                    letters[piece] = chr(FIRST + len(letters))
            if one and start == end:
                stretch.append(letters[piece])
            else:
                yield "".join(stretch)
                stretch = [letters[piece]] if one else []
            end = stop
        yield "".join(stretch)
