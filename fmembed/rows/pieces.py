"""What the model takes at once, and the columns it travels in.

Whatever the modality, it travels as bytes in the narrowest type that changes nothing: `model_input`
(bytes), `input_dtype`, and `input_shapes`, one shape for each piece.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fmembed.arrays import Ints

_ITEMSIZE = {name: np.dtype(name).itemsize for name in ("uint8", "int16", "int32", "float32")}
INPUT_COLUMNS = ("model_input", "input_dtype", "input_shapes")
PIECE_COLUMNS = ("piece_units", "piece_spans")


@dataclass(frozen=True)
class Piece:
    """What the model takes at once: a text or a chunk of one, a picture, a sound or a window of it.

    `values` are token ids, shape (tokens,); pixels, (channels, height, width); samples, (samples,),
    int16 or float32; or a spectrogram. `num_units` counts tokens, patches, or samples before any
    padding that the extractor adds.
    """

    values: npt.NDArray[Any]
    num_units: int


def unpack(rows: pa.Table, positions: Ints) -> tuple[list[Piece], Ints]:
    """The pieces of some rows, as views into the column, and how many each row has."""
    chosen = rows.take(pa.array(positions)) if len(positions) != rows.num_rows else rows
    if not chosen.num_rows:
        return [], np.zeros(0, dtype=np.int64)
    inputs = _whole(chosen["model_input"])
    shapes = _whole(chosen["input_shapes"])
    num_pieces = np.asarray(shapes.value_lengths(), dtype=np.int64)
    flat = shapes.flatten()
    # A checkpoint's inputs have as many axes all.
    shapes_PN = np.asarray(flat.flatten()).reshape(len(flat), -1)
    sizes_P = shapes_PN.prod(axis=1, dtype=np.int64)
    dtypes = chosen["input_dtype"].to_pylist()
    units = np.asarray(_whole(chosen["piece_units"]).flatten()).tolist()
    _, offsets, content = inputs.buffers()
    starts = np.frombuffer(offsets, np.int64)[inputs.offset : inputs.offset + len(inputs)]
    pieces = []
    by_row = zip(starts.tolist(), dtypes, num_pieces.tolist(), strict=True)
    by_piece = zip(shapes_PN.tolist(), sizes_P.tolist(), units, strict=True)
    for start, dtype, count in by_row:
        itemsize = _ITEMSIZE[dtype]
        for shape, size, num_units in itertools.islice(by_piece, count):
            values = np.frombuffer(content, dtype, size, start)
            pieces.append(Piece(values if len(shape) == 1 else values.reshape(shape), num_units))
            start += size * itemsize
    return pieces, num_pieces


def _whole(column: pa.ChunkedArray) -> Any:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


# dtype.name takes 3 us.
DTYPE_NAMES = {np.dtype(name): name for name in ("uint8", "int16", "int32", "float32")}
SHAPES = pa.list_(pa.list_(pa.int32()))
SPANS = pa.list_(pa.list_(pa.int64()))


@dataclass(frozen=True)
class Prepared:
    pieces: list[npt.NDArray[Any]]
    units: list[int]
    spans: list[tuple[int, int]]
    truncated: bool = False

    def bytes(self) -> bytes:
        return b"".join(piece.tobytes() for piece in self.pieces)


@dataclass(frozen=True)
class BadInput:
    error: str
    message: str
