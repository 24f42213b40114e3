"""Ragged rows to token-budget batches.

Legend: B rows of a batch, L tokens of its longest row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fmembed.arrays import Ints


def plan_batches(
    lengths: Ints, batch_tokens: int, max_rows: int = 1024, *, packed: bool = False
) -> Iterator[Ints]:
    """Group rows of like length so that a batch holds at most `batch_tokens` tokens.

    Longest first: the largest batch comes when memory is emptiest, so that one that does not fit
    fails at once. A row longer than the budget gets a batch of its own.

    Args:
        lengths: Tokens of each row, shape (rows,).
        batch_tokens: Budget of a batch, padding included.
        max_rows: Cap on the rows of a batch, whatever their length.
        packed: Rows will lie one after another, unpadded: the budget counts their own tokens. Not
            more than four times the budget with padding, which the states are given at the end.

    Yields:
        Row positions of a batch; every row comes exactly once.
    """
    order = np.argsort(-lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    start = 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        if packed:
            budget = batch_tokens + int(ends[start]) - int(lengths[order[start]])
            fit = int(np.searchsorted(ends, budget, side="right")) - start
            fit = min(fit, 4 * batch_tokens // longest)
        else:
            fit = batch_tokens // longest
        stop = start + min(max(fit, 1), max_rows)
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


def pack(
    ids: Sequence[npt.NDArray[np.int32]], pad_id: int, num_slots: int
) -> tuple[Tensor, Tensor, Ints]:
    """Lay rows one after another.

    Args:
        ids: Token ids of each row.
        pad_id: What follows the last row, belonging to none.
        num_slots: What T is to be; at least the rows' tokens.

    Returns:
        ids_1T, int64; where each row begins and the last ends, int32, shape (rows + 1,); and the
        rows' lengths.
    """
    lengths = np.fromiter((len(i) for i in ids), dtype=np.int64, count=len(ids))
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids_1T = np.full((1, num_slots), pad_id, dtype=np.int64)
    ids_1T[0, : bounds[-1]] = np.concatenate(ids)
    return torch.from_numpy(ids_1T), torch.from_numpy(bounds), lengths
