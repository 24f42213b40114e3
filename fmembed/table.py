"""Parquet parts + Delta log: write, commit, read.

    <table>/part-<blake2b>.parquet   rows; each part is named after its own checksum
    <table>/_delta_log/              which parts are committed; identity and spec in its metadata
    <table>/_rejected/               the rejected rows, a Delta table of the same make
    <table>/_runs/<run>.json         what each finished run counted
    <table>/_shards/<run>.json       which pieces of the source are committed whole
    <table>/_lock/                   who writes (lock.py)
    <table>/_probes/, _report.html   what the probes found

Workers write parts, the driver alone commits.
"""

from __future__ import annotations

import collections
import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import DeltaTable, Schema
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, CommitProperties, RemoveAction, Transaction

from fmembed.rows import (
    CONTENT_HASH,
    DUPLICATE,
    PARENT_ID,
    PIECE,
    PIECE_START,
    PIECE_STOP,
    REJECTED_SCHEMA,
    ROW_ID,
    SHARD,
    SKIPPED,
    STAGE,
    TOTAL,
    Keys,
    RowIds,
    accepted,
    keys_of,
    reject,
    sum_counts,
    table_schema,
)
from fmembed.spec import FmembedError, TableError, fingerprint
from fmembed.storage import Storage, StorageError, filesystem, reason

if TYPE_CHECKING:
    import ray.data

# Old versions stay readable: Delta readers and writers forget after 30 days otherwise.
_KEEP = {
    "delta.logRetentionDuration": "interval 36500 days",
    "delta.deletedFileRetentionDuration": "interval 36500 days",
}
# Common to all commits of all runs: two transactions of one name conflict, so that a commit made
# on a version that is no longer the newest fails. Appends of different names would both succeed.
_TRANSACTION = "fmembed"


class ConflictError(FmembedError):
    """Somebody else has committed to the table since this run last looked."""


@dataclass(frozen=True)
class Part:
    """A Parquet file that was written, not yet committed. `path` is relative to its log."""

    path: str
    size_bytes: int
    num_rows: int


@dataclass(frozen=True)
class ShardCount:
    """Rows of a shard in some blocks; `total` and `skipped` come with its marker only."""

    rows: int = 0
    rejected: int = 0
    skipped: int = 0
    total: int | None = None

    def __add__(self, other: ShardCount) -> ShardCount:
        return ShardCount(
            self.rows + other.rows,
            self.rejected + other.rejected,
            self.skipped + other.skipped,
            self.total if other.total is None else other.total,
        )

    @property
    def whole(self) -> bool:
        """Whether every row of the shard is accounted for."""
        return self.total is not None and self.rows + self.skipped == self.total


@dataclass(frozen=True)
class Written:
    """What one write task did with the rows it was given.

    `num_rows` counts rows of the source, `part.num_rows` those of the table: more, where the pieces
    of a row are rows. `counts` are what the stages counted, summed.
    """

    schema: pa.Schema
    num_rows: int
    part: Part | None
    rejected: Part | None
    keys: Keys
    shards: dict[int, ShardCount]
    num_units: int
    num_truncated: int
    counts: dict[str, float]
    causes: dict[str, int]
    busy_s: float


class Log:
    """One Delta log and the parts it names."""

    def __init__(self, uri: str) -> None:
        self.storage = Storage(uri)
        self.uri = self.storage.uri
        self._pinned: int | None = None

    def delta(self, version: int | None = None) -> DeltaTable | None:
        """A fresh view of the log; None where there is none.

        Raises:
            StorageError: Out of reach.
        """
        local = self.storage.local
        if local and not (local / "_delta_log").is_dir():
            return None
        try:
            return DeltaTable(self.uri, version, storage_options=self.storage.delta_options())
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as e:
            raise StorageError(f"output.uri: cannot read {self.uri}: {reason(e)}") from None

    def version(self) -> int:
        """The newest version, -1 where nothing was ever committed."""
        delta = self.delta()
        return -1 if delta is None else int(delta.version())

    def parts(self, version: int | None = None) -> list[Part]:
        """The committed parts of a version."""
        return _parts(self.delta(version))

    def pin(self) -> list[Part]:
        """The committed parts, of the version that this object will commit on top of."""
        delta = self.delta()
        self._pinned = -1 if delta is None else int(delta.version())
        return _parts(delta)

    @property
    def has_moved(self) -> bool:
        """Whether somebody has committed since `pin`."""
        return self.version() != self._pinned

    def strays(self, keep_removed: bool = True) -> list[str]:
        """Files that no version names: parts of dead runs, and what they left half written.

        Args:
            keep_removed: Leave alone the parts that an older version names.
        """
        delta = self.delta()
        named = {part.path for part in _parts(delta)}
        if keep_removed and delta is not None:
            named |= set(delta.vacuum(0, dry_run=True, enforce_retention_duration=False))
        found = [p for p in self.storage.paths() if p.startswith("part-") and p not in named]
        local = self.storage.local
        if local:
            half = [*local.glob("part-*.parquet#*"), *local.glob("_delta_log/_commit_*.json.tmp")]
            found += [p.relative_to(local).as_posix() for p in half]
        return found

    def remove(self, paths: Iterable[str]) -> None:
        """Delete files that no version names."""
        for path in paths:
            if self.storage.local:  # half written files have names that obstore does not take
                try:
                    (self.storage.local / path).unlink(missing_ok=True)
                except OSError as e:
                    raise StorageError(
                        f"output.uri: cannot delete {path} in {self.uri}: {reason(e)}"
                    ) from None
            else:
                self.storage.delete(path)

    def read_columns(self, path: str, columns: list[str] | None) -> pa.Table:
        """Read columns of one part, fetching no others."""
        with self.storage.open(path) as handle:
            return pq.ParquetFile(handle).read(columns=columns)

    def read_schema(self, path: str) -> pa.Schema:
        """The columns of one part."""
        with self.storage.open(path) as handle:
            return pq.read_schema(handle)

    def read_ids(self, path: str) -> list[str]:
        """The source's ids of one part's rows: once for each, however many pieces it has."""
        with self.storage.open(path) as handle:
            parquet = pq.ParquetFile(handle)
            if PARENT_ID not in parquet.schema_arrow.names:
                return list(parquet.read(columns=[ROW_ID])[ROW_ID].to_pylist())
            return list(pc.unique(parquet.read(columns=[PARENT_ID])[PARENT_ID]).to_pylist())

    def write(self, rows: pa.Table, vectors: Sequence[str] = ()) -> Part:
        """Write rows as one part.

        The part is named after the checksum of its bytes, so that `verify` needs no other record
        of it, and put in one piece, so that a torn write leaves nothing behind.
        """
        buffer = pa.BufferOutputStream()
        # Dictionaries only grow vectors: 768 kB of them took 1,201 kB with, 689 kB without.
        unlike = (ROW_ID, CONTENT_HASH, *vectors)
        plain = [f.name for f in rows.schema if f.name not in unlike]
        pq.write_table(rows, buffer, compression="zstd", use_dictionary=plain)
        content = buffer.getvalue()
        checksum = hashlib.blake2b(content, digest_size=16).hexdigest()
        path = f"part-{checksum}.parquet"
        self.storage.put(path, memoryview(content).cast("B"))
        return Part(path, content.size, rows.num_rows)

    def commit(
        self,
        parts: Iterable[Part],
        schema: pa.Schema,
        configuration: dict[str, str],
        transaction: tuple[str, int],
        removed: Iterable[Part] = (),
    ) -> int:
        """Add and remove parts, all or none, on top of the version that `pin` saw.

        Only on that one: the ids that the run skips were read from it. So whatever two drivers do
        at once, no row is committed twice; the later one fails and can be run again.

        Args:
            parts: What to add.
            schema: Their schema; the table is created with it where there is none.
            configuration: Metadata of a new table.
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
        try:
            delta = self.delta()
            if delta is None and self._pinned == -1:
                delta = DeltaTable.create(
                    self.uri,
                    schema=Schema.from_arrow(_as_delta(schema)),
                    configuration={**_KEEP, **configuration},
                    raise_if_key_not_exists=False,
                    storage_options=self.storage.delta_options(),
                )
                self._pinned = 0
            if delta is None:
                raise self._conflict()
            last = delta.transaction_version(run_id)
            if last is not None and last >= number:
                self._pinned = int(delta.version())
                return self._pinned
            if delta.version() != self._pinned:
                raise self._conflict()
            self._check_columns(delta, schema)
            self._transact(delta, parts, removed, transaction)
        except (DeltaError, OSError) as e:
            raise StorageError(f"output.uri: cannot commit to {self.uri}: {reason(e)}") from None
        self._pinned += 1
        return self._pinned

    def _transact(
        self,
        delta: DeltaTable,
        parts: list[Part],
        removed: Iterable[Part],
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
        try:
            delta.create_write_transaction(
                actions,
                mode="append",
                schema=delta.schema(),
                commit_properties=CommitProperties(app_transactions=names),
            )
        except CommitFailedError:
            # Ours, if the answer to a first try was lost and the client tried again.
            fresh = self.delta()
            if fresh is None or fresh.transaction_version(transaction[0]) != transaction[1]:
                raise self._conflict() from None

    def _conflict(self) -> ConflictError:
        return ConflictError(
            f"output.uri: {self.uri} was changed by somebody else during this run, so the rest was "
            "not committed; run the same command again"
        )

    def _check_columns(self, delta: DeltaTable, schema: pa.Schema) -> None:
        have = [f.name for f in delta.schema().fields]
        if have != schema.names:
            raise TableError(
                f"source.carry: the table at {self.uri} has the columns {', '.join(have)}, this "
                f"run has {', '.join(schema.names)}; name the same columns or another output.uri"
            )

    def _check_visible(self, part: Part) -> None:
        if self.storage.size_bytes(part.path) != part.size_bytes:
            raise TableError(
                f"output.uri: {self.uri} is not shared by all nodes: a part that a worker wrote "
                "cannot be seen from the driver; give a path on shared storage or a URL"
            )


def _as_delta(schema: pa.Schema) -> pa.Schema:
    """Delta Lake has no half precision: its log says float where the files hold float16."""

    def widen(type_: pa.DataType) -> pa.DataType:
        if pa.types.is_float16(type_):
            return pa.float32()
        if pa.types.is_list(type_) or pa.types.is_fixed_size_list(type_):
            return pa.list_(widen(type_.value_type))
        return type_

    return pa.schema([field.with_type(widen(field.type)) for field in schema])


def _parts(delta: DeltaTable | None) -> list[Part]:
    if delta is None:
        return []
    actions = pa.table(delta.get_add_actions(flatten=True)).to_pylist()
    return [Part(a["path"], a["size_bytes"], a["num_records"] or 0) for a in actions]


class Table:
    """A table of embeddings, its rejected rows and its records."""

    def __init__(self, uri: str) -> None:
        self.rows = Log(uri)
        self.uri = self.rows.uri
        self.storage = self.rows.storage
        self.rejected = Log(f"{self.uri}/_rejected")

    @classmethod
    def open(cls, uri: str) -> Table:
        """Open a table that exists, if only with rejected rows.

        Raises:
            TableError: There is none.
        """
        if "://" not in uri and not Path(uri).is_dir():
            raise TableError(f"table: no such folder: {uri}")
        table = cls(uri)
        configuration = table.configuration()
        if not configuration:
            raise TableError(f"table: {uri} is no fmembed table: no run has committed to it")
        if "fmembed.outputs" not in configuration:
            raise TableError(f"table: {uri} was made by an earlier version; embed it anew")
        return table

    @classmethod
    def open_output(cls, uri: str, identity: dict[str, Any]) -> Table:
        """Open where a run may write: nothing there yet, or a table of the same fingerprint.

        Raises:
            TableError: It cannot be written, holds something else, or another model's vectors.
        """
        local = Path(uri).expanduser()
        if "://" not in uri and local.exists() and not local.is_dir():
            raise TableError(f"output.uri: {uri} is a file; give a folder or a URL")
        absent = [] if "://" in uri else [p for p in (local, *local.parents) if not p.exists()]
        table = cls(uri)
        try:
            if not table.configuration():
                foreign = [p for p in table.storage.paths() if not p.startswith(("_", "part-"))]
                if foreign or table.rows.delta() is not None:
                    raise TableError(
                        f"output.uri: {uri} is not empty and no fmembed table; give another folder"
                    )
            table._check_same_model(identity)
            # Learn now, not after an hour, that nothing can be written here.
            table.storage.put("_runs/.probe", b"")
            table.storage.delete("_runs/.probe")
        except TableError:
            raise
        except FmembedError as e:
            raise TableError(f"{e}; give a folder or URL that this user may write") from None
        finally:
            _remove_empty([table.uri + "/_runs", *absent])
        return table

    def _check_same_model(self, identity: dict[str, Any]) -> None:
        stored = self.configuration()
        if not stored or stored["fmembed.fingerprint"] == fingerprint(identity):
            return
        before = json.loads(stored["fmembed.identity"])
        differ = [
            f"{name} was {before.get(name)!r}, is {identity.get(name)!r}"
            for name in sorted(before.keys() | identity.keys())
            if before.get(name) != identity.get(name)
        ]
        raise TableError(
            f"output.uri: {self.uri} was made by another model or setting ({'; '.join(differ)}); "
            "give another output.uri, or the same model and settings"
        )

    def configuration(self) -> dict[str, str]:
        """The metadata a run stored: fmembed.fingerprint, .identity, .spec; empty without one."""
        for log in (self.rows, self.rejected):
            delta = log.delta()
            if delta is not None:
                stored = dict(delta.metadata().configuration)
                return stored if "fmembed.fingerprint" in stored else {}
        return {}

    def version(self) -> int | None:
        """The newest version, None where nothing was ever committed."""
        version = self.rows.version()
        return None if version < 0 else version

    def schema(self) -> pa.Schema:
        """The columns as the parts have them; empty where nothing was ever committed."""
        parts = self.rows.parts()
        return self.rows.read_schema(parts[0].path) if parts else pa.schema([])

    def row_ids(self) -> RowIds:
        """Ids of all rows that a run need not look at again, committed or rejected.

        From here on this object commits only on top of what was read here.
        """
        ids = RowIds()
        for log in (self.rows, self.rejected):
            for part in log.pin():
                ids.add(keys_of(log.read_ids(part.path)))
        return ids

    @property
    def has_moved(self) -> bool:
        """Whether somebody has committed since `row_ids`."""
        return self.rows.has_moved or self.rejected.has_moved

    def strays(self) -> list[tuple[Log, str]]:
        """What dead runs left behind: files that no version names."""
        rejected = [(self.rejected, p) for p in self.rejected.strays(keep_removed=False)]
        return [*((self.rows, p) for p in self.rows.strays()), *rejected]

    def remove_strays(self) -> int:
        """Delete what dead runs left behind; how many files. Only under the lock."""
        strays = self.strays()
        for log, path in strays:
            log.remove([path])
        return len(strays)

    def num_rejected(self) -> int:
        """Rows in `_rejected`."""
        return sum(part.num_rows for part in self.rejected.parts())

    def read_rejected(self) -> pa.Table:
        """All rejected rows: row_id, stage, error, message."""
        parts = [self.rejected.read_columns(p.path, None) for p in self.rejected.parts()]
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
        lock, and before `row_ids`.
        """
        parts = self.rejected.pin()
        rows = self.read_rejected()
        kept = rows.filter(pc.equal(rows["error"], DUPLICATE))
        if kept.num_rows == rows.num_rows:
            return 0
        # The shards first: if this run ends in between, they are read again and nothing is lost.
        for path in self.storage.paths("_shards/"):
            shards = self._get_json(path)
            if any(rejected for _, _, rejected in shards):
                self._put_json(path, [s for s in shards if not s[2]])
        part = [self.rejected.write(kept)] if kept.num_rows else []
        transaction = (f"{run_id}-forget", 0)
        self.rejected.commit(part, REJECTED_SCHEMA, {}, transaction, removed=parts)
        self.rejected.remove(p.path for p in parts if p not in part)
        return int(rows.num_rows - kept.num_rows)

    def put_shards(self, run_id: str, shards: list[tuple[str, int, int]]) -> None:
        """Record the shards whose rows a run has committed: (key, rows, rejected) each."""
        self._put_json(f"_shards/{run_id}.json", shards)

    def whole_shards(self) -> dict[str, int]:
        """Key to rows of each shard whose rows are all committed or rejected."""
        records = [self._get_json(path) or [] for path in self.storage.paths("_shards/")]
        return {key: rows for shards in records for key, rows, _ in shards}

    def put_run(self, started: str, run_id: str, counts: dict[str, Any]) -> None:
        """Record what a run counted; `verify` compares the table with the last one."""
        self._put_json(f"_runs/{started}-{run_id}.json", counts)

    def last_run(self) -> Any:
        """The record of the last run that finished, None where there is none."""
        runs = self.storage.paths("_runs/")
        return self._get_json(runs[-1]) if runs else None

    def put_probe(self, version: int | None, result: dict[str, Any]) -> None:
        """Record what a probe of a version found."""
        self._put_json(_probe_path(version, result["probe"], result["column"]), result)

    def get_probe(self, version: int | None, name: str, column: str) -> Any:
        """What a probe of a version's column found, None where it has not been run."""
        return self._get_json(_probe_path(version, name, column))

    def put_report(self, html: str) -> str:
        """Write the report; where it is."""
        self.storage.put("_report.html", html.encode())
        return f"{self.uri}/_report.html"

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


def _probe_path(version: int | None, name: str, column: str) -> str:
    return f"_probes/{version or 0:08d}-{name}-{column}.json"


def write_part(
    uri: str,
    blocks: list[pa.Table],
    vectors: Sequence[str],
    twice: frozenset[bytes] = frozenset(),
) -> Written:
    """Write embedded rows as one part, and rejected ones as another.

    Args:
        uri: The table.
        blocks: Rows as the embed stage yields them.
        vectors: The columns of vectors.
        twice: Keys of rows that another part already holds; they are rejected here.

    Returns:
        The parts, not committed, with what the driver needs to commit and to count them.
    """
    started = time.monotonic()
    rows = pa.concat_tables(blocks)
    rows = _reject_duplicates(rows, twice)
    good = _keep(rows, accepted(rows))
    bad = rows.filter(rows[STAGE].is_valid())
    pieces_are_rows = "piece_units" in rows.schema.names
    keys = keys_of(good[ROW_ID].to_pylist())
    num_truncated = int(np.sum(good["truncated"].to_numpy(), dtype=np.int64))
    units = int(np.sum(good["num_units"].to_numpy(), dtype=np.int64))
    given = good
    if pieces_are_rows:
        good = _explode(good, vectors)
    own = (ROW_ID, CONTENT_HASH, *vectors, "num_units", "truncated")
    own += (PARENT_ID, PIECE, PIECE_START, PIECE_STOP, "piece_units", "piece_spans")
    carried = [f for f in good.schema if f.name not in own and not f.name.startswith("_")]
    fields = [good.schema.field(name) for name in vectors]
    schema = table_schema(pa.schema(carried), fields, pieces_are_rows)
    good = good.select(schema.names).cast(schema)
    table = Table(uri)
    part = rejected = None
    if good.num_rows:
        part = table.rows.write(good, vectors)
    if bad.num_rows:
        columns = [bad[ROW_ID], bad[STAGE], bad["_error"], bad["_message"]]
        rejected = table.rejected.write(
            pa.table([c.cast(pa.string()) for c in columns], schema=REJECTED_SCHEMA)
        )
    return Written(
        schema=schema,
        num_rows=given.num_rows,
        part=part,
        rejected=rejected,
        keys=keys,
        shards=_count_shards(rows),
        num_units=units,
        num_truncated=num_truncated,
        counts=sum_counts(rows),
        causes=dict(collections.Counter(bad["_error"].to_pylist())),
        busy_s=time.monotonic() - started,
    )


def _keep(rows: pa.Table, mask: npt.NDArray[np.bool_]) -> pa.Table:
    """Filter, but chunks of which all rows stay are not copied: those are nearly all."""
    kept, start = [], 0
    for batch in rows.to_batches():
        own = mask[start : start + batch.num_rows]
        start += batch.num_rows
        kept.append(batch if own.all() else batch.filter(pa.array(own)))
    return pa.Table.from_batches(kept, rows.schema)


def _explode(rows: pa.Table, vectors: Sequence[str]) -> pa.Table:
    """Give each piece of a row a row of its own; all of them come in one part, so none is lost."""
    counts = pc.list_value_length(rows["piece_units"]).to_numpy(zero_copy_only=False)
    counts = counts.astype(np.int64)
    owner = np.repeat(np.arange(rows.num_rows), counts)
    piece = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    parents = rows[ROW_ID].take(pa.array(owner))
    spans = pc.list_flatten(rows["piece_spans"])
    ends = np.array(spans.to_pylist(), dtype=np.int64).reshape(-1, 2)
    ids = [f"{parent}@{i}" for parent, i in zip(parents.to_pylist(), piece.tolist(), strict=True)]
    flat = {
        ROW_ID: pa.array(ids, pa.string()),
        PARENT_ID: parents,
        PIECE: pa.array(piece, pa.int32()),
        PIECE_START: pa.array(ends[:, 0]),
        PIECE_STOP: pa.array(ends[:, 1]),
        "num_units": pc.list_flatten(rows["piece_units"]),
        **{name: pc.list_flatten(rows[name]) for name in vectors},
    }
    rest = rows.drop_columns([*(n for n in flat if n in rows.schema.names), "piece_spans"])
    rest = rest.drop_columns(["piece_units"]).take(pa.array(owner))
    for name, column in flat.items():
        rest = rest.append_column(name, column)
    return rest


def _count_shards(rows: pa.Table) -> dict[int, ShardCount]:
    counts: dict[int, ShardCount] = collections.defaultdict(ShardCount)
    is_marker = rows[TOTAL].is_valid()
    grouped = pa.table({"shard": rows[SHARD], "bad": rows[STAGE].is_valid()})
    grouped = grouped.filter(pc.invert(is_marker)).group_by("shard")
    for g in grouped.aggregate([("bad", "count"), ("bad", "sum")]).to_pylist():
        counts[g["shard"]] += ShardCount(rows=g["bad_count"], rejected=g["bad_sum"])
    for m in rows.filter(is_marker).select([SHARD, TOTAL, SKIPPED]).to_pylist():
        counts[m[SHARD]] += ShardCount(skipped=m[SKIPPED], total=m[TOTAL])
    return dict(counts)


def _reject_duplicates(rows: pa.Table, twice: frozenset[bytes]) -> pa.Table:
    good = np.flatnonzero(accepted(rows))
    keys = keys_of(rows[ROW_ID].take(pa.array(good)).to_pylist()).tolist()
    seen = set(twice)
    causes = {}
    for i, key in zip(good.tolist(), keys, strict=True):
        if key in seen:
            causes[i] = (DUPLICATE, "another row of the source has the same id")
        seen.add(key)
    return reject(rows, "write", causes)


@overload
def read(uri: str, version: int | None = ..., *, columns: list[str] | None = ...) -> pa.Table: ...
@overload
def read(
    uri: str,
    version: int | None = ...,
    *,
    engine: Literal["arrow"],
    columns: list[str] | None = ...,
) -> pa.Table: ...
@overload
def read(
    uri: str, version: int | None = ..., *, engine: Literal["ray"], columns: list[str] | None = ...
) -> ray.data.Dataset: ...


def read(
    uri: str,
    version: int | None = None,
    *,
    engine: Literal["arrow", "ray"] = "arrow",
    columns: list[str] | None = None,
) -> Any:
    """Read the committed rows of a table, and nothing else.

    Args:
        uri: The table.
        version: Which version; None for the newest.
        engine: "arrow" for a pyarrow Table, "ray" for a Ray Dataset.
        columns: Only these.

    Raises:
        TableError: No table there, or no such version.
    """
    table = Table.open(uri)
    newest = table.version()
    if version is not None and not 0 <= version <= (newest or 0):
        raise TableError(f"version: {uri} has the versions 0 to {newest}, not {version}")
    paths = [part.path for part in table.rows.parts(version)]
    if engine == "ray":
        import ray.data

        fs, root = filesystem(table.uri)
        paths = [f"{root}/{p}" for p in paths]
        return ray.data.read_parquet(paths, filesystem=fs, columns=columns)
    if not paths:
        delta = table.rows.delta()
        if delta is None:
            raise TableError(f"table: {uri} has no embedded row yet, only rejected ones")
        empty = pa.schema(delta.schema().to_arrow()).empty_table()
        return empty.select(columns) if columns is not None else empty
    return pa.concat_tables([table.rows.read_columns(p, columns) for p in paths])


def sample(uri: str, columns: list[str], max_rows: int, not_null: str | None) -> pa.Table:
    """Read a fixed sample: the rows with the smallest content hashes.

    Memory is bounded by one part and the sample, whatever the table's size.

    Args:
        uri: The table.
        columns: What to read besides row_id and content_hash.
        max_rows: Size of the sample.
        not_null: Leave out rows where this column is null.

    Returns:
        Rows in the order of their row ids.
    """
    table = Table.open(uri)
    wanted = list(dict.fromkeys([ROW_ID, CONTENT_HASH, *columns]))
    chosen: pa.Table | None = None
    for part in table.rows.parts():
        rows = table.rows.read_columns(part.path, wanted)
        if not_null is not None:
            rows = rows.filter(rows[not_null].is_valid())
        chosen = rows if chosen is None else pa.concat_tables([chosen, rows])
        if chosen.num_rows > max_rows:
            order = pc.sort_indices(
                chosen, sort_keys=[("content_hash", "ascending"), (ROW_ID, "ascending")]
            )
            chosen = chosen.take(order[:max_rows])
    if chosen is None:
        return read(uri, columns=wanted)
    return chosen.take(pc.sort_indices(chosen, sort_keys=[(ROW_ID, "ascending")]))


def _remove_empty(folders: list[Any]) -> None:
    """Take away the folders that only looking has made, innermost first."""
    for folder in map(Path, folders):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
