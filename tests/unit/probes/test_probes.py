"""The probes against cases whose answer is known."""

from __future__ import annotations

import hashlib
import io
from dataclasses import fields, replace
from typing import Any, get_args

import numpy as np
import pytest
import soundfile
from PIL import Image

from fmembed.probes import (
    CHEAP,
    PROBES,
    CaptionedRows,
    Need,
    Sample,
    compete,
    label_rows,
    project,
    run_probe,
)
from fmembed.probes.knn import knn_predict
from fmembed.probes.label_errors import believe, list_suspicious
from fmembed.probes.zeroshot import class_vectors
from fmembed.spec import ProbeName


def data(noise: float, wrong: int = 0) -> Any:
    """300 rows in three groups; the first `wrong` labels are moved to the next group."""
    rng = np.random.default_rng(0)
    truth = np.arange(300) % 3
    vectors = (np.eye(8)[truth] + noise * rng.normal(size=(300, 8))).astype(np.float32)
    labels = [f"class {(t + (i < wrong)) % 3}" for i, t in enumerate(truth)]
    texts = [f"word{t} filler{i % 7}" for i, t in enumerate(truth)]
    hashes = [hashlib.blake2b(str(i).encode(), digest_size=16).hexdigest() for i in range(300)]
    return label_rows([f"r{i}" for i in range(300)], hashes, vectors, labels, None, texts)


def test_the_config_names_every_probe_and_a_probe_only_what_a_sample_has() -> None:
    assert tuple(PROBES) == get_args(ProbeName)
    assert set(get_args(Need)) == {f.name for f in fields(Sample)}
    for probe in PROBES.values():
        assert probe.NEEDS
        assert set(get_args(Need)) >= probe.NEEDS
        # Both are made of the labelled rows.
        assert "labels" in probe.NEEDS or not probe.NEEDS & {"prompts", "competitor"}


@pytest.mark.parametrize("name", ["knn", "linear", "clustering"])
def test_good_vectors_score_and_baselines_do_not(name: str) -> None:
    result = run_probe(name, Sample(data(noise=0.05)))
    assert result["headline"]["value"] > 0.99
    assert result["headline"]["low"] <= result["headline"]["value"] <= result["headline"]["high"]
    assert result["baselines"]["majority"]["value"] < 0.5
    chance = result["baselines"]["shuffled labels"]
    assert chance["low"] <= chance["value"] <= chance["high"] < 0.6
    assert chance["shuffles"] >= 20
    assert chance["p"] < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", ["knn", "linear"])
def test_vectors_that_say_nothing_score_as_chance(name: str) -> None:
    result = run_probe(name, Sample(data(noise=1000.0)))
    assert result["headline"]["value"] < 0.6
    assert result["baselines"]["shuffled labels"]["p"] > 0.05


@pytest.mark.slow
def test_wrong_labels_are_the_suspicious_ones() -> None:
    result = run_probe("linear", Sample(data(noise=0.05, wrong=4)))
    assert {s["row_id"] for s in result["suspicious"][:4]} == {"r0", "r1", "r2", "r3"}


def test_what_no_model_contradicts_takes_no_place_among_the_suspicious(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twelve rows are hardly believed, and yet nothing is believed more: that is no contradiction.

    Two are contradicted, with more belief left.
    """

    class Told:
        classes_ = np.arange(3)

        def predict_proba(self, vectors: Any) -> Any:
            return vectors

    monkeypatch.setattr("fmembed.probes.label_errors.fit", lambda *_: Told())
    made = data(noise=0.05)
    vectors = np.eye(3, dtype=np.float32)[made.labels]
    vectors[:12] = 0.12
    vectors[np.arange(12), made.labels[:12]] = 0.16
    for i in (50, 60):
        vectors[i] = 0.0
        vectors[i, [made.labels[i], (made.labels[i] + 1) % 3]] = (0.4, 0.6)
    made = replace(made, vectors=vectors)
    found = list_suspicious(made, believe(made, 1.0))
    assert {s["row_id"] for s in found} == {"r50", "r60"}


def test_clustering_begins_with_the_score_that_chance_does_not_raise() -> None:
    rng = np.random.default_rng(0)
    labels = [f"class {i % 40:02d}" for i in range(200)]
    hashes = [hashlib.blake2b(str(i).encode(), digest_size=16).hexdigest() for i in range(200)]
    vectors = rng.normal(size=(200, 8)).astype(np.float32)
    made = label_rows([str(i) for i in range(200)], hashes, vectors, labels, None, None)
    result = run_probe("clustering", Sample(made))
    scores = {s["metric"]: s for s in result["scores"]}
    assert result["headline"] == scores["AMI"]
    assert abs(scores["AMI"]["value"]) < 0.1 < 0.5 < scores["V-measure"]["value"]
    assert all(s["low"] <= s["value"] <= s["high"] for s in scores.values())


def test_rows_that_are_each_a_label_of_their_own_are_no_clusters() -> None:
    """They would be found again without a mistake, whatever the vectors say."""
    ids = [str(i) for i in range(200)]
    hashes = [hashlib.blake2b(i.encode(), digest_size=16).hexdigest() for i in ids]
    vectors = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    made = label_rows(ids, hashes, vectors, ids, None, None)
    assert run_probe("clustering", Sample(made))["skipped"] == (
        "200 labels for 200 rows: needs two rows of a label"
    )


def test_tfidf_is_a_real_competitor() -> None:
    competitor = compete(data(noise=1000.0))
    assert competitor is not None
    assert competitor.accuracy["value"] > 0.99


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
    full = label_rows(rows, hashes, vectors, ["a"] * 200, None, None)
    assert (full.test[::2] == full.test[1::2]).all()
    assert 0.1 < full.test.mean() < 0.3
    half = label_rows(rows[:100], hashes[:100], vectors[:100], ["a"] * 100, None, None)
    assert (half.test == full.test[:100]).all()


def test_the_datasets_own_split_wins() -> None:
    splits = ["train"] * 8 + ["test"] * 2
    own = label_rows(
        list("abcdefghij"), ["0" * 32] * 10, np.zeros((10, 2), np.float32), ["x", "y"] * 5, splits,
        None,
    )  # fmt: skip
    assert own.test.tolist() == [False] * 8 + [True] * 2


def test_one_label_is_skipped_with_a_reason() -> None:
    one = label_rows(["a"], ["0" * 32], np.zeros((1, 2), np.float32), ["x"], None, None)
    assert "two labels" in run_probe("knn", Sample(one))["skipped"]


@pytest.mark.parametrize("rows", [0, 1, 5, 60])
def test_project(rows: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(rows, 6)).astype(np.float32)
    _, flat = project(vectors)
    assert flat.shape == (rows, 2)
    assert np.isfinite(flat).all()


def brute_rank(queries: Any, candidates: Any, query: int, own: set[int]) -> int:
    """The place of the first candidate that belongs to a query, by sorting them all."""
    unit = lambda v: v / np.linalg.norm(v)  # noqa: E731
    scores = [float(unit(queries[query]) @ unit(c)) for c in candidates]
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    return min(order.index(j) for j in own)


def test_zeroshot_averages_normalised_templates_and_normalises_again() -> None:
    # Not normalised, the long second template would drown the first one of class 0.
    prompts = np.array([[[1, 0], [0, 50]], [[0, 1], [0, 1]]], np.float32)
    found = class_vectors(prompts)
    np.testing.assert_allclose(found, [[0.5**0.5, 0.5**0.5], [0, 1]], atol=1e-6)
    rows = np.array([[3, 2.9], [0, 7], [1, 0]], np.float32)
    made = label_rows(
        ["a", "b", "c"], ["0" * 32, "1" * 32, "2" * 32], rows, ["x", "y", "y"], None, None
    )
    result = run_probe("zeroshot", Sample(made, prompts=prompts))
    # Rows a and c are nearer to class x; c is of class y.
    assert result["headline"]["value"] == pytest.approx(2 / 3)
    recall = next(s for s in result["scores"] if s["metric"] == "mean recall by class")
    assert recall["value"] == pytest.approx((1 + 1 / 2) / 2)
    assert result["num_test"] == 3
    assert result["num_train"] == 0


def test_zeroshot_counts_the_first_five_and_keeps_to_a_named_split() -> None:
    classes = [f"c{i}" for i in range(8)]
    prompts = np.eye(8, dtype=np.float32)[:, None]
    # Each row's own class comes fourth.
    rows = np.array(
        [np.roll([1.0, 0.9, 0.8, 0.7, 0, 0, 0, 0], i - 3) for i in range(8)], np.float32
    )
    splits = ["train"] * 4 + ["test"] * 4
    hashes = [f"{i:032x}" for i in range(8)]
    made = label_rows(classes, hashes, rows, classes, splits, None)
    result = run_probe("zeroshot", Sample(made, prompts=prompts))
    assert [(s["metric"], s.get("k"), s["value"]) for s in result["scores"][:2]] == [
        ("accuracy", 1, 0.0), ("accuracy", 5, 1.0),
    ]  # fmt: skip
    assert result["num_test"] == 4


def test_crossmodal_is_what_sorting_everything_gives() -> None:
    rng = np.random.default_rng(3)
    row_codes = np.array([0, 0, 1, 2, 3, 4, 5, 6, 7, 7])
    caption_codes = np.array([0, 1, 2, 2, 3, 4, 5, 6, 7, 7])
    rows = rng.normal(size=(8, 4)).astype(np.float32)
    captions = (rng.normal(size=(8, 4)) + rows).astype(np.float32)
    pairs_of = CaptionedRows(rows[row_codes], captions[caption_codes], row_codes, caption_codes)
    result = run_probe("crossmodal", Sample(captions=pairs_of))
    found = {(s["metric"], s["k"]): s["value"] for s in result["scores"]}
    pairs = set(zip(row_codes.tolist(), caption_codes.tolist(), strict=True))
    for way, queries, candidates, own in (
        ("row to caption", rows, captions, {i: {c for r, c in pairs if r == i} for i in range(8)}),
        ("caption to row", captions, rows, {i: {r for r, c in pairs if c == i} for i in range(8)}),
    ):
        ranks = [brute_rank(queries, candidates, i, own[i]) for i in range(8)]
        for k in (1, 5):
            assert found[f"recall {way}", k] == pytest.approx(np.mean([r < k for r in ranks]))
    assert ("recall row to caption", 10) not in found  # of eight, all are among the first ten
    # Nine pairs of eight rows and eight captions.
    assert result["baselines"]["chance"]["value"] == pytest.approx(9 / 8 / 8)


def test_crossmodal_breaks_ties_by_order_and_needs_two_captions() -> None:
    same = np.ones((3, 2), np.float32)
    codes = np.arange(3)
    result = run_probe("crossmodal", Sample(captions=CaptionedRows(same, same, codes, codes)))
    assert result["headline"]["value"] == pytest.approx(1 / 3)
    one = CaptionedRows(same, same, codes, np.zeros(3, np.int64))
    assert "two captions" in run_probe("crossmodal", Sample(captions=one))["skipped"]


def test_cheap_features_tell_pictures_and_sounds_apart() -> None:
    def picture(value: int) -> bytes:
        sink = io.BytesIO()
        Image.new("RGB", (40, 30), (value, 0, 255)).save(sink, "PNG")
        return sink.getvalue()

    def tone(hz: float) -> bytes:
        sink = io.BytesIO()
        wave = np.sin(np.arange(8000) * 2 * np.pi * hz / 16_000)
        soundfile.write(sink, wave, 16_000, format="WAV")
        return sink.getvalue()

    name, pixels = CHEAP["image"]([picture(0), picture(255), b"broken", None])
    assert (name, pixels.shape) == ("raw pixels", (4, 768))
    np.testing.assert_allclose(pixels[1, :3], [1, 0, 1])
    assert not pixels[2:].any()
    name, bands = CHEAP["audio"]([tone(300), tone(3000), b"broken"])
    assert (name, bands.shape) == ("mel statistics", (3, 80))
    assert bands[0, :40].argmax() < bands[1, :40].argmax()
    assert not bands[2].any()


@pytest.mark.slow
def test_cheap_features_compete_under_their_name() -> None:
    truth = np.arange(100) % 2
    hashes = [hashlib.blake2b(str(i).encode(), digest_size=16).hexdigest() for i in range(100)]
    noise = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
    cheap = ("raw pixels", np.eye(2, dtype=np.float32)[truth])
    made = label_rows(
        [str(i) for i in range(100)], hashes, noise, truth.tolist(), None, None, cheap
    )
    competitor = compete(made)
    assert competitor is not None
    assert competitor.accuracy["value"] == 1
    assert competitor.hits.all()
    gap = run_probe("knn", Sample(made, competitor=competitor))["baselines"][
        "raw pixels + logistic regression"
    ]["difference"]
    assert gap["low"] < gap["value"] < gap["high"] < 0
    for probe, name in (("knn", "logistic regression"), ("clustering", "k-means")):
        result = run_probe(probe, Sample(made, competitor=competitor))
        assert result["baselines"][f"raw pixels + {name}"]["value"] == 1
        assert result["headline"]["value"] < 0.8


def test_the_map_of_equal_vectors_is_a_point() -> None:
    method, flat = project(np.ones((60, 8), dtype=np.float32))
    assert (method, flat.tolist()) == ("none", [[0.0, 0.0]] * 60)
