"""Which rows are drawn, and what they tell of all."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from fmembed.forecast import Range
from fmembed.rows.found import COPY, EMBED, GOOD, TWIN, FoundRows
from fmembed.rows.ids import keys_of
from fmembed.run.buckets import draw
from fmembed.run.sampling import Sampled
from fmembed.sources.picks import ChosenRows


def rows_of(sizes: list[int], fates: Any = EMBED, contents: list[str] | None = None) -> ChosenRows:
    """Rows of shards of these sizes."""
    n = sum(sizes)
    rows = FoundRows(
        keys_of([f"id{i}" for i in range(n)]),
        keys_of(contents or [f"content{i}" for i in range(n)]),
        np.zeros(n, dtype=np.int64),
        np.full(n, GOOD, dtype=np.int8),
        np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
        np.concatenate([np.arange(size, dtype=np.int64) for size in sizes]),
    )
    return ChosenRows(rows, np.broadcast_to(np.array(fates, dtype=np.int8), n))


def sampled_of(units: Any, shards: Any, num_rejected: int = 0, is_cut: bool = False) -> Sampled:
    units = np.concatenate([np.asarray(units, dtype=np.int64), np.zeros(num_rejected)])
    shards = np.resize(np.asarray(shards), len(units))
    num_pieces = np.ones(len(units) - num_rejected)
    return Sampled(units, num_pieces, shards, num_rejected, is_cut, None, 0.0)


def test_rows_are_drawn_once_from_no_more_shards_than_may_be_read() -> None:
    drawn = draw(100, 8, keys_of([]), rows_of([50] * 40))
    assert draw(100, 8, keys_of([]), rows_of([50] * 40)).sample.rows.ids.tolist() == (
        drawn.sample.rows.ids.tolist()
    )
    rows = drawn.sample.rows
    assert drawn.times is not None
    assert {*np.unique(rows.shards).tolist()} == drawn.times.keys()
    assert sum(drawn.times.values()) == 8
    assert len({*zip(rows.shards.tolist(), rows.places.tolist(), strict=True)}) == len(rows) <= 100
    assert len(rows) >= 90
    assert (drawn.fates, drawn.shards) == ({EMBED: 2000}, list(range(40)))


def test_only_what_the_model_sees_is_drawn() -> None:
    some = rows_of([6], [EMBED, COPY, COPY, TWIN, EMBED, COPY], ["a", "a", "x", "a", "b", "b"])
    drawn = draw(100, 8, keys_of([]), some)
    assert drawn.sample.rows.places.tolist() == [0, 4]
    assert drawn.fates == {EMBED: 2, COPY: 3, TWIN: 1}
    assert drawn.num_fanned_out == 2  # the content of the third one is in the table
    assert drawn.times is None
    assert draw(100, 8, keys_of([])).fates == {}


# Sizes of shards: alike, and most of one row with a few that have many.
SIZES = {"alike": [40] * 300, "small": [1] * 900 + [90] * 10, "mixed": [5] * 200 + [400] * 30}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("num_shards", [64, 10_000])
def test_the_range_of_units_holds_what_they_are(sizes: str, num_shards: int) -> None:
    """19 times in 20, whether rows are drawn from all shards or from some, whose rows are alike."""
    num_held, trials = 0, 200
    for seed in range(trials):
        draws = np.random.default_rng(seed)
        of_shard = draws.integers(10, 400, len(SIZES[sizes]))
        if sizes == "small":
            of_shard[:900] += 300
        shards = np.repeat(np.arange(len(of_shard)), SIZES[sizes])
        units = of_shard[shards] + draws.integers(1, 60, len(shards))
        # As `buckets.draw` does, which draws the same of the same.
        times, at = None, draws.permutation(len(units))[:1000]
        if num_shards < len(of_shard):
            some = draws.choice(len(of_shard), num_shards, p=np.array(SIZES[sizes]) / len(units))
            times = Counter(some.tolist())
            at = np.concatenate([
                draws.permutation(np.flatnonzero(shards == i))[: n * 1000 // num_shards]
                for i, n in times.items()
            ])  # fmt: skip
        found = sampled_of(units[at], shards[at]).units_of_a_row(len(units), times)
        num_held += found.low <= units.mean() <= found.high
        assert (found.high - found.low) / found.value < 0.8
    assert num_held >= 0.92 * trials


def test_a_sample_of_some_shards_for_want_of_time_is_no_better_than_they_are() -> None:
    draws = np.random.default_rng(0)
    num_held = 0
    for _ in range(200):
        of_shard = draws.integers(10, 1000, 60)
        units = np.repeat(of_shard, 50)
        some = draws.permutation(60)[:20]
        at = np.flatnonzero(np.isin(np.repeat(np.arange(60), 50), some))
        sampled = sampled_of(units[at], np.repeat(np.arange(60), 50)[at], is_cut=True)
        found = sampled.units_of_a_row(len(units), None)
        num_held += found.low <= units.mean() <= found.high
    assert num_held >= 184
    one = sampled_of([7] * 50, [3], is_cut=True).units_of_a_row(100, None)
    assert (one.low, one.high) == (0, 14)


def test_of_rows_that_were_all_drawn_all_is_exact() -> None:
    exact = sampled_of([3, 5], [0], num_rejected=2).units_of_a_row(4, None)
    assert exact == Range.exactly(2.0)
    assert sampled_of([], [0]).units_of_a_row(4, None) == Range.exactly(0)
    assert sampled_of([], [0]).rejected(4) == Range(0, 0, 4)


@pytest.mark.parametrize("share", [0.0, 0.004, 0.1, 1.0])
def test_the_range_of_rejected_rows_holds_what_they_are(share: float) -> None:
    """19 times in 20, summed over all numbers of rejected rows that a sample may have."""
    n, num_rows, held = 200, 10_000, 0.0
    for rejected in range(n + 1):
        found = sampled_of([1] * (n - rejected), [0], rejected).rejected(num_rows)
        is_held = found.low <= share * num_rows <= found.high
        held += float(binom.pmf(rejected, n, share)) * is_held
    assert held >= 0.95
    assert sampled_of([1], [0], 3).rejected(4) == Range.exactly(3)
