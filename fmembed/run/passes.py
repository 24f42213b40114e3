"""Once over what is left, and again after a loss that Ray does not mend by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from types import TracebackType

import ray.exceptions

from fmembed.errors import BudgetSpentError, Interrupted, LockedError, StorageError, WaitedError
from fmembed.run.commits import SETTLE_S, Commits
from fmembed.run.faults import TASK_DEATHS, is_loss, root_cause
from fmembed.run.progress import Progress
from fmembed.run.record import Run
from fmembed.run.signals import Signals
from fmembed.run.work import Work
from fmembed.table.lock import Lock
from fmembed.table.table import Table

# Passes that may break in a row without a row committed; a pass that commits some starts anew.
_MAX_BROKEN = 3
# A cloud's notice may be no longer than 30 s: so long a stopped run writes and commits what has
# come out of the model, and waits for writes that it will not commit.
_COMMIT_S, _SETTLE_S = 12.0, 3.0


def passes(
    run: Run, table: Table, lock: Lock, commits: Commits, progress: Progress, signals: Signals
) -> Iterator[Pass]:
    """One pass; and after a loss another, of what is not committed by then.

    Ray restarts actors and tasks and computes lost blocks again; it gives up where a node took with
    it what cannot be computed again.

    Args:
        run: What is left to do, by its last look.
        table: Where to.
        lock: Ours still, before another pass begins.
        commits: Where the rows of a pass go.
        progress: Where a loss is told.
        signals: What stops a pass.

    Yields:
        Each pass as a context, to read, embed and commit in.

    Raises:
        ray.exceptions.RayError: An error of the code, or losses that do not end.
    """
    num_broken = 0
    apart = False
    while run.work:
        num_before = commits.num_embedded
        current = Pass(replace(run.work, apart=apart), commits, signals)
        yield current
        lost, current.lost = current.lost, None
        if lost is None:
            return
        num_broken = 1 if commits.num_embedded > num_before else num_broken + 1
        cause = root_cause(lost)
        # An actor that dies on every try without a row done is no accident.
        limit = 1 if isinstance(cause, ray.exceptions.ActorDiedError) else _MAX_BROKEN
        if num_broken >= limit and commits.num_embedded == num_before:
            raise lost
        # What Ray has tried again so often as a process that reads or prepares rows.
        apart = apart or isinstance(cause, TASK_DEATHS)
        progress.say(
            f"lost a node, actor or worker ({type(cause).__name__}); going on from "
            f"the {commits.num_embedded:,} rows of this run that are {commits.fate}"
            + (", looking for a row that ends its process" if apart else "")
        )
        lock.check()
        table.remove_strays(commits.run_id)
        # With its frames go the blocks and ids that the pass has held.
        del lost, cause, current
        run.find_work()
        run.locate()


class Pass:
    """What is read in one go. `lost` is the loss that ended it, None where it came to its end."""

    def __init__(self, work: Work, commits: Commits, signals: Signals) -> None:
        self._work = work
        self._commits = commits
        self._signals = signals
        self.lost: BaseException | None = None

    def __enter__(self) -> Work:
        self._commits.begin(self._work.source.shards, self._work.known)
        return self._work

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> bool:
        """Commit what was embedded by then; end a pass that was lost as if nothing had been.

        Raises:
            Interrupted: It was; the message says what is committed.
            BudgetSpentError: The run has cost what it may; so does this one's.
            WaitedError: It has waited as long as it may; the same.
        """
        commits, settle_s = self._commits, SETTLE_S
        try:
            if (interrupted := self._signals.behind(error)) is not None:
                self._signals.heard()
                settle_s = _SETTLE_S
                with contextlib.suppress(ray.exceptions.RayError):
                    commits.commit(_COMMIT_S)
                raise Interrupted(
                    f"{interrupted}; {commits.num_embedded:,} rows of this run are {commits.fate}, "
                    "the same command resumes",
                    interrupted.exit_code - 128,
                ) from None
            if isinstance(error, WaitedError):  # and what was lost there is no device for
                with contextlib.suppress(ray.exceptions.RayError):
                    commits.commit(_COMMIT_S)
            elif isinstance(error, BudgetSpentError):
                commits.commit()
            if isinstance(error, BudgetSpentError | WaitedError):
                raise type(error)(
                    f"{error}; {commits.num_embedded:,} rows of this run are {commits.fate}, the "
                    "same command goes on"
                ) from None
            if isinstance(error, ray.exceptions.RayError) and is_loss(error):
                self.lost = error
                # The keys of what is written may be lost too: then it is embedded again.
                with contextlib.suppress(ray.exceptions.RayError):
                    commits.commit_written()
        finally:
            commits.settle(settle_s)
        return self.lost is not None


@contextlib.contextmanager
def cleaned_up(table: Table, lock: Lock, run_id: str) -> Iterator[None]:
    """Remove what a run has written and not committed, however it ends."""
    try:
        yield
    finally:
        # What failed is worth more than that its leftovers could not be removed.
        with contextlib.suppress(StorageError, LockedError):
            lock.check()  # another run's parts are no strays
            table.remove_strays(run_id)
