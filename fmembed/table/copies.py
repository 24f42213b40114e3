"""Rows that take the vector of another row: of one that has the same content."""

from __future__ import annotations

import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fmembed.errors import DamagedError
from fmembed.rows.columns import (
    CARRIED,
    CONTENT_HASH,
    COPIED,
    DUPLICATE,
    NUM_UNITS,
    PARENT_ID,
    PIECE,
    PIECE_START,
    PIECE_STOP,
    PIECE_TEXT,
    REJECTED_SCHEMA,
    ROW_ID,
    SHARD,
    TRUNCATED,
)
from fmembed.rows.ids import contents_of, keys_of
from fmembed.table.files import Part
from fmembed.table.key_rows import KINDS, KeyRows
from fmembed.table.parts import ShardCount, Written
from fmembed.table.table import Table

# Counts rows that take their vectors from what is not committed, as it was embedded just now.
FANNED_OUT = "rows_fanned_out"
_OF_VECTOR = (NUM_UNITS, TRUNCATED)
_OF_PIECE = (PIECE, PIECE_START, PIECE_STOP, PIECE_TEXT)


def take_copies(blocks: Sequence[pa.Table]) -> pa.Table:
    """Of blocks as the embed stage yields them the rows that are marked as copies: their ids,
    contents and carried values.
    """
    taken = []
    for block in blocks:
        names = [
            name for name in block.schema.names
            if not name.startswith("_") or name in (CARRIED, SHARD, COPIED)
        ]  # fmt: skip
        taken.append(block.select(names).filter(pc.is_valid(block[COPIED])))
    return pa.concat_tables(taken)


def fill_copies(
    uri: str,
    vectors: Sequence[str],
    stamp: Mapping[str, str],
    copies: Sequence[pa.Table],
    holders: KeyRows,
    parts: Mapping[str, Part],
    num_old: int,
    part_bytes: int,
) -> tuple[list[Written], list[KeyRows]]:
    """Write parts of rows that take their vectors from other parts.

    Where the row that was to have the vector is rejected, so are they, of the same cause.

    Args:
        uri: The table.
        vectors: Its columns of vectors.
        stamp: For the parts' footers.
        copies: As `take_copies` gives them.
        holders: Rows that have a vector, or are rejected, of the contents that these rows have;
            their places are those of the parts.
        parts: The parts, by their paths.
        num_old: So many of them, the first ones, are committed.
        part_bytes: How large a part to write at most.

    Returns:
        What was written, and the keys of its rows.

    Raises:
        DamagedError: A part is missing, not as it was written, or without a vector it should have.
    """
    table = Table(uri)
    rows = pa.concat_tables(copies)
    if not rows.num_rows:
        return [], []
    # Of a content that is both, the vector.
    holders = holders[np.argsort(holders.kinds, kind="stable")[::-1]]
    holder_of = {c: i for i, c in enumerate(holders.contents.tolist())}
    own = contents_of(rows[CONTENT_HASH].to_pylist()).tolist()
    found = np.array([holder_of.get(content, -1) for content in own], dtype=np.int64)
    # One that nobody holds, as its file has changed meanwhile, is found again by the next refresh.
    rows, found = rows.filter(pa.array(found >= 0)), found[found >= 0]
    held, paths = holders.places[found], list(parts)
    is_refused = holders.kinds[found] != KINDS.index("embedded")
    results = []
    if is_refused.any():
        causes = holders[found[is_refused]]
        results.append(_refuse(table, stamp, rows.filter(pa.array(is_refused)), causes, parts))
    rows, held = rows.filter(pa.array(~is_refused)), held[~is_refused]
    # Neighbours take their vectors from the same part.
    order = np.argsort(held, kind="stable")
    rows, held = rows.take(pa.array(order)), held[order]
    for start, stop in _cut(held, list(parts.values()), part_bytes) if len(held) else ():
        began = time.monotonic()
        some = rows.slice(start, stop - start)
        made = _fill(table, vectors, some, [parts[paths[i]] for i in np.unique(held[start:stop])])
        part = table.rows.files.write(made, vectors, stamp)
        written = _written(made.schema, some, part, None, {}, began)
        counts = {FANNED_OUT: float((held[start:stop] >= num_old).sum())}
        results.append((replace(written, counts=counts), _keys_of(some, 0)))
    return [written for written, _ in results], [keys for _, keys in results]


def _written(
    schema: pa.Schema,
    rows: pa.Table,
    part: Part | None,
    rejected: Part | None,
    causes: dict[str, int],
    began: float,
) -> Written:
    return Written(
        schema=schema,
        num_rows=rows.num_rows if part is not None else 0,
        part=part,
        rejected=rejected,
        shards=dict.fromkeys(rows[SHARD].to_pylist(), ShardCount()),
        num_units=0,
        num_truncated=0,
        counts={},
        causes=causes,
        busy_s=time.monotonic() - began,
    )


def _keys_of(rows: pa.Table, kind: int) -> KeyRows:
    return KeyRows.of(
        keys_of(rows[ROW_ID].to_pylist()),
        contents_of(rows[CONTENT_HASH].to_pylist()),
        rows[CARRIED].fill_null(0).to_numpy(),
        np.full(rows.num_rows, kind, dtype=np.int8),
        rows[SHARD].fill_null(-1).to_numpy(),
    )


def _refuse(
    table: Table,
    stamp: Mapping[str, str],
    copies: pa.Table,
    causes: KeyRows,
    parts: Mapping[str, Part],
) -> tuple[Written, KeyRows]:
    """Write rows as rejected, each as the row is that has its content."""
    began = time.monotonic()
    paths = list(parts)
    told: dict[bytes, dict[str, str]] = {}
    for at in np.unique(causes.places).tolist():
        rows = table.rejected.files.read_whole(parts[paths[at]])
        # Not of a row of the same id that was rejected for having it.
        rows = rows.filter(pc.not_equal(rows["error"], DUPLICATE))
        told |= dict(zip(keys_of(rows[ROW_ID].to_pylist()).tolist(), rows.to_pylist(), strict=True))
    ids = copies[ROW_ID].to_pylist()
    rejected = pa.Table.from_pylist(
        [{**told[key], ROW_ID: i} for key, i in zip(causes.ids.tolist(), ids, strict=True)],
        REJECTED_SCHEMA,
    )
    part = table.rejected.files.write(rejected, (), stamp)
    by_cause = dict(Counter(rejected["error"].to_pylist()))
    return (
        _written(REJECTED_SCHEMA, copies, None, part, by_cause, began),
        _keys_of(copies, KINDS.index("rejected")),
    )


def _cut(
    held: npt.NDArray[np.int32], parts: Sequence[Part], part_bytes: int
) -> Iterator[tuple[int, int]]:
    """From where to where rows fit one part, as far as those that hold their vectors tell."""
    row_bytes = [part.size_bytes / max(part.num_rows, 1) for part in parts]
    ends = np.cumsum([row_bytes[at] for at in held.tolist()]) // part_bytes
    starts = [0, *(np.flatnonzero(np.diff(ends)) + 1).tolist(), len(held)]
    return itertools.pairwise(starts)


def _fill(
    table: Table, vectors: Sequence[str], copies: pa.Table, parts: Sequence[Part]
) -> pa.Table:
    wanted = pc.unique(copies[CONTENT_HASH])
    holders = []
    for part in parts:
        rows = table.read_part(part, None)
        holders.append(rows.filter(pc.is_in(rows[CONTENT_HASH], value_set=wanted)))
    held = pa.concat_tables(holders, promote_options="default")
    has_pieces = PARENT_ID in held.schema.names
    owners = held[PARENT_ID if has_pieces else ROW_ID].to_pylist()
    # Of each content one row, or all pieces of one.
    first: dict[str, str] = {}
    rows_of: dict[str, list[int]] = defaultdict(list)
    for i, (content, owner) in enumerate(zip(held[CONTENT_HASH].to_pylist(), owners, strict=True)):
        if first.setdefault(content, owner) == owner:
            rows_of[content].append(i)
    taken = [rows_of[content] for content in copies[CONTENT_HASH].to_pylist()]
    if not all(taken):
        raise DamagedError(table.uri, "a part has no vector that its keys tell of")
    copy = np.repeat(np.arange(copies.num_rows), [len(some) for some in taken])
    own = copies.take(pa.array(copy))
    from_held = held.take(pa.array(list(itertools.chain.from_iterable(taken))))
    columns = []
    for field in held.schema:
        is_held = field.name in (*vectors, *_OF_VECTOR, *_OF_PIECE)
        column = from_held[field.name] if is_held else None
        if field.name == PARENT_ID or (field.name == ROW_ID and not has_pieces):
            column = own[ROW_ID]
        elif field.name == ROW_ID:
            pairs = zip(own[ROW_ID].to_pylist(), from_held[PIECE].to_pylist(), strict=True)
            column = pa.array([f"{parent}@{piece}" for parent, piece in pairs], pa.string())
        elif column is None:
            column = own[field.name]
        columns.append(column.cast(field.type))
    return pa.table(columns, schema=held.schema)
