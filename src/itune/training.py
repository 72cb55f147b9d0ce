"""The one loop: steps of a plan, the exact loss over each, checkpoints, the log.

Needs torch.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from itune import (
    averaging,
    batches,
    beats,
    diverging,
    errors,
    feeding,
    gradients,
    jobs,
    keeping,
    launching,
    losses,
    memory,
    optimizers,
    pacing,
    plans,
    recipes,
    rowlosses,
    runs,
    sharding,
    signals,
    sizing,
    timing,
    watching,
)

# --- the loop -----------------------------------------------------------------------------


def fit(
    job: jobs.Job,
    settings: recipes.Training,
    run: runs.Run,
    accelerator: Accelerator,
    watcher: watching.Watcher,
) -> watching.Outcome:
    """Train through the plan, from the newest checkpoint on if there is one.

    Step k's loss is the sum over its targets on all ranks and micro-batches, divided by their
    number, so its gradient is the full batch's whatever the split. Raises Interrupted after a
    signal, with a checkpoint; Diverged when the loss stays non-finite.
    """
    loop = _Loop(job, settings, run, accelerator, watcher)
    loop.resume()
    with signals.LISTENER.waiting(), beats.PULSE.working():
        loop.train()
        loop.keeper.take_best()
    return loop.outcome()


class _Loop:
    """The state of `fit`, and one method for each thing that happens in it."""

    def __init__(
        self,
        job: jobs.Job,
        settings: recipes.Training,
        run: runs.Run,
        accelerator: Accelerator,
        watcher: watching.Watcher,
    ) -> None:
        self.settings, self.run, self.accelerator, self.watcher = (
            settings,
            run,
            accelerator,
            watcher,
        )
        made = optimizers.optimizer(job.model, settings)
        self.scheduler = optimizers.schedule(made, settings, len(job.plan))
        self.cut = sharding.is_cut(job.model)
        # Not wrapped for several processes: `gradients` adds up, and a wrapper would keep room for
        # all gradients once more.
        self.job, model = job, job.model
        self.optimizer = accelerator.prepare(made)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.cut:
            gradients.begin_alike(self.parameters, accelerator)
        self.average = averaging.Average(
            keeping.trainable(model), settings.swa_start, len(job.plan)
        )
        self.keeper = keeping.Keeper(
            model, settings, run, accelerator, made, self.scheduler, self.average
        )
        self.clock = timing.Clock()
        self.row_losses: rowlosses.File | None = None
        self.records: list[dict[str, Any]] = []
        total = len(job.plan)
        self.save_every = total  # until the pace is known, which is then kept with the run
        self.pace: pacing.Pace | None = None
        if isinstance(settings.save_steps, str):
            hours = run.recipe.launch.mtbf_hours or math.inf
            self.pace = pacing.Pace(hours, accelerator.num_processes)
        else:
            self.save_every = plans.share_or_count(settings.save_steps, total)
        self.eval_every = plans.share_or_count(settings.eval_steps, total)

    @property
    def at(self) -> keeping.Progress:
        """How far the run is."""
        return self.keeper.at

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, or begin."""
        self.keeper.resume(self.watcher)
        if self.at.step > len(self.job.plan):
            raise errors.RunError(
                f"{self.run.dir}: has {self.at.step:,} steps already, and the recipe asks for "
                f"{len(self.job.plan):,}. Ask for as many at least, or begin anew with --fresh."
            )
        self._take_smaller(self.at.micro_batch_tokens)
        if self.pace is not None and self.at.save_every:
            self.save_every, self.pace = self.at.save_every, None
        beats.PULSE.beat(self.at.step)
        if self.accelerator.is_main_process:
            self.run.cut_log(self.at.step)
        plan = self.job.plan
        self.watcher.begin(len(plan), plan.tokens, self.at.step, self.at.tokens)

    def save(self) -> None:
        """Publish a checkpoint of the present step."""
        self.keeper.save(self.row_losses)

    # --- steps ---

    def train(self) -> None:
        """Every step of the plan that is not done yet."""
        self.job.model.train()
        if self.settings.row_losses:
            self.row_losses = rowlosses.File(
                self.run.dir, self.at.step, writes=self.accelerator.is_main_process
            )
        left = len(self.job.plan) - self.at.step
        watched = self.settings.profile and self.accelerator.is_main_process
        profile = timing.Profile(self.run.dir, on=watched, left=left)
        self.feed = feeding.Feed(
            self.job.plan,
            self.job.corpus,
            self.job.collate,
            rank=self.accelerator.process_index,
            start=self.at.step,
            device=self.accelerator.device,
        )
        with self.feed, contextlib.closing(profile):
            for _ in range(left):
                if self._over():
                    best, patience = self.at.best, self.settings.patience
                    self.watcher.say(
                        f"stopped early after step {self.at.step}: the held-out loss has not "
                        f"fallen in {patience} measurements; {best.loss:.4f} at step {best.step}."
                        if best.step
                        else f"stopped early after step {self.at.step}: no held-out loss is a "
                        "number."
                    )
                    break
                profile.step()
                self._advance()
            profile.step()
        self.average.take()
        self.clock.add("waiting for rows", self.feed.waited)
        if watched:
            title, columns = timing.title(profile), ("phase or operator", "seconds", "share")
            self.watcher.table(title, columns, timing.rows(self.clock, profile))

    def _advance(self) -> None:
        """One step, and what falls due after it."""
        started, waited, best = time.monotonic(), self.feed.waited, False
        record = self._step(self.feed.step())
        took = time.monotonic() - started
        self.at.seconds += took
        if self.pace is not None and self.pace.add(took):
            every = self.pace.decided(self.run, len(self.job.plan), self.watcher.say)
            self.save_every = keeping.gathered([every])[0]  # the first one's word
            self.at.save_every = self.save_every
            self.pace = None
        self.at.waited += self.feed.waited - waited
        if self._due(self.eval_every) and self.job.heldout is not None:
            with self.clock.phase("held-out loss"), self.average.lent():
                self.at.heldout_loss = jobs.measure(self.job, self.job.heldout, self.accelerator)
            record["heldout_loss"] = self.at.heldout_loss
            better = self.at.best.heard(self.at.step, self.at.heldout_loss)
            best = self.settings.keeps_best and (better or self._over())
        with self.clock.phase("log"):
            self._report({**record, "seconds": round(self.at.seconds, 3)})
        stopping = self._asked_to_stop()
        if self._due(self.save_every) or stopping or best:
            with self.clock.phase("checkpoint"):
                self.save()
        if stopping:
            raise errors.Interrupted(
                f"stopped by {stopping} after step {self.at.step} of {len(self.job.plan)}, with a "
                "checkpoint. Run the same command again to go on."
            )

    def _over(self) -> bool:
        return self.at.best.over(self.settings.patience)

    def _due(self, every: int) -> bool:
        return self.at.step % every == 0 or self.at.step == len(self.job.plan)

    def _asked_to_stop(self) -> str | None:
        if self.accelerator.num_processes == 1:
            return signals.LISTENER.asked
        asked = [name for name in keeping.gathered([signals.LISTENER.asked]) if name]
        return asked[0] if asked else None

    def _step(self, step: plans.Step) -> dict[str, Any]:
        rate = float(self.scheduler.get_last_lr()[-1])
        step, summed = self._fitted(step)
        with self.clock.phase("optimizer"):
            loss, norm = self._apply(summed, step)
        with warnings.catch_warnings():
            # A first step that is not applied is no mistake in the order of calls.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.at.step += 1
        self.average.add(self.at.step)
        beats.PULSE.beat(self.at.step)
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

    def _fitted(self, step: plans.Step) -> tuple[plans.Step, torch.Tensor]:
        """The step's gradient, in micro-batches that the memory of every process holds.

        Where one does not fit, all begin the step again with smaller ones and the same random
        numbers: its rows and its result are the same but for the order of sums. Returns the step
        as it was cut, and this rank's summed loss. Raises EnvironmentRefusal when one row alone
        does not fit.
        """
        if self.cut:  # every pass is a meeting, which no process can leave for a smaller one
            with sharding.refusing_short(self.job.plan.micro_batch_tokens):
                return step, self._gradients(step)
        drawn, planned = memory.Drawn(), self.job.plan.micro_batch_tokens
        while True:
            wanted, why = planned, ""
            try:
                summed = self._gradients(step)
            except (RuntimeError, MemoryError) as error:
                if not memory.is_short(error):
                    raise
                wanted, why = self.job.plan.half(self.rows), memory.told(error)
            # Only here, when the failed attempt and what it held are let go of.
            limit = gradients.least(wanted, self.accelerator)
            if limit == planned:
                gradients.add_up(self.parameters, self.accelerator)
                return step, summed
            self.optimizer.zero_grad()
            self.records = []
            memory.free()
            if limit == 0:
                self._refuse_row(why if wanted == 0 else "")
            drawn.restore()
            self.watcher.say(
                f"step {self.at.step + 1}: a micro-batch of {planned:,} tokens does not fit the "
                f"memory: {limit:,} from here on, of the same rows a step."
            )
            self._take_smaller(limit)
            self.feed.restart(self.job.plan, self.at.step)
            step, planned = self.feed.step(), limit

    def _take_smaller(self, limit: int) -> None:
        if limit:
            self.at.micro_batch_tokens = limit
            self.job = replace(self.job, plan=replace(self.job.plan, micro_batch_tokens=limit))

    def _refuse_row(self, why: str) -> None:
        """Raise for the row that does not fit alone, the same on every rank."""
        row, device = int(self.rows[0]), self.accelerator.device
        said = [sizing.alone(self.job, row, self.settings, device, why)] if why else []
        raise errors.EnvironmentRefusal(keeping.gathered(said)[0])

    def _gradients(self, step: plans.Step) -> torch.Tensor:
        """Accumulate this rank's part of the step's gradient; returns its summed loss, a scalar."""
        summed = torch.zeros((), device=self.accelerator.device)
        count = len(step.ranks[self.accelerator.process_index])
        for rows, batch in self.feed.batches(count):
            self.rows = rows
            each: losses.Each | None = None if self.row_losses is None else []
            summed += self._backward(batch, 1 / max(1, step.targets), each)
            beats.PULSE.beat()
            if each is not None:
                self.records += rowlosses.of_batch(self.job.corpus, rows, batch, each)
        if self.cut:
            for _ in range(max(map(len, step.ranks)) - count):
                self._backward(self.feed.idle, 0.0, None)
                beats.PULSE.beat()
        return summed

    def _backward(
        self, batch: batches.Batch, scale: float, each: losses.Each | None
    ) -> torch.Tensor:
        """Add a micro-batch's gradient, `scale` times; returns its summed loss."""
        model = self.job.model
        # Processes meet when the step is whole; those of a cut model in each layer.
        with beats.PULSE.meeting() if self.cut else contextlib.nullcontext():
            with self.clock.phase("forward"), self.accelerator.autocast():
                loss = losses.summed(model, batch, head=self.job.path.head, each=each, balance=True)
            with self.clock.phase("backward"):
                self.accelerator.backward(loss * scale)
        return loss.detach()

    def _apply(self, summed: torch.Tensor, step: plans.Step) -> tuple[float, float]:
        """The optimiser's step unless something is not finite; returns (loss, gradient norm)."""
        limit = self.settings.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self.parameters, limit)
        with beats.PULSE.meeting():
            total = self.accelerator.reduce(summed, "sum")
            norm = None if norm is None else sharding.whole(norm)
            if norm is None:
                norm = torch.full_like(total, math.nan)
            # The one place in a step where the device is waited for, and on it for the others.
            total, norm = torch.stack([total, norm.to(total)]).tolist()
        loss = total / max(1, step.targets)
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
            self.at.bad_steps = 0
        else:
            self._bad(loss, norm, step)
        return loss, norm

    def _bad(self, loss: float, norm: float, step: plans.Step) -> None:
        self.at.bad_steps += 1
        number, found = self.at.step + 1, f"loss {loss}, gradient norm {norm}"
        if self.at.bad_steps >= diverging.MAX_BAD_STEPS:
            rate = self.settings.learning_rate
            raise diverging.error(self.job, self.run, step, number, found, rate)
        launching.warn(f"step {number}: {found}: not finite, so the step is not applied.")

    def _report(self, record: dict[str, Any]) -> None:
        if self.row_losses is not None:
            found, self.records = keeping.gathered(self.records), []
            if self.accelerator.is_main_process:
                self.row_losses.add(record["step"], record["epoch"], found)
        if self.accelerator.is_main_process:
            self.run.log(record)
            due = record["step"] % self.settings.logging_steps == 0 or "heldout_loss" in record
            if self.accelerator.trackers and due:
                values = {k: v for k, v in record.items() if k != "step"}
                self.accelerator.log(values, step=record["step"])
            self.watcher.step(record)

    def outcome(self) -> watching.Outcome:
        """How it went, from the log: the same for an interrupted and a straight run."""
        lines = self.run.log_lines()
        tail = lines[-max(1, len(lines) // 20) :]
        finite = [line["loss"] for line in tail if isinstance(line["loss"], float)]
        return watching.Outcome(
            steps=self.at.step,
            tokens=self.at.tokens,
            supervised_tokens=self.at.supervised_tokens,
            seconds=round(self.at.seconds, 3),
            waited=round(self.at.waited, 3),
            loss=sum(finite) / len(finite) if finite else float("nan"),
            heldout_loss=self.at.heldout_loss,
            best_step=(self.at.best.step or None) if self.settings.keeps_best else None,
        )
