"""How often a run commits: each commit makes a file."""

from __future__ import annotations

from fmembed.run.commits import interval_s

HOUR_S = 3600.0


def count(run_s: float) -> int:
    now = num_commits = 0
    while now < run_s:
        now += interval_s("auto", now)
        num_commits += 1
    return num_commits


def test_a_kill_costs_a_minute_or_a_fiftieth_of_the_run() -> None:
    assert interval_s("auto", 0) == 15  # that something is there is seen soon
    assert interval_s("auto", 15) == interval_s("auto", HOUR_S / 2) == 60
    assert interval_s("auto", 10 * HOUR_S) == 720
    assert interval_s(2.5, 10 * HOUR_S) == 2.5


def test_a_long_run_makes_no_thousands_of_files() -> None:
    assert count(HOUR_S / 4) == 16
    assert count(24 * HOUR_S) < 230
    assert count(7 * 24 * HOUR_S) < 330
