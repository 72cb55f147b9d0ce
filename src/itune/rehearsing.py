"""What can fail late is tried before the first step, so that it does not fail after days of it.

A checkpoint of the real size is written and read back, a held-out batch is measured, two rows of
each task are answered and scored, each tracker gets a line, and the disk is asked for the room that
the run will need. Nothing of it stays: weights, random state, log and folder are as before.
Needs torch.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from itune import (
    checkpoints,
    configs,
    data,
    decoding,
    encoding,
    errors,
    families,
    formats,
    generation,
    generators,
    jobs,
    judging,
    keeping,
    likelihoods,
    memory,
    models,
    optimizers,
    pieces,
    plans,
    recipes,
    runs,
    scoring,
    sharding,
    storage,
)

Say = Callable[[str], None]

ROWS = 2
NEW_TOKENS = 8  # chosen: whether answering works at all shows in the first of them
TRIAL = ".trial"
TRIAL_TOKENIZER = ".trial-tokenizer"
PROMPTS = ("What is shown here?", " Zwölf 1,5 % <a>\n\n  你好, 世界!")  # what readings differ in


def rehearse(
    recipe: recipes.Recipe,
    run: runs.Run,
    job: jobs.Job,
    encoder: encoding.Encoder,
    accelerator: Accelerator,
    kernel: str,
    say: Say,
    *,
    outline: Any,
    answering: Any,
    cut: bool,
) -> None:
    """Try everything that the run will need; every process calls it.

    `kernel`: the attention with which the model answers. `outline`: the whole model, with weights
    or without; `answering`: one that a process has whole. Both are the job's where that is not cut
    yet; `cut`: it is, or will be. A run that has a checkpoint has shown most of it: there it is the
    room, the trackers, and answers if their settings are others.
    Raises EnvironmentRefusal where disk or trackers refuse, Diverged where the loss is not finite,
    UserError where answers cannot be made or scored.
    """
    # What another process's machine has been shown of a folder may lag behind.
    begun = all(keeping.gathered([bool(storage.numbered(run.checkpoints))]))
    tried = []
    unknown = keeping.gathered([not begun or "checkpoint_seconds" not in run.manifest])[0]
    with _undisturbed(job.model):
        size = checkpoint_bytes(outline, recipe.training)
        if accelerator.is_main_process:
            _refuse_little_room(recipe, run, job, outline, size)
            tried += [_track(tracker) for tracker in accelerator.trackers]
            if not begun:
                _save_and_load(run, encoder)
        if unknown and (cut or accelerator.is_main_process):
            peers = keeping.peers(accelerator) if cut else pieces.ALONE
            state = _state(job.model, outline, recipe.training, accelerator.num_processes, peers)
            seconds = _write_and_read(run, state, peers)
            if accelerator.is_main_process:
                run.update(checkpoint_seconds=seconds)
            tried.append(f"a checkpoint of {_megabytes(size)}")
        if job.heldout is not None and not begun:
            _measure(job, job.heldout, accelerator)
            tried.append("a held-out batch")
        mark = _mark(recipe)
        if accelerator.is_main_process and not (begun and run.manifest.get("rehearsed") == mark):
            with accelerator.autocast():  # as in training: what is trained may be float32 alone
                tried += _answer(recipe, answering, encoder, kernel)
            run.update(rehearsed=mark)
    if tried:
        say(f"tried before the first step: {', '.join(tried)}")


@contextlib.contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """The model's mode and every random state as before."""
    training, drawn = model.training, memory.Drawn()
    try:
        yield
    finally:
        model.train(training)
        drawn.restore()


def _mark(recipe: recipes.Recipe) -> str:
    """What decides how rows are answered and scored, and may differ when a run goes on."""
    decides = [recipe.generation, recipe.evaluation.model_dump(mode="json")]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


# --- the disk -----------------------------------------------------------------------------


def _state(
    model: Any, outline: Any, settings: recipes.Training, world: int, peers: pieces.Peers
) -> checkpoints.State:
    """What a checkpoint will hold: the weights, and moments of the optimiser's that are zero yet.

    Of a model that is cut or will be, this process's rows. Raises ModelError for weights that are
    not finite: no checkpoint could be made of them.
    """
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    weights: checkpoints.Tensors = (
        sharding.owned(trained, first=peers.index == 0)
        if sharding.is_cut(model)
        else {name: pieces.own(tensor, peers) for name, tensor in trained.items()}
    )
    broken = next((name for name, t in weights.items() if not torch.isfinite(t).all()), None)
    if broken := next(filter(None, peers.gathered([broken])), None):
        raise errors.ModelError(
            f"{broken}: holds numbers that are not finite before the first step. Take a base "
            "model that is whole."
        )
    return checkpoints.State(
        step=0,
        weights=weights,
        optimizer=optimizers.blank_state(outline, settings, peers),
        scheduler={},
        rng=[generators.state() for _ in range(world)],
        meta={},
        average={} if settings.swa_start is None else {k: t.float() for k, t in weights.items()},
    )


def _save_and_load(run: runs.Run, encoder: encoding.Encoder) -> None:
    """Raises ModelError for a tokenizer that the library saves as another one."""
    folder = run.dir / TRIAL_TOKENIZER
    try:
        encoder.tokenizer.save_pretrained(folder)
        again = families.encoder(
            encoder.family, configs.tokenizer(str(folder), kind=encoder.family)
        )
        for text in PROMPTS:
            ours, theirs = _asked(encoder, text), _asked(again, text)
            if ours != theirs:
                raise errors.ModelError(
                    "the model's tokenizer, saved and read again, is another one: "
                    f"{errors.shown(text)} has the ids {ours[:8]} before and {theirs[:8]} after. "
                    "What is tuned would be asked otherwise. Save the base's tokenizer with this "
                    "version of transformers first, and see whether that is the one you mean."
                )
    finally:
        if folder.is_dir():
            storage.DISK.remove(folder)


def _asked(encoder: encoding.Encoder, text: str) -> list[int]:
    """The ids with which a model is asked a text; an encoder has no question without choices."""
    if encoder.family == families.MASKED:
        ids: list[int] = encoder.tokenizer(text)["input_ids"]
        return ids
    return encoder.prompt([formats.Message("user", text)])


def checkpoint_bytes(outline: Any, settings: recipes.Training) -> int:
    """Bytes of a checkpoint's tensors, but for the few of random states."""
    trained: int = sum(p.nbytes for p in outline.parameters() if p.requires_grad)
    return trained + optimizers.state_bytes(outline, settings)


def _refuse_little_room(
    recipe: recipes.Recipe, run: runs.Run, job: jobs.Job, outline: Any, checkpoint: int
) -> None:
    settings = recipe.training
    there = storage.numbered(run.checkpoints)
    left = len(job.plan) - (int(there[0].name) if there else 0)
    more = checkpoints_more(settings, len(job.plan), left, len(there))
    result = result_bytes(recipe, outline)
    needed, free = more * checkpoint + result, shutil.disk_usage(run.dir).free
    if free < needed:
        raise errors.EnvironmentRefusal(
            f"{run.dir}: {_megabytes(needed)} are needed and {_megabytes(free)} are free: {more} "
            f"checkpoints of {_megabytes(checkpoint)} (training.save_total_limit is "
            f"{settings.save_total_limit}) and the model of {_megabytes(result)}. Make room, lower "
            "training.save_total_limit, or choose another disk with --output."
        )


def checkpoints_more(settings: recipes.Training, steps: int, left: int, there: int = 0) -> int:
    """How many checkpoints a run with so many steps to go will add to those that are there."""
    auto = isinstance(settings.save_steps, str)  # not known yet: at most every step
    every = 1 if auto else plans.share_or_count(float(settings.save_steps), steps)
    saves = math.ceil(left / every)
    kept = settings.save_total_limit
    if settings.keeps_best:
        saves += math.ceil(left / plans.share_or_count(settings.eval_steps, steps))
        kept += 1
    # One more than are kept: the oldest goes when the newest is whole.
    return min(saves, max(1, kept + 1 - there))


def result_bytes(recipe: recipes.Recipe, model: Any) -> int:
    """Bytes of what a run leaves behind for good."""
    trained: int = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    whole: int = sum(p.nbytes for p in model.parameters())
    return whole if recipe.adapter is None else trained + whole * recipe.output.merge


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _write_and_read(run: runs.Run, state: checkpoints.State, peers: pieces.Peers) -> float:
    """Publish a checkpoint in a folder of its own, read it back, and take it away again.

    Returns the seconds that publishing took.
    """
    folder, run_id, first = run.checkpoints / TRIAL, str(run.manifest["id"]), peers.index == 0
    if first and folder.exists():  # of a run that was killed here
        storage.DISK.remove(folder)
    try:
        began = time.monotonic()
        path = checkpoints.save(folder, state, run_id=run_id, keep=1, peers=peers)
        seconds = round(time.monotonic() - began, 4)
        fault = checkpoints.fault(path, run_id, peers) or next(
            filter(None, peers.gathered([_other(path, state, peers)])), None
        )
        if fault:
            raise errors.EnvironmentRefusal(
                f"{run.checkpoints}: a checkpoint was written and reads back otherwise: {fault}. "
                "Choose another disk with --output."
            )
        return seconds
    finally:
        if first:
            _take_away(folder)


def _take_away(folder: Path) -> None:
    if folder.exists():
        try:
            storage.DISK.remove(folder)
        except OSError as error:
            raise errors.EnvironmentRefusal(
                f"{folder}: cannot be removed ({error.strerror}), and older checkpoints could not "
                "be either. Choose another folder with --output."
            ) from error


def _other(path: Path, wanted: checkpoints.State, peers: pieces.Peers) -> str | None:
    found = pieces.Pieces(path, checkpoints.WEIGHTS)
    for name, tensor in wanted.weights.items():
        if not torch.equal(found.own(name, peers), tensor.cpu()):
            return f"{name} has other numbers"
    return None


# --- numbers and answers ------------------------------------------------------------------


def _measure(job: jobs.Job, heldout: data.Corpus, accelerator: Accelerator) -> None:
    """The held-out loss on the micro-batch of the longest rows, which needs the most memory."""
    loss = jobs.measure(job, heldout, accelerator, most=1)
    if not math.isfinite(loss):
        raise errors.Diverged(
            f"the held-out loss is {loss} before the first step, so not finite. Look at the base "
            "model, and at model.dtype."
        )


def _answer(
    recipe: recipes.Recipe, model: Any, encoder: encoding.Encoder, kernel: str
) -> list[str]:
    """Answer and score the first rows of each task; returns what was tried, for the user."""
    if not recipe.data.eval:
        return []
    wanted = generation.settings(recipe.generation, encoder)
    room = min(decoding.context(model), 1 << 20)
    longest = room - min(int(wanted.max_new_tokens), room // 2)
    if encoder.family == families.MASKED:  # the place of the answer is in the prompt
        longest = min(models.positions(model), 1 << 20)
    wanted = copy.copy(wanted)
    wanted.max_new_tokens = min(int(wanted.max_new_tokens), NEW_TOKENS)
    said = []
    own = model.config._attn_implementation
    model.set_attn_implementation(kernel)
    try:
        for task in data.tasks(recipe.data.eval, encoder, max_prompt=longest, limit=ROWS):
            names = judging.metrics_of(task.template, recipe.evaluation.metrics)
            cases = list({case.row: case for case in reversed(task.cases)}.values())[::-1]
            made = _made(recipe, model, encoder, task, cases, wanted)
            rows = [
                scoring.Prediction(case.row, case.wording, text, case.references)
                for case, text in zip(cases, made, strict=True)
            ]
            scoring.by_wording(rows, names, choices=task.template.choices)
            said.append(f"answers to {len(cases)} rows of {task.name} ({', '.join(names)})")
    finally:
        model.set_attn_implementation(own)
    return said


def _made(
    recipe: recipes.Recipe,
    model: Any,
    encoder: encoding.Encoder,
    task: data.Task,
    cases: list[data.Case],
    wanted: Any,
) -> list[str]:
    choices, decide = task.template.choices, recipe.evaluation.decide
    model.eval()
    try:
        if choices and decide != "generate":
            asked = [case.messages for case in cases]
            picked = likelihoods.choose(model, encoder, asked, choices, decide=decide)
            return [choices[each] for each in picked]
        generation.refuse_masked(encoder, task.name)
        answers = decoding.generate(model, encoder, [case.ids for case in cases], wanted)
        return [each.text for each in answers]
    except (ValueError, TypeError) as error:
        raise errors.RecipeError(
            f"generation: the model cannot answer {task.name} with these settings: "
            f"{errors.shown(' '.join(str(error).split()))}. Change generation."
        ) from error


# --- trackers -----------------------------------------------------------------------------


def _track(tracker: Any) -> str:
    """Give a tracker a line, as of no step; returns its name."""
    try:
        tracker.log({"epoch": 0.0}, step=0)
    except Exception as error:  # each tracker has faults of its own kind
        said = errors.shown(" ".join(str(error).split()) or type(error).__name__)
        raise errors.EnvironmentRefusal(
            f"tracking.log_with: {tracker.name} does not take a line: {said}. Mend that, or leave "
            f"{tracker.name} out."
        ) from error
    return str(tracker.name)
