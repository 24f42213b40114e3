"""Vectors of several models, judged by the same probe on the same rows: who is better, surely.

Each row is judged by a probe that was trained without it and its copies (`paired`), so two models
differ in the contents that one gets right and the other not: a sign test over those (McNemar 1947),
Holm's correction over all pairs (1979), and for each model the ranks that no pair rules out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from fmembed.probes.arrays import Bools, Ints
from fmembed.probes.intervals import difference

# Pairs that differ by chance in fewer of a hundred comparisons are told apart.
_SURE = 0.05


@dataclass(frozen=True)
class Pair:
    """Two models, by their names: by how much `two` is better than `one`, with a 95 % interval; `p`
    after Holm's correction; `is_tie` where that is no surprise.
    """

    one: str
    two: str
    value: float
    low: float
    high: float
    p: float
    is_tie: bool


def compare_pairs(hits: Mapping[str, Bools], contents: Ints) -> list[Pair]:
    """Compare each with each.

    Args:
        hits: By name, whether each row was said right, shape (rows,): the same rows of all.
        contents: Rows of one content have one number, and count once; shape (rows,).
    """
    names = list(combinations(hits, 2))
    adjusted = holm([sign_test(hits[one], hits[two], contents) for one, two in names])
    found = []
    for (one, two), p in zip(names, adjusted, strict=True):
        gap = difference(hits[one], hits[two], contents, doubts=1)
        found.append(Pair(one, two, gap["value"], gap["low"], gap["high"], p, p > _SURE))
    return found


def sign_test(one: Bools, two: Bools, contents: Ints) -> float:
    """How often chance alone makes a difference as large, of contents that only one gets right."""
    from scipy.stats import binomtest

    codes = np.unique(contents, return_inverse=True)[1]
    gain = np.bincount(codes, two.astype(np.float64) - one.astype(np.float64))
    num_better, num_worse = int((gain > 0).sum()), int((gain < 0).sum())
    if not num_better + num_worse:
        return 1.0
    return float(binomtest(num_better, num_better + num_worse).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Each p as large as it has to be for so many comparisons at once; in the order given."""
    order = np.argsort(p, kind="stable")
    steps = np.asarray(p, dtype=np.float64)[order] * (len(p) - np.arange(len(p)))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1) if len(p) else steps
    return [float(v) for v in adjusted]


def rank_intervals(names: Sequence[str], pairs: Sequence[Pair]) -> dict[str, tuple[int, int]]:
    """The best and the worst rank that each may have: 1 more than are surely better, and as many
    fewer than all as are surely worse.
    """
    better, worse = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for pair in pairs:
        if pair.is_tie:
            continue
        first, second = (pair.two, pair.one) if pair.value > 0 else (pair.one, pair.two)
        worse[first] += 1
        better[second] += 1
    return {name: (1 + better[name], len(names) - worse[name]) for name in names}


def pareto(points: Mapping[str, Sequence[float]]) -> list[str]:
    """The names that none of the others is as good as in all, and better in one; larger is better.

    Args:
        points: By name the same figures each.
    """

    def beats(a: Sequence[float], b: Sequence[float]) -> bool:
        both = list(zip(a, b, strict=True))
        return all(x >= y for x, y in both) and any(x > y for x, y in both)

    return [n for n, own in points.items() if not any(beats(o, own) for o in points.values())]
