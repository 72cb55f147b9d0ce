"""What a run keeps so that it can go on: put away in checkpoints, found, and put back.

Needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from itune import (
    averaging,
    beats,
    bests,
    checkpoints,
    errors,
    generators,
    launching,
    pieces,
    recipes,
    rowlosses,
    runs,
    sharding,
    storage,
    watching,
)


@dataclass
class Progress:
    """What the loop counts, kept in checkpoints."""

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    bad_steps: int = 0
    heldout_loss: float | None = None
    best: bests.Best = field(default_factory=bests.Best)
    # Other than 0: steps between checkpoints, as training.save_steps=auto found.
    save_every: int = 0
    micro_batch_tokens: int = 0  # other than 0: what the memory held less than the plan has


@dataclass
class Keeper:
    """A run's state, and its checkpoints: weights, optimiser, schedule, RNG, counts, all or none.

    `model` as the processes share it; `at`: how far the run is.
    """

    model: Any
    settings: recipes.Training
    run: runs.Run
    accelerator: Accelerator
    optimizer: torch.optim.Optimizer
    scheduler: Any
    average: averaging.Average
    at: Progress = field(default_factory=Progress)

    @property
    def _run_id(self) -> str:
        return str(self.run.manifest["id"])

    @property
    def _peers(self) -> pieces.Peers:
        return peers(self.accelerator)

    def resume(self, watcher: watching.Watcher) -> None:
        """Restore the newest whole checkpoint, if there is one."""
        path, broken = checkpoints.latest(self.run.checkpoints, self._run_id, self._peers)
        for why in broken:
            launching.warn(why)
        rank, seed = self.accelerator.process_index, self.settings.seed
        if path is None:
            torch.manual_seed(seed + rank)
            return
        held = pieces.Pieces(path, checkpoints.WEIGHTS)
        if set(dict(trainable(self.model))) != set(held):
            raise errors.RunError(
                f"{path}: holds other parameters. Run it as before, or start anew with --fresh."
            )
        state = checkpoints.load(path, self._moment)
        self._put(held)
        self.optimizer.load_state_dict(state.optimizer)
        self.scheduler.load_state_dict(state.scheduler)
        world = self.accelerator.num_processes
        if differs := generators.go_on(state.rng, state.step, rank, world, seed):
            watcher.say(differs)
        self.at = Progress(**{**state.meta, "best": bests.Best(**state.meta["best"])})
        if self._wants_best():
            self.at.best.checkpoint(self.run, self._peers)  # that it is gone is told at once
        self.average.restore(state.average)

    def _put(self, weights: pieces.Pieces) -> None:
        with torch.no_grad():
            for name, parameter in trainable(self.model):
                parameter.copy_(sharding.part(weights, name, parameter, self._peers))

    def _moment(self, moments: pieces.Pieces, key: str) -> torch.Tensor:
        """What this process has of a tensor of the optimizer's state, cut as its parameter is."""
        number = int(key.partition(".")[0])
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return sharding.part(moments, key, parameters[number], self._peers)

    def _wants_best(self) -> bool:
        """Whether the weights that are to come out are not the present ones."""
        return self.settings.keeps_best and self.at.best.step not in (0, self.at.step)

    def take_best(self) -> None:
        """Go back to the weights with the lowest held-out loss, where the recipe says so."""
        if not self._wants_best():
            return
        with beats.PULSE.working(False):
            best = self.at.best.checkpoint(self.run, self._peers)
            self._put(pieces.Pieces(best, checkpoints.WEIGHTS))
        self.at.heldout_loss = self.at.best.loss

    def save(self, row_losses: rowlosses.File | None = None) -> None:
        """Publish a checkpoint of the present step, from rank 0; of a cut model, from all.

        The log, and the losses of rows where they are kept, have every step of it by then.
        """
        rng = gathered([generators.state()])
        main = self.accelerator.is_main_process
        if cut := sharding.is_cut(self.model):
            sharding.let_go(self.model)
        if main or cut:
            named = {n: p.detach() for n, p in trainable(self.model)}
            state = checkpoints.State(
                step=self.at.step,
                weights=sharding.owned(named, first=main),
                optimizer=sharding.owned(self.optimizer.state_dict(), first=main),
                scheduler=self.scheduler.state_dict(),
                rng=rng,
                meta=asdict(self.at),
                average=self.average.mean,
            )
            if main:
                storage.DISK.sync(self.run.dir / "log.jsonl")
                if row_losses is not None:
                    row_losses.sync()
            with beats.PULSE.working(False):
                checkpoints.save(
                    self.run.checkpoints,
                    state,
                    run_id=self._run_id,
                    keep=self.settings.save_total_limit,
                    best=self.at.best.step if self.settings.keeps_best else 0,
                    peers=self._peers if cut else pieces.ALONE,
                )
        with beats.PULSE.meeting():
            self.accelerator.wait_for_everyone()


def trainable(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The trained parameters by their names."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def peers(accelerator: Accelerator) -> pieces.Peers:
    """The processes of a run, for what they write or read together."""
    return pieces.Peers(accelerator.process_index, accelerator.num_processes, gathered)


def gathered(own: list[Any]) -> list[Any]:
    """The items of every process's list, in the order of processes."""
    with beats.PULSE.meeting():
        found: list[Any] = gather_object(own)
    return found
