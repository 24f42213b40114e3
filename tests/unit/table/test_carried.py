"""Carried columns of every type that is stored, as other programs read them."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from tables import CARD, DIM, IDENTITY, VECTORS

from fmembed.errors import TableError
from fmembed.rows.columns import CARRIED, table_schema
from fmembed.sources.opening import open_source
from fmembed.sources.reading import read_here
from fmembed.spec import SourceSpec
from fmembed.table.card import Card
from fmembed.table.output import carried_types, check_columns
from fmembed.table.parts import write_part
from fmembed.table.reading import read
from fmembed.table.table import Table

GIVEN: dict[str, pa.Array] = {
    "flag": pa.array([True, None]),
    "small": pa.array([7, None], pa.uint8()),
    "big": pa.array([2**63 - 1, -(2**63)]),
    "half": pa.array([0.5, None], pa.float16()),
    "number": pa.array([0.1, float("inf")]),
    "price": pa.array([Decimal("1.50"), None], pa.decimal128(38, 2)),
    "day": pa.array([dt.date(1, 1, 1), dt.date(9999, 12, 31)]),
    "when": pa.array([dt.datetime(2024, 5, 1, 12), None], pa.timestamp("ns")),
    "zoned": pa.array([0, 2**40], pa.timestamp("us", "US/Eastern")),
    "key": pa.array([uuid.UUID(int=5).bytes, None], pa.uuid()),
    "view": pa.array(["été", ""], pa.string_view()),
    "raw": pa.array([b"\xff\0", b""], pa.large_binary()),
    "kind": pa.array(["a", None]).dictionary_encode(),
    "tags": pa.array([["a"], []], pa.large_list(pa.string())),
    "pair": pa.array([[1, 2], [3, 4]], pa.list_(pa.int16(), 2)),
    "meta": pa.array([{"lang": "en", "at": {"n": 1}}, None]),
    "none": pa.nulls(2),
}
EXPECTED: dict[str, list[Any]] = {name: column.to_pylist() for name, column in GIVEN.items()}
EXPECTED["zoned"] = [v.astimezone(dt.UTC) for v in EXPECTED["zoned"]]
EXPECTED["key"] = [str(uuid.UUID(int=5)), None]


def make_table(folder: Path, card: Card = CARD) -> Table:
    texts = pa.table({"text": ["a", "b"], **GIVEN})
    pq.write_table(texts, folder / "in.parquet")
    source = open_source(SourceSpec(uri=str(folder / "in.parquet"), carry=tuple(GIVEN)))
    rows = pa.concat_tables(read_here(source))
    rows = rows.filter(pa.array([i is not None for i in rows["row_id"].to_pylist()]))
    assert rows["_error"].null_count == 2, rows["_message"]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(2 * DIM, np.float32)), DIM)
    rows = rows.drop_columns(["_input"]).append_column("embedding", vectors)
    for name, column in (
        ("num_units", pa.array([1, 1], pa.int32())), ("_counts", pa.nulls(2, pa.string())),
        ("truncated", pa.array([False, False])),
    ):  # fmt: skip
        rows = rows.append_column(name, column)
    table = Table.open_output(str(folder / "out"), IDENTITY)
    schema = table_schema(source.carried, [pa.field("embedding", pa.list_(pa.float32()))])
    table.claim(card, schema, "run")
    table.known()
    written, _ = write_part(table.uri, [rows], VECTORS, card.to_configuration())
    assert written.part is not None
    table.rows.commit([written.part], written.schema, card.to_configuration(), ("run", 0))
    return table


def by_pyarrow(table: Table) -> dict[str, list[Any]]:
    return dict(pq.read_table(table.uri).to_pydict())


def by_deltalake(table: Table) -> dict[str, list[Any]]:
    return dict(pa.table(DeltaTable(table.uri).to_pyarrow_table()).to_pydict())


def by_duckdb(table: Table) -> dict[str, list[Any]]:
    duckdb.sql("SET TimeZone = 'UTC'")
    found = duckdb.sql(f"SELECT * FROM '{table.uri}/*.parquet'")  # noqa: S608
    return dict(found.to_arrow_table().to_pydict())


def by_polars(table: Table) -> dict[str, list[Any]]:
    return dict(pl.read_delta(table.uri, use_pyarrow=True).to_dict(as_series=False))


@pytest.mark.parametrize("reader", [by_pyarrow, by_deltalake, by_duckdb, by_polars])
def test_whatever_lands_is_read_back(
    reader: Callable[[Table], dict[str, list[Any]]], tmp_path: Path
) -> None:
    table = make_table(tmp_path)
    found = reader(table)
    for name, values in EXPECTED.items():
        given = [tuple(v) if isinstance(v, tuple) else v for v in found[name]]
        if name == "pair":
            given = [list(v) for v in given]
        assert given == values, name


def test_a_column_keeps_the_type_that_the_table_has(tmp_path: Path) -> None:
    table = make_table(tmp_path)
    known = carried_types(table, pa.schema([("small", pa.float64()), ("new", pa.float64())]))
    assert known == pa.schema([("small", pa.int16()), ("new", pa.float64())])
    schema = read(table.uri).schema
    at = schema.get_field_index("small")
    other = schema.set(at, pa.field("small", pa.float64()))
    with pytest.raises(TableError, match=r"small is int16 in .*, double in this run"):
        table.claim(CARD, other, "run2")


def test_a_table_is_of_one_column(tmp_path: Path) -> None:
    table = make_table(tmp_path)
    check_columns(table, "text", None)  # its spec does not say: a table that somebody else has made
    spec = {"source": {"input": "title"}}
    card = CARD.model_copy(update={"spec": spec})
    (tmp_path / "other").mkdir()
    other = make_table(tmp_path / "other", card)
    check_columns(other, "title", None)
    with pytest.raises(TableError, match=r"^source\.input: .* from the column 'title', .* 'text'"):
        check_columns(other, "text", None)


@pytest.mark.parametrize(("was", "is_"), [("key", None), (None, "key"), ("key", "other")])
def test_a_table_s_ids_are_from_one_column(
    was: str | None, is_: str | None, tmp_path: Path
) -> None:
    card = CARD.model_copy(update={"spec": {"source": {"input": "text", "id": was}}})
    table = make_table(tmp_path, card)
    check_columns(table, "text", was)
    with pytest.raises(TableError, match=r"^source\.id: .*, so that all rows would come twice"):
        check_columns(table, "text", is_)


def test_a_table_without_a_row_is_anybody_s(tmp_path: Path) -> None:
    card = CARD.model_copy(update={"spec": {"source": {"input": "title"}}})
    table = Table.open_output(str(tmp_path / "out"), IDENTITY)
    check_columns(table, "text", None)
    vectors = [pa.field("embedding", pa.list_(pa.float32()))]
    table.claim(card, table_schema(pa.schema([]), vectors), "run")
    check_columns(table, "text", None)


def test_no_row_is_another_because_the_table_has_its_types_by_now(tmp_path: Path) -> None:
    """The first run takes the types of the source, the next ones those that Delta has made of
    them: by the hash of what is carried, all rows would have changed.
    """
    table = make_table(tmp_path)
    source = open_source(SourceSpec(uri=str(tmp_path / "in.parquet"), carry=tuple(GIVEN)))
    again = replace(source, carried=carried_types(table, source.carried))
    assert str(again.carried) != str(source.carried)
    first, second = (pa.concat_tables(read_here(s))[CARRIED].to_pylist() for s in (source, again))
    assert first == second
    assert [h is None for h in first] == [False, False, True]  # the last is the marker row
