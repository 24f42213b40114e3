"""What prepare packs is what the model unpacks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fmembed.rows.columns import reject, row_schema
from fmembed.rows.pieces import (
    INPUT_COLUMNS,
    MODEL_INPUT,
    PIECE_COLUMNS,
    Prepared,
    pack_pieces,
    unpack_pieces,
)


def rows(num_rows: int, bad: tuple[int, ...] = ()) -> pa.Table:
    table = pa.Table.from_pylist(
        [{"row_id": str(i), "_input": "x"} for i in range(num_rows)], row_schema(pa.schema([]))
    )
    return reject(table, "preprocess", dict.fromkeys(bad, ("bad", "because")))


def random(shape: tuple[int, ...], dtype: str) -> Any:
    return np.random.default_rng(0).integers(0, 99, shape).astype(dtype)


@pytest.mark.parametrize(
    ("shapes", "dtype"),
    [
        ([[(3,)], [(7,), (2,)], [(1,)]], "int32"),
        ([[(3, 8, 8)], [(3, 8, 9)], [(3, 4, 4)]], "uint8"),
        ([[(5,)], [(9,)], [(2,), (2,), (3,)]], "int16"),
        ([[(2, 5)], [(2, 7)], [(1, 1)]], "float32"),
    ],
)
@pytest.mark.parametrize("bad", [(), (1,), (0, 3)])
def test_pieces_come_out_as_they_went_in(shapes: Any, dtype: str, bad: tuple[int, ...]) -> None:
    made = [[random(shape, dtype) for shape in of_row] for of_row in shapes]
    units = [[v.size for v in of_row] for of_row in made]
    prepared: list[Any] = [
        Prepared(v, u, [(0, n) for n in u]) for v, u in zip(made, units, strict=True)
    ]
    for i in bad:
        prepared.insert(i, None)
    packed = pack_pieces(rows(len(prepared), bad), prepared)
    assert packed["num_units"].to_pylist() == [sum(p.units) if p else 0 for p in prepared]
    # As Ray cuts blocks, and as it joins them.
    for window in (packed, pa.concat_tables([packed[:2], packed[2:]]), packed[1:]):
        skipped = packed.num_rows - window.num_rows
        kept = [p for p in prepared[skipped:] if p]
        found = unpack_pieces(window)
        assert found.num_pieces.tolist() == [len(p.pieces) for p in kept]
        assert found.positions.tolist() == [i for i, p in enumerate(prepared[skipped:]) if p]
        flat = [value for p in kept for value in p.pieces]
        for piece, value in zip(found.pieces, flat, strict=True):
            assert (piece.values.dtype, piece.num_units) == (value.dtype, value.size)
            np.testing.assert_array_equal(piece.values, value)


def test_a_window_without_a_good_row_has_no_piece() -> None:
    packed = pack_pieces(rows(2, (0, 1)), [None, None])
    assert packed[MODEL_INPUT].null_count == 2
    found = unpack_pieces(packed)
    assert (found.pieces, len(found.positions), len(found.num_pieces)) == ([], 0, 0)


def test_all_columns_of_the_way_are_named() -> None:
    before = rows(1)
    packed = pack_pieces(before, [None])
    added = packed.schema.names[before.num_columns :]
    assert added == [*INPUT_COLUMNS, *PIECE_COLUMNS, "num_units", "truncated"]
