"""What is said of vectors in words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fmembed.evaluate.facts import judge, pick_headlines
from fmembed.result import check_probe


def probe(**more: Any) -> dict[str, Any]:
    score = {"metric": "accuracy", "value": 0.95, "low": 0.93, "high": 0.97}
    chance = {"value": 0.2, "low": 0.1, "high": 0.3, "shuffles": 1000, "p": 0.001}
    rival = {"value": 0.9, "low": 0.88, "high": 0.92,
             "difference": {"value": 0.05, "low": 0.02, "high": 0.08}}  # fmt: skip
    return {
        "probe": "linear", "version": 3, "column": "embedding", "num_train": 400, "num_test": 500,
        "seconds": 1.0, "scores": [score], "headline": score,
        "baselines": {
            "majority": {"value": 0.25, "low": 0.2, "high": 0.3}, "shuffled labels": chance,
            "TF-IDF + logistic regression": rival, **more.pop("baselines", {}),
        },
        **more,
    }  # fmt: skip


def said(*probes: dict[str, Any], columns: tuple[str, ...] = ("embedding",)) -> list[str]:
    for one in probes:  # as it is kept beside a table
        assert check_probe(one, one["probe"], one["column"]) is not None, one
    card: Any = SimpleNamespace(pooled=list(columns))
    return judge(pick_headlines(probes, card))


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ((0.05, 0.02, 0.08), "better than what costs no model: "),
        ((-0.05, -0.08, -0.02), "worse than what costs no model: "),
        ((0.01, -0.02, 0.03), "no better than what costs no model, as far as 500 rows tell: "),
    ],
)
def test_against_what_costs_no_model(difference: tuple[float, ...], words: str) -> None:
    gap = dict(zip(("value", "low", "high"), difference, strict=True))
    rival = {"value": 0.95 - gap["value"], "low": 0.5, "high": 1.0, "difference": gap}
    told = said(probe(baselines={"TF-IDF + logistic regression": rival}))
    of = f"{100 * rival['value']:.1f}%"
    assert told == [
        f"{words}linear tells the label of 95.0% of 500 rows, TF-IDF + logistic regression of {of} "
        f"({100 * gap['value']:+.1f} points, {100 * gap['low']:+.1f} to {100 * gap['high']:+.1f})"
    ]


def test_chance_comes_before_any_competitor() -> None:
    chance = {"value": 0.2, "low": 0.1, "high": 0.3, "shuffles": 1000, "p": 0.2}
    assert said(probe(baselines={"shuffled labels": chance})) == [
        "no better than chance: linear tells the label of 95.0% of 500 rows, 25.0% by saying one"
    ]


def test_without_a_competitor_chance_is_all_there_is() -> None:
    told = said(probe(baselines={"TF-IDF + logistic regression": None}, missing="no text"))
    assert told[0].endswith("25.0% by saying one; no competitor was there")


def test_what_is_wrong_follows() -> None:
    health = {
        "probe": "health", "version": 1, "column": "embedding", "num_train": 0, "num_test": 9,
        "num_rows": 9, "seconds": 0.1, "figures": [],
        "findings": [{"kind": k, "words": k, "rows": []} for k in ("hub", "near copies")],
    }  # fmt: skip
    without = {"value": 0.9, "low": 0.8, "high": 0.95}
    leaks = {"num": 50, "rows": [["a", "b"]], "without": without}
    assert said(health, probe(wrong_labels=7, leaks=leaks))[1:] == [
        "50 test rows are copies of train rows, or nearly: linear tells the label of 90.0% of the "
        "others",
        "to be looked at: hub, near copies",
        "7 labels are contradicted by models that have not seen the row; the report lists the "
        "likeliest to be wrong",
    ]
    assert said({**health, "findings": []}) == []


def test_each_column_is_judged_by_itself() -> None:
    told = said(probe(), probe(column="first"), columns=("embedding", "first"))
    assert [words.partition(":")[0] for words in told] == ["embedding", "first"]


def test_a_probe_that_was_not_run_judges_nothing() -> None:
    skipped = {k: v for k, v in probe().items() if k not in ("headline", "scores", "baselines")}
    knn = probe(probe="knn")
    assert said({**skipped, "skipped": "why"}, knn)[0].startswith("better than what costs no model")
    assert "knn tells" in said({**skipped, "skipped": "why"}, knn)[0]


def test_a_score_of_rows_that_all_leaked_tells_nothing() -> None:
    leaks = {"num": 500, "rows": [["a", "b"]], "without": None}
    assert said(probe(leaks=leaks)) == [
        "all 500 test rows are copies of train rows, or nearly: no score tells anything"
    ]


def test_saying_one_label_costs_no_model_either() -> None:
    most = {"value": 0.97, "low": 0.9, "high": 1.0}
    assert said(probe(baselines={"majority": most})) == [
        "no better than saying one label of all rows: linear tells the label of 95.0% of 500 rows, "
        "that of 97.0%"
    ]


def test_vectors_that_tell_little_are_no_witness_against_labels() -> None:
    low = {"metric": "accuracy", "value": 0.6, "low": 0.5, "high": 0.7}
    assert len(said(probe(wrong_labels=200, headline=low, scores=[low]))) == 1
