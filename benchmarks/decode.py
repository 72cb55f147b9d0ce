"""Tokens a second of itune's decoding beside `transformers.generate`, on the same prompts.

    python benchmarks/decode.py                 # a random Llama of 12M weights
    python benchmarks/decode.py --model DIR     # one that is there
    python benchmarks/decode.py --size qwen3-0.6b --vocabulary 151936 --dtype bfloat16

All ways answer the same prompts, unsorted as they are, greedily, in batches of the same size, one
after the other and `--repeats` times over; the median of each counts. Answers end where they meet
one of some tokens, so their lengths differ as those of real answers do. What is compared with:

    batches      transformers.generate, prompts as they come, padded at the left
    sorted       the same, prompts sorted by length
    continuous   transformers' generate_batch, its cache bounded to what ours takes
    vllm         where it is installed
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import workload

from itune import decoding, stepping

Answers = list[list[int]]
# Of 0.2, 12 and 22 million weights, and those that are trained on.
SIZES = {
    "small": workload.Shape("llama", 2, 64, 168, 2, 1, 32),
    "medium": workload.Shape("llama", 6, 384, 1024, 12, 6, 32),
    "large": workload.Shape("llama", 6, 512, 1360, 16, 8, 32),
    **workload.SHAPES,
}
VOCABULARIES = {"small": 512, "medium": 4096, "large": 4096}


class Plain:
    """All that decoding asks of an encoder, without a text."""

    def __init__(self, stops: list[int]) -> None:
        self.stops = stops

    def decode(self, ids: Any) -> str:
        return ""


def made(size: str, vocabulary: int, dtype: torch.dtype) -> Any:
    """A decoder with random weights; spread so widely that greedy answers differ.

    Its output layer is one of its own: by the embedding's each token would give itself again.
    """
    torch.manual_seed(17)
    config = workload.config(SIZES[size], vocabulary, 1024, tie_word_embeddings=False)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=1.0)
    return model.eval()


def asked(vocabulary: int, rows: int, shared: int) -> Answers:
    """Prompts of 8 to 160 tokens, most of them short, behind a beginning that all share."""
    draw = random.Random(17)
    begin = [draw.randrange(3, vocabulary) for _ in range(shared)]
    lengths = [8 + int(min(152, draw.expovariate(1 / 40))) for _ in range(rows)]
    return [begin + [draw.randrange(3, vocabulary) for _ in range(each)] for each in lengths]


def cut(new: list[int], stops: set[int]) -> list[int]:
    """An answer to its first stop token, which is kept."""
    end = next((k for k, id_ in enumerate(new) if id_ in stops), None)
    return new if end is None else new[: end + 1]


def by_itune(model: Any, prompts: Answers, wanted: Any) -> Answers:
    encoder: Any = Plain(wanted.eos_token_id)
    found = decoding.generate(model, encoder, prompts, wanted, say=print)
    return [list(each.ids) for each in found]


@torch.inference_mode()
def by_batches(model: Any, prompts: Answers, wanted: Any) -> Answers:
    stops, size = set(wanted.eos_token_id), stepping.BATCH_ROWS
    out: Answers = []
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(each)) + each for each in part])
        mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in part])
        new = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=wanted,
        )
        out += [cut(each, stops) for each in new[:, width:].tolist()]
    return out


def by_sorted(model: Any, prompts: Answers, wanted: Any) -> Answers:
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    found = by_batches(model, [prompts[i] for i in order], wanted)
    out: Answers = [[] for _ in prompts]
    for i, each in zip(order, found, strict=True):
        out[i] = each
    return out


def by_continuous(model: Any, prompts: Answers, wanted: Any) -> Answers:
    bounded = transformers.ContinuousBatchingConfig(
        num_blocks=32768 // 256,
        block_size=256,
        max_batch_tokens=stepping.BATCH_ROWS * 8,
    )
    found = model.generate_batch(
        inputs=prompts,
        generation_config=wanted,
        continuous_batching_config=bounded,
        progress_bar=False,
    )
    stops = set(wanted.eos_token_id)
    # In the order in which they were asked, which their names tell.
    by_name = sorted(found.items(), key=lambda item: int(item[0].rsplit("_", 1)[1]))
    return [cut(list(each.generated_tokens), stops) for _, each in by_name]


def by_vllm(folder: str) -> Callable[[Any, Answers, Any], Answers]:
    import vllm  # type: ignore[import-not-found]

    engine = vllm.LLM(model=folder, skip_tokenizer_init=True, max_num_seqs=stepping.BATCH_ROWS)

    def answer(model: Any, prompts: Answers, wanted: Any) -> Answers:
        how = vllm.SamplingParams(
            temperature=0.0,
            max_tokens=wanted.max_new_tokens,
            stop_token_ids=wanted.eos_token_id,
            detokenize=False,
        )
        found = engine.generate([{"prompt_token_ids": each} for each in prompts], how)
        return [list(each.outputs[0].token_ids) for each in found]

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder; a random model when left out")
    parser.add_argument("--size", default="medium", choices=tuple(SIZES))
    parser.add_argument("--vocabulary", type=int, help="entries of a random model's")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--shared", type=int, default=32, help="tokens that all prompts begin with")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer at most")
    parser.add_argument("--stops", type=float, default=0.02, help="share of tokens that end one")
    parser.add_argument("--batch", type=int, default=stepping.BATCH_ROWS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", default="itune,batches,sorted,continuous,vllm")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    stepping.BATCH_ROWS = given.batch
    if given.model:
        model = transformers.AutoModelForCausalLM.from_pretrained(given.model, dtype="auto").eval()
    else:
        vocabulary = given.vocabulary or VOCABULARIES.get(given.size, 4096)
        model = made(given.size, vocabulary, getattr(torch, given.dtype))
    if torch.cuda.is_available():
        model.to("cuda")
    vocabulary = model.config.vocab_size
    prompts = asked(vocabulary, given.rows, given.shared)
    draw = random.Random(18)
    stops = sorted(draw.sample(range(3, vocabulary), int(vocabulary * given.stops)))
    wanted = transformers.GenerationConfig(
        max_new_tokens=given.new, do_sample=False, eos_token_id=stops, pad_token_id=0
    )
    ways: dict[str, Callable[[Any, Answers, Any], Answers]] = {
        "itune": by_itune,
        "batches": by_batches,
        "sorted": by_sorted,
        "continuous": by_continuous,
    }
    if importlib.util.find_spec("vllm") and given.model:
        ways["vllm"] = by_vllm(given.model)
    ways = {name: way for name, way in ways.items() if name in given.ways.split(",")}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, Answers] = {}
    for way in ways.values() if torch.cuda.is_available() else ():
        way(model, prompts[:2], wanted)  # what a GPU does once
    for turn in range(given.repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            answers[name] = way(model, prompts, wanted)
            seconds[name].append(time.perf_counter() - started)
            print(f"{turn + 1}: {name}: {seconds[name][-1]:.2f} s", flush=True)
    told(model, given, seconds, answers)


def told(
    model: Any,
    given: argparse.Namespace,
    seconds: dict[str, list[float]],
    answers: dict[str, Answers],
) -> None:
    """A table, and the same as JSON."""
    lengths = sorted(len(each) for each in next(iter(answers.values())))
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "attention": model.config._attn_implementation,
    }
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{Path(given.model).name if given.model else given.size}: {parameters:,} weights, "
        f"{given.rows} prompts, batches of {given.batch}; answers of {lengths[0]} to {lengths[-1]} "
        f"tokens, median {lengths[len(lengths) // 2]}, mean {statistics.mean(lengths):.1f}"
    )
    print(" ".join(f"{k}={v}" for k, v in versions.items()))
    rates = {}
    base = answers.get("batches", next(iter(answers.values())))
    for name, took in seconds.items():
        tokens = sum(map(len, answers[name]))
        rates[name] = tokens / statistics.median(took)
        same = sum(a == b for a, b in zip(answers[name], base, strict=True))
        print(f"{name:12} {rates[name]:10,.0f} tokens/s   {same} of {len(base)} answers the same")
    if {"itune", "batches"} <= set(rates):
        print(f"itune / batches: {rates['itune'] / rates['batches']:.2f}")
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    made = {"versions": versions, "tokens_per_second": rates, "seconds": seconds}
    print(json.dumps({**made, "gpu_bytes": peak}))


if __name__ == "__main__":
    main()
