"""The four commands: what each does, in order. Everything heavy is imported when it is needed."""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itune import console, errors, launching, recipes, runs, templates

if TYPE_CHECKING:
    from itune import data, encoding, models, plans


@dataclass(frozen=True, slots=True)
class Common:
    """The options that every command has."""

    recipe: str | None = None
    sets: tuple[str, ...] = ()
    output: Path | None = None
    processes: int | None = None
    json: bool = False
    quiet: bool = False

    def screen(self) -> console.Screen:
        """Where this command speaks; under several processes the first alone does."""
        return console.Screen(quiet=self.quiet, silent=self.json or not launching.is_main())

    def load(self, command: str) -> recipes.Recipe:
        """The recipe of the options."""
        return recipes.load(self.recipe, overrides=self.sets, output=self.output, command=command)


def _still() -> None:
    """Silence the libraries' own bars and advice: what matters, itune says itself."""
    import logging

    import datasets
    import transformers

    # transformers warns of a name that peft still uses; nobody who tunes can do anything about it.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()


def _emit(common: Common, value: Mapping[str, Any]) -> None:
    if common.json and launching.is_main():
        sys.stdout.write(runs.to_json(value) + "\n")
        sys.stdout.flush()


# --- pretrain and tune --------------------------------------------------------------------


def train(
    command: str,
    common: Common,
    arguments: Sequence[str],
    *,
    preview: int = 0,
    fresh: bool = False,
    allowed: Sequence[str] = (),
) -> None:
    """`itune pretrain` and `itune tune`: one loop, from a recipe to a run's folder."""
    recipe = common.load(command)
    screen = common.screen()
    if preview:
        _preview(recipe, common, screen, preview)
        return
    launching.ensure(common.processes or recipe.launch.num_processes, arguments)
    run, state = _opened(recipe, command, fresh=fresh, allowed=allowed)
    if state == "finished":
        screen.say(f"{run.dir}: already complete. Start it anew with --fresh.")
        _emit(common, _summary(run))
        return
    with runs.locked(run) if launching.is_main() else contextlib.nullcontext():
        screen.say(f"{command}: {recipe.name} in {run.dir}")
        try:
            _train(recipe, run, screen)
        except errors.ItuneError as error:
            ended = {errors.Interrupted: "interrupted", errors.Diverged: "diverged"}
            if launching.is_main():
                run.update(state=ended.get(type(error), "failed"))
            raise
        finally:
            screen.end()
    _emit(common, _summary(run))


def _opened(
    recipe: recipes.Recipe, command: str, *, fresh: bool, allowed: Sequence[str]
) -> tuple[runs.Run, str]:
    if launching.is_main():
        return runs.open_run(recipe, command, fresh=fresh, allowed=allowed)
    run = runs.Run(recipe.output.dir)
    runs.wait_for(run)
    return run, str(run.manifest["state"])


def _train(recipe: recipes.Recipe, run: runs.Run, screen: console.Screen) -> None:
    from itune import (
        adapters,
        data,
        encoding,
        jobs,
        models,
        probing,
        training,
    )

    _still()
    place = models.placement(recipe.model)
    accelerator = jobs.accelerator(recipe, place)
    launching.check(accelerator)
    settings = recipe.training
    with accelerator.main_process_first():
        tokenizer = _tokenizer(recipe, run)
        encoder = encoding.Encoder(tokenizer)
        epochs = None if settings.max_steps > 0 else settings.num_train_epochs
        corpus = data.corpus(recipe.data.train, encoder, settings, visits=epochs)
        heldout = data.heldout(recipe, encoder)
    screen.say(_counted("training data", corpus.counts))
    base = models.resolve(recipe.model.name) if recipe.model.name else recipe.name
    model = _untrained(recipe, tokenizer, place)
    models.check_fits(model, corpus, settings.max_length)
    screen.say(f"computing in {place.why}{models.take_threads(model, place)}")
    model = adapters.attach(model, recipe.adapter, base=base, seed=settings.seed)
    kernel = model.config._attn_implementation
    path = probing.choose(
        model,
        int(corpus.lengths.max()),
        packing=settings.packing,
        autocast=accelerator.autocast,
    )
    screen.say(path.why)
    if settings.gradient_checkpointing:
        models.recompute(model)
    total, trainable = models.count(model)
    screen.say(f"model: {total:,} parameters, {trainable:,} of them trained")
    plan = _planned(settings, corpus, world=accelerator.num_processes, padded=path.padded)
    job = jobs.Job(model, corpus, heldout, plan, path.collate(tokenizer.pad_token_id), path)
    if accelerator.is_main_process:
        run.update(
            state="running",
            base=recipe.model.name,
            computing=place.why,
            processes=accelerator.num_processes,
            parameters=total,
            trainable=trainable,
            packed=not path.padded,
            path=asdict(path),
            data={"train": asdict(corpus.counts)},
            steps=len(plan),
        )
    outcome = training.fit(job, settings, run, accelerator, screen)
    screen.end()
    if accelerator.is_main_process:
        model.set_attn_implementation(kernel)  # that of packed rows is no part of the result
        _finish(recipe, run, model, encoder, outcome, screen)
    accelerator.wait_for_everyone()


def _planned(
    settings: recipes.Training, corpus: data.Corpus, *, world: int, padded: bool
) -> plans.Plan:
    from itune import batches, plans

    micro = settings.micro_batch_tokens or min(settings.tokens_per_step, batches.MICRO_TOKENS)
    return plans.plan(
        lambda epoch: corpus.epoch(epoch, settings.seed),
        corpus.lengths,
        corpus.targets,
        tokens_per_step=settings.tokens_per_step,
        micro_batch_tokens=micro,
        epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
        world=world,
        padded=padded,
    )


def _tokenizer(recipe: recipes.Recipe, run: runs.Run | None) -> Any:
    from itune import data, models

    scratch = recipe.model.from_scratch
    if scratch is None:
        return models.tokenizer(recipe.model.name or "", revision=recipe.model.revision)
    if isinstance(scratch.tokenizer, str):
        return models.tokenizer(scratch.tokenizer)
    kept = None if run is None else run.dir / "tokenizer"
    if kept is not None and kept.is_dir():
        return models.tokenizer(str(kept))
    made = models.train_tokenizer(scratch.tokenizer, data.texts(recipe.data.train))
    if kept is not None:
        beside = kept.with_name(".tokenizer")
        made.save_pretrained(beside)
        beside.replace(kept)
    return made


def _untrained(recipe: recipes.Recipe, tokenizer: Any, place: models.Placement) -> Any:
    from itune import models

    if recipe.model.from_scratch is None:
        return models.load(recipe.model, place, full=recipe.adapter is None)
    return models.build(recipe.model.from_scratch, tokenizer, place, recipe.training.seed)


def _counted(what: str, counts: data.Counts) -> str:
    text = (
        f"{what}: {counts.rows:,} rows, {counts.tokens:,} tokens, "
        f"{counts.supervised:,} of them learnt"
    )
    if counts.truncated:
        text += f"; {counts.truncated:,} prompts cut to training.max_length"
    if counts.dropped:
        text += f"; {counts.dropped:,} rows left out, too long or without an answer"
    return text


def _finish(
    recipe: recipes.Recipe,
    run: runs.Run,
    model: Any,
    encoder: encoding.Encoder,
    outcome: Any,
    screen: console.Screen,
) -> None:
    import torch

    from itune import adapters, decoding

    staged = run.dir / ".model"
    model.eval()
    model.generation_config = decoding.settings(recipe.generation, encoder)
    model.config.use_cache = True
    model.save_pretrained(staged)
    model.generation_config.save_pretrained(staged)
    encoder.tokenizer.save_pretrained(staged)
    (staged / "README.md").write_text(runs.card(run, recipe, asdict(outcome)), encoding="utf-8")
    staged.replace(run.model_dir)
    if recipe.output.merge and recipe.adapter is not None:
        ids = torch.tensor([encoder.text_ids("What is shown here?")], device=model.device)
        difference = adapters.merge_and_prove(model, ids, run.dir / "merged")
        encoder.tokenizer.save_pretrained(run.dir / "merged")
        screen.say(f"merged: logits within {difference:.1e} of the adapter's, {run.dir / 'merged'}")
    now = datetime.datetime.now(datetime.timezone.utc)
    run.update(state="finished", finished=now.isoformat("T", "microseconds"), **asdict(outcome))
    heldout = "" if outcome.heldout_loss is None else f", held-out loss {outcome.heldout_loss:.4f}"
    screen.say(
        f"done: {outcome.steps} steps, {outcome.tokens:,} tokens in {outcome.seconds:.0f} s "
        f"({outcome.tokens / max(outcome.seconds, 1e-9):,.0f} a second), loss {outcome.loss:.4f}"
        f"{heldout}; the model is in {run.model_dir}"
    )


def _summary(run: runs.Run) -> dict[str, Any]:
    manifest = run.manifest
    names = ("state", "steps", "tokens", "seconds", "loss", "heldout_loss")
    return {"run": str(run.dir), **{name: manifest.get(name) for name in names}}


def _preview(recipe: recipes.Recipe, common: Common, screen: console.Screen, number: int) -> None:
    from itune import data, encoding

    _still()
    encoder = encoding.Encoder(_tokenizer(recipe, None))
    corpus = data.corpus(recipe.data.train, encoder, recipe.training, visits=1)
    shown: list[dict[str, Any]] = []
    for index in corpus.epoch(0, recipe.training.seed)[:number]:
        span = slice(int(corpus.starts[index]), int(corpus.starts[index + 1]))
        ids, learnt = corpus.ids[span].tolist(), corpus.supervised[span].tolist()
        pieces = [encoder.tokenizer.decode([id_]) for id_ in ids]
        screen.preview(len(shown) + 1, list(zip(pieces, learnt, strict=True)))
        shown.append({"text": encoder.tokenizer.decode(ids), "ids": ids, "supervised": learnt})
    counts = corpus.counts
    screen.say(_counted("training data", counts))
    _emit(common, {"examples": shown, "counts": asdict(counts)})


# --- eval ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Judged:
    """What `itune eval` is asked to score, and how."""

    run: Path | None = None
    model: str | None = None
    predictions: Path | None = None
    metrics: tuple[str, ...] = ()
    against: str | None = None
    limit: int | None = None


def evaluate(common: Common, asked: Judged) -> None:
    """`itune eval`: predictions, their scores with intervals, and the paired comparison."""
    from itune import judging

    screen = common.screen()
    if asked.predictions is not None:
        if not asked.metrics:
            raise errors.OptionError("--predictions: which metric? Name it with --metric NAME.")
        result = judging.of_file(asked.predictions, asked.metrics, asked.against)
    else:
        _still()
        recipe, run = _judged(common, asked)
        if run is not None:
            screen.say(f"run: {run.dir}")
        result = judging.of_model(
            recipe,
            run,
            model=asked.model,
            metrics=asked.metrics or recipe.evaluation.metrics,
            against=asked.against or recipe.evaluation.against,
            limit=asked.limit,
            folder=common.output,
            say=screen.say,
        )
    for title, columns, rows in judging.tables(result):
        screen.table(title, columns, rows)
    _emit(common, result)


def _judged(common: Common, asked: Judged) -> tuple[recipes.Recipe, runs.Run | None]:
    if asked.model is not None:
        if common.recipe is None:
            raise errors.OptionError(
                "--model: on which data? Name a recipe that has data.eval with --recipe."
            )
        sets = (*common.sets, f"model.name={json.dumps(asked.model)}", "model.from_scratch=null")
        return recipes.load(common.recipe, overrides=sets, command="eval"), None
    if asked.run is None and common.recipe is not None:
        recipe = recipes.load(common.recipe, overrides=common.sets, command="eval")
        return recipe, runs.find(recipe.output.dir)
    run = runs.find(asked.run) if asked.run is not None else runs.newest()
    path = run.dir / "recipe.yaml"
    return recipes.load(path, overrides=common.sets, command="eval"), run


# --- generate -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """What `itune generate` is asked to answer, and by which model."""

    prompts: tuple[str, ...] = ()
    run: Path | None = None
    model: str | None = None
    input: Path | None = None
    template: str | None = None
    fields: tuple[str, ...] = ()


def generate(common: Common, asked: Asked) -> None:
    """`itune generate`: one answer a prompt, in their order."""
    fields = _generation(common.sets)
    conversations = list(_conversations(asked))
    if not conversations:
        raise errors.OptionError(
            "no prompt. Give one or more on the command line, - for standard input, or --input "
            "FILE with a JSON object a line."
        )
    finished = _answered(common.output) if asked.input is not None else 0
    if asked.input is not None and common.output is None:
        raise errors.OptionError("--input: where to? Name the file with --output FILE.")
    screen = common.screen()
    if finished:
        screen.say(f"{common.output}: {finished} of {len(conversations)} are answered already")
    waiting = conversations[finished:]
    for prompt, completion in _answers(asked, fields, waiting, screen):
        answer = {
            "prompt": prompt,
            "response": completion.text,
            "stop": completion.stop,
            "tokens": completion.tokens,
        }
        if common.output is not None:
            with common.output.open("a", encoding="utf-8") as file:
                file.write(runs.to_json(answer) + "\n")
        elif common.json:
            _emit(common, answer)
        else:
            screen.result(
                f"> {prompt}\n{completion.text}\n" if len(waiting) > 1 else completion.text
            )
    if common.output is not None:
        screen.say(f"{len(waiting)} answers written to {common.output}")


def _answers(
    asked: Asked,
    given: Mapping[str, Any],
    waiting: Sequence[tuple[str, list[Any]]],
    screen: console.Screen,
) -> Iterator[tuple[str, Any]]:
    import torch

    from itune import decoding, encoding, models

    if not waiting:
        return
    _still()
    fields: dict[str, Any] = {}
    if asked.model is not None:
        location, seed = asked.model, 17
    else:
        run = runs.find(asked.run) if asked.run is not None else runs.newest()
        screen.say(f"run: {run.dir}")
        location = str(run.dir)
        recipe = run.recipe
        fields, seed = dict(recipe.generation), recipe.training.seed
    fields.update(given)
    encoder = encoding.Encoder(models.tokenizer(location))
    wanted = decoding.settings(fields, encoder)
    named = recipes.Model(name=location)
    place = models.placement(named)
    model = models.load(named, place)
    models.take_threads(model, place)
    torch.manual_seed(seed)
    # A chunk at a time, so that what is answered is written before the rest is begun.
    for start in range(0, len(waiting), decoding.BATCH_ROWS):
        chunk = waiting[start : start + decoding.BATCH_ROWS]
        ids = [encoder.prompt(messages) for _, messages in chunk]
        made = decoding.generate(model, encoder, ids, wanted)
        yield from zip((prompt for prompt, _ in chunk), made, strict=True)


def _generation(sets: Sequence[str]) -> dict[str, Any]:
    from itune import yamls

    fields = {}
    for item in sets:
        key, sign, value = item.partition("=")
        section, _, name = key.partition(".")
        if not sign or section != "generation" or not name:
            raise errors.OptionError(
                f"--set {item}: itune generate takes generation.FIELD=VALUE alone."
            )
        fields[name] = yamls.parse_value(value, f"--set {item}", errors.OptionError)
    return fields


def _conversations(asked: Asked) -> Iterator[tuple[str, list[Any]]]:
    """(prompt as shown, messages) of each thing that is asked, in order."""
    template = templates.load(asked.template) if asked.template else None
    if asked.fields:
        if template is None:
            raise errors.OptionError("--field: for which template? Name it with --template NAME.")
        yield _asked(_fields(asked.fields), "--field", template)
    for prompt in asked.prompts:
        text = sys.stdin.read().strip() if prompt == "-" else prompt
        names = ["prompt"] if template is None else sorted(template.columns())
        yield _asked(dict.fromkeys(names, text), "prompt", template)
    if asked.input is not None:
        for number, row in _json_lines(asked.input):
            yield _asked(row, f"{asked.input}:{number}", template)


def _asked(
    row: Mapping[str, Any], where: str, template: templates.Template | None
) -> tuple[str, list[Any]]:
    from itune import formats

    if "messages" in row and template is None:
        turns = list(formats.conversation(row, answered=False).messages)
        return turns[-1].content, turns
    prompt = template.prompt(row, 0) if template is not None else row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise errors.DataError(
            f"{where}: no prompt. A row needs `prompt`, `messages`, or --template with its fields."
        )
    system = [formats.Message("system", template.system)] if template and template.system else []
    return prompt, [*system, formats.Message("user", prompt)]


def _fields(given: Sequence[str]) -> dict[str, str]:
    row = {}
    for item in given:
        key, sign, value = item.partition("=")
        if not sign or not key:
            raise errors.OptionError(f"--field {item}: expected key=value.")
        row[key] = value
    return row


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        raise errors.DataError(f"{path}: no such file, in {Path.cwd()}.")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise errors.DataError(f"{path}:{number}: not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise errors.DataError(f"{path}:{number}: expected an object {{...}}.")
            yield number, row


def _answered(path: Path | None) -> int:
    """How many prompts a file answers already; a line that a kill tore is taken out."""
    if path is None or not path.is_file():
        return 0
    whole = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            json.loads(line)
        except ValueError:
            break
        whole.append(line)
    runs.write(path, "".join(f"{line}\n" for line in whole))
    return len(whole)
