"""A table of embeddings in storage: what is in it, what runs may do to it, and how it is read.

    <table>/part-<blake2b>.parquet   rows; each part is named after its own checksum
    <table>/_delta_log/              which parts are committed; the table's card in its metadata
    <table>/_rejected/               the rejected rows, a Delta table of the same make
    <table>/_keys/                   ids and contents of the rows, as keys (keys.py)
    <table>/_runs/, _shards/         records of runs (records.py)
    <table>/_lock/                   who writes (lock.py)
    <table>/_deleted/                ids that were deleted, and stay out (deleted.py)
    <table>/_probes/, _report.html   what the probes found
    <table>/_quarantine/             what `verify --repair` could not read

Workers write parts (parts.py, files.py), the driver alone commits (log.py). The first thing that a
run makes of a table is its log: so a folder without one is not a table, and nothing in it is
touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fmembed.errors import DamagedError, FmembedError, TableError
from fmembed.result import RunResult, check_run
from fmembed.rows.columns import DUPLICATE, REJECTED_SCHEMA, ROW_ID
from fmembed.rows.ids import RowIds, keys_of
from fmembed.storage import tell
from fmembed.table.card import FINGERPRINT, TABLE, Card
from fmembed.table.deleted import STORE_MARK, Deleted
from fmembed.table.files import PART, REJECTED, RUN, WRITE, Part
from fmembed.table.keys import KeyFiles, KeySet
from fmembed.table.known import KnownRows, know
from fmembed.table.log import Log
from fmembed.table.output import check_usable
from fmembed.table.parts import as_written
from fmembed.table.records import (
    Commit,
    WholeShard,
    drop_shards,
    put_run,
    put_shards,
    read_all_runs,
    read_runs,
    read_shards,
)

# deltalake decodes these in a local path, and looks for the log in another folder.
_DECODED = re.compile(r"%[0-9A-Fa-f]{2}|\\")


class Table:
    """A table of embeddings, its rejected rows and its records."""

    def __init__(self, uri: str, is_still: bool = False) -> None:
        """Name a table; for one who reads once it stays still, as `Log` says it."""
        self.rows = Log(uri, is_still)
        self.uri = self.rows.uri
        self.storage = self.rows.storage
        self.rejected = Log(f"{self.uri}/_rejected", is_still)
        self.key_files = KeyFiles(self.storage)
        self.deleted = Deleted(self.storage)

    @classmethod
    def open(cls, uri: str | Path, is_still: bool = False) -> Table:
        """Open a table that exists, if only with rejected rows; maybe still, as `Log` says it.

        Raises:
            TableError: There is none, or it is not the name of one.
        """
        if not isinstance(uri, str | Path):
            raise TableError(f"table: takes a folder or a URL, got {uri!a:.80}")
        uri = str(uri).removeprefix("file://")
        if "://" not in uri and not os.path.isdir(Path(uri).expanduser()):
            if os.path.isfile(Path(uri).expanduser()):
                raise TableError(
                    f"table: {uri} is a file; a table is a folder, which fmembed embed has made"
                )
            raise TableError(f"table: no such folder: {uri}")
        table = cls(uri, is_still)
        if table.card() is None:
            if table.storage.size_bytes(STORE_MARK) is not None:
                paths = table.storage.paths("tables/")
                names = [p.removeprefix("tables/").rstrip("/") for p in paths]
                have = ", ".join(names[:5]) or "no table yet"
                raise TableError(f"table: {uri} is a store of tables; name one of them: {have}")
            lost = "; its parts are there: fmembed verify --repair makes it a log"
            raise TableError(
                f"table: {uri} is no fmembed table: it has no log of one"
                + (lost if table.has_own_files() else "")
            )
        return table

    @classmethod
    def open_output(
        cls, uri: str, identity: dict[str, Any], model: str = "", is_still: bool = False
    ) -> Table:
        """Open where a run may write: nothing there yet, or a table of the same fingerprint.

        Args:
            uri: Where.
            identity: Of the run.
            model: What the run calls its model, for a message.
            is_still: Until `look_anew`, as `Log` says it.

        Raises:
            TableError: It cannot be written, holds something else, or another model's vectors.
        """
        uri = uri.removeprefix("file://")
        local = Path(uri).expanduser()
        if "://" not in uri and os.path.exists(local) and not os.path.isdir(local):
            raise TableError(f"output.uri: {uri} is a file; give a folder or a URL")
        if coded := _DECODED.search(uri if "://" in uri else str(local.absolute())):
            raise TableError(
                f"output.uri: Delta Lake opens no folder with {coded[0]} in its path ({uri}); "
                "give another"
            )
        absent = (
            [] if "://" in uri else [p for p in (local, *local.parents) if not os.path.exists(p)]
        )
        table = cls(uri, is_still)
        try:
            check_usable(table, identity, model)
            # Learn now, not after an hour, that nothing can be written here.
            tried = f"_lock/.probe-{uuid.uuid4().hex}"
            table.storage.put(tried, b"")
            table.storage.delete(tried)
        except (TableError, DamagedError):
            raise
        except FmembedError as e:
            raise TableError(f"{e}; give a folder or URL that this user may write") from None
        finally:
            _remove_empty([table.uri + "/_lock", *absent])
        return table

    def look_anew(self) -> None:
        """Be still no more: what follows is done under the lock."""
        self.rows.look_anew()
        self.rejected.look_anew()

    def is_own(self) -> bool:
        """Whether this project has made what lies here, even if its log cannot be read any more."""
        try:
            first = self.storage.get("_delta_log/00000000000000000000.json")
        except FileNotFoundError:
            first = b""
        return f'"{FINGERPRINT}"'.encode() in first or self.has_own_files()

    def has_own_files(self) -> bool:
        """Whether parts lie here that say they are of a table of this project."""
        paths = [*self.storage.paths(), *self.storage.paths(REJECTED)]
        parts = [p for p in paths if PART.fullmatch(p.removeprefix(REJECTED))]
        return any(TABLE in self.rows.files.read_stamp(p) for p in parts)

    def is_bare(self) -> bool:
        """Whether no row was ever committed, so that another model may have the table."""
        rejected = self.rejected.delta()
        return self.rows.is_bare() and (rejected is None or self.rejected.is_bare())

    def claim(self, card: Card, schema: pa.Schema, run_id: str) -> Card:
        """Make the table this run's to write: its logs are created where there are none.

        Only under the lock, and after `check_usable`.

        Args:
            card: What the table will say of itself; of one that is there the id is kept.
            schema: Its columns.
            run_id: Whose claim.

        Returns:
            The table's card.

        Raises:
            TableError: It has other columns.
            ConflictError: Somebody else has created it meanwhile.
        """
        known, delta = self.card(), self.rows.delta()
        is_same = known is not None and known.fingerprint == card.fingerprint
        if known is not None and is_same:
            card = known
        configuration = card.to_configuration()
        if delta is not None and is_same and not self.is_bare():
            self.rows.check_columns(delta, schema)
        elif delta is None or not is_same or not self.rows.has_columns(schema):
            self.rows.create(schema, configuration, run_id)
        if self.rejected.delta() is None:
            if self.rows.version() > 0:
                tell(f"the log of {self.rejected.uri} is gone; its rows are read again")
            self.rejected.create(REJECTED_SCHEMA, configuration, run_id)
        elif self.rejected.configuration().get(FINGERPRINT) != card.fingerprint:
            self.rejected.create(REJECTED_SCHEMA, configuration, run_id)
        return card

    def card(self) -> Card | None:
        """What the table says of itself; None where there is no log of ours.

        Raises:
            TableError: It says it in no way that this project does.
        """
        return Card.of(self.rows.configuration(), self.uri)

    def version(self) -> int | None:
        """The newest version, None where nothing was ever committed."""
        version = self.rows.version()
        return None if version < 0 else version

    def check_version(self, version: int) -> None:
        """Make sure that there is a version, or was one that is not kept.

        Raises:
            TableError: There is none, or the log was cut behind it.
        """
        newest, oldest = self.version() or 0, self.rows.oldest()
        if not 0 <= version <= newest:
            raise TableError(f"version: {self.uri} has the versions 0 to {newest}, not {version}")
        if version < oldest:
            raise TableError(
                f"version: version {version} of {self.uri} is no longer kept; the oldest that is "
                f"on record is {oldest}"
            )

    def schema(self) -> pa.Schema:
        """The columns as the parts have them; empty where nothing was ever committed."""
        parts = self.rows.parts()
        return self.schema_of(parts[0]) if parts else pa.schema([])

    def schema_of(self, part: Part) -> pa.Schema:
        """The columns of one part."""
        if PART.fullmatch(part.path):
            return self.rows.files.read_schema(part)
        # Of what another tool has written, its lists have to be looked at.
        return self.read_part(part, None).schema

    def known(self, with_staged: bool = False) -> KnownRows:
        """What the newest version knows of the source's rows: by its files of keys, unread.

        From here on this object commits only on top of what was looked at here.

        Args:
            with_staged: Tell of what a refresh has written and not committed too.

        Raises:
            DamagedError: A part is missing, or has not the size that it was written with.
        """
        rows, rejected = self.rows.pin(), self.rejected.pin()
        self.rows.check_there(rows)
        self.rejected.check_there(rejected)
        card = self.card()
        pieces = card is not None and bool(card.identity.get("preprocess.pieces_are_rows"))
        of = card.fingerprint if card is not None and with_staged else ""
        return know(self.uri, rows, rejected, pieces, of)

    @property
    def has_moved(self) -> bool:
        """Whether somebody has committed since `known`."""
        return self.rows.has_moved or self.rejected.has_moved

    def has_leftovers(self, retry_rejected: bool) -> bool:
        """Whether a run that has nothing to read has something to do all the same."""
        if self.strays() or self.is_uncounted():
            return True
        return retry_rejected and self.num_rejected() > 0

    def clean_up(self, identity: dict[str, Any], run_id: str, retry_rejected: bool) -> bool:
        """Make the table ready for a run that has got the lock.

        Whoever had the lock may have made the table meanwhile, or added to it.

        Args:
            identity: Of the run.
            run_id: Of the run.
            retry_rejected: Let it try the rejected rows again.

        Returns:
            Whether what is left to do has to be looked for again.

        Raises:
            TableError: It is another model's by now.
        """
        check_usable(self, identity)
        # By what was looked at before the lock: what follows looks anew.
        has_moved = self.has_moved
        self.remove_strays()
        if retry_rejected:
            self.forget_rejected(run_id)
        if self.card() is None:
            return has_moved
        known = self.known()
        there = [*self.storage.paths(), *self.storage.paths(REJECTED)]
        self.key_files.clean_up(there, known.damaged)
        known.write_missing(f"{run_id}-missing")
        return has_moved or retry_rejected or bool(known.missing)

    def strays(self) -> list[tuple[Log, str]]:
        """What dead runs left behind: files of this table that no version names."""
        card = self.card()
        if card is None:
            return []
        logs = ((self.rows, ""), (self.rejected, REJECTED))
        found = [(log, folder, p) for log, folder in logs for p in log.strays(card.table)]
        staged = {path for f in self.staged() for path in f.rows_by_part} if found else set()
        return [(log, p) for log, folder, p in found if folder + p not in staged]

    def staged(self) -> list[KeySet]:
        """The keys of what a refresh has written and not committed."""
        return [keys for keys in self.key_files.list()[0] if keys.staged]

    def drop_staged(self) -> None:
        """Delete what is staged, but what a version has taken in. Only under the lock."""
        for path in self.list_staged():
            self.storage.delete(path)

    def list_staged(self) -> list[str]:
        """What is staged, files of keys and parts; of these none that a version has taken in."""
        files = self.staged()
        if not files:
            return []
        named = self.rows.ever_named() | {REJECTED + p for p in self.rejected.ever_named()}
        parts = {path for file in files for path in file.rows_by_part} - named
        return [*sorted(parts), *(file.path for file in files)]

    def remove_strays(self, own: str = "") -> int:
        """Delete what dead runs left behind; how many files. Only under the lock.

        Nothing where a log has lost commits that a record speaks of: what looks like a dead run's
        may be what they had added. Parts of runs that the logs know nothing of are kept aside in
        `_quarantine`: of a run that died before its first commit, or of a table whose log and
        records were taken back to an older backup.

        Args:
            own: The run that cleans up after itself.
        """
        strays = self.strays()
        if not strays:
            return 0
        if lost := self.lost_runs():
            tell(
                f"the log of {self.uri} no longer holds what run {lost[0]} has committed; nothing "
                "is deleted, and rows that are no longer in the table are embedded again "
                "(fmembed verify --repair takes their parts back instead)"
            )
            return 0
        num_aside = 0
        for log, path in strays:
            is_half = not PART.fullmatch(path)
            run = "" if is_half else log.files.read_stamp(path).get(RUN, "")
            # A run without a name is nobody's own.
            is_known = bool(run) and (
                run == own or self.rows.held([run], [0])[0] or self.rejected.held([run], [0])[0]
            )
            if is_half or is_known:
                log.remove([path])
            else:
                folder = REJECTED if log is self.rejected else ""
                self.storage.move(folder + path, f"_quarantine/{run or 'unknown'}/{folder}{path}")
                num_aside += 1
        if num_aside:
            tell(
                f"{num_aside:,} parts of runs that the log of {self.uri} does not know were moved "
                "to its _quarantine: nothing names them, they may be deleted"
            )
        return len(strays)

    def lost_runs(self) -> list[str]:
        """Runs with a commit on record that its log does not hold, as after it was cut back."""
        commits = [commit for commit, _ in read_shards(self.storage)]
        commits += [commit for commit, _ in read_runs(self.storage)]
        held = self._held(commits)
        return sorted({c.run for c, is_held in zip(commits, held, strict=True) if not is_held})

    def _held(self, commits: Sequence[Commit]) -> list[bool]:
        """Whether the logs hold each of some commits."""
        runs = [c.run for c in commits]
        by_rows = self.rows.held(runs, [c.rows for c in commits])
        by_rejected = self.rejected.held(runs, [c.rejected for c in commits])
        return [rows and rejected for rows, rejected in zip(by_rows, by_rejected, strict=True)]

    def read_part(self, part: Part, columns: list[str] | None) -> pa.Table:
        """Read columns of a part, its checksums checked, with the types that runs write.

        Delta's own delete and optimize write lists of any length, and other kinds of text.

        Raises:
            DamagedError: It is missing, or not as it was written.
        """
        rows = self.rows.files.read_columns(part, columns)
        if PART.fullmatch(part.path):
            return rows
        card = self.card()
        assert card is not None
        return as_written(rows, card, self.rows.schema())

    def read_pieces(self, part: Part) -> Iterator[pa.Table]:
        """As `read_part`, all columns, some tens of megabytes at a time."""
        if PART.fullmatch(part.path):
            yield from self.rows.files.read_pieces(part)
        else:
            yield self.read_part(part, None)

    def num_rejected(self) -> int:
        """Rows in `_rejected`."""
        return sum(part.num_rows for part in self.rejected.parts())

    def read_rejected(self) -> pa.Table:
        """All rejected rows: row_id, stage, error, message."""
        parts = [self.rejected.files.read_whole(part) for part in self.rejected.parts()]
        return pa.concat_tables([REJECTED_SCHEMA.empty_table(), *parts])

    def rejected_by_cause(self, max_samples: int) -> list[dict[str, Any]]:
        """Rejected rows by stage and error, most frequent first, with a few of each."""
        rows = self.read_rejected()
        groups: dict[tuple[str, str], dict[str, Any]] = {}
        for row in rows.sort_by(ROW_ID).to_pylist():
            key = (row.pop("stage"), row.pop("error"))
            group = groups.setdefault(
                key, {"stage": key[0], "error": key[1], "rows": 0, "samples": []}
            )
            group["rows"] += 1
            if len(group["samples"]) < max_samples:
                group["samples"].append(row)
        return sorted(groups.values(), key=lambda g: (-g["rows"], g["stage"], g["error"]))

    def forget_rejected(self, run_id: str) -> int:
        """Let a run try the rejected rows again, as if they had never been read; how many.

        Not those with an id that another row has: that row is embedded, and stays. Only under the
        lock, and before `known`.
        """
        removed, kept, num_forgotten = [], [REJECTED_SCHEMA.empty_table()], 0
        known, parts = self.known(), self.rejected.parts()
        rows_of = [self.rejected.files.read_whole(part) for part in parts]
        ids = [keys_of(rows[ROW_ID].to_pylist()) for rows in rows_of]
        embedded = RowIds(known.which_are_embedded(np.concatenate([keys_of([]), *ids])))
        for part, rows, own in zip(parts, rows_of, ids, strict=True):
            has_twin = pa.array(embedded.contains(own))
            twins = rows.filter(pc.or_(pc.equal(rows["error"], DUPLICATE), has_twin))
            if twins.num_rows < rows.num_rows:
                removed.append(part)
                kept.append(twins)
                num_forgotten += rows.num_rows - twins.num_rows
        if not removed:
            return 0
        rows = pa.concat_tables(kept)
        configuration = self.rejected.configuration()
        stamp = {**configuration, RUN: run_id, WRITE: "forget"}
        added = [self.rejected.files.write(rows, (), stamp)] if rows.num_rows else []
        # The shards that they were read from are no longer whole: see `whole_shards`.
        self.rejected.commit(
            added, REJECTED_SCHEMA, configuration, (f"{run_id}-forget", 0), removed=removed
        )
        self.put_shards(Commit(run=f"{run_id}-forget", rejected=0), [])
        return num_forgotten

    def put_shards(self, commit: Commit, shards: Sequence[WholeShard]) -> None:
        """Record the shards whose rows a run has committed, up to a commit."""
        put_shards(self.storage, commit, shards)

    def whole_shards(self, known: KnownRows) -> dict[str, int]:
        """Key to rows of each shard whose rows are all in the table, committed or rejected.

        That is: the version has every part that held one when the shard was recorded, or as many
        rows of it as it has, by the files of keys.

        Args:
            known: What the version knows.
        """
        counts, current = known.count_by_shard(), known.parts.keys()
        return {
            shard.key: shard.rows
            for _, shards in read_shards(self.storage)
            for shard in shards
            if (counts[shard.key] == shard.rows if shard.parts is None else shard.parts <= current)
        }

    def supersede_shards(self, commit: Commit, shards: Sequence[WholeShard]) -> None:
        """Record all shards of the source, in place of what was on record of any.

        What is not among them is no more in the source. Only under the lock.
        """
        self.put_shards(commit, shards)
        drop_shards(self.storage, commit)

    def recorded_shards(self) -> dict[str, int]:
        """Key to rows of each shard that a run has seen whole, wherever its rows are by now."""
        return {s.key: s.rows for _, shards in read_shards(self.storage) for s in shards}

    def shard_ends(self) -> dict[str, tuple[int, int, int]]:
        """Of the parts of files that a run has seen whole, by their keys, where they end."""
        every = (s for _, shards in read_shards(self.storage) for s in shards)
        return {s.key: s.end for s in every if s.end is not None}

    def _current(self) -> set[str]:
        """The paths of the newest version's parts."""
        current = {part.path for part in self.rows.parts()}
        return current | {REJECTED + part.path for part in self.rejected.parts()}

    def put_run(self, commit: Commit, result: RunResult) -> None:
        """Record what a run counted; `verify` compares the table with the last one."""
        put_run(self.storage, commit, result)

    def last_run(self) -> RunResult | None:
        """What the last run that finished has counted, None where there is none.

        The last by the versions that it made, of those that the logs hold: clocks differ.

        Raises:
            TableError: Its record is not as a run writes it, and no other is of its versions.
        """
        damaged: TableError | None = None
        last: tuple[int, int] | None = None
        for versions, raw in self._counted():
            if last is not None and versions != last:
                break
            last = versions
            try:
                return check_run(raw, self.uri)
            except TableError as e:  # a later run with nothing to do has counted anew
                damaged = e
        if damaged is not None:
            raise damaged
        return None

    def spent(self) -> dict[str, float]:
        """What the runs on record have cost, summed: `device_hours`, and `cost` where there was a
        price.
        """
        total: dict[str, float] = {}
        for _, raw in read_all_runs(self.storage):
            spent = raw.get("spent") if isinstance(raw, dict) else None
            for name, amount in spent.items() if isinstance(spent, dict) else ():
                if name in ("device_hours", "cost") and isinstance(amount, int | float):
                    total[name] = total.get(name, 0.0) + amount
        return total

    @property
    def counted_version(self) -> int | None:
        """The version that the last run's record speaks of, damaged or not; None without one."""
        return next((versions[0] for versions, _ in self._counted()), None)

    def _counted(self) -> Iterator[tuple[tuple[int, int], Any]]:
        """The versions and counts of the runs whose commits the logs hold, the last one first."""
        newest = (self.rows.version(), self.rejected.version())
        for commit, result in read_runs(self.storage):
            versions = (commit.rows_version, commit.rejected_version)
            if versions <= newest and self._held([commit])[0]:
                yield versions, result

    def is_uncounted(self) -> bool:
        """Whether no run that finished has counted what is in the table, as after a kill between
        its last commit and its record, or where that record is damaged.
        """
        if self.card() is None:
            return False
        try:
            last = self.last_run()
        except TableError:
            return True
        counts = [sum(part.num_rows for part in self.rows.parts()), self.num_rejected()]
        if last is None:
            return any(counts)
        return counts != [last.table_rows, last.table_rejected]

    def put_probe(self, version: int | None, result: dict[str, Any]) -> None:
        """Record what a probe of a version found."""
        path = _probe_path(version, result["probe"], result["column"])
        self._put_json(path, {**result, "parts": self.digest(version)})

    def get_probe(self, version: int | None, name: str, column: str) -> Any:
        """What a probe of a version's column found, None where it has not been run.

        Nor where it was run on other rows: a log that was cut back comes to the same number again.
        """
        result = self._get_json(_probe_path(version, name, column))
        if not isinstance(result, dict) or result.pop("parts", "") != self.digest(version):
            return None
        return result

    def digest(self, version: int | None) -> str:
        """Of the parts of a version, which are named after their bytes."""
        names = sorted(part.path for part in self.rows.parts(version))
        return hashlib.blake2b("\n".join(names).encode(), digest_size=16).hexdigest()

    def put_report(self, html: str) -> str:
        """Write the report; where it is."""
        self.storage.put("_report.html", html.encode())
        return f"{self.uri}/_report.html"

    def drop_report(self) -> None:
        """Delete the report, if there is one."""
        self.storage.delete("_report.html")

    @property
    def has_report(self) -> bool:
        """Whether there is one."""
        return self.storage.size_bytes("_report.html") is not None

    def _put_json(self, path: str, value: Any) -> None:
        self.storage.put(path, json.dumps(value, indent=1).encode())

    def _get_json(self, path: str) -> Any:
        try:
            return json.loads(self.storage.get(path))
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError):
            tell(f"{path} in {self.uri} is no JSON; it is passed over")
            return None


def _probe_path(version: int | None, name: str, column: str) -> str:
    return f"_probes/{version or 0:08d}-{name}-{column}.json"


def _remove_empty(folders: list[Any]) -> None:
    """Take away the folders that only looking has made, innermost first."""
    for folder in map(Path, folders):
        if os.path.isdir(folder) and not any(folder.iterdir()):
            folder.rmdir()
