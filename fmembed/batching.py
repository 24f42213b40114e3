"""Ragged rows to token-budget batches.

Legend: B rows of a batch, L tokens of its longest row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]


def plan_batches(lengths: Ints, batch_tokens: int, max_rows: int = 1024) -> Iterator[Ints]:
    """Group rows of like length so that a padded batch holds at most `batch_tokens` tokens.

    Longest first: the largest batch comes when memory is emptiest, so that one that does not fit
    fails at once. A row longer than the budget gets a batch of its own.

    Args:
        lengths: Tokens of each row, shape (rows,).
        batch_tokens: Budget of a batch, padding included.
        max_rows: Cap on the rows of a batch, whatever their length.

    Yields:
        Row positions of a batch; every row comes exactly once.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        stop = start + min(max(batch_tokens // longest, 1), max_rows)
        yield order[start:stop]
        start = stop


def pad(ids: Sequence[npt.NDArray[np.int32]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad rows on the right.

    Right, whatever the tokenizer prefers: with it a causal model's positions and its real tokens'
    states are those of the row alone, and pooling finds the last token by its length.

    Args:
        ids: Token ids of each row.
        pad_id: What fills the rest.

    Returns:
        ids_BL and mask_BL (1 for real tokens), both int64.
    """
    lengths = np.fromiter((len(i) for i in ids), dtype=np.int64, count=len(ids))
    mask_BL = np.arange(lengths.max()) < lengths[:, None]
    ids_BL = np.full(mask_BL.shape, pad_id, dtype=np.int64)
    ids_BL[mask_BL] = np.concatenate(ids)
    return torch.from_numpy(ids_BL), torch.from_numpy(mask_BL.astype(np.int64))
