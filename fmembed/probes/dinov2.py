"""Logistic regression as DINOv2 has it: 45 values of C from 10^-6 to 10^5, chosen on a tenth of the
train split, then fitted on all of it; features as they are, in float64, to a tolerance of 1e-12 or
1,000 iterations.

The tenth is one of each label, as DINOv3 takes it: the rows with the smallest content hashes, so
that it is the same in every run.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from fmembed.probes.arrays import Bools, Floats, Ints
from fmembed.probes.data import LabelledRows, Need, Sample, majority
from fmembed.probes.intervals import accuracy, mean_by_class, shuffled_accuracy

VERSION = 1
NEEDS: frozenset[Need] = frozenset(("labels", "competitor", "leaks"))

C_GRID = tuple(float(c) for c in 10.0 ** np.linspace(-6, 5, 45))
_MAX_ITER, _TOLERANCE = 1000, 1e-12


def run(sample: Sample) -> dict[str, Any]:
    """Accuracy and the mean recall of the labels, on the test split."""
    data = sample.split_rows()
    train, truth = np.flatnonzero(~data.test), data.labels[data.test]
    contents = data.contents[data.test]
    held = hold_out(data.labels[train], data.contents[train])
    c = choose(data.vectors[train], data.labels[train], held)
    predicted = fit(data.vectors[train], data.labels[train], c).predict(_wide(data, data.test))
    scores = [
        {"metric": "accuracy", **accuracy(truth, predicted, contents)},
        {"metric": "mean recall", **mean_by_class(truth, predicted, "recall")},
    ]
    return {
        "scores": scores,
        "headline": scores[0],
        "C": c,
        "leaks": sample.leaks and sample.leaks.left(truth, predicted),
        "baselines": {
            "majority": majority(data),
            "shuffled labels": shuffled_accuracy(truth, predicted, contents),
            f"{data.cheap_name} + logistic regression": sample.competitor
            and sample.competitor.against(data, predicted),
        },
    }


def hold_out(labels: Ints, contents: Ints) -> Bools:
    """A tenth of each label, one row at least of two and more; shape (rows,).

    Args:
        labels: Shape (rows,).
        contents: Ranks of the content hashes, shape (rows,).
    """
    held = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        rows = rows[np.argsort(contents[rows], kind="stable")]
        held[rows[: max(1, len(rows) // 10) if len(rows) > 1 else 0]] = True
    return held


def choose(vectors: Floats, labels: Ints, held: Bools) -> float:
    """The first C of the grid that says most of the labels held out, when fitted on the others."""
    if not held.any() or len(np.unique(labels[~held])) < 2:
        return 1.0
    wide = vectors[held].astype(np.float64)
    right = [
        int((fit(vectors[~held], labels[~held], c).predict(wide) == labels[held]).sum())
        for c in C_GRID
    ]
    return C_GRID[int(np.argmax(right))]


def fit(vectors: Floats, labels: Ints, c: float) -> Any:
    """Fit it at one C."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # No number of iterations reaches such a tolerance at the upper end of the grid.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=c, max_iter=_MAX_ITER, tol=_TOLERANCE)
        return model.fit(vectors.astype(np.float64), labels)


def _wide(data: LabelledRows, rows: Bools) -> Floats:
    return np.asarray(data.vectors[rows].astype(np.float64))
