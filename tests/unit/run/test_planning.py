"""What a plan makes of a budget and of commits, and what people read of it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from fmembed.compute_spec import BudgetSpec, ComputeSpec
from fmembed.forecast import Forecast, Range, lines
from fmembed.run import planning
from fmembed.run.plan import Plan


def test_a_budget_is_enough_for_a_part() -> None:
    def inputs(**limits: float) -> Any:
        compute = SimpleNamespace(budget=BudgetSpec(**limits))
        return SimpleNamespace(spec=SimpleNamespace(compute=compute))

    hours, cost = Range(2, 1, 4), Range(10, 5, 20)
    share = planning._share_of_budget
    assert share(inputs(device_hours=1), hours, cost) == Range(0.5, 0.25, 1.0)
    assert share(inputs(device_hours=1, cost=2), hours, cost) == Range(0.2, 0.1, 0.4)
    assert share(inputs(cost=2), hours, None) is None
    assert share(inputs(), hours, cost) is None
    assert share(inputs(cost=9), hours, Range.exactly(0)) == Range.exactly(1.0)


def test_a_long_run_commits_less_often() -> None:
    count = planning._count_commits
    assert [count("auto", Range.exactly(s)) for s in (10, 30, 90, 3000)] == [1, 2, 6, 75]
    assert 200 < count("auto", Range.exactly(86_400)) < 250
    assert count(10.0, Range.exactly(95)) == 10
    assert count(1e-6, Range.exactly(3600)) == 3_600_000_000


def test_gpus_that_have_yet_to_come_are_like_the_last_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    blind = Plan("cuda", 4, 4, 1.0, 0.0, 1, 1.0, 1, 4096, "auto")
    runs = [{"device": "cpu"}, {"device": "cuda", "device_name": "T4"}, {"device": "cuda"}]
    monkeypatch.setattr(
        planning, "list_runs", lambda _: (SimpleNamespace(compute=compute) for compute in runs)
    )
    inputs: Any = SimpleNamespace(spec=SimpleNamespace(compute=ComputeSpec()))

    def name(plan: Plan) -> str:
        monkeypatch.setattr(planning, "place", lambda *_: plan)
        left: Any = None
        return planning._place(inputs, left).device_name

    assert name(blind) == "T4"
    assert name(replace(blind, device_name="L4")) == "L4"
    assert name(replace(blind, device="cpu")) == ""


def test_what_people_read() -> None:
    plan = Forecast(
        kind="refresh", table="out/x", version=3, rows_read=1200, rows_new=1000, rows_removed=7,
        rows_withheld=9, withheld="too many", rows_embedded=1000, rows_copied=30,
        contents_embedded=900, rows_rejected=Range(5, 2, 9), rows_sampled=900, unit="tokens",
        units=Range(5000, 4000, 6000), rate=Range(100, 90, 110), by="measured now",
        seconds=Range(3700, 61, 9000), stages={"start": 3.0, "model": 50.0},
        device_hours=Range(1, 0.5, 2), cost=Range(2, 1, 4), parts_written=Range(2, 1, 3),
        bytes_written=Range.exactly(2**20), parts_rewritten=1, bytes_rewritten=2**21,
        share_of_budget=Range(0.5, 0.4, 0.6), compute={"device": "cpu", "max_actors": 2},
        notes=("heed this",),
    )  # fmt: skip
    assert list(lines(plan)) == [
        "plan      of a refresh of out/x; nothing was written",
        "rows      1,200 in the source; 1,000 new, 0 changed, 0 unchanged, 7 removed, 5 [2, 9] "
        "rejected",
        "withheld  9 rows that should leave would stay: too many",
        "embed     1,000 rows, of 900 contents; 30 take a vector that is there",
        "units     5,000 [4,000, 6,000] tokens, by 900 rows",
        "rate      100 [90, 110] tokens/s for an actor on cpu, measured now",
        "time      1 h 1 min [1 min 1 s, 2 h 30 min]: seconds, start 3.0, model 50.0",
        "devices   1 [0.5, 2] hours, of 2 actors",
        "cost      2 [1, 4] of the price's currency",
        "parts     2 [1, 3] written, of 1 [1, 1] MiB; 1 of 2.0 MiB written anew",
        "budget    is enough for 50% of it [40%, 60%]",
        "note      heed this",
    ]
