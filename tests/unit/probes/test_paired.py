"""What one set of vectors shows more or less than another, by the same probe on the same rows."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from fmembed import probes
from fmembed.probes import intervals, paired
from fmembed.probes.data import LabelledRows


def labelled(num: int, noise: float, seed: int, splits: list[str] | None = None) -> LabelledRows:
    truth = np.random.default_rng(0).integers(0, 3, num)
    rng = np.random.default_rng([seed, 7])
    vectors = (np.eye(12)[truth] + noise * rng.normal(size=(num, 12))).astype(np.float32)
    hashes = [f"{i * 2654435761 % 2**32:032x}" for i in range(num)]
    ids = [f"r{i}" for i in range(num)]
    return probes.label_rows(ids, hashes, vectors, [f"c{t}" for t in truth], splits, None)


def test_each_row_is_judged_by_a_probe_that_has_not_seen_it() -> None:
    """By scikit-learn's own models, a fold after another."""
    data = labelled(300, 0.5, 1)
    fold = data.bucket // 20
    for name in paired.JUDGES:
        expected = np.zeros(300, dtype=bool)
        for k in range(5):
            train, test = fold != k, fold == k
            if name == "knn":
                # Its votes are weighted; of one neighbour there is nothing to weigh.
                model = KNeighborsClassifier(10, metric="cosine", weights=_weigh)
            else:
                _, c = probes.data.fit_logistic(
                    data.vectors[fold != 0], data.labels[fold != 0], data.bucket[fold != 0]
                )
                model = LogisticRegression(C=c, max_iter=1000, random_state=0)
            model.fit(data.vectors[train].astype(np.float64), data.labels[train])
            said = model.predict(data.vectors[test].astype(np.float64))
            expected[test] = said == data.labels[test]
        assert (paired.hits(name, data) == expected).mean() > 0.99
        assert paired.judged(data).all()


def _weigh(distances: np.ndarray) -> np.ndarray:
    return np.exp((1 - distances) / 0.07 - (1 - distances[:, :1]) / 0.07)


def test_the_datasets_own_split_is_kept() -> None:
    splits = ["test" if i % 4 == 0 else "train" for i in range(200)]
    data = labelled(200, 0.5, 1, splits)
    judged = paired.judged(data)
    assert judged.sum() == 50
    assert not paired.hits("knn", data)[~judged].any()


def test_the_difference_and_its_ends() -> None:
    rng = np.random.default_rng(0)
    old = rng.random(4000) < 0.9
    groups = np.arange(4000)
    same = intervals.difference(old, old, groups, 0.1)
    assert (same["value"], same["low"], same["high"]) == (0, 0, 0)
    new = old & (rng.random(4000) > 0.05)
    found = intervals.difference(old, new, groups, 0.1)
    assert found["value"] == pytest.approx(new.mean() - old.mean())
    # 5 % of 4,000 rows, by the normal distribution.
    error = np.sqrt((old & ~new).mean() / 4000) * 1.645
    assert found["low"] == pytest.approx(found["value"] - error, abs=0.001)
    assert found["high"] == pytest.approx(found["value"] + error, abs=0.001)
    # Rows of one content are one draw.
    twins = intervals.difference(old, new, groups // 10, 0.1)
    assert twins["high"] - twins["low"] > found["high"] - found["low"]


@pytest.mark.parametrize("seed", range(8))
def test_a_loss_of_five_points_is_seen_and_none_is_not(seed: int) -> None:
    """As tools/gate_rates.py counts, of a hundred seeds."""
    old = labelled(3000, 0.42, seed)
    worse = labelled(3000, 0.52, seed + 100)
    hits = [paired.hits("knn", data) for data in (old, worse)]
    found = intervals.difference(*hits, np.arange(3000), 0.1)
    assert found["value"] < -0.03
    assert found["low"] < -0.01
    changed = old.vectors.copy()
    changed[:30] = labelled(3000, 0.42, seed + 200).vectors[:30]
    again = paired.hits("knn", _with(old, changed))
    found = intervals.difference(hits[0], again, np.arange(3000), 0.1)
    assert found["low"] > -0.01


def _with(data: LabelledRows, vectors: np.ndarray) -> LabelledRows:
    return LabelledRows(**{**vars(data), "vectors": vectors})
