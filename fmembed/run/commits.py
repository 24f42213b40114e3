"""Blocks to parts, parts to commits: the driver's side of the line.

Rows themselves never reach the driver: it holds references to blocks, has tasks write them as
parts, and commits the parts.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import ray

from fmembed.errors import DamagedError, FmembedError, RejectedError
from fmembed.rows.columns import REJECTED_SCHEMA
from fmembed.sources.source import Shard
from fmembed.spec import OutputSpec
from fmembed.table.card import FINGERPRINT, Card
from fmembed.table.copies import take_copies
from fmembed.table.files import REJECTED, RUN, WRITE
from fmembed.table.key_rows import KeyRows, find_twins
from fmembed.table.known import KnownRows
from fmembed.table.lock import Lock
from fmembed.table.parts import ShardCount, Written, write_part, write_without
from fmembed.table.records import Commit, WholeShard
from fmembed.table.table import Table

_MAX_WRITES_IN_FLIGHT = 2
_MAX_WRITE_RETRIES = 3
# Below these the fraction says little: one bad row of ten is not yet a bad dataset.
_MIN_ROWS_TO_STOP = 1000
SETTLE_S = 30.0
_FIRST_COMMIT_S, _LEAST_COMMIT_S, _COMMIT_SHARE, _SLOW_COMMIT_S = 15.0, 40.0, 1 / 50, 1.0
# Of the first minutes: nobody waits longer than it has taken, and no bar stands still.
_EARLY_SHARE = 1 / 4


class Commits:
    """Gathers blocks into parts and parts into commits, and counts what became of each row."""

    # What has become of the rows that are counted, for a message.
    fate = "committed"

    def __init__(
        self,
        output: OutputSpec,
        table: Table,
        lock: Lock,
        run_id: str,
        card: Card,
    ) -> None:
        """Start a run's commits.

        Args:
            output: When to write and commit, and how much may be rejected.
            table: Where to.
            lock: Checked before every commit.
            run_id: Names the transactions.
            card: What the table says of itself; each part says it too.
        """
        self._vectors = tuple(card.outputs)
        self._output = output
        self._table = table
        self._lock = lock
        self.run_id = run_id
        self._configuration = card.to_configuration()
        self.last = Commit(run=run_id)
        self.num_commits = 0
        self._num_writes = 0
        self.is_committing = False
        self._deadline: float | None = None
        # Rows that the table had before this run, embedded and rejected.
        self.num_known_before = 0
        self._has_begun = False
        # The files of keys of what this run has committed.
        self._key_files: list[str] = []
        self._whole: list[WholeShard] = []
        self._began = self._last_commit = time.monotonic()
        self._commit_s = 0.0
        self._num_rejected_before = table.num_rejected()
        self.num_embedded = self.num_rejected = self.num_skipped = self.num_changed = 0
        self.num_pieces = 0
        self.num_written = self.num_units = self.num_truncated = 0
        self.counts: dict[str, float] = defaultdict(float)
        self.busy_s = 0.0
        self.causes: Counter[str] = Counter()

    def begin(self, shards: Sequence[Shard], known: KnownRows) -> None:
        """Start a pass over shards; what an earlier pass of this run did not commit is dropped.

        Args:
            shards: What will be read, in the order that rows count them by.
            known: The rows that will be left out.
        """
        if not self._has_begun:
            self.num_known_before, self._has_begun = known.num_rows, True
        self._known_parts = frozenset(known.parts)
        self._shard_keys = [shard.key for shard in shards]
        self._shard_ends = [shard.marks and shard.marks[1] for shard in shards]
        self._shards: dict[int, ShardCount] = {}
        self._shard_parts: dict[int, set[str]] = defaultdict(set)
        self._pending: list[Any] = []
        self._pending_bytes = 0
        self._writes: dict[Any, _Write] = {}
        self._written: list[_Written] = []
        # This pass will skip what this run has committed before it, which is not skipped at all.
        self.num_skipped = -(self.num_embedded + self.num_rejected)
        self.num_changed = 0  # their shards are not whole, so that all of them are read again
        self.num_written = self.num_embedded

    @property
    def held_bytes(self) -> int:
        """Of the blocks that wait to be written or are being written."""
        return self._pending_bytes + sum(write.num_bytes for write in self._writes.values())

    def add(self, bundle: Any) -> bool:
        """Take over a bundle of blocks; write and commit when it is time.

        Returns:
            Whether something was committed.
        """
        self._pending.extend(bundle.block_refs)
        self._pending_bytes += bundle.size_bytes()
        if self._pending_bytes >= self._output.part_bytes:
            self._write_pending()
        while len(self._writes) > _MAX_WRITES_IN_FLIGHT:
            self._collect(num_returns=1)
        num_commits, now = self.num_commits, time.monotonic()
        if now >= self._due():
            self.commit()
            self._last_commit = time.monotonic()
            self._commit_s = self._last_commit - now
            self.check_rejected(at_end=False)
        return self.num_commits > num_commits

    def _due(self) -> float:
        """When the next commit is to begin: as the config says, but after as much work as the last
        one took, if that was seconds. Each looks through the keys of all before it: with one every
        5 s, a run of a million rows on one core came to do nothing else.
        """
        every_s = interval_s(self._output.commit_every_s, self._last_commit - self._began)
        slow_s = self._commit_s if self._commit_s > _SLOW_COMMIT_S else 0.0
        return self._last_commit + max(every_s, slow_s)

    def commit(self, within_s: float | None = None) -> None:
        """Write what is pending, wait for all parts, and commit them in one transaction.

        Args:
            within_s: Wait for so long at most; what is not written by then is not committed. What
                is on a node that was lost may have to be computed again, for which there may be no
                device.

        Raises:
            ray.exceptions.RayError: What was to be committed is lost, or not there in time.
        """
        self._write_pending()
        self._deadline = None if within_s is None else time.monotonic() + within_s
        try:
            while self._writes and self._collect(num_returns=len(self._writes)):
                pass
            self.commit_written()
        finally:
            self._deadline = None

    def commit_written(self) -> None:
        """Commit the parts that are written by now."""
        if not self._written:
            return
        self.is_committing = True
        try:
            self._finish()
        finally:
            self.is_committing = False

    def _left_s(self) -> float | None:
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)

    def _finish(self) -> None:
        """Put what is written where nothing takes it away."""
        kept = self._keep_keys()
        written, self._written = self._written, []
        self._commit([w.result for w in written])
        if kept is not None:
            self._key_files.append(kept)

    def _keep_keys(self) -> str | None:
        """Have a task write the keys of what is about to be committed; the file, if there is a row.

        Where a row has the id of one that an earlier part holds, its part is written anew without
        it, and the first try left for `remove_strays`: that is rare.
        """
        name = f"{self.run_id}-{self.num_commits:06d}"
        task = ray.remote(num_cpus=0, max_retries=_MAX_WRITE_RETRIES)(_write_keys)
        while True:
            written = [w.result for w in self._written]
            shards = {i: self._shard_keys[i] for w in self._written for i in w.result.shards}
            keys = [w.keys for w in self._written]
            args = (self._table.uri, name, self._key_files, written, shards, *keys)
            twins, path = ray.get(task.remote(*args), timeout=self._left_s())
            if not twins:
                return path
            anew = {i: self._start(_write_anew, self._written[i], ids) for i, ids in twins.items()}
            for i, (ref, keys_ref) in anew.items():
                result: Written = ray.get(ref, timeout=self._left_s())
                self.num_written += result.num_rows - self._written[i].result.num_rows
                self._written[i] = _Written(result, keys_ref)

    def _commit(self, written: list[Written]) -> None:
        self._lock.check()
        # A number is used once, whatever becomes of it: committing it again would be a no-op.
        number = self.num_commits
        self.num_commits += 1
        rejected = [w.rejected for w in written if w.rejected is not None]
        parts = [w.part for w in written if w.part is not None]
        transaction, made = (self.run_id, number), {}
        # Rejections first: either log may end up ahead of the other, and both ways the next run
        # reads the rows that are in neither, no more and no less.
        if rejected:
            made["rejected"] = number
            made["rejected_version"] = self._table.rejected.commit(
                rejected, REJECTED_SCHEMA, self._configuration, transaction
            )
        if parts:
            made["rows"] = number
            made["rows_version"] = self._table.rows.commit(
                parts, written[0].schema, self._configuration, transaction
            )
        self.last = self.last.model_copy(update=made)
        self._count(written)
        self._record_shards(written)

    def _count(self, written: list[Written]) -> None:
        for w in written:
            self.num_embedded += w.num_rows
            self.num_pieces += w.part.num_rows if w.part else 0
            self.num_rejected += w.rejected.num_rows if w.rejected else 0
            self.num_units += w.num_units
            self.num_truncated += w.num_truncated
            for name, count in w.counts.items():
                self.counts[name] += count
            self.causes.update(w.causes)

    def _record_shards(self, written: list[Written]) -> None:
        """Put on record which shards are committed whole; after the commit, never before it.

        A shard is tied to the parts that hold its rows, and where some were skipped, to all that
        were known when it was read.
        """
        for w in written:
            for index, count in w.shards.items():
                total = self._shards[index] = self._shards.get(index, ShardCount()) + count
                if w.part is not None and count.rows > count.rejected:
                    self._shard_parts[index].add(w.part.path)
                if w.rejected is not None and count.rejected:
                    self._shard_parts[index].add(REJECTED + w.rejected.path)
                self.num_skipped += count.skipped
                self.num_changed += count.changed
                key = self._shard_keys[index]
                if total.whole and key is not None:
                    held = self._shard_parts.pop(index, set())
                    held |= self._known_parts if total.skipped else set()
                    num_rows = total.rows + total.skipped
                    end = self._shard_ends[index]
                    self._whole.append(WholeShard(key, num_rows, frozenset(held), end))
        self._table.put_shards(self.last, self._whole)

    def settle(self, within_s: float = SETTLE_S) -> None:
        """Wait for writes that nobody will commit, so that their parts can be removed after."""
        if self._writes:
            ray.wait(list(self._writes), num_returns=len(self._writes), timeout=within_s)

    def check_rejected(self, at_end: bool) -> None:
        """Stop when too many rows were rejected.

        Raises:
            RejectedError: With the causes.
        """
        num_rejected = self.num_rejected + self._num_rejected_before
        num_rows = self.num_embedded + self.num_rejected + self.num_known_before
        if self.num_rejected and (num_rows >= _MIN_ROWS_TO_STOP or at_end):
            check_rejected(self._table, self._output, num_rejected, num_rows)

    def _write_pending(self) -> None:
        if self._pending:
            ref, keys = self._start(_write_blocks, *self._pending)
            self._writes[ref] = _Write(keys, self._pending_bytes)
            self._pending, self._pending_bytes = [], 0

    def _start(self, write: Callable[..., Any], *given: Any, num_returns: int = 2) -> list[Any]:
        """Start a task that writes parts; references to what it has written, to the keys, and to
        what else it returns.
        """
        # Counted, so that the same rows twice are two parts: one of them may have to be undone.
        self._num_writes += 1
        stamp = {**self._configuration, RUN: self.run_id, WRITE: str(self._num_writes)}
        # No CPU reserved: Ray Data has planned with all of them, and a write is short.
        task = ray.remote(num_cpus=0, max_retries=_MAX_WRITE_RETRIES)(write)
        task = task.options(num_returns=num_returns)
        refs: list[Any] = task.remote(self._table.uri, self._vectors, stamp, *given)
        return refs

    def _collect(self, num_returns: int) -> bool:
        """Take over what is written; false where there was no time for so many."""
        done, _ = ray.wait(list(self._writes), num_returns=num_returns, timeout=self._left_s())
        for ref in done:
            self._take(ref, ray.get(ref))
        return len(done) >= num_returns

    def _take(self, ref: Any, result: Written) -> None:
        """Take over what a task has written."""
        write = self._writes.pop(ref)
        self._written.append(_Written(result, write.keys))
        self.num_written += result.num_rows
        self.busy_s += result.busy_s


class Staging(Commits):
    """Gathers blocks into parts that outlive the run, and commits none: a refresh does, at once.

    Rows that are no longer wanted when it does are left out then, so none is looked for here.
    """

    fate = "kept for the next refresh"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # References to the rows that take a vector from elsewhere, as `take_copies` gives them.
        self.copies: list[Any] = []
        self._copies: dict[Any, Any] = {}
        self.num_filled = 0

    def begin(self, shards: Sequence[Shard], known: KnownRows) -> None:
        """As for `Commits`; what is to be copied comes again."""
        super().begin(shards, known)
        self.copies, self._copies = [], {}
        self.num_skipped = 0

    def check_rejected(self, at_end: bool) -> None:
        """Not yet: it is the new version that is held to the limit."""

    def _write_pending(self) -> None:
        if self._pending:
            ref, keys, copies = self._start(_write_and_take, *self._pending, num_returns=3)
            self._writes[ref] = _Write(keys, self._pending_bytes)
            self._copies[ref] = copies
            self._pending, self._pending_bytes = [], 0

    def _take(self, ref: Any, result: Written) -> None:
        super()._take(ref, result)
        if copies := self._copies.pop(ref, None):
            self.copies.append(copies)

    def _finish(self) -> None:
        written = [w.result for w in self._written]
        keys = [w.keys for w in self._written]
        self._stage(written, keys)
        self._written = []
        self._count(written)

    def _stage(self, written: Sequence[Written], keys: Sequence[Any]) -> None:
        self._lock.check()
        name = f"{self.run_id}-staged-{self.num_commits:06d}"
        shards = {i: self._shard_keys[i] for w in written for i in w.shards}
        task = ray.remote(num_cpus=0, max_retries=_MAX_WRITE_RETRIES)(_write_staged_keys)
        fingerprint = self._configuration[FINGERPRINT]
        args = (self._table.uri, name, fingerprint, list(written), shards, *keys)
        ray.get(task.remote(*args), timeout=self._left_s())
        self.num_commits += 1

    def fill(self, fill: Callable[..., Any], given: Sequence[tuple[Any, ...]]) -> None:
        """Have tasks make parts of rows that take their vectors from elsewhere, and stage them.

        Args:
            fill: Returns a list of `Written` and one of keys.
            given: What each task takes besides the table, its columns of vectors and a stamp.
        """
        under_way: list[Any] = []
        for some in [*given, None]:
            if some is not None:
                under_way.append(self._start(fill, *some))
            while under_way and (some is None or len(under_way) > _MAX_WRITES_IN_FLIGHT):
                results, keys = ray.get(under_way.pop(0))
                if results:
                    self._stage(results, [ray.put(k) for k in keys])
                    self._count(results)
                    self.num_filled += sum(w.num_rows for w in results)


@dataclass(frozen=True)
class _Write:
    """Blocks on their way to a part. `keys` refers to those of the rows, which the driver does not
    hold.
    """

    keys: Any
    num_bytes: int


@dataclass(frozen=True)
class _Written:
    """Parts that are not yet committed, and a reference to the keys of their rows."""

    result: Written
    keys: Any


def check_rejected(table: Table, output: OutputSpec, num_rejected: int, num_rows: int) -> None:
    """Refuse a table of which more rows are rejected than the config allows.

    Args:
        table: Where.
        output: Says how many.
        num_rejected: So many are.
        num_rows: Of so many, those included.

    Raises:
        RejectedError: With the causes.
    """
    if output.allows(num_rejected, num_rows):
        return
    found = Counter[str]()
    by_cause = table.rejected_by_cause(1)
    for cause in by_cause:
        found[cause["error"]] += cause["rows"]
    causes = ", ".join(f"{n:,} {cause}" for cause, n in found.most_common(5))
    # Of the most frequent one an example: its message says what may help.
    example = by_cause[0]["samples"][0]
    enough = math.ceil(100 * num_rejected / num_rows) / 100
    raise RejectedError(
        f"{num_rejected:,} of {num_rows:,} rows were rejected, more than "
        f"output.max_rejected_fraction = {output.max_rejected_fraction} allows ({causes}; as "
        f"{example['row_id'][:200]}: {example['message']}); the "
        f"embedded rows are committed, the rejected ones are in {table.rejected.uri}; so many are "
        f"allowed by --set output.max_rejected_fraction={enough}, or in Python by "
        f'overrides={{"output.max_rejected_fraction": {enough}}}'
    )


def interval_s(given: float | Literal["auto"], run_s: float) -> float:
    """Seconds from a commit after so much of a run to the next; see `OutputSpec`."""
    if given != "auto":
        return given
    early = min(max(_FIRST_COMMIT_S, run_s * _EARLY_SHARE), _LEAST_COMMIT_S)
    return max(early, run_s * _COMMIT_SHARE)


def _write_blocks(
    uri: str, vectors: tuple[str, ...], stamp: dict[str, str], *blocks: pa.Table
) -> tuple[Written, KeyRows]:
    return write_part(uri, list(blocks), vectors, stamp)


def _write_and_take(
    uri: str, vectors: tuple[str, ...], stamp: dict[str, str], *blocks: pa.Table
) -> tuple[Written, KeyRows, pa.Table]:
    written, keys = write_part(uri, list(blocks), vectors, stamp)
    return written, keys, take_copies(list(blocks))


def _write_anew(
    uri: str,
    vectors: tuple[str, ...],
    stamp: dict[str, str],
    written: _Written,
    twins: frozenset[bytes],
) -> tuple[Written, KeyRows]:
    return write_without(uri, written.result, ray.get(written.keys), twins, vectors, stamp)


def _write_keys(
    uri: str,
    name: str,
    committed: Sequence[str],
    written: Sequence[Written],
    shards: dict[int, str | None],
    *keys: KeyRows,
) -> tuple[dict[int, frozenset[bytes]], str | None]:
    """Look for rows that are there already; where there is none, write the keys of all.

    Args:
        uri: The table.
        name: Of the file.
        committed: Files of keys of this run's commits.
        written: What each write has written.
        shards: Keys of the shards by number.
        keys: Of the rows of each write.

    Returns:
        By the number of a write the ids in it that are there already; and the file, if there are
        none.

    Raises:
        FmembedError: Keys are not those of the parts.
    """
    table = Table(uri)
    _check_keys(written, keys)
    try:
        twins = find_twins(table.key_files.embedded(committed), keys)
    except DamagedError:  # or gone: any row of the table is one that this run has committed
        twins = find_twins(table.known().embedded(), keys)
    if twins:
        return twins, None
    held_by = [result.held_by for result in written]
    return {}, table.key_files.write(name, list(zip(keys, held_by, strict=True)), shards)


def _write_staged_keys(
    uri: str,
    name: str,
    fingerprint: str,
    written: Sequence[Written],
    shards: dict[int, str | None],
    *keys: KeyRows,
) -> None:
    _check_keys(written, keys)
    held_by = [result.held_by for result in written]
    writes = list(zip(keys, held_by, strict=True))
    Table(uri).key_files.write(name, writes, shards, staged=fingerprint)


def _check_keys(written: Sequence[Written], keys: Sequence[KeyRows]) -> None:
    for some, result in zip(keys, written, strict=True):
        num_rejected = result.rejected.num_rows if result.rejected else 0
        if (len(some.embedded), len(some)) != (result.num_rows, result.num_rows + num_rejected):
            # Ray has computed them once more after a loss, of a model that answers otherwise.
            raise FmembedError("the keys of a part were computed anew, and are others by now")
