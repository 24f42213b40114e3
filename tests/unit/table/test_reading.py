"""What a sample of a table is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tables import CARD, CONFIGURATION, IDENTITY, block, write

from fmembed.rows.columns import table_schema
from fmembed.table.reading import sample
from fmembed.table.table import Table


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pa.array(["t", "", " \t", None, "nan"]), ["t", "nan"]),
        (pa.array([1.5, float("nan"), None, 0.0, 2.0]), [1.5, 0.0, 2.0]),
        (pa.array([0, None, 1, 2, None]), [0, 1, 2]),
        (pa.array([True, False, None, None, None]), [True, False]),
    ],
)
def test_blank_labels_and_nan_are_none(
    labels: pa.Array, expected: list[Any], tmp_path: Path
) -> None:
    rows = block(list("abcde"))
    at = rows.schema.get_field_index("topic")
    rows = rows.set_column(at, pa.field("topic", labels.type), labels)
    table = Table.open_output(str(tmp_path / "t"), IDENTITY)
    vectors = [pa.field("embedding", pa.list_(pa.float32()))]
    table.claim(CARD, table_schema(pa.schema([("topic", labels.type)]), vectors), "run")
    table.known()
    written = write(table.uri, rows)
    assert written.part is not None
    table.rows.commit([written.part], written.schema, CONFIGURATION, ("run", 0))
    rows, num_unlabelled = sample(table.uri, ["topic"], 10, "topic")
    assert (rows["topic"].to_pylist(), num_unlabelled) == (expected, 5 - len(expected))
    rows, num_unlabelled = sample(table.uri, ["topic"], 10, None)
    assert (rows.num_rows, num_unlabelled) == (5, 0)
