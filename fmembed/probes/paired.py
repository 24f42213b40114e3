"""Two sets of vectors of the same rows, judged by the same probe on the same rows and split.

Each row is judged by a probe that was trained without it and without its copies, so the difference
of two models is a mean over all rows: of 2,225 articles all count, where a test split has 445.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fmembed.probes.arrays import Bools, Ints
from fmembed.probes.data import LabelledRows, fit, fit_logistic, normalized
from fmembed.probes.knn import TEMPERATURE

# A row's copies have its content, and so its bucket (data.py): a fold has them all or none.
_NUM_FOLDS, _BUCKETS_EACH = 5, 20
_K = 10
_CHUNK_ROWS = 1024


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
