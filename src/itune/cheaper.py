"""What would make a run fit: changes of its recipe, from what costs nothing to what is another run.

Which of them do is for who knows what memory each needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from itune import batches, families, forecasting, recipes

Change = Callable[[recipes.Recipe], recipes.Recipe]
Peak = Callable[[recipes.Recipe], int]  # bytes that a run of a recipe holds at most
LORA = {"peft_type": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def changes(recipe: recipes.Recipe, longest: int, family: str) -> dict[str, Change]:
    """What takes less memory, as `--set` has it, the cheapest first.

    longest: tokens of the longest row, the least that a micro-batch can have.
    """
    training, found = recipe.training, {}
    if (training.micro_batch_tokens or batches.MICRO_TOKENS) > longest:
        found[f"training.micro_batch_tokens={longest}"] = _training(micro_batch_tokens=longest)
    if not training.gradient_checkpointing:
        found["training.gradient_checkpointing=true"] = _training(gradient_checkpointing=True)
    if recipe.adapter is None:
        if training.optim.startswith("adamw"):
            found["training.optim=adafactor"] = _training(optim="adafactor")
        found["adapter={peft_type: lora}"] = lambda given: given.model_copy(
            update={"adapter": LORA}
        )
    if recipe.quantization is None and recipe.model.name and family != families.MASKED:
        named = "quantization={quant_method: bitsandbytes, load_in_4bit: true}"
        found[named] = lambda given: given.model_copy(update={"quantization": NF4})
    return found


def _training(**fields: Any) -> Change:
    return lambda given: given.model_copy(
        update={"training": given.training.model_copy(update=fields)}
    )


def told(
    found: forecasting.Forecast,
    recipe: recipes.Recipe,
    known: Mapping[str, Change],
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
    if not fitting:
        texts, least = _together(list(known), size, there)
        if least > there:
            return (
                f"{head} That is too much: even with {' and '.join(texts)} it is "
                f"{forecasting.gigabytes(least)}. Take a smaller model, or a larger device."
            )
        fitting = [(texts, least)]
    lines = [f"  {' and '.join(texts)}: {forecasting.gigabytes(size)}" for texts, size in fitting]
    return "\n".join([f"{head} It would fit with, the cheapest first:", *lines[:3]])


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
