"""Rows taken out of a table by hand, in one new version, and kept out of those that follow.

In this process and without Ray: of most tables only a few parts hold a row that goes. The list of
what stays out is written before the version is: a kill in between brings no row back, and the same
command, or a refresh, takes out what is left.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
from deltalake import QueryBuilder

from fmembed.errors import SpecError, TableError, reason
from fmembed.result import RunResult
from fmembed.rows.columns import PARENT_ID, ROW_ID
from fmembed.rows.ids import RowIds, keys_of
from fmembed.run import buckets, here
from fmembed.run.new_version import NewVersion
from fmembed.run.passes import cleaned_up
from fmembed.spec import OutputSpec
from fmembed.table.key_rows import KeyRows
from fmembed.table.known import KnownRows
from fmembed.table.lock import Lock
from fmembed.table.records import Commit, WholeShard, drop_shards, read_shards
from fmembed.table.rewriting import Held
from fmembed.table.table import Table
from fmembed.table.versions import tidy

_SAMPLES = 20


@dataclass(frozen=True)
class Deletion:
    """What was deleted, or would be: rows of the source, of whose pieces none stays.

    `rows_rejected` are those among the rejected ones; `samples` are some of the ids, `rows_left`
    what the table has then; `num_absent` are given ids that the table does not have. `version` is
    None of a trial.
    """

    table: str
    version: int | None
    rows: int
    rows_rejected: int
    rows_left: int
    num_absent: int
    samples: tuple[str, ...]
    purged: bool = False


def delete(
    uri: str,
    where: str | None = None,
    *,
    ids: Iterable[str] | None = None,
    purge: bool = False,
    dry_run: bool = False,
) -> Deletion:
    """Take rows out of a table, and keep them out: no later run brings them back.

    A row of the source goes whole: of a text in chunks all of them, where one is meant. Rejected
    rows of these ids go too, the report is deleted, and so is what a killed refresh had finished.

    Args:
        uri: The table.
        where: Which rows, as SQL says it of the table's columns: `topic = 'spam' and year < 2020`.
        ids: Or their ids in the source, embedded or rejected.
        purge: Leave no byte of them: older versions and probes are deleted too. The keys of their
            ids stay, as a list of what is to stay out.
        dry_run: Change nothing, and say what would be.

    Raises:
        SpecError: Neither `where` nor `ids`, or both.
        TableError: No table there, or `where` is no condition on its columns.
        LockedError: A run is writing the table.
    """
    if (where is None) == (ids is None):
        raise SpecError("delete: takes where, a condition on the table's columns, or ids; either")
    if isinstance(ids, str):
        raise SpecError("ids: takes a list of ids")
    table, given = Table.open(uri), None if ids is None else list(dict.fromkeys(ids))
    run_id = uuid.uuid4().hex[:12]
    if dry_run:
        return _delete(table, where, given, purge, run_id, None)
    with Lock(table.storage, run_id) as lock:
        return _delete(table, where, given, purge, run_id, lock)


def undelete(uri: str) -> int:
    """Let rows come back that `delete` has removed: the next run reads the whole source for them.

    Args:
        uri: The table.

    Returns:
        How many ids were kept out.
    """
    table, run_id = Table.open(uri), uuid.uuid4().hex[:12]
    with Lock(table.storage, run_id):
        try:
            num_deleted = len(table.deleted.read())
        except TableError:  # damaged: it is deleted as it is
            num_deleted = 0
        # First, so that a kill in between costs reading, and no row.
        drop_shards(table.storage, Commit(run=f"{run_id}-undelete"))
        table.deleted.clear()
        return num_deleted


def _delete(
    table: Table,
    where: str | None,
    ids: Sequence[str] | None,
    purge: bool,
    run_id: str,
    lock: Lock | None,
) -> Deletion:
    began, card = time.monotonic(), table.card()
    assert card is not None
    if lock is not None:
        table.clean_up(card.identity, run_id, retry_rejected=False)
    known = table.known()
    chosen = _find(table, where) if where is not None else list(ids or ())
    wanted = RowIds(keys_of(chosen))
    keys = _Keys(known, wanted)
    names = {bytes(key): name for key, name in zip(keys_of(chosen), chosen, strict=True)}
    gone = KeyRows.join(keys.dead)
    is_embedded = gone.kinds == 0
    found = set(gone.ids.tolist())
    deletion = Deletion(
        table=table.uri,
        version=None,
        rows=int(is_embedded.sum()),
        rows_rejected=len(gone) - int(is_embedded.sum()),
        rows_left=sum(part.num_rows for part in table.rows.parts()),
        num_absent=len(names.keys() - found) if ids is not None else 0,
        samples=tuple(sorted(names[key] for key in found)[:_SAMPLES]),
    )
    if lock is None:
        return deletion
    if len(gone):
        commit = _commit(table, keys, lock, run_id)
        num_rows = sum(part.num_rows for part in table.rows.parts())
        deletion = replace(deletion, rows_left=num_rows, version=table.version())
        result = RunResult(
            run_id=run_id,
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            table=table.uri,
            version=table.version(),
            fingerprint=card.fingerprint,
            rows_removed=deletion.rows,
            kind="delete",
            seconds=round(time.monotonic() - began, 2),
            table_rows=num_rows,
            table_rejected=table.num_rejected(),
        )
        table.put_run(commit, result)
    if purge:
        tidy(table, None, 1, purge=True)
    return replace(deletion, version=table.version(), purged=purge)


class _Keys:
    """The keys of a table's rows, a bucket at a time: which go, and how many stay in each part."""

    def __init__(self, known: KnownRows, wanted: RowIds) -> None:
        self.known, self._wanted = known, wanted
        self.shards = sorted({key for keys in known.sets for key in keys.shards})
        self._numbers = {key: i for i, key in enumerate(self.shards)}
        self.num_buckets = buckets.count_buckets(known.num_rows)
        self.rows = np.zeros(len(known.paths), dtype=np.int64)
        self.dead: list[KeyRows] = []
        for bucket in range(self.num_buckets):
            rows, is_dead = self._look(bucket)
            self.rows += np.bincount(rows.places, minlength=len(known.paths))
            self.dead.append(rows[is_dead])

    def _look(self, bucket: int) -> tuple[KeyRows, npt.NDArray[np.bool_]]:
        rows = self.known.read_bucket(bucket, self.num_buckets, self._numbers)
        return rows, self._wanted.contains(rows.ids)

    def live(self, bucket: int) -> KeyRows:
        """The rows of a bucket that stay."""
        rows, is_dead = self._look(bucket)
        return rows[~is_dead]

    def held(self) -> list[Held]:
        """The parts, and what stays of each."""
        gone = KeyRows.join(self.dead)
        live = self.rows - np.bincount(gone.places, minlength=len(self.known.paths))
        both = zip(self.rows.tolist(), live.tolist(), strict=True)
        parts = self.known.parts.items()
        return [Held(path, part, n, m) for (path, part), (n, m) in zip(parts, both, strict=True)]

    def whole(self, table: Table) -> list[WholeShard]:
        """The shards of which all rows are known, with what is left of them."""
        counts, is_whole = self.known.count_by_shard(), table.whole_shards(self.known)
        gone = KeyRows.join(self.dead)
        num_gone = np.bincount(gone.shards[gone.shards >= 0], minlength=len(self.shards))
        return [
            WholeShard(s.key, s.rows - int(num_gone[self._numbers[s.key]]), None, s.end)
            for _, shards in read_shards(table.storage)
            for s in shards
            if s.key in is_whole and s.key in self._numbers and counts[s.key] == s.rows
        ]


def _commit(table: Table, keys: _Keys, lock: Lock, run_id: str) -> Commit:
    whole = keys.whole(table)
    new = NewVersion(table, keys.known, keys.held(), run_id, lock, tasks=here)
    with cleaned_up(table, lock, run_id):
        new.rewrite(keys.dead, _part_bytes(table))
        task = here.remote()(keys.live)
        new.write_keys([task.remote(i) for i in range(keys.num_buckets)], keys.shards)
        table.deleted.add(KeyRows.join(keys.dead).ids)
        commit = new.commit()
    new.clean_up(commit, whole)
    table.drop_report()  # which may show them
    return commit


def _part_bytes(table: Table) -> int:
    """What the config of the table said, if it said anything that holds."""
    card = table.card()
    output = card.spec.get("output") if card is not None else None
    said = output.get("part_bytes") if isinstance(output, dict) else None
    is_number = isinstance(said, int) and said >= 1
    return said if is_number and said is not None else OutputSpec(uri="table").part_bytes


def _find(table: Table, where: str) -> list[str]:
    """Ids of the source's rows that a condition is true of, each once."""
    delta, names = table.rows.delta(), table.schema().names
    if delta is None or not names:
        return []
    column = PARENT_ID if PARENT_ID in names else ROW_ID
    try:
        # In brackets: a condition, and nothing that comes after one.
        query = f'select distinct "{column}" from rows where ({where})'  # noqa: S608
        found = QueryBuilder().register("rows", delta).execute(query).read_all()
    except Exception as e:  # its parser's, planner's and engine's own
        told = re.sub(r"^.*?(Schema|SQL|Arrow) error: ", "", reason(e))
        raise TableError(
            f"where: {where!a:.200} is no condition on the columns of {table.uri} "
            f"({', '.join(names)}): {told[:300]}"
        ) from None
    return [str(each) for each in found.column(0).to_pylist()]
