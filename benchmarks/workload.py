"""The workload that every engine trains on: tokenizer, model and rows, the same on any machine.

    python benchmarks/workload.py FOLDER [--vocabulary 32000] [--rows 2000]

FOLDER gets model/ (random weights, float32), rows.jsonl and tenth.jsonl (`messages`), the same as
prompt and completion for TRL (pairs.jsonl, pairs-tenth.jsonl) and as instructions for LLaMA-Factory
(alpaca.json, dataset_info.json), and stats.json: tokens, and useful work in FLOP a real token.
"""

from __future__ import annotations

import argparse
import json
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
LAYERS, WIDE, INNER, RANK = 4, 256, 688, 16


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


def tokenizer(writer: Writer, vocabulary: int) -> Any:
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
        model_max_length=512,
        chat_template=CHAT,
    )


def write_model(folder: Path, vocabulary: int) -> None:
    """Random weights from a fixed seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDE,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def lengths(draw: np.random.Generator, count: int, median: float, low: int, high: int) -> list[int]:
    """Log-normal lengths, as those of instructions are."""
    return np.clip(np.exp(draw.normal(np.log(median), 0.75, count)), low, high).astype(int).tolist()


def work(real: int, learnt: int, squares: int, vocabulary: int) -> float:
    """Useful FLOP a real token: LoRA over frozen weights, causal attention, answers in the head."""
    body = LAYERS * (4 * WIDE * WIDE + 3 * WIDE * INNER)
    adapter = LAYERS * RANK * (4 * 2 * WIDE + 3 * (WIDE + INNER))
    return (
        2 * body  # forward
        + 2 * (body - 3 * WIDE * WIDE)  # gradient of inputs; none for the first layer's
        + 6 * adapter
        + 6 * squares / real * WIDE * LAYERS
        + 4 * WIDE * vocabulary * learnt / real
    )


def write(folder: Path, *, vocabulary: int = 32_000, rows: int = 2_000) -> dict[str, Any]:
    """The whole workload; returns what stats.json says."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(SEED)
    writer = Writer(words(draw, max(40_000, vocabulary)), draw)
    made = tokenizer(writer, vocabulary)
    made.save_pretrained(folder / "model")
    write_model(folder / "model", vocabulary)
    pairs = [
        (writer.text(p), writer.text(a))
        for p, a in zip(
            lengths(draw, rows, 80, 20, 300), lengths(draw, rows, 35, 5, 150), strict=True
        )
    ]
    for name, kept in (("", pairs), ("tenth", pairs[: max(1, rows // 10)])):
        _write_rows(folder, name, kept)
    prompts = [[{"role": "user", "content": p}] for p, _ in pairs]
    heads = made.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
    before = np.array([len(made(text).input_ids) for text in heads])
    answers = np.array([len(made(f"{a}<|im_end|>").input_ids) for _, a in pairs])
    total = before + answers
    stats = {
        "vocabulary": vocabulary,
        "rows": rows,
        "tokens": int(total.sum()),
        "learnt": int(answers.sum()),
        "work": work(int(total.sum()), int(answers.sum()), int((total**2).sum()), vocabulary),
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
    given = parser.parse_args()
    print(json.dumps(write(given.folder, vocabulary=given.vocabulary, rows=given.rows)))
