"""Writes docs/recipe.md, docs/template.md and the JSON schema from the fields' docstrings.

python docs/make_recipe.py
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from itune import recipes, records, sandbox, templates

PAGE = Path(__file__).with_name("recipe.md")
TEMPLATES = Path(__file__).with_name("template.md")
SCHEMA = Path(__file__).parents[1] / "recipes/recipe.schema.json"

HEAD = """\
# The recipe

<!-- Written by `python docs/make_recipe.py` from the fields' docstrings. Edit those, not this. -->

A recipe is one YAML file that holds all that decides a run. It is data, never code. The keys are
the field names of the Hugging Face objects that they become.

    model:      {name: HuggingFaceTB/SmolLM2-135M}
    adapter:    {peft_type: lora, r: 16, target_modules: all-linear}
    data:
      train:    {path: stanfordnlp/imdb, split: train, template: sentiment}
      eval:     {path: stanfordnlp/imdb, split: "test[:1000]+test[-1000:]", template: sentiment}
    training:   {learning_rate: 2.0e-4, num_train_epochs: 1}

`--recipe` takes a path, or a bare name: it is looked for in the working folder, in `./recipes`,
then among the recipes that ship with itune. A name in a folder is written `quickstart/tune` or
`quickstart-tune`.

## Changing a recipe for one run

`--set key=value`, as often as needed: the key is dotted, the value is YAML, the checks are those of
the file.

    --set training.learning_rate=1e-4
    --set data.train.path=reviews.jsonl        (where `train` is one source)
    --set data.train.1.weight=0.5              (where it is a list; the first is 0)
    --set adapter=null                         (takes a section out)

`--set training.max_steps=100` takes a `num_train_epochs` of the file out, and the other way round;
given both in one place they are refused.

## Where rows come from

`path` is a file, a pattern (`data/**/*.jsonl`), a folder, or a data set of the hub. Files are
`.jsonl` (or `.ndjson`), `.json` (a list, or `field` names the key that it is under), `.csv`,
`.tsv`, `.parquet`, `.arrow` and `.txt` (`sample_by`: line, paragraph, document), each also packed
alone as `.gz`, `.bz2`, `.xz`, `.zst` or `.zip`. A folder holds files of one kind;
where their names tell splits apart (`train-0.jsonl`, `test.jsonl`), `split` picks among them, as it
does in folders that `save_to_disk` wrote. A cell of a table stands for its text: `007` stays `007`,
`true` stays `true`, a text that `{% if flag == 'true' %}` asks for (`True` and `False`, as Python
writes them, are truth values). JSON keeps kinds, and a text like `2024-01-11` is a text (but of a
data set of the hub whose files are JSON, where `datasets` reads it as a time); whole numbers in a
column with fractions are read as `3.0`, and the run says so.

A data set of the hub is of the commit that `revision` stands for. Where the hub cannot be reached,
with `HF_HUB_OFFLINE=1` or without, it is what was loaded here of that commit, and the run says so;
of a commit that was never loaded here there are no rows, and the command ends.

Without a template the columns say what a row is, and itune says what it took them for:

| columns | `format` | read as |
| --- | --- | --- |
| `messages` (role, content) | `messages` | a conversation |
| `conversations` (from, value) | `conversations` | a conversation |
| `instruction`, `output`, maybe `input` | `alpaca` | a prompt and its answer |
| `prompt`, `completion` | `prompt_completion` | the same: texts, or lists of messages |
| `text` | `text` | running text, for `pretrain` |

A column `system` is the system message of its row in each of the first four, `history` of an
`alpaca` row its earlier pairs of prompt and answer; which other columns are there and not read is
told. Roles are known by their usual names (`human`, `gpt`, `developer`, `ai`, `observation`, ...);
`messages` may be the text of their JSON, as a table holds it. Tools, thoughts beside the text
(`reasoning_content`) and turns of weight 0 are refused.

Columns that fit two of them are an error; `format` chooses. Of a prompt and completion the
completion alone is learnt. `streaming: true` reads only what `max_steps` needs. Everything is
tokenised once and kept; a change of data, template, tokenizer or of a key that matters makes it
anew.

## How the file is read

YAML 1.2: `1e-5` is a number, `yes`, `no`, `on`, `off`, `08`, `12:30:45` and `2024-01-01` are text.
Refused are a key given twice, tags (`!!python/...`), merge keys (`<<`), aliases that expand to more
than 10 000 values or hold themselves, more than 50 levels, more than 1 MB, and anything but UTF-8.
A number is not text nor text a number: `name: 7` and `seed: "7"` are both told. A section left
empty has its defaults. Secrets are refused wherever they stand; itune reads them from the
environment (`HF_TOKEN`). All faults are told at once:

    recipes/x.yaml:9: training.leraning_rate: unknown key. Did you mean 'learning_rate'?

Sections: """

TEMPLATE = """\
# The prompt template

<!-- Written by `python docs/make_recipe.py` from the fields' docstrings. Edit those, not this. -->

A template says what a row of data becomes: what the model is asked, and what it shall answer. It is
one YAML file, and data, never code: a new task needs no Python.

```yaml title="prompts/support.yaml"
# Which team shall answer a message?
task: classification
choices: [cards, loans, other]
prompts:
  - "{{ message }}\\n\\nWhich team is this for: {{ choices | join(', ') }}?"
  - "A customer writes: {{ message }}\\nIt is a matter of"
response: "{{ team }}"
metrics: [f1, accuracy]
```

A source of the recipe names it: `train: {path: messages.csv, template: support}`. A bare name is
looked for in the working folder, in `./prompts`, then among the templates that ship with itune; a
path is taken as it is. Columns of other names: `rename: {"Customer message": message}`
([recipe](recipe.md#datatrain-dataeval)). Data that are conversations already need no template.

## Keys

"""

JINJA = """\
## What may stand in a text

The texts are [Jinja](https://jinja.palletsprojects.com/templates/) over the row's columns, strict
and in a sandbox:

* `{{ column }}` writes a column; one that is missing or null is an error with the row's number and
  never an empty text. `{{ answers.text[0] }}` looks into it. A list is no text: take one of it, or
  `join`.
* `{% if input %}...{% endif %}` and `{% for line in history %}...{% endfor %}` work, the tests
  `is string`, `is odd`, ... too. `{{ form | default('poem') }}` stands in for a missing column, and
  `default('poem', true)` for an empty cell too.
* `choices[label]` is the answer of a numbered label, from 0. A label that is the answer's text
  already is written `{{ team }}`; it has to be one of `choices`.
* No other file is read, no private name, and a text takes at most two seconds and a million
  characters beside what the row brings.
* Quote each text. In double quotes `\\n` is a new line; a `|` block ends with a line break, and so
  does its text; `|-` has none.
* What data say stays text: `<|im_end|>` in a row never becomes a control token.

Filters: """

KINDS_OF_TASKS = """\

## Tasks

| `task` | for | how it is answered |
| --- | --- | --- |
| `classification` | labels; needs `choices` | by the likelihood of each choice |
| `qa` | questions | written; scored against `references` where there are several |
| `translation`, `summarization`, `generation` | texts | written |
| `chat` | conversations: no `prompts`, no `response` | written; every answer is learnt |

Several `prompts` are several wordings: training gives each row one of them in turn, and evaluation
scores each and their spread (`--wordings first` asks one).

## Templates that ship with itune

"""

KINDS = {str: "text", int: "whole number", float: "number", bool: "true, false", Path: "path"}


def page() -> str:
    """The whole page."""
    names = records.keys_of(recipes.Recipe)
    links = ", ".join(f"[{name}](#{name})" for name in names)
    parts = [f"{HEAD}{links}.\n"]
    for name in names:
        parts.append(_section(name, recipes.Recipe.model_fields[name]))
    return "\n".join(parts)


def template_page() -> str:
    """The whole page on templates."""
    named = sorted(sandbox.Environment().filters)
    filters = ", ".join(f"`{name}`" for name in named)
    shipped = ["| name | task | what it shows | columns |", "| --- | --- | --- | --- |"]
    for path in sorted(records.shipped("prompts").glob("*.yaml")):
        shipped.append(_shipped(path))
    keys = _table(templates.Template)
    return "\n".join([TEMPLATE.rstrip("\n"), "", keys, JINJA + filters + ".", KINDS_OF_TASKS]) + (
        "\n".join(shipped) + "\n"
    )


def schema_file() -> str:
    """What `itune tune --schema` prints; the first line of each recipe names the file."""
    return json.dumps(recipes.schema(), indent=1, ensure_ascii=False) + "\n"


def _shipped(path: Path) -> str:
    """The line of a shipped template."""
    template = templates.load(path)
    first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    columns = ", ".join(f"`{name}`" for name in sorted(template.columns())) or "`messages`"
    return f"| `{template.name}` | {template.task} | {first} | {columns} |"


def _section(name: str, info: FieldInfo) -> str:
    text = f"## {name}\n\n{_prose(info)}\n"
    record = records.record_in(info.annotation)
    if record is None:
        return text
    tables = [_table(record)]
    for key, field in record.model_fields.items():
        tables += list(_inner(f"{name}.{key}", field))
    return "\n".join([text, *tables])


def _inner(name: str, info: FieldInfo) -> Iterator[str]:
    """The tables of the records inside a field; data.eval has those of data.train."""
    record = records.record_in(info.annotation)
    if record is None or name == "data.eval":
        return
    title = "data.train, data.eval" if name == "data.train" else name
    yield f"### {title}\n\n{' '.join((record.__doc__ or '').split())}\n"
    yield _table(record)
    for key, field in record.model_fields.items():
        yield from _inner(f"{name}.{key}", field)


def _table(record: type[records.Record]) -> str:
    lines = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for key in records.keys_of(record):
        info = record.model_fields[key]
        cells = (f"`{key}`", _value(info), _default(key, info), _prose(info))
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _prose(info: FieldInfo) -> str:
    return " ".join((info.description or "").split())


def _value(info: FieldInfo) -> str:
    return f"{_kind(info.annotation)} {records.bounds(info)}".strip()


def _kind(annotation: Any) -> str:
    """What a person writes for an annotation."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (Union, types.UnionType):
        kinds = (_kind(part) for part in parts if part is not types.NoneType)
        return " or ".join(dict.fromkeys(kinds))
    if origin is tuple:
        inner = _kind(parts[0])
        return f"{inner} or a list of them" if inner == "section" else f"list of {inner}"
    if origin is dict:
        return "mapping"
    if hasattr(annotation, "__metadata__"):
        return _kind(parts[0])
    return KINDS.get(annotation, "section")


def _default(key: str, info: FieldInfo) -> str:
    if info.is_required():
        return "**needed**"
    value = info.get_default(call_default_factory=True)
    if key == "dir":
        return "`runs/NAME`"
    if value is None or value in ((), {}) or isinstance(value, records.Record):
        return ""
    if isinstance(value, tuple):
        value = list(value)  # as a recipe has it
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    SCHEMA.write_text(schema_file(), encoding="utf-8")
    TEMPLATES.write_text(template_page(), encoding="utf-8")
