"""Wrong labels and leaked rows: planted, and against another implementation."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from cleanlab.count import num_label_issues
from cleanlab.rank import get_self_confidence_for_each_label
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from fmembed.probes import Sample, find_leaks, label_rows, run_probe
from fmembed.probes.label_errors import Beliefs, believe


def rows(vectors: Any, labels: Any, splits: Any = None, contents: Any = None) -> Any:
    num = len(vectors)
    contents = range(num) if contents is None else contents
    hashes = [hashlib.blake2b(str(c).encode(), digest_size=16).hexdigest() for c in contents]
    ids = [f"r{i}" for i in range(num)]
    return label_rows(ids, hashes, vectors, [str(v) for v in labels], splits, None)


@pytest.mark.parametrize("seed", range(20))
def test_counts_and_ranks_are_those_of_cleanlab(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 6, 400)
    logits = rng.normal(size=(400, 6)) * 2
    logits[np.arange(400), np.where(rng.random(400) < 0.8, labels, rng.integers(0, 6, 400))] += 3
    believed = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = Beliefs(believed, labels)
    assert found.wrong().sum() == num_label_issues(labels, believed)
    theirs = get_self_confidence_for_each_label(labels, believed)
    np.testing.assert_array_equal(found.in_label, theirs)


def test_rows_that_nobody_could_judge_are_not_wrong() -> None:
    believed = np.array([[0.9, 0.1], [0.2, 0.8], [np.nan, np.nan], [0.99, 0.01]])
    found = Beliefs(believed, np.array([0, 1, 1, 1]))
    assert found.guess.tolist() == [0, 1, -1, 0]
    assert found.wrong().tolist() == [False, False, False, True]


@pytest.mark.slow
def test_planted_wrong_labels_are_the_least_believed() -> None:
    digits = load_digits()
    rng = np.random.default_rng(0)
    labels, flipped = digits.target.copy(), rng.random(len(digits.target)) < 0.05
    labels[flipped] = (labels[flipped] + rng.integers(1, 10, int(flipped.sum()))) % 10
    found = believe(rows(digits.data.astype(np.float32) / 16, labels), 1.0)
    assert roc_auc_score(flipped, -found.in_label) >= 0.95
    assert found.wrong().sum() == pytest.approx(flipped.sum(), rel=0.3)
    clean = believe(rows(digits.data.astype(np.float32) / 16, digits.target), 1.0)
    assert clean.wrong().sum() < 0.03 * len(labels)


@pytest.mark.parametrize("kind", ["content", "vector", "nearly"])
def test_leaked_rows_are_all_found_and_the_score_is_told_without_them(kind: str) -> None:
    """Labels that nothing tells, but for the rows that leaked."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(1000, 32)).astype(np.float32)
    labels, contents = rng.integers(0, 2, 1000), np.arange(1000)
    splits = ["test" if i < 200 else "train" for i in range(1000)]
    leaked = np.arange(50)
    vectors[leaked] = vectors[leaked + 500]
    labels[leaked] = labels[leaked + 500]
    if kind == "content":
        contents[leaked] = contents[leaked + 500]
        vectors[leaked] = vectors[leaked + 500] = 0  # by their content alone
    if kind == "nearly":
        vectors[leaked] += rng.normal(0, 0.01, (50, 32)).astype(np.float32)
    data = rows(vectors, labels, splits, contents)
    leaks = find_leaks(data)
    test = [i for i in range(1000) if splits[i] == "test"]
    assert [i for i, is_leaked in zip(test, leaks.is_leaked, strict=True) if is_leaked] == list(
        leaked
    )
    assert leaks.pairs == [[f"r{i}", f"r{i + 500}"] for i in leaked]
    if kind == "content":
        return
    told = run_probe("knn", Sample(labels=data, leaks=leaks))
    assert told["leaks"]["num"] == 50
    assert told["leaks"]["without"]["value"] < told["headline"]["value"]
    assert told["leaks"]["without"]["low"] < 0.5 < told["leaks"]["without"]["high"]


def test_of_a_split_without_leaks_nothing_is_said() -> None:
    rng = np.random.default_rng(0)
    data = rows(rng.normal(size=(300, 16)).astype(np.float32), np.arange(300) % 3)
    leaks = find_leaks(data)
    assert not leaks.is_leaked.any()
    assert run_probe("knn", Sample(labels=data, leaks=leaks))["leaks"] is None


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_copies_of_rows_that_are_there_many_times_leak_too(noise: float) -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(60, 64)).astype(np.float32)
    train = np.repeat(base, 20, axis=0)
    test = np.concatenate([base[:40], rng.normal(size=(20, 64)).astype(np.float32)])
    test[:40] *= 1 + noise
    vectors = np.concatenate([train, test])
    splits = ["train"] * len(train) + ["test"] * len(test)
    leaks = find_leaks(rows(vectors, np.arange(len(vectors)) % 2, splits))
    assert leaks.is_leaked.tolist() == [True] * 40 + [False] * 20


def test_of_labels_that_come_in_copies_chance_is_as_often_right_as_it_should_be() -> None:
    by_chance = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        content = np.repeat(np.arange(60), 15)
        data = rows(
            rng.normal(size=(60, 16)).astype(np.float32)[content],
            rng.integers(0, 2, 60)[content], None, content,
        )  # fmt: skip
        found = run_probe("knn", Sample(labels=data))
        by_chance += found["baselines"]["shuffled labels"]["p"] <= 0.05
        # As few as there are contents.
        assert found["headline"]["high"] - found["headline"]["low"] > 0.2
    assert by_chance <= 6
