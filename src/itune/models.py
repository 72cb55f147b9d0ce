"""Models and tokenizers: loaded, built from scratch, given the dtype that the processor can do.

Needs torch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from itune import (
    configs,
    data,
    errors,
    families,
    folding,
    launchers,
    locating,
    recipes,
    weights,
)
from itune import quantization as few_bits
from itune.vocabularies import with_template as with_template

CLASSES = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "masked": "AutoModelForMaskedLM",
}
# What a model of transformers raises for a config of which none can be made.
UNBUILDABLE = (
    ValueError, TypeError, RuntimeError, AttributeError, LookupError, ArithmeticError,
    AssertionError,
)  # fmt: skip
# Nothing pickled; no code of a model's own, and no question about it.
SAFE: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# In parameters, both. One thread is enough below the first: at 0.4M it was 13 times faster beside
# a busy core. Below the second bfloat16 gains nothing: of float32's tokens a second it gave 0.7
# times at 0.4M, 0.9 at 1.0M, 1.0 to 1.5 at 1.9M, 1.3 at 3.9M and 1.6 at 4.5M (one thread, AVX-512).
SMALL_FOR_THREADS = 5_000_000
SMALL_FOR_BFLOAT16 = 1_500_000


# --- the processor ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model computes, in which numbers, and why, in one line for the user."""

    device: torch.device
    dtype: torch.dtype
    why: str


def placement(wanted: recipes.Model) -> Placement:
    """The device for a model and the dtype that it computes fast.

    bfloat16 on a processor without bfloat16 instructions runs tens of times slower than float32,
    and most checkpoints come in bfloat16, so the checkpoint's own dtype decides nothing here. On
    a CPU that has them a small model stays in float32: its matrices are too small to gain.
    """
    on_cpu = launchers.on_cpu()
    if torch.cuda.is_available() and not on_cpu:
        device = torch.device("cuda", torch.cuda.current_device())
        name, able = torch.cuda.get_device_name(device), torch.cuda.is_bf16_supported(False)
        kind = "bfloat16" if able else "float32"
        reason = f"{name}, which {'has' if able else 'lacks'} bfloat16"
    elif torch.backends.mps.is_available() and not on_cpu:
        device, kind, reason = torch.device("mps"), "float32", "Apple GPU"
    else:
        device = torch.device("cpu")
        able = cpu_has_bfloat16()
        small = able and wanted.dtype == "auto" and size(wanted) < SMALL_FOR_BFLOAT16
        kind = "bfloat16" if able and not small else "float32"
        why = "which lacks" if not able else "too small a model for" if small else "which has"
        reason = f"CPU ({torch.backends.cpu.get_cpu_capability()}), {why} bfloat16"
    if wanted.dtype != "auto":
        kind, reason = wanted.dtype, f"{reason.split(',')[0]}, as model.dtype asks"
    return Placement(device, DTYPES[kind], f"{kind} on {reason}")


def size(wanted: recipes.Model) -> int:
    """How many parameters a model has, from its config: no weight is read."""
    made = outline(wanted)
    return sum(p.numel() for p in made.parameters())


def outline(wanted: recipes.Model) -> Any:
    """The model that a recipe names, without any weight: all that can be asked but numbers."""
    config = configs.config_of(wanted)
    auto = getattr(transformers, CLASSES[families.chosen(wanted.family, config)])
    with torch.device("meta"):
        if wanted.from_scratch is None:
            return locating.from_library(wanted.name or "", lambda: auto.from_config(config))
        configs.refuse_unknown_activations(wanted.from_scratch)
        try:
            return auto.from_config(config)
        except UNBUILDABLE as error:
            raise configs.unbuildable(wanted.from_scratch, error) from error


def take_threads(model: Any, place: Placement) -> str:
    """Set the number of CPU threads by the model's size; returns it in words, or nothing.

    The matrices of a small model are done before a second thread has begun, and threads that
    wait for each other lose most of the machine to whatever else runs on it. OMP_NUM_THREADS
    decides where it is set.
    """
    if place.device.type != "cpu":
        return ""
    if "OMP_NUM_THREADS" not in os.environ and count(model)[0] < SMALL_FOR_THREADS:
        torch.set_num_threads(1)
    threads = torch.get_num_threads()
    return f", {threads} thread{'s' if threads > 1 else ''}"


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX)."""
    # torch keeps these names private; one that is gone counts as a no.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, bool)()) for probe in probes)


# --- models -------------------------------------------------------------------------------


def load(
    wanted: recipes.Model,
    place: Placement,
    *,
    full: bool = False,
    quantization: Mapping[str, Any] | None = None,
    settings: Any = None,
    elsewhere: Collection[str] = (),
) -> Any:
    """The model that a recipe names, on the placement's device, unwrapped.

    In the placement's dtype, or with `full` in float32 for training all of its weights, which
    bfloat16 would round away; they are then computed with in the placement's dtype. With
    `quantization` (a recipe's section) its matrices are kept in few bits, frozen, and its norms
    in float32, ready for an adapter.

    `settings`: a config in place of its own, such as one of fewer layers; the names of weights
    that this one leaves out are given as `elsewhere`.

    A folder that holds an adapter gives the base with that adapter merged in: what is tuned next
    starts from it. Raises ModelError, EnvironmentRefusal.
    """
    name = wanted.name or ""
    location = locating.resolve(name, wanted.revision)
    if full:
        place = Placement(place.device, torch.float32, place.why)
    if locating.adapter_of(location) is not None:
        if quantization is not None:
            raise errors.RecipeError(
                f"quantization: {name} is an adapter on a base, which only together are whole. "
                "Merge it first (output.merge) and name its merged/ folder."
            )
        return _merged_base(name, location, wanted, place)
    config = locating.from_library(
        name,
        lambda: transformers.AutoConfig.from_pretrained(
            location, revision=wanted.revision, trust_remote_code=False
        ),
    )
    kind = families.chosen(wanted.family, config)
    options: dict[str, Any] = {"revision": wanted.revision, "dtype": place.dtype}
    if settings is not None:
        options["config"] = settings
    if wanted.attn_implementation:
        options["attn_implementation"] = wanted.attn_implementation
    if quantization is not None:
        options["quantization_config"] = few_bits.config(quantization, place.dtype)
        options["device_map"] = {"": place.device}
    auto = getattr(transformers, CLASSES[kind])
    read = functools.partial(auto.from_pretrained, location, **SAFE, **options)
    # The library alone is heard for faults of the model: what our own code raises keeps its name.
    model = weights.loaded(
        name,
        lambda **asked: locating.from_library(name, lambda: read(**asked)),
        head_may_be_new=kind == families.MASKED and quantization is None,
        elsewhere=elsewhere,
    )
    if quantization is None:
        return model.to(place.device)
    import peft

    few_bits.keep_trainable(model)
    return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def refuse_liger(place: Placement) -> None:
    """Raise EnvironmentRefusal where Liger's kernels cannot run."""
    from transformers.utils.import_utils import is_liger_kernel_available

    if place.device.type != "cuda":
        raise errors.EnvironmentRefusal(
            f"training.use_liger_kernel: its kernels run on a GPU, and this is {place.why}. Set it "
            "to false."
        )
    if not is_liger_kernel_available():
        raise errors.EnvironmentRefusal(
            "training.use_liger_kernel: not installed. Run: pip install 'itune[liger]'"
        )


def use_liger(model: Any) -> None:
    """Put Liger's kernels into a model, but for its loss: ours is exact over the whole step."""
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def _merged_base(name: str, location: str, wanted: recipes.Model, place: Placement) -> Any:
    model = folding.merged_or_not(adapted(name, location, wanted, place)).to(place.device)
    if not hasattr(model, "peft_config"):
        model.requires_grad_(True)  # peft froze the base, and it is a whole model again
    return model


def adapted(name: str, location: str, wanted: recipes.Model, place: Placement) -> Any:
    """A saved adapter on its base, not quantised."""
    import peft

    weights.check(str((locating.adapter_of(location) or {}).get("base_model_name_or_path") or name))
    kind = configs.family_of(wanted)
    autos = {
        families.CAUSAL: peft.AutoPeftModelForCausalLM,
        families.SEQ2SEQ: peft.AutoPeftModelForSeq2SeqLM,
    }
    if kind in autos:
        return locating.from_library(
            name, lambda: autos[kind].from_pretrained(location, dtype=place.dtype, **SAFE)
        ).to(place.device)
    settings = locating.adapter_of(location) or {}
    below = wanted.model_copy(
        update={
            "name": settings["base_model_name_or_path"],
            "revision": settings.get("revision"),
        }
    )
    base = load(below, place)
    return locating.from_library(name, lambda: peft.PeftModel.from_pretrained(base, location))


def build(wanted: recipes.Model, loaded: Any, place: Placement, seed: int) -> Any:
    """A model with random weights from a recipe's `from_scratch`. Raises ModelError."""
    scratch = wanted.from_scratch
    if scratch is None:
        raise ValueError("no from_scratch")
    config = configs.blank_config(scratch, loaded)
    try:
        kind = families.chosen(wanted.family, config)
        torch.manual_seed(seed)
        model = getattr(transformers, CLASSES[kind]).from_config(config, dtype=torch.float32)
        _compute(model, kind)
    except UNBUILDABLE as error:
        raise configs.unbuildable(scratch, error) from error
    if scratch.embedding_std is not None:
        draw = torch.Generator().manual_seed(seed)
        table = model.get_input_embeddings().weight
        with torch.no_grad():
            table.copy_(torch.randn(table.shape, generator=draw) * scratch.embedding_std)
    return model.to(place.device)


@torch.no_grad()
def _compute(model: Any, kind: str) -> None:
    """One token through a new model: what does not go together in a config shows only then."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    training = model.training
    given = {"input_ids": ids}
    if kind == families.SEQ2SEQ:
        given["decoder_input_ids"] = ids
    model.eval()(**given)
    model.train(training)


def check_fits(model: Any, corpus: data.Corpus, max_length: int) -> None:
    """Refuse examples longer than the model's positions, and ids beyond its embeddings."""
    room = positions(model)
    longest = int(corpus.lengths.max())
    if longest > room:
        raise errors.RecipeError(
            f"training.max_length: {max_length}, and the longest example has {longest} tokens, "
            f"but the model reads {room}. Set training.max_length: {room}."
        )
    entries = model.get_input_embeddings().weight.shape[0]
    highest = corpus.highest
    if highest >= entries:
        raise errors.ModelError(
            f"the tokenizer gives id {highest}, the model embeds {entries} tokens. They do not "
            "belong together: name a model with its own tokenizer."
        )


def positions(model: Any) -> int:
    """How many tokens a model has positions for; a large number where its config sets none.

    RoBERTa's kind counts from beyond its padding's id.
    """
    room = int(getattr(model.config, "max_position_embeddings", None) or 1 << 30)
    for name, module in model.named_modules():
        if name.endswith("embeddings.position_embeddings"):
            spared = getattr(module, "padding_idx", None)
            return room if spared is None else room - spared - 1
    return room


def recompute(model: Any) -> None:
    """Have the model compute its activations again in the backward pass instead of keeping them."""
    # transformers 5.22 and later have another name for it, and warn of the old one.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def count(model: Any) -> tuple[int, int]:
    """(parameters, trainable parameters), shared ones counted once."""
    parameters = list(model.parameters())
    return (
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
    )
