"""Packed attention against each row alone, written out in float64."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fmembed.model.attention import attend
from fmembed.model.batching import plan_batches

# Sorted as batches are: runs of one length, and lengths that only one row has.
LENGTHS = (70, 33, 33, 33, 9, 2, 1, 1)
HEADS, DIM = 4, 8


def alone(query: Any, key: Any, value: Any, scaling: float, sees: Any) -> torch.Tensor:
    scores = query.double() @ key.double().transpose(1, 2) * scaling
    place = torch.arange(query.shape[1])
    scores[:, ~sees(place[None, :] - place[:, None])] = -torch.inf
    return scores.softmax(-1) @ value.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize(
    ("options", "sees"),
    [
        ({}, lambda ahead: ahead < 10**6),
        ({"is_causal": True}, lambda ahead: ahead <= 0),
        ({"sliding_window": 5}, lambda ahead: ahead.abs() < 5),
        ({"sliding_window": 5, "is_causal": True}, lambda ahead: (ahead <= 0) & (ahead > -5)),
    ],
    ids=["all", "causal", "window", "causal window"],
)
def test_rows_see_themselves_alone(
    options: dict[str, Any], sees: Any, kv_heads: int, dtype: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(1, HEADS, sum(LENGTHS), DIM, generator=draw).to(dtype)
    key, value = (
        torch.randn(1, kv_heads, sum(LENGTHS), DIM, generator=draw).to(dtype) for _ in range(2)
    )
    bounds = np.concatenate([[0], np.cumsum(LENGTHS)])
    found, _ = attend(
        SimpleNamespace(is_causal=False), query, key, value, None, scaling=0.5,
        cu_seq_lens_q=torch.tensor(bounds, dtype=torch.int32), max_length_q=max(LENGTHS), **options,
    )  # fmt: skip
    assert found.shape == (1, sum(LENGTHS), HEADS, DIM)
    groups = HEADS // kv_heads
    for start, stop in itertools.pairwise(bounds):
        q, k, v = (t[0, :, start:stop] for t in (query, key, value))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        expected = alone(q, k, v, 0.5, sees).transpose(0, 1)
        close = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(found[0, start:stop].double(), expected, atol=close, rtol=close)


def test_a_packed_budget_counts_the_rows_own_tokens() -> None:
    lengths = np.array([100, 60, 30, 10, 5, 5])
    assert [b.tolist() for b in plan_batches(lengths, 100, packed=True)] == [[0], [1, 2, 3], [4, 5]]
    # Padded, the same budget holds fewer; and what packs well must still be unpacked at the end.
    assert [b.tolist() for b in plan_batches(lengths, 100)] == [[0], [1], [2, 3, 4], [5]]
    many = np.array([50, *[1] * 50])
    assert max(len(b) * many[b].max() for b in plan_batches(many, 100, packed=True)) <= 400
