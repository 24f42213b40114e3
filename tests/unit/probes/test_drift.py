"""What vectors are like and how they differ, each against what is known of the answer."""

from __future__ import annotations

import numpy as np
import pytest

from fmembed.probes import drift


def cloud(num: int = 600, dim: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num, dim)).astype(np.float32)


def rotated(vectors: np.ndarray, seed: int = 9) -> np.ndarray:
    dim = vectors.shape[1]
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]
    return (vectors @ turn).astype(np.float32)


def test_health_of_vectors_that_are_well() -> None:
    found = drift.health(cloud(), np.arange(600))
    assert found["not_finite"] == found["zero"] == found["copies"] == 0
    assert abs(found["mean_cosine"]) < 0.02
    assert 14 < found["rank"] <= 16
    assert found["norm_low"] < found["norm"] < found["norm_high"]


def test_health_of_what_is_broken() -> None:
    vectors = cloud()
    vectors[:6] = np.nan
    vectors[6:12] = 0
    found = drift.health(vectors, np.arange(600))
    assert found["not_finite"] == pytest.approx(0.01)
    assert found["zero"] == pytest.approx(6 / 594)
    assert found["copies"] == pytest.approx(6 / 594)
    # Copies of one content are no fault.
    contents = np.arange(600)
    contents[6:12] = 6
    assert drift.health(vectors, contents)["copies"] == 0
    one = np.ones((50, 4), np.float32) + 1e-3 * cloud(50, 4)
    found = drift.health(one, np.arange(50))
    assert found["mean_cosine"] > 0.999
    assert drift.health(np.zeros((0, 4), np.float32), np.arange(0))["copies"] == 0


def test_a_rotation_changes_no_neighbour_and_a_map_finds_it() -> None:
    old = cloud()
    new = rotated(old)
    assert drift.mutual_neighbours(old, new)["value"] > 0.99
    assert drift.linear_cka(old, new) == pytest.approx(1, abs=1e-6)
    assert drift.kept_by_a_map(old, new) > 0.99
    wider = np.pad(new, ((0, 0), (0, 8)))
    assert drift.kept_by_a_map(old, wider) > 0.99


def test_noise_has_no_neighbour_in_common_but_by_chance() -> None:
    old, new = cloud(2000), cloud(2000, seed=1)
    found = drift.mutual_neighbours(old, new)
    assert found["by_chance"] == pytest.approx(10 / 1999)
    assert found["value"] < 3 * found["by_chance"]
    assert drift.linear_cka(old, new) < 0.1
    assert drift.kept_by_a_map(old, new) < 0.05


def test_cosines_are_of_each_row() -> None:
    old = cloud(5)
    found = drift.cosines(old, np.stack([old[0], 2 * old[1], -old[2], *cloud(2, seed=3)]))
    assert found[:3] == pytest.approx([1, 1, -1], abs=1e-6)


def test_what_arrived_is_told_apart_where_it_differs_and_not_where_it_does_not() -> None:
    alarms = 0
    for seed in range(20):
        same = drift.told_apart(cloud(300, seed=seed), cloud(300, seed=seed + 100))
        alarms += same["auc"] > 0.6 and same["low"] > 0.5
    assert alarms <= 1
    moved = cloud(300, seed=2) + 0.9 * np.eye(16, dtype=np.float32)[0]
    found = drift.told_apart(cloud(300), moved)
    assert found["auc"] > 0.6
    assert found["low"] > 0.5


def test_a_spread_is_of_as_many_rows_as_there_may_be() -> None:
    assert drift.spread(10, 4).sum() == 4
    assert drift.spread(3, 4).all()
