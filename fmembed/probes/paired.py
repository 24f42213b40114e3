"""Two sets of vectors of the same rows, judged by the same probe on the same rows and split.

Each row is judged by a probe that was trained without it and without its copies, so the difference
of two models is a mean over all rows: of 2,225 articles all count, where a test split has 445.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fmembed.probes.arrays import SEED, Bools, Ints
from fmembed.probes.data import LabelledRows, fit, fit_logistic, normalized
from fmembed.probes.knn import TEMPERATURE

# A row's copies have its content, and so its bucket (data.py): a fold has them all or none.
_NUM_FOLDS, _BUCKETS_EACH = 5, 20
_K = 10
_CHUNK_ROWS = 1024
_NUM_BOOTSTRAPS = 2000
# One in twenty bootstraps lies below the lower end, and one above the upper one.
_ENDS = (0.05, 0.95)


def hits(probe: str, data: LabelledRows) -> Bools:
    """Whether the probe, trained on other rows, says the label of each row.

    Args:
        probe: A key of JUDGES.
        data: The rows. Those that the dataset's own split trains on are judged by nothing.

    Returns:
        Shape (rows,).
    """
    found = np.zeros(len(data.labels), dtype=np.bool_)
    predict = JUDGES[probe](data)
    for train, test in _folds(data):
        if len(np.unique(data.labels[train])) > 1 and test.any():
            found[test] = predict(train, test) == data.labels[test]
    return found


def judged(data: LabelledRows) -> Bools:
    """The rows that `hits` is about, shape (rows,)."""
    return data.test if data.named_split else np.ones(len(data.labels), dtype=np.bool_)


def difference(old: Bools, new: Bools, groups: Ints) -> dict[str, float]:
    """The difference of two shares of hits, what it is at least and at most: by a paired bootstrap.

    Args:
        old: Shape (rows,).
        new: The same rows, shape (rows,).
        groups: Rows of one content have one number, and are drawn together; shape (rows,).

    Returns:
        `old` and `new`, both shares; `value`, new - old; `low` and `high`, outside of which 5 of
        100 bootstraps are on each side.
    """
    _, codes = np.unique(groups, return_inverse=True)
    size = np.bincount(codes).astype(np.float64)
    moved = np.bincount(codes, new.astype(np.float64) - old.astype(np.float64))
    rng, shares = np.random.default_rng(SEED), np.empty(_NUM_BOOTSTRAPS)
    for i in range(_NUM_BOOTSTRAPS):
        drawn = rng.integers(0, len(size), len(size))
        shares[i] = moved[drawn].sum() / size[drawn].sum()
    low, high = np.quantile(shares, _ENDS)
    return {
        "old": float(old.mean()),
        "new": float(new.mean()),
        "value": float(new.mean() - old.mean()),
        "low": float(low),
        "high": float(high),
    }


def _folds(data: LabelledRows) -> list[tuple[Bools, Bools]]:
    if data.named_split:
        return [(~data.test, data.test)]
    fold = data.bucket // _BUCKETS_EACH
    return [(fold != k, fold == k) for k in range(_NUM_FOLDS)]


_Predict = Callable[[Bools, Bools], Ints]


def _judge_knn(data: LabelledRows) -> _Predict:
    vectors = normalized(data.vectors)

    def predict(train: Bools, test: Bools) -> Ints:
        k, labels, found = min(_K, int(train.sum())), data.labels[train], []
        others, judged = vectors[train].T, vectors[test]
        for start in range(0, len(judged), _CHUNK_ROWS):
            similarity = judged[start : start + _CHUNK_ROWS] @ others
            # Not sorted, as `knn.knn_predict` does: of 20,000 rows that took a minute and a half.
            near = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
            top = np.take_along_axis(similarity, near, axis=1)
            weights = np.exp((top - top.max(axis=1, keepdims=True)) / TEMPERATURE)
            votes = np.zeros((len(near), len(data.classes)))
            rows = np.repeat(np.arange(len(near)), k)
            np.add.at(votes, (rows, labels[near].ravel()), weights.ravel())
            found.append(votes.argmax(axis=1))
        return np.concatenate(found)

    return predict


def _judge_linear(data: LabelledRows) -> _Predict:
    # What is chosen by the rows of the first fold's training holds for all.
    train, _ = _folds(data)[0]
    if len(np.unique(data.labels[train])) < 2:
        return lambda _, test: np.full(int(test.sum()), -1)
    _, c = fit_logistic(data.vectors[train], data.labels[train], data.bucket[train])

    def predict(train: Bools, test: Bools) -> Ints:
        model = fit(data.vectors[train], data.labels[train], c)
        found: Ints = model.predict(data.vectors[test].astype(np.float64))
        return found

    return predict


JUDGES: dict[str, Callable[[LabelledRows], _Predict]] = {
    "knn": _judge_knn,
    "linear": _judge_linear,
}
