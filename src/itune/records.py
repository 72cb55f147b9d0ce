"""Strict frozen records, and what a user reads when a document does not fit one."""

from __future__ import annotations

import difflib
import importlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin

import annotated_types
import pydantic
from pydantic.fields import FieldInfo

from itune import errors, yamls

# YAML tells text from numbers, so pydantic need not guess: `max_steps: "5"` is a fault.
Text = Annotated[str, pydantic.Field(min_length=1)]
Whole = Annotated[int, pydantic.Strict()]
Number = Annotated[float, pydantic.Strict()]
Flag = Annotated[bool, pydantic.Strict()]

T = TypeVar("T", bound="Record")


class Record(pydantic.BaseModel):
    """A section of a file: frozen, unknown keys refused, each field told by its docstring."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    elsewhere: ClassVar[Mapping[str, str]] = {}
    """What is said of a key that other programs have; those of the record of a whole file count."""


def build(record: type[T], document: yamls.Document, **given: Any) -> T:
    """The record that a document describes; raises all faults of the document at once.

    given: fields which do not stand in the document, such as a name.
    """
    _refuse_non_finite(document)
    made: T | None = None
    try:
        made = record.model_validate({**document.data, **given})
    except pydantic.ValidationError as error:
        for each in error.errors(include_url=False):
            _note(record, document, each)
    document.refuse()
    assert made is not None
    return made


def _refuse_non_finite(document: yamls.Document) -> None:
    for key, value in leaves(document.data):
        if isinstance(value, float) and not math.isfinite(value):
            document.fault(key, f"expected a finite number, found {errors.shown(value)}.")


def leaves(data: Any, key: yamls.Key = ()) -> Iterable[tuple[yamls.Key, Any]]:
    """Every value that holds no other, with its key; an empty list or mapping is one too."""
    children: Iterable[tuple[str | int, Any]] = ()
    if isinstance(data, dict):
        children = data.items()
    elif isinstance(data, list | tuple):
        children = enumerate(data)
    held = [leaf for name, child in children for leaf in leaves(child, (*key, name))]
    return held or [(key, data)]


# What is meant by a text alone where a section stands.
MEANT = {
    "model": "{{name: {}}}",
    "data": "{{train: {{path: {}}}}}",
    "adapter": "{{peft_type: {}}}",
    "quantization": "{{quant_method: {}}}",
    "output": "{{dir: {}}}",
}


# --- pydantic's errors, in our words ------------------------------------------------------------


def _note(record: type[Record], document: yamls.Document, error: Any) -> None:
    location = tuple(
        part for part in error["loc"] if not (isinstance(part, str) and part.startswith("<"))
    )
    key = _written(document.data, location)
    if error["type"] == "finite_number":
        return  # noted already, for free-form sections too
    owner, info = _field(record, location)
    if error["type"] == "extra_forbidden":
        what = f"unknown key.{_elsewhere(record, owner, key)}"
    elif error["type"] == "missing":
        names = ", ".join(_choices(info))
        about = f": {_first_sentence(info)}" if info is not None else ""
        what = f"is missing. Add it{f', one of {names}' if names else about}."
    elif error["type"] == "value_error":
        what = str(error["ctx"]["error"])
    else:
        what = _expected(error, info)
    document.fault(key, what)


def _elsewhere(record: type[Record], owner: type[Record] | None, key: yamls.Key) -> str:
    """How an unknown key is written here: as its like in this section, or in another section."""
    typed = str(key[-1])
    name = typed.lower().replace("-", "_")
    if name in record.elsewhere:
        told = record.elsewhere[name]
        if key[:2] == ("data", "eval"):
            told = told.replace("data.train.", "data.eval.")
        return told.replace(f" {yamls.dotted(key[:-1])}.", " ")
    homes = dict(_homes(record))
    if name in homes.values():
        found = [home for home, each in homes.items() if each == name]
        return f" Here it is {' or '.join(found[:3])}."
    hint = errors.nearest(typed, [] if owner is None else keys_of(owner))
    if "Did you mean" in hint:
        return hint
    near = difflib.get_close_matches(name, homes.values(), n=1, cutoff=0.8)
    meant = next((home for home, each in homes.items() if each in near), None)
    return f" Did you mean {meant!r}?" if meant else hint


def _homes(record: type[Record], above: yamls.Key = ()) -> Iterable[tuple[str, str]]:
    """The dotted name and the last part of it of every field of the sections in a record."""
    for key in keys_of(record):
        if above:
            yield yamls.dotted((*above, key)), key
        inside = record_in(record.model_fields[key].annotation)
        if inside is not None:
            yield from _homes(inside, (*above, key))


def _written(data: Any, location: tuple[str | int, ...]) -> yamls.Key:
    """A location in the record as a key of the document, where a list of one may be left out."""
    key: list[str | int] = []
    for part in location:
        if isinstance(data, dict) and part == 0:
            continue
        key.append(part)
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            data = None
    return tuple(key)


def _field(
    record: type[Record], location: tuple[str | int, ...]
) -> tuple[type[Record] | None, FieldInfo | None]:
    """The record that owns the last part of a location, and the field's description."""
    owner: type[Record] | None = record
    info: FieldInfo | None = None
    for part in location:
        if isinstance(part, int):  # the item of a list: still the same field
            continue
        if info is not None:
            owner = record_in(info.annotation)
        info = None if owner is None else owner.model_fields.get(part)
        if info is None:
            break
    return owner, info


def keys_of(record: type[Record]) -> list[str]:
    """The keys that a file may hold: all fields but those that follow from its name."""
    return [key for key, info in record.model_fields.items() if not info.exclude]


def record_in(annotation: Any) -> type[Record] | None:
    """The record inside an annotation such as `tuple[Source, ...]` or `Model | None`."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation if issubclass(annotation, Record) else None
    return next(filter(None, map(record_in, get_args(annotation))), None)


def _first_sentence(info: FieldInfo) -> str:
    text = " ".join((info.description or "").split())
    return re.split(r"[.;](?:\s|$)", text)[0]


KINDS = {
    "string": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "tuple": "a list",
    "list": "a list",
    "path": "a path",
}


def _expected(error: Any, info: FieldInfo | None) -> str:
    value, kind = error["input"], error["type"]
    advice = ""
    if kind == "literal_error":
        names = _choices(info)
        hint = errors.nearest(value, names) if isinstance(value, str) else ""
        expected = f"one of {', '.join(names)}"
        advice = hint if "Did you mean" in hint else ""
    elif kind in ("model_type", "model_attributes_type", "dict_type", "mapping_type"):
        expected = "a mapping of keys"
        advice = _as_path(value, info) or _as_section(value, error["loc"])
    elif kind == "string_too_short":
        expected, advice = "text that is not empty", " Give a value or leave the key out."
    else:
        name = _kind_of(kind, info)
        expected = f"{KINDS.get(name, name)} {bounds(info)}".strip()
        advice = _as_path(value, info) or _quotes(name, value)
    if value is None:
        advice = " Give a value or leave the key out."
    return f"expected {expected}, found {errors.shown(value)}.{advice}"


def _kind_of(kind: str, info: FieldInfo | None) -> str:
    """The kind of value that pydantic's error type asks for."""
    if kind.startswith(("greater_than", "less_than")):
        return "int" if info is not None and "int" in str(info.annotation) else "float"
    return kind.split("_")[0]


def _quotes(name: str, value: Any) -> str:
    """The commonest cure: quotes around a number that is meant as text, none around a number."""
    if name == "string" and isinstance(value, bool | int | float):
        return " Put it in quotes."
    if name == "int" and isinstance(value, float) and value.is_integer():
        return f" Write {value:.0f}."
    if isinstance(value, str) and value.strip():
        plain = yamls.resolve(value.strip()) if len(value) < errors.LONGEST_VALUE else value
        number = isinstance(plain, int | float) and not isinstance(plain, bool)
        if (name in ("int", "float") and number) or (name == "bool" and isinstance(plain, bool)):
            return " Take the quotes off."
        if name in ("tuple", "list"):
            return f" Write [{_in_yaml(value)[:80]}]."
    return ""


def _in_yaml(text: str) -> str:
    """A text as YAML takes it for one: in quotes where a sign in it would have a meaning."""
    plain = re.fullmatch(r"[\w./-]+(?: [\w./-]+)*", text) and yamls.resolve(text) == text
    return text if plain else json.dumps(text, ensure_ascii=False)


def _as_path(value: Any, info: FieldInfo | None) -> str:
    """The cure for a file's bare name where a record with a `path` is meant."""
    record = None if info is None else record_in(info.annotation)
    if record is None or "path" not in record.model_fields or not isinstance(value, str):
        return ""
    return f" Write {{path: {errors.inert(value)[:80]}}}."


def _as_section(value: Any, location: tuple[str | int, ...]) -> str:
    """The cure for a text where a section of a recipe is meant."""
    if len(location) != 1 or location[0] not in MEANT or not isinstance(value, str):
        return ""
    return f" Write {MEANT[str(location[0])].format(_in_yaml(errors.inert(value))[:80])}."


def _choices(info: FieldInfo | None) -> list[str]:
    def inside(annotation: Any) -> list[str]:
        parts = get_args(annotation)
        names = [part for part in parts if isinstance(part, str)]
        return names or [name for part in parts for name in inside(part)]

    return inside(info.annotation) if info is not None else []


def bounds(info: FieldInfo | None) -> str:
    """`> 0 and <= 1`, from the field's own limits; nothing where it has none."""
    if info is None:
        return ""
    signs = (
        (annotated_types.Gt, "gt", ">"),
        (annotated_types.Ge, "ge", ">="),
        (annotated_types.Lt, "lt", "<"),
        (annotated_types.Le, "le", "<="),
    )
    # The limits of `Annotated[int, Field(ge=1)] | None` are inside the annotation.
    inside = [part for each in get_args(info.annotation) for part in _metadata(each)]
    found = [
        f"{sign} {getattr(limit, name)}"
        for limit in (*info.metadata, *inside)
        for kind, name, sign in signs
        if isinstance(limit, kind)
    ]
    return " and ".join(found)


def _metadata(annotation: Any) -> list[Any]:
    parts = getattr(annotation, "__metadata__", ())
    return [limit for part in parts for limit in getattr(part, "metadata", [part])]


# --- files shipped with itune, and names in them ------------------------------------------------


def shipped(kind: str) -> Path:
    """The folder of the shipped `recipes` or `prompts`: in the wheel, or in a checkout."""
    inside = Path(__file__).parent / kind
    return inside if inside.is_dir() else Path(__file__).parents[2] / kind


# Files of rows, and of spreadsheets: given where a recipe is asked for, they are named in one.
ROWS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".arrow", ".txt", ".xlsx", ".xls", ".ods")


def find(name: str | Path, kind: str, error: type[errors.UserError]) -> Path:
    """The file meant by a path as typed or by a bare name: here, in ./KIND, then among the shipped.

    A name may be nested by slashes or dashes (`quickstart/pretrain`, `quickstart-pretrain`). Raises
    `error` with the nearest names.
    """
    typed = str(name)
    if "\0" in typed or not typed.strip():
        raise error(f"{errors.shown(typed)}: not the name of a file.")
    path = Path(typed).expanduser()
    singular = kind.removesuffix("s")
    if path.is_dir():
        inside = sorted(errors.inert(str(file)) for file in path.glob("*.yaml"))
        hint = f" It holds {', '.join(inside[:20])}." if inside else ""
        raise error(f"{errors.inert(typed)}: a folder, not a {singular}.{hint}")
    if path.exists() and path.suffix.lower() in ROWS:
        cure = f" A recipe is YAML that names it: data: {{train: {{path: {errors.inert(typed)}}}}}."
        raise error(
            f"{errors.inert(typed)}: a file of rows, not a {singular}."
            f"{cure if kind == 'recipes' else ''}"
        )
    if path.exists():
        return path
    for folder in (Path(), Path(kind), shipped(kind)):
        found = _named(folder, path, deep=folder != Path())
        if found is not None:
            return found
    near = _near(path, kind)
    # Of a file it is told where it was looked for; of a name, which there are.
    where = f", in {Path.cwd()}" if path.suffix and not near.startswith(" Did") else ""
    raise error(f"{errors.inert(typed)}: no such {singular}{where}.{near}")


def names_in(folder: Path) -> dict[str, Path]:
    """Every YAML file below a folder by its name: `quickstart/pretrain`."""
    files = sorted(folder.rglob("*.y*ml")) if folder.is_dir() else []
    return {
        file.relative_to(folder).with_suffix("").as_posix(): file
        for file in files
        if file.suffix in (".yaml", ".yml") and file.is_file()
    }


def _named(folder: Path, path: Path, *, deep: bool) -> Path | None:
    if path.is_absolute():
        return None
    for suffix in (".yaml", ".yml"):
        candidate = folder / f"{path}{suffix}"
        if candidate.is_file():
            return candidate
    if not deep:  # the working folder may hold anything: it is not searched through
        return None
    stem = path.with_suffix("") if path.suffix in (".yaml", ".yml") else path
    if stem.parts[:1] == (folder.name,):  # recipes/x.yaml, typed where no such folder is
        stem = stem.relative_to(folder.name)
    dashed = stem.as_posix().replace("/", "-")
    known = names_in(folder)
    return next((known[each] for each in known if each.replace("/", "-") == dashed), None)


def _near(path: Path, kind: str) -> str:
    """Names like the one typed: in its own folder if it names one, else among the known."""
    holder = path.parent
    if holder != Path() and holder.is_dir():
        beside = {str(holder / file.name) for file in holder.iterdir() if file.is_file()}
        hint = errors.nearest(str(path), beside)
        if "Did you mean" in hint:
            return hint
    known = {*names_in(Path(kind)), *names_in(shipped(kind))}
    here = {file.stem for file in Path().glob("*.yaml")}
    hint = errors.nearest(str(path.with_suffix("")), known | here)
    if "Did you mean" in hint:
        return hint
    lasts = {each.rpartition("/")[2]: each for each in sorted(known)}
    near = difflib.get_close_matches(path.stem, lasts, n=1, cutoff=0.7)
    return f" Did you mean {lasts[near[0]]!r}?" if near else errors.nearest(path.stem, known)


def metric_faults(
    document: yamls.Document, key: yamls.Key, names: Iterable[Any], *, of_model: bool = False
) -> None:
    """Note the metrics that nobody ships; a path is the user's own metric.

    `of_model`: there is a model to measure, and not its answers alone.
    Looked up late and by name: metrics stand below this file, and a recipe without any needs none.
    """
    known = importlib.import_module("itune.metrics")
    for index, name in enumerate(names):
        measured = of_model and name == known.MEMORISATION
        if isinstance(name, str) and not measured and (said := known.fault(name)):
            document.fault((*key, index), said)
