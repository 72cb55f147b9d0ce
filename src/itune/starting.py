"""What a run starts with: encoder, rows, model, plan, and what the user is told of them.

Needs torch.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from itune import (
    adapters,
    batches,
    canaries,
    charts,
    configs,
    contamination,
    data,
    encoding,
    errors,
    families,
    fingerprints,
    folding,
    guarding,
    launching,
    models,
    objectives,
    probing,
    recipes,
    runs,
    samples,
    tallies,
)

Say = Callable[[str], None]
FEW = 3  # steps of an epoch below which a hint is due, where the run has fewer than STEPS
STEPS = 30  # chosen: what warms up and goes down again learns something in so many


def path(
    model: Any,
    encoder: encoding.Encoder,
    corpus: data.Corpus,
    settings: recipes.Training,
    autocast: probing.Autocast,
) -> probing.Path:
    """How the run computes, by the probe."""
    padding = objectives.collate(encoder, model, settings)
    prepends = adapters.prepends(model)
    if prepends and padding is None:
        padding = batches.padder(encoder.tokenizer.pad_token_id, places=False)
    return probing.choose(
        model,
        int(corpus.lengths.max()),
        packing=settings.packing,
        autocast=autocast,
        padding=padding,
        packed=None if prepends else objectives.packed(encoder, model, settings),
    )


def prepared(
    recipe: recipes.Recipe, run: runs.Run, say: Say
) -> tuple[encoding.Encoder, data.Corpus, data.Corpus | None]:
    """The encoder, the training data and the held-out data of a run."""
    command = str(run.manifest["command"])
    encoder, corpus, heldout = read(
        recipe, configs.asked_tokenizer(recipe, run, command), command, run.dir
    )
    _refuse_other_rows(run, corpus, heldout)
    contamination.check(recipe, run, say, keep=launching.is_main())
    return encoder, corpus, heldout


def read(
    recipe: recipes.Recipe, tokenizer: Any, command: str, folder: Path | None = None
) -> tuple[encoding.Encoder, data.Corpus, data.Corpus | None]:
    """The encoder, the training data and the held-out data of a recipe; its canaries lie in the
    folder, or in itune's cache."""
    settings = recipe.training
    encoder = families.encoder(configs.family_of(recipe.model), tokenizer)
    train = canaries.planted(recipe, encoder.family, folder, command)
    corpus = canaries.corpus(recipe, train, encoder, command)
    heldout = data.heldout(recipe, encoder, command)
    objective = objectives.of(encoder, settings)
    corpus = objectives.thinned(objectives.counted(corpus, objective, encoder.room), settings)
    if heldout is not None:
        heldout = objectives.counted(heldout, objective, encoder.room)
    return encoder, corpus, heldout


def _refuse_other_rows(run: runs.Run, corpus: data.Corpus, heldout: data.Corpus | None) -> None:
    """Refuse to go on with rows or templates that changed since the run began.

    No plan of steps would hold, nor could held-out losses be compared.
    """
    if run.untried:
        return
    before = run.manifest.get("data", {})
    for old, new in zip(before.get("train", {}).get("sources", []), corpus.reports, strict=False):
        _refuse_another(old, new)
    if heldout is not None:
        asked = [each["asked"] for each in watched(heldout)]
        for old, new, now in zip(before.get("heldout", []), heldout.reports, asked, strict=False):
            if old["asked"] == now:  # else the recipe asks for others, as allowed
                _refuse_another(old, new)


def _refuse_another(old: Mapping[str, Any], new: tallies.Report) -> None:
    if old["rows"] != new.rows:
        raise errors.DataError(
            f"{new.path}: its rows have changed since this run began ({old['rows'][:12]} then, "
            f"{new.rows[:12]} now; {old['counts']['read']:,} rows then, {new.counts.read:,} "
            "now). Put them back, or start anew with --fresh."
        )
    if old.get("template", new.template) != new.template:
        raise errors.TemplateError(
            f"{new.path}: its {new.read_as} has changed since this run began "
            f"({old['template'][:12]} then, {new.template[:12]} now). Put it back, or start anew "
            "with --fresh."
        )


def watched(heldout: data.Corpus) -> list[dict[str, Any]]:
    """For run.json: each source of held-out rows, as it was asked for and what became of it."""
    return [
        {"asked": source.model_dump(mode="json"), **asdict(report)}
        for source, report in zip(heldout.sources, heldout.reports, strict=True)
    ]


def base_files(recipe: recipes.Recipe, run: runs.Run) -> dict[str, Any] | None:
    """The fingerprint of the base model, for run.json; None where weights are random.

    Raises ModelError where steps were taken on another one.
    """
    if recipe.model.name is None:
        return None
    now = fingerprints.of(recipe.model.name, recipe.model.revision)
    began = run.manifest.get("base_files")
    if began is not None and not run.untried:
        fingerprints.refuse_another(recipe.model.name, began, now)
    return now


def untrained(recipe: recipes.Recipe, tokenizer: Any, place: models.Placement) -> Any:
    """The model that a run starts from. Raises RecipeError for an adapter that stays one."""
    import peft

    if recipe.model.from_scratch is None:
        model = models.load(
            recipe.model, place, full=recipe.adapter is None, quantization=recipe.quantization
        )
        if isinstance(model, peft.PeftModel):
            raise errors.RecipeError(
                f"model.name: {recipe.model.name}: its adapter cannot be folded into its base, so "
                f"{folding.NOTHING_ON_TOP}"
            )
    else:
        model = models.build(recipe.model, tokenizer, place, recipe.training.seed)
    if recipe.training.use_liger_kernel:
        models.use_liger(model)
    return model


def refuse_untrained(model: Any) -> tuple[int, int]:
    """(parameters, trainable ones) of a model. Raises RecipeError where nothing is trained."""
    total, trainable = models.count(model)
    if not trainable:
        raise errors.RecipeError(
            f"adapter: nothing of the model would be trained: all of its {total:,} parameters are "
            "frozen. Look through the section, or leave it out to train all weights."
        )
    return total, trainable


def counted(corpus: data.Corpus, seed: int) -> Iterator[str]:
    """What the user is told of the training data, a line each."""
    told = {
        line: None
        for report in corpus.reports
        for line in (*report.notes, f"{report.path}: read as {report.read_as}")
        if not line.startswith(f"{report.path}: read as template ")
    }
    yield from told
    for path in sorted({source.path for source in corpus.sources if source.streaming}):
        yield (
            f"{path}: a stream: masks and overlap with held-out rows are looked at in its first "
            f"{samples.STREAM_ROWS:,} rows alone"
        )
    yield from _unanswered(corpus.reports)
    counts = corpus.an_epoch(seed)
    yield (
        f"training data: {counts.rows:,} of {counts.read:,} rows; an epoch has "
        f"{counts.tokens:,} tokens, {counts.supervised:,} of them learnt"
    )
    held = guarding.to_allow(text for report in corpus.reports for text in report.held)
    cures = (
        (counts.truncated, "prompt", "cut to training.max_length. Raise it to keep {} whole"),
        (counts.too_long, "row", "left out, too long with the answer. Raise training.max_length"),
        (counts.dropped - counts.too_long, "row", "left out, nothing to learn. Check the template"),
        (counts.empty, "row", "empty and left out. Take {} out of the data"),
        (counts.guarded, "example", f"with control strings of the model, which stay text{held}"),
        (counts.allowed, "example", "with control tokens in the answer, as allowed"),
        (counts.duplicated, "row", "as an earlier one. Take {} out if that is unwanted"),
    )
    for number, thing, cure in cures:
        if number:
            said = cure.replace("{}", "it" if number == 1 else "them")
            yield f"training data: {number:,} {thing}{'s' * (number > 1)} {said}."


def few_steps(settings: recipes.Training, corpus: data.Corpus) -> Iterator[str]:
    """A line where the data are so few that the run has hardly a step: what would give it some.

    A step of the default size is more than the whole of many a first table.
    """
    counts = corpus.an_epoch(settings.seed)
    an_epoch = counts.tokens / settings.tokens_per_step
    steps = max(1, round(an_epoch * settings.num_train_epochs))
    wanted = min(STEPS, counts.rows)
    enough = settings.max_steps > 0 or an_epoch > FEW or steps >= STEPS
    if enough or wanted <= max(1, round(an_epoch)):
        return
    # A step holds whole rows, so that half of one is left over.
    per_step = math.ceil(counts.tokens / wanted + counts.tokens / counts.rows / 2)
    unit = 10 ** max(0, len(str(per_step)) - 2)
    yield (
        f"training data: few for training.tokens_per_step, {settings.tokens_per_step:,}: the whole "
        f"run is about {steps} step{'s' * (steps > 1)}, too few to learn much. Set it to "
        f"{math.ceil(per_step / unit) * unit} for about {wanted} steps an epoch, or raise "
        "training.num_train_epochs."
    )


def left_out(heldout: data.Corpus | None) -> Iterator[str]:
    """Held-out rows that are not measured, a line for each source that has some."""
    for report in () if heldout is None else heldout.reports:
        if report.counts.dropped:
            yield (
                f"{report.path}: the held-out loss is without {report.counts.dropped:,} of "
                f"{report.counts.read:,} rows, {report.counts.too_long:,} of them too long with "
                "the answer. Raise training.max_length to have it over all"
            )


def _unanswered(reports: Sequence[tallies.Report]) -> Iterator[str]:
    """Which choices no training row has as its answer: what a model will hardly ever say.

    Labels that count from 1, of which the highest is not there, look like this and nothing else.
    """
    answers: dict[str, collections.Counter[str]] = {}
    named: dict[str, str] = {}
    for report in reports:
        answers.setdefault(report.template, collections.Counter()).update(report.answers)
        named.setdefault(report.template, report.path)
    for template, counts in answers.items():
        unseen = [text for text, number in counts.items() if not number]
        if unseen:
            some = f"{', '.join(unseen[:3])}{' or others' * (len(unseen) > 3)}"
            from_one = " Labels that count from 1 are written choices[LABEL - 1]."
            yield (
                f"{named[template]}: no row has the answer {some}, of {len(counts)} choices: it "
                f"will not be learnt.{from_one * (unseen[0] == next(iter(counts)))}"
            )


def for_the_record(recipe: recipes.Recipe, corpus: data.Corpus) -> dict[str, Any]:
    """For run.json: the counts of an epoch, each source's own, what share of it it is, lengths."""
    seed = recipe.training.seed
    lengths = charts.binned([corpus.lengths.tolist()], 1)
    sources = [
        {
            **asdict(report),
            "an_epoch": share,
            # What is looked at beforehand: None is every row.
            "looked_at_first": samples.STREAM_ROWS if source.streaming else None,
        }
        for source, report, share in zip(
            corpus.sources, corpus.reports, corpus.shares(seed), strict=True
        )
    ]
    return {
        **asdict(corpus.an_epoch(seed)),
        "sources": sources,
        "lengths": None if lengths is None else asdict(lengths),
    }


def mixed(recipe: recipes.Recipe, corpus: data.Corpus) -> Iterator[str]:
    """The share of each source in an epoch, a line each, where there are several."""
    if len(corpus.sources) > 1:
        shares = corpus.shares(recipe.training.seed)
        for source, share in zip(corpus.sources, shares, strict=True):
            yield (
                f"{source.path}: an epoch sees {share['rows']:,} rows "
                f"({share['rows_share']:.1%}), {share['tokens']:,} tokens "
                f"({share['tokens_share']:.1%})"
            )
