"""The optimiser over what is trained, and the schedule of its learning rate.

Needs torch.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from itune import averaging, errors, pieces, recipes


def optimizer(model: Any, settings: recipes.Training) -> torch.optim.Optimizer:
    """The optimiser that `training.optim` names, over the trainable parameters.

    Matrices decay, vectors (biases, norms) do not.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if settings.optim == "sgd":
        return torch.optim.SGD(_groups(named, settings), lr=settings.learning_rate)
    if settings.optim == "adafactor":
        return transformers.Adafactor(
            _groups(named, settings),
            lr=settings.learning_rate,
            scale_parameter=False,
            relative_step=False,
        )
    return _adamw(named, settings, fused=settings.optim != "adamw_torch")


def blank_state(
    model: Any, settings: recipes.Training, peers: pieces.Peers = pieces.ALONE
) -> dict[str, Any]:
    """The optimiser's state_dict as it is after a step, but all zeros; tensors on the CPU.

    peers: the processes that it is cut over, of which this one has its rows.
    """
    state = _outline(model, settings)
    state["state"] = {
        number: {
            name: torch.zeros_like(pieces.own(value, peers), device="cpu")
            if torch.is_tensor(value)
            else value
            for name, value in fields.items()
        }
        for number, fields in state["state"].items()
    }
    return state


def state_bytes(model: Any, settings: recipes.Training) -> int:
    """Bytes that the optimiser's state will have after a step, and the mean of the weights."""
    every = _outline(model, settings)["state"].values()
    moments = sum(t.nbytes for fields in every for t in fields.values() if torch.is_tensor(t))
    if settings.swa_start is None:
        return moments
    return moments + sum(averaging.size(p) for p in model.parameters() if p.requires_grad)


def _outline(model: Any, settings: recipes.Training) -> dict[str, Any]:
    """The optimiser's state_dict after a step, of tensors without memory; the model's are not
    touched.
    """
    twins = [
        (name, torch.nn.Parameter(torch.empty_like(p, device="meta")))
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    if settings.optim == "adamw_torch_fused":  # has the same state, and no kernel for such tensors
        settings = settings.model_copy(update={"optim": "adamw_torch"})
    made = optimizer(SimpleNamespace(named_parameters=lambda: twins), settings)
    for _, twin in twins:
        twin.grad = torch.empty_like(twin)
    made.step()
    state: dict[str, Any] = made.state_dict()
    return state


def _groups(named: list[tuple[str, Any]], settings: recipes.Training) -> list[dict[str, Any]]:
    decayed = [p for _, p in named if p.ndim >= 2]
    spared = [p for _, p in named if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _adamw(
    named: list[tuple[str, Any]], settings: recipes.Training, *, fused: bool
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        _groups(named, settings),
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        fused=fused,
    )


def refuse_schedule(settings: recipes.Training) -> None:
    """Raise RecipeError for a schedule that cannot be made of these settings."""
    schedule(torch.optim.SGD([torch.zeros(())], lr=1.0), settings, 100)


def schedule(made: torch.optim.Optimizer, settings: recipes.Training, steps: int) -> Any:
    """The learning-rate schedule of transformers that `lr_scheduler_type` names."""
    warmup = settings.warmup_steps
    try:
        return transformers.get_scheduler(
            settings.lr_scheduler_type,
            made,
            num_warmup_steps=math.ceil(warmup * steps) if warmup < 1 else int(warmup),
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(settings.lr_scheduler_kwargs),
        )
    except (ValueError, TypeError) as error:
        known = [str(kind.value) for kind in transformers.SchedulerType]
        raise errors.RecipeError(
            f"training.lr_scheduler_type: {settings.lr_scheduler_type!r}: "
            f"{' '.join(str(error).split())}.{errors.nearest(settings.lr_scheduler_type, known)}"
        ) from error
