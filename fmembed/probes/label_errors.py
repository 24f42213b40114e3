"""Labels that are probably wrong, by models that have not seen them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fmembed.probes.arrays import Bools, Floats, Ints
from fmembed.probes.data import LabelledRows, fit

_NUM_FOLDS, _BUCKETS_EACH = 5, 20
_NUM_SHOWN = 10


@dataclass(frozen=True)
class Beliefs:
    """What models think of rows that they have not seen.

    `probabilities` (rows, classes), NaN where nobody could judge; `labels` (rows,) as given.
    """

    probabilities: Floats
    labels: Ints

    @property
    def in_label(self) -> Floats:
        """How much the label of each row is believed, shape (rows,): the lower, the likelier is it
        wrong.
        """
        found = self.probabilities[np.arange(len(self.labels)), self.labels]
        return np.asarray(found, dtype=np.float64)

    @property
    def guess(self) -> Ints:
        """What is believed most, shape (rows,); -1 where nobody could judge."""
        is_judged = np.isfinite(self.probabilities).any(axis=1)
        filled = np.nan_to_num(self.probabilities, nan=-1.0)
        return np.where(is_judged, filled.argmax(axis=1), -1)

    def wrong(self) -> Bools:
        """Which labels confident learning takes for wrong, shape (rows,): another one is believed
        more than it is on average of the rows that have it (Northcutt et al. 2021, the confident
        joint off its diagonal).
        """
        own, guess = self.in_label, self.guess
        judged = np.isfinite(own) & (guess >= 0)
        thresholds = np.full(self.probabilities.shape[1], np.inf)
        for k in np.unique(self.labels[judged]):
            thresholds[k] = own[judged & (self.labels == k)].mean()
        believed = np.nan_to_num(self.probabilities, nan=-1.0)
        is_confident = believed >= thresholds - 1e-6
        first = is_confident.argmax(axis=1)
        told = np.where(is_confident.sum(axis=1) > 1, guess, first)
        return np.asarray(
            judged & is_confident.any(axis=1) & (told != self.labels) & (guess != self.labels)
        )


def believe(data: LabelledRows, c: float) -> Beliefs:
    """Five models, each asked about the fifth it was not fitted on; copies of a text share a fifth,
    so a wrong label cannot vouch for itself.

    Args:
        data: All rows, whatever their split.
        c: Of the logistic regression.
    """
    found = np.full((len(data.labels), len(data.classes)), np.nan)
    for k in range(_NUM_FOLDS):
        held = data.bucket // _BUCKETS_EACH == k
        if not held.any() or len(np.unique(data.labels[~held])) < 2:
            continue
        model = fit(data.vectors[~held], data.labels[~held], c)
        rows = np.flatnonzero(held)
        found[rows] = 0.0
        told = model.predict_proba(data.vectors[held].astype(np.float64))
        found[np.ix_(rows, model.classes_)] = told
        # A label that no other fifth has cannot be judged.
        unknown = ~np.isin(data.labels[rows], model.classes_)
        found[rows[unknown], data.labels[rows[unknown]]] = np.nan
    return Beliefs(found, data.labels)


def list_suspicious(data: LabelledRows, beliefs: Beliefs) -> list[dict[str, Any]]:
    """The rows whose label is believed least, of those that another one is believed of more: a rare
    label may be the least believed one of others.
    """
    belief, guess = beliefs.in_label, beliefs.guess
    contradicted = np.flatnonzero(np.isfinite(belief) & (guess >= 0) & (guess != data.labels))
    order = contradicted[np.argsort(belief[contradicted], kind="stable")]
    return [
        {
            "row_id": data.row_ids[i],
            "label": data.classes[data.labels[i]],
            "predicted": data.classes[guess[i]],
            "probability": float(belief[i]),
            "text": data.texts[i][:300] if data.texts is not None else None,
        }
        for i in order[:_NUM_SHOWN]
    ]
