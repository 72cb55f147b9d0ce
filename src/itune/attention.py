"""Attention of a packed row: each example attends within itself alone, without padding elsewhere.

Needs torch. Registered with transformers as the attention implementation `itune`, so that any
model which uses the attention interface takes it; the segments travel as an argument of the
model's call, which gradient checkpointing keeps for the recomputation too.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from itune import batches

NAME = "itune"

# Above this ratio of gathered to real attention work, examples are computed one by one instead
# of side by side. chosen: the gather costs less than the calls it saves up to about there.
_WASTE = 3.0


def _packed(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, heads, tokens, size]
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    segments: batches.Segments | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each segment, causal or to both sides as the module's own. Returns
    [1, tokens, heads, size].

    Raises ValueError for what it cannot compute exactly (soft caps, sinks, position biases): the
    probe at the start of a run then falls back to padding.
    """
    if segments is None:
        raise ValueError("packed attention was called without segments")
    if attention_mask is not None:  # ours is none: the model made one of its own
        raise ValueError("packed attention cannot apply the model's own mask")
    refused = [k for k in ("softcap", "s_aux", "position_bias") if kwargs.get(k) is not None]
    if refused:
        raise ValueError(f"packed attention cannot apply {refused[0]}")
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    seen = _Seen(_is_causal(module, kwargs.get("is_causal")), sliding_window)
    if _on_gpu(query) and not dropout:
        given = _as_computed(query, key, value)
        if given[0].dtype != torch.float32:
            return _varlen(*given, segments, scaling, seen), None
    if query.is_cuda and options["enable_gqa"]:
        # There the one kernel that takes shared heads in float32, or with a mask, makes all scores.
        shared = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
        options["enable_gqa"] = False
    lengths = segments.lengths
    longest = max(lengths)
    real = sum(n * n for n in lengths)
    if len(lengths) * longest * longest <= _WASTE * real:
        out = _side_by_side(query, key, value, segments, seen, options)
    else:
        out = _one_by_one(query, key, value, lengths, seen, options)
    return out, None


def _is_causal(module: torch.nn.Module, asked: bool | None) -> bool:
    """As transformers' own attention functions read it."""
    return bool(getattr(module, "is_causal", True) if asked is None else asked)


@dataclass(frozen=True, slots=True)
class _Seen:
    """Which keys of its example a query sees: the earlier ones or all, all of them or those near.

    window: keys on one side, the query's own included; None where any distance is seen.
    """

    causal: bool
    window: int | None

    def band(self, length: int, like: torch.Tensor) -> torch.Tensor | None:
        """A mask [length, length] of what is near, or None where all of the length is."""
        if self.window is None or length <= self.window:
            return None
        place = torch.arange(length, device=like.device)
        distance = place[:, None] - place[None]
        seen = distance < self.window
        return seen & (distance >= 0 if self.causal else distance > -self.window)

    def sides(self) -> tuple[int, int]:
        """The same for a kernel that counts the keys to the left and right of the query."""
        near = -1 if self.window is None else self.window - 1
        return near, 0 if self.causal else near


def _on_gpu(query: torch.Tensor) -> bool:
    """Whether torch's kernel for unequal lengths is there to be called."""
    return query.is_cuda


def _as_computed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What autocast makes of the arguments of torch's plain attention; this kernel it does not
    know. Weights in float32 leave queries and keys so, once rotated by their places.
    """
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: batches.Segments,
    scaling: float | None,
    seen: _Seen,
) -> torch.Tensor:
    """torch's own kernel for segments of unequal lengths (CUDA, 16 bits, torch 2.11 and later)."""
    from torch.nn.attention.varlen import varlen_attn

    longest = max(segments.lengths)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    options: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:  # torch 2.11: heads that share keys and values get each a copy
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = varlen_attn(
        q,
        k,
        v,
        segments.bounds,
        segments.bounds,
        longest,
        longest,
        scale=scaling,
        window_size=seen.sides(),
        **options,
    )
    return out[None]  # type: ignore[call-overload]


def _side_by_side(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: batches.Segments,
    seen: _Seen,
    options: dict[str, Any],
) -> torch.Tensor:
    shape = segments.gather.shape
    mask = seen.band(shape[1], query)
    if not seen.causal:
        # Filled at the right: of a causal model no real token ever sees a filled one.
        mask = _unfilled(segments.lengths, mask, query)

    def spread(x: torch.Tensor) -> torch.Tensor:
        rows = x[0].transpose(0, 1).index_select(0, segments.gather.reshape(-1))
        return rows.view(*shape, *rows.shape[1:]).transpose(
            1, 2
        )  # [examples, heads, longest, size]

    out = F.scaled_dot_product_attention(
        spread(query),
        spread(key),
        spread(value),
        attn_mask=mask,
        is_causal=seen.causal and mask is None,
        **options,
    )
    return out.transpose(1, 2).flatten(0, 1).index_select(0, segments.scatter)[None]


def _unfilled(
    lengths: tuple[int, ...], band: torch.Tensor | None, like: torch.Tensor
) -> torch.Tensor | None:
    """A mask [examples, 1, 1 or longest, longest] of an example's own keys in the band."""
    longest = max(lengths)
    if min(lengths) == longest:
        return band
    ends = torch.tensor(lengths, device=like.device)
    own = (torch.arange(longest, device=like.device) < ends[:, None])[:, None, None]
    if band is None:
        return own
    # A filled query may have no key at all in its band; it is nobody's, but no number is not.
    return (own & band) | torch.eye(longest, dtype=torch.bool, device=like.device)


def _one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    seen: _Seen,
    options: dict[str, Any],
) -> torch.Tensor:
    outs = []
    for q, k, v in zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True):
        mask = seen.band(q.shape[2], q)
        causal = seen.causal and mask is None
        outs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, **options
            ).transpose(1, 2)
        )
    return torch.cat(outs, 1)


def register() -> None:
    """Make the implementation known to transformers. Safe to call again.

    It has no mask of its own: for such a one the library makes none, and looks for no packed rows,
    for which it would wait for the device.
    """
    # Its shapes follow the rows of each batch: compiled layers call it as it is.
    AttentionInterface.register(NAME, torch.compiler.disable(_packed))
