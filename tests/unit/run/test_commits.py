"""How often a run commits: each commit makes a file."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from fmembed.errors import RejectedError
from fmembed.run.commits import Commits, check_rejected, interval_s
from fmembed.spec import OutputSpec

HOUR_S = 3600.0


def count(run_s: float) -> int:
    now = num_commits = 0
    while now < run_s:
        now += interval_s("auto", now)
        num_commits += 1
    return num_commits


def test_a_kill_costs_a_minute_or_a_fiftieth_of_the_run() -> None:
    assert interval_s("auto", 0) == 15  # that something is there is seen soon
    assert interval_s("auto", 60) == 15
    assert interval_s("auto", 100) == 25
    assert interval_s("auto", 160) == interval_s("auto", HOUR_S / 2) == 40
    assert interval_s("auto", 10 * HOUR_S) == 720
    assert interval_s(2.5, 10 * HOUR_S) == 2.5


def test_a_long_run_makes_no_thousands_of_files() -> None:
    assert count(HOUR_S / 4) == 27
    assert count(24 * HOUR_S) < 250
    assert count(7 * 24 * HOUR_S) < 350


def test_one_bad_row_of_four_fails_no_run_unless_that_was_said() -> None:
    causes = [{"error": "empty input", "rows": 1, "samples": [{"row_id": "a", "message": "m"}]}]
    table: Any = SimpleNamespace(
        rejected_by_cause=lambda _: causes, rejected=SimpleNamespace(uri="t/_rejected")
    )
    default, said = OutputSpec(uri="t"), OutputSpec(uri="t", max_rejected_fraction=0.01)
    check_rejected(table, default, 1, 4)
    check_rejected(table, default, 8, 9)
    for output, num_rejected, num_rows in ((said, 1, 4), (default, 4, 4), (default, 1, 10)):
        with pytest.raises(RejectedError, match=f"{num_rejected} of {num_rows} rows were rejected"):
            check_rejected(table, output, num_rejected, num_rows)


def test_a_stopped_run_waits_for_its_last_writes_no_longer_than_it_may(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A write may wait for what is computed again, on a device that is not there any more."""
    asked: list[float] = []

    def wait(refs: list[Any], num_returns: int, timeout: float) -> Any:
        asked.append(timeout)
        return refs[:1], refs[1:]

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", lambda ref: ref)
    commits: Any = Commits.__new__(Commits)
    taken: list[Any] = []
    vars(commits).update(_pending=[], _writes=["written", "not"], _written=[], _deadline=None)
    monkeypatch.setattr(commits, "_take", lambda ref, _: taken.append(ref))
    commits.commit(12.0)
    assert taken == ["written"]
    assert len(asked) == 1
    assert 11 < asked[0] <= 12
    assert commits._deadline is None
