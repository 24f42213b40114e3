"""What a run has done, in lines."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from fmembed import summary
from fmembed.result import RunResult

KNN = {
    "metric": "accuracy", "k": 10, "value": 0.9, "low": 0.8, "high": 0.95,
    "baselines": {"majority": 0.4, "TF-IDF + logistic regression": 0.85},
}  # fmt: skip


HEALTH = {
    "findings": [
        {"kind": "dead dimension", "words": "dimension 3: 0 in all rows", "rows": []},
        {"kind": "copies", "words": "2 rows have the content of another row, in 1 groups",
         "rows": [["a", "b"]]},
    ],
    "figures": {"effective rank": 12.345, "length, middle": 1.0},
    "random": {"effective rank": 23.0}, "num_seen": 10, "num_rows": 12,
}  # fmt: skip


def result(**fields: Any) -> dict[str, Any]:
    made = RunResult(
        run_id="r", started="2026-01-01T00:00:00", table="/out", version=3, fingerprint="f",
        report="/out/_report.html", table_rows=12, seconds=10.0, **fields,
    )  # fmt: skip
    return asdict(made)


def test_a_run_ends_with_rows_scores_table_report_and_time() -> None:
    lines = summary.lines(
        result(rows_read=12, rows_embedded=10, rows_rejected=2, table_rejected=2, rows_per_s=1.0,
               causes={"empty input": 2}, probes={"knn": KNN}, probe_s=3.0)
    )  # fmt: skip
    assert list(lines) == [
        "rows      12 read, 10 embedded, 2 rejected, 0 skipped",
        "knn       accuracy (k = 10) 0.900 [0.800, 0.950]; majority 0.400, TF-IDF + logistic "
        "regression 0.850",
        "rejected  2 empty input: fmembed rejected /out",
        "table     /out version 3",
        "report    /out/_report.html",
        "time      10 s; 1.0 rows/s; probes and report 3 s more",
    ]


@pytest.mark.parametrize(("pieces", "is_told"), [(0, False), (31, True)])
def test_pieces_are_told_where_they_are_rows(pieces: int, is_told: bool) -> None:
    lines = list(summary.lines(result(rows_embedded=10, pieces_embedded=pieces)))
    assert ("pieces    31 of 10 rows, each with a vector of its own" in lines) == is_told


def test_of_a_probe_nothing_of_the_run_before_is_told() -> None:
    told = summary.probed(
        result(rows_read=12, rows_embedded=10, causes={"empty input": 2}, probes={"knn": KNN},
               num_truncated=4, probe_s=3.0)
    )  # fmt: skip
    assert [line[:10].strip() for line in told] == ["table", "knn", "report", "time"]


def test_the_judgement_comes_first_and_health_is_told_a_line_each() -> None:
    made = result(probes={"health": HEALTH}, judgement=["worse than nothing"])
    told = list(summary.probed(made))
    assert told[:4] == [
        "verdict   worse than nothing",
        "table     /out version 3, 12 rows",
        "health    dimension 3: 0 in all rows",
        "health    2 rows have the content of another row, in 1 groups: a, b",
    ]
    done = result(rows_read=12, rows_embedded=12, judgement=["worse than nothing"])
    assert next(iter(summary.lines(done))) == "verdict   worse than nothing"
    assert list(summary.probed(made, verbose=True))[4:6] == [
        "health    effective rank 12.35, of random vectors 23",
        "health    length, middle 1",
    ]
    well = list(summary.probed(result(probes={"health": {**HEALTH, "findings": []}})))
    assert well[1] == "health    nothing wrong found in 10 of 12 rows"


def test_of_a_run_that_has_nothing_to_do_that_comes_first() -> None:
    told = list(summary.lines(result(rows_read=12, rows_skipped=12, judgement=["better"])))
    assert told[0] == "nothing to do: all 12 rows are done"
    assert told[1] == "verdict   better"
