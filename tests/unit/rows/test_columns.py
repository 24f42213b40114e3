from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from fmembed.errors import SourceError, SpecError
from fmembed.rows.columns import RESERVED, table_schema
from fmembed.rows.ids import RowIds, contents_of, keys_of
from fmembed.rows.pieces import INPUT_COLUMNS, PIECE_COLUMNS, PIECE_TEXTS
from fmembed.sources.opening import open_source
from fmembed.spec import OWN_COLUMNS, RunSpec, SourceSpec


def test_the_names_that_are_reserved_are_those_that_rows_have() -> None:
    table = table_schema(pa.schema([]), [], pieces_are_rows=True, keeps_text=True).names
    assert set(OWN_COLUMNS) == {*table, *INPUT_COLUMNS, *PIECE_COLUMNS, PIECE_TEXTS}
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


def test_row_ids_answer_as_a_dictionary_does() -> None:
    ids, reference = RowIds(), {}
    for start in range(0, 3000, 7):
        names = [f"row-{i}" for i in range(start, start + 5)]
        new = {n: f"{start:032x}" if start % 2 else None for n in names if n not in reference}
        ids.add(keys_of(new), contents_of(new.values()))
        reference |= new
    assert len(ids) == len(reference)
    asked = [f"row-{i}" for i in range(4000)]
    keys = keys_of(asked)
    assert ids.contains(keys).tolist() == [n in reference for n in asked]
    # Rows read with the content they had, but each third with another, and some unreadable.
    now = [reference.get(n) if i % 3 else "ff" * 16 for i, n in enumerate(asked)]
    now = [None if i % 5 == 0 else c for i, c in enumerate(now)]
    known = [reference.get(n) for n in asked]
    is_changed = [k is not None and k != c for k, c in zip(known, now, strict=True)]
    assert 100 < sum(is_changed) < 2000
    assert ids.changed(keys, contents_of(now)).tolist() == is_changed
    # Of an id with several contents, none of which is the row's own.
    others = [None if i % 2 else c for i, c in enumerate(now)]
    ids.add(keys, contents_of(others))
    is_known = [n in reference for n in asked]
    is_changed = [
        o is not None and c != o and (not there or (k is not None and c != k))
        for there, k, o, c in zip(is_known, known, others, now, strict=True)
    ]
    assert ids.changed(keys, contents_of(now)).tolist() == is_changed


def test_empty() -> None:
    assert RowIds().contains(keys_of(["a"])).tolist() == [False]
    assert RowIds().changed(keys_of(["a"]), contents_of([None])).tolist() == [False]


def test_what_is_carried_is_compared_where_it_is_known() -> None:
    names = keys_of("abcd")
    ids = RowIds(names, contents_of(["ab" * 16] * 4), np.array([1, 2, 0, 4]))
    now = contents_of(["ab" * 16, "ab" * 16, "ab" * 16, "cd" * 16])
    changed = ids.changed(names, now, np.array([1, 3, 5, 4]))
    assert changed.tolist() == [False, True, False, True]
    assert ids.changed(names, now).tolist() == [False, False, False, True]
    ids.add(names, now, np.array([7, 3, 7, 7]))  # twins, of whom one is what the row is by now
    assert ids.changed(names, now, np.array([1, 3, 5, 4])).tolist() == [False, False, False, True]


def test_a_row_takes_40_bytes() -> None:
    ids = RowIds()
    for start in range(0, 10_000, 100):
        ids.add(keys_of(f"doc-{i}" for i in range(start, start + 100)))
    assert ids.nbytes == 40 * len(ids) == 400_000
    assert ids.contains(keys_of(["doc-0", "doc-9999", "doc-10000"])).tolist() == [True, True, False]
