"""Sources become rows, rows become tokens (kept as Arrow by `datasets`), and are counted."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import itune
from itune import encoding, errors, formats, orders, recipes, templates

if TYPE_CHECKING:
    import datasets

BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of the rows: how many, how many tokens, how many of them are learnt."""

    rows: int
    tokens: int
    supervised: int
    truncated: int
    dropped: int


@dataclass(frozen=True)
class Corpus:
    """Encoded examples as flat arrays: example i is `ids[starts[i]:starts[i + 1]]`.

    ids int32 [tokens]; supervised bool [tokens]; starts int64 [examples + 1]; and per example
    its source, its row in it, its wording and whether it was cut (int32 [examples] each).
    """

    ids: np.ndarray
    supervised: np.ndarray
    starts: np.ndarray
    source: np.ndarray
    row: np.ndarray
    wording: np.ndarray
    truncated: np.ndarray
    sources: tuple[recipes.Source, ...]
    wordings: tuple[int, ...]
    dropped: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens an example, int64 [examples]."""
        return np.diff(self.starts)

    @property
    def targets(self) -> np.ndarray:
        """Tokens an example that carry loss, int64 [examples]: the first of all never does."""
        sums = np.concatenate([[0], np.cumsum(self.supervised, dtype=np.int64)])
        first = self.supervised[self.starts[:-1]]
        return np.asarray(sums[self.starts[1:]] - sums[self.starts[:-1]] - first)

    @property
    def counts(self) -> Counts:
        """What became of the rows."""
        kept = len(np.unique(np.stack([self.source, self.row]), axis=1).T) if len(self) else 0
        return Counts(
            rows=kept,
            tokens=int(self.starts[-1]),
            supervised=int(self.targets.sum()),
            truncated=int(self.truncated.sum()),
            dropped=self.dropped,
        )

    def epoch(self, epoch: int, seed: int) -> np.ndarray:
        """Which examples an epoch sees, int64, in their order: a pure function of its arguments.

        A source's weight says how often each of its rows is seen an epoch; a broken part is a
        sample drawn anew each epoch. Each visit takes the wording that its number gives. An
        example's place follows from its own row alone, so it needs no other row to be known.
        """
        pieces = np.arange(len(self)) - np.searchsorted(self._rows, self._rows)
        chosen, keys = [], []
        for number, (source, n_wordings) in enumerate(
            zip(self.sources, self.wordings, strict=True)
        ):
            members = np.flatnonzero(self.source == number)
            for visit, share in orders.visits(source.weight, epoch):
                picked = members
                if n_wordings > 1:
                    wanted = {
                        int(row): templates.wording_of(n_wordings, seed, visit, int(row))
                        for row in np.unique(self.row[members])
                    }
                    turn = np.array([wanted[int(row)] for row in self.row[members]])
                    picked = members[self.wording[members] == turn]
                piece = pieces[picked] if n_wordings == 1 else np.zeros_like(picked)
                key = orders.keys(seed, visit, number, self.row[picked], piece)
                if share < 1:
                    first = np.argsort(key, kind="stable")[: orders.taken(len(key), share)]
                    picked, key = picked[first], key[first]
                chosen.append(picked)
                keys.append(key)
        order = np.argsort(np.concatenate(keys), kind="stable")
        return np.asarray(np.concatenate(chosen)[order])

    @property
    def _rows(self) -> np.ndarray:
        """Source and row in one number an example, ascending."""
        return np.asarray(self.source.astype(np.int64) << 32 | self.row)


# --- sources ------------------------------------------------------------------------------


def load(source: recipes.Source) -> datasets.Dataset:
    """The rows of a source: a file, a glob, a folder or a data set of the hub.

    A file stands for whatever split the source names, so that `test[:100]` works on it too.
    Raises DataError with the file and line where a row is broken, EnvironmentRefusal when the
    hub cannot be reached.
    """
    import datasets

    split = source.split or "train"
    path = Path(source.path).expanduser()
    # The pattern as the user typed it, relative or absolute: Path.glob takes relative ones alone.
    files = sorted(glob.glob(str(path))) if glob.has_magic(source.path) else [str(path)]  # noqa: PTH207
    if not files:
        raise errors.DataError(
            f"{source.path}: no file matches, in {Path.cwd()}. Check the pattern."
        )
    if path.is_dir() and (path / "state.json").is_file():
        rows = datasets.load_from_disk(str(path))
        if isinstance(rows, datasets.DatasetDict):
            rows = _split_of(rows, split, source.path)
    elif Path(files[0]).is_file():
        rows = _read_files(source, files, split)
    elif path.suffix in BUILDERS:
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise errors.DataError(
            f"{source.path}: no such file, in {Path.cwd()}.{errors.nearest(path.name, near)}"
        )
    else:
        rows = _read_hub(source, split)
    return _shaped(rows, source)


def _split_of(rows: Any, split: str, where: str) -> datasets.Dataset:
    name = re.match(r"\w+", split)
    if name is None or name[0] not in rows:
        raise errors.DataError(f"{where}: no split {split!r}.{errors.nearest(split, rows)}")
    return rows[name[0]]


def _read_files(source: recipes.Source, files: list[str], split: str) -> datasets.Dataset:
    import datasets

    suffix = Path(files[0]).suffix.lower()
    if suffix not in BUILDERS:
        raise errors.DataError(
            f"{files[0]}: unknown kind of file {suffix!r}.{errors.nearest(suffix, BUILDERS)}"
        )
    if all(Path(file).stat().st_size == 0 for file in files):
        raise errors.DataError(f"{files[0]}: 0 rows, the file is empty. Check how it was written.")
    name = re.match(r"\w+", split)
    if name is None:
        raise errors.DataError(
            f"{source.path}: split {split!r} names no split. Write it as train or test[:1000]."
        )
    options: dict[str, Any] = {"sep": "\t"} if suffix == ".tsv" else {}
    if source.field is not None:
        options["field"] = source.field
    if suffix == ".jsonl":
        _check_lines(files)
    try:
        return datasets.load_dataset(
            BUILDERS[suffix], data_files={name[0]: files}, split=split, **options
        )
    except (datasets.exceptions.DatasetGenerationError, ValueError, StopIteration) as error:
        cause = error.__cause__ or error
        raise errors.DataError(
            f"{source.path}: cannot be read as {BUILDERS[suffix]}: {_one_line(cause)} "
            "Check the file and data.*.split."
        ) from error


def _check_lines(files: Sequence[str]) -> None:
    """Name the line of a broken JSONL file: the reader itself only says that one is broken."""
    for file in files:
        rows = 0
        with Path(file).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                rows += 1
                try:
                    row = json.loads(line)
                except UnicodeDecodeError as error:
                    raise errors.DataError(
                        f"{file}:{number}: not UTF-8, byte 0x{line[error.start]:02x} at "
                        f"{error.start}. Convert the file with iconv."
                    ) from error
                except (json.JSONDecodeError, RecursionError) as error:
                    near = line.decode("utf-8", "replace").strip()
                    raise errors.DataError(
                        f"{file}:{number}: not JSON, {_one_line(error)} The line begins "
                        f"{near[:60]!r}. Mend or take out the line."
                    ) from error
                if not isinstance(row, dict):
                    raise errors.DataError(
                        f"{file}:{number}: expected an object {{...}}, found a "
                        f"{type(row).__name__}. Each line holds one row with its columns."
                    )
        if not rows:
            raise errors.DataError(f"{file}: 0 rows, only blank lines. Check how it was written.")


def _read_hub(source: recipes.Source, split: str) -> datasets.Dataset:
    import datasets

    try:
        return datasets.load_dataset(
            source.path,
            source.name,
            data_files=source.data_files,
            revision=source.revision,
            split=split,
        )
    except datasets.exceptions.DatasetNotFoundError as error:
        raise errors.DataError(
            f"{source.path}: neither a file or folder here ({Path.cwd()}) nor a data set that the "
            "hub shows you. Check the name; for a gated one, set HF_TOKEN."
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise errors.EnvironmentRefusal(
            f"{source.path}: no such file here and the hub cannot be reached ({_one_line(error)}). "
            "Name a local file with --set data.train.path=FILE, or go online."
        ) from error
    except (ValueError, RuntimeError) as error:
        raise errors.DataError(f"{source.path}: {_one_line(error)}") from error


def _shaped(rows: datasets.Dataset, source: recipes.Source) -> datasets.Dataset:
    missing = sorted(set(source.rename) - set(rows.column_names))
    if missing:
        raise errors.DataError(
            f"{source.path}: rename: no column {missing[0]!r}."
            f"{errors.nearest(missing[0], rows.column_names)}"
        )
    if source.rename:
        rows = rows.rename_columns(dict(source.rename))
    if source.limit is not None:
        rows = rows.select(range(min(source.limit, len(rows))))
    if not len(rows):
        raise errors.DataError(f"{source.path}: 0 rows in split {source.split!r}.")
    return rows


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith(".") else f"{text}."


# --- rows to tokens -----------------------------------------------------------------------


def corpus(
    sources: Sequence[recipes.Source],
    encoder: encoding.Encoder,
    training: recipes.Training,
    *,
    visits: float | None = 1,
) -> Corpus:
    """Every source read, rendered and encoded, through `datasets`' own cache.

    `visits`: how many epochs choose wordings; None = encode every row in every wording.
    Raises DataError when a row is broken or when nothing is left to learn from.
    """
    parts, wordings, dropped = [], [], 0
    for source in sources:
        rows = load(source)
        template = templates.load(source.template) if source.template else None
        n_wordings = max(1, len(template.prompts)) if template else 1
        n_visits = None if visits is None else math.ceil(visits * math.ceil(source.weight))
        encoded = _encoded(rows, source, template, encoder, training, n_visits)
        _refuse_nothing(encoded, rows, source, training)
        dropped += len(rows) - len(set(encoded["row"]))
        parts.append(encoded)
        wordings.append(n_wordings)
    lengths = np.concatenate([_flat(part, "length") for part in parts])
    return Corpus(
        ids=np.concatenate([_flat(part, "input_ids") for part in parts]),
        supervised=np.concatenate([_flat(part, "supervised") for part in parts]).astype(bool),
        starts=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        source=np.concatenate([np.full(len(p), k, np.int32) for k, p in enumerate(parts)]),
        row=np.concatenate([_flat(part, "row") for part in parts]),
        wording=np.concatenate([_flat(part, "wording") for part in parts]),
        truncated=np.concatenate([_flat(part, "truncated") for part in parts]),
        sources=tuple(sources),
        wordings=tuple(wordings),
        dropped=dropped,
    )


def heldout(recipe: recipes.Recipe, encoder: encoding.Encoder) -> Corpus | None:
    """The rows on which the held-out loss is measured: some of each evaluation source."""
    count = recipe.training.heldout_rows
    if not recipe.data.eval or not count:
        return None
    each = max(1, count // len(recipe.data.eval))
    sources = [
        source.model_copy(update={"limit": min(each, source.limit or each), "weight": 1.0})
        for source in recipe.data.eval
    ]
    return corpus(sources, encoder, recipe.training, visits=1)


def _flat(rows: datasets.Dataset, column: str) -> np.ndarray:
    values = rows.data.column(column).combine_chunks()
    if hasattr(values, "flatten") and values.type.num_fields:
        values = values.flatten()
    return np.asarray(values.to_numpy(zero_copy_only=False))


def _encoded(
    rows: datasets.Dataset,
    source: recipes.Source,
    template: templates.Template | None,
    encoder: encoding.Encoder,
    training: recipes.Training,
    visits: int | None,
) -> datasets.Dataset:
    import datasets

    integer = datasets.Value("int32")
    features = datasets.Features(
        input_ids=datasets.Sequence(integer),
        supervised=datasets.Sequence(datasets.Value("int8")),
        length=integer,
        row=integer,
        wording=integer,
        truncated=integer,
    )
    options = {
        "encoder": encoder,
        "template": template,
        "where": source.path,
        "max_length": training.max_length,
        "train_on": training.train_on,
        "seed": training.seed,
        "visits": visits,
    }
    mark = json.dumps(
        [
            itune.__version__,
            rows._fingerprint,
            None if template is None else repr(template),
            _tokenizer_digest(encoder),
            {k: v for k, v in options.items() if k not in {"encoder", "template"}},
        ]
    )
    return rows.map(
        _encode_batch,
        batched=True,
        with_indices=True,
        fn_kwargs=options,
        features=features,
        remove_columns=rows.column_names,
        new_fingerprint=hashlib.sha256(mark.encode()).hexdigest()[:32],
    )


def _tokenizer_digest(encoder: encoding.Encoder) -> str:
    tokenizer = encoder.tokenizer
    text = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
    return hashlib.sha256(text.encode()).hexdigest()


def _encode_batch(
    batch: Mapping[str, list[Any]],
    indices: list[int],
    *,
    encoder: encoding.Encoder,
    template: templates.Template | None,
    where: str,
    max_length: int,
    train_on: str,
    seed: int,
    visits: int | None,
) -> dict[str, list[Any]]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    out: dict[str, list[Any]] = {
        name: [] for name in ("input_ids", "supervised", "length", "row", "wording", "truncated")
    }

    def keep(tokens: encoding.Tokens, row: int, wording: int, truncated: bool) -> None:
        out["input_ids"].append(tokens.ids)
        out["supervised"].append([int(learnt) for learnt in tokens.supervised])
        out["length"].append(len(tokens.ids))
        out["row"].append(row)
        out["wording"].append(wording)
        out["truncated"].append(int(truncated))

    if template is None:
        for index, row in zip(indices, rows, strict=True):
            ids = encoder.document(_placed(where, index, row, None, 0).text or "")
            for start in range(0, len(ids), max_length):
                part = ids[start : start + max_length]
                keep(encoding.Tokens(part, [True] * len(part)), index, 0, False)
        return out
    jobs = [
        (index, row, wording)
        for index, row in zip(indices, rows, strict=True)
        for wording in _needed(template, seed, visits, index)
    ]
    examples = [_placed(where, index, row, template, wording) for index, row, wording in jobs]
    try:
        encoded = encoder.conversations([e.messages for e in examples], train_on=train_on)
    except errors.DataError as error:
        raise errors.DataError(
            f"{where} rows {indices[0] + 1}-{indices[-1] + 1}: {error}"
        ) from error
    for (index, row, wording), example, tokens in zip(jobs, examples, encoded, strict=True):
        fitted: encoding.Tokens | None = tokens
        if len(tokens.ids) > max_length:
            fitted = _cut(example, template, row, wording, encoder, max_length, train_on)
        if fitted is not None and any(fitted.supervised):
            keep(fitted, index, wording, fitted is not tokens)
    return out


def _needed(template: templates.Template, seed: int, visits: int | None, row: int) -> Sequence[int]:
    count = max(1, len(template.prompts))
    if visits is None or count == 1:
        return range(count)
    return sorted({templates.wording_of(count, seed, visit, row) for visit in range(visits)})


def _placed(
    where: str,
    index: int,
    row: Mapping[str, Any],
    template: templates.Template | None,
    wording: int,
) -> formats.Example:
    try:
        return formats.example(template, row, wording)
    except errors.UserError as error:
        raise errors.DataError(f"{where} row {index + 1}: {error}") from error


# --- what does not fit --------------------------------------------------------------------


def _cut(
    example: formats.Example,
    template: templates.Template,
    row: Mapping[str, Any],
    wording: int,
    encoder: encoding.Encoder,
    limit: int,
    train_on: str,
) -> encoding.Tokens | None:
    """The example within `limit` tokens, its answer whole; None when that cannot be."""
    if template.task == "chat":
        for end in range(len(example.messages) - 1, 0, -1):
            if example.messages[end - 1].role != "assistant":
                continue
            tokens = encoder.conversation(example.messages[:end], train_on=train_on)
            if len(tokens.ids) <= limit:
                return tokens
        return None

    def encode(shorter: formats.Example) -> encoding.Tokens:
        return encoder.conversation(shorter.messages, train_on=train_on)

    fitted: encoding.Tokens | None = _shortened(
        template, row, wording, encoder, limit, encode, lambda t: len(t.ids)
    )
    return fitted


def _shortened(
    template: templates.Template,
    row: Mapping[str, Any],
    wording: int,
    encoder: encoding.Encoder,
    limit: int,
    encode: Any,
    size: Any,
) -> Any:
    """Encode with the row's longest prompt column cut at its end until `limit` is kept.

    The wording around it stays whole: the question, the choices and the end of the prompt are
    where the model needs them. None when the limit cannot be kept so.
    """
    texts = {name: value for name in template.columns() if isinstance(value := row.get(name), str)}
    if not texts:
        return None
    column = max(texts, key=lambda name: len(texts[name]))
    text = texts[column]
    answer = template.answer(row)
    spans = encoder.tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )["offset_mapping"]
    kept = len(spans)
    while kept > 0:
        cut = {**row, column: text[: spans[kept - 1][1]] if kept < len(spans) else text}
        result = encode(formats.templated(template, cut, wording))
        excess = size(result) - limit
        if excess <= 0:
            return result if template.answer(cut) == answer else None
        kept -= max(excess, 1)
    return None


# --- what is scored -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt to answer: a row in one wording, its prompt ids and its gold answers."""

    row: int
    wording: int
    messages: tuple[formats.Message, ...]
    ids: tuple[int, ...]
    references: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """The cases of one evaluation source, named by its template."""

    name: str
    path: str
    template: templates.Template
    cases: tuple[Case, ...]
    truncated: int

    @property
    def rows(self) -> int:
        """How many rows there are, each asked in every wording."""
        return len({case.row for case in self.cases})


def tasks(
    sources: Sequence[recipes.Source],
    encoder: encoding.Encoder,
    *,
    max_prompt: int,
    limit: int | None = None,
) -> list[Task]:
    """The prompts of each evaluation source that has a template, in every wording.

    `max_prompt`: tokens a prompt may have; a longer one is shortened as in training.
    Raises DataError when a row is broken or a prompt cannot be made to fit.
    """
    out: list[Task] = []
    for source in sources:
        if source.template is None:
            continue
        rows = load(source)
        if limit is not None:
            rows = rows.select(range(min(limit, len(rows))))
        template = templates.load(source.template)
        name = template.name
        if any(task.name == name for task in out):
            name = f"{name}:{Path(source.path).stem}"
        cases, truncated = _cases(rows, source, template, encoder, max_prompt)
        out.append(Task(name, source.path, template, tuple(cases), truncated))
    return out


def _cases(
    rows: datasets.Dataset,
    source: recipes.Source,
    template: templates.Template,
    encoder: encoding.Encoder,
    max_prompt: int,
) -> tuple[list[Case], int]:
    jobs = []
    for index, row in enumerate(rows):
        for wording in range(max(1, len(template.prompts))):
            example = _placed(source.path, index, row, template, wording)
            if not example.references:
                raise errors.DataError(
                    f"{source.path} row {index + 1}: the conversation does not end with the "
                    "assistant's answer, so there is nothing to score against."
                )
            jobs.append((index, wording, row, example))
    encoded = encoder.conversations([example.prompt for *_, example in jobs], prompt=True)
    cases, truncated = [], 0
    for (index, wording, row, example), tokens in zip(jobs, encoded, strict=True):
        messages, ids = example.prompt, tokens.ids
        if len(ids) > max_prompt:
            shorter = _short_prompt(example, template, row, wording, encoder, max_prompt)
            if shorter is None:
                raise errors.DataError(
                    f"{source.path} row {index + 1}: the prompt has {len(ids)} tokens, at most "
                    f"{max_prompt} fit beside the answer. Raise training.max_length, lower "
                    "generation.max_new_tokens, or take the row out."
                )
            (messages, ids), truncated = shorter, truncated + 1
        cases.append(Case(index, wording, messages, tuple(ids), example.references))
    return cases, truncated


def _short_prompt(
    example: formats.Example,
    template: templates.Template,
    row: Mapping[str, Any],
    wording: int,
    encoder: encoding.Encoder,
    limit: int,
) -> tuple[tuple[formats.Message, ...], list[int]] | None:
    if template.task == "chat":
        system = tuple(m for m in example.prompt[:1] if m.role == "system")
        for start in range(len(system) + 1, len(example.prompt)):
            if example.prompt[start].role != "user":
                continue
            later = (*system, *example.prompt[start:])
            ids = encoder.prompt(later)
            if len(ids) <= limit:
                return later, ids
        return None

    def encode(shorter: formats.Example) -> tuple[tuple[formats.Message, ...], list[int]]:
        return shorter.prompt, encoder.prompt(shorter.prompt)

    return _shortened(template, row, wording, encoder, limit, encode, lambda pair: len(pair[1]))  # type: ignore[no-any-return]


# --- text to train a tokenizer on ---------------------------------------------------------


def texts(sources: Sequence[recipes.Source]) -> Iterator[str]:
    """The texts of the sources, for training a tokenizer: what is rendered, turn by turn."""
    for source in sources:
        template = templates.load(source.template) if source.template else None
        for index, row in enumerate(load(source)):
            example = _placed(source.path, index, row, template, 0)
            if example.text is not None:
                yield example.text
            else:
                yield from (message.content for message in example.messages)


def _refuse_nothing(
    encoded: datasets.Dataset,
    rows: datasets.Dataset,
    source: recipes.Source,
    training: recipes.Training,
) -> None:
    if len(encoded):
        return
    raise errors.DataError(
        f"{source.path}: none of its {len(rows)} rows fits training.max_length "
        f"({training.max_length} tokens) with its answer whole. Raise training.max_length."
    )


def from_tokens(examples: Sequence[encoding.Tokens]) -> Corpus:
    """A corpus of examples at hand, outside of any source: for probes and likelihoods."""
    n = len(examples)
    blank = np.zeros(n, np.int32)
    return Corpus(
        ids=np.concatenate([np.array(e.ids, np.int32) for e in examples]),
        supervised=np.concatenate([np.array(e.supervised, bool) for e in examples]),
        starts=np.cumsum([0, *(len(e.ids) for e in examples)], dtype=np.int64),
        source=blank,
        row=np.arange(n, dtype=np.int32),
        wording=blank,
        truncated=blank,
        sources=(),
        wordings=(),
        dropped=0,
    )


# --- a few rows ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as training has it: its row and wording, both from 0, and its tokens."""

    row: int
    wording: int
    truncated: bool
    tokens: encoding.Tokens


def examples(
    rows: datasets.Dataset,
    indices: Sequence[int],
    source: recipes.Source,
    encoder: encoding.Encoder,
    training: recipes.Training,
    *,
    visits: int | None,
) -> list[Encoded]:
    """What `corpus` makes of some rows of a loaded source; a dropped row gives none.

    `visits`: how many visits choose wordings; None = every wording. Raises DataError.
    """
    made = _encode_batch(
        rows[list(indices)],
        list(indices),
        encoder=encoder,
        template=templates.load(source.template) if source.template else None,
        where=source.path,
        max_length=training.max_length,
        train_on=training.train_on,
        seed=training.seed,
        visits=visits,
    )
    tokens = [
        encoding.Tokens(ids, [bool(learnt) for learnt in supervised])
        for ids, supervised in zip(made["input_ids"], made["supervised"], strict=True)
    ]
    return [
        Encoded(row, wording, bool(truncated), each)
        for row, wording, truncated, each in zip(
            made["row"], made["wording"], made["truncated"], tokens, strict=True
        )
    ]
