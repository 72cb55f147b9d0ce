"""What a run will cost, before any weight is read: memory, time, disk, money, and whether it fits.

Needs torch. Counts come from the model's outline, bytes from a step on tensors without memory,
seconds from a few micro-batches tried here, or where that cannot be from operations and a peak.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import psutil
import torch

from itune import (
    attention,
    batches,
    cheaper,
    configs,
    doctor,
    errors,
    families,
    forecasting,
    gradients,
    losses,
    memory,
    models,
    objectives,
    optimizers,
    outlines,
    plans,
    portions,
    probing,
    recipes,
    rehearsing,
    simulating,
    sizing,
    starting,
    suiting,
    trying,
)

WHOLE = 6  # chosen: layers up to which a step is gone through whole; beyond, what one more adds
FEW, MORE = 2, 4
KEPT = ("weights", "unpacked", "optimizer", "trained")
CUT = ("gathered", "communication", "whole")  # beside them, of a model that is cut over processes


def forecast(
    recipe: recipes.Recipe, command: str, processes: int, say: Callable[[str], None]
) -> forecasting.Forecast:
    """What a run of a recipe will cost. Raises UserError as the run would, before its first step,
    and EnvironmentRefusal where the memory does not hold it, with what would make it fit.
    """
    found = _Made(recipe, command, processes, say).forecast()
    forecasting.keep(found, recipe)
    return found


class _Made:
    """The parts from which a forecast follows; those of a changed recipe follow from it too."""

    def __init__(
        self, recipe: recipes.Recipe, command: str, processes: int, say: Callable[[str], None]
    ) -> None:
        self.recipe, self.processes = recipe, processes
        suiting.refuse(recipe)
        optimizers.refuse_schedule(recipe.training)
        self.place = models.placement(recipe.model)
        self.tokenizer = configs.asked_tokenizer(recipe, None, command)
        self.encoder, self.corpus, self.heldout = starting.read(recipe, self.tokenizer, command)
        for line in (
            *starting.counted(self.corpus, recipe.training.seed),
            *starting.mixed(recipe, self.corpus),
            *starting.few_steps(recipe.training, self.corpus),
        ):
            say(line)
        doctor.check(recipe, self.encoder, say)
        self.config = outlines.config(recipe, self.tokenizer)
        self.outline = self._outline(recipe, None)
        models.check_fits(self.outline, self.corpus, recipe.training.max_length)
        starting.refuse_untrained(self.outline)
        self.tried, self.program = recipe, memory.held()

    @functools.cached_property
    def speed(self) -> float:
        """Operations a second of this device at its best."""
        return trying.operations_a_second(self.place)

    def _world(self, recipe: recipes.Recipe) -> int:
        """The processes of a recipe, which may have been changed to another number of them."""
        asked = recipe.launch.num_processes
        return self.processes if asked == self.recipe.launch.num_processes else asked or 1

    def _cut_over(self, recipe: recipes.Recipe) -> int:
        """Over how many processes the model is cut; 1 where it is not."""
        return self._world(recipe) if recipe.launch.fsdp else 1

    def _outline(self, recipe: recipes.Recipe, layers: int | None) -> Any:
        settings = self.config if layers is None else outlines.cut(self.config, layers)
        return outlines.model(recipe, settings, self.place, torch.device("meta"))

    def planned(self, path: probing.Path, recipe: recipes.Recipe | None = None) -> plans.Plan:
        """The plan of steps of a path."""
        training = (recipe or self.recipe).training
        objective = objectives.of(self.encoder, training)
        return plans.of_run(
            training,
            self.corpus,
            world=self._world(recipe or self.recipe),
            padded=path.padded,
            alone=path.layout == probing.ALONE,
            changing=objectives.changing(self.corpus, objective),
        )

    def forecast(self) -> forecasting.Forecast:
        """All of it. Raises EnvironmentRefusal for what does not fit."""
        trials = self._trials()
        path = trials[-1].path if trials else self._likely()
        plan = self.planned(path)
        fixed, per, flops = self._memory(self.recipe, path, plan)
        allocator = self._allocator(trials, path)
        available = self._available()
        plan, held = self._filled(self.recipe, plan, fixed, per, available)
        parts = self._parts(fixed, held, allocator)
        total, trainable = models.count(self.outline)
        typical = trying.typical(plan)
        spread = sum(map(plan.cost, typical)) / sum(plan.lengths[r].sum() for r in typical)
        operations = int(flops * plan.tokens * spread)
        seconds, share, how = self._seconds(trials, plan, operations, spread)
        found = forecasting.Forecast(
            computing=self.place.why,
            processes=self.processes,
            parameters=total,
            trainable=trainable,
            tokens=plan.tokens,
            steps=len(plan),
            flops=operations,
            memory=parts,
            available=available,
            micro_batch_tokens=plan.micro_batch_tokens,
            disk=self._disk(plan),
            seconds=seconds,
            beside=self._heldout_tokens(plan) * share / 3,
            how=how,
            path=path.why,
            cost=None,
            energy=None,
        )
        hours = (found.seconds + found.beside) / 3600
        price, watts = self.recipe.plan.price_per_hour, self.recipe.plan.watts
        found = replace(
            found,
            cost=None if price is None else price * hours,
            energy=None if watts is None else watts * hours,
        )
        if not found.fits:
            longest = int(self.corpus.lengths.max())
            known = cheaper.changes(self.recipe, longest, self.encoder.family, self.processes)
            raise errors.EnvironmentRefusal(
                cheaper.told(
                    found,
                    self.recipe,
                    known,
                    cheaper.further(self.recipe, self.processes),
                    lambda changed: self._peak(changed, path, allocator, available),
                )
            )
        return found

    # --- memory ---

    def _memory(
        self, recipe: recipes.Recipe, path: probing.Path, plan: plans.Plan
    ) -> tuple[dict[str, int], dict[str, float], float]:
        """Bytes whatever the micro-batch, bytes of each part a token of it, operations a token."""
        parts, flops = self._stepped(recipe, path, plan)
        over = self._cut_over(recipe)
        if recipe is self.recipe:  # counted whole, should its layers be unlike each other
            parts |= portions.kept(recipe, self.outline, self.place, over)
        fixed = {name: parts.pop(name) for name in (*KEPT, *(CUT if over > 1 else ()))}
        fixed["gradients"] = parts.pop(simulating.GRADIENTS, 0)
        if over > 1 and portions.offloads(recipe, self.place):
            fixed["gradients"] = 0
        trained = fixed.pop("trained")
        if self._world(recipe) > 1 and over == 1:
            fixed["communication"] = trained + min(trained, 4 * gradients.CHUNK)
        tokens = plan.cost(trying.heaviest(plan))
        return fixed, {key: value / tokens for key, value in parts.items()}, flops

    def _stepped(
        self, recipe: recipes.Recipe, path: probing.Path, plan: plans.Plan
    ) -> tuple[dict[str, int], float]:
        """The peak of a step by part, and operations a token, of the whole model."""
        depth = outlines.layers(self.config)
        if depth is None or depth <= WHOLE:
            return self._simulated(recipe, path, plan, None)
        (few, low), (more, high) = (
            self._simulated(recipe, path, plan, layers) for layers in (FEW, MORE)
        )
        further = (depth - FEW) / (MORE - FEW)
        parts = {
            key: max(0, int(few.get(key, 0) + further * (more.get(key, 0) - few.get(key, 0))))
            for key in {**few, **more}
        }
        return parts, low + further * (high - low)

    def _simulated(
        self, recipe: recipes.Recipe, path: probing.Path, plan: plans.Plan, layers: int | None
    ) -> tuple[dict[str, int], float]:
        whole = layers is None and recipe is self.recipe
        model = self.outline if whole else self._outline(recipe, layers)
        own = model.config._attn_implementation
        if path.layout == probing.ROWS:
            attention.register()
            model.set_attn_implementation(attention.NAME)
        heaviest, typical = trying.heaviest(plan), trying.typical(plan)[1]
        # Where a step has one micro-batch, no earlier one has left its gradient.
        several = len(plan.step(0).ranks[0]) > 1
        collate = path.collate(self.tokenizer.pad_token_id)
        cast = trying.autocast(replace(self.place, device=torch.device("cpu")))
        over = self._cut_over(recipe)
        computed = model if over == 1 else portions.computed(model, self.place)
        part = None if over == 1 else portions.parts(model, over)
        simulated = functools.partial(
            simulating.held,
            computed, settings=recipe.training, head=path.head, autocast=cast, own=part,
        )  # fmt: skip
        try:
            usual, most = (collate(self.corpus, each) for each in (typical, heaviest))
            held = simulated([usual, most] if several else [most])
            flops = held.flops[0] if several else simulated([usual]).flops[0]
        except RuntimeError as error:  # of torch's fake tensors, in a model's own code
            raise errors.ModelError(
                f"--plan: a step of {type(model).__name__} cannot be gone through without its "
                f"weights: {' '.join(str(error).split())[:160]}. Leave --plan out, and try a few "
                "steps: --set training.max_steps=3."
            ) from error
        model.set_attn_implementation(own)
        kept = portions.kept(recipe, model, self.place, over)
        return {**held.bytes, **kept}, flops / plan.cost(typical)

    def _filled(
        self,
        recipe: recipes.Recipe,
        plan: plans.Plan,
        fixed: Mapping[str, int],
        per: Mapping[str, float],
        available: int,
    ) -> tuple[plans.Plan, dict[str, int]]:
        """The plan with the micro-batches that a GPU's memory holds, and the bytes of their parts.

        On a CPU, of a model that is cut, and where the recipe says how large they are, those of the
        plan.
        """
        tokens, each = trying.most_tokens(plan), sum(per.values())
        tried = recipe.training.micro_batch_tokens is None and self._cut_over(recipe) == 1
        if self.place.device.type == "cuda" and tried:
            most = -(-recipe.training.tokens_per_step // self._world(recipe))
            longest = int(self.corpus.lengths.max())
            room = int((sizing.SHARE * available - sum(fixed.values())) / max(each, 1e-9))
            tokens = max(longest, min(most, room))
            plan = replace(plan, micro_batch_tokens=tokens)
        return plan, {key: int(value * tokens) for key, value in per.items()}

    def _parts(
        self, fixed: Mapping[str, int], held: Mapping[str, int], allocator: float
    ) -> dict[str, int]:
        parts = {**fixed, **held}
        whole = parts.pop("whole", 0)
        if whole > sum(parts.values()):
            parts["loading"] = whole - sum(parts.values())
        parts["allocator"] = int(allocator * sum(parts.values()))
        if self.place.device.type == "cpu":
            parts = {"program": self.program, **parts}
        return {**parts, "peak": sum(parts.values())}

    def _allocator(self, trials: list[trying.Trial], path: probing.Path) -> float:
        """What a trial held beyond what its tensors add up to, as a share of that."""
        if not trials or not trials[-1].held:
            return 0.0
        tried = trials[-1]
        parts, _ = self._simulated(self.tried, path, self.planned(path, self.tried), tried.layers)
        known = sum(value for key, value in parts.items() if key != "trained")
        return max(0.0, tried.held / max(known, 1) - 1)

    def _available(self) -> int:
        if self.recipe.plan.memory is not None:
            return int(self.recipe.plan.memory * 1e9)
        left = memory.left(self.place.device)
        if left is not None:
            return left
        found = psutil.virtual_memory().available + self.program
        with contextlib.suppress(OSError, ValueError):  # no container, or none with a limit
            found = min(found, int(memory.LIMIT.read_text()))
        return int(found // self.processes)

    # --- time ---

    def _trials(self) -> list[trying.Trial]:
        """The model tried whole, or with one layer and with two; nothing where that is too much."""
        if self.recipe.plan.tflops is not None:
            return []
        depth = outlines.layers(self.config)
        for wanted in ((None,), (1, 2)):
            if wanted[0] is not None and (depth is None or depth <= 2):
                return []
            tokens = self._can_try(self._outline(self.recipe, wanted[-1]))
            if tokens:
                training = self.recipe.training.model_copy(update={"micro_batch_tokens": tokens})
                # Random weights are not quantised, and what one process tries is whole.
                launch = self.recipe.launch.model_copy(update={"fsdp": False})
                self.tried = self.recipe.model_copy(
                    update={"training": training, "quantization": None, "launch": launch}
                )
                return [self._trial(layers) for layers in wanted]
        return []

    def _trial(self, layers: int | None) -> trying.Trial:
        settings = self.config if layers is None else outlines.cut(self.config, layers)
        return trying.trial(
            lambda: trying.Bench(
                self.tried,
                settings,
                self.encoder,
                self.corpus,
                self.place,
                lambda path: self.planned(path, self.tried),
            ),
            self.place,
            layers,
        )

    def _can_try(self, outline: Any) -> int:
        """Tokens of a micro-batch with which a model's trial has room, and an end that one waits
        for; 0 where there are none.
        """
        kept = outlines.weights_bytes(outline, None)
        kept += 2 * optimizers.state_bytes(outline, self.recipe.training)
        if kept > self._available() / 2:
            return 0
        training, longest = self.recipe.training, int(self.corpus.lengths.max())
        able = int(trying.tokens(models.count(outline)[0], self.speed))
        wanted = training.micro_batch_tokens or min(training.tokens_per_step, batches.MICRO_TOKENS)
        return 0 if able < longest else min(able, max(wanted, longest))

    def _likely(self) -> probing.Path:
        """The path of a model that is not tried, by what its kind allows."""
        layer = losses.output_layer(self.outline)
        capped = getattr(self.outline.config, "final_logit_softcapping", None) is not None
        head = losses.TARGETS if losses.is_plain(layer) and not capped else losses.KEPT
        if head == losses.KEPT and not losses.keeps_logits(self.outline):
            head = losses.FULL
        packs = self.recipe.training.packing and self.encoder.family == families.CAUSAL
        layout = probing.ROWS if packs else probing.PADDING
        why = f"batches: {probing.LAYOUTS[layout]}, {probing.HEADS[head]} (not tried)"
        padding = objectives.collate(self.encoder, self.outline, self.recipe.training)
        return probing.Path(layout, head, why, padding)

    def _seconds(
        self, trials: list[trying.Trial], plan: plans.Plan, operations: int, spread: float
    ) -> tuple[float, float, str]:
        """Seconds of the steps, of one token, and what they follow from."""
        devices = self.processes if self.place.device.type == "cuda" else 1
        if not trials:
            asked, share = self.recipe.plan.tflops, self.recipe.plan.efficiency
            peak = 1e12 * asked if asked else self.speed
            seconds = operations / (peak * share * self.processes)
            named = f"{peak / 1e12:,.2f} TFLOPS a device at {share:.0%}"
            return seconds, seconds / max(1, plan.tokens), named
        first, last = trials[0], trials[-1]
        per_token, per_step, depth = last.per_token, last.per_step, outlines.layers(self.config)
        how = "tried here, the whole model"
        if last.layers is not None and depth is not None:
            per_token += (depth - last.layers) * max(0.0, last.per_token - first.per_token)
            per_step *= models.count(self.outline)[1] / max(1, last.trained)
            how = f"tried here with {first.layers} and {last.layers} of {depth} layers"
        seconds = plan.tokens * spread * per_token / devices + len(plan) * per_step
        return seconds, per_token / devices, how

    def _heldout_tokens(self, plan: plans.Plan) -> int:
        if self.heldout is None:
            return 0
        every = plans.share_or_count(self.recipe.training.eval_steps, len(plan))
        return int(self.heldout.lengths.sum()) * math.ceil(len(plan) / every)

    def _disk(self, plan: plans.Plan) -> int:
        training, steps = self.recipe.training, len(plan)
        checkpoint = rehearsing.checkpoint_bytes(self.outline, training)
        more = rehearsing.checkpoints_more(training, steps, steps)
        return int(more * checkpoint + rehearsing.result_bytes(self.recipe, self.outline))

    # --- what does not fit ---

    def _peak(
        self, recipe: recipes.Recipe, path: probing.Path, allocator: float, available: int
    ) -> int:
        plan = self.planned(path, recipe)
        fixed, per, _ = self._memory(recipe, path, plan)
        _, held = self._filled(recipe, plan, fixed, per, available)
        return int(self._parts(fixed, held, allocator)["peak"])
