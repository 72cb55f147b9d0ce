"""Vocabularies: tokenizers trained here, and the chat template and pad token that one lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

import transformers

from itune import families, launching, objectives, phrases, recipes

# Control tokens of a tokenizer trained here: a decoder's are itune's own, an encoder's are named
# as BERT's and an encoder-decoder's as T5's. No unknown token where bytes cover every text.
PAD, BOS, EOS, USER, ASSISTANT = "<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"
TOKENS: dict[str, dict[str, Any]] = {
    families.CAUSAL: {
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "additional_special_tokens": [USER, ASSISTANT],
    },
    families.SEQ2SEQ: {"pad_token": "<pad>", "eos_token": "</s>"},
    families.MASKED: {
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    },
}
EXTRA = "additional_special_tokens"
SENTINELS = 100  # as T5 has; fewer in a small vocabulary


def with_template(loaded: Any, kind: str = families.CAUSAL) -> Any:
    """The tokenizer with a chat template and a pad token, set where it lacks them."""
    if loaded.chat_template is None:
        loaded.chat_template = plain_template(loaded, kind)
    if loaded.pad_token is None:
        loaded.pad_token = loaded.eos_token
    if getattr(loaded, "legacy", None):
        # Llama's reads text after a control token otherwise with it, and is saved without it.
        loaded.init_kwargs["legacy"] = loaded.legacy
    return loaded


def plain_template(loaded: Any, kind: str = families.CAUSAL) -> str:
    """itune's own chat template: markers where the vocabulary has them, else plain words.

    Of models that read a prompt alone: the prompt as it is.
    """
    name = "markers" if USER in loaded.get_vocab() else "plain"
    name = name if kind == families.CAUSAL else "bare"
    return (resources.files("itune") / f"chat_{name}.jinja").read_text(encoding="utf-8")


def train(
    wanted: recipes.TokenizerRecipe, texts: Callable[[], Iterator[str]], kind: str = families.CAUSAL
) -> Any:
    """A tokenizer of `vocab_size` entries trained on texts, with a family's control tokens.

    `texts` gives them anew at each call: phrases are looked for once the words are known.
    """
    from tokenizers import processors

    named = dict(TOKENS[kind])
    if wanted.algorithm == "wordpiece":
        named["unk_token"] = "[UNK]"
    special = [*(t for t in named.values() if isinstance(t, str)), *named.get(EXTRA, ())]
    if kind == families.SEQ2SEQ:
        count = min(SENTINELS, wanted.vocab_size // 10)
        special += [objectives.SENTINEL.format(k) for k in range(count)]
    built = _trained(wanted, texts, special)
    framed = {families.SEQ2SEQ: ("$A", "</s>"), families.MASKED: ("[CLS]", "$A", "[SEP]")}
    if kind in framed:
        used = [name for name in framed[kind] if name != "$A"]
        built.post_processor = processors.TemplateProcessing(
            single=" ".join(framed[kind]),
            special_tokens=[(name, built.token_to_id(name)) for name in used],
        )
    return with_template(
        transformers.PreTrainedTokenizerFast(tokenizer_object=built, **named), kind
    )


def _trained(
    wanted: recipes.TokenizerRecipe, texts: Callable[[], Iterator[str]], special: list[str]
) -> Any:
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
    from tokenizers import models as kinds

    common: dict[str, Any] = {
        "vocab_size": wanted.vocab_size - wanted.phrases,
        "special_tokens": special,
        "show_progress": False,
    }
    trainer: Any
    if wanted.algorithm == "wordpiece":
        built = Tokenizer(kinds.WordPiece(unk_token="[UNK]"))
        built.normalizer = normalizers.BertNormalizer(
            lowercase=wanted.lowercase, strip_accents=False
        )
        built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        built.decoder = decoders.WordPiece()
        built.train_from_iterator(texts(), trainers.WordPieceTrainer(**common))
        return built
    common["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    if wanted.algorithm == "unigram":
        built, trainer = Tokenizer(kinds.Unigram()), trainers.UnigramTrainer(**common)
    else:
        built, trainer = Tokenizer(kinds.BPE()), trainers.BpeTrainer(**common)
    if wanted.lowercase:
        built.normalizer = normalizers.Lowercase()
    # Every piece starts like a word inside a text, so that an answer's first word is the same
    # token as in the middle of a sentence.
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    built.decoder = decoders.ByteLevel()
    built.train_from_iterator(texts(), trainer)
    if not wanted.phrases:
        return built
    longer = phrases.added(built, texts(), wanted.phrases)
    found = longer.get_vocab_size() - built.get_vocab_size()
    if found < wanted.phrases:
        launching.warn(
            f"tokenizer.phrases: {found:,} of {wanted.phrases:,} were found, of words that are one "
            f"token each and often beside each other; {longer.get_vocab_size():,} entries of "
            f"{wanted.vocab_size:,} in all. Fewer phrases leave more entries for words."
        )
    return longer
