"""Several runs that answer as one: the mean of the log-likelihoods that each gives the choices.

One model after the other is asked, each by its own tokenizer and chat template; never are two in
memory at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from itune import data, memory, predictions, recipes, scoring
from itune.answering import Answerer, Asked, Say


class Ensemble(Answerer):
    """The first of its members, by its tokenizer and prompts, with the choices of them all.

    Of each prompt and member the scores of the choices (`evaluation.decide`) are normalised over
    the choices, so that their probabilities sum to 1, and the choice with the greatest mean of
    their logarithms is taken: the logarithmic opinion pool (Genest and Zidek 1986, Combining
    Probability Distributions), with equal weights. It is taken and not the mean of the
    probabilities as it is what averaging logits comes to, which is usual for IMDb: the more sure a
    member is, the more it counts, where probabilities near 1 all count alike.
    """

    def __init__(
        self, recipe: recipes.Recipe, locations: Sequence[str], asked: Asked, say: Say
    ) -> None:
        """locations: the folders of the runs; tasks without choices are refused before."""
        self.members = [Answerer(recipe, each, asked, say) for each in locations]
        super().__init__(recipe, locations[0], asked, say, like=self.members[0])
        self._picked: dict[tuple[str, int, int], str] = {}  # by task, row and wording

    @property
    def mark(self) -> dict[str, Any]:
        """All that decides the answers but the prompts: what decides those of each member."""
        return {"ensemble": [member.mark for member in self.members]}

    def answers(self, kept: predictions.Kept) -> dict[str, list[scoring.Prediction]]:
        """The answer to every case, by task.

        What each member finds is kept in `member-1.jsonl` and so on, beside the answers, and is
        what is used again: what is asked of one may change where the first one's prompt does not.
        """
        folder = None if kept.path is None else kept.path.parent
        means = {task.name: np.zeros(()) for task in self.tasks}
        for number, member in enumerate(self.members, 1):
            found = predictions.Kept(folder, f"member-{number}.jsonl", member.mark, rated=True)
            member.answers(found)
            member.release()
            memory.free()
            for task, ours in zip(member.tasks, self.tasks, strict=True):
                assert [*map(_place, task.cases)] == [*map(_place, ours.cases)]
                nats = np.array([found.nats(task, case) for case in task.cases])
                chances = nats - np.logaddexp.reduce(nats, axis=1, keepdims=True)
                means[task.name] = means[task.name] + chances  # [cases, choices]
        self._picked = {
            (task.name, *_place(case)): task.template.choices[best]
            for task in self.tasks
            for case, best in zip(task.cases, means[task.name].argmax(1), strict=True)
        }
        return super().answers(kept)

    def _missing(self, task: data.Task, kept: predictions.Kept) -> list[data.Case]:
        """The cases of which another choice is kept than is picked now, or none."""
        return [
            case
            for case in task.cases
            if kept.answer(task, case) != self._picked.get((task.name, *_place(case)))
        ]

    def _ask(self, task: data.Task, cases: list[data.Case], kept: predictions.Kept) -> None:
        for case in cases:
            kept.add(task, case, self._picked[task.name, case.row, case.wording])


def _place(case: data.Case) -> tuple[int, int]:
    return case.row, case.wording
