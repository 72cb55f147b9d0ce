"""The best step so far by its held-out loss, and when to look for no better one.

Needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from itune import checkpoints, errors, pieces, runs


@dataclass
class Best:
    """The step with the lowest held-out loss, in nats a token; `stale`: measurements since.

    Plain numbers, kept in checkpoints.
    """

    step: int = 0
    loss: float | None = None
    stale: int = 0

    def heard(self, step: int, loss: float) -> bool:
        """Take a measurement in; returns whether it is the lowest. One that is no number is not."""
        if loss < (float("inf") if self.loss is None else self.loss):
            self.step, self.loss, self.stale = step, loss, 0
            return True
        self.stale += 1
        return False

    def over(self, patience: int | None) -> bool:
        """Whether the loss has not fallen in `patience` measurements in a row."""
        return patience is not None and self.stale >= patience

    def checkpoint(self, run: runs.Run, peers: pieces.Peers) -> Path:
        """The folder of its checkpoint, which is whole; asked for by all. Raises RunError."""
        path = run.checkpoints / f"{self.step:06d}"
        if why := checkpoints.fault(path, str(run.manifest["id"]), peers):
            raise errors.RunError(
                f"{path}: the step with the lowest held-out loss ({self.loss:.4f}), and {why}. Put "
                "it back, or start anew with --fresh; this run is then moved aside."
            )
        return path
