"""What vectors are like: figures against other ways of computing them, and planted faults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from IsoScore import IsoScore
from scipy import stats
from sklearn.datasets import load_digits

from fmembed.probes import Graph, Sample, health, run_probe
from fmembed.probes.data import normalized
from fmembed.probes.neighbours import nearest

NUM, DIM = 1500, 24


def cloud(num: int = NUM, dim: int = DIM, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(num, dim)).astype(np.float32)


def graph(vectors: Any, contents: Any = None) -> Graph:
    """Of all rows, each of a content of its own where none are given."""
    usable = np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)
    at = np.flatnonzero(usable)
    unit = normalized(vectors[at])
    found = nearest(unit, at, [(at, unit)])
    rows = np.full((len(vectors), found.rows.shape[1]), -1)
    distances = np.full(rows.shape, np.inf, dtype=np.float32)
    rows[at], distances[at] = found.rows, found.distances
    codes = np.arange(len(vectors)) if contents is None else contents
    ids = [f"r{i}" for i in range(len(vectors))]
    return Graph(ids, codes, vectors, type(found)(rows, distances), len(vectors))


def look(vectors: Any, contents: Any = None) -> dict[str, Any]:
    return run_probe("health", Sample(graph=graph(vectors, contents)))


def kinds(found: dict[str, Any]) -> list[str]:
    return [finding["kind"] for finding in found["findings"]]


def figures(found: dict[str, Any]) -> dict[str, float]:
    return {f["name"]: f["value"] for f in found["figures"]}


@pytest.mark.parametrize("num_blocks", [1, 7])
def test_neighbours_are_the_nearest_of_all_whatever_the_blocks(num_blocks: int) -> None:
    unit = normalized(cloud(300))
    unit[11] = unit[200]  # a copy, which is nearest to its twin
    at = np.arange(300)
    blocks = [(part, unit[part]) for part in np.array_split(at, num_blocks)]
    found = nearest(unit[10:90], at[10:90], blocks, k=9)
    distances = np.linalg.norm(unit[10:90, None].astype(float) - unit[None].astype(float), axis=2)
    distances[np.arange(80), at[10:90]] = np.inf
    expected = np.argsort(distances, axis=1, kind="stable")[:, :9]
    np.testing.assert_array_equal(found.rows, expected)
    np.testing.assert_allclose(
        found.distances, np.take_along_axis(distances, expected, axis=1), atol=1e-6
    )
    assert found.rows[1, 0] == 200
    np.testing.assert_allclose(found.cosines, 1 - found.distances.astype(float) ** 2 / 2)


def test_of_few_rows_the_places_that_are_left_are_empty() -> None:
    unit = normalized(cloud(3))
    found = nearest(unit, np.arange(3), [(np.arange(3), unit)], k=5)
    assert (np.sort(found.rows[:, :2], axis=1) == [[1, 2], [0, 2], [0, 1]]).all()
    assert (found.rows[:, 2:] == -1).all()
    assert np.isinf(found.distances[:, 2:]).all()


def test_figures_are_those_of_their_papers() -> None:
    vectors = cloud() * np.linspace(0.2, 2, DIM) + 0.5
    unit = normalized(vectors)
    found = health.figures(vectors)
    pairs = unit.astype(float) @ unit.astype(float).T
    upper = pairs[np.triu_indices(NUM, 1)]
    assert found["mean cosine"] == pytest.approx(upper.mean())
    assert found["uniformity"] == pytest.approx(np.log(np.exp(-2 * (2 - 2 * upper)).mean()))
    values = np.linalg.svd(unit.astype(float) - unit.astype(float).mean(axis=0), compute_uv=False)
    assert found["effective rank"] == pytest.approx(np.exp(stats.entropy(values)))
    raw = np.linalg.svd(vectors.astype(float), compute_uv=False)
    assert found["RankMe"] == pytest.approx(np.exp(stats.entropy(raw)), rel=1e-4)
    assert found["participation ratio"] == pytest.approx((values**2).sum() ** 2 / (values**4).sum())
    near = np.argsort(-pairs + 9 * np.eye(NUM), axis=1)[:, :10]
    counts = np.bincount(near.ravel(), minlength=NUM)
    assert found["hubness"] == pytest.approx(stats.skew(counts))
    assert found["antihubs"] == pytest.approx((counts == 0).mean())
    assert found["places of hubs"] == pytest.approx(counts[counts >= 20].sum() / counts.sum())
    assert found["Robin Hood"] == pytest.approx(np.abs(counts - 10).sum() / 2 / counts.sum())


@pytest.mark.parametrize("dim", [2, 5, 9])
def test_the_intrinsic_dimension_is_that_of_the_surface(dim: int) -> None:
    flat = np.random.default_rng(0).uniform(size=(4000, dim))
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(40, 40)))[0][:dim]
    # Far from the origin, so that directions are nearly places.
    vectors = (np.full(40, 50.0) + flat @ turn).astype(np.float32)
    near = nearest(normalized(vectors), np.arange(4000), [(np.arange(4000), normalized(vectors))])
    found = health.two_nn(near.distances[:, 0], near.distances[:, 1])
    assert found == pytest.approx(dim, rel=0.15)


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_isoscore_is_that_of_its_authors() -> None:
    vectors = cloud() * np.linspace(0.1, 3, DIM) + 1
    theirs = float(IsoScore.IsoScore(torch.tensor(vectors)))
    assert health.isoscore(vectors) == pytest.approx(theirs, abs=1e-6)


def test_directions_that_all_are_alike_have_an_isoscore_of_one_and_one_of_zero() -> None:
    assert health.isoscore(cloud(20_000)) > 0.99
    line = cloud(500) * np.eye(DIM, dtype=np.float32)[0]
    assert health.isoscore(line) == pytest.approx(0, abs=1e-6)
    assert health.isoscore(cloud(500, 1)) == 0


@pytest.mark.parametrize("name", ["cloud", "digits"])
def test_of_what_is_well_nothing_is_said(name: str) -> None:
    # Pixels of digits: a border that is always blank is a fault of theirs, not of what is tested.
    pixels = load_digits().data.astype(np.float32)
    found = look(cloud() if name == "cloud" else pixels[:, pixels.any(axis=0)])
    assert not found["findings"]
    of = figures(found)
    random = {f["name"]: f["random"] for f in found["figures"] if "random" in f}
    assert of.keys() > random.keys()
    assert 1 < of["effective rank"] <= DIM if name == "cloud" else of["effective rank"] > 10
    assert abs(random["mean cosine"]) < 0.01


def _dead(v: Any) -> None:
    v[:, 3] = 1e-33


def _constant(v: Any) -> None:
    v[:, 4] = 0.7


def _dominant(v: Any) -> None:
    v[:, 5] = 20 + v[:, 5]


def _hub(v: Any) -> None:
    v += 0.8
    v[7] = v.mean(axis=0)


def _collapsed(v: Any) -> None:
    v *= 0.01
    v += 1


def _thin(v: Any) -> None:
    v[:] = v[:, :1] * np.arange(1, DIM + 1)


def _broken(v: Any) -> None:
    v[5, 1] = np.nan


def _zero(v: Any) -> None:
    v[5] = 0


PLANTED = {
    "dead dimension": (_dead, "dimension 3: 0 in all rows, but for rounding"),
    "constant dimension": (_constant, "dimension 4: the same number in all rows"),
    "dominant dimension": (_dominant, "dimension 5 has "),
    "hub": (_hub, "among the ten nearest of a tenth of all rows: r7 of "),
    "collapsed": (_collapsed, "the vectors have collapsed"),
    "not finite": (_broken, "1 vector holds a NaN"),
    "zero": (_zero, "1 vector is of length 0"),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_fault_is_named_and_no_other(kind: str) -> None:
    plant, words = PLANTED[kind]
    vectors = cloud(dim=200 if kind == "hub" else DIM)  # of few dimensions there are none
    plant(vectors)
    found = look(vectors)
    assert kinds(found) == [kind]
    assert words in found["findings"][0]["words"]


def test_vectors_on_a_line_have_collapsed() -> None:
    vectors = cloud()
    _thin(vectors)
    assert "collapsed" in kinds(look(vectors))


def test_near_copies_are_found_and_nothing_else() -> None:
    vectors, rng = cloud(), np.random.default_rng(3)
    planted = rng.permutation(NUM)[:30].reshape(2, 15)
    noise = 0.01 * cloud(15, seed=5)
    vectors[planted[0]] = vectors[planted[1]] + noise
    found = look(vectors)
    assert kinds(found) == ["near copies"]
    finding = found["findings"][0]
    assert finding["words"].startswith("30 rows are nearly copies (cosine of 0.9")
    groups = {frozenset(group) for group in finding["rows"]}
    pairs = {frozenset((f"r{a}", f"r{b}")) for a, b in planted.T}
    assert groups <= pairs
    assert figures(found)["rows, near copies"] == 30


@pytest.mark.parametrize("share", [0.6, 0.9])
def test_of_a_table_that_is_mostly_copies_all_are_found(share: float) -> None:
    """Of far more copies of one row than a row has neighbours, too."""
    vectors = cloud()
    num = int(share * NUM)
    kept = np.arange(num) // 100
    vectors[:num] = vectors[NUM - 20 + kept]
    contents = np.arange(NUM)
    contents[:num] = contents[NUM - 20 + kept]
    found = figures(look(vectors, contents))
    assert found["rows, copies"] == num + len(np.unique(kept))
    assert found["rows, same vector"] == found["rows, near copies"] == 0
    # As unlike contents of one vector, which is another matter.
    found = figures(look(vectors))
    assert found["rows, copies"] == 0
    assert found["rows, same vector"] == num + len(np.unique(kept))


def test_too_few_rows_are_no_reason_to_fail() -> None:
    assert "skipped" in look(cloud(1))
    assert "skipped" in run_probe("health", Sample(graph=None))
    assert not look(cloud(3))["findings"]


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_what_is_told_does_not_depend_on_the_scale(scale: float) -> None:
    before, after = figures(look(cloud())), figures(look(cloud() * np.float32(scale)))
    assert not look(cloud() * np.float32(scale))["findings"]
    for name in before.keys() - {f"length, {n}" for n in ("shortest", "middle", "longest")}:
        assert after[name] == pytest.approx(before[name], rel=1e-3), name


def test_what_is_told_does_not_depend_on_the_order() -> None:
    rng = np.random.default_rng(1)
    flat = rng.normal(size=(2500, 4)) @ rng.normal(size=(4, 64))
    vectors = np.concatenate([flat, rng.normal(size=(2500, 64))]).astype(np.float32)
    order = rng.permutation(len(vectors))
    one = graph(vectors)
    ids = [one.row_ids[i] for i in order]
    other = replace(graph(vectors[order]), row_ids=ids)
    told = [run_probe("health", Sample(graph=g)) for g in (one, other)]
    assert kinds(told[0]) == kinds(told[1]) == []
    for name, value in figures(told[0]).items():
        assert figures(told[1])[name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("dim", [3, 4, 5, 8])
def test_of_few_dimensions_rows_that_are_near_by_chance_are_no_copies(dim: int) -> None:
    for seed in range(3):
        found = figures(look(cloud(2000, dim, seed)))
        assert found["rows, near copies"] <= 4


def test_a_denser_class_is_no_group_of_copies() -> None:
    vectors = cloud(2000, 64)
    vectors[:300] = 3 * cloud(1, 64, 4) + 0.3 * vectors[:300]
    assert not look(vectors)["findings"]


def test_groups_of_many_near_copies_are_found() -> None:
    vectors = np.repeat(cloud(100, 64), 20, axis=0) + 0.001 * cloud(2000, 64, 3)
    assert figures(look(vectors))["rows, near copies"] == 2000


def test_copies_take_each_other_s_places_and_make_no_hub() -> None:
    vectors = cloud(1500)
    vectors[:200] = vectors[0]
    assert kinds(look(vectors)) == ["same vector"]
    twice = cloud(1500)
    twice[10] = 2 * twice[20]  # one direction, and not one vector
    assert kinds(look(twice)) == ["near copies"]


def test_the_worst_vectors_are_told_of_too() -> None:
    assert kinds(look(np.full((50, 8), np.nan, dtype=np.float32))) == ["not finite"]
    assert kinds(look(np.zeros((50, 8), dtype=np.float32))) == ["zero"]


def test_most_dimensions_may_be_dead_and_one_of_few_dominant() -> None:
    vectors = cloud(500, 64)
    vectors[:, 10:] *= 1e-33
    assert kinds(look(vectors)) == ["dead dimension"]
    few = cloud(500, 8)
    few[:, 2] *= 30
    assert "dominant dimension" in kinds(look(few))


@pytest.mark.parametrize("num", [5, 50])
def test_of_few_rows_no_dimension_is_judged(num: int) -> None:
    vectors = np.sign(cloud(num, 64))
    vectors[:, 3] = 1
    assert not look(vectors)["findings"]
