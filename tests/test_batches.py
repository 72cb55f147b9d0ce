"""Micro-batches as tensors: targets where they are predicted, padded and packed alike."""

from __future__ import annotations

import numpy as np
import torch

from itune import batches, data, encoding


def corpus() -> data.Corpus:
    return data.from_tokens(
        [
            encoding.Tokens([10, 11, 12, 13], [False, False, True, True]),
            encoding.Tokens([20], [True]),
            encoding.Tokens([30, 31, 32], [False, True, False]),
        ]
    )


def test_packed_rows_restart_their_positions_and_never_predict_the_next_row() -> None:
    batch = batches.packed(corpus(), np.arange(3))
    assert batch.ids.tolist() == [[10, 11, 12, 13, 20, 30, 31, 32]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 0, 1, 2]]
    assert batch.places.tolist() == [1, 2, 5]
    assert batch.wanted.tolist() == [12, 13, 31]
    assert batch.owners().tolist() == [0, 0, 2]
    assert batch.segments is not None
    assert batch.segments.bounds.tolist() == [0, 4, 5, 8]
    x = torch.arange(8)
    spread = x[batch.segments.gather].reshape(-1)
    assert torch.equal(spread[batch.segments.scatter], x)


def test_padded_rows_have_the_same_targets() -> None:
    batch = batches.padded(corpus(), np.arange(3), pad_id=7)
    assert batch.ids.tolist() == [[10, 11, 12, 13], [20, 7, 7, 7], [30, 31, 32, 7]]
    assert batch.mask is not None
    assert batch.mask.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]]
    assert batch.wanted.tolist() == [12, 13, 31]
    assert batch.owners().tolist() == [0, 0, 2]
    assert torch.equal(batch.targets.reshape(-1)[batch.places], batch.wanted)


def test_a_row_without_a_target() -> None:
    batch = batches.packed(corpus(), np.array([1]))
    assert batch.wanted.tolist() == []
    assert batch.owners().tolist() == []
