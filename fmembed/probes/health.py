"""What vectors are like, whatever they are for: no label is looked at.

Each figure stands beside what as many random vectors of as many dimensions have, of which nothing
can be learned; what is far from what a usable model has is said in words, with the rows that show
it. The formulas are those of the papers that are named with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fmembed.probes.arrays import SEED, Bools, Floats, Ints
from fmembed.probes.copies import find_copies
from fmembed.probes.data import Graph, Need, Sample, UnfitError, normalized
from fmembed.probes.neighbours import nearest

VERSION = 1
NEEDS: frozenset[Need] = frozenset(("graph",))

# Figures that grow with the number of rows are of so many, whatever the table's size: those of the
# spectrum, and those of neighbours.
SPECTRUM_ROWS, NEIGHBOUR_ROWS = 2000, 5000
_K = 10
# Rows that are no farther apart are one, but for rounding.
_SAME = 1e-6
# RankMe's guard against a logarithm of nothing (Garrido et al. 2023).
_RANKME_EPS = 1e-7
# A dimension whose spread is this share of that of most others is constant.
_CONSTANT, _MOST = 1e-4, 0.9
# One that has this share of all squares by itself is dominant, if that is so many times its part;
# of fewer dimensions, nearly all there is.
_DOMINANT, _TIMES_ITS_PART, _NEARLY_ALL = 0.25, 10.0, 0.9
# Of fewer rows some dimension is always the same.
_MIN_ROWS = 100
# Vectors are one over this mean cosine, or where they go in so small a share of the directions that
# random ones of their number would.
_COLLAPSED_COSINE, _COLLAPSED_SHARE = 0.95, 0.02
# A row that is among the ten nearest of so many others is a hub.
_HUB_SHARE, _HUB_TIMES = 0.1, 20
_MAX_NAMED = 5


def run(sample: Sample) -> dict[str, Any]:
    """Figures, and what is wrong, in words."""
    graph = sample.graph_of_rows()
    vectors = graph.vectors
    is_finite: Bools = np.asarray(np.isfinite(vectors).all(axis=1))
    lengths = np.linalg.norm(np.where(is_finite[:, None], vectors, 0).astype(np.float64), axis=1)
    is_usable: Bools = is_finite & (vectors != 0).any(axis=1)
    usable = np.flatnonzero(is_usable)
    wrong = list(_judge_rows(is_finite, lengths))
    if len(usable) < 2 or vectors.shape[1] < 3:
        if not wrong:
            raise UnfitError("needs two rows of three numbers at least")
        return _told(graph, [], wrong)
    # Some that do not depend on the order of the rows.
    by_id = usable[np.argsort([graph.row_ids[i] for i in usable], kind="stable")]
    rng = np.random.default_rng(SEED)
    some = rng.permutation(by_id)[:NEIGHBOUR_ROWS]
    now = figures(vectors[some])
    dim = vectors.shape[1]
    chance = figures(rng.standard_normal((len(some), dim)).astype(np.float32))
    low, middle, high = np.quantile(lengths[usable], [0, 0.5, 1])
    copies = find_copies(graph)
    wrong += _judge_directions(now, chance, len(some))
    wrong += _judge_dimensions(vectors[usable])
    wrong += _judge_hubs(graph, copies.same)
    wrong += copies.findings()
    told = [
        *({"name": n, "value": v, "random": chance[n]} for n, v in now.items()),
        {"name": "length, shortest", "value": float(low)},
        {"name": "length, middle", "value": float(middle)},
        {"name": "length, longest", "value": float(high)},
        *copies.figures(),
    ]
    return _told(graph, told, wrong)


def _told(
    graph: Graph, figures: list[dict[str, Any]], findings: list[dict[str, Any]]
) -> dict[str, Any]:
    seen = {"num_test": len(graph.vectors), "num_rows": graph.num_rows}
    return {**seen, "figures": figures, "findings": findings}


def figures(vectors: Floats) -> dict[str, float]:
    """What can be said of any rows, by name.

    Args:
        vectors: Shape (rows, dim), finite and not of length 0, two rows at least.
    """
    unit = normalized(vectors)
    few = vectors[:SPECTRUM_ROWS] / np.abs(vectors[:SPECTRUM_ROWS]).max()
    near = nearest(unit, np.arange(len(unit)), [(np.arange(len(unit)), unit)], _K)
    return {
        **spectrum(few),
        "mean cosine": mean_cosine(unit),
        "uniformity": uniformity(unit[:SPECTRUM_ROWS]),
        "intrinsic dimension": two_nn(near.distances[:, 0], near.distances[:, 1]),
        **hubness(near.rows),
    }


def spectrum(vectors: Floats) -> dict[str, float]:
    """How many directions rows go in, shape (rows, dim); the figures grow with their number.

    `effective rank` is the exponential of the entropy of the singular values of the normalised and
    centred rows (Roy and Vetterli 2007); `RankMe` the same of the rows as they are (Garrido et al.
    2023), which their mean and single long rows decide; `participation ratio` the square of the sum
    of their variances over the sum of the squares; `IsoScore` is 1 where all directions have the
    same variance, 0 where one has all (Rudman et al. 2022).
    """
    unit = normalized(vectors).astype(np.float64)
    values = np.linalg.svd(unit - unit.mean(axis=0), compute_uv=False)
    raw = np.linalg.svd(vectors.astype(np.float64), compute_uv=False)
    variances = values**2
    total = float(variances.sum())
    return {
        "effective rank": _exp_entropy(values / values.sum()) if total else 1.0,
        "RankMe": _exp_entropy(raw / raw.sum() + _RANKME_EPS),
        "participation ratio": total**2 / float((variances**2).sum()) if total else 1.0,
        "IsoScore": isoscore(vectors),
    }


def _exp_entropy(shares: Floats) -> float:
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def isoscore(vectors: Floats) -> float:
    """IsoScore of rows as they are, shape (rows, dim); 0 of fewer than two rows or dimensions."""
    dim = vectors.shape[1]
    if dim < 2 or len(vectors) < 2:
        return 0.0
    # The variances along the principal components.
    variances = np.linalg.eigvalsh(np.cov(vectors.astype(np.float64), rowvar=False))
    length = float(np.linalg.norm(variances))
    if not length:
        return 0.0
    scaled = variances * math.sqrt(dim) / length
    most = dim - math.sqrt(dim)
    defect = float(np.linalg.norm(scaled - 1)) / math.sqrt(2 * most)
    used = (dim - defect**2 * most) ** 2 / dim**2
    return float((dim * used - 1) / (dim - 1))


def mean_cosine(unit: Floats) -> float:
    """Of all pairs of rows of length 1, shape (rows, dim): (n |mean|^2 - 1) / (n - 1)."""
    n = len(unit)
    return float((n * (unit.astype(np.float64).mean(axis=0) ** 2).sum() - 1) / (n - 1))


def uniformity(unit: Floats) -> float:
    """log of the mean of exp(-2 |x - y|^2) over all pairs of rows of length 1, shape (rows, dim):
    the lower, the more evenly they are spread (Wang and Isola 2020).
    """
    wide = unit.astype(np.float64)
    cosines = (wide @ wide.T)[np.triu_indices(len(wide), 1)]
    return float(np.log(np.exp(-4 * (1 - cosines)).mean()))


def two_nn(first: Floats, second: Floats) -> float:
    """The intrinsic dimension, by how much farther the second neighbour is than the first (Facco et
    al. 2017).

    Args:
        first: The distance of each row to its nearest, shape (rows,); copies are left out.
        second: To the one after it.

    Returns:
        0 of fewer than ten rows.
    """
    apart = (first > _SAME) & np.isfinite(second)
    ratios = np.sort(second[apart].astype(np.float64) / first[apart])
    kept = int(len(ratios) * 0.9)  # the largest tenth is noise, as the authors say
    if kept < 9:
        return 0.0
    x = np.log(ratios[:kept])
    y = -np.log(1 - np.arange(kept) / len(ratios))
    return float((x @ y) / (x @ x)) if x.any() else 0.0


def hubness(rows: Ints) -> dict[str, float]:
    """How the places among neighbours are spread over the rows.

    `hubness` is the skewness of how often a row has one (Radovanovic et al. 2010); `antihubs` the
    share of rows that have none; `places of hubs` the share of places that rows have which have
    twice their part; `Robin Hood` the share that would have to be given away for all to have it.

    Args:
        rows: The k nearest of each row, shape (rows, k), in [0, rows); -1 is none.
    """
    num, k = rows.shape
    counts = np.bincount(rows[rows >= 0].ravel(), minlength=num).astype(np.float64)
    off, total = counts - counts.mean(), counts.sum()
    spread = float((off**2).mean())
    return {
        "hubness": float((off**3).mean() / spread**1.5) if spread else 0.0,
        "antihubs": float((counts == 0).mean()),
        "places of hubs": float(counts[counts >= 2 * k].sum() / total),
        "Robin Hood": float(np.abs(off).sum() / 2 / total),
    }


def _finding(kind: str, words: str, rows: Sequence[Sequence[str]] = ()) -> dict[str, Any]:
    return {"kind": kind, "words": words, "rows": [list(group) for group in rows]}


def _judge_rows(is_finite: Bools, lengths: Floats) -> Iterator[dict[str, Any]]:
    num_broken, num_zero = int((~is_finite).sum()), int((is_finite & (lengths == 0)).sum())
    if num_broken:
        hold = "vector holds" if num_broken == 1 else "vectors hold"
        yield _finding("not finite", f"{num_broken:,} {hold} a NaN or an infinity")
    if num_zero:
        are = "vector is" if num_zero == 1 else "vectors are"
        yield _finding("zero", f"{num_zero:,} {are} of length 0, and like no other")


def _judge_directions(
    now: dict[str, float], chance: dict[str, float], num: int
) -> Iterator[dict[str, Any]]:
    rank, could = now["effective rank"], chance["effective rank"]
    is_one = now["mean cosine"] > _COLLAPSED_COSINE
    is_thin = rank < min(max(_COLLAPSED_SHARE * could, 2), could / 2)
    if num >= _MIN_ROWS and (is_one or is_thin):
        yield _finding(
            "collapsed",
            "the vectors have collapsed: two rows have a mean cosine of "
            f"{now['mean cosine']:.3f}, and all spread to {rank:,.1f} directions, random ones to "
            f"{could:,.1f}",
        )


def _judge_dimensions(vectors: Floats) -> Iterator[dict[str, Any]]:
    if len(vectors) < _MIN_ROWS:
        return
    wide = vectors.astype(np.float64) / np.abs(vectors).max()
    dim = wide.shape[1]
    squares, spread = (wide**2).mean(axis=0), wide.std(axis=0)
    # all-MiniLM-L6-v2 has three whose numbers are of 1e-33 and 1e-8.
    is_dead = np.sqrt(squares) <= _CONSTANT * np.quantile(np.sqrt(squares), _MOST)
    is_constant = spread <= _CONSTANT * np.quantile(spread, _MOST)
    dead, constant = np.flatnonzero(is_dead), np.flatnonzero(is_constant & ~is_dead)
    share = squares / max(float(squares.sum()), 1e-300)
    least = max(_DOMINANT, min(_TIMES_ITS_PART / dim, _NEARLY_ALL))
    dominant = np.flatnonzero(share >= least)
    for kind, found, what in (
        ("dead", dead, "0 in all rows, but for rounding"),
        ("constant", constant, "the same number in all rows"),
    ):
        if len(found):
            yield _finding(f"{kind} dimension", f"{_name(found)}: {what}")
    for i in dominant:
        yield _finding(
            "dominant dimension",
            f"dimension {i} has {share[i]:.0%} of the squares of all {dim:,}, and decides which "
            "rows are like one another",
        )


def _name(dimensions: Ints) -> str:
    named = ", ".join(map(str, dimensions[:_MAX_NAMED]))
    more = f" and {len(dimensions) - _MAX_NAMED:,} more" if len(dimensions) > _MAX_NAMED else ""
    return f"dimension{'s' if len(dimensions) > 1 else ''} {named}{more}"


def _judge_hubs(graph: Graph, same: Ints) -> Iterator[dict[str, Any]]:
    """Rows of one content or vector are one here: they take each other's places."""
    places = graph.neighbours.rows[:, :_K]
    first = np.unique(same[: len(places)], return_index=True)[1]
    near = np.where(places[first] < 0, -1, same[places[first]])
    near = np.sort(np.where(near == same[first][:, None], -1, near), axis=1)
    is_new = np.concatenate([np.ones((len(near), 1), np.bool_), near[:, 1:] != near[:, :-1]], 1)
    counts = np.bincount(near[is_new & (near >= 0)], minlength=int(same.max()) + 1)
    least = max(_HUB_SHARE * len(first), _HUB_TIMES * _K)
    hubs = np.flatnonzero(counts >= least)
    hubs = hubs[np.argsort(-counts[hubs], kind="stable")]
    if len(hubs):
        shown = [graph.row_ids[int(np.flatnonzero(same == hub)[0])] for hub in hubs[:_MAX_NAMED]]
        yield _finding(
            "hub",
            f"{'one row is' if len(hubs) == 1 else f'{len(hubs):,} rows are'} among the ten nearest"
            f" of a tenth of all rows: {shown[0]} of {int(counts[hubs[0]]):,} of {len(first):,}",
            [shown],
        )
