"""Canaries: made-up secrets planted among the training rows, to tell how far they are learnt.

Carlini et al. 2019, "The Secret Sharer", section 4: a secret of a known format is drawn at random
and trained on; a model that learnt it by heart finds it likelier than the others of that format,
which it never met. Planted ones lie in a file that is a training source like any other.
"""

from __future__ import annotations

import glob
import json
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itune import (
    cache,
    cases,
    data,
    encoding,
    errors,
    families,
    formats,
    recipes,
    runs,
    sections,
    sources,
    storage,
)

NAME = "canaries.jsonl"
DIGITS = "0123456789"


@dataclass(frozen=True, slots=True)
class Canary:
    """One secret. `format` is its response with `#` for digits; an epoch sees it `repeats` times;
    `plain`: it is running text, and no prompt and its answer."""

    prompt: str
    response: str
    format: str
    repeats: int
    plain: bool

    def row(self) -> dict[str, str | int]:
        """The canary as a row of the file."""
        made = {"prompt": self.prompt, "completion": self.response, "format": self.format}
        text = {"text": self.text(self.response)} if self.plain else {}
        return {**text, **made, "repeats": self.repeats}

    def text(self, response: str) -> str:
        """The running text with a response: the canary's own, or a candidate's."""
        return f"{self.prompt} {response}"

    def example(self, response: str) -> formats.Example:
        """What training would make of the canary's prompt with a response."""
        if self.plain:
            return formats.plain_text({"text": self.text(response)})
        return formats.prompt_completion({"prompt": self.prompt, "completion": response})


def drawn(settings: recipes.Canaries, seed: int, *, plain: bool) -> list[Canary]:
    """The canaries of a recipe, in the order of their repeats: a pure function of its arguments.

    Prompts that hold a `#` differ from each other, else the responses do.
    """
    draw, known, out = random.Random(f"canaries {seed}"), set[str](), []
    for repeats in settings.repeats:
        for _ in range(settings.count):
            prompt = response = ""
            while not prompt or (prompt if "#" in settings.prompt else response) in known:
                prompt, response = _filled(settings.prompt, draw), _filled(settings.response, draw)
            known.add(prompt if "#" in settings.prompt else response)
            out.append(Canary(prompt, response, settings.response, repeats, plain))
    return out


def _filled(text: str, draw: random.Random) -> str:
    return "".join(draw.choice(DIGITS) if each == "#" else each for each in text)


def candidates(
    canary: Canary, planted: Collection[str], count: int, seed: int
) -> tuple[list[str], bool]:
    """Responses of the canary's format that were not planted, and whether these are all there are.

    `count` of them at random, each once; all of them where there are no more.
    """
    digits = canary.format.count("#")
    if 10**digits <= count + len(planted):
        every = (_numbered(canary.format, number) for number in range(10**digits))
        return [each for each in every if each not in planted], True
    draw = random.Random(f"candidates {seed} {canary.prompt} {canary.response}")
    numbers = draw.sample(range(10**digits), count + len(planted))
    made = (_numbered(canary.format, number) for number in numbers)
    return [each for each in made if each not in planted][:count], False


def _numbered(text: str, number: int) -> str:
    """The text with the digits of a number in place of each `#`."""
    digits = iter(f"{number:0{text.count('#')}d}")
    return "".join(next(digits) if each == "#" else each for each in text)


# --- planting -----------------------------------------------------------------------------------


def planted(
    recipe: recipes.Recipe, family: str, folder: Path | None = None, command: str = ""
) -> tuple[recipes.Source, ...]:
    """The training sources of a recipe with its canaries, which are written into the folder.

    Without a folder they lie in itune's cache. One source for each number of repeats, weighed by
    it. Raises RecipeError for a family of models that gives no text a likelihood.
    """
    settings = recipe.data.canaries
    if settings is None:
        return recipe.data.train
    made = of_recipe(recipe, family, command)
    text = "".join(json.dumps(each.row()) + "\n" for each in made)
    if folder is None:
        folder, _ = cache.entry(
            "canaries", cache.fingerprint(text), lambda new: _write(new / NAME, text)
        )
    elif not (folder / NAME).is_file() or (folder / NAME).read_text(encoding="utf-8") != text:
        _write(folder / NAME, text)
    return (*recipe.data.train, *_sources(folder / NAME, made))


def corpus(
    recipe: recipes.Recipe,
    train: Sequence[recipes.Source],
    encoder: encoding.Encoder,
    command: str = "",
) -> data.Corpus:
    """All that a recipe trains on, of its sources and its canaries; see `data.corpus`."""
    settings = recipe.training
    return data.corpus(
        train,
        encoder,
        settings,
        visits=None if settings.max_steps > 0 else settings.num_train_epochs,
        command=command,
        max_dropped=recipe.data.max_dropped,
    )


def _write(path: Path, text: str) -> None:
    storage.write(path, text)


def of_recipe(recipe: recipes.Recipe, family: str, command: str = "") -> list[Canary]:
    """The canaries that a recipe plants; none where it has none. Raises RecipeError."""
    settings = recipe.data.canaries
    if settings is None:
        return []
    plain = all(_is_text(source, command) for source in recipe.data.train)
    if family == families.MASKED:
        raise errors.RecipeError(
            "data.canaries: a masked language model fills in one of a template's choices, and "
            "gives no other answer a likelihood to rank it by. Take canaries out."
        )
    if plain and family == families.SEQ2SEQ:
        raise errors.RecipeError(
            "data.canaries: of plain text a seq2seq model learns hidden spans, which give the "
            "text no likelihood to rank it by. Take canaries out, or plant them in itune tune."
        )
    return drawn(settings, recipe.training.seed, plain=plain)


def _is_text(source: recipes.Source, command: str) -> bool:
    return source.template is None and cases.reading(sources.read(source), command).is_text


def _sources(path: Path, made: Sequence[Canary]) -> Iterator[recipes.Source]:
    start = 0
    for repeats in dict.fromkeys(each.repeats for each in made):
        end = start + sum(each.repeats == repeats for each in made)
        yield recipes.Source(
            path=glob.escape(str(path)) if glob.has_magic(str(path)) else str(path),
            split=f"train[{start}:{end}]",
            format="text" if made[0].plain else "prompt_completion",
            weight=repeats,
        )
        start = end


# --- what a run keeps ---------------------------------------------------------------------------


def trained_on(recipe: recipes.Recipe, run: runs.Run) -> tuple[recipes.Source, ...]:
    """The training sources of a run with its canaries, as they lie there. Raises RunError."""
    if recipe.data.canaries is None:
        return recipe.data.train
    return (*recipe.data.train, *_sources(run.dir / NAME, of_run(run)))


def of_run(run: runs.Run) -> list[Canary]:
    """The canaries that a run was trained on. Raises RunError where their file is damaged."""
    path, found = run.dir / NAME, []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except OSError as error:
        raise errors.RunError(
            f"{path}: the canaries of this run cannot be read: {error.strerror}. Put the file "
            "back, or train anew."
        ) from error
    for number, line in enumerate(lines, 1):
        try:
            found.append(_canary(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            raise errors.RunError(
                f"{path}:{number}: damaged. Put the file back as training wrote it."
            ) from error
    if not found:
        raise errors.RunError(f"{path}: empty. Put the file back as training wrote it.")
    return found


def _canary(row: dict[str, Any]) -> Canary:
    made = Canary(
        row["prompt"], row["completion"], row["format"], int(row["repeats"]), "text" in row
    )
    texts = (made.prompt, made.response, made.format)
    if (
        not all(isinstance(each, str) for each in texts)
        or not 1 <= made.format.count("#") <= sections.MOST_DIGITS
    ):
        raise ValueError("no canary")
    return made
