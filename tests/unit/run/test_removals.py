"""Rows leave where the source was read whole, and few of them."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from fmembed.run.removals import why_withheld
from fmembed.sources.source import Shard, Source
from fmembed.sources.walking import DEAD_LINKS, HIDDEN
from fmembed.spec import RunSpec

NONE = {"gone": 0, "gone_wrong": 0, "were": 100, "broken_off": 0, "without_id": 0}


def why(
    allowed: int | None = None,
    passed_over: dict[str, int] | None = None,
    format_: str = "auto",
    on_rejected: str = "keep",
    is_empty: bool = False,
    **counts: int,
) -> str:
    raw: dict[str, Any] = {
        "source": {"uri": "x", "format": format_},
        "model": {"id": "m"},
        "output": {"uri": "y"},
        "refresh": {"max_removed_fraction": 0.1, "on_rejected": on_rejected},
    }
    spec = RunSpec.parse(raw)
    source = Source(
        spec.source, "csv", None, () if is_empty else (Shard(),), pa.schema([]),
        passed_over=passed_over or {},
    )  # fmt: skip
    return why_withheld(spec, source, {**NONE, **counts}, allowed)


def test_few_rows_may_leave() -> None:
    assert why() == why(gone=10) == why(gone=4, gone_wrong=6) == why(10, gone=10) == ""
    assert why(60, gone=50, gone_wrong=10) == ""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"gone": 11}, "max_removed_fraction = 0.1 of 100 rows; --allow-removals 11 lets"),
        ({"gone": 6, "gone_wrong": 5}, "--allow-removals 11 lets"),
        ({"gone": 11, "allowed": 10}, "more than --allow-removals 10"),
        ({"gone": 100, "is_empty": True}, "as no file of the source is left"),
        ({"broken_off": 2, "allowed": 100}, "2 files of the source cannot be read to their ends"),
        ({"without_id": 3, "allowed": 100}, "3 rows of the source have come to have no id"),
        ({"gone": 1, "passed_over": {DEAD_LINKS: 2}}, "2 links in the source lead to nothing"),
        (
            {"gone": 50, "passed_over": {"files with .jsonl, no csv": 3, HIDDEN: 9}},
            "of 100 rows, with 3 files passed over, as most are csv",
        ),
    ],
)
def test_why_none_leaves(given: dict[str, Any], said: str) -> None:
    assert said in why(**given)


def test_what_does_not_keep_them() -> None:
    assert why(passed_over={DEAD_LINKS: 2}) == ""  # none leaves
    assert why(1, gone=1, passed_over={DEAD_LINKS: 2}) == ""
    assert why(without_id=3, on_rejected="remove") == ""
    assert "passed over" not in why(
        gone=50, format_="csv", passed_over={"files with .x, no csv": 3}
    )
