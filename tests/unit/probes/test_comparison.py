"""Who is better, and is it sure: against simulations whose answer is known."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy.stats import binomtest

from fmembed.probes.comparison import (
    Pair,
    compare_pairs,
    holm,
    pareto,
    rank_intervals,
    sign_test,
)


def test_a_model_with_itself_plus_noise_is_a_tie_and_a_gap_of_two_points_is_found() -> None:
    """Of 2,000 rows, of which a model gets nine in ten right, and another errs on others now and
    then: on 200 seeds.
    """
    ties = found = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        hard = rng.random(2000)  # what both find hard
        one = hard + 0.05 * rng.normal(size=2000) < 0.9
        again = hard + 0.05 * rng.normal(size=2000) < 0.9
        better = hard + 0.05 * rng.normal(size=2000) < 0.92
        contents = np.arange(2000)
        ties += sign_test(one, again, contents) > 0.05
        found += sign_test(one, better, contents) <= 0.05 and better.sum() > one.sum()
    assert ties >= 190
    assert found >= 160


def test_the_sign_test_counts_contents_once() -> None:
    one, two = np.zeros(40, dtype=bool), np.ones(40, dtype=bool)
    assert sign_test(one, two, np.arange(40)) == pytest.approx(binomtest(40, 40).pvalue)
    assert sign_test(one, two, np.arange(40) // 10) == pytest.approx(2 * 0.5**4)
    assert sign_test(one, one, np.arange(40)) == 1


def test_holm_s_correction() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_ranks_are_those_that_no_pair_rules_out() -> None:
    def pair(one: str, two: str, value: float, is_tie: bool) -> Pair:
        return Pair(one, two, value, value, value, 0.5 if is_tie else 0.001, is_tie)

    pairs = [pair("a", "b", 0.1, False), pair("a", "c", 0.1, True), pair("b", "c", -0.1, True)]
    assert rank_intervals(["a", "b", "c"], pairs) == {"a": (2, 3), "b": (1, 2), "c": (1, 3)}


def test_what_another_beats_in_all_is_off_the_front() -> None:
    points = {"a": (0.9, -100), "b": (0.8, -50), "c": (0.8, -100), "d": (0.9, -100)}
    assert pareto(points) == ["a", "b", "d"]


def test_of_many_alike_hardly_any_pair_is_told_apart() -> None:
    wrong = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        hits = [rng.random(500) < 0.8 for _ in range(5)]
        p = [sign_test(a, b, np.arange(500)) for a, b in combinations(hits, 2)]
        wrong += min(holm(p)) <= 0.05
    assert wrong <= 10


def test_a_pair_says_by_how_much() -> None:
    one, two = np.arange(1000) < 800, np.arange(1000) < 900
    (pair,) = compare_pairs({"a": one, "b": two}, np.arange(1000))
    assert (pair.one, pair.two, pair.is_tie) == ("a", "b", False)
    assert pair.value == pytest.approx(0.1)
    assert 0.07 < pair.low < 0.1 < pair.high < 0.13
