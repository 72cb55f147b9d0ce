"""What a run starts with: encoder, rows, model, plan, and what the user is told of them.

Needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from itune import (
    batches,
    charts,
    contamination,
    data,
    encoding,
    errors,
    families,
    fingerprints,
    guarding,
    launching,
    models,
    objectives,
    plans,
    recipes,
    runs,
    samples,
    vocabularies,
)

Say = Callable[[str], None]


def planned(
    settings: recipes.Training,
    corpus: data.Corpus,
    *,
    world: int,
    padded: bool,
    changing: bool = False,
    alone: bool = False,
) -> plans.Plan:
    """The steps of a run; `changing`: what an example is differs from visit to visit; `alone`:
    each has a micro-batch of its own."""
    lengths: Any = corpus.lengths
    targets: Any = corpus.targets
    if changing:
        order = objectives.visits(corpus, settings.seed)
        lengths, targets = objectives.Repeated(lengths), objectives.Repeated(targets)
    micro = settings.micro_batch_tokens or min(settings.tokens_per_step, batches.MICRO_TOKENS)
    micro = 1 if alone else micro  # the least there is: one row makes a micro-batch in any case
    return plans.plan(
        order if changing else lambda epoch: corpus.epoch(epoch, settings.seed),
        lengths,
        targets,
        tokens_per_step=settings.tokens_per_step,
        micro_batch_tokens=micro,
        epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
        world=world,
        padded=padded,
    )


def prepared(
    recipe: recipes.Recipe, run: runs.Run, say: Say
) -> tuple[encoding.Encoder, data.Corpus, data.Corpus | None]:
    """The encoder, the training data and the held-out data."""
    settings, command = recipe.training, str(run.manifest["command"])
    made = tokenizer(recipe, run, command)
    encoder = families.encoder(models.family_of(recipe.model), made)
    corpus = data.corpus(
        recipe.data.train,
        encoder,
        settings,
        visits=None if settings.max_steps > 0 else settings.num_train_epochs,
        command=command,
        max_dropped=recipe.data.max_dropped,
    )
    _refuse_other_rows(run, corpus)
    heldout = data.heldout(recipe, encoder, command)
    objective = objectives.of(encoder, settings)
    corpus = objectives.counted(corpus, objective, encoder.room)
    if heldout is not None:
        heldout = objectives.counted(heldout, objective, encoder.room)
    contamination.check(recipe, run, say, keep=launching.is_main())
    return encoder, corpus, heldout


def _refuse_other_rows(run: runs.Run, corpus: data.Corpus) -> None:
    """Refuse to go on with rows that changed since the run began: no plan of steps would hold."""
    if run.untried:
        return
    before = run.manifest.get("data", {}).get("train", {}).get("sources", [])
    for old, new in zip(before, corpus.reports, strict=False):
        if old["rows"] != new.rows:
            raise errors.DataError(
                f"{new.path}: its rows have changed since this run began ({old['rows'][:12]} then, "
                f"{new.rows[:12]} now; {old['counts']['read']:,} rows then, {new.counts.read:,} "
                "now). Put them back, or start anew with --fresh."
            )


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


def tokenizer(recipe: recipes.Recipe, run: runs.Run | None, command: str = "") -> Any:
    """The tokenizer that a recipe names, or the one trained on its texts, kept with the run."""
    scratch, kind = recipe.model.from_scratch, models.family_of(recipe.model)
    if scratch is None:
        return models.tokenizer(recipe.model.name or "", revision=recipe.model.revision, kind=kind)
    if isinstance(scratch.tokenizer, str):
        return models.tokenizer(scratch.tokenizer, kind=kind)
    kept = None if run is None else run.dir / "tokenizer"
    if kept is not None and kept.is_dir():
        return models.tokenizer(str(kept), kind=kind)
    texts = data.texts(recipe.data.train, command)
    made = vocabularies.train(scratch.tokenizer, texts, kind)
    if kept is not None:
        beside = kept.with_name(".tokenizer")
        made.save_pretrained(beside)
        beside.replace(kept)
    return made


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
                "nothing can be tuned on top of it. Name its base."
            )
    else:
        model = models.build(recipe.model, tokenizer, place, recipe.training.seed)
    if recipe.training.use_liger_kernel:
        models.use_liger(model, place)
    return model


def counted(corpus: data.Corpus, seed: int) -> Iterator[str]:
    """What the user is told of the training data, a line each."""
    for report in corpus.reports:
        yield from report.notes
        if not report.read_as.startswith("template "):
            yield f"{report.path}: read as {report.read_as}"
    for path in sorted({source.path for source in corpus.sources if source.streaming}):
        yield (
            f"{path}: a stream: masks and overlap with held-out rows are looked at in its first "
            f"{samples.STREAM_ROWS:,} rows alone"
        )
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
