"""Pooled states to columns of the table: pieces joined, cut, normalised, quantised. No torch.

Legend: P pieces (chunks of a text, windows of a sound), R rows, L tokens, D dimensions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fmembed.checkpoint import Output
from fmembed.rows import accepted, reject, sum_counts, with_counts

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
# Row position -> (error, message).
Causes = dict[int, tuple[str, str]]
# Column -> (lowest, highest) of each dimension, from a sample; what int8 is a fraction of.
Ranges = Mapping[str, tuple[Floats, Floats]]

# Column -> vectors of the pieces: shape (pieces, dim), for `tokens` a list of (tokens, dim). What
# stands there for a piece that has a cause means nothing.
Vectors = dict[str, Any]

_ITEMSIZE = {name: np.dtype(name).itemsize for name in ("uint8", "int16", "int32", "float32")}
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
        self._raw_dims = dims
        self._ranges = ranges
        self._pieces_are_rows = pieces_are_rows

    def run(
        self,
        rows: pa.Table,
        embed: Callable[[Sequence[Piece]], tuple[Vectors, Causes]],
        counts: Callable[[], dict[str, Any]],
    ) -> pa.Table:
        """Embed a window of rows; a row is rejected if one of its pieces is."""
        good = np.flatnonzero(accepted(rows))
        pieces, num_pieces = _unpack(rows, good)
        input_bytes = rows["model_input"].nbytes
        vectors, causes = embed(pieces)
        owner_P = np.repeat(np.arange(len(good)), num_pieces)
        bad = {int(owner_P[i]): cause for i, cause in reversed(causes.items())}
        weights_P = np.fromiter((p.num_units for p in pieces), np.float32, len(pieces))
        joined: dict[str, _Column] = {}
        for output in self._outputs:
            joined[output.column] = column = self._join(
                output, vectors[output.column], causes, weights_P, num_pieces
            )
            # The encoder has looked for NaN and infinity; what is new comes of narrowing.
            for i in column.not_finite() if output.precision == "float16" else ():
                cause = ("not finite", f"{output.column}: beyond the range of float16")
                bad.setdefault(i, cause)
        rows = reject(rows, "embed", {int(good[i]): cause for i, cause in bad.items()})
        dropped = _TRAVELLED if self._pieces_are_rows else (*_TRAVELLED, *_OF_PIECES)
        rows = rows.drop_columns(list(dropped))
        kept = np.ones(len(good), dtype=np.bool_)
        kept[list(bad)] = False
        for name, column in joined.items():
            rows = rows.append_column(name, column.to_arrow(kept, good[kept], rows.num_rows))
        own = {**counts(), "input_bytes": input_bytes, "input_rows": len(good)}
        return with_counts(rows, {**sum_counts(rows), **own})

    def _join(
        self,
        output: Output,
        vectors: Floats | list[Floats | None],
        causes: Causes,
        weights_P: Floats,
        num_pieces: Ints,
    ) -> _Column:
        counts = [num_pieces] if self._pieces_are_rows else []
        if isinstance(vectors, list):  # tokens
            dim = self._raw_dims[output.column]
            none = np.zeros((0, dim), np.float32)
            values = [none if v is None or i in causes else v for i, v in enumerate(vectors)]
            num_tokens = np.array([len(v) for v in values], dtype=np.int64)
            if self._pieces_are_rows:
                counts.append(num_tokens)
            else:
                ends = np.cumsum(num_pieces)
                sums = np.concatenate([[0], np.cumsum(num_tokens)])
                counts = [sums[ends] - sums[ends - num_pieces]]
            stacked = np.concatenate(values) if values else none
        else:
            stacked = vectors
            stacked[list(causes)] = 0
            if not self._pieces_are_rows:
                stacked = average(stacked, weights_P, num_pieces)
        return _Column(finish(output, stacked, self._ranges), counts)


@dataclass(frozen=True)
class _Column:
    """Vectors of some rows, shape (vectors, stored dim), and how many each row, each piece has.

    `counts` goes from rows inwards; empty where each row has one vector.
    """

    values: npt.NDArray[Any]
    counts: list[Ints]

    def not_finite(self) -> list[int]:
        """Rows with a vector that has NaN or infinity."""
        at = np.flatnonzero(~np.isfinite(self.values).all(axis=1))
        for counts in reversed(self.counts):
            at = np.repeat(np.arange(len(counts)), counts)[at]
        return [int(i) for i in np.unique(at)]

    def to_arrow(self, kept: npt.NDArray[np.bool_], positions: Ints, num_rows: int) -> pa.Array:
        """Scatter the kept rows into a column of `num_rows`, null elsewhere.

        Returns:
            `fixed_size_list<float32|float16|int8>[dim]`, in as many lists as there are counts.
        """
        values, dim = self.values, self.values.shape[1]
        missing = np.ones(num_rows, dtype=np.bool_)
        missing[positions] = False
        if not self.counts:
            if len(positions) != num_rows:
                full = np.zeros((num_rows, dim), dtype=values.dtype)
                full[positions] = values[kept]
                values = full
            # Arrow keeps the numpy buffer: nothing is copied.
            flat = pa.array(np.ascontiguousarray(values).reshape(-1))
            mask = pa.array(missing) if missing.any() else None
            return pa.FixedSizeListArray.from_arrays(flat, dim, mask=mask)
        inner_counts = []
        for i, counts in enumerate(self.counts):
            own = counts[kept]
            if i == 0:
                outer = np.zeros(num_rows, dtype=np.int64)
                outer[positions] = own
                own = outer
            inner_counts.append(own)
            kept = np.repeat(kept, counts)
        flat = pa.array(np.ascontiguousarray(values[kept]).reshape(-1))
        column = pa.FixedSizeListArray.from_arrays(flat, dim)
        for i, counts in reversed(list(enumerate(inner_counts))):
            offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
            mask = pa.array(missing) if i == 0 else None
            column = pa.ListArray.from_arrays(offsets, column, mask=mask)
        return column


def _unpack(rows: pa.Table, positions: Ints) -> tuple[list[Piece], Ints]:
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
        # Summed in float64 without a copy of that size.
        squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
        scale = 1 / np.maximum(np.sqrt(squares), 1e-12)
        vectors = vectors * scale.astype(np.float32)[:, None]
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


def delta_field(output: Output) -> pa.Field:
    """A column of vectors as a table's log describes it, before a vector is made."""
    value = {"float32": pa.float32(), "float16": pa.float16()}.get(output.precision, pa.int8())
    vector = pa.list_(value)
    return pa.field(output.column, pa.list_(vector) if output.pooling == "tokens" else vector)


def measure_ranges(vectors: Mapping[str, Floats]) -> Ranges:
    """Lowest and highest of each dimension in a sample, as sentence-transformers has them."""
    return {c: (v.min(axis=0), v.max(axis=0)) for c, v in vectors.items() if len(v)}


def ranges_to_lists(ranges: Ranges) -> dict[str, tuple[list[float], list[float]]]:
    """For the table's card."""
    return {c: (low.tolist(), high.tolist()) for c, (low, high) in ranges.items()}


def ranges_from_lists(lists: Mapping[str, tuple[list[float], list[float]]]) -> Ranges:
    """From the table's card."""
    return {
        c: (np.array(low, np.float32), np.array(high, np.float32))
        for c, (low, high) in lists.items()
    }
