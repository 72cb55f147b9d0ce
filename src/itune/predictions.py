"""Files of predictions: read to be scored, kept as answers come, used again for the same question.

Beside them lies `asked.json`: which model gave each file's answers, and by which settings. An
answer is used again where that is the same and the prompt is, token by token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from itune import errors, files, runs, scoring, sharing, storage

if TYPE_CHECKING:
    from itune import data

ALONE = "predictions"  # the task of lines that name none
MARKS = "asked.json"
GOLD = ("reference", "references")


# --- any file -------------------------------------------------------------------------------


def read(path: Path) -> dict[str, list[scoring.Prediction]]:
    """The predictions of a JSONL file by task; those of a single task are called `predictions`.

    Each line has `prediction` and `reference` or `references`; `task`, `row`, `wording` and
    `prompt` are optional. What `itune generate` wrote is read too: its `response`, and the
    references of the row that asked. Raises DataError with the line.
    """
    tasks: dict[str, list[scoring.Prediction]] = {}
    for number, given in files.objects(path):
        line = _generated(given)
        name = str(line.get("task", ALONE))
        prompt = line.get("prompt")
        tasks.setdefault(name, []).append(
            scoring.Prediction(
                row=_whole(line, "row", number, path, number),
                wording=_whole(line, "wording", 0, path, number),
                prediction=_text(line, "prediction", path, number),
                references=_references(line, path, number),
                prompt=prompt if isinstance(prompt, str) else None,
                stop=str(line.get("stop") or ""),
            )
        )
    if not tasks:
        raise errors.DataError(f"{path}: 0 rows, the file is empty. Check how it was written.")
    return {ALONE: next(iter(tasks.values()))} if len(tasks) == 1 else tasks


def _generated(line: dict[str, Any]) -> dict[str, Any]:
    """A line of `itune generate` as one of predictions; any other line as it is."""
    if "prediction" in line or not isinstance(line.get("response"), str):
        return line
    asked = line.get("input")
    gold = {k: asked[k] for k in GOLD if k in asked} if isinstance(asked, Mapping) else {}
    return {**gold, **line, "prediction": line["response"]}


def _whole(line: Mapping[str, Any], key: str, default: int, path: Path, number: int) -> int:
    value = line.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise errors.DataError(
            f"{path}:{number}: {key}: expected a whole number, found {errors.shown(value)}."
        )
    return value


def _text(line: Mapping[str, Any], key: str, path: Path, number: int) -> str:
    value = line.get(key)
    if not isinstance(value, str):
        raise errors.DataError(
            f"{path}:{number}: {key}: expected a text, found {errors.shown(value)}. The line has "
            f"{', '.join(sorted(line))}."
        )
    return value


def _references(line: Mapping[str, Any], path: Path, number: int) -> tuple[str, ...]:
    several = line.get("references")
    if several is None:
        return (_text(line, "reference", path, number),)
    if not isinstance(several, list) or not all(isinstance(each, str) for each in several):
        raise errors.DataError(
            f"{path}:{number}: references: expected a list of texts, found {errors.shown(several)}."
        )
    if not several:
        raise errors.DataError(
            f"{path}:{number}: references: there is none. Give at least one; it may be empty text."
        )
    single = line.get("reference")
    if single is not None and single not in several:
        raise errors.DataError(
            f"{path}:{number}: reference: {errors.shown(single)} is none of `references`, which "
            "alone would count. Give one of the two keys."
        )
    return tuple(several)


# --- our own, kept as they come -------------------------------------------------------------


def shown(case: data.Case) -> str:
    """The prompt of a case as its line has it: the texts of its messages."""
    return "\n".join(message.content for message in case.messages)


def digest(case: data.Case, choices: Sequence[str]) -> str:
    """Stands for all that is asked in a case: its tokens, and between what may be chosen."""
    text = json.dumps([list(case.ids), list(choices)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


Key = tuple[str, int, int, str]


class Answer(NamedTuple):
    """An answer; the log-likelihoods of the choices that it is one of, where these are kept; why
    it ended (`stop` or `length`), where it was written."""

    text: str
    nats: tuple[float, ...] = ()
    stop: str = ""


class Kept:
    """The answers of one model in a file; those that it gave before are known.

    What another model answered, or what is no longer asked, is moved aside and stays (`aside`).
    Of several processes each keeps its answers in a file of its own, the first in the one that
    stays; `settle` brings them together, and so does the next start after one that was stopped.
    """

    def __init__(
        self, folder: Path | None, name: str, mark: Mapping[str, Any], *, rated: bool = False
    ) -> None:
        """mark: what decides the answers beside the prompts; another one starts the file anew.

        rated: keep how likely each choice is, too (`nats`); an answer without that is not known.
        Without a folder nothing is kept. `changed` names what a mark there has otherwise.
        """
        self.path = None if folder is None else folder / name
        self.rated = rated
        self.answers: dict[Key, Answer] = {}
        self.changed: list[str] = []
        self.aside: Path | None = None
        self.fresh: dict[Key, Answer] = {}
        if folder is None or self.path is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.answers, self.changed, self.aside = sharing.of_first(
            lambda: self._opened(folder, name, mark)
        )
        self.own = _part(self.path, sharing.rank())

    def _opened(
        self, folder: Path, name: str, mark: Mapping[str, Any]
    ) -> tuple[dict[Key, Answer], list[str], Path | None]:
        """The answers that are known, what the mark there has otherwise, where its answers went."""
        path, answers, changed, aside = folder / name, {}, [], None
        marks = runs.read_json(folder / MARKS) if (folder / MARKS).is_file() else {}
        mine = json.loads(runs.to_json(mark))
        parts = _parts(path)
        whole = [line for each in (path, *parts) for line in _whole_lines(each)]
        if marks.get(name) == mine:
            answers = {
                _key(line): Answer(
                    line["prediction"], tuple(line.get("nats", ())), line.get("stop", "")
                )
                for line in whole
                if _is_ours(line) and (not self.rated or "nats" in line)
            }
        elif whole:
            known = marks.get(name) or {}
            changed = [key for key in {**mine, **known} if known.get(key) != mine.get(key)]
            aside = spare(path)
            write(aside, whole)
            marks[aside.name] = known
            whole = []
        # The lines first: answers that another model gave must never lie beside this mark.
        write(path, whole)
        for part in parts:
            part.unlink()
        storage.write(folder / MARKS, runs.to_json({**marks, name: mine}, indent=2) + "\n")
        return answers, changed, aside

    def add(
        self,
        task: data.Task,
        case: data.Case,
        answer: str,
        nats: Sequence[float] = (),
        stop: str = "",
    ) -> None:
        """Keep an answer, on disk at once. nats: of each choice, where it is one of them.

        stop: why it ended, where it was written.
        """
        made = Answer(answer, tuple(nats) if self.rated else (), stop)
        line = line_of(task, case, *made)
        self.answers[_key(line)] = self.fresh[_key(line)] = made
        if self.path is not None:
            with self.own.open("a", encoding="utf-8") as file:
                file.write(runs.to_json(line) + "\n")

    def settle(self, tasks: Sequence[data.Task]) -> None:
        """Have every process know the answers of all, and the file hold them in their order."""
        for found in sharing.gathered(self.fresh):
            self.answers.update(found)
        self.fresh = {}
        if self.path is None or sharing.rank() > 0:
            return
        known = [
            line_of(task, case, *answer)
            for task in tasks
            for case in task.cases
            if (answer := self._known(task, case)) is not None
        ]
        asked = {_key(line) for line in known}
        before = _whole_lines(self.path)
        if any(_is_ours(line) and _key(line) not in asked for line in before):
            aside = spare(self.path)
            write(aside, before)
            marks = runs.read_json(self.path.with_name(MARKS))
            marks[aside.name] = marks.get(self.path.name)
            storage.write(self.path.with_name(MARKS), runs.to_json(marks, indent=2) + "\n")
        write(self.path, known)
        for part in _parts(self.path):
            part.unlink()

    def answer(self, task: data.Task, case: data.Case) -> str | None:
        """The answer to a case, where it is known."""
        known = self._known(task, case)
        return None if known is None else known.text

    def stop(self, task: data.Task, case: data.Case) -> str:
        """Why the answer to a case ended, where that is known."""
        known = self._known(task, case)
        return "" if known is None else known.stop

    def nats(self, task: data.Task, case: data.Case) -> tuple[float, ...]:
        """The log-likelihood of each choice in a case that is answered, as `decide` has it."""
        known = self._known(task, case)
        assert known is not None, "asked for before it was answered"
        return known.nats

    def _known(self, task: data.Task, case: data.Case) -> Answer | None:
        asked = digest(case, task.template.choices)
        return self.answers.get((task.name, case.row, case.wording, asked))


def spare(path: Path) -> Path:
    """Where a file goes that makes room for another: the first free `scores.old-1.json`."""
    number = 1
    while (aside := path.with_name(f"{path.stem}.old-{number}{path.suffix}")).exists():
        number += 1
    return aside


def _part(path: Path, rank: int) -> Path:
    """Where a process keeps its answers."""
    return path if rank == 0 else path.with_name(f"{path.stem}.{rank}{path.suffix}")


def _parts(path: Path) -> list[Path]:
    """The files of the processes but the first."""
    return sorted(path.parent.glob(f"{path.stem}.[0-9]*{path.suffix}"))


def line_of(
    task: data.Task, case: data.Case, answer: str, nats: Sequence[float] = (), stop: str = ""
) -> dict[str, Any]:
    """An answer as predictions.jsonl has it."""
    line = {
        "task": task.name,
        "row": case.row,
        "wording": case.wording,
        "prompt": shown(case),
        "prediction": answer,
        "references": list(case.references),
        "asked": digest(case, task.template.choices),
    }
    if stop:
        line["stop"] = stop
    return {**line, "nats": list(nats)} if nats else line


def write(path: Path, made: Iterable[Mapping[str, Any]]) -> None:
    """Write lines in their order, in place of those that came as they came."""
    storage.write(path, "".join(runs.to_json(line) + "\n" for line in made))


def _key(line: Mapping[str, Any]) -> Key:
    return line["task"], line["row"], line["wording"], line["asked"]


def _is_ours(line: Mapping[str, Any]) -> bool:
    return {"task", "row", "wording", "asked", "prediction"} <= set(line)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of ours; one that a kill tore, and what follows it, is left out."""
    if not path.is_file():
        return []
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict):
            break
        found.append(line)
    return found
