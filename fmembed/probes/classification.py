"""mteb's classification: ten logistic regressions on eight rows a label each (mteb 2.26).

Where the dataset has no split of its own it is cross-validated in five folds, as mteb's tasks of
one split are; still on eight rows a label of the others. The draws form a chain: each shuffles the
order that the last one has left with the same seed. Vectors are as they are, and 100 iterations are
all: of unscaled ones that is not enough, and a part of the protocol.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from fmembed.probes.arrays import Bools, Floats, Ints
from fmembed.probes.data import LabelledRows, Need, Sample, UnfitError, majority
from fmembed.probes.intervals import averaged, moved_by_class, shuffled_accuracy

VERSION = 1
NEEDS: frozenset[Need] = frozenset(("labels",))

_NUM_EXPERIMENTS, _ROWS_EACH, _NUM_FOLDS, _SEED = 10, 8, 5, 42


def run(sample: Sample) -> dict[str, Any]:
    """Mean accuracy and macro-F1 of the experiments, as mteb has them."""
    data = sample.split_rows()
    found = cross_validate(data) if not data.named_split else experiments(data)
    accuracy, macro = [], []
    moved = np.zeros((2, len(data.labels)))
    num = np.zeros(len(data.labels))
    for judged, predicted in found:
        truth, at = data.labels[judged], np.flatnonzero(judged)
        hits = predicted == truth
        accuracy.append(float(hits.mean()))
        value, moves, _ = moved_by_class(truth, predicted, "F1")
        macro.append(value)
        # A row that is judged in all experiments is one unit, whatever they say of it.
        moved[0, at] += (hits - hits.mean()) / len(at) / len(found)
        moved[1, at] += moves / len(found)
        num[at] += 1
    is_judged = num > 0
    scores = [
        {"metric": metric, **averaged(float(np.mean(values)), moves[is_judged], is_judged.sum())}
        for metric, values, moves in (
            ("accuracy", accuracy, moved[0]), ("macro F1", macro, moved[1]),
        )
    ]  # fmt: skip
    judged, predicted = found[0]
    return {
        "scores": scores,
        "headline": scores[0],
        "num_test": int(is_judged.sum()),
        "baselines": {
            "majority": majority(data),
            # Of the first experiment alone: all of them would be shuffled in ten ways.
            "shuffled labels": shuffled_accuracy(data.labels[judged], predicted),
        },
    }


def experiments(data: LabelledRows) -> list[tuple[Bools, Ints]]:
    """For each experiment the rows that are judged, shape (rows,), and what it says of them."""
    train = np.flatnonzero(~data.test)
    order: list[int] = list(range(len(train)))
    found = []
    for _ in range(_NUM_EXPERIMENTS):
        chosen = train[draw(data.labels[train], order)]
        found.append((data.test, _predict(data, chosen, data.test)))
    return found


def cross_validate(data: LabelledRows) -> list[tuple[Bools, Ints]]:
    """The same by folds of all rows."""
    from sklearn.model_selection import KFold

    if len(data.labels) < _NUM_FOLDS:
        raise UnfitError(f"{len(data.labels)} rows: needs {_NUM_FOLDS}")
    order: list[int] = []
    found = []
    folds = KFold(_NUM_FOLDS, shuffle=True, random_state=_SEED).split(data.labels)
    for train, test in folds:
        order = order or list(range(len(train)))
        chosen = train[draw(data.labels[train], order)]
        judged = np.zeros(len(data.labels), dtype=np.bool_)
        judged[test] = True
        if len(np.unique(data.labels[chosen])) < 2:
            raise UnfitError("a fold leaves one label to train on")
        found.append((judged, _predict(data, chosen, judged)))
    return found


def draw(labels: Ints, order: list[int]) -> Ints:
    """The first rows of each label in an order, which is shuffled first; and stays so.

    Args:
        labels: Shape (rows,).
        order: A permutation of some of the rows.
    """
    np.random.RandomState(_SEED).shuffle(order)
    taken: dict[int, int] = {}
    chosen = []
    for i in order:
        label = int(labels[i])
        if taken.get(label, 0) < _ROWS_EACH:
            taken[label] = taken.get(label, 0) + 1
            chosen.append(i)
    return np.array(chosen, dtype=np.int64)


def _predict(data: LabelledRows, chosen: Ints, judged: Bools) -> Ints:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    vectors: Floats = data.vectors
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(max_iter=100, random_state=_SEED)
        model.fit(vectors[chosen], data.labels[chosen])
    return np.asarray(model.predict(vectors[judged]), dtype=np.int64)
