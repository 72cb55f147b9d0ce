"""The prompt template: what a row becomes; its wordings, choices, sandbox and limits.

Jinja is the only code that a user's file may hold, so it runs strict (a missing column is an
error, never an empty text), in the sandbox of `sandbox.py`, without loading other files, and may
not write more than 1 MB a row.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn

import jinja2
import jinja2.meta
import jinja2.nodes
import pydantic

from itune import elsewhere, errors, expressions, records, sandbox, yamls
from itune.records import Text

Task = Literal["classification", "qa", "translation", "summarization", "generation", "chat"]

SINGLE = re.compile(r"\{\s*([A-Za-z_]\w*)\s*\}")  # as other programs write a column
# What Jinja says of `{{ Guest wrote }}` and `{{ done? }}`.
NAME_ENDS = re.compile(r"unexpected char|end of print statement', got '?[^\W\d]")
LIST_ATTRIBUTE = re.compile(r"'list object' has no attribute ('\w+')")
LARGEST_TEXT = 1_000_000  # characters that one prompt or answer may have beside its row's texts
LOADERS = {
    jinja2.nodes.Extends: "extends",
    jinja2.nodes.Include: "include",
    jinja2.nodes.Import: "import",
    jinja2.nodes.FromImport: "import",
}


@functools.lru_cache(maxsize=1)
def _environment() -> expressions.Environment:
    return expressions.Environment()


@functools.lru_cache(maxsize=1024)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@functools.lru_cache(maxsize=256)
def _expression(source: str) -> Any:
    return _environment().compile_expression(source, undefined_to_none=False)


class Template(records.Record):
    """How a row of data becomes a prompt and its answer."""

    elsewhere: ClassVar[Mapping[str, str]] = elsewhere.TEMPLATE

    name: Annotated[str, pydantic.Field(exclude=True)]
    """The template's name, from its file; not a key."""
    task: Task
    """What is asked of the model; decides how answers are found and measured."""
    choices: tuple[Text, ...] = ()
    """What may be answered, in the order of the labels; for classification."""
    values: dict[str, Text] = pydantic.Field(default_factory=dict)
    """Texts for the prompts, the same for all rows, by name; a column of that name is not read."""
    system: Text | None = None
    """A message before every prompt, the same for all rows; not for `chat`."""
    prompts: tuple[Text, ...] = ()
    """One or more wordings, in Jinja over the row's columns and `choices`."""
    response: Text | None = None
    """The answer to learn, in Jinja."""
    references: Text | None = None
    """Every answer that counts as right: a Jinja expression that gives a list of texts."""
    metrics: tuple[Text, ...] = ()
    """What `itune eval` reports when the recipe names no metrics."""
    truncation_side: Literal["right", "left"] = "right"
    """Where the longest column of a prompt that does not fit is cut: its end or its beginning."""

    _places: dict[str, str] = pydantic.PrivateAttr(default_factory=dict)

    def prompt(self, row: Mapping[str, Any], wording: int) -> str:
        """The prompt in one of the wordings; raises DataError where the row does not fit."""
        if not self.prompts:
            raise errors.TemplateError(
                f"{self.name}: a chat has no prompts; its messages are used."
            )
        return self._render(self.prompts[wording], f"prompts.{wording}", row)

    def answer(self, row: Mapping[str, Any]) -> str:
        """The answer that is learned; raises DataError where the row does not fit."""
        if self.response is None:
            raise errors.TemplateError(
                f"{self.name}: a chat has no response; its messages are used."
            )
        text = self._render(self.response, "response", row)
        if self.task == "classification" and text not in self.choices:
            self._refuse("response", self._no_choice(text))
        return text

    def asking(self, system: str | None = None) -> Template:
        """The template for rows whose answer is not known: a word stands in for it.

        system: the system message in place of its own.
        """
        stands = "{{ choices[0] }}" if self.choices else "?"
        changed = {"response": stands, "references": None, "system": system or self.system}
        return self.model_copy(update=changed)

    def gold(self, row: Mapping[str, Any]) -> list[str]:
        """Every answer that counts as right: the references, else the one answer."""
        if self.references is None:
            return [self.answer(row)]
        try:
            with sandbox.BUDGET:
                found = _expression(self.references)(self._variables(row))
            if isinstance(found, jinja2.Undefined):
                found._fail_with_undefined_error()
        except (jinja2.TemplateError, sandbox.Refused, *sandbox.PYTHON_FAULTS) as error:
            self._fail("references", row, error)
        if not isinstance(found, list | tuple) or not all(isinstance(each, str) for each in found):
            self._refuse("references", f"expected a list of texts, found {errors.shown(found)}")
        if not found:
            self._refuse("references", "expected at least one text, found an empty list")
        return list(found)

    def columns(self) -> set[str]:
        """The columns that prompts, response and references read."""
        sources = [*self.prompts, self.response or "", _printed(self.references)]
        return {name for source in sources for name in _names(source)} - self._own()

    def asked_columns(self) -> set[str]:
        """The columns that prompts read."""
        return {name for source in self.prompts for name in _names(source)} - self._own()

    def prompt_columns(self) -> set[str]:
        """The columns that prompts read and the answer does not: what may be cut to fit."""
        answer = (self.response or "", _printed(self.references))
        asked, told = (
            {name for source in sources for name in _names(source)}
            for sources in (self.prompts, answer)
        )
        return asked - told - self._own()

    def _own(self) -> set[str]:
        return {*self.values, *(("choices",) if self.choices else ())}

    def _variables(self, row: Mapping[str, Any]) -> dict[str, Any]:
        given = {**row, **self.values}
        return {**given, "choices": expressions.Choices(self.choices)} if self.choices else given

    def _render(self, source: str, key: str, row: Mapping[str, Any]) -> str:
        parts: list[str] = []
        length = 0
        # Long texts are not the template's fault: it may write each a few times over.
        given = sum(len(value) for value in row.values() if type(value) is str)
        most = LARGEST_TEXT + 2 * given
        try:
            with sandbox.BUDGET as budget:
                budget.most += 20 * given
                for part in _compiled(source).generate(self._variables(row)):
                    length += len(part)
                    if length > most:
                        raise sandbox.Refused(f"the text is longer than {most} characters")
                    parts.append(part)
        except (jinja2.TemplateError, sandbox.Refused, *sandbox.PYTHON_FAULTS) as error:
            self._fail(key, row, error)
        text = "".join(parts)
        if not text.strip():
            self._refuse(key, f"the text is empty. The row has {_has(row)}")
        return text

    def _fail(self, key: str, row: Mapping[str, Any], error: Exception) -> NoReturn:
        if isinstance(error, sandbox.Exhausted):
            place = self._places.get(key, self.name)
            raise errors.TemplateError(
                f"{place}: {key}: {error}. Write it more simply, or prepare the rows beforehand."
            ) from error
        wanted = _names(self._source(key)) - self._own()
        missing = sorted(wanted - set(row))
        empty = sorted(name for name in wanted if name in row and row[name] is None)
        if isinstance(error, jinja2.UndefinedError) and missing:
            raise self._no_column(missing[0], key, row) from error
        if isinstance(error, sandbox.Refused) and empty:
            what = f"column {empty[0]!r} is empty (null) in this row"
            said = f"{{{{ {empty[0]} | default('...', true) }}}}"
            self._refuse(key, f"{what}. Fill it in, take the row out, or write {said}", error)
        said = errors.inert(str(error)).rstrip(".")
        if found := LIST_ATTRIBUTE.search(said):
            said += f". Take one of the list, [0], or | map(attribute={found[1]}) | list"
        self._refuse(key, said, error)

    def _no_choice(self, text: str) -> str:
        """What is wrong with an answer that is none of the choices, and its cure."""
        what = f"{errors.shown(text)} is none of {', '.join(self.choices)}."
        if text.strip() in self.choices:
            return f"{what} Take the blanks off: {{{{ ... | trim }}}}"
        if text.strip().isdecimal() and int(text) < len(self.choices):
            return f"{what} A number from 0 is written {{{{ choices[LABEL | int] }}}}"
        hint = errors.nearest(text, self.choices)
        near = hint if "Did" in hint else ""
        place = self._places.get("choices", self.name)
        return f"{what}{near} Mend the rows, or add it to choices ({place})"

    def _no_column(self, name: str, key: str, row: Mapping[str, Any]) -> errors.DataError:
        free = [str(each) for each in sorted(row) if each not in self.columns()]
        source = self._source(key)
        # `{{ Customer-Text }}` is a subtraction: what was meant is the column with that sign in it.
        signs = [each for each in free if not each.isidentifier() and each.strip() in source]
        meant, said = _meant(name, free), f"the row has no column {name!r}."
        if signs:
            meant, name = signs[0], re.sub(r"\W+", "_", signs[0]).strip("_").lower()
            said = f"{_quoted(meant)} is no name for Jinja. Write {{{{ {name} }}}} here."
        elif meant:
            said += f" Did you mean {errors.inert(meant)!r}?"
        place = self._places.get(key, self.name)
        error = errors.DataError(errors.masked(f"{place}: {key}: {said} It has {_has(row)}."))
        error.column = name
        if free:
            old = meant or (free[0] if len(free) == 1 else None)
            written = "THE COLUMN" if old is None else _quoted(old)
            error.cure = f" Write rename: {{{written}: {name}}} beside template in the recipe."
        return error

    def _source(self, key: str) -> str:
        if key == "references":
            return _printed(self.references)
        return self.response or "" if key == "response" else self.prompts[int(key.split(".")[1])]

    def _refuse(self, key: str, what: str, cause: Exception | None = None) -> NoReturn:
        place = self._places.get(key, self.name)
        raise errors.DataError(errors.masked(f"{place}: {key}: {what}.")) from cause


def _has(row: Mapping[str, Any]) -> str:
    """The names of a row's columns; in quotes where blanks or signs would not be seen."""
    return ", ".join(_quoted(str(name)) for name in sorted(row)[:20]) or "no columns"


def _quoted(name: str) -> str:
    return name if name.isidentifier() else repr(errors.inert(name))


def _meant(name: str, columns: Sequence[str]) -> str | None:
    """The column that a name stands for: one that holds it, as `Text (new)` holds `text`."""
    holding = [each for each in columns if name.casefold() in each.casefold()]
    if len(holding) == 1:
        return holding[0]
    close = difflib.get_close_matches(name, columns, n=1, cutoff=0.7)
    return close[0] if close else None


def _printed(expression: str | None) -> str:
    return f"{{{{ ({expression}) }}}}" if expression is not None else ""


@functools.lru_cache(maxsize=1024)
def _names(source: str) -> frozenset[str]:
    """The variables that a template text reads from the row."""
    found = jinja2.meta.find_undeclared_variables(_environment().parse(source))
    return frozenset(found) - set(_environment().globals)


# --- reading ------------------------------------------------------------------------------------


def load(name_or_path: str | Path) -> Template:
    """The template of a path, or of a bare name: here, in ./prompts, then among those shipped.

    Raises TemplateError, with a line for every fault.
    """
    path = records.find(name_or_path, "prompts", errors.TemplateError)
    return loads(yamls.read_text(path, errors.TemplateError), errors.inert(str(path)))


def loads(text: str, where: str = "template.yaml") -> Template:
    """The template in a text; where: the file that messages name, whose stem is its name."""
    document = yamls.parse(text, where, errors.TemplateError)
    if "task" not in document.data and {"model", "data"} <= set(document.data):
        raise errors.TemplateError(
            f"{where}: a recipe, and a template is looked for here. Give the recipe another name, "
            "or name the template by its path, such as prompts/mine.yaml."
        )
    if document.data.pop("name", None) is not None:
        document.fault(("name",), "unknown key. A template is named by its file.")
    _check_task(document)
    _check_jinja(document)
    records.metric_faults(document, ("metrics",), _listed(document, "metrics"))
    template = records.build(Template, document, name=Path(where).stem)
    for key in ("response", "references", "task", "choices"):
        template._places[key] = document.place((key,))
    for index in range(len(template.prompts)):
        template._places[f"prompts.{index}"] = document.place(("prompts", index))
    return template


def _listed(document: yamls.Document, key: str) -> Sequence[Any]:
    value = document.data.get(key)
    return value if isinstance(value, list) else ()


def _check_task(document: yamls.Document) -> None:
    """Which keys a task needs and which have no meaning for it."""
    task = document.data.get("task")
    if task == "chat":
        for key in ("prompts", "response", "references", "choices", "values", "system"):
            if document.data.get(key):
                document.fault((key,), "a chat passes its messages on as they are. Delete it.")
    elif isinstance(task, str):
        for key in ("prompts", "response"):
            if not document.data.get(key):
                document.fault((key,), "is missing. Add it, or use task: chat for conversations.")
    choices = _listed(document, "choices")
    if task == "classification" and not choices:
        document.fault(("choices",), "is missing. List what may be answered, in label order.")
    twice = sorted({str(each) for each in choices if choices.count(each) > 1})
    if twice:
        document.fault(("choices",), f"{errors.shown(twice[0])} is given twice. Keep one.")


def _check_jinja(document: yamls.Document) -> None:
    for index, source in enumerate(_listed(document, "prompts")):
        _check_source(document, ("prompts", index), source)
    _check_source(document, ("response",), document.data.get("response"))
    references = document.data.get("references")
    if isinstance(references, str) and "{{" in references:
        document.fault(
            ("references",), "expected an expression such as answers.text. Leave out {{ and }}."
        )
    elif isinstance(references, str):
        _check_source(document, ("references",), _printed(references))
    system = document.data.get("system")
    if isinstance(system, str) and ("{{" in system or "{%" in system):
        document.fault(("system",), "is the same for all rows. Move {{ }} and {% %} to prompts.")


def _check_source(document: yamls.Document, key: yamls.Key, source: Any) -> None:
    """Note what can be seen of a Jinja text without a row: syntax, files, private attributes."""
    if not isinstance(source, str):
        return
    if "{{" not in source and "{%" not in source and (found := SINGLE.search(source)):
        said = (
            f"'{found[0]}' is no Jinja and would stay as it is. A column is {{{{ {found[1]} }}}}."
        )
        document.fault(key, said)
        return
    try:
        tree = _environment().parse(source)
        _environment().compile(tree)
    except jinja2.TemplateSyntaxError as error:
        cure, said = "Mend the Jinja.", str(error.message)
        if "unexpected '}'" in said:
            cure = "A column is {{ name }}, with two braces on either side."
        elif NAME_ENDS.search(said):
            cure += (
                " A column's name has letters, digits and _ alone: give it such a one with "
                "data.train.rename."
            )
        _note(document, key, error.lineno, f"{said.rstrip('.')}. {cure}")
        return
    except sandbox.COMPILER_FAULTS:
        _note(document, key, 1, "nested too deeply for Jinja. Flatten it.")
        return
    for node in tree.find_all(tuple(LOADERS)):
        word = LOADERS[type(node)]
        _note(document, key, node.lineno, f"{word} is not available: a template reads no file.")
    for name, line in _attributes(tree):
        if name.startswith("_"):
            _note(document, key, line, f"{name} is not allowed in a template. Delete it.")


def _attributes(tree: jinja2.nodes.Template) -> Iterator[tuple[str, int]]:
    """What is read off a value, by a dot or by text in brackets, with its line in the text."""
    for dot in tree.find_all(jinja2.nodes.Getattr):
        yield dot.attr, dot.lineno
    for item in tree.find_all(jinja2.nodes.Getitem):
        if isinstance(item.arg, jinja2.nodes.Const) and isinstance(item.arg.value, str):
            yield item.arg.value, item.lineno


def _note(document: yamls.Document, key: yamls.Key, line: int, what: str) -> None:
    """Note a fault of a Jinja text; only in a block scalar (|) do its lines stand in the file."""
    document.fault(key, what, below=line if key in document.literals else 0)


# --- wordings -----------------------------------------------------------------------------------


def wording_of(n_prompts: int, seed: int, epoch: int, row_index: Any) -> Any:
    """Which wording a row has in an epoch: a pure function, whatever the process or the order.

    Each n consecutive rows have each of the n wordings once, beginning anywhere and in either
    direction as is drawn anew for every n, and in n epochs every row has each wording once.
    `row_index`: a number, or a NumPy array of uint64 for as many wordings at once.
    """
    if n_prompts <= 1:
        return row_index * 0
    block, member = row_index // n_prompts, row_index % n_prompts
    drawn = _mixed(_mixed(seed) ^ block) >> 8
    step = 1 + (drawn % 2) * (n_prompts - 2)  # 1 or n - 1, which is -1
    return (step * member + (drawn // 2) % n_prompts + epoch) % n_prompts


def _mixed(number: Any) -> Any:
    """A number of 64 bits that looks random (splitmix64, Steele et al. 2014)."""
    number = (number + 0x9E3779B97F4A7C15) & _BITS
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _BITS
    return number ^ (number >> 31)


_BITS = (1 << 64) - 1
