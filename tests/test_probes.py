"""The probes against cases whose answer is known."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from fmembed.probes import PROBES, make_probe_data, project, run_probe, tfidf_accuracy
from fmembed.probes.knn import knn_predict


def data(noise: float, wrong: int = 0) -> Any:
    """300 rows in three groups; the first `wrong` labels are moved to the next group."""
    rng = np.random.default_rng(0)
    truth = np.arange(300) % 3
    vectors = (np.eye(8)[truth] + noise * rng.normal(size=(300, 8))).astype(np.float32)
    labels = [f"class {(t + (i < wrong)) % 3}" for i, t in enumerate(truth)]
    texts = [f"word{t} filler{i % 7}" for i, t in enumerate(truth)]
    hashes = [hashlib.blake2b(str(i).encode(), digest_size=16).hexdigest() for i in range(300)]
    return make_probe_data([f"r{i}" for i in range(300)], hashes, vectors, labels, None, texts)


@pytest.mark.parametrize("name", list(PROBES))
def test_good_vectors_score_and_baselines_do_not(name: str) -> None:
    result = run_probe(name, data(noise=0.05), tfidf=None)
    assert result["headline"]["value"] > 0.99
    assert result["headline"]["low"] <= result["headline"]["value"] <= result["headline"]["high"]
    assert result["baselines"]["majority"]["value"] < 0.5
    assert result["baselines"]["shuffled labels"]["value"] < 0.6


@pytest.mark.parametrize("name", ["knn", "linear"])
def test_vectors_that_say_nothing_score_as_chance(name: str) -> None:
    result = run_probe(name, data(noise=1000.0), tfidf=None)
    assert result["headline"]["value"] < 0.6


def test_wrong_labels_are_the_suspicious_ones() -> None:
    result = run_probe("linear", data(noise=0.05, wrong=4), tfidf=None)
    assert {s["row_id"] for s in result["suspicious"][:4]} == {"r0", "r1", "r2", "r3"}


def test_tfidf_is_a_real_competitor() -> None:
    accuracy = tfidf_accuracy(data(noise=1000.0))
    assert accuracy is not None
    assert accuracy["value"] > 0.99


def test_knn_is_weighted_by_similarity() -> None:
    train = np.array([[1, 0], [0.8, 0.6], [0.8, -0.6]], dtype=np.float32)
    test = np.array([[1, 0]], dtype=np.float32)
    # exp(1 / 0.07) against 2 * exp(0.8 / 0.07): the nearest outweighs two that are further off.
    predicted = knn_predict(train, np.array([0, 1, 1]), test, [1, 3], 2)
    assert predicted[1].tolist() == [0]
    assert predicted[3].tolist() == [0]


def test_split_keeps_copies_together_and_rows_in_place() -> None:
    hashes = [hashlib.blake2b(str(i // 2).encode()).hexdigest() for i in range(200)]
    rows = [f"r{i}" for i in range(200)]
    vectors = np.zeros((200, 2), np.float32)
    full = make_probe_data(rows, hashes, vectors, ["a"] * 200, None, None)
    assert (full.test[::2] == full.test[1::2]).all()
    assert 0.1 < full.test.mean() < 0.3
    half = make_probe_data(rows[:100], hashes[:100], vectors[:100], ["a"] * 100, None, None)
    assert (half.test == full.test[:100]).all()


def test_the_datasets_own_split_wins() -> None:
    splits = ["train"] * 8 + ["test"] * 2
    own = make_probe_data(
        list("abcdefghij"), ["0" * 32] * 10, np.zeros((10, 2), np.float32), ["x", "y"] * 5, splits,
        None,
    )  # fmt: skip
    assert own.test.tolist() == [False] * 8 + [True] * 2


def test_one_label_is_skipped_with_a_reason() -> None:
    one = make_probe_data(["a"], ["0" * 32], np.zeros((1, 2), np.float32), ["x"], None, None)
    assert "two labels" in run_probe("knn", one, None)["skipped"]


@pytest.mark.parametrize("rows", [0, 1, 5, 60])
def test_project(rows: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(rows, 6)).astype(np.float32)
    _, flat = project(vectors)
    assert flat.shape == (rows, 2)
    assert np.isfinite(flat).all()
