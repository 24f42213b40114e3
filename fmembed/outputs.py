"""Pooled states to columns of the table: pieces joined, cut, normalised, quantised. No torch.

Legend: P pieces (chunks of a text, windows of a sound), R rows, L tokens, D dimensions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fmembed.checkpoint import Output
from fmembed.rows import COUNTS, accepted, reject

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
# Row position -> (error, message).
Causes = dict[int, tuple[str, str]]
# Column -> (lowest, highest) of each dimension, from a sample; what int8 is a fraction of.
Ranges = Mapping[str, tuple[Floats, Floats]]

_TYPES = {
    "float32": pa.float32(),
    "float16": pa.float16(),
    "int8": pa.int8(),
    "binary": pa.int8(),
}
_STEPS = 255
_TRAVELLED = ("model_input", "input_dtype", "input_shapes")
_OF_PIECES = ("piece_units", "piece_spans")


@dataclass(frozen=True)
class Piece:
    """What the model takes at once: a text or a chunk of one, a picture, a sound or a window of it.

    `values` are token ids, shape (tokens,); pixels, (channels, height, width); samples, (samples,),
    int16 or float32; or a spectrogram. `num_units` counts tokens, patches, or samples before any
    padding that the extractor adds.
    """

    values: npt.NDArray[Any]
    num_units: int


class Stage:
    """Rows to pieces, and the pieces' vectors back to rows, whatever does the embedding."""

    def __init__(
        self,
        outputs: Sequence[Output],
        dims: Mapping[str, int],
        ranges: Ranges,
        pieces_are_rows: bool,
    ) -> None:
        self._outputs = outputs
        self._dims = {o.column: stored_dim(o, dims[o.column]) for o in outputs}
        self._ranges = ranges
        self._pieces_are_rows = pieces_are_rows

    def run(
        self,
        rows: pa.Table,
        embed: Callable[[Sequence[Piece]], tuple[dict[str, list[Any]], Causes]],
        counts: Callable[[], dict[str, int]],
    ) -> pa.Table:
        """Embed a window of rows; a row is rejected if one of its pieces is."""
        good = np.flatnonzero(accepted(rows))
        pieces, num_pieces = _unpack(rows, good)
        input_bytes = rows["model_input"].nbytes
        vectors, causes = embed(pieces)
        owner = np.repeat(good, num_pieces)
        by_row = {int(owner[i]): cause for i, cause in reversed(causes.items())}
        starts = np.cumsum(num_pieces) - num_pieces
        weights = np.array([p.num_units for p in pieces], dtype=np.float32)
        joined: dict[str, list[Any]] = {o.column: [None] * rows.num_rows for o in self._outputs}
        for k, i in enumerate(good.tolist()):
            own = slice(int(starts[k]), int(starts[k] + num_pieces[k]))
            for output in self._outputs if i not in by_row else ():
                found = self._join(output, vectors[output.column][own], weights[own])
                if not all(np.isfinite(piece).all() for piece in found):
                    by_row[i] = ("not finite", f"{output.column}: beyond the range of float16")
                joined[output.column][i] = found
        rows = reject(rows, "embed", by_row)
        columns = {
            o.column: self._column(
                o, [None if i in by_row else v for i, v in enumerate(joined[o.column])]
            )
            for o in self._outputs
        }
        dropped = _TRAVELLED if self._pieces_are_rows else (*_TRAVELLED, *_OF_PIECES)
        rows = rows.drop_columns(list(dropped))
        for name, column in columns.items():
            rows = rows.append_column(name, column)
        said = json.dumps({**counts(), "input_bytes": input_bytes, "input_rows": len(good)})
        first = [said, *[None] * (rows.num_rows - 1)][: rows.num_rows]
        return rows.append_column(COUNTS, pa.array(first, pa.string()))

    def _join(self, output: Output, vectors: list[Any], weights: Floats) -> Any:
        if output.pooling == "tokens":
            pieces = [finish(output, v, self._ranges) for v in vectors]
            return pieces if self._pieces_are_rows else np.concatenate(pieces)
        stacked = np.stack(vectors)
        if not self._pieces_are_rows:
            stacked = average(stacked, weights, np.array([len(stacked)]))
        found = finish(output, stacked, self._ranges)
        return found if self._pieces_are_rows else found[0]

    def _column(self, output: Output, per_row: list[Any]) -> pa.Array:
        depth = int(output.pooling == "tokens") + int(self._pieces_are_rows)
        return to_column(output, per_row, self._dims[output.column], depth)


def _unpack(rows: pa.Table, positions: Ints) -> tuple[list[Piece], Ints]:
    """The pieces of some rows, as views into the column, and how many each row has."""
    chosen = rows.take(pa.array(positions))
    pieces: list[Piece] = []
    counts = []
    for content, dtype, shapes, units in zip(
        chosen["model_input"],
        chosen["input_dtype"].to_pylist(),
        chosen["input_shapes"].to_pylist(),
        chosen["piece_units"].to_pylist(),
        strict=True,
    ):
        values: npt.NDArray[Any] = np.frombuffer(content.as_buffer(), dtype=dtype)
        start = 0
        for shape, num_units in zip(shapes, units, strict=True):
            stop = start + int(np.prod(shape))
            pieces.append(Piece(values[start:stop].reshape(shape), num_units))
            start = stop
        counts.append(len(shapes))
    return pieces, np.array(counts, dtype=np.int64)


def average(vectors_PD: Floats, weights_P: Floats, counts_R: npt.NDArray[np.int64]) -> Floats:
    """Average the vectors of each row's pieces, weighted; shape (rows, dim).

    Weighted by their units, the mean over a sound's windows is the mean over all its frames.
    """
    starts = np.concatenate([[0], np.cumsum(counts_R)[:-1]]).astype(np.int64)
    if len(vectors_PD) == len(counts_R):
        return vectors_PD
    weighted = np.add.reduceat(vectors_PD * weights_P[:, None], starts, axis=0)
    totals = np.add.reduceat(weights_P, starts)
    return np.asarray(weighted / totals[:, None], dtype=np.float32)


def finish(output: Output, vectors: Floats, ranges: Ranges) -> npt.NDArray[Any]:
    """Cut to the first dims, then normalise, then quantise; shape (rows, stored dim).

    Normalised after the cut, because a piece of a unit vector is none.

    Args:
        output: What is asked for.
        vectors: Shape (rows, dim).
        ranges: For int8, by column.
    """
    if output.dims is not None:
        vectors = vectors[:, : output.dims]
    if output.normalize:
        norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
        vectors = (vectors / np.maximum(norms, 1e-12)).astype(np.float32)
    if output.precision == "float16":
        with np.errstate(over="ignore"):  # infinity, and so a rejected row
            return np.asarray(vectors.astype(np.float16))
    if output.precision == "int8":
        low, high = ranges[output.column]
        steps = np.maximum(high - low, 1e-12) / _STEPS
        # Beyond the sample's range the nearest end; without the clip it would wrap around.
        scaled = np.clip(np.round((vectors - low) / steps - 128), -128, 127)
        return np.asarray(scaled.astype(np.int8))
    if output.precision == "binary":
        # As sentence-transformers stores bits: the unsigned byte less 128.
        return np.asarray((np.packbits(vectors > 0, axis=1) ^ 0x80).view(np.int8))
    return vectors


def dequantize(stored: npt.NDArray[Any], column: str, precision: str, ranges: Ranges) -> Floats:
    """What probes work on: int8 as the values they stand for, bits as -1 and 1.

    Args:
        stored: Shape (rows, stored dim), as in the table.
        column: Which column.
        precision: Of that column.
        ranges: For int8.
    """
    if precision == "binary":
        unsigned: npt.NDArray[np.uint8] = np.ascontiguousarray(stored).view(np.uint8)
        bits = np.unpackbits(unsigned ^ np.uint8(0x80), axis=1)
        return np.asarray(bits, dtype=np.float32) * 2 - 1
    if precision == "int8":
        low, high = ranges[column]
        return np.asarray((stored.astype(np.float32) + 128) * ((high - low) / _STEPS) + low)
    return stored.astype(np.float32)


def stored_dim(output: Output, dim: int) -> int:
    """Length of a stored vector, given the model's own."""
    dim = min(output.dims or dim, dim)
    return -(-dim // 8) if output.precision == "binary" else dim


def to_column(output: Output, rows: Sequence[Any], dim: int, depth: int) -> pa.Array:
    """Each row's vector, or vectors, as Arrow.

    Args:
        output: What is asked for.
        rows: For each row None (rejected), else a vector, shape (stored dim,); at depth 1 its
            tokens' or its pieces' vectors, at depth 2 its pieces' tokens' vectors.
        dim: The stored dim.
        depth: How many lists are around a vector.

    Returns:
        `fixed_size_list<float32|float16|int8>[dim]`, in as many lists as depth says.
    """
    missing = pa.array([r is None for r in rows], pa.bool_())
    if depth:
        given = [[] if r is None else r for r in rows]
        inner = to_column(output, [v for r in given for v in r], dim, depth - 1)
        offsets = np.concatenate([[0], np.cumsum([len(r) for r in given])])
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), inner, mask=missing)
    type_ = _TYPES[output.precision]
    full = np.zeros((len(rows), dim), dtype=type_.to_pandas_dtype())
    for i, row in enumerate(rows):
        if row is not None:
            full[i] = row
    return pa.FixedSizeListArray.from_arrays(pa.array(full.reshape(-1)), dim, mask=missing)


def measure_ranges(vectors: Mapping[str, Floats]) -> Ranges:
    """Lowest and highest of each dimension in a sample, as sentence-transformers has them."""
    return {c: (v.min(axis=0), v.max(axis=0)) for c, v in vectors.items() if len(v)}


def ranges_to_json(ranges: Ranges) -> str:
    """For the table's metadata."""
    return json.dumps({c: [low.tolist(), high.tolist()] for c, (low, high) in ranges.items()})


def ranges_from_json(text: str) -> Ranges:
    """From the table's metadata."""
    return {
        c: (np.array(low, np.float32), np.array(high, np.float32))
        for c, (low, high) in json.loads(text).items()
    }
