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
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from deltalake import QueryBuilder

from fmembed.errors import SpecError, TableError, reason
from fmembed.result import RunResult
from fmembed.rows.columns import PARENT_ID, ROW_ID
from fmembed.rows.ids import Keys, LeftOut, RowIds, keys_of
from fmembed.run import buckets, here
from fmembed.run.new_version import NewVersion
from fmembed.run.passes import cleaned_up
from fmembed.sources.given import INDEX
from fmembed.spec import OutputSpec
from fmembed.table.card import Card
from fmembed.table.key_rows import KINDS, KeyRows
from fmembed.table.known import KnownRows
from fmembed.table.lock import Lock
from fmembed.table.promoted import promoted_version
from fmembed.table.records import Commit, WholeShard, drop_shards, read_shards
from fmembed.table.rewriting import Held
from fmembed.table.store import Store
from fmembed.table.table import Table
from fmembed.table.versions import tidy

_SAMPLES = 20
_CHOSEN = "_chosen"
# An id that a reader gives a row: where it is, or what of it is not known.
_PLACE = re.compile(r"#\d+(\.\.|/line \d+)?$")


@dataclass(frozen=True)
class Deletion:
    """What was deleted, or would be: rows of the source, of whose pieces none stays.

    `rows_rejected` are those among the rejected ones; `samples` are some of the ids, `rows_left`
    what the table has then (of a trial on a table of chunks at most that); `num_absent` are given
    ids that the table does not have, and `absent` some of them. `version` is None of a trial.
    `is_behind` says that the readers of the table's store get an older version, which may have the
    rows.
    """

    table: str
    version: int | None
    rows: int
    rows_rejected: int
    rows_left: int
    num_absent: int
    samples: tuple[str, ...]
    absent: tuple[str, ...] = ()
    purged: bool = False
    is_behind: bool = False


def delete(
    uri: str | Path,
    where: str | None = None,
    *,
    ids: Iterable[str] | None = None,
    listed_in: str | Path | None = None,
    purge: bool = False,
    dry_run: bool = False,
) -> Deletion:
    """Take rows out of a table, and keep them out: no later run brings them back.

    A row of the source goes whole: of a text in chunks all of them, where one is meant. Rejected
    rows of these ids go too, the report is deleted, and so is what a killed refresh had finished.
    Where an id says no more than where a row was (`file#number`, or the number of a row of data in
    memory), its content is kept out, and with it all rows of the same content.

    Args:
        uri: The table.
        where: Which rows, as SQL says it of the table's columns: `topic = 'spam' and year < 2020`.
        ids: Or their ids in the source, embedded, rejected, or not there yet.
        listed_in: Or another table of the same source: all that was deleted from that one.
        purge: Leave no byte of them: older versions and probes are deleted too. The keys of their
            ids stay, as a list of what is to stay out.
        dry_run: Change nothing, and say what would be.

    Raises:
        SpecError: None of `where`, `ids` and `listed_in`, or several.
        TableError: No table there, or `where` is no condition on its columns.
        LockedError: A run is writing the table.
    """
    if sum(given is not None for given in (where, ids, listed_in)) != 1:
        raise SpecError(
            "delete: takes where, a condition on the table's columns (--where SQL), or ids (--ids "
            "FILE), or listed_in, a table (--listed-in TABLE); one of them"
        )
    if isinstance(ids, str):
        raise SpecError("ids: takes a list of ids")
    table, given = Table.open(uri), None if ids is None else list(dict.fromkeys(ids))
    if odd := [i for i in given or () if not isinstance(i, str) or not _is_utf8(i)]:
        raise SpecError(f"ids: takes texts, got {odd[0]!a:.80}")
    other = None if listed_in is None else Table.open(listed_in).deleted.read()
    run_id = uuid.uuid4().hex[:12]
    if dry_run:
        return _delete(table, where, given or [], other, purge, run_id, None)
    with Lock(table.storage, run_id) as lock:
        return _delete(table, where, given or [], other, purge, run_id, lock)


def undelete(uri: str | Path) -> int:
    """Let rows come back that `delete` has removed: the next run reads the whole source for them.

    Of a table in a store to all of its tables, which go by one another's lists.

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
    # This table goes by the lists of the others in its store, and they by its own.
    for other in table.deleted.beside:
        with Lock(other.storage, run_id):
            drop_shards(other.storage, Commit(run=f"{run_id}-undelete"))
            other.clear()
    return num_deleted


def _delete(
    table: Table,
    where: str | None,
    ids: Sequence[str],
    other: LeftOut | None,
    purge: bool,
    run_id: str,
    lock: Lock | None,
) -> Deletion:
    began, card = time.monotonic(), table.card()
    assert card is not None
    if purge and (lost := table.lost_runs()):
        raise TableError(
            f"table: the log of {table.uri} no longer holds what run {lost[0]} has committed; "
            "nothing was deleted: fmembed verify --repair takes its parts back, then purge"
        )
    if purge and (promoted := promoted_version(table)) not in (None, table.version()):
        raise TableError(
            f"table: the store of {table.uri} has version {promoted} promoted, which is not the "
            "newest; nothing was deleted: fmembed promote the newest, or delete without --purge"
        )
    if lock is not None:
        table.clean_up(card.identity, run_id, retry_rejected=False)
        table.drop_staged()  # in which they may be too
    chosen = _find(table, where) if where is not None else ids
    keys = _Keys(table.known(), chosen, other, card)
    gone = KeyRows.join(keys.dead)
    is_embedded = gone.kinds == 0
    found = [name for name in keys.chosen if keys.is_found(name)]
    deletion = Deletion(
        table=table.uri,
        version=None,
        rows=int(is_embedded.sum()),
        rows_rejected=len(gone) - int(is_embedded.sum()),
        rows_left=_count(table) - (int(is_embedded.sum()) if lock is None else 0),
        num_absent=len(chosen) - len(found),
        samples=tuple(sorted(found)[:_SAMPLES]),
        absent=tuple(sorted(set(chosen).difference(found))[:_SAMPLES]),
    )
    if lock is None:
        return deletion
    table.deleted.begin(keys.out)
    old = table.rows.version()
    commit = Commit(
        run=run_id, rows_version=table.rows.version(), rejected_version=table.rejected.version()
    )
    if len(gone):
        commit = _commit(table, keys, lock, run_id)
    table.deleted.finish(table.rows.version())
    if len(gone) or table.is_uncounted():
        table.drop_report()  # which may show them
        result = RunResult(
            run_id=run_id,
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            table=table.uri,
            version=table.version(),
            fingerprint=card.fingerprint,
            rows_removed=deletion.rows,
            kind="delete",
            seconds=round(time.monotonic() - began, 2),
            table_rows=_count(table),
            table_rejected=table.num_rejected(),
        )
        table.put_run(commit, result)
    if (lies_in := Store.of(table)) is not None:
        store, name = lies_in
        store.follow(name, old, table.rows.version(), "rows were deleted")
    promoted = promoted_version(table)
    if purge:
        tidy(table, None, 1, purge=True)
    deletion = replace(deletion, is_behind=promoted is not None and promoted != table.version())
    return replace(deletion, rows_left=_count(table), version=table.version(), purged=purge)


def _count(table: Table) -> int:
    return sum(part.num_rows for part in table.rows.parts())


class _Keys:
    """The keys of a table's rows, a bucket at a time: which go, and how many stay in each part.

    `out` is what is to stay out: what was chosen, and what was listed before.
    """

    def __init__(
        self, known: KnownRows, chosen: Sequence[str], other: LeftOut | None, card: Card
    ) -> None:
        self.known, self.chosen = known, chosen
        self.shards = sorted({key for keys in known.sets for key in keys.shards})
        self._numbers = {key: i for i, key in enumerate(self.shards)}
        self.num_buckets = buckets.count_buckets(known.num_rows)
        source = card.spec.get("source")
        id_column = source.get("id") if isinstance(source, dict) else None
        places = [name for name in chosen if _is_place(name, id_column)]
        self._found = _Found(known, self.num_buckets, keys_of(chosen), keys_of(places))
        # What is on record in place of a row whose id nobody knows looks like a place, and is a
        # warning: as long as it is there no row leaves (run/removals.py).
        named = keys_of(
            name for name in set(chosen).difference(places)
            if not _PLACE.search(name) or self._found.has(name, is_embedded=True)
        )  # fmt: skip
        self.out = known.deleted().join(LeftOut(named, self._found.contents))
        self.out = self.out if other is None else self.out.join(other)
        self.rows = np.zeros(len(known.paths), dtype=np.int64)
        self.dead: list[KeyRows] = []
        for bucket in range(self.num_buckets):
            rows, is_dead = self._look(bucket)
            self.rows += np.bincount(rows.places, minlength=len(known.paths))
            self.dead.append(rows[is_dead])

    def is_found(self, name: str) -> bool:
        """Whether the table has a row of this id, embedded or rejected."""
        return self._found.has(name)

    def _look(self, bucket: int) -> tuple[KeyRows, npt.NDArray[np.bool_]]:
        rows = self.known.read_bucket(bucket, self.num_buckets, self._numbers)
        is_listed = self.out.covers(rows.ids, rows.contents)
        return rows, is_listed & (rows.kinds != KINDS.index("rest"))

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


class _Found:
    """Of some ids those that a table has, and the contents of those that are places."""

    def __init__(self, known: KnownRows, num_buckets: int, chosen: Keys, places: Keys) -> None:
        found, contents = [], [keys_of([])]
        wanted, by_place = RowIds(chosen), RowIds(places)
        for bucket in range(num_buckets):
            rows = known.read_bucket(bucket, num_buckets, {})
            found.append(rows[wanted.contains(rows.ids)])
            contents.append(rows.contents[by_place.contains(rows.ids) & (rows.contents != b"")])
        rows = KeyRows.join(found)
        self._ids, self._embedded = set(rows.ids.tolist()), set(rows.embedded.tolist())
        self.contents: Keys = np.unique(np.concatenate(contents))

    def has(self, name: str, is_embedded: bool = False) -> bool:
        """Whether the table has a row of this id; or an embedded one."""
        return bytes(keys_of([name])[0]) in (self._embedded if is_embedded else self._ids)


def _is_place(row_id: str, id_column: Any) -> bool:
    """Whether an id says where a row was, which another one may be by the next run."""
    return id_column == INDEX or (not id_column and bool(_PLACE.search(row_id)))


def _is_utf8(text: str) -> bool:
    try:
        return bool(text.encode()) or not text
    except UnicodeEncodeError:
        return False


def _commit(table: Table, keys: _Keys, lock: Lock, run_id: str) -> Commit:
    whole = keys.whole(table)
    new = NewVersion(table, keys.known, keys.held(), run_id, lock, tasks=here)
    with cleaned_up(table, lock, run_id):
        new.rewrite(keys.dead, _part_bytes(table))
        task = here.remote()(keys.live)
        new.write_keys([task.remote(i) for i in range(keys.num_buckets)], keys.shards)
        commit = new.commit()
    new.clean_up(commit, whole)
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
        # As a column: of one that fails wherever it is looked at, a filter would be left out.
        query = f'select "{column}", ({where}) as "{_CHOSEN}" from rows'  # noqa: S608
        found: list[Any] = []
        for batch in QueryBuilder().register("rows", delta).execute(query):
            rows = pa.table(batch)
            if not pa.types.is_boolean(rows[_CHOSEN].type):
                raise TypeError(f"it is {rows[_CHOSEN].type}, and not true or false")
            ids = rows[column].cast(pa.large_string())
            found += ids.filter(rows[_CHOSEN].fill_null(False)).to_pylist()
    except Exception as e:  # its parser's, planner's and engine's own
        told = re.sub(r"^.*?(Schema|SQL|Arrow) error: ", "", reason(e))
        raise TableError(
            f"where: {where!a:.200} is no condition on the columns of {table.uri} "
            f"({', '.join(names)}): {told[:300]} (a text stands in quotes: \"topic = 'spam'\")"
        ) from None
    return list(dict.fromkeys(map(str, found)))
