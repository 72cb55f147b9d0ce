"""The one loop: steps of a plan, the exact loss over each, checkpoints, the log.

Needs torch.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object

from itune import batches, checkpoints, errors, losses, models, recipes, runs, signals

if TYPE_CHECKING:
    import numpy as np

    from itune import data

MAX_BAD_STEPS = 3

Collate = Callable[["data.Corpus", "np.ndarray"], batches.Batch]


class Watcher(Protocol):
    """Whoever shows how a run goes."""

    def begin(self, steps: int, tokens: int, done_steps: int, done_tokens: int) -> None:
        """The run starts, or goes on after `done_steps`."""

    def step(self, record: dict[str, Any]) -> None:
        """One step is done; the record is its line of the log."""

    def say(self, text: str) -> None:
        """A sentence for the user."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How training ended. Losses are in nats a token; seconds are of training alone."""

    steps: int
    tokens: int
    supervised_tokens: int
    seconds: float
    loss: float
    heldout_loss: float | None


@dataclass(frozen=True)
class Job:
    """What is trained on what: everything but the settings."""

    model: Any
    corpus: data.Corpus
    heldout: data.Corpus | None
    plan: batches.Plan
    collate: Collate
    micro_batch_tokens: int


def accelerator(recipe: recipes.Recipe, place: models.Placement) -> Accelerator:
    """Accelerate's handle on processes, precision and trackers, for a recipe."""
    mixed = place.dtype == torch.bfloat16 and recipe.adapter is None
    trackers = list(recipe.tracking.log_with)
    made = Accelerator(
        cpu=place.device.type == "cpu",
        mixed_precision="bf16" if mixed else "no",
        log_with=trackers or None,
        project_dir=str(recipe.output.dir) if trackers else None,
    )
    if trackers:
        made.init_trackers(recipe.tracking.project_name)
    return made


# --- optimiser and schedule ---------------------------------------------------------------


def optimizer(model: Any, settings: recipes.Training) -> torch.optim.Optimizer:
    """The optimiser that `training.optim` names, over the trainable parameters.

    Matrices decay, vectors (biases, norms) do not.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if settings.optim == "sgd":
        return torch.optim.SGD(_groups(named, settings), lr=settings.learning_rate)
    if settings.optim == "adafactor":
        return transformers.Adafactor(
            _groups(named, settings),
            lr=settings.learning_rate,
            scale_parameter=False,
            relative_step=False,
        )
    return _adamw(named, settings, fused=settings.optim != "adamw_torch")


def _groups(named: list[tuple[str, Any]], settings: recipes.Training) -> list[dict[str, Any]]:
    decayed = [p for _, p in named if p.ndim >= 2]
    spared = [p for _, p in named if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _adamw(
    named: list[tuple[str, Any]], settings: recipes.Training, *, fused: bool
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        _groups(named, settings),
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        fused=fused,
    )


def schedule(made: torch.optim.Optimizer, settings: recipes.Training, steps: int) -> Any:
    """The learning-rate schedule of transformers that `lr_scheduler_type` names."""
    warmup = settings.warmup_steps
    try:
        return transformers.get_scheduler(
            settings.lr_scheduler_type,
            made,
            num_warmup_steps=math.ceil(warmup * steps) if warmup < 1 else int(warmup),
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(settings.lr_scheduler_kwargs),
        )
    except (ValueError, TypeError) as error:
        known = [str(kind.value) for kind in transformers.SchedulerType]
        raise errors.RecipeError(
            f"training.lr_scheduler_type: {settings.lr_scheduler_type!r}: "
            f"{' '.join(str(error).split())}.{errors.nearest(settings.lr_scheduler_type, known)}"
        ) from error


# --- measuring ----------------------------------------------------------------------------


@torch.no_grad()
def measure(job: Job, corpus: data.Corpus, accelerator: Accelerator) -> float:
    """Mean loss in nats over a corpus's targets, the same on every rank."""
    model = job.model
    was_training = model.training
    model.eval()
    order = sorted(range(len(corpus)), key=lambda row: -int(corpus.lengths[row]))
    pieces = batches.micro_batches(order, corpus.lengths, job.micro_batch_tokens, padded=True)
    total = torch.zeros((), dtype=torch.float64)
    for rows in pieces[accelerator.process_index :: accelerator.num_processes]:
        batch = job.collate(corpus, rows).to(accelerator.device)
        with accelerator.autocast():
            total += losses.summed(accelerator.unwrap_model(model), batch).double().cpu()
    model.train(was_training)
    summed = accelerator.reduce(total.to(accelerator.device, torch.float64), "sum")
    return float(summed) / max(1, int(corpus.targets.sum()))


# --- the loop -----------------------------------------------------------------------------


@dataclass
class _Progress:
    """What the loop counts, kept in checkpoints."""

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    bad_steps: int = 0
    heldout_loss: float | None = None


def fit(
    job: Job,
    settings: recipes.Training,
    run: runs.Run,
    accelerator: Accelerator,
    watcher: Watcher,
) -> Outcome:
    """Train through the plan, from the newest checkpoint on if there is one.

    Step k's loss is the sum over its targets on all ranks and micro-batches, divided by their
    number, so its gradient is the full batch's whatever the split. Raises Interrupted after a
    signal, with a checkpoint; Diverged when the loss stays non-finite.
    """
    loop = _Loop(job, settings, run, accelerator, watcher)
    loop.resume()
    with signals.LISTENER.waiting():
        loop.train()
    return loop.outcome()


class _Loop:
    """The state of `fit`, and one method for each thing that happens in it."""

    def __init__(
        self,
        job: Job,
        settings: recipes.Training,
        run: runs.Run,
        accelerator: Accelerator,
        watcher: Watcher,
    ) -> None:
        self.settings, self.run, self.accelerator, self.watcher = (
            settings,
            run,
            accelerator,
            watcher,
        )
        made = optimizer(job.model, settings)
        self.raw_optimizer = made
        self.scheduler = schedule(made, settings, len(job.plan))
        model, self.optimizer = accelerator.prepare(job.model, made)
        self.job = Job(
            model, job.corpus, job.heldout, job.plan, job.collate, job.micro_batch_tokens
        )
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.at = _Progress()
        self.run_id = str(run.manifest["id"])
        total = len(job.plan)
        self.save_every = batches.share_or_count(settings.save_steps, total)
        self.eval_every = batches.share_or_count(settings.eval_steps, total)

    # --- checkpoints ---

    def resume(self) -> None:
        """Restore the newest whole checkpoint: weights, optimiser, schedule, RNG, counts."""
        path, warnings = checkpoints.latest(self.run.checkpoints, self.run_id)
        for warning in warnings:
            self.watcher.say(warning)
        if path is not None:
            state = checkpoints.load(path)
            own = dict(self._trainable())
            if set(own) != set(state.weights) or len(state.rng) != self.accelerator.num_processes:
                raise errors.RunError(
                    f"{path}: holds other parameters or another number of processes "
                    f"({len(state.rng)} there, {self.accelerator.num_processes} now). Run it as "
                    "before, or start anew with --fresh."
                )
            with torch.no_grad():
                for name, parameter in own.items():
                    parameter.copy_(state.weights[name])
            self.raw_optimizer.load_state_dict(state.optimizer)
            self.scheduler.load_state_dict(state.scheduler)
            checkpoints.set_random_state(state.rng[self.accelerator.process_index])
            self.at = _Progress(**state.meta)
        else:
            torch.manual_seed(self.settings.seed + self.accelerator.process_index)
        if self.accelerator.is_main_process:
            self.run.cut_log(self.at.step)
        plan = self.job.plan
        self.watcher.begin(len(plan), plan.tokens, self.at.step, self.at.tokens)

    def _trainable(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        inner = self.accelerator.unwrap_model(self.job.model)
        return ((name, p) for name, p in inner.named_parameters() if p.requires_grad)

    def save(self) -> None:
        """Publish a checkpoint of the present step, from rank 0."""
        rng = gather_object([checkpoints.random_state()])
        if self.accelerator.is_main_process:
            state = checkpoints.State(
                step=self.at.step,
                weights={name: p.detach() for name, p in self._trainable()},
                optimizer=self.raw_optimizer.state_dict(),
                scheduler=self.scheduler.state_dict(),
                rng=rng,
                meta=vars(self.at).copy(),
            )
            checkpoints.save(
                self.run.checkpoints,
                state,
                run_id=self.run_id,
                keep=self.settings.save_total_limit,
            )
        self.accelerator.wait_for_everyone()

    # --- steps ---

    def train(self) -> None:
        """Every step of the plan that is not done yet."""
        self.job.model.train()
        total = len(self.job.plan)
        while self.at.step < total:
            started = time.monotonic()
            record = self._step(self.job.plan.steps[self.at.step])
            self.at.seconds += time.monotonic() - started
            if self._due(self.eval_every) and self.job.heldout is not None:
                self.at.heldout_loss = measure(self.job, self.job.heldout, self.accelerator)
                record["heldout_loss"] = self.at.heldout_loss
            self._report({**record, "seconds": round(self.at.seconds, 3)})
            stopping = self._asked_to_stop()
            if self._due(self.save_every) or stopping:
                self.save()
            if stopping:
                raise errors.Interrupted(
                    f"stopped by {stopping} after step {self.at.step} of {total}, with a "
                    "checkpoint. Run the same command again to go on."
                )

    def _due(self, every: int) -> bool:
        return self.at.step % every == 0 or self.at.step == len(self.job.plan)

    def _asked_to_stop(self) -> str | None:
        if self.accelerator.num_processes == 1:
            return signals.LISTENER.asked
        asked = [name for name in gather_object([signals.LISTENER.asked]) if name]
        return asked[0] if asked else None

    def _step(self, step: batches.Step) -> dict[str, Any]:
        rate = float(self.scheduler.get_last_lr()[-1])
        summed = self._gradients(step)
        norm = self._norm()
        loss = float(self.accelerator.reduce(summed, "sum")) / max(1, step.targets)
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
            self.at.bad_steps = 0
        else:
            self._bad(loss, norm)
        with warnings.catch_warnings():
            # A first step that is not applied is no mistake in the order of calls.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.at.step += 1
        self.at.tokens += step.tokens
        self.at.supervised_tokens += step.targets
        return {
            "step": self.at.step,
            "epoch": step.epoch,
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens": self.at.tokens,
            "supervised_tokens": self.at.supervised_tokens,
        }

    def _gradients(self, step: batches.Step) -> torch.Tensor:
        """Accumulate the step's gradient; returns this rank's summed loss, a scalar."""
        world = self.accelerator.num_processes
        mine = step.ranks[self.accelerator.process_index]
        summed = torch.zeros((), device=self.accelerator.device)
        # DistributedDataParallel averages over ranks: times their number gives the sum again.
        scale = world / max(1, step.targets)
        for number, rows in enumerate(mine):
            batch = self.job.collate(self.job.corpus, rows).to(self.accelerator.device)
            last = number == len(mine) - 1
            waiting = contextlib.nullcontext() if last else self.accelerator.no_sync(self.job.model)
            with waiting:
                with self.accelerator.autocast():
                    loss = losses.summed(self.job.model, batch)
                self.accelerator.backward(loss * scale)
            summed += loss.detach()
        if not mine:  # fewer rows than ranks: this one still takes part in the reduction
            batch = self.job.collate(self.job.corpus, step.ranks[0][0][:1])
            loss = losses.summed(self.job.model, batch.to(self.accelerator.device))
            self.accelerator.backward(loss * 0.0)
        return summed

    def _norm(self) -> float:
        limit = self.settings.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self.parameters, limit)
        return float("nan") if norm is None else float(norm)

    def _bad(self, loss: float, norm: float) -> None:
        self.at.bad_steps += 1
        if self.at.bad_steps < MAX_BAD_STEPS:
            self.watcher.say(
                f"step {self.at.step + 1}: loss {loss}, gradient norm {norm}: not finite, so the "
                "step is not applied."
            )
            return
        raise errors.Diverged(
            f"{self.run.dir}: the loss is not finite for {MAX_BAD_STEPS} steps running, the last "
            f"of them {self.at.step + 1} (loss {loss}, gradient norm {norm}). Lower "
            f"training.learning_rate ({self.settings.learning_rate}) and start with --fresh."
        )

    def _report(self, record: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.run.log(record)
            if self.accelerator.trackers and record["step"] % self.settings.logging_steps == 0:
                values = {k: v for k, v in record.items() if k != "step"}
                self.accelerator.log(values, step=record["step"])
            self.watcher.step(record)

    def outcome(self) -> Outcome:
        """How it went, from the log: the same for an interrupted and a straight run."""
        lines = self.run.log_lines()
        tail = lines[-max(1, len(lines) // 20) :]
        finite = [line["loss"] for line in tail if isinstance(line["loss"], float)]
        return Outcome(
            steps=self.at.step,
            tokens=self.at.tokens,
            supervised_tokens=self.at.supervised_tokens,
            seconds=round(self.at.seconds, 3),
            loss=sum(finite) / len(finite) if finite else float("nan"),
            heldout_loss=self.at.heldout_loss,
        )
