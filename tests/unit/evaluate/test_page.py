from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from fmembed.evaluate.page import make_map, render
from fmembed.result import RunResult

EVIL = "</script><script>alert(1)</script>\"'&"
ALL_EVIL = [
    EVIL,
    "<img src=x onerror=alert(1)>",
    "</title><svg onload=alert(1)>",
    '" onmouseover="alert(1)" x="',
    "' onfocus='alert(1)' autofocus='",
    "x;background:url(javascript:alert(1))",
    "</style><style>*{display:none}</style>",
    "<!--<script>",
    "<![CDATA[",
    "]]>-->",
    "{{ 7 * 7 }}{% raw %}{# x #}",
    "javascript:alert(1)",
    "\u2028alert(1)\u2029//",
    "\\u003cscript\\u003ealert(1)",
    "&lt;script&gt;&#60;script&#62;",
    "<table></td></tr><td><form action=x><input>",
    "\0<\0script>\x1b]0;x\x07",
    "\udc3c\ud800",
    "\uff1cscript\uff1e",
    "\u202e<b>",
]


def make(text: str) -> str:
    """A report with a text in every place that a name, a label or a record's word may come to."""
    score = {"value": 0.9, "low": 0.8, "high": 0.95}
    probe: dict[str, Any] = {
        "probe": "linear", "column": text, "version": 1, "num_train": 8, "num_test": 2,
        "num_classes": 2, "C": 1.0,
        "scores": [{"metric": text, **score}], "headline": {"metric": text, **score},
        "baselines": {
            text: score, "TF-IDF": None, "shuffled": {**score, "shuffles": 1000, "p": 0.001},
        }, "missing": text,
        "confusion": {"classes": [text, "b"], "counts": [[1, 0], [0, 0]]},
        "suspicious": [{"row_id": text, "label": text, "predicted": text, "probability": 0.01,
                        "text": text}],
    }  # fmt: skip
    skipped = {"probe": text, "column": text, "version": 1, "skipped": text}
    actor = dict.fromkeys(("load_s", "wait_s", "busy_s", "forward_s", "copy_s", "tokens"), 1.0)
    verdict = {
        "seconds": {text: 1.0}, "actors": {text: actor}, "wait_share": 0.1, "padding_waste": 0.1,
        "tokens_per_s": 1.0, "mfu": 0.5, "batch_tokens": {text: 1}, "advice": text,
    }  # fmt: skip
    run = RunResult(
        run_id=text, started=text, table=text, version=1, fingerprint=text, table_rows=2,
        rows_per_s=1.0, rows_embedded=2, seconds=2.0, stages={text: {"rows": 2, "busy_s": 1.0}},
        causes={text: 1}, verdict=verdict,
    )  # fmt: skip
    map_ = make_map(text, np.array([[0.0, 1.0], [2.0, 3.0]]), [text, "y"], [text, None], [text, ""])
    checks = [{"name": text, "passed": passed, "words": text} for passed in (True, False, None)]
    gate = {"passed": False, "over": {"table": text, "version": text}, "checks": checks}
    return render(text, run, [(text, text)], 3, [probe, skipped], text, map_, gate)


class Shape(HTMLParser):
    """Elements and attributes in order, and what stands in the scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[Any] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, attributes))
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.elements.append(tag)

    def handle_comment(self, data: str) -> None:
        self.elements.append(f"comment {data}")

    def handle_decl(self, decl: str) -> None:
        self.elements.append(f"declaration {decl}")

    def unknown_decl(self, data: str) -> None:
        self.elements.append(f"declaration {data}")

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script":
            self.scripts[-1] += data


@pytest.mark.parametrize("evil", ALL_EVIL)
def test_no_text_makes_an_element_an_attribute_or_a_script(evil: str) -> None:
    plain, shape = Shape(make("plain")), Shape(make(evil))
    assert shape.elements == plain.elements
    assert shape.scripts[1:] == plain.scripts[1:]
    hover = json.loads(shape.scripts[0])
    assert hover[0] == [evil] * 3


def test_every_value_is_escaped() -> None:
    html = make(EVIL)
    assert "<script>alert" not in html
    assert html.count("alert(1)") >= 24
    assert len(re.findall("<script", html)) == 2


def test_no_network_is_needed() -> None:
    html = make("plain")
    assert not re.findall(r"(?:src|href)\s*=|@import|url\(|https?://", html)
    # And none is taken: whatever came in, a browser would fetch and send nothing.
    assert "Content-Security-Policy\" content=\"default-src 'none';" in html


def test_it_shows_the_parts() -> None:
    html = make("plain")
    assert html.count("<circle") == 2
    assert "0.8000 to 0.9500</td>" in html
    assert "0.8000 to 0.9500 in 1,000 shuffles, p = 0.001</td>" in html
    for heading in (
        "Throughput by stage",
        "Probes",
        "Map",
        "Confusion matrix",
        "suspicious labels",
    ):
        assert heading in html
