"""Logistic regression on frozen vectors, with the confusion matrix and the suspicious labels."""

from __future__ import annotations

from typing import Any

import numpy as np

from fmembed.probes.data import LabelledRows, Need, Sample, fit, fit_logistic, majority
from fmembed.probes.intervals import accuracy, mean_by_class, shuffled_accuracy

VERSION = 2
NEEDS: frozenset[Need] = frozenset(("labels", "competitor"))
_NUM_SUSPICIOUS = 10


def run(sample: Sample) -> dict[str, Any]:
    """Accuracy and macro-F1 on the test split, its confusion matrix and the suspicious labels."""
    from sklearn.metrics import confusion_matrix

    data = sample.split_rows()
    train, test = ~data.test, data.test
    truth = data.labels[test]
    model, c = fit_logistic(data.vectors[train], data.labels[train], data.bucket[train])
    predicted = model.predict(data.vectors[test].astype(np.float64))
    scores = [
        {"metric": "accuracy", **accuracy(truth, predicted)},
        {"metric": "macro F1", **mean_by_class(truth, predicted, "F1")},
    ]
    return {
        "scores": scores,
        "headline": scores[0],
        "C": c,
        "baselines": {
            "majority": majority(data),
            "shuffled labels": shuffled_accuracy(truth, predicted),
            f"{data.cheap_name} + logistic regression": sample.competitor,
        },
        "confusion": {
            "classes": data.classes,
            "counts": confusion_matrix(
                truth, predicted, labels=np.arange(len(data.classes))
            ).tolist(),
        },
        "suspicious": _suspicious(data, c),
    }


def _suspicious(data: LabelledRows, c: float) -> list[dict[str, Any]]:
    """The rows whose label a model that has not seen them believes least.

    Five models, each asked about the fifth it was not fitted on; copies of a text share a fifth, so
    a wrong label cannot vouch for itself (after Northcutt et al. 2021, confident learning).
    """
    belief = np.full(len(data.labels), np.nan)
    guess = np.full(len(data.labels), -1)
    for k in range(5):
        held = data.bucket // 20 == k
        if not held.any() or len(np.unique(data.labels[~held])) < 2:
            continue
        model = fit(data.vectors[~held], data.labels[~held], c)
        probabilities = model.predict_proba(data.vectors[held].astype(np.float64))
        column = {int(label): j for j, label in enumerate(model.classes_)}
        rows = np.flatnonzero(held)
        guess[rows] = model.classes_[probabilities.argmax(axis=1)]
        for i, p in zip(rows, probabilities, strict=True):
            if int(data.labels[i]) in column:  # a label no other fifth has cannot be judged
                belief[i] = p[column[int(data.labels[i])]]
    # First those that the models contradict: a rare label may be the least believed one of others.
    contradicted = np.flatnonzero(np.isfinite(belief) & (guess != data.labels))
    order = contradicted[np.argsort(belief[contradicted], kind="stable")]
    return [
        {
            "row_id": data.row_ids[i],
            "label": data.classes[data.labels[i]],
            "predicted": data.classes[guess[i]],
            "probability": float(belief[i]),
            "text": data.texts[i][:300] if data.texts is not None else None,
        }
        for i in order[:_NUM_SUSPICIOUS]
    ]
