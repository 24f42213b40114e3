"""Pooled states to columns of the table: pieces joined, cut, normalised, quantised. No torch.

Legend: P pieces (chunks of a text, windows of a sound), R rows, L tokens, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fmembed.arrays import Floats, Ints
from fmembed.errors import ModelError
from fmembed.rows.columns import reject
from fmembed.rows.outputs import Output
from fmembed.rows.pieces import INPUT_COLUMNS, PIECE_COLUMNS, Pieces
from fmembed.rows.precision import PRECISIONS, Ranges, finish

# Position of a piece -> (error, message).
Causes = dict[int, tuple[str, str]]
# Column -> vectors of the pieces: shape (pieces, dim), for `tokens` a list of (tokens, dim). What
# stands there for a piece that has a cause means nothing.
Vectors = dict[str, Any]


@dataclass(frozen=True)
class VectorColumns:
    """The columns that vectors become, whatever made the vectors.

    `dims` is the length of the model's vectors by column, before they are cut or quantised;
    `ranges` is for columns whose precision needs them. With `pieces_are_rows` a row has a list with
    a vector for each of its pieces, without it their average.
    """

    outputs: Sequence[Output]
    dims: Mapping[str, int]
    ranges: Ranges
    pieces_are_rows: bool

    def __post_init__(self) -> None:
        """Refuse to keep more dimensions than there are.

        Raises:
            ModelError: A column asks for more.
        """
        for output in self.outputs:
            most = self.dims[output.column]
            if output.dims is not None and output.dims > most:
                raise ModelError(
                    f"model.dims: takes at most {most} with this model, got {output.dims} for the "
                    f"column {output.column} (or its checkpoint says so, as truncate_dim)"
                )

    def join(self, rows: pa.Table, pieces: Pieces, vectors: Vectors, causes: Causes) -> pa.Table:
        """Put a column for each output in the place of what the model took.

        Args:
            rows: As `unpack_pieces` had them.
            pieces: What it made of them.
            vectors: Of these pieces, by column.
            causes: Why a piece has none, by its position; its row is then rejected.
        """
        good, num_pieces = pieces.positions, pieces.num_pieces
        owner_P = np.repeat(np.arange(len(good)), num_pieces)
        bad = {int(owner_P[i]): cause for i, cause in reversed(causes.items())}
        units = (piece.num_units for piece in pieces.pieces)
        weights_P = np.fromiter(units, np.float32, len(pieces.pieces))
        joined: dict[str, _Column] = {}
        for output in self.outputs:
            joined[output.column] = column = self._join(
                output, vectors[output.column], causes, weights_P, num_pieces
            )
            # The model has looked for NaN and infinity; what is new comes of narrowing.
            narrows = PRECISIONS[output.precision].may_overflow
            for i in column.not_finite() if narrows else ():
                cause = ("not finite", f"{output.column}: beyond the range of {output.precision}")
                bad.setdefault(i, cause)
        rows = reject(rows, "embed", {int(good[i]): cause for i, cause in bad.items()})
        dropped = INPUT_COLUMNS if self.pieces_are_rows else (*INPUT_COLUMNS, *PIECE_COLUMNS)
        rows = rows.drop_columns(list(dropped))
        kept = np.ones(len(good), dtype=np.bool_)
        kept[list(bad)] = False
        for name, column in joined.items():
            rows = rows.append_column(name, column.to_arrow(kept, good[kept], rows.num_rows))
        return rows

    def _join(
        self,
        output: Output,
        vectors: Floats | list[Floats | None],
        causes: Causes,
        weights_P: Floats,
        num_pieces: Ints,
    ) -> _Column:
        counts = [num_pieces] if self.pieces_are_rows else []
        if isinstance(vectors, list):  # tokens
            dim = self.dims[output.column]
            none = np.zeros((0, dim), np.float32)
            values = [none if v is None or i in causes else v for i, v in enumerate(vectors)]
            num_tokens = np.array([len(v) for v in values], dtype=np.int64)
            if self.pieces_are_rows:
                counts.append(num_tokens)
            else:
                ends = np.cumsum(num_pieces)
                sums = np.concatenate([[0], np.cumsum(num_tokens)])
                counts = [sums[ends] - sums[ends - num_pieces]]
            stacked = np.concatenate(values) if values else none
        else:
            stacked = vectors
            stacked[list(causes)] = 0
            if not self.pieces_are_rows:
                stacked = average(stacked, weights_P, num_pieces)
        return _Column(finish(output, stacked, self.ranges), counts)


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
            `fixed_size_list<number as stored>[stored dim]`, in as many lists as there are counts.
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


def vector_type(type_: pa.DataType) -> pa.FixedSizeListType | None:
    """The type of the vectors in a column of them, one a row or in lists (of pieces, of tokens);
    None where it holds none.
    """
    while pa.types.is_list(type_) or pa.types.is_large_list(type_):
        type_ = type_.value_type
    return type_ if pa.types.is_fixed_size_list(type_) else None


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
