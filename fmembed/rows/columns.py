"""The row on its way down the line.

Between stages rows are Arrow tables with these columns:

    row_id         string    the user's id, else `relative/path#row` (`relative/path` where a file
                             is a row)
    content_hash   string    blake2b-128 of the raw input bytes, hex; null where nothing was read
    _input         string, or binary for images and audio: what to embed; dropped by preprocess
    <carried>      any       what the user asked to keep
    _carried       int64     64 bits of the hash of the carried values; null without one
    _stage, _error, _message string   null, or where and why the row was rejected
    _shard         int32     which of the source's shards it was read from
    _hides         int8      null, but on a rejected row that stands for rows whose ids nobody
                             knows: its own, or all of the rest of a file that breaks off
    _copied        bool      true on a row that is not for the model: the table has a vector of its
                             content, or will have one by this run; else null
    _total, _skipped, _changed int64  null, but on the marker row (null row_id) that ends each
                             shard: how many rows the shard holds, how many of them were known
                             before, and how many of those with another content, or
                             other carried values

From prepare to the model there are also the columns of `rows.pieces` (model_input, input_dtype,
input_shapes, piece_units, piece_spans, num_units, truncated), after it one for each output, and on
some rows what the stages have counted (`rows.counts`).

A rejected row keeps travelling, without input or vector, so that the writer sees every row that
was read exactly once: rows read = rows embedded + rows rejected is a count, not a hope. By its
marker the driver knows when all rows of a shard are committed, so that it is not read again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fmembed.redaction import scrub
from fmembed.rows.outputs import DEFAULT
from fmembed.spec import OWN_COLUMNS, Modality

_MAX_MESSAGE = 500

ROW_ID, CONTENT_HASH, INPUT = "row_id", "content_hash", "_input"
STAGE, ERROR, MESSAGE = "_stage", "_error", "_message"
CARRIED = "_carried"
HIDES, COPIED = "_hides", "_copied"
HIDES_ITSELF, HIDES_REST = 1, 2
SHARD, TOTAL, SKIPPED, CHANGED = "_shard", "_total", "_skipped", "_changed"
# Where a text's chunks or a sound's windows are rows of their own: whose, which, and from where to
# where (characters of the text, samples at the model's rate).
PARENT_ID, PIECE, PIECE_START, PIECE_STOP = "parent_id", "piece", "piece_start", "piece_stop"
# The text of a chunk.
PIECE_TEXT = "piece_text"
# The cause of a row whose id another row has: the one rejection whose id is also embedded.
DUPLICATE = "duplicate id"
TWIN = "another row of the source has the same id"
# The cause of a row that ends the process which reads or prepares it.
KILLS = "ends its process"
# How much the model saw of a row: its tokens, patches or samples; and whether that is not all.
NUM_UNITS, TRUNCATED = "num_units", "truncated"
# What no carried column may be called.
RESERVED = (*OWN_COLUMNS, DEFAULT)
_BOOKKEEPING = (
    pa.field(CARRIED, pa.int64()),
    pa.field(STAGE, pa.string()),
    pa.field(ERROR, pa.string()),
    pa.field(MESSAGE, pa.string()),
    pa.field(HIDES, pa.int8()),
    pa.field(COPIED, pa.bool_()),
    pa.field(SHARD, pa.int32()),
    pa.field(TOTAL, pa.int64()),
    pa.field(SKIPPED, pa.int64()),
    pa.field(CHANGED, pa.int64()),
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
    carried: pa.Schema,
    vectors: Iterable[pa.Field],
    pieces_are_rows: bool = False,
    keeps_text: bool = False,
) -> pa.Schema:
    """The schema of the committed table: ids, columns of vectors, counts, then the carried."""
    pieces = [
        pa.field(PARENT_ID, pa.string(), nullable=False),
        pa.field(PIECE, pa.int32(), nullable=False),
        pa.field(PIECE_START, pa.int64(), nullable=False),
        pa.field(PIECE_STOP, pa.int64(), nullable=False),
        *([pa.field(PIECE_TEXT, pa.string(), nullable=False)] if keeps_text else []),
    ]
    return pa.schema(
        [
            pa.field(ROW_ID, pa.string(), nullable=False),
            *(pieces if pieces_are_rows else []),
            pa.field(CONTENT_HASH, pa.string(), nullable=False),
            *(field.with_nullable(False) for field in vectors),
            pa.field(NUM_UNITS, pa.int32(), nullable=False),
            pa.field(TRUNCATED, pa.bool_(), nullable=False),
            *carried,
        ]
    )


def accepted(rows: pa.Table) -> npt.NDArray[np.bool_]:
    """True for each row that the model sees, shape (rows,): none that is rejected, a marker or a
    copy.
    """
    good = [np.asarray(rows[name].is_null()) for name in (STAGE, TOTAL, COPIED)]
    return np.asarray(good[0] & good[1] & good[2], dtype=np.bool_)


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


def clean_message(message: str) -> str:
    """A message fit to be stored: no secret of a URL, and not the whole row that it quotes."""
    return scrub(message)[:_MAX_MESSAGE]
