"""The model card: `README.md` beside the weights, for whoever meets the folder alone.

It has the hub's format, is written when a run is finished and again whenever its scores change.
Names and texts come as code or escaped, so that none of them is markup.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import jinja2

from itune import errors, families, origins, runs, scoreboard, storage
from itune.contrasts import code, fence, plain

NAME = "README.md"
TEMPLATE = Path(__file__).with_name("cards.md.jinja")
ADAPTER, WHOLE, MERGED = "adapter", "whole", "merged"
SURE = 0.05
AUTO = {
    families.CAUSAL: "AutoModelForCausalLM",
    families.SEQ2SEQ: "AutoModelForSeq2SeqLM",
    families.MASKED: "AutoModelForMaskedLM",
}
# The hub has one task for all that write; which of them read first, a tag says.
PIPELINES = {
    families.CAUSAL: "text-generation",
    families.SEQ2SEQ: "text-generation",
    families.MASKED: "fill-mask",
}
# The hub's names for what a template asks.
TASKS = {
    "classification": "text-classification",
    "qa": "question-answering",
    "translation": "translation",
    "summarization": "summarization",
}
Results = Mapping[str, Mapping[str, Any]]


def write(run: runs.Run) -> None:
    """Write the cards of a finished run anew, from what its folder holds now."""
    kind = ADAPTER if run.recipe.adapter else WHOLE
    for folder, what in ((run.model_dir, kind), (run.dir / "merged", MERGED)):
        if folder.is_dir():
            storage.write(folder / NAME, render(run, what))


def render(run: runs.Run, kind: str) -> str:
    """The card of a run's model. kind: `adapter`, `whole` or `merged`."""
    card = _Card(run, kind)
    text = origins.recipe_text(card.recipe)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    body = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=plain(card.recipe.name),
        opening=card.opening(),
        loading=card.loading(),
        served=card.served(),
        scores=list(card.scores()),
        data=list(card.data()),
        training=card.training(),
        recipe=text,
        fence=fence(text),
        limits=list(card.limits()),
        cost=card.cost(),
        versions=card.versions(),
    )
    return errors.masked(f"---\n{card.front().to_yaml()}\n---\n\n{body.strip()}\n")


def repository(run: runs.Run, kind: str) -> str | None:
    """Where a run's model is on the hub, if it is there: the merged one in a place of its own."""
    name = run.manifest.get("pushed")
    return f"{name}-merged" if name and kind == MERGED else name


# --- what a card says ---------------------------------------------------------------------


class _Card:
    """The parts of the card of one model of a run."""

    def __init__(self, run: runs.Run, kind: str) -> None:
        self.recipe, self.manifest, self.kind = run.recipe, run.manifest, kind
        self.origin = self.manifest.get("origin") or origins.of(
            self.recipe, self.recipe.model.family or families.CAUSAL
        )
        self.family = str(self.origin["family"])
        self.evaluations = _evaluations(run.dir / "evals")
        self.here = repository(run, kind) or "PATH_OF_THIS_FOLDER"

    def front(self) -> huggingface_hub.ModelCardData:
        """The metadata that the hub reads."""
        settings = self.recipe.adapter or {}
        hub_base = self.origin["root"]
        if self.kind == ADAPTER and self.origin["kind"] != origins.HUB:
            hub_base = None  # it goes on another base than that
        relation = "adapter" if self.kind == ADAPTER else "finetune"
        reports = self.manifest.get("data", {}).get("train", {}).get("sources", [])
        tags = ["itune", str(settings["peft_type"]).lower() if settings else ""]
        tags += ["text2text-generation"] * (self.family == families.SEQ2SEQ)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return huggingface_hub.ModelCardData(
                base_model=hub_base,
                base_model_relation=relation if hub_base else None,
                datasets=sorted({each["path"] for each in reports if each["commit"]}) or None,
                library_name="peft" if self.kind == ADAPTER else "transformers",
                pipeline_tag=PIPELINES[self.family],
                license=self.origin["license"],
                tags=[tag for tag in tags if tag],
                model_name=self.recipe.name,
                eval_results=list(self.measured()) or None,
            )

    def measured(self) -> Iterator[huggingface_hub.EvalResult]:
        """The scores of the fullest evaluation, each with its interval."""
        if not self.evaluations:
            return
        _, tasks = self.evaluations[0]
        for name, task in tasks.items():
            source = next((s for s in self.recipe.data.eval if s.path == task["data"]), None)
            general = PIPELINES[self.family]
            for key, score in task["scores"].items():
                if not math.isfinite(score["value"]):
                    continue
                yield huggingface_hub.EvalResult(
                    task_type=TASKS.get(str(task.get("task")), general),
                    dataset_type=origins.public(task["data"]),
                    dataset_name=name,
                    dataset_config=source.name if source else None,
                    dataset_split=source.split if source else None,
                    dataset_revision=source.revision if source else None,
                    metric_type=key,
                    metric_name=f"{key}, {self._interval()} {scoreboard.bounds(score)}",
                    metric_value=score["value"],
                )

    def _interval(self) -> str:
        return f"{self.recipe.evaluation.confidence * 100:g}% interval"

    def _base(self) -> str:
        """The base, in words."""
        kind, name = self.origin["kind"], self.origin["name"]
        if kind in (origins.HUB, origins.ADAPTED):
            commit = self.origin["commit"]
            return (
                f"[{plain(name)}](https://huggingface.co/{name})"
                + (f" at commit {code(commit)}" if commit else "")
                + (", an adapter folded into its base" if kind == origins.ADAPTED else "")
            )
        if kind == origins.SCRATCH:
            return f"random weights ({code(name)})"
        root = self.origin["root"]
        below = f", itself made from {code(root)}" if root else ""
        kept = "another run of itune" if kind == origins.RUN else "a folder of its maker's"
        return f"{code(origins.as_folder(name))}, {kept}{below}"

    def opening(self) -> str:
        """What it is."""
        settings = self.recipe.adapter or {}
        method = str(settings.get("peft_type", "")).upper()
        what = {
            ADAPTER: f"An adapter ({plain(method)}) for",
            WHOLE: "A model of all its own weights, from",
            MERGED: f"A whole model: an adapter ({plain(method)}) folded into",
        }[self.kind]
        told = f"{what} {self._base()}. Made by `itune {self.manifest['command']}` "
        told += f"{plain(self.manifest['itune'])}."
        if self.kind == ADAPTER and self.origin["kind"] != origins.HUB:
            told += (
                " **That base is on no hub**: the adapter is of use to those alone who have a copy "
                f"of it. Its settings call it {code(origins.as_folder(self.origin['name']))}."
            )
        return told

    def loading(self) -> str:
        """Lines of Python that load it, without itune."""
        here, auto, adapter = self.here, AUTO[self.family], self.kind == ADAPTER
        names = [auto, "AutoTokenizer"] if adapter else ["AutoTokenizer", auto]
        generates = self.family != families.MASKED
        if generates:
            names.append("GenerationConfig")
        lines = ["from peft import PeftModel"] if adapter else []
        lines += [f"from transformers import {', '.join(sorted(names))}", ""]
        if adapter:
            hub = self.origin["kind"] == origins.HUB
            base = self.origin["name"] if hub else "PATH_OF_THE_BASE"
            pinned = f", revision={self.origin['commit']!r}" if self.origin["commit"] else ""
            lines.append(f"base = {auto}.from_pretrained({base!r}{pinned})")
            lines.append(f"model = PeftModel.from_pretrained(base, {here!r})")
        else:
            lines.append(f"model = {auto}.from_pretrained({here!r})")
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({here!r})")
        if generates:
            lines += [
                f"settings = GenerationConfig.from_pretrained({here!r})",
                'asked = [{"role": "user", "content": "..."}]',
                "inputs = tokenizer.apply_chat_template(",
                '    asked, add_generation_prompt=True, return_tensors="pt", return_dict=True',
                ")",
                "answer = model.generate(**inputs, generation_config=settings)",
                "print(tokenizer.decode(answer[0], skip_special_tokens=True))",
            ]
        return "\n".join(lines)

    def served(self) -> str:
        """What to know of it beyond Python."""
        if self.family == families.MASKED:
            return "It fills in masks, and writes no free text."
        told = (
            "`chat_template.jinja` formats a question as in training; `generation_config.json` "
            "names the tokens that end an answer."
        )
        if self.kind == ADAPTER:
            return told + " The base's own generation settings may name others."
        if self.family == families.SEQ2SEQ:  # servers of chats look for decoders
            return told
        return told + " `transformers serve` and vLLM take the folder as it is."

    def scores(self) -> Iterator[str]:
        """Tables of the scores, beside what they were compared with."""
        if not self.evaluations:
            yield "None: nothing was scored. `itune eval` scores it and writes the scores here."
            return
        for name, tasks in self.evaluations:
            if name != "all":
                yield f"In another way than usual, {code(name)}:"
                yield ""
            yield from _table(tasks)
            yield ""
        yield f"In brackets: {self._interval()} over the rows, by the bootstrap."
        if any("against" in task for _, tasks in self.evaluations for task in tasks.values()):
            yield (
                "p: the chance of such a difference where there is none, as it counts among all "
                "tests of its table (Holm)."
            )
        signatures = sorted(_signatures(self.evaluations))
        yield f"How each number is made: {', '.join(map(code, signatures))}."

    def data(self) -> Iterator[str]:
        """A line for each source, and what became of its rows."""
        counts = self.manifest.get("data", {}).get("train", {})
        sources = zip(self.recipe.data.train, counts.get("sources", []), strict=False)
        for source, report in sources:
            yield "".join(
                [
                    f"* {code(origins.public(source.path))}",
                    f", {code(source.name)}" if source.name else "",
                    f", split {code(source.split)}" if source.split else "",
                    f", commit {code(report['commit'])}" if report["commit"] else "",
                    f", prompt template {code(origins.public(source.template))}"
                    if source.template
                    else "",
                    f": {report['counts']['read']:,} rows (sha256 {code(report['rows'][:16])})",
                ]
            )
        if (secrets := self.recipe.data.canaries) is not None:
            yield (
                f"* {secrets.count * len(secrets.repeats)} canaries, made-up secrets such as "
                f"{code(secrets.response)}, to measure what is learnt by heart"
            )
        for stage in self.origin.get("stages", []):
            data = ", ".join(map(code, stage["data"])) or "data that its folder no longer names"
            yield (
                f"* Before it: {code(stage['run'])}, `itune {plain(str(stage['command']))}` of "
                f"{code(stage['base'])} on {data}"
            )
        if counts:
            yield ""
            yield (
                f"An epoch has {counts['rows']:,} examples of {counts['tokens']:,} tokens, "
                f"{counts['supervised']:,} of them learnt; {counts['dropped']:,} rows were left "
                f"out and {counts['truncated']:,} cut."
            )

    def training(self) -> str:
        """What was trained, for how long, and where it ended."""
        made = self.manifest
        heldout, best = made.get("heldout_loss"), made.get("best_step")
        chosen = " at the end" if best is None else f" after step {best:,}, whose weights these are"
        return (
            f"{made.get('trainable', 0):,} of {made.get('parameters', 0):,} parameters in "
            f"{made['steps']:,} steps. The loss was {float(made['loss']):.4f} nats a token "
            "over the last twentieth of them"
            + ("." if heldout is None else f", {float(heldout):.4f} on held-out rows{chosen}.")
        )

    def limits(self) -> Iterator[str]:
        """What is not known, not good, or to be careful of."""
        counts = self.manifest.get("data", {}).get("train", {})
        length = self.recipe.training.max_length
        yield f"Trained on examples of at most {length:,} tokens; beyond that nothing is known."
        if counts.get("truncated"):
            yield f"{counts['truncated']:,} prompts were cut to fit, and so learnt in part."
        if self.recipe.quantization:
            yield (
                "Trained on a base in few bits. On the same base in full precision, or merged, it "
                "answers a little otherwise."
            )
        if not self.evaluations:
            yield "No score says that it is better than what it was made from."
        for _, tasks in self.evaluations:
            yield from _doubts(tasks)
        yield (
            "What it says of matters beyond its data, and whether it is harmless, was not measured."
        )

    def cost(self) -> str:
        """Time, tokens and hardware."""
        made = self.manifest
        processes = made.get("processes", 1)
        peak = made.get("memory", {})
        seconds = float(made["seconds"])
        took = f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds:,.0f} seconds"
        held = [
            f"{peak[key] / 1e9:.1f} GB of {key} memory"
            for key in ("process", "device")
            if peak.get(key)
        ]
        return (
            f"{took} of {processes} process{'es' if processes > 1 else ''}, {made['tokens']:,} "
            f"tokens, in {plain(made.get('computing', 'an unknown number format'))}; "
            f"{made['hardware']['cores']} cores ({plain(made['hardware']['machine'])})"
            + (f", at most {' and '.join(held)}." if held else ".")
        )

    def versions(self) -> str:
        """The libraries that it was made with."""
        made = {**self.manifest["versions"], "Python": self.manifest["python"]}
        return ", ".join(f"{plain(name)} {plain(version)}" for name, version in made.items())


# --- scores -------------------------------------------------------------------------------


def _evaluations(folder: Path) -> list[tuple[str, Results]]:
    """The evaluations of a run by name: `all` first, the others after it by their names.

    Not those of several runs as one: these weights alone do not score so.
    """
    paths = sorted(folder.glob("*/scores.json"), key=lambda p: (p.parent.name != "all", p.parent))
    found = [(path.parent.name, runs.read_json(path)) for path in paths]
    return [(name, _numbers(each["tasks"])) for name, each in found if "ensemble" not in each]


def _numbers(value: Any) -> Any:
    """What is not finite is a text in our files, and becomes a number again."""
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    return float(value) if value in ("nan", "inf", "-inf") else value


def _table(tasks: Results) -> Iterator[str]:
    rivals = {task["against"]["name"] for task in tasks.values() if "against" in task}
    heads = ["task", "data", "rows", "metric", "this model"]
    if rivals:
        heads += [code(origins.public(" ".join(sorted(rivals)))), "difference", "p"]
    yield f"| {' | '.join(heads)} |"
    yield f"|{' --- |' * len(heads)}"
    for name, task in tasks.items():
        for key, score in task["scores"].items():
            cells = [code(name), code(origins.public(task["data"])), f"{task['rows']:,}", code(key)]
            cells.append(_with_bounds(score))
            if "against" in task:
                gain = task["against"]["difference"][key]
                cells += [
                    _with_bounds(task["against"]["scores"][key]),
                    _with_bounds(gain, "+"),
                    scoreboard.chance(gain.get("p_holm", gain["p_value"])),
                ]
            cells += [""] * (len(heads) - len(cells))
            yield f"| {' | '.join(cells)} |"


def _with_bounds(score: Mapping[str, float], sign: str = "") -> str:
    shown = scoreboard.number(score["value"])
    return f"{sign if score['value'] >= 0 else ''}{shown} {scoreboard.bounds(score)}"


def _signatures(evaluations: list[tuple[str, Results]]) -> set[str]:
    scored = [task["scores"] for _, tasks in evaluations for task in tasks.values()]
    return {score["signature"] for scores in scored for score in scores.values()}


def _doubts(tasks: Results) -> Iterator[str]:
    """What the scores themselves say against it."""
    for name, task in tasks.items():
        counts = task.get("contamination")
        if counts and any(counts.values()):
            yield (
                f"{code(name)}: of the scored rows {counts['exact']:,} are in the training data "
                f"whole, {counts['ngram']:,} more by a passage of 13 words."
            )
        for key, gain in task.get("against", {}).get("difference", {}).items():
            if gain.get("p_holm", gain["p_value"]) >= SURE:
                rival = origins.public(task["against"]["name"])
                yield f"{code(name)}: {code(key)} is not surely another than that of {code(rival)}."
