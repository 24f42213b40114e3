"""k nearest neighbours, after DINOv2's eval/knn.py.

Vectors L2-normalised, cosine similarity; softmax with T = 0.07 over the top max(k), then for each k
the weights of the first k are summed by label.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fmembed.probes.arrays import Floats, Ints
from fmembed.probes.data import Need, Sample, majority, normalized
from fmembed.probes.intervals import accuracy, shuffled_accuracy

VERSION = 3
NEEDS: frozenset[Need] = frozenset(("labels", "competitor", "leaks"))
_KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
_CHUNK_ROWS = 1024


def run(sample: Sample) -> dict[str, Any]:
    """Accuracy on the test split for each k, capped at the train size.

    The headline is the smallest k, not the best one: choosing k by the test split would flatter
    the vectors.
    """
    data = sample.split_rows()
    train, test = ~data.test, data.test
    ks = sorted({min(k, int(train.sum())) for k in _KS})
    truth, contents = data.labels[test], data.contents[test]
    predicted = knn_predict(
        data.vectors[train], data.labels[train], data.vectors[test], ks, len(data.classes)
    )
    scores = [{"metric": "accuracy", "k": k, **accuracy(truth, predicted[k], contents)} for k in ks]
    return {
        "scores": scores,
        "headline": scores[0],
        "leaks": sample.leaks and sample.leaks.left(truth, predicted[ks[0]]),
        "baselines": {
            "majority": majority(data),
            "shuffled labels": shuffled_accuracy(truth, predicted[ks[0]], contents),
            f"{data.cheap_name} + logistic regression": sample.competitor
            and sample.competitor.against(data, predicted[ks[0]]),
        },
    }


def knn_predict(
    train: Floats, train_labels: Ints, test: Floats, ks: list[int], num_classes: int
) -> dict[int, Ints]:
    """Label each test vector by its weighted neighbours.

    Args:
        train: Shape (train rows, dim).
        train_labels: Shape (train rows,), in [0, num_classes).
        test: Shape (test rows, dim).
        ks: Ascending; each at most the number of train rows.
        num_classes: Number of labels.

    Returns:
        For each k the predicted labels, shape (test rows,).
    """
    train, test = normalized(train), normalized(test)
    predicted: dict[int, list[Ints]] = {k: [] for k in ks}
    for start in range(0, len(test), _CHUNK_ROWS):
        similarity = test[start : start + _CHUNK_ROWS] @ train.T
        # A stable sort: neighbours at the same distance come in the train split's order.
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, : ks[-1]]
        logits = np.take_along_axis(similarity, nearest, axis=1) / TEMPERATURE
        weights = np.exp(logits - logits[:, :1])
        weights /= weights.sum(axis=1, keepdims=True)
        labels = train_labels[nearest]
        for k in ks:
            votes = np.zeros((len(labels), num_classes))
            rows = np.repeat(np.arange(len(labels)), k)
            np.add.at(votes, (rows, labels[:, :k].ravel()), weights[:, :k].ravel())
            predicted[k].append(votes.argmax(axis=1))
    return {k: np.concatenate(chunks) for k, chunks in predicted.items()}
