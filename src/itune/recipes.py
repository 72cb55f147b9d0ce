"""The recipe as a whole: how it is read, overridden, written, compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pydantic
from pydantic import Field

from itune import checks, elsewhere, errors, records, yamls
from itune.records import Record
from itune.sections import Canaries as Canaries
from itune.sections import Data as Data
from itune.sections import Evaluation as Evaluation
from itune.sections import FromScratch as FromScratch
from itune.sections import Launch as Launch
from itune.sections import Model as Model
from itune.sections import Output as Output
from itune.sections import Plan as Plan
from itune.sections import Source as Source
from itune.sections import TokenizerRecipe as TokenizerRecipe
from itune.sections import Tracking as Tracking
from itune.sections import Training as Training

# Keys that say where a run goes and how it is watched, not what comes out of it.
UNDECIDING = (
    "generation",
    "evaluation",
    "output",
    "tracking",
    "launch",
    "plan",
    "training.logging_steps",
    "training.save_steps",
    "training.save_total_limit",
    "data.allow_overlap",
    "training.row_losses",
    "training.profile",
)


class Recipe(Record):
    """All that decides a run."""

    elsewhere: ClassVar[Mapping[str, str]] = elsewhere.RECIPE

    name: Annotated[str, Field(exclude=True)]
    """The recipe's name, from its file; not a key."""
    model: Model
    """The model to start from."""
    adapter: dict[str, Any] | None = None
    """Train an adapter: the fields of the peft config named by `peft_type`. `lora` goes into every
    linear layer with twice its rank as `lora_alpha` (8 and 16), where nothing else is said."""
    quantization: dict[str, Any] | None = None
    """Keep the frozen base in few bits under an adapter: the fields of the transformers config that
    `quant_method` names, such as `bitsandbytes` and `load_in_4bit: true` (`itune[quant]`)."""
    data: Data
    """What is trained on and measured on."""
    training: Training = Training()
    """The loop."""
    generation: dict[str, Any] = Field(default_factory=dict)
    """The fields of `transformers.GenerationConfig` with which answers are written."""
    evaluation: Evaluation = Evaluation()
    """How the result is measured."""
    tracking: Tracking = Tracking()
    """Where the curves go."""
    launch: Launch = Launch()
    """How many processes."""
    plan: Plan = Plan()
    """What `--plan` reckons with."""
    output: Output = Output()
    """What is left behind."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """An empty section (`training:`) has its defaults; the folder follows from the name."""
        if not isinstance(data, dict):
            return data
        data = {key: value for key, value in data.items() if value is not None}
        output = data.get("output", {})
        if isinstance(output, dict) and "dir" not in output and "name" in data:
            data["output"] = {**output, "dir": str(Path("runs") / str(data["name"]))}
        if isinstance(data.get("adapter"), dict):
            data["adapter"] = _lora(data["adapter"])
        return data


def _lora(adapter: dict[str, Any]) -> dict[str, Any]:
    """An `adapter` section, of LoRA with what peft leaves to a list of models or has too small."""
    if str(adapter.get("peft_type")).lower() != "lora":
        return adapter
    filled = dict(adapter)
    if not {"target_modules", "target_parameters"} & set(adapter):
        filled["target_modules"] = "all-linear"
    rank = filled.setdefault("r", 8)
    # Scaled by the root of the rank, twice the rank would be far too much.
    if isinstance(rank, int) and not adapter.get("use_rslora"):
        filled.setdefault("lora_alpha", 2 * rank)
    return filled


# --- reading ------------------------------------------------------------------------------------


def load(
    source: str | Path | None,
    *,
    overrides: Sequence[str] = (),
    output: Path | None = None,
    command: str = "tune",
) -> Recipe:
    """The recipe in a file, or of a bare name (here, in ./recipes, among those shipped).

    overrides: `key=value` each, as `--set` has them. None with overrides: a recipe of those alone.
    Raises RecipeError, with a line for every fault.
    """
    if source is None and not overrides:
        known = errors.nearest("", records.names_in(shipped("recipes")))
        raise errors.RecipeError(f"no recipe. Give --recipe FILE or NAME.{known}")
    if source is None:
        document, name = yamls.Document({}, "--set", errors.RecipeError), "recipe"
    else:
        path = records.find(source, "recipes", errors.RecipeError)
        text = yamls.read_text(path, errors.RecipeError)
        document = yamls.parse(text, errors.inert(str(path)), errors.RecipeError)
        name = name_of(path)
    for each in overrides:
        checks.override(document, each)
    if output is not None:
        checks.put(
            document, ("output", "dir"), str(output), f"--output {errors.inert(str(output))}"
        )
    return _checked(document, name, command)


def loads(text: str, where: str = "recipe.yaml", command: str = "") -> Recipe:
    """The recipe in a text; where: the file that messages name, from which its name follows."""
    document = yamls.parse(text, where, errors.RecipeError)
    return _checked(document, name_of(Path(where)), command)


def _checked(document: yamls.Document, name: str, command: str) -> Recipe:
    checks.check(document, command)
    return records.build(Recipe, document, name=name)


def name_of(path: Path) -> str:
    """`recipes/quickstart/tune.yaml` is quickstart-tune; `runs/imdb/recipe.yaml` is imdb."""
    parts = path.absolute().with_suffix("").parts
    if parts[-1] == "recipe" and len(parts) > 2:
        return parts[-2]
    folders = [i for i, part in enumerate(parts[:-1]) if part == "recipes"]
    return "-".join(parts[folders[-1] + 1 :]) if folders else parts[-1]


def shipped(kind: str) -> Path:
    """The folder of the shipped `recipes` or `prompts`."""
    return records.shipped(kind)


# --- writing and comparing ----------------------------------------------------------------------


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data with every default written out."""
    return recipe.model_dump(mode="json", exclude={"name"})


def dump(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; `loads` gives the same recipe back."""
    data = resolved(recipe)
    if recipe.training.max_steps > 0:
        del data["training"]["num_train_epochs"]  # has no say, and both together are refused
    return yamls.dump(data)


def decides(key: str) -> bool:
    """Whether a dotted key may change what comes out of a run."""
    if key.startswith("data.") and key.endswith(".num_proc"):
        return False
    return not any(key == each or key.startswith(f"{each}.") for each in UNDECIDING)


def digest(recipe: Recipe) -> str:
    """The sha256 of all that decides the result, whatever the order of keys."""
    deciding = [item for item in sorted(_flat(resolved(recipe))) if decides(item[0])]
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def diff(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    """The dotted keys which differ, with both values; None where one has no such key."""
    before, after = dict(_flat(resolved(old))), dict(_flat(resolved(new)))
    return [
        (key, before.get(key), after.get(key))
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]


def _flat(data: Any, key: yamls.Key = ()) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; a list of plain values is one value."""
    if isinstance(data, dict):
        for name, value in data.items():
            yield from _flat(value, (*key, name))
    elif isinstance(data, list) and any(isinstance(value, dict) for value in data):
        for index, value in enumerate(data):
            yield from _flat(value, (*key, index))
    else:
        yield yamls.dotted(key), data


def schema() -> dict[str, Any]:
    """The JSON schema from which editors complete and check a recipe."""
    made = Recipe.model_json_schema()
    del made["properties"]["name"]
    made["required"].remove("name")
    for side in ("train", "eval"):  # one mapping stands for a list of one
        many = made["$defs"]["Data"]["properties"][side]
        one = {key: many.pop(key) for key in ("items", "type")}
        many["anyOf"] = [one["items"], one]
    for key, told in made["properties"].items():  # a section left empty has its defaults
        if "$ref" in told and key not in made["required"]:
            told["anyOf"] = [{"$ref": told.pop("$ref")}, {"type": "null"}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made, "title": "Recipe"}
