"""What the model takes at once, and the columns in which prepare hands it to the model.

`pack_pieces` writes these columns and `unpack_pieces` reads them; nobody else knows how:

    model_input    large_binary       the values of a row's pieces, one after another; null for a
                                      rejected row, as are all but the last two
    input_dtype    string             their type, the narrowest that changes nothing: int32 for
                                      token ids, uint8 or float32 for pixels, int16 or float32 for
                                      samples, uint8 for the text that a server is sent
    input_shapes   list<list<int32>>  the shape of each piece
    piece_units    list<int32>        what the model sees of each piece: tokens (special ones
                                      included), patches, samples, or characters for a server
    piece_spans    list<list<int64>>  from where to where of the input each piece goes
    piece_texts    list<string>       the text of each, only where the table is to keep that
    num_units      int32              the sum of `piece_units`; 0 for a rejected row
    truncated      bool               whether the model does not see all of the input

The embed stage replaces the first three by vectors, and drops the next two unless the pieces are to
be rows of the table, as they are where there are texts; num_units and truncated go into the table.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fmembed.arrays import Ints
from fmembed.rows.columns import NUM_UNITS, TRUNCATED, accepted

MODEL_INPUT, INPUT_DTYPE, INPUT_SHAPES = "model_input", "input_dtype", "input_shapes"
PIECE_UNITS, PIECE_SPANS, PIECE_TEXTS = "piece_units", "piece_spans", "piece_texts"
INPUT_COLUMNS = (MODEL_INPUT, INPUT_DTYPE, INPUT_SHAPES)
PIECE_COLUMNS = (PIECE_UNITS, PIECE_SPANS)

# By type, because dtype.name takes 3 us.
_DTYPE_NAMES = {np.dtype(name): name for name in ("uint8", "int16", "int32", "float32")}
_ITEMSIZES = {name: dtype.itemsize for dtype, name in _DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Prepared:
    """What prepare makes of one row: of each piece the values, the units and the span; and of a
    chunk its text.
    """

    pieces: list[npt.NDArray[Any]]
    units: list[int]
    spans: list[tuple[int, int]]
    truncated: bool = False
    texts: list[str] | None = None


@dataclass(frozen=True)
class Refused:
    """Why an input cannot be prepared: `error` is a cause that rows share, `message` tells more.

    A value and no exception, which would keep the decoded input alive in its frames.
    """

    error: str
    message: str


@dataclass(frozen=True)
class Piece:
    """What the model takes at once: a text or a chunk of one, a picture, a sound or a window of it.

    `values` are token ids, shape (tokens,); pixels, (channels, height, width); samples, (samples,),
    int16 or float32; or a spectrogram. `num_units` counts tokens, patches, or samples before any
    padding that the extractor adds.
    """

    values: npt.NDArray[Any]
    num_units: int


@dataclass(frozen=True)
class Pieces:
    """The pieces of a window of rows, those of one row side by side.

    `positions` says which rows have any, shape (rows with pieces,): those that are not rejected;
    `num_pieces` how many each of these has; `num_bytes` is what all of them took to travel.
    """

    pieces: list[Piece]
    positions: Ints
    num_pieces: Ints
    num_bytes: int

    @property
    def counts(self) -> dict[str, float]:
        """What the embed stage adds to its counts of them."""
        return {"input_bytes": self.num_bytes, "input_rows": len(self.positions)}


def pack_pieces(
    rows: pa.Table, prepared: Sequence[Prepared | None], with_texts: bool = False
) -> pa.Table:
    """Append the columns above.

    Args:
        rows: Rows of any columns.
        prepared: What was made of each row; None for those that have no pieces.
        with_texts: Whether the text of each piece goes along.
    """

    def column(take: Callable[[Prepared], Any], type_: pa.DataType) -> pa.Array:
        return pa.array([take(p) if p else None for p in prepared], type_)

    columns = {
        MODEL_INPUT: column(lambda p: b"".join(v.tobytes() for v in p.pieces), pa.large_binary()),
        INPUT_DTYPE: column(lambda p: _DTYPE_NAMES[p.pieces[0].dtype], pa.string()),
        INPUT_SHAPES: column(lambda p: [v.shape for v in p.pieces], pa.list_(pa.list_(pa.int32()))),
        PIECE_UNITS: column(lambda p: p.units, pa.list_(pa.int32())),
        PIECE_SPANS: column(lambda p: p.spans, pa.list_(pa.list_(pa.int64()))),
        NUM_UNITS: column(lambda p: sum(p.units), pa.int32()).fill_null(0),
        TRUNCATED: column(lambda p: p.truncated, pa.bool_()).fill_null(False),
    }
    if with_texts:
        columns[PIECE_TEXTS] = column(lambda p: p.texts, pa.list_(pa.string()))
    for name, values in columns.items():
        rows = rows.append_column(name, values)
    return rows


def unpack_pieces(rows: pa.Table) -> Pieces:
    """The pieces of the rows that are not rejected, as views into the column."""
    positions = np.flatnonzero(accepted(rows))
    num_bytes = rows[MODEL_INPUT].nbytes
    chosen = rows.take(pa.array(positions)) if len(positions) != rows.num_rows else rows
    if not chosen.num_rows:
        return Pieces([], positions, np.zeros(0, dtype=np.int64), num_bytes)
    inputs = _whole(chosen[MODEL_INPUT])
    shapes = _whole(chosen[INPUT_SHAPES])
    num_pieces = np.asarray(shapes.value_lengths(), dtype=np.int64)
    flat = shapes.flatten()
    # All inputs of a checkpoint have the same number of axes.
    shapes_PN = np.asarray(flat.flatten()).reshape(len(flat), -1)
    sizes_P = shapes_PN.prod(axis=1, dtype=np.int64)
    dtypes = chosen[INPUT_DTYPE].to_pylist()
    units = np.asarray(_whole(chosen[PIECE_UNITS]).flatten()).tolist()
    _, offsets, content = inputs.buffers()
    starts = np.frombuffer(offsets, np.int64)[inputs.offset : inputs.offset + len(inputs)]
    pieces = []
    by_row = zip(starts.tolist(), dtypes, num_pieces.tolist(), strict=True)
    by_piece = zip(shapes_PN.tolist(), sizes_P.tolist(), units, strict=True)
    for start, dtype, count in by_row:
        itemsize = _ITEMSIZES[dtype]
        for shape, size, num_units in itertools.islice(by_piece, count):
            values = np.frombuffer(content, dtype, size, start)
            pieces.append(Piece(values if len(shape) == 1 else values.reshape(shape), num_units))
            start += size * itemsize
    return Pieces(pieces, positions, num_pieces, num_bytes)


def _whole(column: pa.ChunkedArray) -> Any:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
