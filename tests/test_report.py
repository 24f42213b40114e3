from __future__ import annotations

import re
from typing import Any

import numpy as np

from fmembed.report import make_map, render

EVIL = "</script><script>alert(1)</script>\"'&"


def make(text: str) -> str:
    score = {"value": 0.9, "low": 0.8, "high": 0.95}
    probe: dict[str, Any] = {
        "probe": "linear", "column": "embedding", "version": 1, "num_train": 8, "num_test": 2,
        "num_classes": 2, "C": 1.0,
        "scores": [{"metric": "accuracy", **score}], "headline": {"metric": "accuracy", **score},
        "baselines": {"majority": score, "TF-IDF": None},
        "confusion": {"classes": [text, "b"], "counts": [[1, 0], [0, 0]]},
        "suspicious": [{"row_id": text, "label": text, "predicted": "b", "probability": 0.01,
                        "text": text}],
    }  # fmt: skip
    run = {
        "table": text, "version": 1, "fingerprint": "f", "table_rows": 2, "table_rejected": 0,
        "rows_skipped": 0, "rows_per_s": 1.0, "rows_embedded": 2, "seconds": 2.0,
        "stages": {"embed": {"rows": 2, "busy_s": 1.0}}, "causes": {text: 1},
    }  # fmt: skip
    map_ = make_map(
        "PCA", np.array([[0.0, 1.0], [2.0, 3.0]]), [text, "y"], [text, None], [text, ""]
    )
    return render(text, run, [("model", text)], 3, [probe], "", map_)


def test_every_value_is_escaped() -> None:
    html = make(EVIL)
    assert "<script>alert" not in html
    assert html.count("alert(1)") >= 8
    assert len(re.findall("<script", html)) == 2


def test_no_network_is_needed() -> None:
    html = make("plain")
    assert not re.findall(r"(?:src|href)\s*=|@import|url\(|https?://", html)


def test_it_shows_the_parts() -> None:
    html = make("plain")
    assert html.count("<circle") == 2
    for heading in (
        "Throughput by stage",
        "Probes",
        "Map",
        "Confusion matrix",
        "suspicious labels",
    ):
        assert heading in html
