"""Arrays that lie in several files, seen as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class Joined:
    """Several arrays, each mapped from its file, seen as one; only what is asked for is copied."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = list(parts)
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)])
        self.dtype = self.parts[0].dtype

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, wanted: Any) -> Any:
        if not isinstance(wanted, slice) or wanted.step not in (None, 1):
            return np.asarray(self)[wanted]
        start, end, _ = wanted.indices(len(self))
        part = int(np.searchsorted(self.starts, start, "right")) - 1
        if start < end <= self.starts[part + 1]:
            return self.parts[part][start - self.starts[part] : end - self.starts[part]]
        return np.asarray(self)[wanted]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = np.concatenate(self.parts)
        return whole if dtype is None else whole.astype(dtype)

    def max(self) -> Any:
        """The largest of all."""
        return max(part.max() for part in self.parts if len(part))


def joined(parts: Sequence[np.ndarray]) -> Any:
    """One array as it is; several as a Joined."""
    return parts[0] if len(parts) == 1 else Joined(parts)
