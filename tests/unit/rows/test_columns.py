from __future__ import annotations

import pyarrow as pa
import pytest

from fmembed.errors import SourceError, SpecError
from fmembed.rows.columns import RESERVED, table_schema
from fmembed.rows.ids import RowIds, keys_of
from fmembed.rows.pieces import INPUT_COLUMNS, PIECE_COLUMNS
from fmembed.sources.opening import open_source
from fmembed.spec import OWN_COLUMNS, RunSpec, SourceSpec


def test_the_names_that_are_reserved_are_those_that_rows_have() -> None:
    table = table_schema(pa.schema([]), [], pieces_are_rows=True).names
    assert set(OWN_COLUMNS) == {*table, *INPUT_COLUMNS, *PIECE_COLUMNS}
    assert len(OWN_COLUMNS) == len(set(OWN_COLUMNS))


@pytest.mark.parametrize("name", [*OWN_COLUMNS, "_counts", "_shard"])
def test_no_column_of_vectors_has_a_reserved_name(name: str) -> None:
    raw = {"source": {"uri": "a"}, "output": {"uri": "c"}, "preprocess": {"chunk_tokens": 64}}
    with pytest.raises(SpecError, match=rf"model\.outputs: '{name}' cannot name a column"):
        RunSpec.parse({**raw, "model": {"id": "b", "outputs": {name: {}}}})


@pytest.mark.parametrize("name", [*RESERVED, "_counts", "_shard"])
def test_no_carried_column_has_a_reserved_name(name: str) -> None:
    for column in ({"carry": (name,)}, {"label": name}, {"split": name}, {"caption": name}):
        with pytest.raises(SourceError, match=rf"source\.carry: '{name}' is a name of the table"):
            open_source(SourceSpec(uri="no such file", **column))


def test_row_ids_answer_as_a_set_does() -> None:
    ids, reference = RowIds(), set()
    for start in range(0, 3000, 7):
        names = [f"row-{i}" for i in range(start, start + 5)]
        new = [n for n in names if n not in reference]
        ids.add(keys_of(new))
        reference |= set(new)
    asked = [f"row-{i}" for i in range(4000)]
    assert ids.contains(keys_of(asked)).tolist() == [n in reference for n in asked]
    assert len(ids) == len(reference)


def test_empty() -> None:
    assert RowIds().contains(keys_of(["a"])).tolist() == [False]


def test_a_row_id_takes_16_bytes() -> None:
    ids = RowIds()
    for start in range(0, 10_000, 100):
        ids.add(keys_of(f"doc-{i}" for i in range(start, start + 100)))
    assert ids.nbytes == 16 * len(ids) == 160_000
    assert ids.contains(keys_of(["doc-0", "doc-9999", "doc-10000"])).tolist() == [True, True, False]
