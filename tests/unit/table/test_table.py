"""What a table promises, and that `verify` sees each way of breaking it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import DeltaError, TableNotFoundError
from tables import CARD, CONFIGURATION, DIM, IDENTITY, OUTPUT, SCHEMA, VECTORS, block, write

from fmembed.errors import ConflictError, DamagedError, FmembedError, StorageError, TableError
from fmembed.result import RunResult
from fmembed.rows.columns import REJECTED_SCHEMA
from fmembed.rows.ids import contents_of, keys_of
from fmembed.storage import Storage
from fmembed.table import files
from fmembed.table import log as log_module
from fmembed.table.card import fingerprint
from fmembed.table.files import Part, PartFiles
from fmembed.table.log import _is_damage
from fmembed.table.output import check_usable
from fmembed.table.parts import write_part
from fmembed.table.reading import read
from fmembed.table.records import Commit, WholeShard
from fmembed.table.repair import repair
from fmembed.table.table import Table
from fmembed.table.verify import verify


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """Two committed parts, five rows, one rejected."""
    table = Table.open_output(str(tmp_path / "t"), IDENTITY)
    table.known()
    table.claim(CARD, SCHEMA, "run")
    for number, rows in enumerate((block(["a", "b", "x"], ("x",)), block(["c", "d", "e"]))):
        table.known()
        written = write(table.uri, rows)
        assert written.part is not None
        if written.rejected:
            table.rejected.commit(
                [written.rejected], REJECTED_SCHEMA, CONFIGURATION, ("run", number)
            )
        table.rows.commit([written.part], written.schema, CONFIGURATION, ("run", number))
    result = RunResult(
        run_id="run", started="2026-01-01T00:00:00", table=table.uri, version=2, fingerprint="f",
        rows_read=6, rows_embedded=5, rows_rejected=1, table_rows=5, table_rejected=1,
    )  # fmt: skip
    commit = Commit(run="run", rows=1, rejected=0, rows_version=2, rejected_version=1)
    table.put_run(commit, result)
    return table


def test_round_trip(table: Table) -> None:
    rows = read(table.uri)
    assert sorted(rows["row_id"].to_pylist()) == ["a", "b", "c", "d", "e"]
    assert rows.schema.field("embedding").type.equals(pa.list_(pa.float32(), DIM))
    assert read(table.uri, version=1).num_rows == 2
    result = verify(table.uri)
    assert result.problems == []
    assert (result.rows, result.rows_rejected, result.parts, result.dim) == (5, 1, 2, DIM)
    assert table.known().load().contains(keys_of("abcdex")).all()


def test_a_repeated_commit_is_a_no_op(table: Table) -> None:
    before = table.version()
    part = table.rows.parts()[0]
    schema = read(table.uri).schema
    table.rows.commit([part], schema, CONFIGURATION, ("run", 1))
    assert table.version() == before


def test_a_commit_on_what_somebody_else_has_changed_is_refused(table: Table) -> None:
    slow, fast = Table(table.uri), Table(table.uri)
    slow.known()
    fast.known()
    for name, late in (("f", fast), ("s", slow)):
        written = write(late.uri, block([name], seed=3))
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
    table.known()
    first, second = table.rows.parts()
    schema = read(table.uri).schema
    table.rows.commit([], schema, CONFIGURATION, ("remove", 0), removed=[first])
    write(table.uri, block(["f", "g"], ("g",), seed=1))
    half = f"part-{'0' * 32}.parquet#0123abcd.tmp"
    (folder / half).write_bytes(b"half")  # what a killed put leaves on a local disk
    strays = {path for _, path in table.strays()}
    assert len(strays) == 3
    assert not strays & {first.path, second.path}
    assert table.remove_strays() == 3
    assert table.strays() == []
    assert read(table.uri).num_rows == second.num_rows
    assert read(table.uri, version=2).num_rows == 5


def test_rejected_rows_by_cause_and_forgotten(table: Table) -> None:
    table.known()
    written = write(table.uri, block(["d", "y"], ("y",)), frozenset(keys_of("d").tolist()))
    assert written.rejected is not None
    table.rejected.commit([written.rejected], REJECTED_SCHEMA, CONFIGURATION, ("run", 7))
    kept, (old, new) = table.rows.parts()[0].path, table.rejected.parts()
    shards = [WholeShard("clean", 4, frozenset([kept]))]
    shards += [
        WholeShard(f"dirty{i}", 4, frozenset([kept, f"_rejected/{part.path}"]))
        for i, part in enumerate((old, new))
    ]
    table.put_shards(Commit(run="r1"), shards)
    assert len(table.whole_shards(table.known())) == 3
    assert [(c["error"], c["rows"]) for c in table.rejected_by_cause(3)] == [
        ("bad JSON", 2), ("duplicate id", 1),
    ]  # fmt: skip
    assert table.rejected_by_cause(1)[0]["samples"] == [{"row_id": "x", "message": "m"}]
    assert table.forget_rejected("r2") == 2
    # The twin of an embedded row stays rejected: it has no vector, and its id has one.
    assert [r["error"] for r in table.read_rejected().to_pylist()] == ["duplicate id"]
    assert table.whole_shards(table.known()) == {"clean": 4}
    ids = table.known().load()
    assert ids.contains(keys_of("abcde")).all()
    assert not ids.contains(keys_of("xy")).any()
    assert table.strays() == []
    assert table.forget_rejected("r3") == 0


def test_uncommitted_is_invisible_and_stray(table: Table) -> None:
    write(table.uri, block(["f"], seed=1))
    assert read(table.uri).num_rows == 5
    assert any("stray" in p for p in verify(table.uri).problems)


def test_duplicates_are_rejected(tmp_path: Path) -> None:
    known = frozenset(keys_of(["k"]).tolist())
    written = write(str(tmp_path), block(["a", "k", "a", "b"]), known)
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
    table.known()
    part = table.rows.files.write(rows)
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


def test_of_another_model_its_name_is_told_and_no_hash(tmp_path: Path) -> None:
    identity = {**IDENTITY, "model.weights": "a" * 32}
    card = CARD.model_copy(
        update={
            "identity": identity,
            "fingerprint": fingerprint(identity),
            "spec": {"model": {"id": "org/old"}},
        }
    )
    table = Table.open_output(str(tmp_path / "t"), identity)
    table.claim(card, SCHEMA, "run")
    table.known()
    written = write(table.uri, block(["a", "b"]))
    assert written.part is not None
    configuration = card.to_configuration()
    table.rows.commit([written.part], written.schema, configuration, ("run", 0))
    other = {**identity, "model.weights": "b" * 32, "model.prompt": "query: "}
    with pytest.raises(TableError) as e:
        Table.open_output(table.uri, other, "org/new")
    assert str(e.value).endswith(
        "t was made by another model or setting: its 2 rows by org/old, this run's model is "
        "org/new; model.prompt was None, is 'query: '; the weights differ. With what made them all "
        "2 are kept; else give another output.uri"
    )


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


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_flipped_bit_is_read_without_a_word(table: Table) -> None:
    """Neither in the pages nor in the footer, which no checksum of Parquet covers."""
    expected = {
        c: read(table.uri, columns=list(c) if c else None).to_pylist()
        for c in (None, ("embedding",))
    }
    (path,) = [Path(table.uri, p.path) for p in table.rows.parts()[:1]]
    content = path.read_bytes()
    for at in range(0, len(content), max(len(content) // 300, 1)):
        spoiled = bytearray(content)
        spoiled[at] ^= 1 << at % 8
        path.write_bytes(bytes(spoiled))
        for columns in expected:
            with pytest.raises(DamagedError, match="do not match its checksum"):
                read(table.uri, columns=list(columns) if columns else None)
    path.write_bytes(content)
    assert read(table.uri).to_pylist() == expected[None]


def test_a_few_columns_of_a_large_part_are_read_with_the_checksums_of_their_pages(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_WHOLE_BYTES", 0)
    part = table.rows.parts()[0]
    path = Path(table.uri, part.path)
    content = path.read_bytes()
    column = pq.read_metadata(path).row_group(0).column(2)
    assert column.path_in_schema.startswith("embedding")
    start = column.data_page_offset
    expected = table.read_part(part, ["embedding"])
    fetched = []
    monkeypatch.setattr(type(table.rows.storage), "get", lambda *a: fetched.append(a))
    num_found = 0
    for at in range(start, start + column.total_compressed_size):
        spoiled = bytearray(content)
        spoiled[at] ^= 0x10
        path.write_bytes(bytes(spoiled))
        try:
            found = table.read_part(part, ["embedding"])
        except DamagedError:
            num_found += 1
        else:
            assert found.equals(expected)
    # A page's header has no checksum, and some of its bits change nothing.
    assert num_found > column.total_compressed_size * 0.7


def test_ray_reads_with_checksums_too(table: Table, local_ray: None) -> None:
    assert read(table.uri, engine="ray").count() == 5
    assert read(table.uri, engine="ray", columns=["row_id"]).schema().names == ["row_id"]
    break_bytes(Path(table.uri))
    with pytest.raises(Exception, match="do not match its checksum"):
        read(table.uri, engine="ray").materialize()


def damage_gone(path: Path) -> None:
    path.unlink()


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_lines(path: Path) -> None:
    """Cut at the end of a line: what is left is JSON, and `deltalake` takes it for the whole."""
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:1]))


DAMAGES = [damage_gone, damage_cut, damage_empty, damage_lines]


def on_record(table: Table) -> None:
    """A record that says all of the source is in the table."""
    commit = Commit(run="run", rows=1, rejected=0, rows_version=2, rejected_version=1)
    parts = {p.path for p in table.rows.parts()}
    parts |= {f"_rejected/{p.path}" for p in table.rejected.parts()}
    table.put_shards(commit, [WholeShard("all", 6, frozenset(parts))])
    assert table.whole_shards(table.known()) == {"all": 6}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("folder", ["", "_rejected/"])
def test_a_log_that_lost_its_newest_entry_deletes_nothing_and_skips_nothing(
    table: Table, damage: Callable[[Path], None], folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    on_record(table)
    newest = sorted(Path(table.uri, folder, "_delta_log").glob("*.json"))[-1]
    before = {p.name for p in Path(table.uri).rglob("part-*")}
    damage(newest)
    again = Table(table.uri)
    if damage is damage_gone:
        assert again.whole_shards(again.known()) == {}
        known = again.known().load()
        lost = "x" if folder else "cde"
        assert not known.contains(keys_of(lost)).any()
        assert again.remove_strays() == 0
        assert "no longer holds what run run has committed" in capsys.readouterr().err
        assert any("--repair" in p for p in verify(table.uri).problems)
    else:
        own = again.num_rejected if folder else again.strays
        for look in (again.known, own):
            with pytest.raises(DamagedError, match="verify --repair"):
                look()
    assert {p.name for p in Path(table.uri).rglob("part-*")} == before
    assert repair(table.uri)
    assert sorted(read(table.uri)["row_id"].to_pylist()) == ["a", "b", "c", "d", "e"]
    assert Table(table.uri).num_rejected() == 1
    fresh = Table(table.uri)
    assert fresh.whole_shards(fresh.known()) == {"all": 6}
    assert verify(table.uri).problems == []
    assert repair(table.uri) == []


@pytest.mark.parametrize("folder", ["_delta_log", "_rejected", "_rejected/_delta_log"])
def test_a_log_that_is_gone_is_not_an_empty_one(table: Table, folder: str) -> None:
    on_record(table)
    shutil.rmtree(Path(table.uri, folder))
    parts = {p.name for p in Path(table.uri).rglob("part-*")}
    if folder == "_delta_log":
        with pytest.raises(TableError, match=r"whose log is gone.*verify --repair"):
            Table.open_output(table.uri, IDENTITY)
        with pytest.raises(TableError, match="verify --repair"):
            read(table.uri)
    else:
        again = Table.open_output(table.uri, IDENTITY)
        # The rejected row is read again; the others are in the table.
        assert again.whole_shards(again.known()) == {}
        assert [again.known().load().contains(keys_of(i))[0] for i in "abcdex"] == [True] * 5 + [
            False
        ]
        assert again.remove_strays() == 0
    assert {p.name for p in Path(table.uri).rglob("part-*")} == parts
    repair(table.uri)
    assert sorted(read(table.uri)["row_id"].to_pylist()) == ["a", "b", "c", "d", "e"]
    assert verify(table.uri).problems == []
    assert Table(table.uri).num_rejected() == (0 if folder == "_rejected" else 1)
    card = Table(table.uri).card()
    assert card == CARD


@pytest.mark.parametrize("damage", [damage_gone, damage_cut, damage_empty, break_bytes])
def test_a_table_with_a_broken_part_has_a_way_back(
    table: Table, damage: Callable[[Path], None]
) -> None:
    on_record(table)
    first, second = table.rows.parts()
    ids = table.read_part(first, None)["row_id"].to_pylist()
    rest = table.read_part(second, None)["row_id"].to_pylist()
    damage(Path(table.uri) if damage is break_bytes else Path(table.uri, first.path))
    if damage is break_bytes and read_or_none(table, second) is None:
        ids, rest = rest, ids
    with pytest.raises(DamagedError, match="verify --repair"):
        read(table.uri)
    done = repair(table.uri)
    assert any("its rows are embedded again" in line for line in done)
    assert verify(table.uri).problems == []
    assert sorted(read(table.uri)["row_id"].to_pylist()) == sorted(rest)
    again = Table(table.uri)
    assert again.whole_shards(again.known()) == {}
    assert not again.known().load().contains(keys_of(ids)).any()
    # What is broken is kept, if there is anything of it.
    kept = list(Path(table.uri, "_quarantine").rglob("part-*"))
    notes = [n for n in verify(table.uri).notes if n.startswith("1 parts lie in _quarantine")]
    assert len(notes) == len(kept)
    assert len(kept) == (0 if damage is damage_gone else 1)


def read_or_none(table: Table, part: Part) -> pa.Table | None:
    try:
        return table.read_part(part, None)
    except DamagedError:
        return None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"commit": 1}', b"\xff", b"[" * 100_000])
def test_a_record_that_is_none_is_passed_over_with_a_line(
    table: Table, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    on_record(table)
    Path(table.uri, "_shards", "other.json").write_bytes(content)
    Path(table.uri, "_runs", "9999999999-0000000000-other.json").write_bytes(content)
    assert table.whole_shards(table.known()) == {"all": 6}
    last = table.last_run()
    assert last is not None
    assert last.rows_read == 6
    assert capsys.readouterr().err.count("it is passed over") == 2
    assert verify(table.uri).problems == []


def test_an_empty_listing_is_no_empty_table(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {p.name for p in Path(table.uri).rglob("part-*")}
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "paths", lambda *_: [])
        patch.setattr(Storage, "sizes", lambda *_: {})
        assert table.strays() == []
        assert table.whole_shards(table.known()) == {}
        assert table.known().load().contains(keys_of("abcdex")).all()

        def no_table(*_: Any, **__: Any) -> None:
            raise TableNotFoundError

        patch.setattr(log_module, "DeltaTable", no_table)
        for look in (table.known, table.strays, lambda: Table.open_output(table.uri, IDENTITY)):
            with pytest.raises((StorageError, TableError), match="does not list the log"):
                look()
    assert {p.name for p in Path(table.uri).rglob("part-*")} == parts


def test_a_table_that_is_made_meanwhile_is_not_damaged(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen on S3: not there at the first look, and with its first entry at the second."""
    looks, version = [], table.version()

    def too_early(*arguments: Any, **options: Any) -> DeltaTable:
        looks.append(arguments)
        if len(looks) == 1:
            raise TableNotFoundError
        return DeltaTable(*arguments, **options)

    monkeypatch.setattr(log_module, "DeltaTable", too_early)
    assert Table(table.uri).rows.version() == version
    assert len(looks) == 2


def test_restore_by_another_tool_has_its_rows_read_again(table: Table) -> None:
    on_record(table)
    DeltaTable(table.uri).restore(1)
    again = Table(table.uri)
    assert again.whole_shards(again.known()) == {}
    assert [again.known().load().contains(keys_of(i))[0] for i in "abcdex"] == [
        True, True, False, False, False, True,
    ]  # fmt: skip
    assert again.remove_strays() == 0
    result = verify(table.uri)
    assert result.problems == []
    assert any("RESTORE" in note for note in result.notes)
    assert read(table.uri, version=2).num_rows == 5


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_delete_by_another_tool_is_understood_and_said(tmp_path: Path, precision: str) -> None:
    outputs = {"embedding": OUTPUT.model_copy(update={"precision": precision})}
    card = CARD.model_copy(update={"outputs": outputs})
    table = Table.open_output(str(tmp_path / "t"), IDENTITY)
    table.known()
    table.claim(card, SCHEMA, "run")
    rows = block(["a", "b", "c"])
    type_ = pa.list_(pa.type_for_alias(precision), DIM)
    rows = rows.set_column(
        rows.schema.get_field_index("embedding"), "embedding", rows["embedding"].cast(type_)
    )
    written = write(table.uri, rows)
    assert written.part is not None
    table.rows.commit([written.part], written.schema, card.to_configuration(), ("run", 0))
    before = {r["row_id"]: r for r in read(table.uri).to_pylist()}
    DeltaTable(table.uri).delete("row_id = 'b'")
    after = read(table.uri)
    assert after.schema.equals(written.schema.remove_metadata()) or precision == "float16"
    assert after.schema.field("embedding").type == type_
    assert {r["row_id"]: r for r in after.to_pylist()} == {i: before[i] for i in "ac"}
    result = verify(table.uri)
    assert (result.rows, result.dim) == (2, DIM)
    assert any("DELETE" in note for note in result.notes)
    assert any("written by another tool" in note for note in result.notes)
    assert [p for p in result.problems if "no run has finished" not in p] == []
    # What is not in the table is read again.
    assert not Table(table.uri).known().load().contains(keys_of("b")).any()
    DeltaTable(table.uri).vacuum(0, enforce_retention_duration=False, dry_run=False)
    with pytest.raises(TableError, match=r"parts of version 1 .* are gone, as by another"):
        read(table.uri, version=1)
    assert read(table.uri, version=2).equals(after)


def test_what_leads_out_of_the_table_is_not_read(table: Table, tmp_path: Path) -> None:
    outside = tmp_path / "outside.parquet"
    outside.write_bytes(Path(table.uri, table.rows.parts()[0].path).read_bytes())
    entry = Path(table.uri, "_delta_log", f"{2:020d}.json")
    name = table.rows.parts()[-1].path
    names = {json.loads(line)["add"]["path"] for line in entry.read_text().splitlines()
             if '"add"' in line}  # fmt: skip
    (name,) = names
    for path in ("../outside.parquet", str(outside), outside.as_uri(), "%2e%2e/outside.parquet",
                 "a/../../outside.parquet", "..\\\\outside.parquet", "file:outside.parquet",
                 "s3://bucket/x.parquet", "part\\u001b[31m.parquet"):  # fmt: skip
        content = entry.read_text()
        entry.write_text(content.replace(name, path))
        for look in (
            read,
            verify,
            lambda uri: Table(uri).strays(),
            lambda uri: Table(uri).known(),
        ):
            with pytest.raises(TableError, match="is not in the table's folder"):
                look(table.uri)
        entry.write_text(content)
    assert verify(table.uri).problems == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("identity", "[]"), ("identity", "{"), ("outputs", '{"embedding": 5}'), ("spec", "7"),
        ("outputs", '{"embedding": {"pooling": "mean"}}'), ("modality", "smell"),
        ("ranges", '{"embedding": "all"}'), ("spec", "[" * 100_000), ("outputs", None),
    ],
)  # fmt: skip
def test_forged_metadata_are_one_line(table: Table, name: str, value: str | None) -> None:
    entry = Path(table.uri, "_delta_log", f"{0:020d}.json")
    lines = [json.loads(line) for line in entry.read_text().splitlines()]
    for line in lines:
        stored = line.get("metaData", {}).get("configuration", {})
        if value is None:
            stored.pop(f"fmembed.{name}", None)
        elif stored:
            stored[f"fmembed.{name}"] = value
    entry.write_text("\n".join(map(json.dumps, lines)))
    for look in (read, verify, lambda uri: Table.open_output(uri, IDENTITY)):
        with pytest.raises(TableError) as refused:
            look(table.uri)
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 500


def test_deletion_vectors_are_refused(table: Table) -> None:
    """A reader that does not know them would bring back the rows that they delete."""
    entry = Path(table.uri, "_delta_log", f"{0:020d}.json")
    lines = [json.loads(line) for line in entry.read_text().splitlines()]
    for line in lines:
        if "protocol" in line:
            line["protocol"] = {
                "minReaderVersion": 3, "minWriterVersion": 7,
                "readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"],
            }  # fmt: skip
    entry.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(TableError, match="deletionVectors"):
        read(table.uri)


# --- who may write --------------------------------------------------------------------------------


def test_of_two_creators_with_other_models_one_has_the_table(tmp_path: Path) -> None:
    """Both have looked while nothing was there; the later one's rows come to nothing."""
    uri = str(tmp_path / "t")
    other_identity = IDENTITY | {"model.dtype": "bfloat16"}
    other = CARD.model_copy(
        update={"table": "ffff", "identity": other_identity,
                "fingerprint": fingerprint(other_identity)}
    )  # fmt: skip
    first, second = Table.open_output(uri, IDENTITY), Table.open_output(uri, other_identity)
    first.known()
    second.known()
    first.claim(CARD, SCHEMA, "first")
    written = write(uri, block(["a"]))
    assert written.part is not None
    first.rows.commit([written.part], written.schema, CONFIGURATION, ("first", 0))
    with pytest.raises(TableError, match=r"model\.dtype was 'float32', is 'bfloat16'"):
        check_usable(second, other_identity)
    with pytest.raises(ConflictError):
        second.claim(other, SCHEMA, "second")
    # Even on the newest version: the commit itself looks at the fingerprint.
    second.rows.pin()
    late = write(uri, block(["b"]))
    assert late.part is not None
    with pytest.raises(ConflictError):
        second.rows.commit([late.part], late.schema, other.to_configuration(), ("second", 0))
    assert read(uri)["row_id"].to_pylist() == ["a"]


def test_a_table_that_never_had_a_row_may_be_another_models(tmp_path: Path) -> None:
    """A first try that failed early does not bind the folder to its settings."""
    uri = str(tmp_path / "t")
    table = Table.open_output(uri, IDENTITY)
    table.known()
    table.claim(CARD, SCHEMA, "first")
    other_identity = IDENTITY | {"model.dtype": "bfloat16"}
    other = CARD.model_copy(
        update={"identity": other_identity, "fingerprint": fingerprint(other_identity)}
    )
    again = Table.open_output(uri, other_identity)
    again.known()
    again.claim(other, SCHEMA, "second")
    assert Table(uri).card() == other
    written = write(uri, block(["a"]))
    assert written.part is not None
    with pytest.raises(ConflictError):  # the first one wakes up
        table.rows.commit([written.part], written.schema, CONFIGURATION, ("first", 0))
    again.known()
    again.rows.commit([written.part], SCHEMA, other.to_configuration(), ("second", 0))
    with pytest.raises(TableError, match=r"source\.carry: the table .* has the columns"):
        again.claim(other, SCHEMA.remove(5), "third")


def test_a_lost_answer_to_the_creation_of_a_table_is_no_conflict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Storage.create

    def lose_answer(*arguments: Any) -> bool:
        create(*arguments)
        return create(*arguments)  # the client's second try finds what its first has made

    table = Table.open_output(str(tmp_path / "t"), IDENTITY)
    table.known()
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "create", lose_answer)
        table.claim(CARD, SCHEMA, "run")
    written = write(table.uri, block(["a"]))
    assert written.part is not None
    table.rows.commit([written.part], written.schema, CONFIGURATION, ("run", 0))
    assert read(table.uri)["row_id"].to_pylist() == ["a"]


def test_identical_rows_written_twice_are_two_parts(tmp_path: Path) -> None:
    uri = str(tmp_path)
    one, two = (write(uri, block(["a", "x"], ("x",))) for _ in range(2))
    assert one.part != two.part
    assert one.rejected != two.rejected


def test_retry_of_a_part_with_twins_alone(table: Table) -> None:
    """It stays as it is; rewritten, it would have to be added and removed at once."""
    twin = write(table.uri, block(["d"]), frozenset(keys_of("d").tolist()))
    assert twin.rejected is not None
    table.known()
    table.rejected.commit([twin.rejected], REJECTED_SCHEMA, CONFIGURATION, ("run", 7))
    table.known()
    assert table.forget_rejected("r2") == 1
    assert [p.path for p in table.rejected.parts()] == [twin.rejected.path]
    table.known()
    assert table.forget_rejected("r3") == 0
    # Nor is a bad row forgotten whose id is embedded: its shard would skip it without a word.
    bad = write(table.uri, block(["d"], ("d",)))
    assert bad.rejected is not None
    table.rejected.commit([bad.rejected], REJECTED_SCHEMA, CONFIGURATION, ("run", 8))
    table.known()
    assert table.forget_rejected("r4") == 0
    # Nothing that was ever committed is deleted.
    assert Table(table.uri).remove_strays() == 0


def test_the_last_run_is_the_last_by_version(table: Table) -> None:
    """Neither a clock that goes wrong nor a record of lost commits changes that."""
    last = table.last_run()
    assert last is not None
    counts = replace(last, rows_read=1, started="2001-01-01T00:00:00")
    table.known()
    written = write(table.uri, block(["n"], seed=7))
    assert written.part is not None
    table.rows.commit([written.part], written.schema, CONFIGURATION, ("late", 0))
    later = Commit(run="late", rows=0, rows_version=3, rejected_version=1)
    table.put_run(later, counts)
    assert table.last_run() == counts
    unknown = Commit(run="lost", rows=3, rows_version=9, rejected_version=1)
    table.put_run(unknown, replace(counts, rows_read=2))
    assert table.last_run() == counts
    assert table.lost_runs() == ["lost"]


def test_a_damaged_record_is_told_and_counted_anew(table: Table) -> None:
    assert not table.is_uncounted()
    whole = table.last_run()
    assert whole is not None
    path = next(Path(table.uri, "_runs").iterdir())
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "result": {**record["result"], "table_rows": "x"}}))
    with pytest.raises(TableError, match=r"the record of its last run .* \(table_rows\)"):
        table.last_run()
    assert table.counted_version is not None
    assert table.is_uncounted()
    assert "the record of the last run is damaged" in verify(table.uri).problems
    # The next run counts anew, whatever its name is among the others'.
    for name in ("0", "zz"):
        versions = (table.rows.version(), table.rejected.version())
        made = Commit(run=name, rows_version=versions[0], rejected_version=versions[1])
        Table(table.uri).put_run(made, whole)
        again = Table(table.uri)
        assert (again.last_run(), again.is_uncounted()) == (whole, False)
        next(Path(table.uri, "_runs").glob(f"*-{name}.json")).unlink()


def test_what_a_probe_found_is_of_its_version_alone(table: Table) -> None:
    found = {"probe": "knn", "column": "embedding", "value": 1}
    table.put_probe(2, found)
    assert table.get_probe(2, "knn", "embedding") == found
    # The log is cut back, and another part makes version 2.
    Path(table.uri, "_delta_log", f"{2:020d}.json").unlink()
    again = Table(table.uri)
    again.known()
    written = write(table.uri, block(["n"], seed=5))
    assert written.part is not None
    again.rows.commit([written.part], written.schema, CONFIGURATION, ("next", 0))
    assert again.version() == 2
    assert again.get_probe(2, "knn", "embedding") is None
    Path(table.uri, "_probes", "00000002-knn-embedding.json").write_bytes(b"{")
    assert again.get_probe(2, "knn", "embedding") is None


# --- what a second look found ---------------------------------------------------------------------


def test_a_twin_does_not_stand_for_the_row_that_is_not_in_the_table(tmp_path: Path) -> None:
    """Rejections are committed first: a kill after them leaves the twin alone."""
    table = Table.open_output(str(tmp_path / "t"), IDENTITY)
    table.known()
    table.claim(CARD, SCHEMA, "run")
    written = write(table.uri, block(["a", "a", "b"]))
    assert written.causes == {"duplicate id": 1}
    assert written.rejected is not None
    table.rejected.commit([written.rejected], REJECTED_SCHEMA, CONFIGURATION, ("run", 0))
    assert not Table(table.uri).known().load().contains(keys_of("ab")).any()


def test_parts_of_old_versions_stay_whatever_clock_removed_them(table: Table) -> None:
    DeltaTable(table.uri).delete("row_id = 'a' or row_id = 'b'")
    entry = sorted(Path(table.uri, "_delta_log").glob("*.json"))[-1]
    lines = [json.loads(line) for line in entry.read_text().splitlines()]
    for line in lines:
        if "remove" in line:
            line["remove"]["deletionTimestamp"] += 3_600_000
    entry.write_text("\n".join(map(json.dumps, lines)))
    parts = {p.name for p in Path(table.uri).glob("part-*")}
    assert Table(table.uri).remove_strays() == 0
    assert {p.name for p in Path(table.uri).glob("part-*")} == parts
    assert read(table.uri, version=2).num_rows == 5
    assert not any("taken back" in line for line in repair(table.uri))


def test_folders_of_a_table_that_are_links_are_refused(table: Table, tmp_path: Path) -> None:
    """Through them a table of somebody else's would be written, or mended."""
    mine = {p: p.read_bytes() for p in Path(table.uri).rglob("*") if p.is_file()}
    for name in ("_delta_log", "_rejected", "_runs", "_shards", "_lock", "_probes", "_quarantine"):
        theirs = tmp_path / f"theirs{name}"
        shutil.copytree(table.uri, theirs)
        shutil.rmtree(theirs / name, ignore_errors=True)
        Path(table.uri, name).mkdir(exist_ok=True)
        (theirs / name).symlink_to(Path(table.uri, name))
        for path in theirs.glob("part-*"):
            path.write_bytes(b"")
        for look in (
            repair,
            verify,
            lambda uri: Table(uri).put_probe(2, {"probe": "p", "column": "c"}),
            lambda uri: Table(uri).put_shards(Commit(run="r"), []),
        ):
            with contextlib.suppress(FmembedError):
                look(str(theirs))
    assert {p: p.read_bytes() for p in Path(table.uri).rglob("*") if p.is_file()} == mine


@pytest.mark.parametrize("name", ["_delta_log/_last_checkpoint", "_runs/zz.json", "_shards/x.json"])
def test_a_pipe_is_not_waited_for(table: Table, name: str) -> None:
    path = Path(table.uri, name)
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    with contextlib.suppress(FmembedError):
        verify(table.uri)
    with contextlib.suppress(FmembedError):
        repair(table.uri)


def test_adds_that_do_not_say_how_many_rows_are_read(table: Table) -> None:
    for entry in Path(table.uri, "_delta_log").glob("*.json"):
        lines = [json.loads(line) for line in entry.read_text().splitlines()]
        for line in lines:
            if "add" in line:
                line["add"]["stats"] = None
        entry.write_text("\n".join(map(json.dumps, lines)))
    assert read(table.uri).num_rows == 5
    assert verify(table.uri).problems == []
    assert repair(table.uri) == []


def test_a_path_with_dots_through_a_link_is_one_folder(tmp_path: Path) -> None:
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "link").symlink_to(tmp_path / "real" / "deep")
    table = Table.open_output(str(tmp_path / "user" / "link" / ".." / "t"), IDENTITY)
    table.known()
    table.claim(CARD, SCHEMA, "run")
    assert (tmp_path / "real" / "t" / "_delta_log").is_dir()
    assert not (tmp_path / "user" / "t").exists()


def test_the_rejected_rows_folder_is_no_output(table: Table) -> None:
    with pytest.raises(TableError, match="lies inside another table"):
        Table.open_output(f"{table.uri}/_rejected", IDENTITY)


@pytest.mark.parametrize(
    "left", [[], [f".probe-{'1' * 32}#0123abcd.tmp"], ["00000001.json#0123abcd.tmp"]]
)
def test_what_a_kill_leaves_in_the_first_moment_is_no_obstacle(
    tmp_path: Path, left: list[str]
) -> None:
    (tmp_path / "_lock").mkdir()
    for name in left:
        (tmp_path / "_lock" / name).write_bytes(b"half")
    Table.open_output(str(tmp_path), IDENTITY)


def test_what_others_call_a_probe_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "_lock").mkdir()
    (tmp_path / "_lock" / ".probe").write_bytes(b"mine")
    with pytest.raises(TableError, match="is not empty"):
        Table.open_output(str(tmp_path), IDENTITY)
    assert (tmp_path / "_lock" / ".probe").read_bytes() == b"mine"


def test_a_table_from_which_nothing_may_be_taken_says_so(table: Table) -> None:
    DeltaTable(table.uri).alter.set_table_properties({"delta.appendOnly": "true"})
    table.known()
    added = write(table.uri, block(["n"], seed=7))
    assert added.part is not None
    old = table.rows.parts()
    with pytest.raises(TableError, match=r"delta\.appendOnly"):
        table.rows.commit([added.part], added.schema, CONFIGURATION, ("r9", 0), old)
    assert table.rows.parts() == old
    table.rows.commit([added.part], added.schema, CONFIGURATION, ("r9", 0))


def test_an_outage_is_no_damage() -> None:
    outage = DeltaError("Generic S3 error: Error performing GET http://s/parquet/x: 503")
    assert not _is_damage(outage)
    assert _is_damage(DeltaError("Kernel error: Json error: Truncated record"))


def test_absent_columns_are_named(table: Table) -> None:
    with pytest.raises(TableError, match="has no 'nope'"):
        read(table.uri, columns=["row_id", "nope"])


def test_names_that_look_odd_are_refused_or_found_absent() -> None:
    for look in (read, lambda uri: Table.open_output(uri, IDENTITY)):
        with pytest.raises(FmembedError):
            look("x" * 5000)


def test_parts_that_an_older_backup_knows_nothing_of_are_kept(table: Table, tmp_path: Path) -> None:
    """Logs and records restored together; the parts are those of today."""
    backup = tmp_path / "backup"
    shutil.copytree(table.uri, backup)
    table.known()
    stamp = {**CONFIGURATION, "fmembed.run": "newer", "fmembed.write": "0"}
    newer, _ = write_part(table.uri, [block(["n"], seed=9)], VECTORS, stamp)
    assert newer.part is not None
    table.rows.commit([newer.part], newer.schema, CONFIGURATION, ("newer", 0))
    for name in ("_delta_log", "_runs"):
        shutil.rmtree(Path(table.uri, name))
        shutil.copytree(backup / name, Path(table.uri, name))
    again = Table(table.uri)
    assert not again.known().load().contains(keys_of("n"))[0]
    assert again.remove_strays() == 1
    assert Path(table.uri, "_quarantine", "newer", newer.part.path).exists()
    # What this run itself has not committed is certainly nobody's.
    stray, _ = write_part(table.uri, [block(["m"], seed=9)], VECTORS, stamp)
    assert stray.part is not None
    assert again.remove_strays("newer") == 1
    assert not list(Path(table.uri).rglob(stray.part.path))


def test_a_part_that_names_no_run_is_kept_aside(table: Table) -> None:
    """Of this table, and of no run that is known to be dead."""
    rows = block(["n"]).select(["row_id"])
    path = table.rows.files.write(rows, (), CONFIGURATION).path
    assert Table(table.uri).remove_strays() == 1
    assert Path(table.uri, "_quarantine", "unknown", path).exists()


def test_rows_that_are_embedded_and_rejected_are_told_apart_by_repair(table: Table) -> None:
    """As where the rejected rows' log has lost the commit of a retry."""
    written = write(table.uri, block(["x"], seed=4))
    assert written.part is not None
    table.known()
    table.rows.commit([written.part], written.schema, CONFIGURATION, ("retry", 0))
    assert any("both embedded and rejected" in p for p in verify(table.uri).problems)
    assert any("its rows are embedded again" in line for line in repair(table.uri))
    assert verify(table.uri).problems == []
    assert sorted(read(table.uri)["row_id"].to_pylist()) == ["a", "b", "c", "d", "e", "x"]
    assert Table(table.uri).num_rejected() == 0


def test_columns_that_another_tool_has_added(table: Table) -> None:
    rows = pa.table({"row_id": ["n"], "content_hash": ["0" * 32], "embedding": [[0.5] * DIM],
                     "num_units": pa.array([1], pa.int32()), "truncated": [False], "topic": ["t"],
                     "more": [7]})  # fmt: skip
    write_deltalake(table.uri, rows, mode="append", schema_mode="merge")
    found = {r["row_id"]: r["more"] for r in read(table.uri).to_pylist()}
    assert found == dict.fromkeys("abcde") | {"n": 7}


def test_keys_are_read_from_parts_as_other_tools_write_them(tmp_path: Path) -> None:
    """Delta's own delete writes string_view, which Arrow cannot group by; pieces share an id."""
    view = pa.string_view()
    rows = pa.table(
        {
            "row_id": pa.array(["a@0", "a@1", "b@0"], view),
            "parent_id": pa.array(["a", "a", "b"], view),
            "content_hash": pa.array(["ab" * 16, "ab" * 16, "cd" * 16], view),
        }
    )
    own = PartFiles(Storage(str(tmp_path)))

    def part(rows: pa.Table) -> Part:
        pq.write_table(rows, tmp_path / "x.parquet")
        return Part("x.parquet", (tmp_path / "x.parquet").stat().st_size, rows.num_rows)

    keys, contents, carried = own.read_keys(part(rows))
    assert keys.tolist() == keys_of("ab").tolist()
    assert contents.tolist() == contents_of(["ab" * 16, "cd" * 16]).tolist()
    assert carried.tolist() == [0, 0]
    not_hex = pa.array(["zz"] * 3)
    for spoiled in (rows.drop_columns("content_hash"), rows.set_column(2, "content_hash", not_hex)):
        with pytest.raises(DamagedError, match="no ids and contents in it"):
            own.read_keys(part(spoiled))


def test_columns_are_told_by_a_footer(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = table.read_part(table.rows.parts()[0], None).schema
    monkeypatch.setattr(PartFiles, "read_whole", None)
    assert table.schema() == expected
