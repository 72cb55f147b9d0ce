"""What a metric is: statistics of rows and values of their sums, behind `evaluate`'s interface.

A value is never more than a function of summed statistics. So one pass over the texts is enough for
the score, its bootstrap interval, its spread over wordings and the significance of a difference:
each is the same function of other sums (`itune.scoring`).
"""

from __future__ import annotations

import abc
import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import datasets
import numpy as np
import numpy.typing as npt

from itune import errors

Array = npt.NDArray[Any]
References = Sequence[Sequence[str]]


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """Within, importing this module fails as if it were not installed."""
    kept = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        if kept is not None:
            sys.modules[name] = kept


# evaluate imports all pipelines of transformers, where it finds them, for its `evaluator`, which
# is not used here: 8 CPU seconds instead of 2.4 alone, 4.1 instead of 1.3 where a model was loaded.
# The price: in this process `evaluate.evaluator()` says that transformers is not installed.
if "evaluate" not in sys.modules:
    with _without("transformers"):
        import evaluate as evaluate
else:
    import evaluate as evaluate

TEXTS = datasets.Value("string")
FEATURES = [
    datasets.Features({"predictions": TEXTS, "references": datasets.List(TEXTS)}),
    datasets.Features({"predictions": TEXTS, "references": TEXTS}),
]


def check_rows(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    """Raises UserError: no rows, unequal lengths, or a row without any reference."""
    if len(predictions) != len(references):
        raise errors.UserError(
            f"metric: {len(predictions)} predictions, but references for {len(references)} rows. "
            "Give one entry of references for each prediction."
        )
    if len(predictions) == 0:
        raise errors.UserError("metric: there are no rows to score. Give at least one prediction.")
    for row, answers in enumerate(references):
        if isinstance(answers, Sequence) and not isinstance(answers, str) and not answers:
            raise errors.UserError(
                f"metric: row {row} has no reference. Give at least one; it may be empty text."
            )


def total(statistics: Array) -> Array:
    """The sum over rows, [rows, k] -> [k], in the order of the rows."""
    summed: Array = np.add.reduce(statistics, axis=0, dtype=np.float64)
    return summed


class SufficientMetric(evaluate.Metric, abc.ABC):
    """An `evaluate.Metric` whose value is a function of summed statistics of its rows.

    `compute(predictions=..., references=...)`, `add`, `add_batch` and `evaluate.combine` work as
    for any other; a reference is text or a list of texts. Rows stay in memory, except where
    `num_process` > 1.
    """

    keys: ClassVar[tuple[str, ...]]
    """Names of the values, in the order of the result."""
    bounds: ClassVar[tuple[float, float] | None] = (0.0, 1.0)
    """The least and the greatest value; None where the metric has no greatest."""
    unseen: ClassVar[tuple[float, float] | None] = None
    """What rows that were never seen may score at worst and at best; the bounds if left out."""
    less_is_better: ClassVar[bool] = False
    """Whether a smaller value is the better one."""
    signature: str = ""
    """How the values are made: variant, tokenizer, version. Set by `statistics`."""

    def __init__(self, *, keep_in_memory: bool | None = None, **options: Any) -> None:
        if keep_in_memory is None:
            keep_in_memory = options.get("num_process", 1) == 1
        super().__init__(keep_in_memory=keep_in_memory, **options)

    @abc.abstractmethod
    def count(self, predictions: Sequence[str], references: References) -> Array:
        """What `statistics` gives, for rows that were checked."""

    @abc.abstractmethod
    def values(self, sums: Array) -> dict[str, Array]:
        """Values [...] of summed statistics [..., k], by key; finite for any sum of rows."""

    def statistics(self, predictions: Sequence[str], references: References) -> Array:
        """Statistics [rows, k], to be summed over any rows and given to `values`.

        Rows count independently; what is decided for all of them at once (the set of labels, the
        tokenizer) depends on references only, so that two systems are measured alike.
        Raises UserError: no rows, unequal lengths, a row without reference.
        """
        check_rows(predictions, references)
        return self.count(predictions, references)

    def signature_of(self, key: str) -> str:
        """The signature of one of the values."""
        return self.signature

    def row_values(self, statistics: Array) -> dict[str, Array]:
        """What single answers score, for telling which of two is the better; [rows, k]."""
        return self.values(statistics)

    def details(self, predictions: Sequence[str], references: References) -> dict[str, Any]:
        """What there is to say beside the values, for scores.json; nothing for most."""
        return {}

    def check_references(self, references: References) -> None:
        """Raises UserError where such references cannot be scored, before there is any answer."""

    def _info(self) -> evaluate.MetricInfo:
        text = type(self).__doc__ or ""
        return evaluate.MetricInfo(
            description=text, citation="", inputs_description=text, features=FEATURES
        )

    def _build_data_dir(self) -> str:
        # The original makes a folder in the cache, of use only for rows that are kept in files.
        if self.keep_in_memory:
            return str(self._data_dir_root)
        return str(super()._build_data_dir())

    def add_batch(self, *, predictions: Any = None, references: Any = None, **more: Any) -> None:
        """Add rows; the same as the original, but what cannot be scored is said at once."""
        check_rows(predictions, references)
        evaluate.Metric.add_batch(self, predictions=predictions, references=references, **more)

    def _finalize(self) -> None:
        if self.writer is None and self.num_process == 1:
            raise errors.UserError(
                "metric: there are no rows to score. Add some before computing, or pass them."
            )
        super()._finalize()

    def _compute(self, *, predictions: Any, references: Any, **options: Any) -> dict[str, float]:
        listed = [[each] if isinstance(each, str) else list(each) for each in references]
        sums = total(self.statistics(list(predictions), listed))
        return {key: float(value) for key, value in self.values(sums).items()}


class MeanMetric(SufficientMetric):
    """A metric that is the plain mean of what each row scores: its statistics are (scores, 1)."""

    @abc.abstractmethod
    def scores(self, predictions: Sequence[str], references: References) -> Array:
        """What each row scores, [rows, keys]."""

    def count(self, predictions: Sequence[str], references: References) -> Array:
        scores = np.asarray(self.scores(predictions, references), dtype=np.float64)
        return np.hstack([scores.reshape(len(predictions), -1), np.ones((len(predictions), 1))])

    def values(self, sums: Array) -> dict[str, Array]:
        means = sums[..., :-1] / sums[..., -1:]
        return {key: means[..., place] for place, key in enumerate(self.keys)}
