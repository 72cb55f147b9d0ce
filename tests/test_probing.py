"""The probe: exact where it says so, down a level where a way is not exact, and without a trace."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
import transformers
from conftest import tiny_model

from itune import attention, batches, losses, probing

SMALL = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
USUAL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": USUAL,
    "mistral": {**USUAL, "sliding_window": 6},
    "qwen3": USUAL,
    "gemma2": {**USUAL, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {**USUAL, "sliding_window": 6},
    "granite": {**USUAL, "logits_scaling": 3.0},
    "cohere": {**USUAL, "logit_scale": 0.25},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    },
    "biogpt": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


def made(kind: str, **changes: Any) -> Any:
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **KINDS[kind], **changes})
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize(
    ("kind", "layout", "head"),
    [
        ("llama", probing.ROWS, losses.TARGETS),
        ("mistral", probing.ROWS, losses.TARGETS),
        ("qwen3", probing.ROWS, losses.TARGETS),
        ("gemma3_text", probing.ROWS, losses.TARGETS),
        ("gpt_neox", probing.ROWS, losses.TARGETS),
        ("gpt2", probing.ROWS, losses.TARGETS),
        ("opt", probing.ROWS, losses.TARGETS),
        ("biogpt", probing.ROWS, losses.TARGETS),
        ("gemma2", probing.MASK, losses.KEPT),  # a cap inside attention and one on the logits
        ("granite", probing.ROWS, losses.KEPT),  # logits divided
        ("cohere", probing.ROWS, losses.KEPT),  # logits multiplied
        ("bloom", probing.PADDING, losses.TARGETS),
        ("falcon", probing.PADDING, losses.TARGETS),
        ("mpt", probing.PADDING, losses.TARGETS),
        ("mamba", probing.PADDING, losses.TARGETS),
    ],
)
def test_each_kind_of_model_takes_the_leanest_exact_path(kind: str, layout: str, head: str) -> None:
    model = made(kind)
    path = probing.choose(model, 64)
    assert (path.layout, path.head) == (layout, head), path.why
    used = model.config._attn_implementation
    assert (used == attention.NAME) == (layout == probing.ROWS)
    assert "\n" not in path.why
    if layout == probing.PADDING:
        assert "off by" in path.why or "not possible" in path.why


@pytest.mark.parametrize("kind", ["opt", "biogpt", "bloom"])
def test_the_block_mask_is_refused_where_the_library_leaks(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: Any, **_kwargs: Any) -> None:
        raise ValueError("broken on purpose")

    monkeypatch.setattr(attention, "_packed", broken)
    path = probing.choose(made(kind), 64)
    assert path.layout == probing.PADDING
    assert "block mask: off by" in path.why


def test_the_block_mask_is_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: Any, **_kwargs: Any) -> None:
        raise ValueError("broken on purpose")

    monkeypatch.setattr(attention, "_packed", broken)
    path = probing.choose(made("llama"), 64)
    assert path.layout == probing.MASK
    assert "per-row attention: not possible, broken on purpose" in path.why


def test_attention_that_leaks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A band that is one too wide, and a row that sees the one before it."""

    def leaks(module: Any, query: Any, key: Any, value: Any, _mask: Any, **options: Any) -> Any:
        options = {"scale": options["scaling"], "enable_gqa": True}
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, **options
        )
        return out.transpose(1, 2), None

    monkeypatch.setattr(attention, "_packed", leaks)
    assert probing.choose(made("llama"), 64).layout == probing.MASK
    monkeypatch.undo()

    real = attention._window

    def wide(length: int, sliding_window: int | None, like: Any) -> Any:
        return real(length, None if sliding_window is None else sliding_window + 1, like)

    monkeypatch.setattr(attention, "_window", wide)
    model = made("mistral", sliding_window=20)
    assert probing.choose(model, 64).layout == probing.MASK
    # No row of the run is longer than the window, so none can see its edge.
    assert probing.choose(model, 20).layout == probing.ROWS


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_an_output_layer_that_is_adapted_makes_logits(options: dict[str, Any]) -> None:
    import peft

    model = peft.get_peft_model(
        made("llama", tie_word_embeddings=False), peft.LoraConfig(r=2, **options)
    )
    path = probing.choose(model, 64)
    assert path.head == losses.KEPT
    assert "no plain matrix" in path.why


def test_packing_off_is_padding() -> None:
    path = probing.choose(made("llama"), 64, packing=False)
    assert path.layout == probing.PADDING
    assert "training.packing is off" in path.why


def test_a_model_in_16_bits_packs_and_a_leak_in_it_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert probing.choose(made("llama").bfloat16(), 64).layout == probing.ROWS
    monkeypatch.setattr(attention, "_one_by_one", lambda q, *_: torch.zeros_like(q.transpose(1, 2)))
    monkeypatch.setattr(attention, "_WASTE", 0.0)
    assert probing.choose(made("opt").bfloat16(), 64).layout == probing.PADDING


def test_float32_is_held_to_float32_whatever_wraps_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Padding that is off by 2e-3 would pass as noise in 16 bits, and so would packing."""
    real = batches.padded

    def shifted(*arguments: Any) -> batches.Batch:
        made = real(*arguments)
        return dataclasses.replace(made, positions=made.positions * 3)

    monkeypatch.setattr(batches, "padded", shifted)

    @contextlib.contextmanager
    def plain() -> Any:
        yield

    path = probing.choose(made("llama"), 64, autocast=plain)
    assert "padding itself: off by" in path.why

    @contextlib.contextmanager
    def mixed() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            yield

    monkeypatch.undo()
    path = probing.choose(made("llama"), 64, autocast=mixed)
    assert (path.layout, path.head) == (probing.ROWS, losses.TARGETS), path.why


def test_the_probe_leaves_nothing_behind() -> None:
    model = tiny_model("causal").train()
    first = next(model.parameters())
    first.grad = torch.full_like(first, 2.0)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    probing.choose(model, 64)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(first.grad, torch.full_like(first, 2.0))
    assert all(p.grad is None for p in model.parameters() if p is not first)
    assert "forward" not in vars(model.lm_head)
