"""The workload that every engine trains on: tokenizer, model and rows, the same on any machine.

    python benchmarks/workload.py FOLDER [--vocabulary 32000] [--rows 2000] [--shape qwen3-0.6b]

FOLDER gets model/ (random weights), rows.jsonl and tenth.jsonl (`messages`), the same as
prompt and completion for TRL (pairs.jsonl, pairs-tenth.jsonl) and as instructions for LLaMA-Factory
(alpaca.json, dataset_info.json), and stats.json: tokens, and useful work in FLOP a real token.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SEED = 20
SPECIAL = [
    "<|pad|>",
    "<|bos|>",
    "<|im_start|>",
    "<|im_end|>",
]  # padding is 0: the probe counts on it
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
RANK = 16


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes; `kind` is what transformers calls its type."""

    kind: str
    layers: int
    wide: int
    inner: int
    heads: int
    shared: int  # heads of keys and values
    size: int  # of a head

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Inputs and outputs of each linear map of a layer."""
        queries, keys = self.heads * self.size, self.shared * self.size
        attention = [(self.wide, queries), *2 * [(self.wide, keys)], (queries, self.wide)]
        return [*attention, *2 * [(self.wide, self.inner)], (self.inner, self.wide)]


SHAPES = {
    "llama-11m": Shape("llama", 4, 256, 688, 4, 4, 64),
    "qwen3-tiny": Shape("qwen3", 2, 64, 192, 4, 2, 16),
    "qwen3-0.6b": Shape("qwen3", 28, 1024, 3072, 16, 8, 128),
    "qwen3-1.7b": Shape("qwen3", 28, 2048, 6144, 16, 8, 128),
}


@dataclass(frozen=True)
class Texts:
    """Lengths in tokens: median, least and most of prompts and of answers; most of the two."""

    prompt: tuple[float, int, int] = (80, 20, 300)
    answer: tuple[float, int, int] = (35, 5, 150)
    length: int = 512


def words(draw: np.random.Generator, count: int) -> list[str]:
    """Made-up words, the first ones short, as frequent words are."""
    starts = [*"bcdfghjklmnprstvwz", "st", "tr", "ch", "sh", "br", "cl", "pl"]
    middles = [*"aeiou", "ai", "ea", "ou", "ie"]
    ends = ["", "", "n", "r", "s", "t", "l", "m", "nd", "st"]
    made: dict[str, None] = {}
    while len(made) < count:
        parts = 1 if len(made) < 900 else int(draw.integers(2, 5))
        word = "".join(
            str(draw.choice(starts)) + str(draw.choice(middles)) + str(draw.choice(ends))
            for _ in range(parts)
        )
        made[word] = None
    return list(made)


class Writer:
    """Text of about so many tokens: words by Zipf's law, each known by its length in tokens."""

    def __init__(self, lexicon: list[str], draw: np.random.Generator) -> None:
        self.lexicon, self.draw = np.array(lexicon), draw
        weights = 1 / np.arange(1, len(lexicon) + 1)
        self.edges = np.cumsum(weights / weights.sum())
        self.costs = np.ones(len(lexicon), int)

    def text(self, tokens: int) -> str:
        """Words until their tokens are `tokens`."""
        places = np.searchsorted(self.edges, self.draw.random(tokens))
        places = np.minimum(places, len(self.lexicon) - 1)
        kept = np.cumsum(self.costs[places]) <= tokens
        kept[0] = True
        return " ".join(self.lexicon[places[kept]])


def tokenizer(writer: Writer, vocabulary: int, length: int) -> Any:
    """A byte-level BPE of exactly `vocabulary` entries, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    made.train_from_iterator([f" {word} {word}" for word in writer.lexicon], trainer)
    missing = vocabulary - made.get_vocab_size()
    made.add_tokens([f"<|unused{n}|>" for n in range(missing)])
    writer.costs = np.array(
        [len(e.ids) for e in made.encode_batch([f" {w}" for w in writer.lexicon])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[3],
        model_max_length=length,
        chat_template=CHAT,
    )


def config(shape: Shape, vocabulary: int, length: int, **more: Any) -> Any:
    """The config of a model of that shape."""
    import transformers

    fields = {
        "vocab_size": vocabulary,
        "hidden_size": shape.wide,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.shared,
        "head_dim": shape.size,
        "max_position_embeddings": length,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 3,
    }
    return transformers.AutoConfig.for_model(shape.kind, **{**fields, **more})


def write_model(folder: Path, shape: Shape, vocabulary: int, length: int, device: str) -> None:
    """Random weights from a fixed seed, in float32; those made on a GPU in bfloat16."""
    import torch
    import transformers

    torch.manual_seed(SEED)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config(shape, vocabulary, length), dtype=dtype
        )
    model.save_pretrained(folder)


def lengths(draw: np.random.Generator, count: int, median: float, low: int, high: int) -> list[int]:
    """Log-normal lengths, as those of instructions are."""
    return np.clip(np.exp(draw.normal(np.log(median), 0.75, count)), low, high).astype(int).tolist()


def work(
    shape: Shape, real: int, learnt: int, squares: int, vocabulary: int, *, full: bool = False
) -> float:
    """Useful FLOP a real token: causal attention, answers alone in the head, nothing twice.

    squares: the sum of the squares of all lengths. Trained is LoRA over frozen weights, or with
    `full` all weights.
    """
    body = shape.layers * sum(a * b for a, b in shape.matrices)
    attention = 6 * squares / real * shape.heads * shape.size * shape.layers
    head = 2 * shape.wide * vocabulary * learnt / real  # forward; so much again for each gradient
    if full:
        return 6 * body + attention + 3 * head
    first = sum(a * b for a, b in shape.matrices[:3])  # whose inputs need no gradient
    adapter = shape.layers * RANK * sum(a + b for a, b in shape.matrices)
    return 2 * body + 2 * (body - first) + 6 * adapter + attention + 2 * head


def write(
    folder: Path,
    *,
    vocabulary: int = 32_000,
    rows: int = 2_000,
    shape: Shape = SHAPES["llama-11m"],
    texts: Texts = Texts(),
    device: str = "cpu",
) -> dict[str, Any]:
    """The whole workload; returns what stats.json says."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(SEED)
    writer = Writer(words(draw, max(40_000, vocabulary)), draw)
    made = tokenizer(writer, vocabulary, texts.length)
    made.save_pretrained(folder / "model")
    write_model(folder / "model", shape, vocabulary, texts.length, device)
    pairs = [
        (writer.text(p), writer.text(a))
        for p, a in zip(
            lengths(draw, rows, *texts.prompt), lengths(draw, rows, *texts.answer), strict=True
        )
    ]
    for name, kept in (("", pairs), ("tenth", pairs[: max(1, rows // 10)])):
        _write_rows(folder, name, kept)
    prompts = [[{"role": "user", "content": p}] for p, _ in pairs]
    heads = made.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
    before = np.array([len(made(text).input_ids) for text in heads])
    answers = np.array([len(made(f"{a}<|im_end|>").input_ids) for _, a in pairs])
    total = before + answers
    counted = (int(total.sum()), int(answers.sum()), int((total**2).sum()), vocabulary)
    stats = {
        "vocabulary": vocabulary,
        "rows": rows,
        "tokens": counted[0],
        "learnt": counted[1],
        "work": work(shape, *counted),
        "full_work": work(shape, *counted, full=True),
    }
    (folder / "stats.json").write_text(json.dumps(stats, indent=1))
    return stats


def _write_rows(folder: Path, name: str, pairs: list[tuple[str, str]]) -> None:
    user = [{"role": "user", "content": p} for p, _ in pairs]
    answer = [{"role": "assistant", "content": a} for _, a in pairs]
    both = list(zip(user, answer, strict=True))
    _lines(folder / f"{name or 'rows'}.jsonl", [{"messages": [u, a]} for u, a in both])
    suffix = f"-{name}" if name else ""
    _lines(folder / f"pairs{suffix}.jsonl", [{"prompt": [u], "completion": [a]} for u, a in both])
    alpaca = [{"instruction": p, "input": "", "output": a} for p, a in pairs]
    (folder / f"alpaca{suffix}.json").write_text(json.dumps(alpaca))
    (folder / "dataset_info.json").write_text(
        json.dumps({n: {"file_name": f"{n}.json"} for n in ("alpaca", "alpaca-tenth")})
    )


def _lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--rows", type=int, default=2_000)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="llama-11m")
    parser.add_argument("--texts", type=json.loads, default={}, help="fields of Texts, as JSON")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    given = parser.parse_args()
    written = write(
        given.folder,
        vocabulary=given.vocabulary,
        rows=given.rows,
        shape=SHAPES[given.shape],
        texts=Texts(**given.texts),
        device=given.device,
    )
    print(json.dumps(written))
