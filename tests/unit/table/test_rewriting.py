"""Parts written anew, and rows that take their vectors from others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tables import CARD, CONFIGURATION, IDENTITY, SCHEMA, VECTORS, block, write_with_keys

from fmembed.errors import DamagedError
from fmembed.rows.columns import DUPLICATE
from fmembed.rows.ids import contents_of, keys_of
from fmembed.table import files
from fmembed.table.copies import FANNED_OUT, fill_copies, take_copies
from fmembed.table.files import Part
from fmembed.table.key_rows import KeyRows
from fmembed.table.rewriting import Held, plan_rewriting, rewrite
from fmembed.table.table import Table


@pytest.fixture
def table(tmp_path: Path) -> Table:
    table = Table.open_output(str(tmp_path / "t"), IDENTITY)
    table.claim(CARD, SCHEMA, "run")
    return table


def held(*sizes: tuple[int, int, int]) -> list[Held]:
    """Parts of so many bytes, rows, and live rows."""
    return [Held(f"p{i}", Part(f"p{i}", size, n), n, live) for i, (size, n, live) in
            enumerate(sizes)]  # fmt: skip


def test_only_parts_with_rows_that_are_gone_are_written_anew() -> None:
    parts = held((900, 9, 9), (900, 9, 8), (900, 9, 0), (10, 1, 1), (900, 9, 1), (100, 1, 1))
    assert [[p.path for p in g] for g in plan_rewriting(parts, 1000)] == [["p1", "p4"]]
    assert [[p.path for p in g] for g in plan_rewriting(parts, 850)] == [["p1"], ["p4"]]
    assert plan_rewriting(held((900, 9, 9)), 1000) == []


def test_many_small_parts_become_one() -> None:
    small = [(100, 1, 1)] * 7
    assert plan_rewriting(held(*small, (900, 9, 9)), 1000) == []
    (group,) = plan_rewriting(held(*small, (900, 9, 9), (100, 1, 1)), 1000)
    assert [p.path for p in group] == [*(f"p{i}" for i in range(7)), "p8"]
    groups = plan_rewriting(held(*[(100, 1, 1)] * 25), 1000)
    assert [len(g) for g in groups] == [10, 10, 5]


def test_rows_that_stay_are_the_same_bit_for_bit(table: Table) -> None:
    first, second = (write_with_keys(table.uri, block(list(ids), seed=i))[0].part
                     for i, ids in enumerate(("abcd", "ef")))  # fmt: skip
    assert first is not None
    assert second is not None
    before = pa.concat_tables([table.read_part(p, None) for p in (first, second)])
    group = [Held(first.path, first, 4, 2), Held(second.path, second, 2, 2)]
    dead = {first.path: (keys_of("bd"), np.zeros(2, dtype=np.int8))}
    made = rewrite(table.uri, group, VECTORS, CONFIGURATION, dead)
    now = table.read_part(made, None)
    assert now["row_id"].to_pylist() == ["a", "c", "e", "f"]
    assert now.equals(before.take([0, 2, 4, 5]))
    (table.storage.local / first.path).write_bytes(b"")  # type: ignore[operator]
    with pytest.raises(DamagedError):
        rewrite(table.uri, group, VECTORS, CONFIGURATION, dead)


@pytest.mark.parametrize("group_bytes", [1, 200, 2**20])
def test_parts_are_written_anew_a_row_group_at_a_time(
    group_bytes: int, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_GROUP_BYTES", group_bytes)
    ids = [f"row {i}" for i in range(50)]
    part, other = (write_with_keys(table.uri, block(some))[0].part for some in (ids, ["x"]))
    assert part is not None
    assert other is not None
    pieces = list(table.read_pieces(part))
    assert len(pieces) > 2 if group_bytes < 2**20 else len(pieces) == 1
    before = pa.concat_tables([*pieces, table.read_part(other, None)])
    assert pa.concat_tables(pieces).equals(table.read_part(part, None))
    gone = [i for i in range(50) if i % 3 or i > 40]  # the last groups have no row left
    dead = {part.path: (keys_of(ids[i] for i in gone), np.zeros(len(gone), dtype=np.int8))}
    group = [Held(part.path, part, 50, 50 - len(gone)), Held(other.path, other, 1, 1)]
    made = rewrite(table.uri, group, VECTORS, CONFIGURATION, dead)
    assert made.num_rows == 51 - len(gone)
    stays = [*sorted({*range(50)} - {*gone}), 50]
    assert table.read_part(made, None).equals(before.take(stays))
    # What is damaged after its first groups is damaged.
    local = table.storage.local
    assert local is not None
    content = bytearray((local / part.path).read_bytes())
    content[len(content) // 2] ^= 1
    (local / part.path).write_bytes(content)
    with pytest.raises(DamagedError):
        list(table.read_pieces(part))


def test_parts_of_other_columns_become_one_that_has_all(table: Table) -> None:
    """As where another tool has added a column, and later rows carry it."""
    first, second = (write_with_keys(table.uri, block(list(ids), seed=i))[0].part
                     for i, ids in enumerate(("ab", "cd")))  # fmt: skip
    assert first is not None
    assert second is not None
    more = table.read_part(second, None).append_column("added", pa.array(["v1", "v2"]))
    second = table.rows.files.write(more, VECTORS, CONFIGURATION)
    group = [Held(p.path, p, 2, 2) for p in (first, second)]
    for some, added in ((group, [None, None, "v1", "v2"]), (group[::-1], ["v1", "v2", None, None])):
        made = rewrite(table.uri, some, VECTORS, CONFIGURATION, {})
        now = table.read_part(made, None)
        assert now["added"].to_pylist() == added
        assert now["row_id"].null_count == now["embedding"].null_count == 0
    with pytest.raises(ValueError, match="columns that the part has not"):
        table.rows.files.write_pieces([more], more.schema.remove(0), VECTORS)


def test_rejected_rows_of_one_id_leave_one_by_one(table: Table) -> None:
    rows = block(["a", "b", "a", "a", "c"], bad=("b", "c"))
    written, _ = write_with_keys(table.uri, rows)
    assert written.rejected is not None
    path = f"_rejected/{written.rejected.path}"
    group = [Held(path, written.rejected, 4, 2)]
    dead = {path: (keys_of("ac"), np.array([2, 1], dtype=np.int8))}
    made = rewrite(table.uri, group, VECTORS, CONFIGURATION, dead)
    now = table.rejected.files.read_whole(made)
    assert sorted(zip(now["row_id"].to_pylist(), now["error"].to_pylist(), strict=True)) == [
        ("a", DUPLICATE), ("b", "bad JSON"),
    ]  # fmt: skip


def copies(*rows: tuple[str, str]) -> pa.Table:
    """Rows of an id and a content, marked as copies."""
    given = block([row_id for row_id, _ in rows], seed=9)
    hashes = [f"{ord(c):032x}" for _, c in rows]
    at = given.schema.get_field_index("content_hash")
    given = given.set_column(at, "content_hash", pa.array(hashes))
    at = given.schema.get_field_index("_copied")
    return take_copies([given.set_column(at, "_copied", pa.array([True] * len(rows)))])


def holders(rows: list[tuple[str, str, int, int]]) -> KeyRows:
    """An id, a content, a kind and a place each."""
    ids, contents, kinds, places = zip(*rows, strict=True)
    return KeyRows.of(
        keys_of(ids), contents_of([f"{ord(c):032x}" for c in contents]), None,
        np.array(kinds, dtype=np.int8), None, np.array(places, dtype=np.int32),
    )  # fmt: skip


def test_copies_take_the_vectors_of_their_contents(table: Table) -> None:
    parts: dict[str, Part] = {}
    for i, ids in enumerate(("ab", "cd")):
        rows = block(list(ids), seed=i)
        at = rows.schema.get_field_index("content_hash")
        rows = rows.set_column(at, "content_hash", pa.array([f"{ord(c):032x}" for c in ids]))
        part = write_with_keys(table.uri, rows)[0].part
        assert part is not None
        parts[part.path] = part
    vectors = {r["row_id"]: r["embedding"] for p in parts.values()
               for r in table.read_part(p, None).to_pylist()}  # fmt: skip
    wanted = copies(("x", "d"), ("y", "a"), ("z", "d"), ("nobody", "q"))
    known = holders([("a", "a", 0, 0), ("d", "d", 0, 1), ("c", "c", 0, 1)])
    written, keys = fill_copies(table.uri, VECTORS, CONFIGURATION, [wanted], known, parts, 1, 10**6)
    (one,) = written
    assert one.part is not None
    made = {r["row_id"]: r for r in table.read_part(one.part, None).to_pylist()}
    assert {k: r["embedding"] for k, r in made.items()} == {
        "x": vectors["d"], "y": vectors["a"], "z": vectors["d"],
    }  # fmt: skip
    assert {r["topic"] for r in made.values()} == {"t"}
    # Of these two take a vector that is not committed yet.
    assert one.counts == {FANNED_OUT: 2}
    assert sorted(keys[0].ids.tolist()) == sorted(keys_of("xyz").tolist())
    # Into parts of their size.
    several, _ = fill_copies(table.uri, VECTORS, CONFIGURATION, [wanted], known, parts, 2, 1)
    assert [w.num_rows for w in several] == [1, 1, 1]
    # A key that tells of what its part has not.
    lying = holders([("a", "a", 0, 1), ("d", "d", 0, 1)])
    with pytest.raises(DamagedError, match="no vector that its keys tell of"):
        fill_copies(table.uri, VECTORS, CONFIGURATION, [wanted], lying, parts, 2, 10**6)


def test_copies_of_what_is_rejected_are_rejected_of_the_same_cause(table: Table) -> None:
    written, _ = write_with_keys(table.uri, block(["a"], bad=("a",)))
    assert written.rejected is not None
    parts = {f"_rejected/{written.rejected.path}": written.rejected}
    known = holders([("a", "a", 1, 0)])
    (made,), (keys,) = fill_copies(
        table.uri, VECTORS, CONFIGURATION, [copies(("x", "a"), ("y", "a"))], known, parts, 0, 10**6
    )
    assert made.rejected is not None
    assert (made.part, made.num_rows, made.causes) == (None, 0, {"bad JSON": 2})
    rows = table.rejected.files.read_whole(made.rejected).to_pylist()
    assert [(r["row_id"], r["stage"], r["error"], r["message"]) for r in rows] == [
        ("x", "read", "bad JSON", "m"), ("y", "read", "bad JSON", "m"),
    ]  # fmt: skip
    assert keys.kinds.tolist() == [1, 1]
    none = [copies(("x", "a")).slice(0, 0)]
    assert fill_copies(table.uri, VECTORS, CONFIGURATION, none, known, parts, 0, 1) == ([], [])
