"""The command line: options, and how each kind of error ends the process; nothing else."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from itune import __version__, errors, launching, memory, records, signals, storage

app = typer.Typer(
    name="itune",
    help="Tune a language model on instructions, and prove that it got better.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

UNREAD = 141  # as a shell reports a program that SIGPIPE ended


def _offered(kind: str) -> Callable[[str], list[str]]:
    """What a shell offers for an option: a function of `completing`, imported when asked."""

    def names(incomplete: str) -> list[str]:
        offered: list[str] = getattr(importlib.import_module("itune.completing"), kind)(incomplete)
        return offered

    return names


def _schema(wanted: bool) -> None:
    if wanted:
        from itune import recipes

        typer.echo(json.dumps(recipes.schema(), indent=1, ensure_ascii=False))
        raise typer.Exit


def _refuse_words(context: typer.Context) -> None:
    """Raise OptionError for a word that belongs to no option: most likely a recipe or a run."""
    if not context.args:
        return
    word = errors.inert(errors.masked(context.args[0]))
    said = f"{word}: this word belongs to no option."
    if Path(word).suffix.lower() in records.ROWS and context.info_name != "eval":
        raise errors.OptionError(
            f"{said} Rows are named in a recipe, data: {{train: {{path: {word}}}}}, and the recipe "
            f"with --recipe: itune {context.info_name} --recipe FILE"
        )
    option = "--recipe"
    if context.info_name == "eval" and Path(word).suffix.lower() not in (".yaml", ".yml"):
        option = "--predictions" if Path(word).suffix == ".jsonl" else "--run"
    raise errors.OptionError(f"{said} Write itune {context.info_name} {option} {word}")


WORDS = {"allow_extra_args": True}  # they are refused with what was meant

RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        metavar="FILE|NAME",
        help="The recipe, by path or by name.",
        autocompletion=_offered("recipe_names"),
    ),
]
SchemaOption = Annotated[
    bool,
    typer.Option(
        "--schema",
        callback=_schema,
        is_eager=True,
        help="Print the JSON schema of a recipe, for editors, and stop.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Override one key of the recipe.",
        autocompletion=_offered("settings"),
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="One machine-readable result on standard output.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Results and errors only.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Say more, such as ids.")]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="PATH", help="Where the result goes.")
]
ProcessesOption = Annotated[
    int | None,
    typer.Option("--processes", "-p", metavar="N", min=1, help="Processes, one a device."),
]
PreviewOption = Annotated[
    int | None,
    typer.Option("--preview", metavar="N", min=1, help="Show N examples as tokens, and stop."),
]
PlanOption = Annotated[
    bool, typer.Option("--plan", help="Check everything, say what the run will cost, and stop.")
]
FreshOption = Annotated[
    bool, typer.Option("--fresh", help="Move an earlier run in the folder aside and start anew.")
]
AllowOption = Annotated[
    list[str] | None,
    typer.Option("--allow-change", metavar="KEY", help="Resume although this key differs."),
]
RunOption = Annotated[
    Path | None,
    typer.Option(
        "--run",
        metavar="DIR",
        help="The run; the newest under runs/ when left out.",
        autocompletion=_offered("run_folders"),
    ),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="A model instead of a run.")
]

EngineOption = Annotated[
    str | None,
    typer.Option(
        "--engine", metavar="vllm[:KEY=VALUE,..]", help="What answers in place of itune's own loop."
    ),
]


def _training(command: str) -> Callable[..., None]:
    """The command of a name that trains: both have the same options."""

    def train(
        context: typer.Context,
        recipe: RecipeOption = None,
        sets: SetOption = None,
        output: OutputOption = None,
        processes: ProcessesOption = None,
        preview: PreviewOption = None,
        plan: PlanOption = False,
        fresh: FreshOption = False,
        allow_change: AllowOption = None,
        as_json: JsonOption = False,
        quiet: QuietOption = False,
        verbose: VerboseOption = False,
        schema: SchemaOption = False,
    ) -> None:
        _refuse_words(context)
        from itune import commands

        commands.train(
            command,
            commands.Common(recipe, tuple(sets or ()), output, processes, as_json, quiet, verbose),
            sys.argv[1:],
            preview=preview or 0,
            plan=plan,
            fresh=fresh,
            allowed=allow_change or (),
        )

    return train


app.command(
    "pretrain",
    context_settings=WORDS,
    help="Train a language model on plain text: from scratch, or on from another.",
)(_training("pretrain"))
app.command(
    "tune",
    context_settings=WORDS,
    help="Tune a model on prompts and answers; an unfinished run of the recipe is resumed.",
)(_training("tune"))


@app.command("train", hidden=True, context_settings={**WORDS, "ignore_unknown_options": True})
def _meant(_: typer.Context) -> None:
    raise errors.OptionError(
        "itune train: no such command. Prompts and answers are learnt by itune tune, plain text by "
        "itune pretrain."
    )


@app.command("eval", context_settings=WORDS)
def evaluate(
    context: typer.Context,
    recipe: RecipeOption = None,
    sets: SetOption = None,
    output: OutputOption = None,
    run: RunOption = None,
    model: ModelOption = None,
    predictions: Annotated[
        Path | None,
        typer.Option("--predictions", metavar="FILE", help="Score a JSONL file; needs no model."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="NAME",
            help="A metric; repeatable.",
            autocompletion=_offered("metric_names"),
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="base|DIR|FILE", help="What to compare with, paired."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Rows of each task.")
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option("--shots", metavar="K", min=0, help="Solved examples before each question."),
    ] = None,
    wordings: Annotated[
        str | None,
        typer.Option("--wordings", metavar="all|first|N", help="Which wordings are asked."),
    ] = None,
    engine: EngineOption = None,
    processes: ProcessesOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    schema: SchemaOption = False,
) -> None:
    """Score a run on its evaluation data, with intervals, beside the untuned model."""
    _refuse_words(context)
    from itune import commands, evaluating

    common = commands.Common(recipe, tuple(sets or ()), output, processes, as_json, quiet)
    evaluating.evaluate(
        common,
        evaluating.Judged(
            run, model, predictions, tuple(metric or ()), against, limit, shots, wordings, engine
        ),
        sys.argv[1:],
    )


@app.command()
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="- reads standard input.")
    ] = None,
    run: RunOption = None,
    model: ModelOption = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--input", "-i", metavar="FILE", help="Rows: prompt, messages, or a template's columns."
        ),
    ] = None,
    output: OutputOption = None,
    template: Annotated[
        str | None,
        typer.Option(
            "--template",
            metavar="NAME",
            help="Render prompts with it.",
            autocompletion=_offered("template_names"),
        ),
    ] = None,
    field: Annotated[
        list[str] | None,
        typer.Option("--field", metavar="KEY=VALUE", help="A column for the template."),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="What the model is told first.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Talk with the model, a line at a time; /help says how.")
    ] = False,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Show how likely each token was, and what drove it."),
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option("--seed", metavar="N", min=0, help="What drawn answers follow from."),
    ] = None,
    engine: EngineOption = None,
    sets: SetOption = None,
    processes: ProcessesOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Answer prompts with a run's model."""
    from itune import commands, generating, prompting

    common = commands.Common(None, tuple(sets or ()), output, processes, as_json, quiet)
    generating.generate(
        common,
        prompting.Asked(
            prompts=tuple(prompts or ()),
            run=run,
            model=model,
            input=source,
            template=template,
            fields=tuple(field or ()),
            system=system,
            chat=chat,
            explain=explain,
            engine=engine,
            seed=seed,
        ),
        sys.argv[1:],
    )


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"itune {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _open_outputs() -> None:
    """Give what is written to a closed output (`>&-`) a place to vanish."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115


def _place(stream: Any) -> tuple[str, int, int] | None:
    """What a stream is and where it leads."""
    try:
        state = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return None
    return type(stream).__name__, state.st_dev, state.st_ino


def _told(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    """Show a fault of ours with its traceback, which may quote addresses with a token in them."""
    sys.stderr.write(errors.masked("".join(traceback.format_exception(kind, error, trace))))


def _run() -> None:
    """What the command line says. Raises Stopped for whatever fails after a signal stopped it."""
    try:
        for each in sys.argv[1:]:
            if each.startswith("-") and errors.masked(each) != each:  # typer would quote it
                raise errors.OptionError(
                    f"{errors.masked(each)}: a secret on the command line, where others see it. "
                    "Set it in the environment, such as HF_TOKEN."
                )
        app(prog_name="itune")  # by whatever it was started: a shell completes this name
    except Exception as error:
        if signals.LISTENER.raised:  # and a library took it for a fault of its own
            raise signals.Stopped(signals.LISTENER.asked) from error
        raise
    finally:
        sys.excepthook = _told  # typer has put its own there


def _refused(error: Exception) -> str | None:
    """What the machine refuses with an error that a library raised; None for a fault of ours."""
    if memory.is_short(error):
        return (
            f"the memory does not hold this: {memory.told(error)}. Take a smaller model or shorter "
            "texts, set quantization, or close other programs."
        )
    if said := storage.refusal(error):
        return (
            f"{said}. What was finished is kept, and checkpoints are whole: make room, or choose a "
            "folder that can be written to, and run the same command again."
        )
    if launching.lost_peer(error):
        return (
            "another process of this run has ended, so this one stops too. Run the same command "
            "again to go on."
        )
    return None


def main() -> None:
    """Run the command line; an error that a user can meet is one message and an exit code."""
    launching.end_with_launcher()
    _open_outputs()
    output = _place(sys.stdout)
    try:
        with signals.LISTENER.listening():
            _run()
    except SystemExit as end:
        # click and rich put something else in the place of an output that nobody reads any more.
        if end.code == 1 and _place(sys.stdout) != output:
            sys.exit(UNREAD)
        raise
    except errors.ItuneError as error:
        if error.exit_code == errors.ItuneError.exit_code:
            raise
        launching.tell(
            "".join(f"error: {errors.inert(line)}\n" for line in str(error).splitlines())
        )
        sys.exit(error.exit_code)
    except Exception as error:
        if (refused := _refused(error)) is None:
            raise
        launching.tell(f"error: {errors.inert(refused)}\n")
        sys.exit(errors.EnvironmentRefusal.exit_code)
    except signals.Stopped as stopped:
        launching.tell(f"error: {signals.told(str(stopped))}\n")
        sys.exit(errors.Interrupted.exit_code)
