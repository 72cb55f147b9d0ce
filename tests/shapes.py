"""Small tokenizers of the kinds that models have, with chat templates of the shapes they have."""

from __future__ import annotations

import functools
import json
from typing import Any, NamedTuple

from conftest import sentences
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

from itune import phrases, vocabularies


class Shape(NamedTuple):
    """A chat template and the control tokens it writes."""

    template: str | None
    bos: str | None
    eos: str
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()  # control, but not special: decoding shows them


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Writes a system message of its own where there is none, and asks after tools and their calls.
QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nAnswer as a helper does.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
           or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# Keeps the thoughts of the last answer, and takes those of earlier ones away.
QWEN3 = """\
{%- set ns = namespace(last_query=messages | length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string %}
        {%- set ns.searching = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role != "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- else %}
        {%- set thought = '' %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query and (loop.last or thought) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') }}
            {{- '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] not in ["user", "assistant"] %}
        {{- raise_exception("Only user and assistant roles are supported.") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- "[INST] " + system_message.strip() + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
# Ends a whole conversation with one token more, and marks answers for other programs.
PHI = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' }}{% generation %}{{ message['content'] + '<|end|>\n' }}"
    "{% endgeneration %}{% else %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)
# Opens a thought in the prompt alone.
THINKER = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|User|>' + m.content }}{% elif m.role == 'assistant' %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|end_of_sentence|>' }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
# Reads a content as a list of parts only, as models that see pictures do.
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# No control token anywhere.
WORDS = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

IM = ("<|im_start|>", "<|im_end|>")
SHAPES = {
    "plain": Shape(None, None, "<|endoftext|>"),
    "plain-bos": Shape(None, "<s>", "</s>"),
    "markers": Shape(None, "<s>", "</s>", ("<|user|>", "<|assistant|>")),
    "chatml": Shape(CHATML, None, "<|im_end|>", IM),
    "qwen": Shape(
        QWEN, None, "<|im_end|>", (*IM, "<|endoftext|>"), ("<tool_response>", "</tool_response>")
    ),
    "qwen3": Shape(QWEN3, None, "<|im_end|>", IM, ("<think>", "</think>")),
    "llama3": Shape(
        LLAMA3,
        "<|begin_of_text|>",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
    ),
    "gemma": Shape(GEMMA, "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "mistral": Shape(MISTRAL, "<s>", "</s>", ("[INST]", "[/INST]")),
    "phi": Shape(
        PHI, "<s>", "<|endoftext|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    ),
    "thinker": Shape(
        THINKER,
        "<|begin_of_sentence|>",
        "<|end_of_sentence|>",
        ("<|User|>", "<|Assistant|>"),
        ("<think>", "</think>"),
    ),
    "parts": Shape(PARTS, None, "<|im_end|>", IM),
    "words": Shape(WORDS, "<s>", "</s>"),
}
ASCII = "".join(map(chr, range(32, 127))) + "\n"
TIKTOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _lines() -> list[str]:
    return [f"{line}\n\nUser: 12,345 {line} Assistant:" for line in sentences(150)]


def _trained(tokenizer: Any, trainer: Any) -> Any:
    tokenizer.train_from_iterator(_lines(), trainer)
    return tokenizer


def _bytes_trainer() -> Any:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options: dict[str, Any] = {"initial_alphabet": alphabet, "show_progress": False}
    return trainers.BpeTrainer(vocab_size=400, **options)


def _byte_bpe() -> Any:
    tokenizer = Tokenizer(kinds.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, _bytes_trainer())


def _phrases() -> Any:
    words = Tokenizer(kinds.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    words.decoder = decoders.ByteLevel()
    return phrases.added(_trained(words, _bytes_trainer()), _lines(), 200)


def _tiktoken() -> Any:
    tokenizer = Tokenizer(kinds.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TIKTOKEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, _bytes_trainer())


def _sentencepiece(prepend: str) -> Any:
    """BPE over ▁ with a fall-back to bytes; `prepend`: its scheme, or the older normalizer."""
    tokenizer = Tokenizer(kinds.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prepend == "normalizer":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=list(ASCII.replace(" ", "▁")), show_progress=False
    )
    spec = json.loads(_trained(tokenizer, trainer).to_str())
    vocab = spec["model"]["vocab"]
    for token in ("<unk>", *(f"<0x{byte:02X}>" for byte in range(256))):
        vocab[token] = len(vocab)
    return Tokenizer.from_str(json.dumps(spec))


def _unigram(*, words: bool = False) -> Any:
    """Unigram over ▁; `words`: cut at spaces first, each of which is then lost."""
    tokenizer = Tokenizer(kinds.Unigram())
    space = pre_tokenizers.Metaspace(prepend_scheme="always")
    cut = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])
    tokenizer.pre_tokenizer = cut if words else space
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        initial_alphabet=list(ASCII),
        unk_token="<unk>",
        special_tokens=["<unk>"],
        show_progress=False,
    )
    return _trained(tokenizer, trainer)


def _wordpiece() -> Any:
    tokenizer = Tokenizer(kinds.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300,
        initial_alphabet=list(ASCII),
        special_tokens=["[UNK]"],
        show_progress=False,
    )
    return _trained(tokenizer, trainer)


def _characters() -> Any:
    vocab = {character: id_ for id_, character in enumerate(ASCII)} | {"<unk>": len(ASCII)}
    tokenizer = Tokenizer(kinds.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


KINDS = {
    "byte-bpe": _byte_bpe,
    "phrases": _phrases,
    "tiktoken": _tiktoken,
    "sp-first": functools.partial(_sentencepiece, "first"),
    "sp-normalizer": functools.partial(_sentencepiece, "normalizer"),
    "unigram": _unigram,
    "unigram-words": functools.partial(_unigram, words=True),
    "wordpiece": _wordpiece,
    "characters": _characters,
}
UNKNOWN = {"wordpiece": "[UNK]", "sp-first": "<unk>", "sp-normalizer": "<unk>"}
UNKNOWN |= {"unigram": "<unk>", "unigram-words": "<unk>", "characters": "<unk>"}


@functools.lru_cache
def _described(kind: str) -> str:
    return str(KINDS[kind]().to_str())


def tokenizer(kind: str, shape: str) -> Any:
    """A tokenizer of a kind, with the control tokens and the chat template of a shape."""
    template, bos, eos, special, added = SHAPES[shape]
    made: Any = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_described(kind)),
        bos_token=bos,
        eos_token=eos,
        unk_token=UNKNOWN.get(kind),
        chat_template=template,
    )
    made.add_special_tokens({"additional_special_tokens": list(special)})
    made.add_tokens([AddedToken(token, normalized=False) for token in added])
    return vocabularies.with_template(made)
