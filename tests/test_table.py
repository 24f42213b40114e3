"""What a table promises, and that `verify` sees each way of breaking it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fmembed.integrity import verify
from fmembed.rows import REJECTED_SCHEMA, keys_of, row_schema
from fmembed.spec import TableError, fingerprint
from fmembed.table import ConflictError, Table, read, write_part

DIM = 4
IDENTITY = {"model.weights": "w", "model.normalize": True, "model.dtype": "float32"}
CONFIGURATION = {
    "fmembed.fingerprint": fingerprint(IDENTITY),
    "fmembed.identity": json.dumps(IDENTITY),
    "fmembed.spec": "{}",
    "fmembed.outputs": json.dumps(
        {"embedding": {"pooling": "mean", "normalize": True, "precision": "float32"}}
    ),
}
VECTORS = ("embedding",)


def block(ids: list[str], bad: tuple[str, ...] = (), seed: int = 0) -> pa.Table:
    """Rows as the embed stage yields them."""
    rows = [
        {"row_id": i, "content_hash": "0" * 32, "topic": "t"}
        | ({"_stage": "read", "_error": "bad JSON", "_message": "m"} if i in bad else {})
        for i in ids
    ]
    table = pa.Table.from_pylist(rows, schema=row_schema(pa.schema([("topic", pa.string())])))
    vectors = np.random.default_rng(seed).normal(size=(len(ids), DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    mask = pa.array([i in bad for i in ids])
    table = table.drop_columns(["_input"])
    table = table.append_column("num_units", pa.array([3] * len(ids), pa.int32()))
    table = table.append_column("_counts", pa.nulls(len(ids), pa.string()))
    table = table.append_column("truncated", pa.array([False] * len(ids)))
    flat = pa.array(vectors.reshape(-1))
    return table.append_column("embedding", pa.FixedSizeListArray.from_arrays(flat, DIM, mask=mask))


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """Two committed parts, five rows, one rejected."""
    table = Table.open_output(str(tmp_path / "t"), IDENTITY)
    for number, rows in enumerate((block(["a", "b", "x"], ("x",)), block(["c", "d", "e"]))):
        table.row_ids()
        written = write_part(table.uri, [rows], VECTORS)
        assert written.part is not None
        if written.rejected:
            table.rejected.commit(
                [written.rejected], REJECTED_SCHEMA, CONFIGURATION, ("run", number)
            )
        table.rows.commit([written.part], written.schema, CONFIGURATION, ("run", number))
    run = {"rows_read": 6, "rows_embedded": 5, "rows_rejected": 1, "rows_skipped": 0}
    table.put_run("1", "run", run | {"table_rows": 5, "table_rejected": 1})
    return table


def test_round_trip(table: Table) -> None:
    rows = read(table.uri)
    assert sorted(rows["row_id"].to_pylist()) == ["a", "b", "c", "d", "e"]
    assert rows.schema.field("embedding").type.equals(pa.list_(pa.float32(), DIM))
    assert read(table.uri, version=1).num_rows == 2
    result = verify(table.uri)
    assert result.problems == []
    assert (result.rows, result.rows_rejected, result.parts, result.dim) == (5, 1, 2, DIM)
    assert table.row_ids().contains(keys_of("abcdex")).all()


def test_a_repeated_commit_is_a_no_op(table: Table) -> None:
    before = table.version()
    part = table.rows.parts()[0]
    schema = read(table.uri).schema
    table.rows.commit([part], schema, CONFIGURATION, ("run", 1))
    assert table.version() == before


def test_a_commit_on_what_somebody_else_has_changed_is_refused(table: Table) -> None:
    slow, fast = Table(table.uri), Table(table.uri)
    slow.row_ids()
    fast.row_ids()
    for name, late in (("f", fast), ("s", slow)):
        written = write_part(late.uri, [block([name], seed=3)], VECTORS)
        assert written.part is not None
        if late is slow:
            assert slow.has_moved
            with pytest.raises(ConflictError, match="run the same command again"):
                slow.rows.commit([written.part], written.schema, CONFIGURATION, (name, 0))
        else:
            fast.rows.commit([written.part], written.schema, CONFIGURATION, (name, 0))
    assert sorted(read(table.uri)["row_id"].to_pylist()) == ["a", "b", "c", "d", "e", "f"]
    assert Table(table.uri).remove_strays() == 1
    assert not [p for p in verify(table.uri).problems if "stray" in p]


def test_strays_are_removed_and_old_versions_stay(table: Table, tmp_path: Path) -> None:
    folder = tmp_path / "t"
    table.row_ids()
    first, second = table.rows.parts()
    schema = read(table.uri).schema
    table.rows.commit([], schema, CONFIGURATION, ("remove", 0), removed=[first])
    write_part(table.uri, [block(["f", "g"], ("g",), seed=1)], VECTORS)
    (folder / "part-0.parquet#1").write_bytes(b"half")  # what a killed put leaves on a local disk
    strays = {path for _, path in table.strays()}
    assert len(strays) == 3
    assert not strays & {first.path, second.path}
    assert table.remove_strays() == 3
    assert table.strays() == []
    assert read(table.uri).num_rows == second.num_rows
    assert read(table.uri, version=2).num_rows == 5


def test_rejected_rows_by_cause_and_forgotten(table: Table) -> None:
    written = write_part(
        table.uri, [block(["d", "y"], ("y",))], VECTORS, frozenset(keys_of("d").tolist())
    )
    assert written.rejected is not None
    table.row_ids()
    table.rejected.commit([written.rejected], REJECTED_SCHEMA, CONFIGURATION, ("run", 7))
    table.put_shards("r1", [("clean", 4, 0), ("dirty", 4, 2)])
    assert [(c["error"], c["rows"]) for c in table.rejected_by_cause(3)] == [
        ("bad JSON", 2), ("duplicate id", 1),
    ]  # fmt: skip
    assert table.rejected_by_cause(1)[0]["samples"] == [{"row_id": "x", "message": "m"}]
    assert table.forget_rejected("r2") == 2
    # The twin of an embedded row stays rejected: it has no vector, and its id has one.
    assert [r["error"] for r in table.read_rejected().to_pylist()] == ["duplicate id"]
    assert table.whole_shards() == {"clean": 4}
    ids = table.row_ids()
    assert ids.contains(keys_of("abcde")).all()
    assert not ids.contains(keys_of("xy")).any()
    assert table.strays() == []
    assert table.forget_rejected("r3") == 0


def test_uncommitted_is_invisible_and_stray(table: Table) -> None:
    write_part(table.uri, [block(["f"], seed=1)], VECTORS)
    assert read(table.uri).num_rows == 5
    assert any("stray" in p for p in verify(table.uri).problems)


def test_duplicates_are_rejected(tmp_path: Path) -> None:
    known = frozenset(keys_of(["k"]).tolist())
    written = write_part(str(tmp_path), [block(["a", "k", "a", "b"])], VECTORS, known)
    assert written.part is not None
    assert written.part.num_rows == 2
    assert written.causes == {"duplicate id": 2}


def break_bytes(folder: Path) -> None:
    path = next(folder.glob("part-*.parquet"))
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(bytes(content))


def break_missing(folder: Path) -> None:
    next(folder.glob("part-*.parquet")).unlink()


def commit(folder: Path, rows: pa.Table) -> None:
    table = Table(str(folder))
    table.row_ids()
    part = table.rows.write(rows)
    table.rows.commit([part], rows.schema, CONFIGURATION, ("other", 0))


def break_twice(folder: Path) -> None:
    commit(folder, read(str(folder)).slice(0, 1))


def break_nan(folder: Path) -> None:
    _replace_vector(folder, [float("nan")] * DIM)


def break_norm(folder: Path) -> None:
    _replace_vector(folder, [3.0] * DIM)


def _replace_vector(folder: Path, vector: list[float]) -> None:
    row = read(str(folder)).slice(0, 1).to_pylist()[0]
    schema = read(str(folder)).schema
    commit(folder, pa.Table.from_pylist([row | {"row_id": "z", "embedding": vector}], schema))


@pytest.mark.parametrize(
    ("breaker", "message"),
    [
        (break_bytes, "checksum"),
        (break_missing, "missing"),
        (break_twice, "repeat a row_id"),
        (break_nan, "NaN"),
        (break_norm, "length 1"),
    ],
)
def test_verify_sees(table: Table, breaker: Any, message: str) -> None:
    breaker(Path(table.uri))
    assert any(message in p for p in verify(table.uri).problems)


def test_another_model_is_refused_with_what_differs(table: Table) -> None:
    with pytest.raises(TableError, match=r"model\.dtype was 'float32', is 'bfloat16'"):
        Table.open_output(table.uri, IDENTITY | {"model.dtype": "bfloat16"})


def test_looking_leaves_nothing(tmp_path: Path) -> None:
    Table.open_output(str(tmp_path / "a" / "b"), IDENTITY)
    assert list(tmp_path.iterdir()) == []


def test_readable_without_this_project(table: Table) -> None:
    import duckdb
    import pandas as pd
    import polars as pl

    expected = {r["row_id"]: r["embedding"] for r in read(table.uri).to_pylist()}
    parts = [f"{table.uri}/{p.path}" for p in table.rows.parts()]
    frame = pd.concat([pd.read_parquet(p) for p in parts])
    found = {"pandas": dict(zip(frame["row_id"], frame["embedding"], strict=True))}
    polars = pl.read_parquet(f"{table.uri}/*.parquet")
    assert polars.schema["embedding"] == pl.Array(pl.Float32, DIM)
    found["polars"] = dict(polars.select("row_id", "embedding").iter_rows())
    query = f"SELECT row_id, embedding FROM '{table.uri}/*.parquet'"  # noqa: S608
    found["duckdb"] = dict(duckdb.sql(query).fetchall())
    plain = pq.read_table(table.uri, columns=["row_id", "embedding"])
    assert plain.schema.field("embedding").type.equals(pa.list_(pa.float32(), DIM))
    found["pyarrow"] = {r["row_id"]: r["embedding"] for r in plain.to_pylist()}
    for reader, vectors in found.items():
        assert vectors.keys() == expected.keys(), reader
        for row_id, vector in vectors.items():
            np.testing.assert_array_equal(np.asarray(vector), expected[row_id], reader)
