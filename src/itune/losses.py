"""The loss on supervised positions only, summed, so that the step can divide it exactly.

Needs torch.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F

from itune import batches


def summed(model: torch.nn.Module, batch: batches.Batch) -> torch.Tensor:
    """Summed next-token cross-entropy in nats over the batch's targets, a float32 scalar.

    Whoever calls divides by the count of the whole optimiser step (transformers #34191): a mean
    of means would weigh a token by its micro-batch. A batch without targets gives 0.
    """
    learnt = batch.targets != batches.IGNORED  # [examples, longest] or [1, tokens]
    inputs: dict[str, Any] = {"input_ids": batch.ids, "position_ids": batch.positions}
    if batch.segments is not None:
        inputs["segments"] = batch.segments
    if batch.mask is not None:
        inputs["attention_mask"] = batch.mask
    # Columns in which no row learns anything need no logits.
    columns = learnt.any(0).nonzero().squeeze(1)
    if keeps_logits(model):
        inputs["logits_to_keep"] = columns
    # use_cache is on by default in most configs, and would join the examples of a packed row.
    logits = model(**inputs, use_cache=False).logits
    if not keeps_logits(model):
        logits = logits[:, columns]
    kept = learnt[:, columns]
    return F.cross_entropy(logits[kept].float(), batch.targets[:, columns][kept], reduction="sum")


def keeps_logits(model: Any) -> bool:
    """Whether the model's forward can be asked for the logits of some positions alone."""
    inner = getattr(model, "module", model)
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return "logits_to_keep" in inspect.signature(base.forward).parameters
