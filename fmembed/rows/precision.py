"""How a number of a vector is stored: float32, float16, int8 by ranges, or a bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fmembed.arrays import Floats
from fmembed.rows.outputs import Output

# Column -> (lowest, highest) of each dimension, from a sample; what int8 is a fraction of.
Ranges = Mapping[str, tuple[Floats, Floats]]
_STEPS = 255


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
