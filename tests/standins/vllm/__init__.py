"""A stand-in for vLLM where it is not installed: its documented names, by plain transformers.

One prompt at a time through `generate`; signatures as in https://docs.vllm.ai. It is put on the
path by the tests of engines alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from vllm.lora.request import LoRARequest

STARTED: list[LLM] = []


class TokensPrompt(TypedDict):
    prompt_token_ids: list[int]


@dataclass
class SamplingParams:
    n: int = 1
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    detokenize: bool = True

    def __post_init__(self) -> None:
        if self.max_tokens is None or self.max_tokens < 1 or not 0 < self.top_p <= 1:
            raise ValueError(f"max_tokens {self.max_tokens}, top_p {self.top_p}")


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


class LLM:
    """Holds a base; an adapter goes on it for one call of `generate`, as of a LoRARequest."""

    def __init__(
        self,
        model: str,
        *,
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        generation_config: str = "auto",
        load_format: str = "auto",
        enable_lora: bool = False,
        max_lora_rank: int = 16,
        max_model_len: int | None = None,
    ) -> None:
        import torch
        import transformers

        if tensor_parallel_size > 1:
            raise RuntimeError("this machine has too few GPUs")
        self.arguments = {key: value for key, value in locals().items() if key != "self"}
        self.room = max_lora_rank if enable_lora else 0
        self.calls: list[tuple[int, str | None, list[SamplingParams]]] = []
        assert (skip_tokenizer_init, generation_config) == (True, "vllm")
        assert (trust_remote_code, load_format) == (False, "safetensors")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            model, revision=revision, dtype=getattr(torch, dtype)
        )
        self.model, self.location = loaded.eval(), model
        STARTED.append(self)

    def generate(
        self,
        prompts: Sequence[TokensPrompt],
        sampling_params: Sequence[SamplingParams],
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> list[RequestOutput]:
        import peft
        import torch

        assert len(prompts) == len(sampling_params)
        assert not use_tqdm
        name = None if lora_request is None else lora_request.lora_path
        self.calls.append((len(prompts), name, list(sampling_params)))
        model: Any = self.model
        if lora_request is not None:
            assert peft.LoraConfig.from_pretrained(name).r <= self.room
            model = peft.PeftModel.from_pretrained(model, name)
        try:
            with torch.inference_mode():
                return [
                    self._answered(model, each["prompt_token_ids"], asked)
                    for each, asked in zip(prompts, sampling_params, strict=True)
                ]
        finally:
            if lora_request is not None:
                model.unload()

    def _answered(self, model: Any, ids: list[int], asked: SamplingParams) -> RequestOutput:
        import torch
        import transformers

        assert not asked.detokenize, "there is no tokenizer"
        draws = asked.temperature > 0
        stops = list(asked.stop_token_ids or ())
        wanted = transformers.GenerationConfig(
            max_new_tokens=asked.max_tokens,
            min_new_tokens=asked.min_tokens,
            eos_token_id=stops,
            pad_token_id=stops[0],
            repetition_penalty=asked.repetition_penalty,
            do_sample=draws,
            temperature=asked.temperature if draws else None,
            top_k=asked.top_k if draws else None,
            top_p=asked.top_p if draws else None,
        )
        with torch.random.fork_rng():
            torch.manual_seed(asked.seed or 0)
            given = torch.tensor([ids])
            made = model.generate(
                input_ids=given, attention_mask=torch.ones_like(given), generation_config=wanted
            )
        new = made[0, len(ids) :].tolist()
        stop = new[-1] if new[-1] in stops else None
        ended = "length" if stop is None else "stop"
        output = CompletionOutput(0, "", new, ended, stop)
        return RequestOutput("0", list(ids), [output])
