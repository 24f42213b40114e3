from __future__ import annotations

import numpy as np
import pytest

from fmembed.model.batching import pack, pad, plan_batches


@pytest.mark.parametrize("budget", [1, 7, 64, 10_000])
def test_every_row_once_and_within_budget(budget: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 500)
    batches = list(plan_batches(lengths, budget, max_rows=32))
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    for batch in batches:
        assert len(batch) <= 32
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= budget


def test_no_rows_no_batch() -> None:
    assert list(plan_batches(np.array([], dtype=np.int64), 16)) == []


def test_pad_right() -> None:
    ids, mask = pad([np.array([5, 6, 7], np.int32), np.array([8], np.int32)], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_packed_rows_are_followed_by_padding() -> None:
    rows = [np.array(ids, dtype=np.int32) for ids in ([5, 6, 7], [8, 9])]
    ids_1T, bounds, lengths = pack(rows, pad_id=1, num_slots=8)
    assert ids_1T.tolist() == [[5, 6, 7, 8, 9, 1, 1, 1]]
    assert (bounds.tolist(), lengths.tolist()) == ([0, 3, 5], [3, 2])
    assert pack(rows, pad_id=1, num_slots=5)[0].tolist() == [[5, 6, 7, 8, 9]]
