"""The share of right labels, 0 to 1."""

from __future__ import annotations

from typing import ClassVar

from itune.metrics import exact_match


class Accuracy(exact_match.ExactMatch):
    """The share of rows whose label is (one of) the reference, 0 to 1; scikit-learn's, on text.

    Labels are compared without the spaces around them, else exactly. An answer that is no label is
    wrong.
    """

    keys: ClassVar[tuple[str, ...]] = ("accuracy",)
    signature = "accuracy|strip:yes|case:mixed"
