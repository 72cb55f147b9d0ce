"""`row_losses.jsonl`: the mean loss of every training row at every visit.

The shortest way to bad data: what a model cannot learn after others like it is often mislabelled,
cut or empty. Needs torch.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from itune import batches, storage

if TYPE_CHECKING:
    from itune import data

NAME = "row_losses.jsonl"


def of_batch(
    corpus: data.Corpus, rows: np.ndarray, batch: batches.Batch, each: Sequence[torch.Tensor]
) -> list[dict[str, Any]]:
    """A record for each row of a micro-batch that learns anything.

    `each`: the loss of every target in nats, [targets] in one or several tensors.
    """
    owners = batch.owners()
    sums = torch.zeros(len(rows), dtype=torch.float64, device=owners.device)
    sums.index_add_(0, owners, torch.cat(list(each)).double())
    counts = torch.bincount(owners, minlength=len(rows))
    records = []
    for row, total, count in zip(
        (rows % len(corpus)).tolist(), sums.tolist(), counts.tolist(), strict=True
    ):
        if count:
            source = int(corpus.source[row])
            records.append(
                {
                    "path": corpus.sources[source].path,
                    "row": corpus.number(row) + 1,
                    "wording": int(corpus.wording[row]),
                    "loss": round(total / count, 6),
                    "tokens": count,
                }
            )
    return records


class File:
    """The file in a run's folder. Lines after the step that a run resumes from are taken out.

    Of several processes one alone `writes`; another would put its own cut over what came since.
    """

    def __init__(self, folder: Path, step: int, *, writes: bool) -> None:
        self.path = folder / NAME
        if writes and self.path.is_file():
            *lines, _torn_by_a_kill = self.path.read_text(encoding="utf-8").split("\n")
            kept = itertools.takewhile(lambda line: _before(line, step), lines)
            storage.write(self.path, "".join(f"{line}\n" for line in kept))

    def add(self, step: int, epoch: float, records: Sequence[dict[str, Any]]) -> None:
        """One step's rows."""
        lines = [json.dumps({"step": step, "epoch": epoch, **record}) for record in records]
        storage.DISK.append(self.path, "".join(f"{line}\n" for line in lines))

    def sync(self) -> None:
        """Have all lines on the disk, before a checkpoint that counts on them."""
        if self.path.is_file():
            storage.DISK.sync(self.path)


def _before(line: str, step: int) -> bool:
    """Whether a line is of a step that is done. Behind a checkpoint a power cut may leave any."""
    try:
        return int(json.loads(line)["step"]) <= step
    except (ValueError, LookupError, TypeError):
        return False
