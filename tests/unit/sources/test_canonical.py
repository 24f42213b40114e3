"""The hash of what a row carries is that of the values, however they were written."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fmembed.rows.columns import CARRIED
from fmembed.sources.opening import open_source
from fmembed.sources.reading import read_here
from fmembed.spec import SourceSpec

NOON = datetime(2026, 11, 29, 12, tzinfo=UTC)


def hashes(path: Path) -> list[int | None]:
    source = open_source(SourceSpec(uri=str(path), carry=("kept",)))
    rows = pa.concat_tables(read_here(source))
    return list(rows.filter(rows["_total"].is_null())[CARRIED].to_pylist())


def hash_of(folder: Path, value: Any, type_: pa.DataType | None = None) -> int:
    path = folder / "x.parquet"
    pq.write_table(pa.table({"text": ["a"], "kept": pa.array([value], type_)}), path)
    (found,) = hashes(path)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, pa.int8()), (1, pa.int64())),
        (("a", pa.string()), ("a", pa.large_string())),
        ((0.5, pa.float16()), (0.5, pa.float64())),
        ((NOON, pa.timestamp("us", "UTC")),
         (NOON.astimezone(timezone(timedelta(hours=9))), pa.timestamp("ms", "Asia/Tokyo"))),
        (([1, 2], pa.list_(pa.int32())), ([1, 2], pa.list_(pa.int32(), 2))),
    ],
)  # fmt: skip
def test_of_the_same_value_it_is_the_same(one: Any, other: Any, tmp_path: Path) -> None:
    assert hash_of(tmp_path, *one) == hash_of(tmp_path, *other)


def test_of_other_values_it_is_another(tmp_path: Path) -> None:
    values: list[Any] = [
        None, "", "a", "1", 1, 1.5, True, float("nan"), b"a", Decimal("1.50"), date(2026, 1, 1),
        datetime(2026, 1, 1), NOON, [], ["a"], ["a", None], {"x": 1}, {"x": 2}, {"y": 1},
    ]  # fmt: skip
    found = [hash_of(tmp_path, value) for value in values]
    assert len(set(found)) == len(values)
    assert 0 not in found


def test_of_nested_values_the_order_of_names_is_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    rows = [{"text": "a", "kept": {"x": 1, "y": 2}}, {"text": "b", "kept": {"y": 2, "x": 1}}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, other = hashes(path)
    assert one == other


def test_without_a_column_and_of_a_bad_row_there_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a", "kept": 1}\n{"text": null, "kept": 1}\n')
    first, second = hashes(path)
    assert (first is None, second) == (False, None)
    rows = pa.concat_tables(read_here(open_source(SourceSpec(uri=str(path)))))
    assert rows[CARRIED].null_count == rows.num_rows


def test_it_is_what_it_was(tmp_path: Path) -> None:
    """Or all rows of all tables would be others from one version to the next."""
    assert hash_of(tmp_path, "a label") == -3692791628736648624
