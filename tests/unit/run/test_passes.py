"""When a run goes on after a loss, and when it gives up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray.exceptions

from fmembed.errors import Interrupted
from fmembed.rows.ids import RowIds
from fmembed.run.passes import passes
from fmembed.run.work import Work

LOST, DIED = ray.exceptions.WorkerCrashedError, ray.exceptions.ActorDiedError


class Fake:
    """A run, its commits, its table, lock, progress and signals: each says what it was asked."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.apart: list[bool] = []
        self.num_embedded = 0
        self.run_id, self.fate = "r", "committed"
        self.work = Work(SimpleNamespace(shards=(1,)), RowIds(), 0)  # type: ignore[arg-type]

    def find_work(self) -> None:
        self.said.append("look")

    def locate(self) -> None:
        pass

    def behind(self, error: BaseException | None) -> Interrupted | None:
        return error if isinstance(error, Interrupted) else None

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.said.append(name)


def run(outcomes: list[Any]) -> Fake:
    """Each pass commits so many rows, or first those of a pair and then raises the second."""
    fake: Any = Fake()
    left = iter(outcomes)
    for one in passes(fake, fake, fake, fake, fake, fake):
        with one as work:
            fake.apart.append(work.apart)
            outcome = next(left)
            num_rows, error = outcome if isinstance(outcome, tuple) else (outcome, None)
            fake.num_embedded += num_rows
            if error is not None:
                raise error
    return fake


def test_a_whole_pass_is_the_last() -> None:
    assert run([5]).said == ["begin", "settle"]


def test_after_a_loss_what_is_written_is_committed_and_the_rest_read_again() -> None:
    assert run([(3, LOST()), 2]).said == [
        "begin", "commit_written", "settle", "say", "check", "remove_strays", "look",
        "begin", "settle",
    ]  # fmt: skip


def test_after_a_task_that_died_on_each_try_rows_are_read_and_prepared_apart() -> None:
    assert run([(1, DIED()), (1, LOST()), (1, DIED()), 1]).apart == [False, False, True, True]


def test_losses_that_never_end() -> None:
    # A pass that commits something starts the count anew.
    run([(0, LOST()), (0, LOST()), (1, LOST()), (0, LOST()), 1])
    with pytest.raises(LOST):
        run([(0, LOST()), (0, LOST()), (0, LOST()), 1])
    with pytest.raises(LOST):
        run([(1, LOST()), (0, LOST()), (0, LOST()), 1])


def test_an_actor_that_dies_on_every_try_is_no_accident() -> None:
    run([(1, DIED()), 1])
    with pytest.raises(DIED):
        run([(0, DIED()), 1])


def test_what_is_no_loss_ends_the_run() -> None:
    with pytest.raises(ZeroDivisionError):
        run([(1, ZeroDivisionError()), 1])
    with pytest.raises(ray.exceptions.RaySystemError):
        run([(1, ray.exceptions.RaySystemError("of the code")), 1])


def test_an_interrupted_pass_commits_and_says_how_much() -> None:
    with pytest.raises(Interrupted, match="7 rows of this run are committed") as stopped:
        run([(7, Interrupted("interrupted", 15)), 1])
    assert stopped.value.exit_code == 143
