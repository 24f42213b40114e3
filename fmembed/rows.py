"""The row on its way down the line, and the index of row ids.

Between stages rows are Arrow tables with these columns:

    row_id         string    the user's id, else `relative/path#row` (`relative/path` where a file
                             is a row)
    content_hash   string    blake2b-128 of the raw input bytes, hex; null where nothing was read
    _input         string, or binary for images and audio: what to embed; dropped by preprocess
    <carried>      any       what the user asked to keep
    _stage, _error, _message string   null, or where and why the row was rejected
    _shard         int32     which of the source's shards it was read from
    _total, _skipped int64   null, but on the marker row (null row_id) that ends each shard: how
                             many rows the shard holds, and how many of them were committed before

A rejected row keeps travelling, without input or vector, so that the writer sees every row that
was read exactly once: rows read = rows embedded + rows rejected is a count, not a hope. By its
marker the driver knows when all rows of a shard are committed, so that it is not read again.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fmembed.spec import Modality, scrub

_MAX_MESSAGE = 500

ROW_ID, CONTENT_HASH, INPUT = "row_id", "content_hash", "_input"
STAGE, ERROR, MESSAGE = "_stage", "_error", "_message"
SHARD, TOTAL, SKIPPED = "_shard", "_total", "_skipped"
# What the stages counted, as JSON: on the first row of each block or window, else null.
COUNTS = "_counts"
# Of these counts, the seconds that a stage's processes were at work.
SECONDS = "seconds/"
# Where a text's chunks or a sound's windows are rows of their own: whose, which, and from where to
# where (characters of the text, samples at the model's rate).
PARENT_ID, PIECE, PIECE_START, PIECE_STOP = "parent_id", "piece", "piece_start", "piece_stop"
# The cause of a row whose id another row has: the one rejection whose id is also embedded.
DUPLICATE = "duplicate id"
# What no carried column may be called: the table's own columns.
RESERVED = (
    ROW_ID, CONTENT_HASH, "embedding", "num_units", "truncated",
    PARENT_ID, PIECE, PIECE_START, PIECE_STOP,
)  # fmt: skip

Keys = npt.NDArray[np.bytes_]

_BOOKKEEPING = (
    pa.field(STAGE, pa.string()),
    pa.field(ERROR, pa.string()),
    pa.field(MESSAGE, pa.string()),
    pa.field(SHARD, pa.int32()),
    pa.field(TOTAL, pa.int64()),
    pa.field(SKIPPED, pa.int64()),
)
REJECTED_SCHEMA = pa.schema(
    [
        pa.field(ROW_ID, pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
    ]
)


def row_schema(carried: pa.Schema, modality: Modality = "text") -> pa.Schema:
    """The schema a source yields, for the carried columns given."""
    fields = [pa.field(ROW_ID, pa.string()), pa.field(CONTENT_HASH, pa.string())]
    input_ = pa.field(INPUT, pa.string() if modality == "text" else pa.large_binary())
    return pa.schema([*fields, input_, *carried, *_BOOKKEEPING])


def table_schema(
    carried: pa.Schema, vectors: Iterable[pa.Field], pieces_are_rows: bool = False
) -> pa.Schema:
    """The schema of the committed table: ids, columns of vectors, counts, then the carried."""
    pieces = [
        pa.field(PARENT_ID, pa.string(), nullable=False),
        pa.field(PIECE, pa.int32(), nullable=False),
        pa.field(PIECE_START, pa.int64(), nullable=False),
        pa.field(PIECE_STOP, pa.int64(), nullable=False),
    ]
    return pa.schema(
        [
            pa.field(ROW_ID, pa.string(), nullable=False),
            *(pieces if pieces_are_rows else []),
            pa.field(CONTENT_HASH, pa.string(), nullable=False),
            *(field.with_nullable(False) for field in vectors),
            pa.field("num_units", pa.int32(), nullable=False),
            pa.field("truncated", pa.bool_(), nullable=False),
            *carried,
        ]
    )


def accepted(rows: pa.Table) -> npt.NDArray[np.bool_]:
    """True for each row that is neither rejected nor a marker, shape (rows,)."""
    good = np.asarray(rows[STAGE].is_null()) & np.asarray(rows[TOTAL].is_null())
    return np.asarray(good, dtype=np.bool_)


def reject(rows: pa.Table, stage: str, causes: Mapping[int, tuple[str, str]]) -> pa.Table:
    """Mark rows as rejected.

    Args:
        rows: Rows with the bookkeeping columns.
        stage: The stage that refuses them: read, preprocess, embed or write.
        causes: Row position to (error, message); error is a short cause that rows share, message
            says what was wrong with this one.
    """
    if not causes:
        return rows
    columns = {name: rows[name].to_pylist() for name in (STAGE, ERROR, MESSAGE)}
    for i, (error, message) in causes.items():
        columns[STAGE][i], columns[ERROR][i] = stage, error
        columns[MESSAGE][i] = clean_message(message)
    for name, values in columns.items():
        i = rows.schema.get_field_index(name)
        rows = rows.set_column(i, name, pa.array(values, pa.string()))
    return rows


def sum_counts(rows: pa.Table) -> dict[str, float]:
    """What the stages counted of these rows, summed."""
    counts: dict[str, float] = collections.defaultdict(float)
    said = rows[COUNTS].drop_null().to_pylist() if COUNTS in rows.schema.names else []
    for name, count in itertools.chain.from_iterable(json.loads(s).items() for s in said):
        counts[name] += count
    return dict(counts)


def with_counts(rows: pa.Table, counts: Mapping[str, float]) -> pa.Table:
    """Put counts on the first row, in place of what was counted there before; of no row, none."""
    said = pa.array([json.dumps(counts), *[None] * (rows.num_rows - 1)], pa.string())
    if COUNTS in rows.schema.names:
        rows = rows.drop_columns([COUNTS])
    return rows.append_column(COUNTS, said.slice(0, rows.num_rows))


def clean_message(message: str) -> str:
    """A message fit to be stored: no secret of a URL, and not the whole row that it quotes."""
    return scrub(message)[:_MAX_MESSAGE]


def keys_of(row_ids: Iterable[str]) -> Keys:
    """Hash row ids to 16 bytes each (blake2b-128), shape (rows,), dtype S16.

    128 bits because a collision would skip a row that was never embedded: at 10**9 rows the
    chance is below 10**-20, with 64 bits it would be 3 %.
    """
    digests = [hashlib.blake2b(i.encode(), digest_size=16).digest() for i in row_ids]
    return np.array(digests, dtype="S16")


class RowIds:
    """A set of row ids as sorted 16-byte keys: 16 bytes a row, membership by binary search."""

    def __init__(self, keys: Keys | None = None) -> None:
        self._keys: Keys = np.sort(keys) if keys is not None else np.empty(0, dtype="S16")
        self._recent: list[Keys] = []
        self._num_recent = 0

    def __len__(self) -> int:
        return len(self._keys) + self._num_recent

    @property
    def nbytes(self) -> int:
        """Memory of the keys."""
        return int(self._keys.nbytes) + sum(int(keys.nbytes) for keys in self._recent)

    def contains(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Whether each key is in the set, shape (rows,)."""
        found = np.zeros(len(keys), dtype=np.bool_)
        for known in (self._keys, *self._recent):
            if len(known):
                at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
                found |= known[at] == keys
        return found

    def add(self, keys: Keys) -> None:
        """Add keys. Merged into the sorted array only once they amount to a tenth of it."""
        self._recent.append(np.sort(keys))
        self._num_recent += len(keys)
        if self._num_recent * 10 > len(self._keys) or len(self._recent) > 64:
            self._keys = np.sort(np.concatenate([self._keys, *self._recent]))
            self._recent, self._num_recent = [], 0
