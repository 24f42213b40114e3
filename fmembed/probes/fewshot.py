"""How far a few labels go: logistic regression on 1, 5, 10 and 50 rows of each label.

Each number is drawn twenty times from the train split, and judged on the whole test split. The
interval is of the mean over draws and rows, both of which are a sample.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fmembed.probes.arrays import SEED, Ints
from fmembed.probes.data import LabelledRows, Need, Sample, UnfitError, fit, majority
from fmembed.probes.intervals import averaged, shuffled_accuracy

VERSION = 1
NEEDS: frozenset[Need] = frozenset(("labels",))

_NUM_ROWS = (1, 5, 10, 50)
_NUM_DRAWS = 20
_C = 1.0


def run(sample: Sample) -> dict[str, Any]:
    """Mean accuracy on the test split for each number; that of ten comes first, or the most."""
    data = sample.split_rows()
    train = ~data.test
    fewest = int(np.bincount(data.labels[train]).clip(min=0).max())
    numbers = [k for k in _NUM_ROWS if k <= fewest]
    if not numbers:
        raise UnfitError("needs rows of each label in the train split")
    scores, first = [], None
    for k in numbers:
        predicted = np.stack([_predict(data, k, seed) for seed in range(_NUM_DRAWS)])
        first = predicted[0] if first is None else first
        scores.append({"metric": "accuracy", "k": k, **_score(data, predicted)})
    assert first is not None
    headline = next((s for s in scores if s["k"] == 10), scores[-1])
    return {
        "scores": scores,
        "headline": headline,
        "baselines": {
            "majority": majority(data),
            "shuffled labels": shuffled_accuracy(data.labels[data.test], first),
        },
    }


def draw(labels: Ints, k: int, seed: int) -> Ints:
    """k rows of each label, or as many as it has; shape (rows that are drawn,)."""
    rng = np.random.default_rng([SEED, k, seed])
    return np.concatenate(
        [rng.permutation(np.flatnonzero(labels == label))[:k] for label in np.unique(labels)]
    )


def _predict(data: LabelledRows, k: int, seed: int) -> Ints:
    train = np.flatnonzero(~data.test)
    rows = train[draw(data.labels[train], k, seed)]
    model = fit(data.vectors[rows], data.labels[rows], _C)
    found: Ints = model.predict(data.vectors[data.test].astype(np.float64))
    return found


def _score(data: LabelledRows, predicted: Ints) -> dict[str, float]:
    hits = predicted == data.labels[data.test]
    value, num_draws = float(hits.mean()), len(hits)
    of_rows = (hits.mean(axis=0) - value) / hits.shape[1]
    of_draws = (hits.mean(axis=1) - value) / np.sqrt(num_draws * (num_draws - 1))
    return averaged(value, np.concatenate([of_rows, of_draws]), hits.shape[1])
