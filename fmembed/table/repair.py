"""A way back for a table that was damaged: from what its parts say of themselves.

Nothing is deleted. What cannot be read is moved to `<table>/_quarantine/<run>/`, out of the log
first; parts that no log names any more are taken back where each row has its place; records that
speak of commits which are gone are made anew. The rows that are then missing, the next run of the
same command embeds.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.compute as pc

from fmembed.errors import DamagedError, TableError
from fmembed.result import RunResult
from fmembed.rows.columns import DUPLICATE, PARENT_ID, REJECTED_SCHEMA, ROW_ID
from fmembed.rows.ids import RowIds, keys_of
from fmembed.table.card import TABLE, Card
from fmembed.table.files import PART, REJECTED, RUN, WRITE, Part
from fmembed.table.lock import Lock
from fmembed.table.log import ENTRY, Log, what_is_cut
from fmembed.table.records import (
    RECORD,
    Commit,
    put_run,
    put_shards,
    read_all_runs,
    read_runs,
    read_shards,
    run_path,
)
from fmembed.table.table import Table


def repair(uri: str) -> list[str]:
    """Mend what is damaged; what was done, a line each, none where nothing was to be done.

    Raises:
        TableError: Nothing of this project's is there, or of several tables.
        LockedError: A run is writing the table.
    """
    if "://" not in uri and not Path(uri).expanduser().is_dir():
        raise TableError(f"table: no such folder: {uri}")
    table = Table(uri)
    if not table.is_own():
        raise TableError(f"table: {uri} is no fmembed table and holds no part of one")
    run_id = uuid.uuid4().hex[:12]
    with Lock(table.storage, run_id):
        return _Repair(table, run_id).mend()


class _Repair:
    def __init__(self, table: Table, run_id: str) -> None:
        self._table, self._run_id = table, run_id
        self._done: list[str] = []
        # What this mending has committed itself: a log that loses it again has lost commits.
        self._commit = Commit(run=f"{run_id}-repair")

    def mend(self) -> list[str]:
        """Logs, then parts, then records: each from what comes before it."""
        table = self._table
        _mend_log(table.rows, "", self._quarantine)
        card = table.card() or self._find_card()
        _mend_log(table.rejected, REJECTED, self._quarantine)
        embedded = RowIds()
        self._mend_parts(table.rows, "", card, RowIds(), embedded)
        self._mend_parts(table.rejected, REJECTED, card, embedded, RowIds())
        for path in table.known().find_wrong():
            self._quarantine(path, "not the keys of its parts' rows, which are read instead")
        self._mend_records(card)
        return self._done

    def _quarantine(self, path: str, why: str) -> None:
        self._table.storage.move(path, f"_quarantine/{self._run_id}/{path}")
        self._done.append(f"{path}: {why}; moved to _quarantine/{self._run_id}")

    def _find_card(self) -> Card:
        """What the parts say of their table, where its log says nothing any more."""
        table = self._table
        found: dict[str, Card] = {}
        on_record: dict[str, Card] = {}
        recorded = {
            part
            for _, shards in read_shards(table.storage)
            for shard in shards
            for part in shard.parts or ()
        }
        for log in (table.rows, table.rejected):
            for path in filter(PART.fullmatch, log.storage.paths()):
                stamp = log.files.read_stamp(path)
                own = {k: v for k, v in stamp.items() if k not in (RUN, WRITE)}
                card = Card.of(own, table.uri)
                if card is not None:
                    found[card.table + card.fingerprint] = card
                    named = path if log is table.rows else REJECTED + path
                    if named in recorded:
                        on_record[card.table + card.fingerprint] = card
        # Parts of a run that died before another model had the folder are on no record.
        if len(on_record) == 1:
            found = on_record
        if len(found) != 1:
            what = "parts of several tables" if found else "no part that can be read"
            raise TableError(f"table: {table.uri} has no log and {what}; it cannot be mended")
        return next(iter(found.values()))

    def _mend_parts(
        self, log: Log, folder: str, card: Card, elsewhere: RowIds, known: RowIds
    ) -> None:
        """Take out what cannot be read, and back in what no version names.

        Args:
            log: Of embedded or of rejected rows.
            folder: Where it is in the table.
            card: The table's.
            elsewhere: Ids of the other log, which no row here may have.
            known: Grows with the ids of this log.
        """
        is_rows = not folder
        configuration = card.to_configuration()
        if log.delta() is None:
            schema = None if is_rows else REJECTED_SCHEMA
            for path in filter(PART.fullmatch, log.storage.paths()) if schema is None else ():
                if log.files.read_stamp(path).get(TABLE) == card.table:
                    schema = log.files.read_schema(Part(path, 0, 0))
                    break
            if schema is None:
                raise TableError(
                    f"table: {self._table.uri} has no log and no part with embedded rows; its "
                    "source has to be embedded anew, into another folder"
                )
            log.create(schema, configuration, self._run_id)
            self._done.append(
                f"{folder}_delta_log: made anew from all parts that are here; what other tools had "
                "deleted or taken back to an older version is there again"
            )
        bad: list[tuple[Part, str]] = []
        for part in log.pin():
            try:
                self._take(log, part, is_rows, elsewhere, known)
            except DamagedError as e:
                bad.append((part, e.what))
        taken: list[Part] = []
        unfit: list[tuple[str, str]] = []
        staged = {path for file in self._table.staged() for path in file.rows_by_part}
        for path in [p for p in log.strays(card.table) if PART.fullmatch(p)]:
            if folder + path in staged:  # the next refresh takes it up
                continue
            size = log.storage.size_bytes(path) or 0
            part = Part(path, size, log.files.num_rows(path))
            try:
                self._take(log, part, is_rows, elsewhere, known, is_new=True)
                taken.append(part)
            except DamagedError as e:
                unfit.append((path, e.what.removeprefix(f"{path}: ")))
        if bad or taken:
            schema = log.schema() if is_rows else REJECTED_SCHEMA
            transaction = (self._commit.run, 0)
            removed = [part for part, _ in bad]
            log.commit(taken, schema, log.configuration(), transaction, removed)
            made = {"rows" if is_rows else "rejected": 0}
            self._commit = self._commit.model_copy(update=made)
        for part, what in bad:
            self._done.append(f"{folder}{what}; taken out of the log, its rows are embedded again")
            with contextlib.suppress(FileNotFoundError):
                if log.storage.size_bytes(part.path) is not None:
                    self._quarantine(folder + part.path, "damaged")
        self._done += [f"{folder}{p.path}: {p.num_rows} rows taken back" for p in taken]
        for path, what in unfit:
            self._quarantine(folder + path, what)

    def _take(
        self,
        log: Log,
        part: Part,
        is_rows: bool,
        elsewhere: RowIds,
        known: RowIds,
        is_new: bool = False,
    ) -> None:
        """Read a part whole and note its ids.

        Raises:
            DamagedError: It cannot be read, or has a row that is embedded where it is rejected, or,
                of one to be taken back, that the table has already.
        """
        rows = self._table.read_part(part, None) if is_rows else log.files.read_whole(part)
        if not is_rows:
            rows = rows.filter(pc.not_equal(rows["error"], DUPLICATE))
        name = PARENT_ID if PARENT_ID in rows.schema.names else ROW_ID
        keys = keys_of(dict.fromkeys(rows[name].to_pylist()))
        if elsewhere.contains(keys).any() or (is_new and known.contains(keys).any()):
            raise DamagedError(log.uri, f"{part.path}: rows of it are in the table already")
        known.add(keys)

    def _mend_records(self, card: Card) -> None:
        table, storage = self._table, self._table.storage
        for folder, kept in (
            ("_shards/", {f"_shards/{c.run}.json" for c, _ in read_shards(storage)}),
            ("_runs/", {run_path(c) for c, _ in read_all_runs(storage)}),
        ):
            for path in storage.paths(folder):
                if path not in kept and RECORD.fullmatch(path):
                    self._quarantine(path, "no record of a run, or a cut one")
        lost = set(table.lost_runs())
        for commit, shards in read_shards(storage):
            if commit.run in lost:  # tied to its parts alone from now on
                put_shards(storage, Commit(run=commit.run), shards)
        for commit, _ in read_runs(storage):
            if commit.run in lost:
                self._quarantine(run_path(commit), "the log does not hold its commits")
        num_rows = sum(part.num_rows for part in table.rows.parts())
        num_rejected = table.num_rejected()
        if not self._done and table.counted_version is not None:
            return
        result = RunResult(
            run_id=self._run_id,
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            table=table.uri,
            version=table.version(),
            fingerprint=card.fingerprint,
            rows_read=num_rows + num_rejected,
            rows_skipped=num_rows + num_rejected,
            table_rows=num_rows,
            table_rejected=num_rejected,
        )
        versions = {
            "rows_version": table.rows.version(),
            "rejected_version": table.rejected.version(),
        }
        put_run(storage, self._commit.model_copy(update=versions), result)
        self._done.append(f"_runs: {num_rows:,} rows and {num_rejected:,} rejected are on record")


def _mend_log(log: Log, folder: str, quarantine: Callable[[str, str], None]) -> None:
    """Take away what keeps a log from being read: cut newest entries, checkpoints, in the end all.

    An entry that is cut was never said to be committed: that is said after it is on the disk.
    """
    try:
        log.delta()
        return
    except DamagedError:
        pass
    entries = sorted(path for path in log.storage.sizes("_delta_log/") if ENTRY.fullmatch(path))
    while entries:
        content = log.storage.get(entries[-1])
        why = what_is_cut(content) if content else "is empty"
        if not why:
            break
        quarantine(folder + entries.pop(), why)
    for is_last in (False, True):
        try:
            log.delta()
            return
        except DamagedError as e:
            for path in sorted(log.storage.sizes("_delta_log/")):
                if is_last or not ENTRY.fullmatch(path):
                    quarantine(folder + path, e.what)
