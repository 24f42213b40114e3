"""How the numbers of a vector are stored: one `Precision` each, and vectors by it.

All that the project knows of a precision is here, but for its word in `spec.Precision`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fmembed.arrays import Floats
from fmembed.rows.outputs import Output

# Lowest and highest of each dimension, from a sample: what int8 is a fraction of.
Range = tuple[Floats, Floats]
# By column.
Ranges = Mapping[str, Range]
_STEPS = 255


@dataclass(frozen=True)
class Precision:
    """How the numbers of a column of vectors are stored.

    Attributes:
        arrow: The type of a stored number in the table's files.
        delta: The same in the table's log: `arrow`, or what stands for it where Delta Lake has no
            such type.
        write: From vectors, float32, shape (rows, dim), to what is stored, shape (rows, stored
            dim). The second argument is the column's range, None unless `needs_ranges`.
        read: Back to float32, shape (rows, dim), for the probes; `dim` rounded up to whole numbers.
        dims_each: How many dimensions one stored number holds.
        needs_ranges: Whether the first run measures the column's range, which the table then keeps.
        may_overflow: Whether a finite float32 may be stored as infinity; such a row is rejected.
        has_norms: Whether `verify` can check the length of what `read` gives.
        for_tokens: Whether columns with a vector for each token may have it.
    """

    arrow: pa.DataType
    delta: pa.DataType
    write: Callable[[Floats, Range | None], npt.NDArray[Any]]
    read: Callable[[npt.NDArray[Any], Range | None], Floats]
    dims_each: int = 1
    needs_ranges: bool = False
    may_overflow: bool = False
    has_norms: bool = False
    for_tokens: bool = False

    def stored_dim(self, dim: int) -> int:
        """How many numbers are stored of a vector of so many dimensions."""
        return -(-dim // self.dims_each)


def _read_floats(stored: npt.NDArray[Any], _: Range | None) -> Floats:
    return stored.astype(np.float32)


def _write_float16(vectors: Floats, _: Range | None) -> npt.NDArray[Any]:
    with np.errstate(over="ignore"):  # infinity, and so a rejected row
        return np.asarray(vectors.astype(np.float16))


def _write_int8(vectors: Floats, range_: Range | None) -> npt.NDArray[Any]:
    assert range_ is not None
    low, high = range_
    steps = np.maximum(high - low, 1e-12) / _STEPS
    # Beyond the sample's range the nearest end; without the clip it would wrap around.
    scaled = np.clip(np.round((vectors - low) / steps - 128), -128, 127)
    return np.asarray(scaled.astype(np.int8))


def _read_int8(stored: npt.NDArray[Any], range_: Range | None) -> Floats:
    assert range_ is not None
    low, high = range_
    return np.asarray((stored.astype(np.float32) + 128) * ((high - low) / _STEPS) + low)


def _write_bits(vectors: Floats, _: Range | None) -> npt.NDArray[Any]:
    # As sentence-transformers stores bits: the unsigned byte less 128.
    return np.asarray((np.packbits(vectors > 0, axis=1) ^ 0x80).view(np.int8))


def _read_bits(stored: npt.NDArray[Any], _: Range | None) -> Floats:
    """Bits as -1 and 1."""
    unsigned: npt.NDArray[np.uint8] = np.ascontiguousarray(stored).view(np.uint8)
    bits = np.unpackbits(unsigned ^ np.uint8(0x80), axis=1)
    return np.asarray(bits, dtype=np.float32) * 2 - 1


PRECISIONS: dict[str, Precision] = {
    "float32": Precision(
        arrow=pa.float32(),
        delta=pa.float32(),
        write=lambda vectors, _: vectors,
        read=_read_floats,
        has_norms=True,
        for_tokens=True,
    ),
    "float16": Precision(
        arrow=pa.float16(),
        delta=pa.float32(),
        write=_write_float16,
        read=_read_floats,
        may_overflow=True,
        has_norms=True,
        for_tokens=True,
    ),
    "int8": Precision(
        arrow=pa.int8(),
        delta=pa.int8(),
        write=_write_int8,
        read=_read_int8,
        needs_ranges=True,
    ),
    "binary": Precision(
        arrow=pa.int8(),
        delta=pa.int8(),
        write=_write_bits,
        read=_read_bits,
        dims_each=8,
    ),
}


def finish(output: Output, vectors: Floats, ranges: Ranges) -> npt.NDArray[Any]:
    """Cut to the first dims, then normalise, then store; shape (rows, stored dim).

    Normalised after the cut, because a piece of a unit vector is none.

    Args:
        output: What is asked for.
        vectors: Shape (rows, dim), float32.
        ranges: By column, of those whose precision needs them.
    """
    if output.dims is not None:
        vectors = vectors[:, : output.dims]
    if output.normalize:
        # Summed in float64 without a copy of that size.
        squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
        scale = 1 / np.maximum(np.sqrt(squares), 1e-12)
        vectors = vectors * scale.astype(np.float32)[:, None]
    return PRECISIONS[output.precision].write(vectors, ranges.get(output.column))


def dequantize(stored: npt.NDArray[Any], column: str, precision: str, ranges: Ranges) -> Floats:
    """What probes work on, of what a column of the table holds.

    Args:
        stored: Shape (rows, stored dim), as in the table.
        column: Which column.
        precision: Of that column.
        ranges: By column, of those whose precision needs them.

    Returns:
        Shape (rows, dim), float32.
    """
    return PRECISIONS[precision].read(stored, ranges.get(column))


def delta_field(output: Output) -> pa.Field:
    """A column of vectors as a table's log describes it, before a vector is made."""
    vector = pa.list_(PRECISIONS[output.precision].delta)
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
