"""Parquet parts + Delta log: write, commit, read, verify.

    <table>/part-<blake2b>.parquet   rows; each part is named after its own checksum
    <table>/_delta_log/              which parts are committed; identity and spec in its metadata
    <table>/_rejected/               the rejected rows, a Delta table of the same make
    <table>/_runs/<run>.json         what each finished run counted
    <table>/_probes/, _report.html   what the probes found

Workers write parts, the driver alone commits. Storage is `obstore` and `deltalake`, which share
their URL schemes and their credentials (environment or the cloud's own config files).
"""

from __future__ import annotations

import collections
import functools
import hashlib
import io
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import obstore
import obstore.fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import DeltaTable, Schema
from deltalake.exceptions import TableNotFoundError
from deltalake.transaction import AddAction, CommitProperties, RemoveAction, Transaction
from obstore.store import LocalStore, ObjectStore, from_url

from fmembed.rows import (
    REJECTED_SCHEMA,
    ROW_ID,
    SKIPPED,
    STAGE,
    Keys,
    RowIds,
    accepted,
    keys_of,
    reject,
    table_schema,
)
from fmembed.spec import FmembedError, TableError, fingerprint

if TYPE_CHECKING:
    import ray.data

_UNIT_NORM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Part:
    """A Parquet file that was written, not yet committed. `path` is relative to its log."""

    path: str
    size_bytes: int
    num_rows: int


@dataclass(frozen=True)
class Written:
    """What one write task did with the rows it was given."""

    schema: pa.Schema
    part: Part | None
    rejected: Part | None
    keys: Keys
    num_skipped: int
    num_units: int
    num_truncated: int
    causes: dict[str, int]
    busy_s: float


@dataclass(frozen=True)
class VerifyResult:
    """What `verify` counted in storage; `problems` is empty when all is well."""

    table: str
    version: int
    fingerprint: str
    rows: int
    rows_rejected: int
    parts: int
    dim: int
    norm_min: float
    norm_max: float
    problems: list[str] = field(default_factory=list)


class Log:
    """One Delta log and the parts it names."""

    def __init__(self, uri: str) -> None:
        self.uri = uri if "://" in uri else str(Path(uri).expanduser().absolute())
        self._local = None if "://" in self.uri else Path(self.uri)

    @functools.cached_property
    def _store(self) -> ObjectStore:
        return LocalStore(self.uri, mkdir=True) if self._local else from_url(self.uri)

    def delta(self, version: int | None = None) -> DeltaTable | None:
        """A fresh view of the log (a stale one cannot commit); None where there is none."""
        if self._local and not (self._local / "_delta_log").is_dir():
            return None
        try:
            return DeltaTable(self.uri, version=version)
        except TableNotFoundError:
            return None

    def put(self, path: str, content: bytes) -> None:
        """Write one object whole: readers see the old content or the new, never a part."""
        obstore.put(self._store, path, content)

    def get(self, path: str) -> bytes:
        """Read one object.

        Raises:
            FileNotFoundError: There is none.
        """
        return bytes(obstore.get(self._store, path).bytes())

    def paths(self, prefix: str = "") -> list[str]:
        """Paths under a prefix, relative to this log, sorted."""
        if self._local and not self._local.is_dir():
            return []
        found = obstore.list(self._store, prefix or None).collect()
        return sorted(str(meta["path"]) for meta in found)

    def delete(self, path: str) -> None:
        """Remove one object."""
        obstore.delete(self._store, path)

    def read_columns(self, path: str, columns: list[str] | None) -> pa.Table:
        """Read columns of one part, fetching no others."""
        protocol: Any = "file" if self._local else self.uri.split("://")[0]
        fs = obstore.fsspec.FsspecStore(protocol)
        with fs.open(f"{self.uri}/{path}") as handle:
            return pq.ParquetFile(handle).read(columns=columns)

    def write(self, rows: pa.Table) -> Part:
        """Write rows as one part.

        The part is named after the checksum of its bytes, so that `verify` needs no other record
        of it, and put in one piece, so that a torn write leaves nothing behind.
        """
        buffer = io.BytesIO()
        # Dictionaries only grow vectors: 768 kB of them took 1,201 kB with, 689 kB without.
        plain = [f.name for f in rows.schema if f.name not in (ROW_ID, "content_hash", "embedding")]
        pq.write_table(rows, buffer, compression="zstd", use_dictionary=plain)
        content = buffer.getbuffer()
        checksum = hashlib.blake2b(content, digest_size=16).hexdigest()
        path = f"part-{checksum}.parquet"
        self.put(path, bytes(content))
        return Part(path, len(content), rows.num_rows)

    def commit(
        self,
        parts: Iterable[Part],
        schema: pa.Schema,
        configuration: dict[str, str],
        transaction: tuple[str, int],
    ) -> int:
        """Make parts visible, all or none.

        Args:
            parts: What to add.
            schema: Their schema; the table is created with it where there is none.
            configuration: Metadata of a new table.
            transaction: (run id, number): committing the same number again is a no-op.

        Returns:
            The version that holds the parts.

        Raises:
            TableError: The parts do not fit the table's columns, or cannot be seen from here.
        """
        run_id, number = transaction
        parts = list(parts)
        for part in parts:
            self._check_visible(part)
        delta = self.delta()
        if delta is None:
            delta = DeltaTable.create(
                self.uri,
                schema=Schema.from_arrow(schema),
                configuration=configuration,
                raise_if_key_not_exists=False,
            )
        last = delta.transaction_version(run_id)
        if last is not None and last >= number:
            return int(delta.version())
        have = [f.name for f in delta.schema().fields]
        if have != schema.names:
            raise TableError(
                f"source.carry: the table at {self.uri} has the columns {', '.join(have)}, this "
                f"run has {', '.join(schema.names)}; name the same columns or another output.uri"
            )
        now_ms = int(time.time() * 1000)
        actions: list[AddAction | RemoveAction] = [
            AddAction(
                p.path, p.size_bytes, {}, now_ms, True, json.dumps({"numRecords": p.num_rows})
            )
            for p in parts
        ]
        delta.create_write_transaction(
            actions,
            mode="append",
            schema=delta.schema(),
            commit_properties=CommitProperties(app_transactions=[Transaction(run_id, number)]),
        )
        return int(delta.version()) + 1

    def _check_visible(self, part: Part) -> None:
        try:
            size = obstore.head(self._store, part.path)["size"]
        except FileNotFoundError:
            size = None
        if size != part.size_bytes:
            raise TableError(
                f"output.uri: {self.uri} is not shared by all nodes: a part that a worker wrote "
                "cannot be seen from the driver; give a path on shared storage or a URL"
            )

    def parts(self, version: int | None = None) -> list[Part]:
        """The committed parts of a version."""
        delta = self.delta(version)
        if delta is None:
            return []
        actions = pa.table(delta.get_add_actions(flatten=True)).to_pylist()
        return [Part(a["path"], a["size_bytes"], a["num_records"] or 0) for a in actions]


class Table:
    """A table of embeddings, its rejected rows and its records."""

    def __init__(self, uri: str) -> None:
        self.rows = Log(uri)
        self.rejected = Log(f"{self.rows.uri}/_rejected")
        self.uri = self.rows.uri

    @classmethod
    def open(cls, uri: str) -> Table:
        """Open a table that exists.

        Raises:
            TableError: There is none.
        """
        local = "://" not in uri
        if local and not Path(uri).is_dir():
            raise TableError(f"table: no such folder: {uri}")
        if local and not (Path(uri) / "_delta_log").is_dir():
            raise TableError(f"table: {uri} is no fmembed table: it has no _delta_log")
        table = cls(uri)
        if table.rows.delta() is None or not table.configuration():
            raise TableError(f"table: {uri} is no fmembed table")
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
                foreign = [p for p in table.rows.paths() if not p.startswith(("_", "part-"))]
                if foreign or table.rows.delta() is not None:
                    raise TableError(
                        f"output.uri: {uri} is not empty and no fmembed table; give another folder"
                    )
            table._check_same_model(identity)
            # Learn now, not after an hour, that nothing can be written here.
            table.rows.put("_runs/.probe", b"")
            table.rows.delete("_runs/.probe")
        except FmembedError:
            raise
        except Exception as e:
            raise TableError(
                f"output.uri: cannot write to {uri}: {_reason(e)}; give a folder or URL that "
                "this user may write"
            ) from None
        finally:
            _remove_empty([table.rows.uri + "/_runs", *absent])
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
        delta = self.rows.delta()
        return None if delta is None else int(delta.version())

    def row_ids(self) -> RowIds:
        """Ids of all rows that a run need not look at again: committed or rejected."""
        ids = RowIds()
        for log in (self.rows, self.rejected):
            for part in log.parts():
                ids.add(keys_of(log.read_columns(part.path, [ROW_ID])[ROW_ID].to_pylist()))
        return ids

    def num_rejected(self) -> int:
        """Rows in `_rejected`."""
        return sum(part.num_rows for part in self.rejected.parts())

    def put_json(self, path: str, value: Any) -> None:
        """Write a record beside the table."""
        self.rows.put(path, json.dumps(value, indent=1).encode())

    def get_json(self, path: str) -> Any:
        """Read a record, None where there is none."""
        try:
            return json.loads(self.rows.get(path))
        except FileNotFoundError:
            return None

    def last_run(self) -> Any:
        """The record of the last run that finished, None where there is none."""
        runs = self.rows.paths("_runs/")
        return self.get_json(runs[-1]) if runs else None


def write_part(uri: str, blocks: list[pa.Table], twice: frozenset[bytes] = frozenset()) -> Written:
    """Write embedded rows as one part, and rejected ones as another.

    Args:
        uri: The table.
        blocks: Rows as the embed stage yields them.
        twice: Keys of rows that another part already holds; they are rejected here.

    Returns:
        The parts, not committed, with what the driver needs to commit and to count them.
    """
    started = time.monotonic()
    rows = pa.concat_tables(blocks)
    rows = _reject_duplicates(rows, twice)
    good = rows.filter(pa.array(accepted(rows)))
    bad = rows.filter(rows[STAGE].is_valid())
    bookkeeping = [n for n in rows.schema.names if n.startswith("_")]
    vectors = good["embedding"]
    carried = [f for f in good.schema if f.name not in (*bookkeeping, *_OWN)]
    schema = table_schema(pa.schema(carried), vectors.type.list_size)
    good = good.select(schema.names).cast(schema)
    table = Table(uri)
    part = rejected = None
    if good.num_rows:
        part = table.rows.write(good)
    if bad.num_rows:
        columns = [bad[ROW_ID], bad[STAGE], bad["_error"], bad["_message"]]
        rejected = table.rejected.write(
            pa.table([c.cast(pa.string()) for c in columns], schema=REJECTED_SCHEMA)
        )
    return Written(
        schema=schema,
        part=part,
        rejected=rejected,
        keys=keys_of(good[ROW_ID].to_pylist()),
        num_skipped=int(sum(n for n in rows[SKIPPED].to_pylist() if n is not None)),
        num_units=int(np.sum(good["num_units"].to_numpy(), dtype=np.int64)),
        num_truncated=int(np.sum(good["truncated"].to_numpy(), dtype=np.int64)),
        causes=dict(collections.Counter(bad["_error"].to_pylist())),
        busy_s=time.monotonic() - started,
    )


_OWN = (ROW_ID, "content_hash", "embedding", "num_units", "truncated")


def _reject_duplicates(rows: pa.Table, twice: frozenset[bytes]) -> pa.Table:
    good = np.flatnonzero(accepted(rows))
    keys = keys_of(rows[ROW_ID].take(pa.array(good)).to_pylist()).tolist()
    seen = set(twice)
    causes = {}
    for i, key in zip(good.tolist(), keys, strict=True):
        if key in seen:
            causes[i] = ("duplicate id", "another row of the source has the same id")
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

        return ray.data.read_parquet([f"{table.uri}/{p}" for p in paths], columns=columns)
    if not paths:
        delta = table.rows.delta()
        assert delta is not None
        empty = pa.schema(delta.schema().to_arrow()).empty_table()
        return empty.select(columns) if columns is not None else empty
    return pa.concat_tables([table.rows.read_columns(p, columns) for p in paths])


def sample(uri: str, columns: list[str], max_rows: int, not_null: str | None) -> pa.Table:
    """Read a fixed sample: the rows with the smallest content hashes.

    Memory is bounded by one part and the sample, whatever the table's size.

    Args:
        uri: The table.
        columns: What to read besides row_id, content_hash and embedding.
        max_rows: Size of the sample.
        not_null: Leave out rows where this column is null.

    Returns:
        Rows in the order of their row ids.
    """
    table = Table.open(uri)
    wanted = list(dict.fromkeys([ROW_ID, "content_hash", "embedding", *columns]))
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


def verify(uri: str) -> VerifyResult:
    """Recount a table from storage.

    Checked: every part's checksum, size and row count against the log; ids unique and none both
    embedded and rejected; one dimension; no NaN or infinity; norms (1 where the model normalises,
    never 0); no stray part; and rows read = embedded + rejected + skipped in the last run's record.

    Raises:
        TableError: No table there.
    """
    table = Table.open(uri)
    problems: list[str] = []
    stored = table.configuration()
    keys: list[Keys] = []
    dims: set[int] = set()
    norms = [np.empty(0, dtype=np.float32)]
    parts = table.rows.parts()
    for part in parts:
        rows = _verify_part(table.rows, part, "", problems)
        if rows is None:
            continue
        keys.append(keys_of(rows[ROW_ID].to_pylist()))
        dims.add(rows.schema.field("embedding").type.list_size)
        column = rows["embedding"].combine_chunks()
        flat = column.flatten().to_numpy(zero_copy_only=False)
        vectors = flat.reshape(rows.num_rows, -1)
        num_bad = int((~np.isfinite(vectors)).any(axis=1).sum()) + column.null_count
        if num_bad:
            problems.append(f"{part.path}: {num_bad} vectors are null, NaN or infinite")
        norms.append(np.linalg.norm(vectors, axis=1))
    num_rejected = 0
    for part in table.rejected.parts():
        rows = _verify_part(table.rejected, part, "_rejected/", problems)
        num_rejected += rows.num_rows if rows is not None else 0
    all_keys = np.concatenate([np.empty(0, dtype="S16"), *keys])
    if num_twice := len(all_keys) - len(np.unique(all_keys)):
        problems.append(f"{num_twice} rows repeat a row_id")
    if len(dims) > 1:
        problems.append(f"vectors of several dimensions: {sorted(dims)}")
    all_norms = np.concatenate(norms)
    _verify_norms(
        all_norms, bool(json.loads(stored["fmembed.identity"])["model.normalize"]), problems
    )
    for log, prefix in ((table.rows, ""), (table.rejected, "_rejected/")):
        known = {part.path for part in log.parts()}
        strays = [p for p in log.paths() if p.startswith("part-") and p not in known]
        problems += [f"{prefix}{p}: a stray part that no commit names" for p in strays]
    _verify_counts(table.last_run(), len(all_keys), num_rejected, problems)
    return VerifyResult(
        table=table.uri,
        version=table.version() or 0,
        fingerprint=stored["fmembed.fingerprint"],
        rows=len(all_keys),
        rows_rejected=num_rejected,
        parts=len(parts),
        dim=min(dims, default=0),
        norm_min=float(all_norms.min(initial=np.inf)) if len(all_norms) else 0.0,
        norm_max=float(all_norms.max(initial=0.0)),
        problems=problems,
    )


def _verify_part(log: Log, part: Part, prefix: str, problems: list[str]) -> pa.Table | None:
    try:
        content = log.get(part.path)
    except FileNotFoundError:
        problems.append(f"{prefix}{part.path}: committed, but missing")
        return None
    checksum = hashlib.blake2b(content, digest_size=16).hexdigest()
    if part.path != f"part-{checksum}.parquet":
        problems.append(f"{prefix}{part.path}: its bytes do not match its checksum")
    try:
        rows = pq.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as e:
        problems.append(f"{prefix}{part.path}: not readable: {_reason(e)}")
        return None
    if rows.num_rows != part.num_rows:
        problems.append(
            f"{prefix}{part.path}: {rows.num_rows} rows where the log says {part.num_rows}"
        )
    return rows


def _verify_norms(norms: Any, normalized: bool, problems: list[str]) -> None:
    if num_zero := int((norms == 0).sum()):
        problems.append(f"{num_zero} vectors are all zero")
    if normalized and (num_off := int((np.abs(norms - 1) > _UNIT_NORM_TOLERANCE).sum())):
        problems.append(f"{num_off} vectors have not the length 1 that the model promises")


def _verify_counts(run: Any, rows: int, rejected: int, problems: list[str]) -> None:
    if run is None:
        problems.append("no run has finished on this table")
        return
    counted = run["rows_embedded"] + run["rows_rejected"] + run["rows_skipped"]
    if run["rows_read"] != counted:
        problems.append(
            f"the last run read {run['rows_read']} rows, "
            f"but embedded, rejected and skipped {counted}"
        )
    for what, have in (("table_rows", rows), ("table_rejected", rejected)):
        if run[what] != have:
            problems.append(f"{what} was {run[what]} when the last run ended, is {have}")


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _remove_empty(folders: list[Any]) -> None:
    """Take away the folders that only looking has made, innermost first."""
    for folder in map(Path, folders):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
