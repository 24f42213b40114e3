"""What a run counts, from its start to the record that `verify` compares the table with."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from fmembed.errors import ChangedError
from fmembed.inputs import Inputs
from fmembed.model.server import Endpoint
from fmembed.result import RunResult
from fmembed.run.commits import Commits, Staging, check_rejected
from fmembed.run.locating import locate_work
from fmembed.run.plan import Plan
from fmembed.run.progress import Progress
from fmembed.run.prometheus import RunMetrics
from fmembed.run.refresh import Settled
from fmembed.run.spending import price
from fmembed.run.verdict import COMPARE, PREFIXES, SETTLE, WRITE, judge
from fmembed.run.work import Work, find_work, passed_over
from fmembed.table.card import fingerprint
from fmembed.table.copies import FANNED_OUT
from fmembed.table.records import Commit


def _rounded(spent: Mapping[str, float]) -> dict[str, float]:
    return {name: round(amount, 6) for name, amount in spent.items()}


class Run:
    """One run: its name, its clock, and what became of the rows."""

    def __init__(
        self,
        inputs: Inputs,
        look: Callable[[Inputs], Work] = find_work,
        began: float | None = None,
    ) -> None:
        """Begin.

        Args:
            inputs: What it is of.
            look: Sees what is left to do.
            began: When, by `time.monotonic`; None for now.
        """
        self._look = look
        self.id = uuid.uuid4().hex[:12]
        # Dimensions of a server's vectors, 0 where nobody was asked.
        self.server_dim = 0
        self._inputs = inputs
        self._started = datetime.now(UTC)
        self._clock = time.monotonic() if began is None else began
        self.work: Work | None = None
        self._num_shards = 0
        self._plan: Plan | None = None
        self._commits: Commits | None = None
        self._progress: Progress | None = None
        self._metrics: RunMetrics | None = None
        self._num_warm = self._warm_rows = 0
        self._warm = 0.0

    def find_work(self) -> Work:
        """See what is left; of a server that is to see any ask one vector before anything is
        written.

        Raises:
            ModelError: The server does not answer, or not with a vector.
        """
        self.work = self._look(self._inputs)
        checkpoint = self._inputs.checkpoint
        asks = self.work and self.work.sees_model and not self.server_dim
        if asks and checkpoint.endpoint is not None:
            self.server_dim = Endpoint(checkpoint.endpoint, checkpoint.id).check()
        return self.work

    def locate(self) -> None:
        """Find out where the records begin of what is left, where that is parts of files."""
        if self.work is not None:
            self.work = locate_work(self.work, self._inputs.source, self._inputs.table)

    def begin(self, plan: Plan, commits: Commits, progress: Progress) -> None:
        """Take note of who is about to do it."""
        self._num_shards = len(self.work.source.shards) if self.work is not None else 0
        self._plan, self._commits, self._progress = plan, commits, progress

    def count(self, bundle: Any) -> None:
        """Count a bundle that came out of the model.

        What each actor's first window took is no steady state: it was loading.
        """
        if self._plan is not None and self._num_warm < self._plan.min_actors:
            self._num_warm += 1
            self._warm_rows += bundle.num_rows() or 0
            self._warm = time.monotonic()

    def show(self, has_committed: bool) -> None:
        """Show what is written; and, where there was a commit, tell Prometheus."""
        commits, progress = self._commits, self._progress
        assert commits is not None
        assert progress is not None
        progress.set(WRITE, commits.num_written, commits.busy_s)
        progress.keep(commits.num_embedded, commits.fate)
        if has_committed:
            rows = {"embedded": commits.num_embedded, "rejected": commits.num_rejected}
            self._metrics = self._metrics or RunMetrics(self.id)
            self._metrics.publish(rows, self._judge(commits.counts))

    def check_rejected(self) -> None:
        """Hold a run to the limit once it is on record; one that had nothing to do, or has replaced
        the version, too: a job that is tried again after too many rejections is no success.

        Raises:
            RejectedError: More rows of the table are rejected than the config allows.
        """
        if self._commits is not None:
            self._commits.check_rejected(at_end=True)
        if self.work is not None and (self._commits is None or isinstance(self._commits, Staging)):
            table = self._inputs.table
            num_rows = table.known().num_rows
            check_rejected(table, self._inputs.spec.output, table.num_rejected(), num_rows)

    def check_changed(self) -> None:
        """Refuse to take rows for done whose content has changed; what else was new is committed.

        Raises:
            ChangedError: There are some, and the config does not say to keep what the table has.
        """
        num_changed = self._commits.num_changed if self._commits else 0
        if num_changed and self._inputs.spec.output.on_changed == "refuse":
            raise ChangedError(
                f"source: {num_changed:,} rows are others (their input, or none that can be read, "
                f"or a label or other carried value) than those of {self._inputs.table.uri} with "
                "the same ids, which were left as they are; the new rows are committed. A refresh "
                "(fmembed refresh, fmembed.refresh) takes them over; where the old rows are to "
                "stay, set output.on_changed: keep, or give another output.uri or other ids"
            )

    def finish(self) -> RunResult:
        """Count, and leave the record that `verify` compares the table with."""
        table, commits = self._inputs.table, self._commits
        result = self._result()
        if commits and (result.rows_embedded or result.rows_rejected):
            table.put_run(commits.last, result)
        elif table.is_uncounted():
            last = Commit(
                run=self.id,
                rows_version=table.rows.version(),
                rejected_version=table.rejected.version(),
            )
            table.put_run(last, result)
        return result

    def finish_refresh(self, settled: Settled) -> RunResult:
        """As `finish`, of a refresh."""
        table, commits = self._inputs.table, self._commits
        counts, num_filled, num_fanned = settled.counts, 0, 0
        result = self._result()
        if isinstance(commits, Staging):
            num_filled, num_fanned = commits.num_filled, int(commits.counts[FANNED_OUT])
        num_seen = result.rows_embedded - num_filled
        num_embedded = num_seen + num_fanned
        has_committed = settled.commit.rows is not None or settled.commit.rejected is not None
        result = replace(
            result,
            rows_read=settled.rows_read,
            rows_embedded=num_embedded,
            rows_rejected=counts["rejected"],
            rows_skipped=settled.rows_read - num_embedded - counts["rejected"],
            rows_changed=counts["changed"],
            rows_absent=0,
            rows_new=counts["new"],
            rows_unchanged=counts["unchanged"],
            rows_removed=settled.rows_removed,
            rows_withheld=settled.rows_withheld,
            rows_copied=num_filled - num_fanned,
            contents_embedded=num_seen,
            parts_written=settled.parts_written,
            parts_rewritten=settled.parts_rewritten,
            withheld=settled.why_withheld if settled.rows_withheld else "",
            stages={
                **result.stages,
                COMPARE: {"rows": settled.rows_read, "busy_s": round(settled.look_s, 4)},
                SETTLE: {"rows": settled.rows_read, "busy_s": round(settled.settle_s, 4)},
            },
            files_broken=counts["broken_off"],
            kind="refresh",
            unchanged=not (has_committed or settled.rows_withheld),
        )
        if has_committed or table.is_uncounted():
            table.put_run(settled.commit, result)
        return result

    def _result(self) -> RunResult:
        seconds = time.monotonic() - self._clock
        table, commits = self._inputs.table, self._commits
        num_embedded = commits.num_embedded if commits else 0
        num_rejected = commits.num_rejected if commits else 0
        num_skipped = self.work.num_skipped if self.work is not None else 0
        num_skipped += commits.num_skipped if commits else 0
        num_known = num_embedded + num_rejected
        if commits is not None:
            num_known += commits.num_known_before
        elif self.work is not None:
            num_known += self.work.known.num_rows
        counts = dict(commits.counts) if commits else {}
        spec, modality = self._inputs.spec.preprocess, self._inputs.checkpoint.modality
        in_pieces = spec.pieces_are_rows(modality)
        steady = None
        if self._num_warm and num_embedded > self._warm_rows:
            rows = num_embedded - self._warm_rows
            steady = round(rows / (time.monotonic() - self._warm), 2)
        return RunResult(
            run_id=self.id,
            started=self._started.isoformat(timespec="seconds"),
            table=table.uri,
            version=table.version(),
            fingerprint=fingerprint(self._inputs.identity),
            rows_read=num_embedded + num_rejected + num_skipped,
            rows_embedded=num_embedded,
            rows_rejected=num_rejected,
            rows_skipped=num_skipped,
            rows_changed=commits.num_changed if commits else 0,
            rows_absent=max(num_known - num_embedded - num_rejected - num_skipped, 0),
            rows_per_s=round(num_embedded / seconds, 2),
            seconds=round(seconds, 2),
            table_rows=sum(p.num_rows for p in table.rows.parts()),
            table_rejected=table.num_rejected(),
            pieces_embedded=commits.num_pieces if commits and in_pieces else 0,
            num_units=commits.num_units if commits else 0,
            num_truncated=commits.num_truncated if commits else 0,
            counts={k: int(n) for k, n in counts.items() if not k.startswith(PREFIXES)},
            steady_rows_per_s=steady,
            spent=(spent := _rounded(price(self._inputs.spec, counts))),
            table_spent=_rounded(Counter(table.spent()) + Counter(spent)),
            causes=dict(commits.causes) if commits else {},
            passed_over=passed_over(self._inputs, self.work.num_skipped if self.work else 0),
            stages=self._stages(),
            verdict=self._judge(counts),
            compute=asdict(self._plan) if self._plan else {},
        )

    def _judge(self, counts: Mapping[str, float]) -> dict[str, Any]:
        seconds = time.monotonic() - self._clock
        compute = asdict(self._plan) if self._plan else {}
        return judge(counts, self._stages(), compute, seconds, self._num_shards)

    def _stages(self) -> dict[str, Any]:
        stages = self._progress.stages if self._progress else {}
        return {name: asdict(stage) for name, stage in stages.items()}
