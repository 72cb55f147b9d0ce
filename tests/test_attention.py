"""Torch's kernel for segments of unequal lengths, which a GPU has: a stand-in takes its place."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers

from itune import attention, losses, probing


def blank(kind: str) -> Any:
    """A decoder with two layers in float32, whose four query heads share two of the keys'."""
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _segments(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor) -> Any:
    """Causal attention within each segment: what the kernel computes, [tokens, heads, size]."""
    ends = bounds.tolist()
    outs = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x[a:b].transpose(0, 1)[None] for x in (q, k, v)), is_causal=True
        )[0].transpose(0, 1)
        for a, b in itertools.pairwise(ends)
    ]
    return torch.cat(outs)


class Kernel:
    """Stands in for `varlen_attn`, with the arguments of torch 2.12, or of 2.11 (`old`)."""

    def __init__(self, patch: pytest.MonkeyPatch, *, old: bool) -> None:
        self.dtypes: set[torch.dtype] = set()

        def now(
            q, k, v, bounds, _k_bounds, _max_q, _max_k, *, scale, window_size, enable_gqa=False
        ):
            assert window_size == (-1, 0)
            self.dtypes |= {q.dtype, k.dtype, v.dtype}
            if not enable_gqa:
                assert q.shape[1] == k.shape[1] == v.shape[1]
            times = q.shape[1] // k.shape[1]
            wide = (x.repeat_interleave(times, 1) for x in (k, v))
            return _segments(q, *wide, bounds)

        def then(q, k, v, bounds, k_bounds, max_q, max_k, *, scale, window_size):
            given = {"scale": scale, "window_size": window_size}
            return now(q, k, v, bounds, k_bounds, max_q, max_k, **given)

        patch.setattr("torch.nn.attention.varlen.varlen_attn", then if old else now)
        patch.setattr(attention, "_on_gpu", lambda _query: True)


@pytest.mark.parametrize("old", [False, True], ids=["torch 2.12", "torch 2.11"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_kernel_serves_weights_in_float32_under_autocast(
    kind: str, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries come in float32 there, by way of their rotation; the kernel takes 16 bits alone."""
    kernel, model = Kernel(monkeypatch, old=old), blank(kind)

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    path = probing.choose(model, 64, autocast=autocast)
    assert (path.layout, path.head) == (probing.ROWS, losses.TARGETS), path.why
    assert kernel.dtypes == {torch.bfloat16}


def test_the_kernel_is_not_asked_for_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, model = Kernel(monkeypatch, old=False), blank("qwen3")
    assert probing.choose(model, 64).layout == probing.ROWS
    assert not kernel.dtypes


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_kernel_of_this_card_is_exact(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, plain = [], attention._varlen
    monkeypatch.setattr(attention, "_varlen", lambda *given: calls.append(1) or plain(*given))
    model = blank(kind).cuda()
    path = probing.choose(model, 64, autocast=lambda: torch.autocast("cuda", torch.bfloat16))
    assert (path.layout, path.head) == (probing.ROWS, losses.TARGETS), path.why
    assert calls


def test_a_torch_without_the_fused_loss_has_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.11 and 2.12 are, which lack the options too."""
    with monkeypatch.context() as patch:
        patch.delattr(torch.nn.functional, "linear_cross_entropy")
        patch.delattr(torch.nn, "LinearCrossEntropyOptions")
        losses.fused.cache_clear()
        called, plain = [], losses.Chunked.apply
        patch.setattr(losses.Chunked, "apply", lambda *given: called.append(1) or plain(*given))
        path = probing.choose(blank("qwen3"), 64)
    losses.fused.cache_clear()
    assert (path.layout, path.head) == (probing.ROWS, losses.TARGETS), path.why
    assert called
