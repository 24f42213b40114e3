"""Protocols against the code of those whose they are, on the same arrays and without a network."""

from __future__ import annotations

import hashlib
import socket
from typing import Any

import datasets
import numpy as np
import pytest
from mteb.abstasks.classification import AbsTaskClassification
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta
from sklearn.datasets import load_digits, load_wine
from sklearn.linear_model import LogisticRegression

from fmembed.probes import PROBES, Sample, dinov2, label_rows, run_probe
from fmembed.probes.classification import cross_validate, experiments


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("asks the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def rows(name: str, split: bool) -> Any:
    """Digits, or wines: 178 rows of 13 numbers of very unlike sizes."""
    bunch = load_digits() if name == "digits" else load_wine()
    vectors, labels = bunch.data.astype(np.float32), bunch.target
    hashes = [hashlib.blake2b(v.tobytes(), digest_size=16).hexdigest() for v in vectors]
    splits = ["test" if i % 4 == 0 else "train" for i in range(len(labels))] if split else None
    ids = [str(i) for i in range(len(labels))]
    return label_rows(ids, hashes, vectors, [str(v) for v in labels], splits, None)


class _Stored(AbsEncoder):
    """Looks the vectors up by the row's number, which is its text."""

    mteb_model_meta = ModelMeta.create_empty()

    def __init__(self, vectors: Any) -> None:
        self._vectors = vectors

    def encode(self, inputs: Any, **_: Any) -> Any:
        return np.concatenate([self._vectors[[int(t) for t in b["text"]]] for b in inputs])


def theirs(data: Any, cross_validated: bool) -> list[dict[str, float]]:
    class Task(AbsTaskClassification):
        metadata = TaskMetadata(
            name="Ours", description="x", reference=None, type="Classification",
            category="t2c", modalities=["text"],
            eval_splits=["train" if cross_validated else "test"],
            eval_langs=["eng-Latn"], main_score="accuracy", date=("2020-01-01", "2020-01-02"),
            domains=[], task_subtypes=[], license="mit", annotations_creators="derived",
            dialect=[], sample_creation="found", bibtex_citation="",
            dataset={"path": "x/x", "revision": "x"},
        )  # fmt: skip
        is_cross_validation = cross_validated

        def load_data(self, **_: Any) -> None:
            def of(places: Any) -> datasets.Dataset:
                told = [int(data.labels[i]) for i in places]
                return datasets.Dataset.from_dict({"text": [str(i) for i in places], "label": told})

            every = np.arange(len(data.labels))
            parts = {"train": every if cross_validated else every[~data.test]}
            if not cross_validated:
                parts["test"] = every[data.test]
            self.dataset = datasets.DatasetDict({k: of(v) for k, v in parts.items()})
            self.data_loaded = True

    task = Task()
    split = "train" if cross_validated else "test"
    scores: Any = task.evaluate(_Stored(data.vectors), split, encode_kwargs={})
    found: list[dict[str, float]] = scores["default"]["scores_per_experiment"]
    return found


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", ["digits", "wine"])
@pytest.mark.parametrize("cross_validated", [False, True])
def test_classification_is_mteb_s_in_every_experiment(name: str, cross_validated: bool) -> None:
    data = rows(name, split=not cross_validated)
    expected = theirs(data, cross_validated)
    found = cross_validate(data) if cross_validated else experiments(data)
    ours = [float((data.labels[judged] == said).mean()) for judged, said in found]
    np.testing.assert_allclose(ours, [e["accuracy"] for e in expected], atol=1e-9)
    assert len(set(ours)) > 1
    told = run_probe("classification@mteb", Sample(data))
    for score, key in zip(told["scores"], ("accuracy", "f1"), strict=True):
        assert score["value"] == pytest.approx(np.mean([e[key] for e in expected]), abs=1e-9)
        assert score["low"] <= score["value"] <= score["high"]
    assert told["num_test"] == (len(data.labels) if cross_validated else data.test.sum())


@pytest.mark.slow
def test_logistic_regression_is_dinov2_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the steps of its log_regression.py, by scikit-learn in place of cuML."""
    grid = 10 ** np.linspace(-6, 5, 45)
    np.testing.assert_allclose(dinov2.C_GRID, grid)
    few = tuple(grid[::6])  # 45 fits to such a tolerance are minutes
    monkeypatch.setattr(dinov2, "C_GRID", few)
    data = rows("digits", split=True)
    train = np.flatnonzero(~data.test)
    x, y = data.vectors.astype(np.float64), data.labels
    held: list[int] = []
    for label in np.unique(y):
        mine = sorted(train[y[train] == label], key=lambda i: data.contents[i])
        held += mine[: max(1, int(0.1 * len(mine)))]
    rest = np.setdiff1d(train, held)

    def fitted(c: float, on: Any) -> Any:
        return LogisticRegression(C=c, max_iter=1000, tol=1e-12).fit(x[on], y[on])

    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        right = [fitted(c, rest).score(x[held], y[held]) for c in few]
        best = few[int(np.argmax(right))]
        expected = fitted(best, train).score(x[data.test], y[data.test])
    told = run_probe("linear@dinov2", Sample(data))
    assert told["C"] == pytest.approx(best)
    assert told["headline"]["value"] == pytest.approx(expected, abs=1e-6)


def test_a_tenth_of_each_label_is_held_out() -> None:
    labels = np.repeat([0, 1, 2, 3], [95, 20, 2, 1])
    held = dinov2.hold_out(labels, np.arange(len(labels))[::-1])
    assert [int(held[labels == k].sum()) for k in range(4)] == [9, 2, 1, 0]
    assert held[86:95].all()  # the smallest hashes


def test_more_labels_tell_more() -> None:
    found = run_probe("fewshot", Sample(rows("digits", split=True)))
    values = [s["value"] for s in found["scores"]]
    assert [s["k"] for s in found["scores"]] == [1, 5, 10, 50]
    assert values == sorted(values)
    assert found["headline"]["k"] == 10
    for score in found["scores"]:
        assert score["low"] < score["value"] < score["high"]
    # A single draw says less than the draws' spread would have it.
    assert found["scores"][0]["high"] - found["scores"][0]["low"] > 0.02


@pytest.mark.parametrize("name", ["fewshot", "linear@dinov2", "classification@mteb"])
@pytest.mark.parametrize("kind", ["noise", "constant"])
def test_what_says_nothing_scores_as_chance(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dinov2, "C_GRID", (1e-3, 1.0))
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(600, 8)).astype(np.float32)
    vectors = vectors if kind == "noise" else np.ones_like(vectors)
    labels = [str(v) for v in rng.integers(0, 4, 600)]
    hashes = [hashlib.blake2b(str(i).encode(), digest_size=16).hexdigest() for i in range(600)]
    data = label_rows([str(i) for i in range(600)], hashes, vectors, labels, None, None)
    told = run_probe(name, Sample(data))
    assert told["headline"]["value"] < 0.36
    assert told["baselines"]["shuffled labels"]["p"] > 0.01


def test_names_say_whose_a_protocol_is() -> None:
    assert [name.partition("@")[2] for name in PROBES if "@" in name] == ["dinov2", "mteb"]
