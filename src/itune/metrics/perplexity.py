"""How well texts are foretold: perplexity a token, bits a byte; less is better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import datasets
import numpy as np

from itune import errors
from itune.metrics import sufficient


class Perplexity(sufficient.SufficientMetric):
    """exp of the mean loss a token over all texts; **less is better**.

    A prediction is the summed loss of a text in nats, its reference the number of tokens that the
    loss is over. So long texts count more, and two tokenizers cannot be compared.
    """

    keys: ClassVar[tuple[str, ...]] = ("perplexity",)
    bounds: ClassVar[tuple[float, float] | None] = None
    less_is_better: ClassVar[bool] = True
    signature = "perplexity|per:token"
    unit: ClassVar[str] = "token"

    def count(self, predictions: Sequence[Any], references: Sequence[Any]) -> sufficient.Array:
        tokens = [np.ravel(each)[0] for each in references]
        found = np.column_stack([predictions, tokens]).astype(np.float64)
        for row, (nats, n_tokens) in enumerate(found):
            if not np.isfinite(nats) or n_tokens <= 0:
                raise errors.UserError(
                    f"metric {self.keys[0]}: row {row} has a loss of {nats} over {n_tokens:g} "
                    f"{self.unit}s. Each text needs a finite loss and at least one {self.unit}."
                )
        return found

    def values(self, sums: sufficient.Array) -> dict[str, sufficient.Array]:
        return {"perplexity": np.exp(sums[..., 0] / sums[..., 1])}

    def _info(self) -> sufficient.evaluate.MetricInfo:
        text = type(self).__doc__ or ""
        features = datasets.Features(
            {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
        )
        return sufficient.evaluate.MetricInfo(
            description=text, citation="", inputs_description=text, features=features
        )

    def _compute(self, *, predictions: Any, references: Any, **options: Any) -> dict[str, float]:
        sums = sufficient.total(self.count(predictions, references))
        return {key: float(value) for key, value in self.values(sums).items()}


class BitsPerByte(Perplexity):
    """The mean loss a byte of UTF-8 in bits, over all texts; **less is better**.

    As the same bytes are foretold whatever the tokens are, it compares models of different
    tokenizers. The reference of a text is the number of bytes that its loss is over.
    """

    keys: ClassVar[tuple[str, ...]] = ("bits_per_byte",)
    signature = "bits_per_byte|per:byte of UTF-8"
    unit: ClassVar[str] = "byte"

    def values(self, sums: sufficient.Array) -> dict[str, sufficient.Array]:
        return {"bits_per_byte": sums[..., 0] / sums[..., 1] / np.log(2)}

    def _info(self) -> sufficient.evaluate.MetricInfo:
        made = super()._info()
        made.features["references"] = datasets.Value("float64")
        return made
