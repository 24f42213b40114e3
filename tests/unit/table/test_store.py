"""A store: its pointer, what its readers get, and what no retention takes away."""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path
from typing import Any

import gated
import pyarrow as pa
import pytest

import fmembed
from fmembed.errors import ConflictError, StorageError, TableError
from fmembed.storage import Storage
from fmembed.table import log as log_module
from fmembed.table import promoted as module
from fmembed.table import store as store_module
from fmembed.table.promoted import find_version, read_found
from fmembed.table.store import Store, dataset_of
from fmembed.table.table import Table
from fmembed.table.versions import tidy, vacuum


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """With two tables, of two versions and of one."""
    made = Store(str(tmp_path / "store"))
    made.make()
    for seed in (0, 1):
        gated.add_version(Path(made.uri_of("one")), gated.rows(30 + seed, seed=seed))
    gated.add_version(Path(made.uri_of("two")), gated.rows(50), model="w2")
    return made


def test_a_reader_gets_what_is_promoted_and_nothing_before_that(store: Store) -> None:
    with pytest.raises(TableError, match=r"nothing is promoted yet .* its tables: one, two"):
        fmembed.read(store.uri)
    first = store.promote("one", 1, "the first", over=None)
    assert (first.generation, first.before, first.rows) == (1, 0, 30)
    assert fmembed.read(store.uri).num_rows == 30
    assert len(fmembed.open(store.uri)) == 30
    second = store.promote("two", 1, "another model", over=first)
    assert fmembed.read(store.uri).num_rows == 50
    assert [p.generation for p in store.history(9)] == [2, 1]
    assert second.by
    assert fmembed.files(store.uri)[0].startswith(store.uri_of("two"))
    assert fmembed.open(store.uri).info().fingerprint == second.fingerprint
    with pytest.raises(TableError, match="is a store, which is read at what is promoted"):
        fmembed.read(store.uri, 1)
    with pytest.raises(TableError, match="is a store of tables; name one of them: one, two"):
        Table.open(store.uri)


def test_a_read_looks_at_the_log_once_and_what_is_open_each_time(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 ms a look here, and several requests where it is far."""
    store.promote("one", 2, "the second", over=None)
    looks, look = list[str](), log_module.DeltaTable

    def counted(uri: str, *args: Any, **options: Any) -> Any:
        looks.append(uri)
        return look(uri, *args, **options)

    monkeypatch.setattr(log_module, "DeltaTable", counted)
    assert fmembed.read(store.uri).num_rows == 31
    assert len(looks) == 1
    opened = fmembed.open(store.uri_of("one"))
    gated.add_version(Path(store.uri_of("one")), gated.rows(40, seed=3))
    assert len(opened) == 31  # of the version that was opened
    assert fmembed.read(store.uri_of("one")).num_rows == 40
    assert fmembed.read(store.uri).num_rows == 31


def test_a_reader_can_insist_on_a_fingerprint(store: Store) -> None:
    pointer = store.promote("one", 1, "the first", over=None)
    table = store.uri_of("one")
    for uri in (store.uri, table):
        assert fmembed.read(uri, fingerprint=pointer.fingerprint).num_rows >= 30
        assert len(fmembed.open(uri, fingerprint=pointer.fingerprint[:12]))
        with pytest.raises(TableError, match="was made by"):
            fmembed.read(uri, fingerprint="0" * 32)
        with pytest.raises(TableError, match="takes all of it, or at least 12 letters, got"):
            fmembed.read(uri, fingerprint=pointer.fingerprint[:4])


def test_rolling_back_goes_to_what_was_before_and_further(store: Store) -> None:
    with pytest.raises(TableError, match="nothing was promoted yet"):
        store.rollback("why")
    first = store.promote("one", 1, "first", over=None)
    with pytest.raises(TableError, match="before what is now"):
        store.rollback("why")
    second = store.promote("one", 2, "second", over=first)
    store.promote("two", 1, "third", over=second)
    back = store.rollback("worse")
    assert (back.table, back.version, back.kind, back.why) == ("one", 2, "rollback", "worse")
    assert store.rollback("still").version == 1
    assert store.rollback("after all", to=3).table == "two"
    with pytest.raises(TableError, match="no generation 77"):
        store.rollback("why", to=77)
    digest = Table.open(store.uri_of("one")).digest
    assert store.was_left("one", 2, digest(2))
    assert not store.was_left("two", 1, Table.open(store.uri_of("two")).digest(1))


def test_of_two_that_promote_at_once_one_does(store: Store) -> None:
    first = store.promote("one", 1, "first", over=None)
    done, barrier = [], threading.Barrier(8)

    def promote(version: int) -> None:
        barrier.wait()
        with contextlib.suppress(ConflictError):
            done.append(store.promote("one", 1 + version % 2, f"by {version}", over=first))

    threads = [threading.Thread(target=promote, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 1
    assert store.current() == done[0]


def test_retention_keeps_what_is_promoted_and_what_was_before(store: Store) -> None:
    table = store.uri_of("one")
    for seed in range(2, 6):
        gated.add_version(Path(table), gated.rows(30 + seed, seed=seed))
    first = store.promote("one", 2, "first", over=None)
    store.promote("one", 3, "second", over=first)
    vacuum(table, keep_days=0, keep_versions=1)
    assert fmembed.read(store.uri).num_rows == 32
    assert fmembed.read(table, 2).num_rows == 31
    with pytest.raises(TableError):
        fmembed.read(table, 1)
    assert store.rollback("worse").version == 2
    with pytest.raises(TableError, match="has version 2 promoted, and the newest is 6"):
        vacuum(table, purge=True)
    store.promote("one", 6, "third", over=store.current())
    vacuum(table, purge=True)
    assert fmembed.read(store.uri).num_rows == 35
    with pytest.raises(TableError):
        store.rollback("to what is gone")
    assert fmembed.read(store.uri).num_rows == 35


def test_what_is_gone_or_another_one_is_not_promoted(store: Store) -> None:
    for part in Table.open(store.uri_of("one")).rows.parts(1):
        (Path(store.uri_of("one")) / part.path).unlink()
    with pytest.raises(TableError, match="are gone, as after a vacuum"):
        store.promote("one", 1, "first", over=None)
    with pytest.raises(TableError, match="has no table 'three'; it has one, two"):
        store.promote("three", 1, "first", over=None)
    with pytest.raises(TableError, match="has the versions 0 to 1, not 7"):
        store.promote("two", 7, "first", over=None)
    with pytest.raises(TableError, match="has no row"):
        store.promote("two", 0, "first", over=None)
    assert store.current() is None


def test_a_log_that_was_made_anew_is_not_what_was_promoted(store: Store) -> None:
    store.promote("two", 1, "first", over=None)
    path = Path(store.uri) / "CURRENT/00000001.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "parts": "0" * 32}))
    with pytest.raises(TableError, match="is another one than was promoted"):
        fmembed.read(store.uri)
    path.write_text("{}")
    with pytest.raises(StorageError, match="is not as it was written; delete it"):
        fmembed.read(store.uri)


def test_a_reader_whose_version_is_taken_away_reads_what_came_after(store: Store) -> None:
    first = store.promote("one", 1, "first", over=None)
    looks = 0

    def read(found: module.Found) -> pa.Table:
        nonlocal looks
        looks += 1
        if looks == 1:
            store.promote("two", 1, "second", over=first)
            raise FileNotFoundError("part")
        return fmembed.read(found.table.uri, found.version)

    assert read_found(lambda: find_version(store.uri), read).num_rows == 50
    assert looks == 2

    def fails(_: module.Found) -> None:
        raise TableError("table: damaged")

    with pytest.raises(TableError, match="damaged"):
        read_found(lambda: find_version(store.uri), fails)


def test_old_generations_go_and_a_slow_one_is_refused(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_KEPT", 6)
    pointers = [store.promote("one", 1, "0", over=None)]
    for i in range(1, 10):
        pointers.append(store.promote("one", 1 + i % 2, str(i), over=pointers[-1]))
    assert [p.generation for p in store.history(99)] == [10, 9, 8, 7, 6, 5]
    with pytest.raises(ConflictError, match="has moved on meanwhile"):
        store.promote("two", 1, "slow", over=pointers[0])
    assert store.current() == pointers[-1]


def test_a_folder_that_is_no_store_is_not_made_one(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TableError, match=r"is not empty \(there is notes.txt\) and no store"):
        Store(str(tmp_path)).check_usable()
    with pytest.raises(TableError, match="is a file"):
        Store(str(tmp_path / "notes.txt")).check_usable()
    with pytest.raises(TableError, match="is no store; fmembed refresh --store makes one"):
        Store.open(tmp_path)
    assert Store.find(tmp_path / "nowhere") is None


def test_what_the_gate_said_is_of_these_parts(store: Store) -> None:
    store.put_gate("one", 2, {"passed": True, "words": "fine"})
    told = store.gate_record("one", 2)
    assert told == {
        "passed": True, "words": "fine", "over": None, "checks": [], "seconds": 0.0, "asked": "",
    }  # fmt: skip
    assert store.gate_record("one", 1) is None
    path = "_gates/one-00000002.json"
    Storage(store.uri).put(path, b'{"passed": true, "parts": "other"}')
    assert store.gate_record("one", 2) is None
    Storage(store.uri).put(path, b"no JSON")
    assert store.gate_record("one", 2) is None


def test_names_of_tables_are_fit_for_a_folder(store: Store) -> None:
    """And are not the same for datasets that are not."""
    made = "0123456789abcdef"
    assert store.name("articles", made) == "articles-0123456789ab"
    assert store.name("my articles / 2026", made).startswith("my-articles-2026-")
    names = ("a b", "a_b", "новости", "データ", "..", "x" * 40, "x" * 41)
    assert len({store.name(name, made) for name in names}) == len(names)
    assert dataset_of(store.name("a", made)) == "a"


def test_a_store_tells_what_its_tables_have_and_what_is_kept(store: Store) -> None:
    table = gated.add_version(Path(store.uri_of("one")), gated.rows(40, num_rejected=3))
    store.promote("one", 3, "first", over=None)
    tidy(table, 0, 1)
    (kept, other) = store.tables()
    assert (kept.name, kept.version, kept.rows, kept.rows_rejected) == ("one", 3, 40, 3)
    assert (kept.pinned, other.pinned) == ((3,), ())
