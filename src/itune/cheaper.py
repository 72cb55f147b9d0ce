"""What would make a run fit: changes of its recipe, from what costs nothing to what is another run.

Which of them do is for who knows what memory each needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from itune import batches, families, forecasting, recipes

Change = Callable[[recipes.Recipe], recipes.Recipe]
Peak = Callable[[recipes.Recipe], int]  # bytes that a run of a recipe holds at most
MOST = 64  # chosen: processes up to which a model is cut where it does not fit
MOST_TOLD = 3  # changes
FSDP = "launch.fsdp=true"
ADAFACTOR = "training.optim=adafactor"
FEW_BITS = "quantization={quant_method: bitsandbytes, load_in_4bit: true}"
LORA = {"peft_type": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def changes(recipe: recipes.Recipe, longest: int, family: str, processes: int) -> dict[str, Change]:
    """What takes less memory, as `--set` has it, the cheapest first.

    longest: tokens of the longest row, the least that a micro-batch can have.
    """
    training, found = recipe.training, {}
    if (training.micro_batch_tokens or batches.MICRO_TOKENS) > longest:
        found[f"training.micro_batch_tokens={longest}"] = _training(micro_batch_tokens=longest)
    if processes > 1 and not recipe.launch.fsdp and _can_be_cut(recipe):
        found[FSDP] = _launch(fsdp=True)
    if recipe.launch.fsdp and not recipe.launch.reshard_after_forward:
        found["launch.reshard_after_forward=true"] = _launch(reshard_after_forward=True)
    if not training.gradient_checkpointing:
        found["training.gradient_checkpointing=true"] = _training(gradient_checkpointing=True)
    if recipe.adapter is None:
        if training.optim.startswith("adamw") and not recipe.launch.fsdp:
            found[ADAFACTOR] = _training(optim="adafactor")
        found["adapter={peft_type: lora}"] = lambda given: given.model_copy(
            update={"adapter": LORA}
        )
    few_bits = recipe.quantization is None and not recipe.launch.fsdp
    if few_bits and recipe.model.name and family != families.MASKED:
        found[FEW_BITS] = lambda given: given.model_copy(update={"quantization": NF4})
    return found


def further(recipe: recipes.Recipe, processes: int) -> dict[str, Change]:
    """More processes over which the model is cut, each twice as many: that takes more devices."""
    if not _can_be_cut(recipe):
        return {}
    counts = [2**k for k in range(1, MOST.bit_length()) if 2**k > processes]
    return {
        f"launch.num_processes={count} and {FSDP}": _launch(num_processes=count, fsdp=True)
        for count in counts
    }


def _can_be_cut(recipe: recipes.Recipe) -> bool:
    """Whether the recipe has nothing that is refused beside a cut model."""
    training = recipe.training
    others = training.torch_compile, training.swa_start is not None, recipe.quantization
    return not any(others) and training.optim != "adafactor"


def _launch(**fields: Any) -> Change:
    return lambda given: given.model_copy(update={"launch": given.launch.model_copy(update=fields)})


def _training(**fields: Any) -> Change:
    return lambda given: given.model_copy(
        update={"training": given.training.model_copy(update=fields)}
    )


def told(
    found: forecasting.Forecast,
    recipe: recipes.Recipe,
    known: Mapping[str, Change],
    more: Mapping[str, Change],
    peak: Peak,
) -> str:
    """What the user is told of a run that does not fit: its parts, and the changes that help."""
    needed, there = forecasting.gigabytes(found.memory["peak"]), found.available
    head = (
        f"model: {needed} are needed on each device and {forecasting.gigabytes(there)} are there "
        f"({forecasting.shares(found.memory)})."
    )

    def size(texts: Sequence[str]) -> int:
        changed = recipe
        for text in texts:
            changed = known[text](changed)
        return peak(changed)

    alone: list[tuple[tuple[str, ...], int]] = [((text,), size([text])) for text in known]
    fitting = [each for each in alone if each[1] <= there]
    texts: tuple[str, ...] = ()
    least = 0
    if not fitting:
        texts, least = min(
            (_together(way, size, there) for way in _ways(known)),
            key=lambda each: max(each[1], there),
        )
        fitting = [(texts, least)] if least <= there else []
    # Many devices may do what no setting does, or what only another run would.
    spread = next(
        (((text,), needs) for text in more if (needs := peak(more[text](recipe))) <= there), None
    )
    fitting = fitting[: MOST_TOLD - (spread is not None)] + ([spread] if spread else [])
    if not fitting:
        return (
            f"{head} That is too much: even with {' and '.join(texts)} it is "
            f"{forecasting.gigabytes(least)}. Take a smaller model, or a larger device."
        )
    lines = [f"  {' and '.join(texts)}: {forecasting.gigabytes(size)}" for texts, size in fitting]
    return "\n".join([f"{head} It would fit with, the cheapest first:", *lines])


def _ways(known: Iterable[str]) -> Iterator[list[str]]:
    """The changes that go with each other: a model is cut, or has what is not cut."""
    if FSDP in known:
        yield [text for text in known if text not in (ADAFACTOR, FEW_BITS)]
    yield [text for text in known if text != FSDP]


def _together(
    texts: Sequence[str], size: Callable[[Sequence[str]], int], there: int
) -> tuple[tuple[str, ...], int]:
    """The first changes that fit together, without those of them that are not needed."""
    taken: list[str] = []
    least = 0
    for text in texts:
        taken.append(text)
        least = size(taken)
        if least <= there:
            break
    for text in taken[:-1]:
        without = [each for each in taken if each != text]
        smaller = size(without)
        if smaller <= max(least, there):
            taken, least = without, smaller
    return tuple(taken), least
