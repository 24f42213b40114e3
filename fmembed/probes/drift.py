"""What vectors are like, and how two sets of them differ, without a label."""

from __future__ import annotations

import warnings

import numpy as np

from fmembed.probes.arrays import SEED, Bools, Floats, Ints
from fmembed.probes.data import normalized

_NUM_PAIRS = 20_000
_NEAREST = 10
# Rows that neighbours are looked for among: of 2,000 each finds its ten in 0.1 s.
MAX_NEIGHBOURED = 2000
# Rows of each kind that a classifier is to tell apart.
MAX_ARRIVED, MIN_ARRIVED = 1000, 100
_NUM_FOLDS = 5


def health(vectors: Floats, contents: Ints) -> dict[str, float]:
    """What is wrong with vectors whatever they are for.

    Args:
        vectors: Shape (rows, dim).
        contents: Rows of one content have one number, shape (rows,).

    Returns:
        `not_finite`, the share of rows with a NaN or an infinity, and `zero`, of those of length 0;
        `mean_cosine` of pairs of rows; `rank`, how many directions the rows spread to (the
        exponential of the entropy of the covariance's spectrum, Roy and Vetterli 2007); `copies`,
        the share of contents whose vector another content has too, and `repeated`, of rows whose
        content another row has; `norm_low`, `norm` and
        `norm_high`, the 1st, 50th and 99th percentile of the lengths but 0. Of no row all are 0.
    """
    names = (
        "not_finite", "zero", "mean_cosine", "rank", "copies", "repeated", "norm_low", "norm",
        "norm_high",
    )  # fmt: skip
    if not len(vectors):
        return dict.fromkeys(names, 0.0)
    _, first, num_each = np.unique(contents, return_index=True, return_counts=True)
    is_finite: Bools = np.asarray(np.isfinite(vectors).all(axis=1))
    whole = vectors[first][is_finite[first]].astype(np.float32)
    lengths = np.sqrt((whole**2).sum(axis=1)) if len(whole) else np.zeros(1)
    unit = normalized(whole)
    rng = np.random.default_rng(SEED)
    cosine, rank, copies = 0.0, 0.0, 0.0
    if len(unit) > 1:
        one, other = rng.integers(0, len(unit), (2, _NUM_PAIRS))
        other = np.where(one == other, (one + 1) % len(unit), other)
        cosine = float(np.einsum("ij,ij->i", unit[one], unit[other]).mean())
        spectrum = np.linalg.svd(unit - unit.mean(axis=0), compute_uv=False) ** 2
        share = spectrum[spectrum > 0] / max(float(spectrum.sum()), 1e-12)
        rank = float(np.exp(-(share * np.log(share)).sum()))
        _, counts = np.unique(whole, axis=0, return_counts=True)
        copies = float(counts[counts > 1].sum() / len(whole))
    some = lengths[lengths >= 1e-12]
    low, middle, high = np.percentile(some if len(some) else lengths, [1, 50, 99])
    return {
        "not_finite": float(1 - is_finite.mean()),
        "zero": float((lengths < 1e-12).mean()),
        "mean_cosine": cosine,
        "rank": rank,
        "copies": copies,
        "repeated": float(num_each[num_each > 1].sum() / len(contents)),
        "norm_low": float(low),
        "norm": float(middle),
        "norm_high": float(high),
    }


def mutual_neighbours(old: Floats, new: Floats) -> dict[str, float]:
    """What share of the ten nearest rows is the same by both; and by chance.

    Args:
        old: Shape (rows, dim).
        new: The same rows by another model, shape (rows, any).
    """
    k = min(_NEAREST, len(old) - 1)
    one, other = _nearest(old, k), _nearest(new, k)
    shared = [
        len(np.intersect1d(a, b, assume_unique=True)) for a, b in zip(one, other, strict=True)
    ]
    return {"value": float(np.mean(shared) / k), "by_chance": k / (len(old) - 1)}


def linear_cka(old: Floats, new: Floats) -> float:
    """How alike both are, up to a rotation: 0 to 1 (Kornblith et al. 2019)."""
    x = old.astype(np.float64) - old.mean(axis=0)
    y = new.astype(np.float64) - new.mean(axis=0)
    both, own, other = (float(np.linalg.norm(m)) for m in (x.T @ y, x.T @ x, y.T @ y))
    return both**2 / max(own * other, 1e-300)


def kept_by_a_map(old: Floats, new: Floats) -> float:
    """What an orthogonal map from the old vectors to the new ones keeps of the ten nearest.

    It is fitted on at least half of the rows, and each of the others looks for its ten nearest
    among the new vectors: with its own new vector, and with its mapped old one. The share that both
    find is what a cheap map gives in place of embedding all anew (Vejendla 2025, Drift-Adapter).

    Args:
        old: Shape (rows, dim).
        new: The same rows by another model, shape (rows, any).
    """
    x, y = normalized(old), normalized(new)
    dim = max(x.shape[1], y.shape[1])
    x, y = (np.pad(v, ((0, 0), (0, dim - v.shape[1]))) for v in (x, y))
    is_fit = ~spread(len(x), min(MAX_NEIGHBOURED, len(x)) // 2)
    left, _, right = np.linalg.svd(x[is_fit].astype(np.float64).T @ y[is_fit])
    mapped, true = x[~is_fit] @ (left @ right).astype(np.float32), y[~is_fit]
    k = min(_NEAREST, len(true) - 1)
    one, other = _nearest(true, k), _nearest(mapped, k, among=true)
    shared = [
        len(np.intersect1d(a, b, assume_unique=True)) for a, b in zip(one, other, strict=True)
    ]
    return float(np.mean(shared) / k)


def cosines(old: Floats, new: Floats) -> Floats:
    """Of each row the cosine of its old vector and its new one, shape (rows,)."""
    return np.asarray(np.einsum("ij,ij->i", normalized(old), normalized(new)))


def told_apart(before: Floats, arrived: Floats) -> dict[str, float]:
    """How well a classifier tells what arrived from what was there (Lopez-Paz and Oquab 2017).

    Args:
        before: Shape (rows, dim).
        arrived: Shape (rows, dim), as many rows at most.

    Returns:
        `auc`, 0.5 where it cannot; and `low`, its lower end of 95 in 100 by the error that it has
        where there is no difference.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    num = min(len(before), len(arrived))
    rows = normalized(np.concatenate([before[:num], arrived[:num]])).astype(np.float64)
    is_new = np.repeat([0, 1], num)
    folds = StratifiedKFold(_NUM_FOLDS, shuffle=True, random_state=SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a fit that has not converged
        scores = cross_val_predict(
            LogisticRegression(max_iter=300), rows, is_new, cv=folds, method="predict_proba"
        )[:, 1]
    auc = float(roc_auc_score(is_new, scores))
    error = float(np.sqrt((2 * num + 1) / (12 * num * num)))
    return {"auc": auc, "low": auc - 1.959964 * error}


def _nearest(queries: Floats, k: int, among: Floats | None = None) -> Ints:
    """The k nearest rows of each by cosine, without itself; shape (rows, k)."""
    unit = normalized(queries)
    similarity = unit @ (unit if among is None else normalized(among)).T
    np.fill_diagonal(similarity, -np.inf)
    return np.asarray(np.argpartition(-similarity, k - 1, axis=1)[:, :k])


def spread(num_rows: int, most: int) -> Bools:
    """So many rows at most, drawn evenly; shape (rows,)."""
    chosen = np.zeros(num_rows, dtype=np.bool_)
    chosen[np.random.default_rng(SEED).permutation(num_rows)[:most]] = True
    return chosen
