"""A model that no process holds whole: read from its files layer by layer, each cut at once.

Needs torch. It is built from its config with weights that have shapes and take no memory. What a
whole model is tried for is tried on a stand-in: the same model as the library loads it, with as
few layers as show each kind of them.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from safetensors import safe_open

from itune import (
    compiling,
    configs,
    errors,
    families,
    locating,
    memory,
    models,
    origins,
    outlines,
    recipes,
    weights,
)

# Of LoRA, what starts from random numbers alone, whatever the base's weights are.
RANDOM_STARTS = (None, True, "gaussian")
OF_BASE = ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters")


def why_whole(recipe: recipes.Recipe) -> str | None:
    """Why a recipe's model has to be whole in each process before it is cut; None if it need not.

    Raises ModelError for a model that is not there.
    """
    name, adapter = recipe.model.name, recipe.adapter
    if name is None:
        return "its random weights are drawn one after another"
    if locating.adapter_of(locating.resolve(name, recipe.model.revision)) is not None:
        return "an adapter is folded into it"
    if adapter is not None:
        kind = str(adapter.get("peft_type", "")).lower()
        drawn = adapter.get("init_lora_weights") in RANDOM_STARTS
        if kind != "lora" or not drawn or any(adapter.get(key) for key in OF_BASE):
            return "its adapter may start from the base's own weights"
    if recipe.training.use_liger_kernel:
        return "Liger's kernels are put into whole models"
    if outlines.layers(configs.config_of(recipe.model)) is None:
        return "its config does not say how many layers it has"
    return None


def fits(recipe: recipes.Recipe, place: models.Placement) -> bool:
    """Whether the whole model can be in each process for a while, as what is free tells: twice its
    weights on the device, and on the way there once in the machine's memory for each process.
    """
    dtype = outlines.weights_dtype(recipe, place)
    size = models.size(recipe.model) * dtype.itemsize
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    left = memory.left(place.device)
    if left is None:
        return 2 * size * beside <= memory.host()
    return 2 * size <= left and size * beside <= memory.host()


@dataclass(frozen=True)
class Read:
    """A model without its weights, where they are read from, and what stands in for it.

    blank: by the id of each parameter without memory, that one and its names; keys: of those names
    that have one, the key in the files.
    """

    model: Any
    stand_in: Any
    blank: Mapping[int, tuple[torch.nn.Parameter, tuple[str, ...]]]
    keys: Mapping[str, str]
    files: Mapping[str, Path]
    name: str

    def tensor(self, parameter: torch.Tensor) -> torch.Tensor:
        """The weights of a parameter without memory, on the CPU, in its own numbers."""
        _, names = self.blank[id(parameter)]
        key = next((self.keys[each] for each in names if each in self.keys), None)
        if key is None:  # a head that was not saved, which the library has drawn
            drawn = dict(self.stand_in.named_parameters(remove_duplicate=False))
            made: torch.Tensor = drawn[names[0]].detach().cpu()
            return made
        with safe_open(self.files[key], framework="pt") as file:
            found = file.get_tensor(key)
        if found.shape != parameter.shape:
            raise errors.ModelError(
                f"{self.name}: weight {key} has the shape {tuple(found.shape)}, but its config "
                f"asks for {tuple(parameter.shape)}. They do not belong together."
            )
        made = found.to(parameter.dtype, copy=True)  # what the file's pages hold goes with it
        weights.refuse_non_finite(self.name, [(key, made)])
        return made

    @torch.no_grad()
    def fill(self, module: torch.nn.Module, device: torch.device) -> None:
        """Give everything in a module that has no memory yet its weights, on a device."""
        made: dict[int, torch.nn.Parameter] = {}
        for each in module.modules():
            for name, p in each._parameters.items():
                if p is not None and id(p) in self.blank:
                    if id(p) not in made:
                        given = self.tensor(p).to(device)
                        made[id(p)] = torch.nn.Parameter(given, requires_grad=p.requires_grad)
                    each._parameters[name] = made[id(p)]


def read(recipe: recipes.Recipe, place: models.Placement) -> Read:
    """The model that a recipe names, without weights, and its stand-in, both without an adapter.

    Raises ModelError where what is read from the files is not, bit for bit, what the library makes
    of them.
    """
    wanted, name = recipe.model, recipe.model.name or ""
    settings = copy.deepcopy(configs.config_of(wanted))
    dtype = outlines.weights_dtype(recipe, place)
    model = _blank(wanted, settings, dtype)
    named = list(model.named_parameters(remove_duplicate=False))
    prefix = f"{model.base_model_prefix}."
    known = {form for key in model.state_dict() for form in _forms(key, prefix)}
    stand_in = models.load(
        wanted,
        place,
        full=dtype == torch.float32,
        settings=outlines.cut(settings, _depth(model, settings)),
        elsewhere=known,
    )
    model.drawn = getattr(stand_in, "drawn", ())
    files = _files(name, wanted.revision)
    keys = {key: form for key, _ in named for form in _forms(key, prefix) if form in files}
    blank: dict[int, tuple[torch.nn.Parameter, tuple[str, ...]]] = {}
    for key, p in named:
        _, before = blank.get(id(p), (p, ()))
        blank[id(p)] = p, (*before, key)
    found = Read(model, stand_in, blank, keys, files, name)
    if model.drawn and recipe.adapter is not None:
        raise _refusal(found, "its head is drawn, and trained whole beside the adapter")
    _refuse_missing(found)
    _refuse_shared(found)
    _refuse_others(found)
    return found


def _forms(key: str, prefix: str) -> tuple[str, ...]:
    """How files may call a weight: with the name of the model's body before it, or without."""
    return key, key.removeprefix(prefix), prefix + key


def _blank(wanted: recipes.Model, settings: Any, dtype: torch.dtype) -> Any:
    """The model of a config, its buffers real, its parameters of one number spread over a shape."""
    auto = getattr(transformers, models.CLASSES[families.chosen(wanted.family, settings)])
    options: dict[str, Any] = {"dtype": dtype}
    if wanted.attn_implementation:
        options["attn_implementation"] = wanted.attn_implementation
    with accelerate.init_empty_weights(include_buffers=False):
        model = locating.from_library(
            wanted.name or "", lambda: auto.from_config(settings, **options)
        )
    model.tie_weights()
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                if id(p) not in made:
                    # Not on the meta device: an adapter is put where its layer's weights are.
                    one = torch.zeros((), dtype=p.dtype).expand(p.shape)
                    made[id(p)] = torch.nn.Parameter(one, requires_grad=p.requires_grad)
                module._parameters[name] = made[id(p)]
    return model.eval()


def _depth(model: Any, settings: Any) -> int:
    """The fewest layers, two or more, among which there is one of each kind."""
    kinds = getattr(settings.get_text_config(decoder=True), "layer_types", None) or []
    layers = {id(each) for each in compiling.repeated(model)}
    seen: set[Any] = set()
    depth = 2
    for path, module in model.named_modules():
        if id(module) in layers:
            place, _, number = path.rpartition(".")
            shapes = tuple((name, p.shape) for name, p in module.named_parameters())
            index = int(number)
            kind = (place, type(module), shapes, kinds[index] if index < len(kinds) else None)
            depth = max(depth, index + 1) if kind not in seen else depth
            seen.add(kind)
    return depth


def _files(name: str, revision: str | None) -> dict[str, Path]:
    """The file of each key of a model's weights; those of the hub have been fetched."""
    import huggingface_hub

    location = locating.resolve(name, revision)
    folder = Path(location)
    if not folder.is_dir():
        folder = Path(
            huggingface_hub.snapshot_download(
                location, revision=origins.commit(name, revision), local_files_only=True
            )
        )
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():  # as the library has it
        shards = [whole]
    else:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        shards = [folder / each for each in sorted(set(listed))]
    found = {}
    for path in shards:
        with safe_open(path, framework="pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found


# --- what the library makes of the same files -----------------------------------------------------


def _refuse_missing(found: Read) -> None:
    """Raise ModelError for a weight that no file holds, but for those of a head that is drawn."""
    there = {name for name, _ in found.stand_in.named_parameters(remove_duplicate=False)}
    body = f"{found.model.base_model_prefix}."
    fresh = {name for name in there if found.model.drawn and not name.startswith(body)}
    for _, names in found.blank.values():
        if not any(each in found.keys or each in fresh for each in names):
            raise _refusal(found, f"no file of it holds {names[0]} under this name")


def _refuse_shared(found: Read) -> None:
    owners: dict[int, int] = {}
    for number, layer in enumerate(compiling.repeated(found.model)):
        for p in layer.parameters():
            if owners.setdefault(id(p), number) != number:
                raise _refusal(found, "its layers share weights with each other")


@torch.no_grad()
def _refuse_others(found: Read) -> None:
    """Raise ModelError where weights, buffers or what is tied are others than in the stand-in."""
    ours = dict(found.model.named_parameters(remove_duplicate=False))
    theirs = dict(found.stand_in.named_parameters(remove_duplicate=False))
    groups = [
        {
            frozenset(name for name in theirs if name in each and each[name] is p)
            for p in each.values()
        }
        - {frozenset()}
        for each in (ours, theirs)
    ]
    if not theirs.keys() <= ours.keys() or groups[0] != groups[1]:
        raise _refusal(found, "the library ties other weights to each other")
    for name, p in found.stand_in.named_parameters():
        if p.dtype != ours[name].dtype or not torch.equal(found.tensor(ours[name]), p.cpu()):
            raise _refusal(found, f"the library makes something else of {name}")
    buffers = dict(found.model.named_buffers())
    for name, buffer in found.stand_in.named_buffers():
        if name not in buffers or not torch.equal(buffers[name].cpu(), buffer.cpu()):
            raise _refusal(found, f"the library makes something else of {name}")


def _refusal(found: Read, why: str) -> errors.ModelError:
    return errors.ModelError(
        f"launch.fsdp: {found.name} does not fit a process whole, and cannot be read layer by "
        f"layer: {why}. Save it once with transformers' save_pretrained, or set launch.fsdp to "
        "false."
    )
