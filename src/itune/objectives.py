"""What an encoder or an encoder-decoder learns from an example, at each of its visits.

From a prompt with its answer, the answer. From a document, what is hidden in it: masked tokens
(Devlin et al. 2019) or spans (Raffel et al. 2020), other ones at each visit. What is hidden
follows from seed, visit and example alone, and how much from the example's length alone: so a run
that goes on hides what it would have hidden, and the loss is divided by the exact count.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from itune import batches, errors, families

if TYPE_CHECKING:
    from itune import data, encoding, recipes

SENTINEL = "<extra_id_{}>"  # as T5's tokenizers name what stands for a hidden span


class Objective(Protocol):
    """What an example is learnt for. `rows` beyond the corpus are later visits, see `visits`."""

    def example(self, corpus: data.Corpus, row: int) -> tuple[np.ndarray, np.ndarray]:
        """What the model reads and what it learns, int64."""

    def count(self, tokens: np.ndarray) -> np.ndarray:
        """How many targets documents of so many tokens have, int64."""


def collate(
    encoder: encoding.Encoder, model: Any, training: recipes.Training
) -> batches.Collate | None:
    """How the rows of an encoder or an encoder-decoder are collated; None for a decoder's."""
    objective, pad_id = of(encoder, training), int(encoder.tokenizer.pad_token_id or 0)
    if objective is None:
        return None
    if encoder.family == families.MASKED:
        return batches.masked(objective, pad_id)
    return batches.paired(objective, pad_id, lambda labels: families.decoder_inputs(model, labels))


def packed(
    encoder: encoding.Encoder, model: Any, training: recipes.Training
) -> batches.Collate | None:
    """How an encoder's rows share one row without padding; None for the other families."""
    if encoder.family != families.MASKED:
        return None
    return batches.masked_flat(Masks.of(encoder, training), first_position(model))


def first_position(model: Any) -> int:
    """The position of a text's first token: RoBERTa's kind counts from beyond its padding's id."""
    for name, module in model.named_modules():
        if name.endswith("embeddings.position_embeddings"):
            spared = getattr(module, "padding_idx", None)
            return 0 if spared is None else int(spared) + 1
    return 0


def of(encoder: encoding.Encoder, training: recipes.Training) -> Objective | None:
    """The objective of an encoder's family; None where every next token is learnt."""
    if encoder.family == families.SEQ2SEQ:
        return Spans.of(encoder, training)
    return Masks.of(encoder, training) if encoder.family == families.MASKED else None


def counted(corpus: data.Corpus, objective: Objective | None, room: int) -> data.Corpus:
    """The corpus with the targets that its documents have; `room`: tokens of a piece's frame."""
    if objective is None or not any(corpus.plain):
        return corpus
    documents = np.array(corpus.plain)[corpus.source]
    counts = objective.count(np.maximum(corpus.lengths - room, 1))
    return dataclasses.replace(corpus, learnt=np.where(documents, counts, corpus.targets))


def thinned(corpus: data.Corpus, training: recipes.Training) -> data.Corpus:
    """The corpus with its prompts hidden in part, where training asks for that."""
    return dataclasses.replace(corpus, thinned=training.prompt_mask_prob > 0)


def changing(corpus: data.Corpus, objective: Objective | None) -> bool:
    """Whether what an example shows is another thing at each of its visits."""
    return objective is not None and (any(corpus.plain) or corpus.thinned)


def _text(corpus: data.Corpus, row: int) -> bool:
    return bool(corpus.plain) and corpus.plain[corpus.source[row]]


def _drawing(seed: int, corpus: data.Corpus, row: int) -> np.random.Generator:
    return np.random.default_rng([seed, row // len(corpus), row % len(corpus)])


# --- visits -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Repeated:
    """An array with a value an example, seen as if it went on for ever: one turn a visit."""

    values: np.ndarray

    def __getitem__(self, index: Any) -> Any:
        return self.values[np.asarray(index) % len(self.values)]


def visits(corpus: data.Corpus, seed: int) -> Callable[[int], np.ndarray]:
    """The order of each epoch, where each visit of an example has a number of its own.

    Visit v of example k is v * len(corpus) + k.
    """
    most = max((math.ceil(source.weight) for source in corpus.sources), default=1)

    def epoch(number: int) -> np.ndarray:
        order = corpus.epoch(number, seed)
        again = np.zeros(len(order), np.int64)
        if most > 1:
            places = np.argsort(order, kind="stable")
            ordered = order[places]
            again[places] = np.arange(len(order)) - np.searchsorted(ordered, ordered)
        return np.asarray(order + (number * most + again) * len(corpus))

    return epoch


# --- masked tokens ------------------------------------------------------------------------


@dataclass(frozen=True)
class Masks:
    """Tokens hidden by masks, of which the model says what they are.

    Of a document a share `probability` of its tokens, 1 at least; of those most become the mask
    token, some any token, some stay. With `begins` (bool a vocabulary entry: whether a word begins
    with it) whole words are hidden, until there are enough tokens; of the last word only as many
    as are wanted carry loss. Of a prompt a share `prompt` is hidden so, each token by itself, and
    none of it is learnt.
    """

    mask_id: int
    ordinary: np.ndarray  # the ids that are no control tokens
    seed: int
    probability: float
    masked: float
    random: float
    begins: np.ndarray | None = None
    prompt: float = 0.0

    @classmethod
    def of(cls, encoder: encoding.Encoder, training: recipes.Training) -> Masks:
        """By the recipe's settings."""
        tokenizer = encoder.tokenizer
        control = np.array(sorted(encoder.control), np.int64)
        return cls(
            mask_id=int(tokenizer.mask_token_id),
            ordinary=np.setdiff1d(np.arange(len(tokenizer)), control),
            seed=training.seed,
            probability=training.mlm_probability,
            masked=training.mask_replace_prob,
            random=training.random_replace_prob,
            begins=beginnings(tokenizer) if training.whole_word_mask else None,
            prompt=training.prompt_mask_prob,
        )

    def count(self, tokens: np.ndarray) -> np.ndarray:
        """How many targets documents of so many tokens have."""
        return np.maximum(np.rint(tokens * self.probability), 1).astype(np.int64)

    def example(self, corpus: data.Corpus, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids as the model reads them, target at each place or IGNORED), of the same length."""
        raw, supervised = corpus.example(row % len(corpus))
        ids = raw.astype(np.int64)
        targets = np.full(len(ids), batches.IGNORED, np.int64)
        if not _text(corpus, row % len(corpus)):
            targets[supervised] = ids[supervised]
            if corpus.thinned:
                self._thin(ids, ~supervised, _drawing(self.seed, corpus, row))
            ids[supervised] = self.mask_id
            return ids, targets
        places = np.flatnonzero(supervised)
        draw = _drawing(self.seed, corpus, row)
        hidden, learnt = self._drawn(ids[places], draw)
        targets[places[learnt]] = ids[places[learnt]]
        ids[places[hidden]] = self._instead(ids[places[hidden]], draw)
        return ids, targets

    def _thin(self, ids: np.ndarray, asked: np.ndarray, draw: np.random.Generator) -> None:
        """Hide a share `prompt` of a prompt's tokens, control tokens aside, in place."""
        places = np.flatnonzero(asked & np.isin(ids, self.ordinary))
        places = places[draw.random(len(places)) < self.prompt]
        ids[places] = self._instead(ids[places], draw)

    def _drawn(self, ids: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens are hidden, and which of them are learnt."""
        wanted = int(self.count(np.array(len(ids))))
        if self.begins is None:
            chosen = np.sort(draw.permutation(len(ids))[:wanted])
            return chosen, chosen
        starts = self.begins[ids]
        starts[0] = True
        word = np.cumsum(starts) - 1
        rank = draw.permutation(int(word[-1]) + 1)[word]
        ordered = np.argsort(rank, kind="stable")
        return np.flatnonzero(rank <= rank[ordered[wanted - 1]]), np.sort(ordered[:wanted])

    def _instead(self, ids: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        fate = draw.random(len(ids))
        others = self.ordinary[draw.integers(0, len(self.ordinary), len(ids))]
        return np.where(
            fate < self.masked,
            self.mask_id,
            np.where(fate < self.masked + self.random, others, ids),
        )


def beginnings(tokenizer: Any) -> np.ndarray:
    """For each id whether a word begins with it, as the tokenizer marks that; bool [vocabulary].

    Raises RecipeError where the tokenizer marks neither the beginning nor the rest of a word.
    """
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    if any(name.startswith("##") for name in names):
        return np.array([not name.startswith("##") for name in names])
    for mark in ("\u0120", "\u2581"):  # of byte-level BPE and of SentencePiece
        if any(name.startswith(mark) for name in names):
            return np.array([name.startswith(mark) for name in names])
    raise errors.RecipeError(
        "training.whole_word_mask: this tokenizer does not mark where a word begins. "
        "Set it to false."
    )


# --- spans --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spans:
    """Spans hidden by sentinels, and written out after their sentinels by the decoder.

    A document of n tokens hides about n * probability of them in spans of `mean` tokens on
    average; there are never more spans than sentinels.
    """

    sentinels: np.ndarray
    end: int
    seed: int
    probability: float
    mean: float

    @classmethod
    def of(cls, encoder: encoding.Encoder, training: recipes.Training) -> Spans:
        """By the recipe's settings."""
        return cls(
            sentinels=sentinels(encoder.tokenizer),
            end=encoder.eos_id,
            seed=training.seed,
            probability=training.mlm_probability,
            mean=training.mean_noise_span_length,
        )

    def count(self, tokens: np.ndarray) -> np.ndarray:
        """How many targets documents of so many tokens have: hidden ones, sentinels, the end."""
        hidden, spans = self._sizes(np.asarray(tokens))
        return np.asarray(hidden + spans + 1)

    def _sizes(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not len(self.sentinels):
            raise errors.ModelError(
                "the tokenizer has no <extra_id_0>, <extra_id_1>, ..., which stand for what is "
                "hidden in a text, so this model cannot be pretrained on plain text. "
                "Take a model of T5's kind, or data with prompts and answers."
            )
        hidden = np.rint(tokens * self.probability).astype(np.int64)
        hidden = np.clip(hidden, 1, np.maximum(tokens - 1, 1))
        spans = np.maximum(np.rint(hidden / self.mean), 1).astype(np.int64)
        most = np.minimum(np.maximum(tokens - hidden, 1), len(self.sentinels))
        return hidden, np.minimum(spans, most)

    def example(self, corpus: data.Corpus, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(what the encoder reads, what the decoder writes)."""
        raw, supervised = corpus.example(row % len(corpus))
        ids = raw.astype(np.int64)
        if not _text(corpus, row % len(corpus)):
            return ids[~supervised], ids[supervised]
        return self._corrupted(ids[:-1], _drawing(self.seed, corpus, row))

    def _corrupted(
        self, ids: np.ndarray, draw: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """The text with a sentinel for each hidden span, and the spans after their sentinels."""
        hidden, spans = (int(size) for size in self._sizes(np.array(len(ids))))
        kept = _cut(draw, len(ids) - hidden, spans)
        lost = _cut(draw, hidden, spans)
        read, written, at = [], [], 0
        for sentinel, keep, lose in zip(self.sentinels, kept, lost, strict=False):
            read += [ids[at : at + keep], [sentinel]]
            written += [[sentinel], ids[at + keep : at + keep + lose]]
            at += keep + lose
        end = np.array([self.end])
        return (
            np.concatenate([*read, end]).astype(np.int64),
            np.concatenate([*written, end]).astype(np.int64),
        )


def _cut(draw: np.random.Generator, total: int, parts: int) -> np.ndarray:
    """`total` cut at random into so many parts, each at least 1 where that can be."""
    if total < parts:
        return np.array([total] * parts)
    borders = np.sort(draw.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], borders, [total]]))


def sentinels(tokenizer: Any) -> np.ndarray:
    """The ids of <extra_id_0>, <extra_id_1>, ... as far as the vocabulary has them."""
    vocabulary = tokenizer.get_vocab()
    found: list[int] = []
    while (name := SENTINEL.format(len(found))) in vocabulary:
        found.append(vocabulary[name])
    return np.array(found, np.int64)
