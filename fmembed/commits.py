"""Blocks to parts, parts to commits: the driver's side of the line.

Rows themselves never reach the driver: it holds references to blocks, has tasks write them as
parts, and commits the parts.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import pyarrow as pa
import ray

from fmembed.lock import Lock
from fmembed.readers import Shard
from fmembed.rows import REJECTED_SCHEMA, RowIds
from fmembed.spec import OutputSpec, RejectedError
from fmembed.table import Part, ShardCount, Table, Written, write_part

_MAX_WRITES_IN_FLIGHT = 2
_MAX_WRITE_RETRIES = 3
# Below this the fraction says little: one bad row of ten is not yet a bad dataset.
_MIN_ROWS_TO_STOP = 1000
_SETTLE_S = 30.0
_LEAST_COMMIT_S, _COMMIT_SHARE = 60.0, 1 / 50


class Commits:
    """Gathers blocks into parts and parts into commits, and counts what became of each row."""

    def __init__(
        self,
        output: OutputSpec,
        table: Table,
        lock: Lock,
        run_id: str,
        configuration: dict[str, str],
        vectors: tuple[str, ...],
    ) -> None:
        """Start a run's commits.

        Args:
            output: When to write and commit, and how much may be rejected.
            table: Where to.
            lock: Checked before every commit.
            run_id: Names the transactions.
            configuration: Metadata of a new table.
            vectors: The columns of vectors.
        """
        self._vectors = vectors
        self._output = output
        self._table = table
        self._lock = lock
        self._run_id = run_id
        self._configuration = configuration
        self.num_commits = 0
        self.is_committing = False
        self._num_known_before: int | None = None
        self._whole: list[tuple[str, int, int]] = []
        self._began = self._last_commit = time.monotonic()
        self._num_rejected_before = table.num_rejected()
        self.num_embedded = self.num_rejected = self.num_skipped = 0
        self.num_written = self.num_units = self.num_truncated = 0
        self.counts: dict[str, float] = defaultdict(float)
        self.busy_s = 0.0
        self.causes: Counter[str] = Counter()

    def begin(self, shards: Sequence[Shard], committed: RowIds) -> None:
        """Start a pass over shards; what an earlier pass of this run did not commit is dropped.

        Args:
            shards: What will be read, in the order that rows count them by.
            committed: Ids of the rows that will be left out; grows with what is written.
        """
        if self._num_known_before is None:
            self._num_known_before = len(committed)
        self._known = committed
        self._shard_keys = [shard.key for shard in shards]
        self._shards: dict[int, ShardCount] = {}
        self._pending: list[Any] = []
        self._pending_bytes = 0
        self._writes: dict[Any, tuple[list[Any], int]] = {}
        self._written: list[Written] = []
        # This pass will skip what this run has committed before it, which is not skipped at all.
        self.num_skipped = -(self.num_embedded + self.num_rejected)
        self.num_written = self.num_embedded

    @property
    def held_bytes(self) -> int:
        """Of the blocks that wait to be written or are being written."""
        return self._pending_bytes + sum(size for _, size in self._writes.values())

    def add(self, bundle: Any) -> None:
        """Take over a bundle of blocks; write and commit when it is time."""
        self._pending.extend(bundle.block_refs)
        self._pending_bytes += bundle.size_bytes()
        if self._pending_bytes >= self._output.part_bytes:
            self._write_pending()
        while len(self._writes) > _MAX_WRITES_IN_FLIGHT:
            self._collect(num_returns=1)
        now = time.monotonic()
        every_s = interval_s(self._output.commit_every_s, now - self._began)
        if now - self._last_commit >= every_s:
            self.commit()
            self.check_rejected(at_end=False)

    def commit(self) -> None:
        """Write what is pending, wait for all parts, and commit them in one transaction."""
        self._write_pending()
        while self._writes:
            self._collect(num_returns=len(self._writes))
        self.commit_written()

    def commit_written(self) -> None:
        """Commit the parts that are written by now."""
        self._last_commit = time.monotonic()
        written, self._written = self._written, []
        if not written:
            return
        self.is_committing = True
        try:
            self._commit(written)
        finally:
            self.is_committing = False

    def _commit(self, written: list[Written]) -> None:
        self._lock.check()
        # A number is used once, whatever becomes of it: committing it again would be a no-op.
        transaction = (self._run_id, self.num_commits)
        self.num_commits += 1
        rejected = [w.rejected for w in written if w.rejected is not None]
        parts = [w.part for w in written if w.part is not None]
        # Rejections first: either log may end up ahead of the other, and both ways the next run
        # reads the rows that are in neither, no more and no less.
        self._commit_log(rejected, parts, written[0], transaction)
        for w in written:
            self.num_embedded += w.num_rows
            self.num_rejected += w.rejected.num_rows if w.rejected else 0
            self.num_units += w.num_units
            self.num_truncated += w.num_truncated
            for name, count in w.counts.items():
                self.counts[name] += count
            self.causes.update(w.causes)
        self._record_shards(written)

    def _record_shards(self, written: list[Written]) -> None:
        """Put on record which shards are committed whole; after the commit, never before it."""
        num_whole = len(self._whole)
        for index, count in (item for w in written for item in w.shards.items()):
            total = self._shards[index] = self._shards.get(index, ShardCount()) + count
            self.num_skipped += count.skipped
            key = self._shard_keys[index]
            if total.whole and key is not None:
                self._whole.append((key, total.rows + total.skipped, total.rejected))
        if len(self._whole) > num_whole:
            self._table.put_shards(self._run_id, self._whole)

    def _commit_log(
        self, rejected: list[Part], parts: list[Part], any_: Written, transaction: tuple[str, int]
    ) -> None:
        if rejected:
            self._table.rejected.commit(rejected, REJECTED_SCHEMA, self._configuration, transaction)
        if parts:
            self._table.rows.commit(parts, any_.schema, self._configuration, transaction)

    def settle(self) -> None:
        """Wait for writes that nobody will commit, so that their parts can be removed after."""
        if self._writes:
            ray.wait(list(self._writes), num_returns=len(self._writes), timeout=_SETTLE_S)

    def check_rejected(self, at_end: bool) -> None:
        """Stop when too many rows were rejected.

        Raises:
            RejectedError: With the causes.
        """
        num_rejected = self.num_rejected + self._num_rejected_before
        num_rows = self.num_embedded + self.num_rejected + (self._num_known_before or 0)
        limit = self._output.max_rejected_fraction
        if not self.num_rejected or (num_rows < _MIN_ROWS_TO_STOP and not at_end):
            return
        if num_rejected > limit * num_rows:
            causes = ", ".join(f"{n:,} {cause}" for cause, n in self.causes.most_common(5))
            raise RejectedError(
                f"{num_rejected:,} of {num_rows:,} rows were rejected, more than "
                f"output.max_rejected_fraction = {limit} allows ({causes}); the embedded rows are "
                f"committed, the rejected ones are in {self._table.rejected.uri}"
            )

    def _write_pending(self) -> None:
        if self._pending:
            self._submit(self._pending, self._pending_bytes, frozenset())
            self._pending, self._pending_bytes = [], 0

    def _submit(self, blocks: list[Any], num_bytes: int, twice: frozenset[bytes]) -> None:
        # No CPU reserved: Ray Data has planned with all of them, and a write is short.
        task = ray.remote(num_cpus=0, max_retries=_MAX_WRITE_RETRIES)(_write_blocks)
        ref = task.remote(self._table.uri, self._vectors, twice, *blocks)
        self._writes[ref] = (blocks, num_bytes)

    def _collect(self, num_returns: int) -> None:
        done, _ = ray.wait(list(self._writes), num_returns=num_returns)
        for ref in done:
            blocks, num_bytes = self._writes.pop(ref)
            written: Written = ray.get(ref)
            twice = self._known.contains(written.keys)
            if twice.any():
                # Two parts with one id. Rare, so the later part is simply written once more.
                if written.part is not None:
                    self._table.rows.remove([written.part.path])
                if written.rejected is not None:
                    self._table.rejected.remove([written.rejected.path])
                self._submit(blocks, num_bytes, frozenset(written.keys[twice].tolist()))
                continue
            self._known.add(written.keys)
            self._written.append(written)
            self.num_written += len(written.keys)
            self.busy_s += written.busy_s


def interval_s(given: float | Literal["auto"], run_s: float) -> float:
    """Seconds from a commit to the next, in a run that has taken so long; see `OutputSpec`."""
    return max(_LEAST_COMMIT_S, run_s * _COMMIT_SHARE) if given == "auto" else given


def _write_blocks(
    uri: str, vectors: tuple[str, ...], twice: frozenset[bytes], *blocks: pa.Table
) -> Written:
    return write_part(uri, list(blocks), vectors, twice)
