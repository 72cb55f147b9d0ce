"""What a run will cost, before any weight is read: memory, time, disk, money, and whether it fits.

Needs torch. Counts come from the model's outline, bytes from a step on tensors without memory,
seconds from a few micro-batches tried here, or where that cannot be from operations and a peak.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from itune import (
    attention,
    cache,
    data,
    doctor,
    encoding,
    errors,
    families,
    gradients,
    losses,
    memory,
    models,
    objectives,
    optimizers,
    outlines,
    plans,
    probing,
    recipes,
    rehearsing,
    runs,
    simulating,
    starting,
    storage,
    trying,
)

WHOLE = 12  # chosen: layers up to which a step is gone through whole; beyond, what one more adds
FEW, MORE = 4, 8
SHARE = 0.9  # of a device's free memory may be planned for, as when micro-batches are tried
LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container (cgroups v2)


@dataclass(frozen=True)
class Forecast:
    """What a run will cost. memory: bytes of one device by part, and `peak`, their sum; available:
    bytes that there are; seconds: of its steps; beside: of measuring the held-out loss; cost in the
    user's currency; energy in watt-hours. how: what seconds follow from, in words.
    """

    command: str
    computing: str
    processes: int
    parameters: int
    trainable: int
    tokens: int
    steps: int
    flops: int
    memory: Mapping[str, int]
    available: int
    micro_batch_tokens: int
    disk: int
    seconds: float
    beside: float
    how: str
    path: str
    cost: float | None
    energy: float | None

    @property
    def fits(self) -> bool:
        """Whether the memory of each device holds its part."""
        return self.memory["peak"] <= self.available

    def plain(self) -> dict[str, Any]:
        """As `--plan --json` prints it."""
        named = asdict(self)
        return {
            **{key: named[key] for key in ("parameters", "trainable", "tokens", "steps", "flops")},
            "memory_bytes": dict(self.memory),
            "available_bytes": self.available,
            "disk_bytes": self.disk,
            "seconds": round(self.seconds, 1),
            "heldout_seconds": round(self.beside, 1),
            "cost": self.cost,
            "energy_wh": self.energy,
            "processes": self.processes,
            "micro_batch_tokens": self.micro_batch_tokens,
            "computing": self.computing,
            "how": self.how,
            "fits": self.fits,
        }


def forecast(
    recipe: recipes.Recipe, command: str, processes: int, say: Callable[[str], None]
) -> Forecast:
    """What a run of a recipe will cost. Raises UserError as the run would, before its first step,
    and EnvironmentRefusal where the memory does not hold it, with what would make it fit.
    """
    made = _Made(recipe, command, processes, say)
    found = made.forecast()
    storage_path = _kept_at(recipe, processes)
    storage_path.parent.mkdir(parents=True, exist_ok=True)
    storage.write(storage_path, runs.to_json(found.plain()))
    return found


def kept(recipe: recipes.Recipe, processes: int) -> dict[str, Any] | None:
    """The last forecast of a recipe as plain data, or None."""
    path = _kept_at(recipe, processes)
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _kept_at(recipe: recipes.Recipe, processes: int) -> Path:
    return cache.root() / "plans" / f"{recipes.digest(recipe)[:32]}-{processes}.json"


class _Made:
    """The parts from which a forecast follows; those of a changed recipe follow from it too."""

    def __init__(
        self, recipe: recipes.Recipe, command: str, processes: int, say: Callable[[str], None]
    ) -> None:
        self.recipe, self.command, self.processes = recipe, command, processes
        self.place = models.placement(recipe.model)
        self.tokenizer = starting.tokenizer(recipe, None, command)
        self.encoder, self.corpus, self.heldout = starting.read(recipe, self.tokenizer, command)
        for line in (
            *starting.counted(self.corpus, recipe.training.seed),
            *starting.mixed(recipe, self.corpus),
        ):
            say(line)
        doctor.check(recipe, self.encoder, say)
        self.config = outlines.config(recipe, self.tokenizer)
        self.outline = self._outline(recipe, None)
        models.check_fits(self.outline, self.corpus, recipe.training.max_length)
        starting.refuse_untrained(self.outline)
        self.say, self.program = say, memory.held()

    def _outline(self, recipe: recipes.Recipe, layers: int | None) -> Any:
        settings = self.config if layers is None else outlines.cut(self.config, layers)
        return outlines.model(recipe, settings, self.place, torch.device("meta"))

    def planned(self, path: probing.Path, recipe: recipes.Recipe | None = None) -> plans.Plan:
        """The plan of steps of a path."""
        training = (recipe or self.recipe).training
        changing = objectives.of(self.encoder, training) is not None and any(self.corpus.plain)
        return plans.of_run(
            training,
            self.corpus,
            world=self.processes,
            padded=path.padded,
            changing=changing,
        )

    def forecast(self) -> Forecast:
        """All of it. Raises EnvironmentRefusal for what does not fit."""
        trials = self._trials()
        path = trials[-1].path if trials else self._likely()
        plan = self.planned(path)
        fixed, per, flops = self._memory(self.recipe, path, plan)
        allocator = self._allocator(trials, path)
        available = self._available()
        plan, held = self._filled(plan, fixed, per, available)
        parts = self._parts(fixed, held, allocator)
        total, trainable = models.count(self.outline)
        typical = trying.typical(plan)
        spread = sum(map(plan.cost, typical)) / sum(plan.lengths[r].sum() for r in typical)
        operations = int(flops * plan.tokens * spread)
        seconds, share, how = self._seconds(trials, plan, operations, spread)
        found = Forecast(
            command=self.command,
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
            cost=None if price is None else round(price * hours, 4),
            energy=None if watts is None else round(watts * hours, 1),
        )
        if not found.fits:
            raise errors.EnvironmentRefusal(self._refusal(found, path, allocator))
        return found

    # --- memory ---

    def _memory(
        self, recipe: recipes.Recipe, path: probing.Path, plan: plans.Plan
    ) -> tuple[dict[str, int], dict[str, float], float]:
        """Bytes whatever the micro-batch, bytes of each part a token of it, operations a token."""
        outline = self.outline if recipe is self.recipe else self._outline(recipe, None)
        parts, flops = self._stepped(recipe, path, plan)
        trained = sum(p.nbytes for p in outline.parameters() if p.requires_grad)
        fixed = {
            "weights": outlines.weights_bytes(outline, recipe.quantization),
            "optimizer": optimizers.state_bytes(outline, recipe.training),
        }
        if self.processes > 1:
            fixed["communication"] = trained + min(trained, 4 * gradients.CHUNK)
        if recipe.quantization is not None:
            fixed["unpacked"] = outlines.unpacked_bytes(outline)
        fixed["gradients"] = parts.pop(simulating.GRADIENTS, 0)
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
        rows = [typical, heaviest] if several else [heaviest]
        collate = path.collate(self.tokenizer.pad_token_id)
        held = simulating.held(
            model,
            [collate(self.corpus, each) for each in rows],
            recipe.training,
            head=path.head,
            autocast=trying.autocast(recipe, replace(self.place, device=torch.device("cpu"))),
        )
        model.set_attn_implementation(own)
        return dict(held.bytes), sum(held.flops) / sum(map(plan.cost, rows))

    def _filled(
        self,
        plan: plans.Plan,
        fixed: Mapping[str, int],
        per: Mapping[str, float],
        available: int,
    ) -> tuple[plans.Plan, dict[str, int]]:
        """The plan with the micro-batches that a GPU's memory holds, and the bytes of their parts.

        On a CPU, and where the recipe says how large they are, those of the plan.
        """
        tokens, each = plan.cost(trying.heaviest(plan)), sum(per.values())
        if self.place.device.type == "cuda" and self.recipe.training.micro_batch_tokens is None:
            most = -(-self.recipe.training.tokens_per_step // self.processes)
            longest = int(self.corpus.lengths.max())
            room = int((SHARE * available - sum(fixed.values())) / max(each, 1e-9))
            tokens = max(longest, min(most, room))
            plan = replace(plan, micro_batch_tokens=tokens)
        return plan, {key: int(value * tokens) for key, value in per.items()}

    def _parts(
        self, fixed: Mapping[str, int], held: Mapping[str, int], allocator: float
    ) -> dict[str, int]:
        parts = {**fixed, **held}
        parts["allocator"] = int(allocator * sum(held.values()))
        if self.place.device.type == "cpu":
            parts = {"program": self.program, **parts}
        return {**parts, "peak": sum(parts.values())}

    def _allocator(self, trials: list[trying.Trial], path: probing.Path) -> float:
        """What a trial held beyond what its tensors add up to, as a share of its activations."""
        if not trials or not trials[-1].held:
            return 0.0
        tried = trials[-1]
        outline, plan = self._outline(self.recipe, tried.layers), self.planned(path)
        parts, _ = self._simulated(self.recipe, path, plan, tried.layers)
        known = outlines.weights_bytes(outline, None) + sum(parts.values())
        known += optimizers.state_bytes(outline, self.recipe.training)
        free = sum(value for key, value in parts.items() if key != simulating.GRADIENTS)
        return max(0.0, (tried.held - known) / max(free, 1))

    def _available(self) -> int:
        if self.recipe.plan.memory is not None:
            return int(self.recipe.plan.memory * 1e9)
        left = memory.left(self.place.device)
        if left is not None:
            return left
        found = psutil.virtual_memory().available + self.program
        with contextlib.suppress(OSError, ValueError):  # no container, or none with a limit
            found = min(found, int(LIMIT.read_text()))
        return found // self.processes

    # --- time ---

    def _trials(self) -> list[trying.Trial]:
        """The model tried whole, or with one layer and with two; nothing where that is too much."""
        if self.recipe.plan.tflops is not None:
            return []
        speed, depth = trying.operations_a_second(self.place), outlines.layers(self.config)
        wanted: tuple[int | None, ...]
        for wanted in ((None,), (1, 2)):
            if wanted[0] is not None and (depth is None or depth <= 2):
                return []
            largest = self._outline(self.recipe, wanted[-1])
            if not self._can_try(largest, speed):
                continue
            return [
                trying.trial(
                    self.recipe,
                    self.config,
                    self.encoder,
                    self.corpus,
                    self.place,
                    self.planned,
                    layers=layers,
                )
                for layers in wanted
            ]
        return []

    def _can_try(self, outline: Any, speed: float) -> bool:
        """Whether a model's trial has room, and an end that one waits for."""
        kept = outlines.weights_bytes(outline, None)
        kept += 2 * optimizers.state_bytes(outline, self.recipe.training)
        training = self.recipe.training
        tokens = training.micro_batch_tokens or min(training.tokens_per_step, 8192)
        total = models.count(outline)[0]
        return kept < self._available() / 2 and trying.small_enough(tokens, total, speed)

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
            peak = 1e12 * asked if asked else trying.operations_a_second(self.place)
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
        trained = sum(p.nbytes for p in self.outline.parameters() if p.requires_grad)
        checkpoint = trained + optimizers.state_bytes(self.outline, training)
        more = rehearsing.checkpoints_more(training, steps, steps)
        return more * checkpoint + rehearsing.result_bytes(self.recipe, self.outline)

    # --- what does not fit ---

    def _refusal(self, found: Forecast, path: probing.Path, allocator: float) -> str:
        lines = [
            f"model: {gigabytes(found.memory['peak'])} are needed on each device and "
            f"{gigabytes(found.available)} are there ({_shares(found.memory)}). What would make "
            "it fit, the cheapest first:"
        ]
        options = list(self._options(path, allocator, found.available))
        fitting = [each for each in options if each[1] <= found.available]
        for text, peak in fitting[:3]:
            lines.append(f"  {text}: {gigabytes(peak)}")
        if not fitting:
            least = min(options, key=lambda each: each[1], default=None)
            lines[-1] = lines[-1].removesuffix(" What would make it fit, the cheapest first:")
            if least is not None:
                lines.append(f"  The least that was found is {least[0]}: {gigabytes(least[1])}.")
            lines.append("  Take a smaller model, or a device with more memory.")
        return "\n".join(lines)

    def _options(
        self, path: probing.Path, allocator: float, available: int
    ) -> Iterator[tuple[str, int]]:
        """Changes, the cheapest first and each with those before it that help, and their peaks."""
        recipe, said = self.recipe, ""
        for text, changed in _changes(recipe, self.corpus, self.encoder):
            recipe = changed(recipe)
            said = f"{said}, {text}" if said else text
            alone = changed(self.recipe)
            for told, one in (
                dict.fromkeys(((text, alone), (said, recipe)))
                if alone != recipe
                else ((said, recipe),)
            ):
                plan = self.planned(path, one)
                fixed, per, _ = self._memory(one, path, plan)
                _, held = self._filled(plan, fixed, per, available)
                yield told, self._parts(fixed, held, allocator)["peak"]


Change = Callable[[recipes.Recipe], recipes.Recipe]


def _changes(
    recipe: recipes.Recipe, corpus: data.Corpus, encoder: encoding.Encoder
) -> Iterator[tuple[str, Change]]:
    """What costs less memory, from what costs nothing else to what changes the result."""
    longest = int(corpus.lengths.max())
    if (recipe.training.micro_batch_tokens or 8192) > longest:
        yield f"training.micro_batch_tokens={longest}", _training(micro_batch_tokens=longest)
    if not recipe.training.gradient_checkpointing:
        yield "training.gradient_checkpointing=true", _training(gradient_checkpointing=True)
    if recipe.adapter is None:
        if recipe.training.optim.startswith("adamw"):
            yield "training.optim=adafactor", _training(optim="adafactor")
        lora = {"peft_type": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
        yield "adapter={peft_type: lora}", lambda given: given.model_copy(update={"adapter": lora})
    few = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    if recipe.quantization is None and recipe.model.name and encoder.family != families.MASKED:
        yield (
            "quantization={quant_method: bitsandbytes, load_in_4bit: true}",
            lambda given: given.model_copy(update={"quantization": few}),
        )


def _training(**fields: Any) -> Change:
    return lambda given: given.model_copy(
        update={"training": given.training.model_copy(update=fields)}
    )


# --- in words -----------------------------------------------------------------------------


def gigabytes(size: float) -> str:
    """Bytes in words."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def _shares(parts: Mapping[str, int]) -> str:
    """Parts of the memory, the largest first, without what is next to nothing."""
    each = sorted(((v, k) for k, v in parts.items() if k != "peak"), reverse=True)
    return ", ".join(f"{k} {gigabytes(v)}" for v, k in each if v > 0.005 * parts["peak"])


def clock(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    days, hours = divmod(minutes // 60, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes % 60:02d} min" if hours else f"{minutes} min"


def rows(found: Forecast) -> list[list[str]]:
    """A forecast as the lines of a table."""
    each = found.tokens / max(found.seconds, 1e-9)
    lines = [
        ["model", f"{found.parameters:,} parameters, {found.trainable:,} of them trained"],
        ["steps", f"{found.steps:,}, of {found.tokens:,} tokens in all"],
        ["computing", f"{found.flops:.2e} operations, {found.computing}"],
        ["memory", f"{gigabytes(found.memory['peak'])} of {gigabytes(found.available)}"],
        ["", _shares(found.memory)],
        ["disk", gigabytes(found.disk)],
        ["time", f"{clock(found.seconds)}, {each:,.0f} tokens a second ({found.how})"],
    ]
    if found.beside >= 1:
        lines.append(["", f"and {clock(found.beside)} for the held-out loss"])
    if found.cost is not None:
        lines.append(["cost", f"{found.cost:,.2f}"])
    if found.energy is not None:
        lines.append(["energy", f"{found.energy / 1000:,.3f} kWh"])
    return lines
