"""Rows as the embed stage yields them -> Parquet parts: what a write task does.

Rejected rows go into parts of their own; nothing is committed here.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fmembed.rows.columns import (
    CARRIED,
    CHANGED,
    CONTENT_HASH,
    DUPLICATE,
    ERROR,
    HIDES,
    HIDES_REST,
    MESSAGE,
    NUM_UNITS,
    PARENT_ID,
    PIECE,
    PIECE_START,
    PIECE_STOP,
    PIECE_TEXT,
    REJECTED_SCHEMA,
    ROW_ID,
    SHARD,
    SKIPPED,
    STAGE,
    TOTAL,
    TRUNCATED,
    TWIN,
    accepted,
    reject,
    table_schema,
)
from fmembed.rows.counts import sum_counts
from fmembed.rows.ids import RowIds, contents_of, keys_of
from fmembed.rows.pieces import PIECE_SPANS, PIECE_TEXTS, PIECE_UNITS
from fmembed.rows.precision import PRECISIONS
from fmembed.storage import Storage
from fmembed.table.card import Card
from fmembed.table.files import REJECTED, Part, PartFiles
from fmembed.table.key_rows import KINDS, KeyRows, Kind


@dataclass(frozen=True)
class ShardCount:
    """Rows of a shard in some blocks; `total` and what was known come with its marker only."""

    rows: int = 0
    rejected: int = 0
    skipped: int = 0
    changed: int = 0
    total: int | None = None

    def __add__(self, other: ShardCount) -> ShardCount:
        return ShardCount(
            self.rows + other.rows,
            self.rejected + other.rejected,
            self.skipped + other.skipped,
            self.changed + other.changed,
            self.total if other.total is None else other.total,
        )

    @property
    def whole(self) -> bool:
        """Whether every row of the shard is in the table as it is in the source, or rejected."""
        return self.rows + self.skipped == self.total and not self.changed


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
    shards: dict[int, ShardCount]
    num_units: int
    num_truncated: int
    counts: dict[str, float]
    causes: dict[str, int]
    busy_s: float

    @property
    def held_by(self) -> dict[Kind, str]:
        """The part that holds its rows, by their kind."""
        held: dict[Kind, str] = {}
        if self.part is not None:
            held["embedded"] = self.part.path
        if self.rejected is not None:
            kinds: tuple[Kind, ...] = ("rejected", "twin", "rest")
            held |= dict.fromkeys(kinds, REJECTED + self.rejected.path)
        return held


def write_part(
    uri: str,
    blocks: list[pa.Table],
    vectors: Sequence[str],
    stamp: Mapping[str, str] | None = None,
) -> tuple[Written, KeyRows]:
    """Write embedded rows as one part, and rejected ones as another.

    Args:
        uri: The table.
        blocks: Rows as the embed stage yields them.
        vectors: The columns of vectors.
        stamp: For the footers of the parts, see `Log.write`.

    Returns:
        The parts, not committed, with what the driver needs to commit and to count them; and the
        keys of the rows.
    """
    started = time.monotonic()
    rows = pa.concat_tables(blocks)
    rows = _reject_duplicates(rows)
    good = _keep(rows, accepted(rows))
    bad = rows.filter(rows[STAGE].is_valid())
    pieces_are_rows = PIECE_UNITS in rows.schema.names
    keys = _keys_of(good, bad)
    num_truncated = int(np.sum(good[TRUNCATED].to_numpy(), dtype=np.int64))
    units = int(np.sum(good[NUM_UNITS].to_numpy(), dtype=np.int64))
    given = good
    if pieces_are_rows:
        good = _explode(good, vectors)
    own = (ROW_ID, CONTENT_HASH, *vectors, NUM_UNITS, TRUNCATED)
    own += (PARENT_ID, PIECE, PIECE_START, PIECE_STOP, PIECE_TEXT, PIECE_UNITS, PIECE_SPANS)
    carried = [f for f in good.schema if f.name not in own and not f.name.startswith("_")]
    fields = [good.schema.field(name) for name in vectors]
    keeps_text = PIECE_TEXT in good.schema.names
    schema = table_schema(pa.schema(carried), fields, pieces_are_rows, keeps_text)
    good = good.select(schema.names).cast(schema)
    part = rejected = None
    if good.num_rows:
        part = PartFiles(Storage(uri)).write(good, vectors, stamp)
    if bad.num_rows:
        columns = [bad[ROW_ID], bad[STAGE], bad[ERROR], bad[MESSAGE]]
        causes = pa.table([c.cast(pa.string()) for c in columns], schema=REJECTED_SCHEMA)
        rejected = _rejected_files(uri).write(causes, (), stamp)
    written = Written(
        schema=schema,
        num_rows=given.num_rows,
        part=part,
        rejected=rejected,
        shards=_count_shards(rows),
        num_units=units,
        num_truncated=num_truncated,
        counts=sum_counts(rows),
        causes=dict(collections.Counter(bad[ERROR].to_pylist())),
        busy_s=time.monotonic() - started,
    )
    return written, keys


def write_without(
    uri: str,
    written: Written,
    keys: KeyRows,
    twins: frozenset[bytes],
    vectors: Sequence[str],
    stamp: Mapping[str, str],
) -> tuple[Written, KeyRows]:
    """Write the parts of a write anew, with some of its embedded rows as rejected ones.

    Args:
        uri: The table.
        written: What `write_part` gave, as its other half, `keys`.
        keys: Of its rows.
        twins: Keys of the rows whose id a row in another part has.
        vectors: The columns of vectors.
        stamp: For the footers of the new parts.

    Returns:
        As `write_part`; the parts that were written first are strays.
    """
    assert written.part is not None
    rows = PartFiles(Storage(uri)).read_whole(written.part)
    name = PARENT_ID if PARENT_ID in rows.schema.names else ROW_ID
    taken = RowIds(np.array(sorted(twins), dtype="S16"))
    is_twin = taken.contains(keys_of(rows[name].to_pylist()))
    good, bad = rows.filter(pa.array(~is_twin)), rows.filter(pa.array(is_twin))
    ids = list(dict.fromkeys(bad[name].to_pylist()))
    cut = dict(zip(bad[name].to_pylist(), bad[TRUNCATED].to_pylist(), strict=True))
    causes = [{ROW_ID: i, "stage": "write", "error": DUPLICATE, "message": TWIN} for i in ids]
    rejected = pa.Table.from_pylist(causes, REJECTED_SCHEMA)
    if written.rejected is not None:
        before = _rejected_files(uri).read_whole(written.rejected)
        rejected = pa.concat_tables([before, rejected])
    is_taken = (keys.kinds == 0) & taken.contains(keys.ids)
    shards = dict(written.shards)
    for index, count in zip(*np.unique(keys.shards[is_taken], return_counts=True), strict=True):
        shards[int(index)] = shards.get(int(index), ShardCount()) + ShardCount(rejected=int(count))
    anew = replace(
        written,
        num_rows=written.num_rows - len(ids),
        part=PartFiles(Storage(uri)).write(good, vectors, stamp) if good.num_rows else None,
        rejected=_rejected_files(uri).write(rejected, (), stamp),
        shards=shards,
        num_units=written.num_units - (pc.sum(bad[NUM_UNITS]).as_py() or 0),
        num_truncated=written.num_truncated - sum(cut.values()),
        causes=dict(
            collections.Counter(written.causes) + collections.Counter({DUPLICATE: len(ids)})
        ),
    )
    return anew, replace(keys, kinds=np.where(is_taken, 2, keys.kinds).astype(np.int8))


def _rejected_files(uri: str) -> PartFiles:
    return PartFiles(Storage(f"{Storage(uri).uri}/{REJECTED}".rstrip("/")))


def _keys_of(good: pa.Table, bad: pa.Table) -> KeyRows:
    names = [ROW_ID, CONTENT_HASH, CARRIED, SHARD]
    rows = pa.concat_tables([good.select(names), bad.select(names)])
    is_twin = np.asarray(pc.equal(bad[ERROR], DUPLICATE), dtype=np.bool_)
    is_rest = bad[HIDES].fill_null(0).to_numpy() == HIDES_REST
    kinds = np.where(is_twin, KINDS.index("twin"), np.where(is_rest, KINDS.index("rest"), 1))
    return KeyRows.of(
        keys_of(rows[ROW_ID].to_pylist()),
        contents_of(rows[CONTENT_HASH].to_pylist()),
        rows[CARRIED].fill_null(0).to_numpy(),
        np.concatenate([np.zeros(good.num_rows), kinds]).astype(np.int8),
        rows[SHARD].fill_null(-1).to_numpy(),
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
    counts = pc.list_value_length(rows[PIECE_UNITS]).to_numpy(zero_copy_only=False)
    counts = counts.astype(np.int64)
    owner = np.repeat(np.arange(rows.num_rows), counts)
    piece = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    parents = rows[ROW_ID].take(pa.array(owner))
    spans = pc.list_flatten(rows[PIECE_SPANS])
    ends = np.array(spans.to_pylist(), dtype=np.int64).reshape(-1, 2)
    ids = [f"{parent}@{i}" for parent, i in zip(parents.to_pylist(), piece.tolist(), strict=True)]
    flat = {
        ROW_ID: pa.array(ids, pa.string()),
        PARENT_ID: parents,
        PIECE: pa.array(piece, pa.int32()),
        PIECE_START: pa.array(ends[:, 0]),
        PIECE_STOP: pa.array(ends[:, 1]),
        NUM_UNITS: pc.list_flatten(rows[PIECE_UNITS]),
        **{name: pc.list_flatten(rows[name]) for name in vectors},
    }
    if PIECE_TEXTS in rows.schema.names:
        flat[PIECE_TEXT] = pc.list_flatten(rows[PIECE_TEXTS])
    done = {*flat, PIECE_UNITS, PIECE_SPANS, PIECE_TEXTS}.intersection(rows.schema.names)
    rest = rows.drop_columns(sorted(done)).take(pa.array(owner))
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
    for m in rows.filter(is_marker).select([SHARD, TOTAL, SKIPPED, CHANGED]).to_pylist():
        counts[m[SHARD]] += ShardCount(skipped=m[SKIPPED], changed=m[CHANGED], total=m[TOTAL])
    return dict(counts)


def _reject_duplicates(rows: pa.Table) -> pa.Table:
    good = np.flatnonzero(accepted(rows))
    keys = keys_of(rows[ROW_ID].take(pa.array(good)).to_pylist()).tolist()
    seen: set[bytes] = set()
    causes = {}
    for i, key in zip(good.tolist(), keys, strict=True):
        if key in seen:
            causes[i] = (DUPLICATE, TWIN)
        seen.add(key)
    return reject(rows, "write", causes)


def as_written(rows: pa.Table, card: Card, schema: pa.Schema) -> pa.Table:
    """Rows of a part that another tool has written anew, with the types that runs write.

    Args:
        rows: Some columns of the part.
        card: Of the table.
        schema: The columns as its log has them.
    """
    for i, field in enumerate(rows.schema):
        output = card.outputs.get(field.name)
        if output is None:
            column = rows[field.name].cast(schema.field(field.name).type)
        else:
            value = PRECISIONS[output.precision].arrow
            column = _as_vectors(rows[field.name].combine_chunks(), value)
        rows = rows.set_column(i, field.with_type(column.type), column)
    return rows


def _as_vectors(column: pa.Array, value: pa.DataType) -> pa.Array:
    """Lists of one length to fixed-size lists, in as many lists as they are."""
    inner = column.type.value_type
    if pa.types.is_list(inner) or pa.types.is_large_list(inner):
        offsets = column.offsets.cast(pa.int32())
        return pa.ListArray.from_arrays(offsets, _as_vectors(column.values, value))
    flat = column.flatten()
    dim = len(flat) // max(len(column), 1)
    return pa.FixedSizeListArray.from_arrays(flat.cast(value), dim)
