"""Packed attention against each row alone, written out in float64."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from encoding import DEVICES

from fmembed.model import attention
from fmembed.model.attention import attend, can_pack
from fmembed.model.batching import plan_batches

# Sorted as batches are: runs of one length, and lengths that only one row has.
LENGTHS = (70, 33, 33, 33, 9, 2, 1, 1)
HEADS = 4


def alone(query: Any, key: Any, value: Any, scaling: float, sees: Any) -> torch.Tensor:
    scores = query.double() @ key.double().transpose(1, 2) * scaling
    place = torch.arange(query.shape[1])
    scores[:, ~sees(place[None, :] - place[:, None])] = -torch.inf
    return scores.softmax(-1) @ value.double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [8, 12])  # a GPU's kernel takes the first
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
    options: dict[str, Any], sees: Any, kv_heads: int, dim: int, dtype: torch.dtype, device: str
) -> None:
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(1, HEADS, sum(LENGTHS), dim, generator=draw).to(dtype)
    key, value = (
        torch.randn(1, kv_heads, sum(LENGTHS), dim, generator=draw).to(dtype) for _ in range(2)
    )
    bounds = np.concatenate([[0], np.cumsum(LENGTHS)])
    found, _ = attend(
        SimpleNamespace(is_causal=False), *(t.to(device) for t in (query, key, value)), None,
        scaling=0.5, cu_seq_lens_q=torch.tensor(bounds, dtype=torch.int32, device=device),
        max_length_q=max(LENGTHS), **options,
    )  # fmt: skip
    found = found.cpu()
    assert found.shape == (1, sum(LENGTHS), HEADS, dim)
    groups = HEADS // kv_heads
    for start, stop in itertools.pairwise(bounds):
        q, k, v = (t[0, :, start:stop] for t in (query, key, value))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        expected = alone(q, k, v, 0.5, sees).transpose(0, 1)
        close = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(found[0, start:stop].double(), expected, atol=close, rtol=close)


@pytest.mark.parametrize(
    ("capability", "dtype", "options", "expected"),
    [
        ((9, 0), torch.bfloat16, {"scale", "window_size"}, True),  # torch 2.11
        ((8, 0), torch.float16, {"scale", "window_size", "enable_gqa"}, True),  # 2.13
        ((9, 0), torch.float32, {"scale", "window_size"}, False),
        ((7, 5), torch.bfloat16, {"scale", "window_size"}, False),
        ((9, 0), torch.bfloat16, {"is_causal"}, False),  # 2.10, without a scale
        ((9, 0), torch.bfloat16, set(), False),
    ],
)
def test_gpus_pack_where_torch_has_a_kernel(
    capability: tuple[int, int],
    dtype: torch.dtype,
    options: set[str],
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(attention, "_kernel_options", lambda: options)
    assert can_pack.__wrapped__(torch.device("cuda"), dtype) is expected
    assert can_pack(torch.device("cpu"), dtype)


def test_a_packed_budget_counts_the_rows_own_tokens() -> None:
    lengths = np.array([100, 60, 30, 10, 5, 5])
    assert [b.tolist() for b in plan_batches(lengths, 100, packed=True)] == [[0], [1, 2, 3], [4, 5]]
    # Padded, the same budget holds fewer; and what packs well must still be unpacked at the end.
    assert [b.tolist() for b in plan_batches(lengths, 100)] == [[0], [1], [2, 3, 4], [5]]
    many = np.array([50, *[1] * 50])
    assert max(len(b) * many[b].max() for b in plan_batches(many, 100, packed=True)) <= 400
