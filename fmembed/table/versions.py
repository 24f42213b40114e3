"""The versions of a table: which there are, how they differ, what each is made of, which stay."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fmembed.errors import TableError
from fmembed.rows.columns import (
    CONTENT_HASH,
    NUM_UNITS,
    PARENT_ID,
    PIECE,
    PIECE_TEXT,
    ROW_ID,
    TRUNCATED,
)
from fmembed.spec import OutputSpec
from fmembed.table.files import REJECTED, Part
from fmembed.table.lock import Lock
from fmembed.table.log import Entry
from fmembed.table.promoted import find_version, pinned_versions, promoted_version
from fmembed.table.table import Table

_DAY_S = 86_400.0
# Ids of each kind that a comparison names.
_SAMPLES = 20
# Entries of a log that are worth a checkpoint and their removal; fewer stay.
_FEW_ENTRIES = 100


@dataclass(frozen=True)
class Version:
    """One version: `rows` and `num_bytes` are all of it, `added` and `removed` those of the parts
    that came and went with it. `run` has made it, or `operation` by another tool. `is_whole` says
    whether all its parts are there.
    """

    version: int
    time: str
    run: str
    operation: str
    rows: int
    added: int
    removed: int
    parts: int
    num_bytes: int
    is_whole: bool


@dataclass(frozen=True)
class Difference:
    """Rows by what has become of them from one version to another; `samples` are some ids of each.

    `changed` have another content, `relabelled` the same one and other carried values. A text that
    is cut into chunks, or a sound into windows, counts once.
    """

    old: int
    new: int
    rows_new: int
    rows_changed: int
    rows_relabelled: int
    rows_removed: int
    samples: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Vacuumed:
    """What `vacuum` has done, or would do: `oldest` is the oldest version that is still whole."""

    table: str
    oldest: int
    newest: int
    files: int
    num_bytes: int


def list_versions(uri: str | Path, limit: int | None = None) -> list[Version]:
    """The versions that the table's log tells of, the newest first.

    Args:
        uri: The table.
        limit: At most so many.

    Raises:
        TableError: No table there.
    """
    table = Table.open(uri)
    there = table.storage.sizes("")
    found: list[Version] = []
    # One more, by which it is known how many rows were in the parts that the last one removed.
    first = 0 if limit is None else table.rows.version() - limit
    for entry, parts in table.rows.replay(first):
        found.append(
            Version(
                version=entry.version,
                time=_iso(entry.time_ms),
                run=entry.run,
                operation=entry.operation,
                rows=sum(part.num_rows for part in parts.values()),
                added=sum(part.num_rows for part in entry.added.values()),
                removed=sum(part.num_rows for part in entry.removed.values()),
                parts=len(parts),
                num_bytes=sum(part.size_bytes for part in parts.values()),
                is_whole=parts.keys() <= there.keys(),
            )
        )
    return found[::-1][:limit]


def list_files(uri: str | Path, version: int | None = None) -> list[str]:
    """Where the parts of a version are: what to give to a reader that takes a list of files.

    Args:
        uri: The table; or a store, for what is promoted.
        version: Which; None for the newest.

    Raises:
        TableError: No table there, or no such version.
    """
    found = find_version(uri, version)
    table, version = found.table, found.version
    _check_version(table, version)
    return [f"{table.uri}/{part.path}" for part in table.rows.parts(version)]


def diff_versions(uri: str | Path, old: int, new: int | None = None) -> Difference:
    """How two versions differ, by the rows of the parts that only one of them has.

    Args:
        uri: The table.
        old: One version.
        new: The other; None for the newest.

    Raises:
        TableError: No table there, no such version, or one of which parts are gone.
    """
    table = Table.open(uri)
    for version in (old, new):
        _check_version(table, version)
    newest = table.version() or 0
    both = [{p.path: p for p in table.rows.parts(v)} for v in (old, newest if new is None else new)]
    before, after = (
        _rows_of(table, [part for path, part in own.items() if path not in other])
        for own, other in (both, both[::-1])
    )
    shared = before.keys() & after.keys()
    found = {
        "new": sorted(after.keys() - before.keys()),
        "changed": sorted(i for i in shared if before[i][0] != after[i][0]),
        "relabelled": sorted(
            i for i in shared if before[i][0] == after[i][0] and before[i] != after[i]
        ),
        "removed": sorted(before.keys() - after.keys()),
    }
    return Difference(
        old,
        newest if new is None else new,
        **{f"rows_{name}": len(ids) for name, ids in found.items()},
        samples={name: ids[:_SAMPLES] for name, ids in found.items()},
    )


def _rows_of(table: Table, parts: Sequence[Part]) -> dict[str, tuple[Any, ...]]:
    """By the source's id of each row its content and what it carries."""
    card = table.card()
    assert card is not None
    left_out = {
        ROW_ID,
        PARENT_ID,
        PIECE,
        NUM_UNITS,
        TRUNCATED,
        "piece_start",
        "piece_stop",
        PIECE_TEXT,
    }
    left_out |= card.outputs.keys()
    rows: dict[str, tuple[Any, ...]] = {}
    for part in parts:
        if table.storage.size_bytes(part.path) is None:
            raise TableError(
                f"version: {part.path} of {table.uri} is gone, as after a vacuum; the version that "
                "had it can no longer be compared"
            )
        names = table.rows.files.read_schema(part).names
        id_column = PARENT_ID if PARENT_ID in names else ROW_ID
        carried = [name for name in names if name not in left_out and name != CONTENT_HASH]
        some = table.read_part(part, [id_column, CONTENT_HASH, *carried])
        columns = [some[name].to_pylist() for name in (CONTENT_HASH, *carried)]
        for row_id, *values in zip(some[id_column].to_pylist(), *columns, strict=True):
            rows[row_id] = tuple(map(repr, values))
    return rows


def vacuum(
    uri: str | Path,
    *,
    keep_days: float | None = None,
    keep_versions: int | None = None,
    purge: bool = False,
    dry_run: bool = False,
) -> Vacuumed:
    """Delete the files that only versions name which are not kept, and nothing else.

    A version is kept that was the newest one at some time of the last `keep_days`, and so are the
    `keep_versions` newest ones; and in a store what is promoted, and what was before it.

    Args:
        uri: The table.
        keep_days: None for what the config says that the table was made by.
        keep_versions: None likewise.
        purge: Keep the newest version alone, and nothing beside it that may tell of rows which it
            has not: staged and damaged parts, probes, the report.
        dry_run: Delete nothing, and say what would be.

    Raises:
        TableError: No table there, or a number that makes no sense.
        LockedError: A run is writing the table.
    """
    table = Table.open(uri)
    policy = _policy_of(table)
    keep_days = policy.keep_days if keep_days is None else keep_days
    keep_versions = policy.keep_versions if keep_versions is None else keep_versions
    if keep_versions < 1 or (keep_days is not None and not keep_days >= 0):
        raise TableError(
            "vacuum: takes at least 1 version and no less than 0 days to keep, got "
            f"{keep_versions} and {keep_days}"
        )
    with Lock(table.storage, uuid.uuid4().hex[:12]):
        return tidy(table, keep_days, keep_versions, purge, dry_run)


def _policy_of(table: Table) -> OutputSpec:
    """What the table's own config says is kept; the defaults, where it says nothing that holds."""
    card = table.card()
    output = card.spec.get("output") if card is not None else None
    names = ("keep_days", "keep_versions")
    said = {n: output[n] for n in names if n in output} if isinstance(output, dict) else {}
    try:
        return OutputSpec.model_validate({"uri": "table", **said})
    except ValidationError:
        return OutputSpec(uri="table")


def tidy(
    table: Table,
    keep_days: float | None,
    keep_versions: int,
    purge: bool = False,
    dry_run: bool = False,
) -> Vacuumed:
    """As `vacuum`, of a table whose lock is held."""
    if purge and (lost := table.lost_runs()):
        raise TableError(
            f"table: the log of {table.uri} no longer holds what run {lost[0]} has committed; "
            "nothing was deleted: fmembed verify --repair takes its parts back, then purge"
        )
    pinned = pinned_versions(table)
    newest = table.version() or 0
    promoted = promoted_version(table) if purge else None
    if promoted is not None and promoted != newest:
        raise TableError(
            f"table: the store of {table.uri} has version {promoted} promoted, and the newest is "
            f"{newest}; nothing was deleted: fmembed promote the newest, or roll back, then purge"
        )
    sizes: dict[str, int] = {}
    oldest = newest = 0
    for log, folder in ((table.rejected, REJECTED), (table.rows, "")):
        entries = [entry for entry, _ in log.replay()]
        if not entries:
            continue
        newest = entries[-1].version
        oldest = newest if purge else _oldest_kept(entries, keep_days, keep_versions)
        if log is table.rows and not purge:
            oldest = min(oldest, *pinned, newest)
        there = log.storage.sizes("")
        gone = log.named_before(entries, oldest) & there.keys()
        sizes |= {folder + path: there[path] for path in gone}
        if not dry_run:
            # The files first: of what is left when this is killed, the log still tells.
            log.remove(gone)
            log.cut_before(oldest, 0 if purge else _FEW_ENTRIES)
            log.put_checkpoint()
    beside = _beside(table) if purge else {}
    sizes |= beside
    if not dry_run:
        for path in beside:
            table.storage.delete(path)
        there_now = [*table.storage.paths(), *table.storage.paths(REJECTED)]
        table.key_files.clean_up(there_now, [])
    return Vacuumed(table.uri, oldest, newest, len(sizes), sum(sizes.values()))


def _beside(table: Table) -> dict[str, int]:
    """What may hold rows that the newest version has not, besides parts that a log has named."""
    found = [(REJECTED if log is table.rejected else "") + path for log, path in table.strays()]
    found += table.list_staged()
    found += [*table.storage.walk("_quarantine/"), *table.storage.sizes("_probes/")]
    found += ["_report.html"] if table.has_report else []
    sizes = {path: table.storage.size_bytes(path) for path in found}
    return {path: size for path, size in sizes.items() if size is not None}


def _oldest_kept(entries: Sequence[Entry], keep_days: float | None, keep_versions: int) -> int:
    """The oldest version that is kept: all after it are."""
    if keep_days is None:
        return entries[0].version
    cutoff_ms = (time.time() - keep_days * _DAY_S) * 1000
    oldest = len(entries) - min(keep_versions, len(entries))
    # One that was the newest until a moment that is to be remembered.
    while oldest > 0 and entries[oldest].time_ms > cutoff_ms:
        oldest -= 1
    return entries[oldest].version


def _check_version(table: Table, version: int | None) -> None:
    if version is not None:
        table.check_version(version)


def _iso(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="seconds")
