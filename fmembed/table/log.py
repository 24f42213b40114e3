"""One Delta log: which Parquet parts are committed, and nothing else.

A log that cannot be read is never an empty one. `deltalake` takes an entry that a power cut has
emptied for a version without changes, and a listing that comes back empty for no table at all: so
the newest entry is looked at anew here, and where there seems to be no log, for its first entry.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import DeltaTable, Schema
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, CommitProperties, RemoveAction, Transaction

from fmembed.errors import (
    ConflictError,
    DamagedError,
    StorageError,
    TableError,
    reason,
)
from fmembed.rows.precision import PRECISIONS
from fmembed.storage import HALF_WRITTEN, Storage
from fmembed.table.card import FINGERPRINT, PREFIX, TABLE
from fmembed.table.files import PART, RUN, Part, PartFiles

# Old versions stay readable: Delta readers and writers forget after 30 days otherwise.
_KEEP = {
    "delta.logRetentionDuration": "interval 36500 days",
    "delta.deletedFileRetentionDuration": "interval 36500 days",
}
# Common to all commits of all runs: two transactions of one name conflict, so that a commit made
# on a version that is no longer the newest fails. Appends of different names would both succeed.
_TRANSACTION = "fmembed"
# So many entries of the log are read one by one before there is a checkpoint.
_FEW_SINCE = 10
# On each commit, besides FINGERPRINT and RUN: of how many actions it is, so that a cut entry shows.
_ACTIONS = f"{PREFIX}actions"
# What readers of a table may have to know and these parts do not need; anything else, as deletion
# vectors or renamed columns, would have the parts read otherwise than by their bytes.
_READER_FEATURES = frozenset(("timestampNtz", "v2Checkpoint", "vacuumProtocolCheck"))
ENTRY = re.compile(r"_delta_log/(\d{20})\.json")
_CHECKPOINT = re.compile(r"_delta_log/(\d{20})\.checkpoint\..*parquet")
_ON_THE_WAY = re.compile(
    r"Error performing|Generic (?:S3|GCS|MicrosoftAzure|LocalFileSystem) error"
)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


@dataclass(frozen=True)
class Entry:
    """What made one version: the parts that it added and removed, by their paths; `run`, or
    `operation` by another tool; `time_ms` since 1970, by the clock of whoever did.
    """

    version: int
    time_ms: int
    run: str
    operation: str
    added: Mapping[str, Part]
    removed: Mapping[str, Part]


class Log:
    """One Delta log and, in `files`, the parts it names."""

    def __init__(self, uri: str, is_still: bool = False) -> None:
        """Name a log.

        Args:
            uri: The folder that it lies in.
            is_still: Whether it stays as it is when it is first looked at, for one who reads once:
                each look takes 4 ms, and several requests where it is far.
        """
        self.storage = Storage(uri)
        self.uri = self.storage.uri
        self.files = PartFiles(self.storage)
        self._pinned: int | None = None
        self._checked = -1
        self._seen: dict[int | None, DeltaTable | None] | None = {} if is_still else None

    def delta(self, version: int | None = None) -> DeltaTable | None:
        """A view of the log, a fresh one unless it is still; None where there is none.

        Raises:
            DamagedError: There is one, and it cannot be read or is not whole.
            TableError: It needs a reader of features that this one has not.
            StorageError: Out of reach.
        """
        if self._seen is not None and version in self._seen:
            return self._seen[version]
        delta = self._look(version)
        if self._seen is not None:
            self._seen[version] = delta
            if delta is not None:
                self._seen[int(delta.version())] = delta
        return delta

    def look_anew(self) -> None:
        """Be still no more."""
        self._seen = None

    def _look(self, version: int | None) -> DeltaTable | None:
        local = self.storage.local
        if local:
            folder = local / "_delta_log"
            if os.path.islink(folder) or (local.name == "_rejected" and os.path.islink(local)):
                raise TableError(f"table: {folder} is a link; a table's log lies in the table")
            if not os.path.isdir(folder):
                return None
            # deltalake would wait for ever for a pipe.
            if odd := [e.name for e in os.scandir(folder) if not (e.is_file() or e.is_dir())]:
                raise DamagedError(self.uri, f"{odd[0]!a} in its log is no regular file")
        try:
            delta = self._open(version)
        except (DeltaError, OSError) as e:
            if _is_damage(e):
                raise DamagedError(self.uri, f"its log cannot be read: {reason(e)}") from None
            raise StorageError(f"output.uri: cannot read {self.uri}: {reason(e)}") from None
        if delta is None:
            return None
        if version is None:
            self._check_whole(int(delta.version()))
            self._check_features(delta)
        return delta

    def _open(self, version: int | None) -> DeltaTable | None:
        uri, options = self.storage.delta_uri, self.storage.delta_options()
        try:
            return DeltaTable(uri, version, storage_options=options)
        except TableNotFoundError:
            entries = self.storage.sizes("_delta_log/")
            # The first entry may have been cut off, behind a checkpoint.
            first = (_entry(0), "_delta_log/_last_checkpoint")
            is_there = any(self.storage.size_bytes(path) is not None for path in first)
        if is_there:
            # It may have been made since the first look, which is no damage.
            with contextlib.suppress(TableNotFoundError):
                return DeltaTable(uri, version, storage_options=options)
        if entries and not all(_is_half_written(path) for path in entries):
            raise DamagedError(self.uri, "its log has no entry to begin with")
        if is_there:
            raise StorageError(
                f"output.uri: storage does not list the log of {self.uri}, which is there; "
                "nothing was changed, run the same command again"
            )
        return None

    def _check_whole(self, version: int) -> None:
        """Make sure that no entry since the last checkpoint is empty, and the newest not cut."""
        if version == self._checked:
            return
        sizes = self.storage.sizes("_delta_log/")
        checkpoints = [int(m[1]) for path in sizes if (m := _CHECKPOINT.fullmatch(path))]
        for path, size in sorted(sizes.items()):
            entry = ENTRY.fullmatch(path)
            if entry and size == 0 and int(entry[1]) > max(checkpoints, default=-1):
                raise DamagedError(self.uri, f"entry {int(entry[1])} of its log is empty")
        try:
            content = self.storage.get(_entry(version))
        except FileNotFoundError:  # tidied away by another tool, behind its checkpoint
            content = b""
        if why := what_is_cut(content):
            raise DamagedError(self.uri, f"entry {version} of its log {why}")
        self._checked = version

    def _check_features(self, delta: DeltaTable) -> None:
        needs = set(delta.protocol().reader_features or ()) - _READER_FEATURES
        if delta.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
            needs.add("columnMapping")
        if needs:
            raise TableError(
                f"table: another tool has changed {self.uri} in a way that is not read here "
                f"({', '.join(sorted(needs))}); undo it there, or embed the table anew"
            )

    def version(self) -> int:
        """The newest version, -1 where nothing was ever committed."""
        delta = self.delta()
        return -1 if delta is None else int(delta.version())

    def configuration(self) -> dict[str, str]:
        """The metadata that the log was created with; empty where there is no log."""
        delta = self.delta()
        return {} if delta is None else dict(delta.metadata().configuration)

    def parts(self, version: int | None = None) -> list[Part]:
        """The committed parts of a version."""
        return self._parts(self.delta(version))

    def pin(self) -> list[Part]:
        """The committed parts, of the version that this object will commit on top of."""
        delta = self.delta()
        self._pinned = -1 if delta is None else int(delta.version())
        return self._parts(delta)

    @property
    def has_moved(self) -> bool:
        """Whether somebody has committed since `pin`."""
        return self.version() != self._pinned

    def is_bare(self) -> bool:
        """Whether no version names a part: nobody's rows are lost with it."""
        delta = self.delta()
        return delta is not None and not self._named(delta) and not self.ever_named()

    def held(self, runs: Sequence[str], numbers: Sequence[int | None]) -> list[bool]:
        """Whether the log has each of some commits: by run, and its number; None is no commit."""
        delta = self.delta()

        def last(run_id: str) -> int:
            number = None if delta is None else delta.transaction_version(run_id)
            return -1 if number is None else int(number)

        return [n is None or last(run) >= n for run, n in zip(runs, numbers, strict=True)]

    def history(self, since: int) -> list[dict[str, Any]]:
        """What other tools have done to the table after a version, oldest first."""
        delta = self.delta()
        if delta is None:
            return []
        entries = [e for e in delta.history() if RUN not in e and int(e["version"]) > since]
        return sorted(entries, key=lambda e: int(e["version"]))

    def _parts(self, delta: DeltaTable | None) -> list[Part]:
        if delta is None:
            return []
        actions = pa.table(delta.get_add_actions(flatten=True)).to_pylist()
        parts = []
        for action in actions:
            path, num_rows = self._inside(action["path"]), action["num_records"]
            # Other tools need not say how many.
            known = self.files.num_rows(path) if num_rows is None else num_rows
            parts.append(Part(path, action["size_bytes"], known))
        return parts

    def _named(self, delta: DeltaTable) -> set[str]:
        """The files that any version names."""
        removed = delta.vacuum(0, dry_run=True, enforce_retention_duration=False)
        return {part.path for part in self._parts(delta)} | {unquote(path) for path in removed}

    def ever_named(self) -> set[str]:
        """The files that any entry of the log names, whatever clock was set when they were removed:
        `vacuum` leaves out what was removed in its own future.
        """
        paths = [p for p in self.storage.sizes("_delta_log/") if ENTRY.fullmatch(p)]
        named = self._in_checkpoints()
        for content in self._read_all(paths):
            for line in content.splitlines():
                action = json.loads(line) if line.strip() else {}
                named |= {unquote(action[k]["path"]) for k in ("add", "remove") if k in action}
        return named

    def _in_checkpoints(self) -> set[str]:
        """The files that a checkpoint names."""
        named: set[str] = set()
        paths = [p for p in self.storage.sizes("_delta_log/") if _CHECKPOINT.fullmatch(p)]
        for content in self._read_all(paths):
            # Not read_table, which gives both the name "path".
            parquet = pq.ParquetFile(pa.BufferReader(content))
            rows = parquet.read(columns=["add.path", "remove.path"])
            for name in rows.schema.names:
                found = pc.struct_field(rows[name], "path").drop_null().to_pylist()
                named |= {unquote(path) for path in found}
        return named

    def oldest(self) -> int:
        """The oldest version that can be read: those before it were cut off."""
        paths = self.storage.sizes("_delta_log/")
        if _entry(0) in paths:
            return 0
        return min((int(m[1]) for path in paths if (m := _CHECKPOINT.fullmatch(path))), default=0)

    def replay(self, first: int = 0) -> Iterator[tuple[Entry, dict[str, Part]]]:
        """The versions that the log tells of, the oldest first, each with all of its parts.

        The parts are one dictionary, which changes with the next version: copies of it, of a log of
        10,000 entries, would be 50 million parts.

        Args:
            first: Not those before it.

        Raises:
            DamagedError: It cannot be read, or is not whole.
        """
        if self.delta() is None:
            return
        names = self.storage.sizes("_delta_log/")
        every = sorted(int(m[1]) for path in names if (m := ENTRY.fullmatch(path)))
        numbers = [n for n in every if n >= first]
        contents = self._read_all([_entry(number) for number in numbers])
        parts: dict[str, Part] = {}
        for i, (number, content) in enumerate(zip(numbers, contents, strict=True)):
            entry = self._parse_entry(number, content, parts)
            if i == 0 and number > 0:
                parts = {part.path: part for part in self.parts(number)}
            else:
                for path in entry.removed:
                    parts.pop(path, None)
                parts |= entry.added
            yield entry, parts

    def _read_all(self, paths: Sequence[str]) -> Iterator[bytes]:
        """Files of the log that a listing has. What one of them names is not taken for a stray
        because it could not be read.
        """
        for path, content in zip(paths, self.storage.get_all(paths), strict=True):
            if content is None:
                raise DamagedError(self.uri, f"{path} went while it was read; run the same again")
            yield content

    def _parse_entry(self, version: int, content: bytes, before: Mapping[str, Part]) -> Entry:
        actions = [json.loads(line) for line in content.splitlines() if line.strip()]
        info: dict[str, Any] = next((a["commitInfo"] for a in actions if "commitInfo" in a), {})
        added = {}
        for add in (a["add"] for a in actions if "add" in a):
            path = self._inside(add["path"])
            told = json.loads(add.get("stats") or "{}").get("numRecords")
            num_rows = self.files.num_rows(path) if told is None else told
            added[path] = Part(path, add["size"], num_rows)
        removed = {}
        for remove in (a["remove"] for a in actions if "remove" in a):
            path = self._inside(remove["path"])
            removed[path] = before.get(path) or Part(path, remove.get("size") or 0, 0)
        return Entry(
            version, int(info.get("timestamp", 0)), str(info.get(RUN, "")),
            str(info.get("operation", "")), added, removed,
        )  # fmt: skip

    def named_before(self, entries: Sequence[Entry], oldest: int) -> set[str]:
        """The files that only versions before one name.

        Args:
            entries: All that the log has.
            oldest: The version.
        """
        kept = {part.path for part in self.parts(oldest)}
        kept |= {path for entry in entries if entry.version > oldest for path in entry.added}
        named = {path for entry in entries for path in (*entry.added, *entry.removed)}
        # Whatever a log says, nothing is a part that is not called so.
        named |= {self._inside(path) for path in self._in_checkpoints()}
        return {path for path in named - kept if path.endswith(".parquet")}

    def cut_before(self, oldest: int, least: int) -> None:
        """Delete the entries of the versions before one, which a checkpoint stands for then.

        Not by Delta's own clean-up, which leaves no checkpoint where it cuts: versions that are to
        stay could no longer be read (delta-io/delta#6718).

        Args:
            oldest: The version.
            least: Not where there are so few.
        """
        older = [
            path
            for path in self.storage.sizes("_delta_log/")
            if (m := ENTRY.fullmatch(path) or _CHECKPOINT.fullmatch(path)) and int(m[1]) < oldest
        ]
        if len(older) <= least:
            return
        for version in dict.fromkeys((oldest, self.version())):  # the newest last: readers begin
            self._put_checkpoint(version)
        self.remove(older)

    def put_checkpoint(self) -> None:
        """Write a checkpoint of the newest version, unless there is one of the last ten.

        Whoever opens the log reads the last one and what came after: each of 99 entries (Delta's
        own way) takes a request on a cloud, and a refresh opens the log 45 times.
        """
        names = self.storage.sizes("_delta_log/")
        last = max((int(m[1]) for path in names if (m := _CHECKPOINT.fullmatch(path))), default=0)
        newest = self.version()
        if newest - last >= _FEW_SINCE:
            self._put_checkpoint(newest)

    def _put_checkpoint(self, version: int) -> None:
        try:
            at = self._open(version)
            assert at is not None
            at.create_checkpoint()
            self._sync(version)
        except (DeltaError, OSError) as e:
            raise StorageError(f"output.uri: cannot write {self.uri}: {reason(e)}") from None

    def _inside(self, path: str) -> str:
        """A path of the log, decoded.

        Raises:
            TableError: It leads out of the table.
        """
        plain = unquote(path)
        if (
            plain.startswith("/")
            or ".." in plain.replace("\\", "/").split("/")
            or _SCHEME.match(plain)
            or not plain.isprintable()
        ):
            raise TableError(
                f"table: the log of {self.uri} names {plain[:200]!a}, which is not in the table's "
                "folder; nothing outside it is read"
            )
        return plain

    def strays(self, table: str) -> list[str]:
        """Files of this table that no version names: parts of dead runs, whole or half written.

        Only by names that are made here, and of whole ones only those whose footer says that they
        were written for this table; whatever else lies here is somebody's.

        Args:
            table: The id of the table.
        """
        # Before the log is read: what is committed in between is named by then.
        paths = self.storage.paths()
        delta = self.delta()
        if delta is None:
            return []
        named = self._named(delta)
        whole = [p for p in paths if PART.fullmatch(p) and p not in named]
        if whole:
            ever = self.ever_named()
            whole = [p for p in whole if p not in ever]
        found = [p for p in whole if table and self.files.read_stamp(p).get(TABLE) == table]
        if local := self.storage.local:
            half = (p.name for p in local.glob("part-*.tmp"))
            found += [n for n in half if PART.fullmatch(HALF_WRITTEN.sub("", n))]
        return sorted(found)

    def check_there(self, parts: Sequence[Part]) -> None:
        """Make sure that parts are there, by one listing where that is whole.

        Raises:
            DamagedError: One is not, or has another size than it was written with.
        """
        if not parts:
            return
        sizes = self.storage.sizes("")
        for part in parts:
            size = sizes.get(part.path)
            if size is None:  # a listing may have missed it, or it lies in another tool's folder
                size = self.storage.size_bytes(part.path)
            if size is None:
                raise DamagedError(self.uri, f"{part.path}: committed, but missing")
            if size != part.size_bytes:
                raise DamagedError(
                    self.uri, f"{part.path}: {size} bytes where the log says {part.size_bytes}"
                )

    def remove(self, paths: Iterable[str]) -> None:
        """Delete files that no version names."""
        for path in paths:
            self.storage.delete(path)

    def schema(self) -> pa.Schema:
        """The columns as the log has them: vectors are lists of any length."""
        delta = self.delta()
        return pa.schema([]) if delta is None else pa.schema(delta.schema().to_arrow())

    def create(self, schema: pa.Schema, configuration: Mapping[str, str], run_id: str) -> None:
        """Begin a log, or begin one anew that never named a part.

        Raises:
            ConflictError: Somebody else has created it meanwhile.
            StorageError: It cannot be written.
        """
        delta = self.delta()
        if delta is not None and not self.is_bare():
            raise self._conflict()
        options: dict[str, Any] = {
            "schema": Schema.from_arrow(_as_delta(schema)),
            "configuration": {**_KEEP, **configuration},
            "raise_if_key_not_exists": False,
            "commit_properties": CommitProperties(custom_metadata={RUN: run_id}),
        }
        if delta is None:
            self._begin(options)
        else:
            try:
                DeltaTable.create(
                    self.storage.delta_uri, mode="overwrite",
                    storage_options=self.storage.delta_options(), **options,
                )  # fmt: skip
            except (DeltaError, OSError) as e:
                raise StorageError(
                    f"output.uri: cannot commit to {self.uri}: {reason(e)}"
                ) from None
        # Ours, even if the answer to a first try was lost and the client tried again.
        stored = self.configuration()
        if any(stored.get(name) != value for name, value in configuration.items()):
            raise self._conflict()
        version = self.version()
        self._sync(version)
        if self._pinned is not None:
            self._pinned = version

    def _begin(self, options: dict[str, Any]) -> None:
        """Put the first entry in place whole and synced, unless there is one.

        deltalake makes it elsewhere: what it writes here itself a power cut may leave empty, and a
        log without its first entry could not even be mended.
        """
        with tempfile.TemporaryDirectory() as folder:
            DeltaTable.create(Path(folder).as_uri(), **options)
            content = Path(folder, _entry(0)).read_bytes()
        self.storage.create(_entry(0), content)

    def commit(
        self,
        parts: Iterable[Part],
        schema: pa.Schema,
        configuration: Mapping[str, str],
        transaction: tuple[str, int],
        removed: Iterable[Part] = (),
    ) -> int:
        """Add and remove parts, all or none, on top of the version that `pin` saw.

        Only on that one: the ids that the run skips were read from it. So whatever two drivers do
        at once, no row is committed twice; the later one fails and can be run again.

        Args:
            parts: What to add.
            schema: Their schema; the table is created with it where there is none.
            configuration: Metadata of a new table; of one that is there the fingerprint must be
                the same.
            transaction: (run id, number): committing the same number again is a no-op.
            removed: What to remove.

        Returns:
            The version that holds the parts.

        Raises:
            TableError: The parts do not fit the table's columns, or cannot be seen from here.
            ConflictError: Somebody else has committed in between; nothing was changed.
            StorageError: The log cannot be written.
        """
        assert self._pinned is not None, "pin first"
        run_id, number = transaction
        parts = list(parts)
        for part in parts:
            self._check_visible(part)
        delta = self.delta()
        if delta is None and self._pinned == -1:
            self.create(schema, configuration, run_id)
            delta = self.delta()
        if delta is None:
            raise self._conflict()
        last = delta.transaction_version(run_id)
        if last is not None and last >= number:
            self._pinned = int(delta.version())
            return self._pinned
        if delta.version() != self._pinned:
            raise self._conflict()
        if delta.metadata().configuration.get(FINGERPRINT) != configuration.get(FINGERPRINT):
            raise self._conflict()
        self.check_columns(delta, schema)
        removed = list(removed)
        if removed and delta.metadata().configuration.get("delta.appendOnly", "").lower() == "true":
            raise TableError(
                f"output.uri: {self.uri} has the property delta.appendOnly, so that no part can be "
                "taken out of it; set it to false with the tool that has set it"
            )
        try:
            self._transact(delta, parts, removed, transaction)
        except (DeltaError, OSError) as e:
            raise StorageError(f"output.uri: cannot commit to {self.uri}: {reason(e)}") from None
        self._pinned += 1
        self._sync(self._pinned)
        self._checked = self._pinned  # written here, whole
        return self._pinned

    def _transact(
        self,
        delta: DeltaTable,
        parts: list[Part],
        removed: list[Part],
        transaction: tuple[str, int],
    ) -> None:
        now_ms = int(time.time() * 1000)
        actions: list[AddAction | RemoveAction] = [
            AddAction(
                p.path, p.size_bytes, {}, now_ms, True, json.dumps({"numRecords": p.num_rows})
            )
            for p in parts
        ]
        actions += [RemoveAction(p.path, True, now_ms, p.size_bytes) for p in removed]
        names = [Transaction(*transaction), Transaction(_TRANSACTION, int(delta.version()) + 1)]
        said = {
            RUN: transaction[0],
            FINGERPRINT: delta.metadata().configuration.get(FINGERPRINT, ""),
            _ACTIONS: str(len(actions) + len(names)),
        }
        try:
            delta.create_write_transaction(
                actions,
                mode="append",
                schema=delta.schema(),
                commit_properties=CommitProperties(custom_metadata=said, app_transactions=names),
            )
        except CommitFailedError:
            # Ours, if the answer to a first try was lost and the client tried again.
            fresh = self.delta()
            if fresh is None or fresh.transaction_version(transaction[0]) != transaction[1]:
                raise self._conflict() from None

    def _sync(self, version: int) -> None:
        """Make a version outlive a crash of the machine: only then may anything count on it."""
        folder = f"_delta_log/{version:020d}"
        names = (f"{folder}.json", f"{folder}.checkpoint.parquet", "_delta_log/_last_checkpoint")
        self.storage.sync(*names)

    def _conflict(self) -> ConflictError:
        return ConflictError(
            f"output.uri: {self.uri} was changed by somebody else during this run, so the rest was "
            "not committed; run the same command again"
        )

    def check_columns(self, delta: DeltaTable, schema: pa.Schema) -> None:
        """Make sure that rows of a schema fit the table.

        Raises:
            TableError: They have other columns.
        """
        have = [f.name for f in delta.schema().fields]
        if have != schema.names:
            raise TableError(
                f"source.carry: the table at {self.uri} has the columns {', '.join(have)}, this "
                f"run has {', '.join(schema.names)}; name the same columns (in source.label, "
                "split, caption and carry) or another output.uri"
            )
        for (name, here), (_, given) in zip(_types(delta.schema()), _in_delta(schema), strict=True):
            if here != given:
                raise TableError(
                    f"source.carry: {name} is {here} in the table at {self.uri}, {given} in this "
                    "run; run the same command again"
                )

    def has_columns(self, schema: pa.Schema) -> bool:
        """Whether the log has these columns, by name and type."""
        delta = self.delta()
        return delta is not None and _types(delta.schema()) == _in_delta(schema)

    def _check_visible(self, part: Part) -> None:
        if self.storage.size_bytes(part.path) != part.size_bytes:
            raise TableError(
                f"output.uri: {self.uri} is not shared by all nodes: a part that a worker wrote "
                "cannot be seen from the driver; give a path on shared storage or a URL"
            )


def what_is_cut(entry: bytes) -> str:
    """What an entry of a log lacks that it was written with; empty where it is whole."""
    try:
        actions = [json.loads(line) for line in entry.splitlines() if line.strip()]
        info: dict[str, Any] = next((a["commitInfo"] for a in actions if "commitInfo" in a), {})
        expected = info.get(_ACTIONS)
        if expected is not None and int(expected) != len(actions) - 1:
            return f"has {len(actions) - 1} actions of {expected}"
    except (ValueError, TypeError, AttributeError, RecursionError):
        return "is cut or no JSON"
    return ""


def _entry(version: int) -> str:
    return f"_delta_log/{version:020d}.json"


def _is_half_written(path: str) -> bool:
    """Whether a file of a log's folder is what a commit that was killed has left."""
    name = path.rpartition("/")[2]
    return name.startswith(("_commit_", ".")) or bool(HALF_WRITTEN.search(name))


def _is_damage(error: Exception) -> bool:
    """Whether the log itself is at fault, as against the way to it."""
    # What storage says of the way there quotes addresses, which may hold any of the signs below.
    if _ON_THE_WAY.search(str(error)):
        return False
    signs = (
        "Json error", "contiguous", "Invalid Checkpoint", "No table metadata", "Parquet",
        "parquet", "parse",
    )  # fmt: skip
    return any(sign in str(error) for sign in signs)


def _types(schema: Schema) -> list[tuple[str, pa.DataType]]:
    return [(field.name, field.type) for field in pa.schema(schema.to_arrow())]


def _in_delta(schema: pa.Schema) -> list[tuple[str, pa.DataType]]:
    return _types(Schema.from_arrow(_as_delta(schema)))


def _as_delta(schema: pa.Schema) -> pa.Schema:
    """The columns by the types that Delta Lake has: float for float16, lists of any length."""
    known = {precision.arrow: precision.delta for precision in PRECISIONS.values()}

    def widen(type_: pa.DataType) -> pa.DataType:
        if pa.types.is_list(type_) or pa.types.is_fixed_size_list(type_):
            return pa.list_(widen(type_.value_type))
        return known.get(type_, type_)

    return pa.schema([field.with_type(widen(field.type)) for field in schema])
