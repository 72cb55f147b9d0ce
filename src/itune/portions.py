"""What a process keeps and gathers of a model that is cut over several, from its outline.

Needs torch. A part is the first of the rows of a tensor that are dealt out: no other is larger.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch

from itune import compiling, jobs, layerwise, models, optimizers, outlines, recipes


def kept(
    recipe: recipes.Recipe, outline: Any, place: models.Placement, processes: int
) -> dict[str, int]:
    """Bytes of what a process keeps for the length of a run, and of what of it is trained; of a
    model that is cut, what it gathers too.

    processes: over how many the model is cut; 1 where it is not.
    """
    if processes == 1:
        return {
            "weights": outlines.weights_bytes(outline, recipe.quantization),
            "unpacked": outlines.unpacked_bytes(outline) if recipe.quantization else 0,
            "optimizer": optimizers.state_bytes(outline, recipe.training),
            "trained": _bytes(p for p in outline.parameters() if p.requires_grad),
        }
    own, away = parts(outline, processes), offloads(recipe, place)
    return {
        "weights": _bytes((*(() if away else own.parameters()), *outline.buffers())),
        "unpacked": 0,
        "optimizer": 0 if away else optimizers.state_bytes(own, recipe.training),
        "trained": _bytes(p for p in own.parameters() if p.requires_grad),
        # What each process holds for a while before it is cut, and needs no other part beside.
        "whole": 0 if layerwise.why_whole(recipe) is None else _bytes(outline.parameters()),
        **_gathered(
            outline,
            computed(outline, place),
            keeps=not recipe.launch.reshard_after_forward,
        ),
    }


def offloads(recipe: recipes.Recipe, place: models.Placement) -> bool:
    """Whether parts, gradients and moments are in the machine's memory and not in the device's."""
    # A plan for another device than this machine's CPU is one for a GPU.
    return recipe.launch.cpu_offload and (
        place.device.type != "cpu" or recipe.plan.memory is not None
    )


def computed(outline: Any, place: models.Placement) -> Any:
    """An outline in the numbers in which its weights are gathered."""
    if not jobs.mixed(place):
        return outline
    return copy.deepcopy(outline).to(torch.bfloat16)


def parts(outline: Any, processes: int) -> Any:
    """The parameters of a process, on the meta device, as `named_parameters` and `parameters`."""
    named = [
        (name, torch.nn.Parameter(_part(p.detach(), processes), requires_grad=p.requires_grad))
        for name, p in outline.named_parameters()
    ]
    return SimpleNamespace(
        named_parameters=lambda: iter(named), parameters=lambda: (p for _, p in named)
    )


def _part(tensor: torch.Tensor, processes: int) -> torch.Tensor:
    rows = tensor.shape[0] if tensor.ndim else 1
    shape = (-(-rows // processes), *tensor.shape[1:])
    return torch.empty(shape, dtype=tensor.dtype, device="meta")


def _gathered(outline: Any, computed: Any, *, keeps: bool) -> dict[str, int]:
    """Bytes that a process holds beside its parts while a step computes: `gathered` weights, and
    for `communication` gradients that are whole until they are summed.

    computed: the outline in the numbers in which it is gathered. keeps: whether a layer is kept
    from the forward pass to the backward pass. A layer computes while the next one is gathered; of
    the root, what no layer has, all is there from the first pass of a step to its end.
    """
    layers = [list(layer.parameters()) for layer in compiling.repeated(computed)]
    inside = {id(p) for layer in layers for p in layer}
    root = [p for p in computed.parameters() if id(p) not in inside]
    sizes = [_bytes(layer) for layer in layers]
    largest = max(sizes, default=0)
    held = _bytes(root) + largest + (sum(sizes) if keeps else largest)
    # Summed in as many bits as the parts have, which those that compute may lack.
    wider = next(outline.parameters()).element_size() / next(computed.parameters()).element_size()
    trained = [_bytes(p for p in each if p.requires_grad) for each in (root, *layers)]
    moved = trained[0] + max((1 + wider) * max(trained[1:], default=0), wider * trained[0])
    return {"gathered": held, "communication": int(moved)}


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(each.nbytes for each in {id(t): t for t in tensors}.values())
