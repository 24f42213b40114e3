"""Which versions there are, how they differ, and what is deleted of those that are not kept."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from tables import CARD, CONFIGURATION, IDENTITY, SCHEMA, block, write_with_keys

import fmembed
from fmembed.errors import DamagedError, LockedError, TableError
from fmembed.rows.columns import REJECTED_SCHEMA
from fmembed.storage import Storage
from fmembed.table import versions as module
from fmembed.table.lock import Lock
from fmembed.table.records import Commit
from fmembed.table.table import Table
from fmembed.table.verify import verify
from fmembed.table.versions import diff_versions, list_files, list_versions, vacuum

DAY_S = 86_400


@pytest.fixture
def table(tmp_path: Path) -> Table:
    table = Table.open_output(str(tmp_path / "t"), IDENTITY)
    table.claim(CARD, SCHEMA, "run")
    return table


def replace_all(table: Table, ids: str, number: int, changed: str = "", topic: str = "") -> None:
    """Make a version of these rows in place of what was there, some with other values."""
    rows = block([*ids, "bad"], ("bad",), seed=number)
    for name, letters, value in (
        ("content_hash", changed, f"{number:032x}"),
        ("topic", topic, "o"),
    ):
        at = rows.schema.get_field_index(name)
        values = [value if i in letters else v for i, v in
                  zip([*ids, "bad"], rows[name].to_pylist(), strict=True)]  # fmt: skip
        rows = rows.set_column(at, rows.schema.field(at), pa.array(values, pa.string()))
    written, keys = write_with_keys(table.uri, rows)
    assert written.part is not None
    assert written.rejected is not None
    table.known()
    old = [table.rows.parts(), table.rejected.parts()]
    table.key_files.write(f"{number:06x}-0", [(keys, written.held_by)], {})
    given = (CONFIGURATION, ("run", number))
    table.rejected.commit([written.rejected], REJECTED_SCHEMA, *given, removed=old[1])
    table.rows.commit([written.part], written.schema, *given, removed=old[0])


def problems(table: Table) -> list[str]:
    return [p for p in verify(table.uri).problems if not p.startswith("no run has finished")]


def sizes(table: Table) -> dict[str, int]:
    folder = Path(table.uri)
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("part-*")}


def test_versions_are_listed_with_what_they_changed(table: Table) -> None:
    replace_all(table, "abc", 1)
    replace_all(table, "abcde", 2)
    DeltaTable(table.uri).delete("row_id = 'a'")
    newest, second, first, empty = list_versions(table.uri)
    assert [v.version for v in (newest, second, first, empty)] == [3, 2, 1, 0]
    assert [(v.rows, v.added, v.removed, v.parts) for v in (second, first, empty)] == [
        (5, 5, 3, 1), (3, 3, 0, 1), (0, 0, 0, 0),
    ]  # fmt: skip
    assert (second.run, newest.run, newest.operation) == ("run", "", "DELETE")
    assert all(v.is_whole for v in (newest, second, first))
    assert (
        first.num_bytes
        == DeltaTable(table.uri, version=1).get_add_actions()["size_bytes"][0].as_py()
    )
    assert [v.version for v in list_versions(table.uri, 2)] == [3, 2]
    (path,) = list_files(table.uri, 2)
    assert fmembed.read(table.uri, 2).num_rows == pa.parquet.read_table(path).num_rows == 5
    with pytest.raises(TableError, match="has the versions 0 to 3, not 4"):
        list_files(table.uri, 4)
    with pytest.raises(TableError, match="no such folder"):
        list_versions(table.uri + "x")


def test_versions_are_compared_by_their_rows(table: Table) -> None:
    replace_all(table, "abcd", 1)
    replace_all(table, "bcdef", 2, changed="c", topic="d")
    found = diff_versions(table.uri, 1)
    assert (found.old, found.new) == (1, 2)
    assert found.samples == {
        "new": ["e", "f"], "changed": ["c"], "relabelled": ["d"], "removed": ["a"],
    }  # fmt: skip
    assert (found.rows_new, found.rows_changed) == (2, 1)
    assert (found.rows_relabelled, found.rows_removed) == (1, 1)
    back = diff_versions(table.uri, 2, 1)
    assert back.samples["removed"] == ["e", "f"]
    assert diff_versions(table.uri, 2, 2).samples["changed"] == []
    assert len(diff_versions(table.uri, 0).samples["new"]) == 5


def test_what_only_old_versions_name_is_deleted(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 9):
        replace_all(table, "abcdefgh"[number - 1 :], number)
    (Path(table.uri) / "notes.txt").write_text("somebody's")
    before = sizes(table)
    rows = {v: fmembed.read(table.uri, v) for v in range(9)}
    # All of them are of the last 30 days.
    assert vacuum(table.uri).files == 0
    now = time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + 31 * DAY_S)
    dry = vacuum(table.uri, dry_run=True)
    assert (dry.oldest, dry.newest, dry.files) == (4, 8, 6)
    assert sizes(table) == before
    done = vacuum(table.uri)
    assert done == dry
    assert sum(before.values()) - sum(sizes(table).values()) == done.num_bytes
    for version in range(4, 9):
        assert fmembed.read(table.uri, version).equals(rows[version])
    with pytest.raises(TableError, match="are gone"):
        fmembed.read(table.uri, 3)
    assert [v.is_whole for v in list_versions(table.uri)] == [True] * 5 + [False] * 3 + [True]
    with pytest.raises(TableError, match="can no longer be compared"):
        diff_versions(table.uri, 2)
    assert problems(table) == []
    assert (Path(table.uri) / "notes.txt").exists()
    assert vacuum(table.uri).files == 0
    # By other numbers, and by those of the table's config.
    assert vacuum(table.uri, keep_versions=2, dry_run=True).oldest == 7
    assert vacuum(table.uri, keep_days=40, keep_versions=1, dry_run=True).oldest == 0
    with pytest.raises(TableError, match="at least 1 version"):
        vacuum(table.uri, keep_versions=0)
    with Lock(table.storage, "other"), pytest.raises(LockedError):
        vacuum(table.uri)


def test_a_purge_leaves_no_byte_of_a_row_that_is_gone(table: Table, tmp_path: Path) -> None:
    replace_all(table, "abc", 1)
    rows = block(["canary-9f2c"], seed=5)
    at = rows.schema.get_field_index("topic")
    rows = rows.set_column(at, rows.schema.field(at), pa.array(["canary-9f2c"]))
    written, keys = write_with_keys(table.uri, rows)
    assert written.part is not None
    table.known()
    table.rows.commit([written.part], written.schema, CONFIGURATION, ("run", 2))
    staged, keys = write_with_keys(table.uri, rows)
    table.key_files.write("aa-0", [(keys, staged.held_by)], {}, staged=CARD.fingerprint)
    write_with_keys(table.uri, rows)  # a stray
    table.put_report("<p>canary-9f2c</p>")
    table.put_probe(2, {"probe": "knn", "column": "embedding", "rows": ["canary-9f2c"]})
    quarantine = Path(table.uri, "_quarantine", "some", "part-x")
    quarantine.parent.mkdir(parents=True)
    shutil.copy(Path(table.uri, written.part.path), quarantine)
    table.known()
    table.rows.commit([], written.schema, CONFIGURATION, ("run", 3), removed=[written.part])

    def holders() -> list[Path]:
        files = [p for p in Path(table.uri).rglob("*") if p.is_file()]
        return [p for p in files if b"canary-9f2c" in _plain(p)]

    assert len(holders()) >= 5
    done = vacuum(table.uri, purge=True)
    assert holders() == []
    assert (done.oldest, done.newest) == (3, 3)
    assert sorted(fmembed.read(table.uri)["row_id"].to_pylist()) == ["a", "b", "c"]
    assert problems(table) == []
    # Its log begins where it was cut, and goes on.
    assert [v.version for v in list_versions(table.uri)] == [3]
    assert not Path(table.uri, "_delta_log", f"{0:020d}.json").exists()
    replace_all(Table(table.uri), "abcd", 4)
    assert fmembed.read(table.uri).num_rows == 4
    assert [v.version for v in list_versions(table.uri)] == [4, 3]
    assert Table.open_output(table.uri, IDENTITY).version() == 4
    assert problems(Table(table.uri)) == []


def _plain(path: Path) -> bytes:
    """What a file holds, unfolded where it is Parquet."""
    content = path.read_bytes()
    if content[:4] != b"PAR1":
        return content
    return content + repr(pa.parquet.read_table(pa.BufferReader(content)).to_pylist()).encode()


def test_a_log_is_cut_where_that_is_worth_it(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1, 9):
        replace_all(table, "abcd", number)
    rows = {v: fmembed.read(table.uri, v) for v in range(5, 9)}
    monkeypatch.setattr(module, "_FEW_ENTRIES", 3)
    now = time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + 31 * DAY_S)
    vacuum(table.uri, keep_versions=4)
    names = sorted(p.name for p in Path(table.uri, "_delta_log").glob("*.json"))
    assert names == [f"{v:020d}.json" for v in range(5, 9)]
    for version, before in rows.items():
        assert fmembed.read(table.uri, version).equals(before)
    for look in (fmembed.read, diff_versions, list_files):
        with pytest.raises(TableError, match=r"version 2 .* no longer kept; the oldest .* is 5"):
            look(table.uri, 2)
    assert problems(table) == []
    # A listing that comes back empty is still no table that is gone.
    log = Path(table.uri, "_delta_log")
    assert (log / "_last_checkpoint").exists()
    assert Table(table.uri).card() is not None


def test_who_opens_a_log_reads_few_entries(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint stands for all but the last ten, and takes no version away."""
    for number in range(1, 10):
        replace_all(table, "ab", number)
    keep: Any = {"keep_days": 30, "keep_versions": 5}
    vacuum(table.uri, **keep)
    log = Path(table.uri) / "_delta_log"
    assert not list(log.glob("*.checkpoint*"))
    for number in range(10, 14):
        replace_all(table, "ab", number)
        vacuum(table.uri, **keep)
    assert [p.name[:20] for p in log.glob("*.checkpoint*")] == [f"{10:020}"]
    assert [v.version for v in list_versions(table.uri) if v.is_whole] == [*range(13, -1, -1)]
    assert fmembed.read(table.uri, 3).num_rows == 2
    assert problems(table) == []
    assert Table(table.uri).strays() == []
    # By it alone and what came after: the older entries are there for older versions.
    for path in log.glob("*0[0-9].json"):
        path.unlink()
    assert fmembed.read(table.uri).num_rows == 2
    with pytest.raises(TableError):
        fmembed.read(table.uri, 3)


def test_an_entry_that_goes_while_it_is_read_makes_no_part_a_stray(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 4):
        replace_all(table, "ab", number)
    get = Storage.get

    def gone(self: Storage, path: str) -> bytes:
        if path.endswith("2.json"):
            raise FileNotFoundError(path)
        return get(self, path)

    monkeypatch.setattr(Storage, "get", gone)
    for look in (table.rows.ever_named, lambda: list(table.rows.replay())):
        with pytest.raises(DamagedError, match=r"2\.json went while it was read"):
            look()


def test_a_policy_that_makes_no_sense_is_none(table: Table) -> None:
    table.claim(CARD, SCHEMA, "run")
    for output, expected in (
        ({"keep_days": 3, "keep_versions": 2}, (3, 2)),
        ({"keep_days": None}, (None, 5)),
        ({"keep_days": "x"}, (30, 5)),
        ("x", (30, 5)),
    ):
        card: Any = CARD.model_copy(update={"spec": {"output": output}})
        table.card = lambda card=card: card  # type: ignore[method-assign]
        policy = module._policy_of(table)
        assert (policy.keep_days, policy.keep_versions) == expected


def test_a_purge_waits_for_a_log_that_has_lost_commits(table: Table) -> None:
    for number in (1, 2):
        replace_all(table, "abcd", number)
    last = Commit(run="run", rows=2, rejected=2, rows_version=2, rejected_version=2)
    table.put_shards(last, [])
    sorted(Path(table.uri, "_delta_log").glob("*.json"))[-1].unlink()
    before = sizes(table)
    with pytest.raises(TableError, match="no longer holds what run run has committed"):
        vacuum(table.uri, purge=True)
    assert sizes(table) == before
