"""Logistic regression on frozen vectors, with the confusion matrix and the suspicious labels."""

from __future__ import annotations

from typing import Any

import numpy as np

from fmembed.probes.data import Need, Sample, fit_logistic, majority
from fmembed.probes.intervals import accuracy, mean_by_class, shuffled_accuracy
from fmembed.probes.label_errors import believe, list_suspicious

VERSION = 3
NEEDS: frozenset[Need] = frozenset(("labels", "competitor", "leaks"))


def run(sample: Sample) -> dict[str, Any]:
    """Accuracy and macro-F1 on the test split, its confusion matrix and the suspicious labels."""
    from sklearn.metrics import confusion_matrix

    data = sample.split_rows()
    train, test = ~data.test, data.test
    truth, contents = data.labels[test], data.contents[test]
    model, c = fit_logistic(data.vectors[train], data.labels[train], data.bucket[train])
    predicted = model.predict(data.vectors[test].astype(np.float64))
    beliefs = believe(data, c)
    scores = [
        {"metric": "accuracy", **accuracy(truth, predicted, contents)},
        {"metric": "macro F1", **mean_by_class(truth, predicted, "F1")},
    ]
    return {
        "scores": scores,
        "headline": scores[0],
        "leaks": sample.leaks and sample.leaks.left(truth, predicted),
        "C": c,
        "baselines": {
            "majority": majority(data),
            "shuffled labels": shuffled_accuracy(truth, predicted, contents),
            f"{data.cheap_name} + logistic regression": sample.competitor
            and sample.competitor.against(data, predicted),
        },
        "confusion": {
            "classes": data.classes,
            "counts": confusion_matrix(
                truth, predicted, labels=np.arange(len(data.classes))
            ).tolist(),
        },
        "suspicious": list_suspicious(data, beliefs),
        "wrong_labels": int(beliefs.wrong().sum()),
    }
