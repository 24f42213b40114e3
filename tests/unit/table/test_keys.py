"""The files of keys: what a run knows by them is what the parts hold, whatever becomes of them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tables import CARD, CONFIGURATION, IDENTITY, SCHEMA, block, write_with_keys

from fmembed.errors import DamagedError
from fmembed.rows.columns import REJECTED_SCHEMA
from fmembed.rows.ids import contents_of, keys_of, to_keys
from fmembed.storage import Storage
from fmembed.table import keys as module
from fmembed.table.key_rows import KeyCounts, KeyRows, find_twins, is_in_bucket
from fmembed.table.keys import KeyFile, KeyFiles
from fmembed.table.known import _MAX_TWINS, KnownRows
from fmembed.table.repair import repair
from fmembed.table.table import Table
from fmembed.table.verify import verify


def rows(ids: str, kind: int = 0, shard: int = -1) -> KeyRows:
    """Keys of rows named by letters, of which each has its own content."""
    contents = contents_of(f"{ord(i):032x}" for i in ids)
    kinds, shards = np.full(len(ids), kind, np.int8), np.full(len(ids), shard, np.int32)
    return KeyRows.of(keys_of(ids), contents, None, kinds, shards)


def commit(table: Table, ids: str, bad: str = "", twins: str = "", number: int = 0) -> str:
    """As a run commits; the file of keys."""
    table.known()
    some = frozenset(keys_of(twins).tolist())
    written, keys = write_with_keys(table.uri, block([*ids], tuple(bad), seed=number), some)
    path = table.key_files.write(f"0123ab-{number}", [(keys, written.held_by)], {})
    assert path is not None
    if written.rejected is not None:
        table.rejected.commit([written.rejected], REJECTED_SCHEMA, CONFIGURATION, ("run", number))
    if written.part is not None:
        table.rows.commit([written.part], written.schema, CONFIGURATION, ("run", number))
    return path


@pytest.fixture
def table(tmp_path: Path) -> Table:
    table = Table(str(tmp_path / "t"))
    table.known()
    table.claim(CARD, SCHEMA, "run")
    return table


def is_known(table: Table, ids: str) -> list[bool]:
    return list(table.known().load().contains(keys_of(ids)).tolist())


def problems(table: Table) -> list[str]:
    """What `verify` says of a table that no run has finished."""
    return [p for p in verify(table.uri).problems if not p.startswith("no run has finished")]


def test_what_is_known_is_what_is_committed(table: Table) -> None:
    commit(table, "abcx", "x")
    known = table.known()
    assert (known.missing, known.num_rows, len(known.sets)) == ((), 4, 1)
    assert is_known(table, "abcxd") == [True] * 4 + [False]
    commit(table, "dea", twins="a", number=1)
    known = table.known()
    assert (known.missing, known.num_rows, len(known.sets)) == ((), 7, 2)
    assert sorted(known.which_are_embedded(keys_of("axd?")).tolist()) == sorted(
        keys_of("ad").tolist()
    )
    # Of a file that no commit has followed nothing is known.
    written, keys = write_with_keys(table.uri, block(["z"]))
    table.key_files.write("dead00-0", [(keys, written.held_by)], {})
    assert is_known(table, "abcdexz") == [True] * 6 + [False]
    assert problems(table) == [f"{written.part.path}: a stray file that no commit names"]
    table.remove_strays("run")
    assert problems(table) == []


def test_contents_of_twins_and_of_rejected_rows(table: Table) -> None:
    uri = table.uri
    table.known()
    first, second = (write_with_keys(uri, block(["a", "b"], bad, seed=i)) for i, bad in
                     enumerate([(), ("b",)]))  # fmt: skip
    given = [
        KeyRows.of(keys.ids, contents_of(["0" * 31 + c, "0" * 31 + d]), None, kinds)
        for (_, keys), c, d, kinds in (
            (first, "1", "2", np.array([0, 1], np.int8)),
            (second, "3", "4", np.array([2, 1], np.int8)),
        )
    ]
    held = [{"embedded": first[0].part.path}, {"twin": "_rejected/none", "rejected": "_rejected/x"}]
    table.key_files.write("0123ab-0", list(zip(given, held, strict=True)), {})
    parts = {first[0].part.path: first[0].part, "_rejected/none": None, "_rejected/x": None}
    files = tuple(table.key_files.list()[0])
    told_by = dict.fromkeys(parts, files[0].path)
    ids = KnownRows(uri, files, parts, (), told_by=told_by).load()
    asked = keys_of("aaab")
    now = contents_of(["0" * 31 + c for c in "1352"])
    # A row has not changed whose content any row of its id had; of a rejected one none is known.
    assert ids.changed(asked, now).tolist() == [False, False, True, False]
    assert ids.contains(asked).all()
    # A twin alone is no reason to take its id for known.
    del told_by[first[0].part.path]
    alone = KnownRows(uri, files, parts, (), told_by=told_by).load()
    assert alone.contains(keys_of("ab")).tolist() == [False, True]


@pytest.mark.parametrize("group_rows", [1, 7, 2**20])
def test_a_file_is_sorted_in_buckets_of_the_same_first_bits(
    group_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: Table
) -> None:
    monkeypatch.setattr(module, "_GROUP_ROWS", group_rows)
    ids = [f"row-{i}" for i in range(100)]
    n = len(ids)
    given = KeyRows.of(
        keys_of(ids), contents_of([f"{i:032x}" for i in range(n)]), np.arange(n),
        shards=np.arange(n, dtype=np.int32) % 3 - 1,
    )  # fmt: skip
    path = table.key_files.write("0123ab-0", [(given, {"embedded": "p"})], {0: "zero", 1: "one"})
    assert path is not None
    (file,), damaged = table.key_files.list()
    assert damaged == []
    groups = [g for g in table.key_files.read(file, file.files[0]) if len(g)]
    assert group_rows > n or len(groups) > n // group_rows / 2
    found = np.concatenate([g.ids for g in groups])
    assert found.tolist() == sorted(given.ids.tolist())
    assert file.parts == (("p", (n, 0, 0, 0)),)
    assert sorted(file.counts) == [(0, -1, 34), (0, 0, 33), (0, 1, 33)]
    whole = pq.read_table(Path(table.uri, path))
    shards = {
        key: None if shard == -1 else file.shards[shard]
        for key, shard in zip(
            to_keys(whole["id"]).tolist(), whole["shard"].to_pylist(), strict=True
        )
    }
    expected = dict(zip(given.ids.tolist(), [None, "zero", "one"] * 34, strict=False))
    assert shards == expected
    contents = dict(zip(to_keys(whole["id"]).tolist(), to_keys(whole["content"]).tolist(),
                        strict=True))  # fmt: skip
    assert contents == dict(zip(given.ids.tolist(), given.contents.tolist(), strict=True))
    carried = dict(zip(to_keys(whole["id"]).tolist(), whole["carried"].to_pylist(), strict=True))
    assert carried == dict(zip(given.ids.tolist(), range(n), strict=True))
    # A twin is found in whichever bucket.
    twins = find_twins(table.key_files.embedded([path]), [rows("a"), given[np.array([5, 50])]])
    assert twins == {1: frozenset(given.ids[[5, 50]].tolist())}


def test_twins_are_found_among_writes_and_in_what_the_run_has_committed(table: Table) -> None:
    def twins(paths: list[str], *given: KeyRows) -> dict[int, str]:
        found = find_twins(table.key_files.embedded(paths), given)
        names = {keys_of(i)[0]: i for i in "abcdexy"}
        return {i: "".join(sorted(names[key] for key in keys)) for i, keys in found.items()}

    assert twins([]) == {}
    assert twins([], rows("ab"), rows("cd")) == {}
    # The first one stays.
    assert twins([], rows("ab"), rows("bc"), rows("cb")) == {1: "b", 2: "bc"}
    # Rejected rows are no twins.
    assert twins([], rows("ab"), rows("ab", kind=1), rows("b", kind=2)) == {}
    path = commit(table, "aby", "y")
    assert twins([path], rows("cd"), rows("aey")) == {1: "a"}
    assert twins([], rows("cd"), rows("aey")) == {}


@pytest.mark.parametrize(
    "spoil",
    [
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("no Parquet"),
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(path.read_bytes().replace(b'{"parts"', b'{"pants"')),
        # A page, whose checksum then is another one.
        lambda path: path.write_bytes(path.read_bytes().replace(keys_of("a")[0], b"?" * 16)),
    ],
)
def test_without_a_file_the_parts_are_read(
    spoil: Callable[[Path], object], table: Table, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [commit(table, "abx", "x"), commit(table, "cdy", "y", number=1)]
    there = []
    for path in (Path(table.uri, path) for path in paths):
        before = path.read_bytes()
        spoil(path)
        if path.exists() and path.read_bytes() != before:
            there.append(f"_keys/{path.name}")
    assert is_known(table, "abcdxye") == [True] * 6 + [False]
    # A run that goes on finds what it has committed in the table itself.
    with pytest.raises(DamagedError, match="not readable"):
        list(table.key_files.embedded(paths))
    assert len(find_twins(table.known().embedded(), [rows("aez")])[0]) == 1
    # It is said, and the next run or `verify --repair` puts the file aside.
    told = [p for p in problems(table) if "not the keys of its parts' rows" in p]
    assert sorted(told) == sorted(p for path in there for p in told if p.startswith(path))
    assert len(told) == len(there)
    if there:
        assert repair(table.uri)
    table = Table(table.uri)
    table.known()
    assert table.clean_up(IDENTITY, "0123ab", False) is True
    known = table.known()
    assert (known.missing, known.damaged, known.num_rows) == ((), (), 6)
    assert is_known(table, "abcdxye") == [True] * 6 + [False]
    assert not [p for p in problems(table) if "keys" in p]
    assert table.clean_up(IDENTITY, "0123ab", False) is False


@pytest.mark.slow
def test_whatever_bit_of_a_file_is_flipped_the_same_rows_are_known(table: Table) -> None:
    path = Path(table.uri, commit(table, "abx", "x"))
    content = bytearray(path.read_bytes())
    for bit in range(0, 8 * len(content), 41):
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        known = table.known()
        assert known.num_rows == 3
        assert known.load().contains(keys_of("abxc")).tolist() == [True, True, True, False]
        known.find_wrong()
        content[bit // 8] ^= 1 << bit % 8


def test_what_somebody_else_commits_before_the_lock_is_looked_for_again(table: Table) -> None:
    commit(table, "ab")
    late = Table(table.uri)
    late.known()
    assert late.clean_up(IDENTITY, "0123ab", False) is False
    commit(table, "cd", number=1)
    assert late.clean_up(IDENTITY, "0123ab", False) is True
    assert late.clean_up(IDENTITY, "0123ab", False) is False


def test_an_id_of_very_many_rows_is_looked_up_as_fast_as_another(table: Table) -> None:
    commit(table, "ab")
    (part,) = table.rows.parts()
    n = 50_000
    twins = KeyRows.of(
        np.repeat(keys_of("a"), n), contents_of(f"{i:032x}" for i in range(n)), None,
        np.full(n, 2, np.int8),
    )  # fmt: skip
    path = table.key_files.write("0123ab-9", [(twins, {"twin": "_rejected/x"})], {})
    assert path is not None
    files = tuple(table.key_files.list()[0])
    parts = {part.path: part, "_rejected/x": part}
    told_by = {path: f.path for f in files for path in f.rows_by_part}
    known = KnownRows(table.uri, files, parts, (), told_by=told_by)
    ids = known.load()
    assert len(ids) < 3 + _MAX_TWINS
    asked = np.repeat(keys_of("a"), 1000)
    assert ids.contains(asked).all()
    # Of so many contents none is known.
    assert not ids.changed(asked, contents_of(["ff" * 16] * 1000)).any()
    assert ids.contains(keys_of("bz")).tolist() == [True, False]


def test_files_without_a_row_are_not_written_and_those_left_over_are_removed(table: Table) -> None:
    assert table.key_files.write("0123ab-0", [(rows(""), {})], {}) is None
    path = commit(table, "ab")
    half = Path(table.uri, f"{path}#0123abcd.tmp")
    half.write_bytes(b"half")
    foreign = Path(table.uri, "_keys", "notes.parquet")
    foreign.write_bytes(b"somebody's")
    (part,) = table.rows.parts()
    table.rows.commit([], SCHEMA, CONFIGURATION, ("gone", 0), removed=[part])
    table.clean_up(IDENTITY, "0123ab", False)
    assert Path(table.uri, path).exists()  # an older version has its part
    Path(table.uri, part.path).unlink()  # as by a vacuum
    table.clean_up(IDENTITY, "0123ab", False)
    assert sorted(p.name for p in Path(table.uri, "_keys").iterdir()) == ["notes.parquet"]
    assert foreign.read_bytes() == b"somebody's"


def test_wrong_keys_are_found_and_mended(table: Table) -> None:
    path = commit(table, "ab")
    written, keys = write_with_keys(table.uri, block(["a", "c"]))
    assert written.part is not None
    (part,) = table.rows.parts()
    table.storage.delete(written.part.path)
    # Whole, and of a row that is not in the part: by it, "c" would never be embedded.
    table.storage.delete(path)
    wrong = table.key_files.write("0123ab-0", [(keys, {"embedded": part.path})], {})
    assert wrong is not None
    assert is_known(table, "abc") == [True, False, True]
    assert any("not the keys of its parts' rows" in p for p in problems(table))
    assert any(wrong in line for line in repair(table.uri))
    assert is_known(Table(table.uri), "abc") == [True, True, False]
    assert not any("keys" in p for p in problems(table))


def test_a_missing_part_is_said_by_one_listing(table: Table) -> None:
    commit(table, "ab")
    (part,) = table.rows.parts()
    path = Path(table.uri, part.path)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(DamagedError, match=rf"{part.path}: {len(content) - 1} bytes where"):
        table.known()
    path.unlink()
    with pytest.raises(DamagedError, match=f"{part.path}: committed, but missing"):
        table.known()
    assert KeyFiles(table.storage).list()[0]


def as_set(known: KnownRows, rows: KeyRows, version: int, num_buckets: int = 2) -> list[str]:
    """Write all rows of a version as a set, a file a bucket; each row is of the shard "new"."""
    files, of_set = KeyFiles(Storage(known.uri)), f"{version:06x}"
    rows = replace(rows, shards=np.zeros(len(rows), dtype=np.int32))
    buckets = [
        files.write_bucket(of_set, rows[is_in_bucket(rows.ids, i, num_buckets)], i, num_buckets)
        for i in range(num_buckets)
    ]
    counts = KeyCounts.of(rows)
    index = files.write_index(of_set, known.paths, ["new"], counts, version, buckets)
    return [index, *(file.path for file in buckets)]


def all_rows(table: Table, num_buckets: int = 1) -> KeyRows:
    known = table.known(with_staged=True)
    return KeyRows.join([known.read_bucket(i, num_buckets, {}) for i in range(num_buckets)])


@pytest.mark.parametrize("num_buckets", [1, 2, 8])
def test_a_bucket_is_read_from_whatever_tells_of_it(table: Table, num_buckets: int) -> None:
    commit(table, "abcx", "x")
    commit(table, "defghijk", twins="", number=1)
    known = table.known()
    assert known.paths[:2] == [p.path for p in table.rows.parts()]
    rows = all_rows(table, num_buckets)
    assert sorted(rows.ids.tolist()) == sorted(keys_of("abcxdefghijk").tolist())
    assert rows.kinds[rows.ids == keys_of("x")[0]].tolist() == [1]
    for i in range(num_buckets):
        some = known.read_bucket(i, num_buckets, {})
        assert is_in_bucket(some.ids, i, num_buckets).all()
        assert some.places.tolist() == sorted(some.places.tolist())
    # The same from the parts, where there is no file.
    for path in Path(table.uri, "_keys").iterdir():
        path.unlink()
    again = all_rows(table, num_buckets)
    assert sorted(again.ids.tolist()) == sorted(rows.ids.tolist())


def test_the_newest_set_tells_where_rows_were_found_last(table: Table) -> None:
    commit(table, "abcx", "x")
    commit(table, "defg", number=1)
    before = all_rows(table)
    known = table.known()
    assert known.count_by_shard() == {}
    files = as_set(known, before, version=7)
    assert len(files) == 3
    known = table.known()
    assert (known.missing, known.num_rows) == ((), 8)
    assert known.count_by_shard() == {"new": 8}
    assert [keys.paths for keys in known.sets] == [files]
    after = known.read_bucket(0, 1, {"new": 5})
    assert set(after.shards.tolist()) == {5}
    order = [np.argsort(rows.ids) for rows in (before, after)]
    for name in ("ids", "contents", "kinds"):
        both = [getattr(r, name)[o].tolist() for r, o in zip((before, after), order, strict=True)]
        assert both[0] == both[1]
    assert known.find_wrong() == []
    # A set of which a file is gone, or is of another version's parts, does not tell of them.
    as_set(known, after[after.places == 0], version=9)
    assert table.known().count_by_shard() == {"new": 8}
    # Rows that came after it.
    commit(table, "h", number=2)
    known = table.known()
    assert (known.missing, known.num_rows, known.count_by_shard()["new"]) == ((), 9, 8)
    assert len(all_rows(table, 4)) == 9
    table.key_files.keep_only(files)
    assert [keys.paths for keys in table.key_files.list()[0]] == [files]
    assert len(table.known().missing) == 1
    assert len(all_rows(table)) == 9
    # One that is damaged: of its bucket the parts are read.
    Path(table.uri, files[1]).write_bytes(b"")
    assert len(all_rows(table)) == len(all_rows(table, 4)) == 9
    assert is_known(table, "abcxdefghz") == [True] * 9 + [False]


def test_what_a_killed_refresh_leaves_of_a_set_tells_of_nothing_and_goes(table: Table) -> None:
    commit(table, "abcdefgh")
    before = all_rows(table)
    whole = as_set(table.known(), before, version=3)
    for gone in range(3):
        half = as_set(table.known(), before, version=9)
        Path(table.uri, half[gone]).unlink()
        known = table.known()
        assert ([keys.paths for keys in known.sets], known.damaged) == ([whole], ())
        assert known.find_wrong() == []
        table.clean_up(IDENTITY, "0123ab", False)
        assert not any(Path(table.uri, path).exists() for path in half)
    # An index that cannot be read: its files are of no use, and the parts are read.
    Path(table.uri, whole[0]).write_text(Path(table.uri, whole[0]).read_text()[:-1])
    table.key_files.keep_only(whole)
    known = table.known()
    assert (known.sets, known.damaged, len(known.missing)) == ((), (whole[0],), 1)
    assert is_known(table, "abcdefghz") == [True] * 8 + [False]
    table.clean_up(IDENTITY, "0123ab", False)
    assert not any(Path(table.uri, path).exists() for path in whole)
    assert table.known().missing == ()


def test_a_set_that_no_commit_followed_tells_of_the_parts_that_no_other_does(table: Table) -> None:
    """A refresh was killed before its commit: parts that it was about to add are not there."""
    commit(table, "abcd")
    commit(table, "efgh", number=1)
    known, before = table.known(), all_rows(table)
    whole = as_set(known, before, version=3)
    files = KeyFiles(Storage(table.uri))
    moved = replace(before, shards=np.where(before.places == 0, 1, 0).astype(np.int32))
    bucket = files.write_bucket("000009", moved, 0, 1)
    paths = ["part-of-the-killed.parquet", known.paths[1]]
    counts = KeyCounts.of(moved)
    index = files.write_index("000009", paths, ["new", "other"], counts, 4, [bucket])
    assert [keys.paths for keys in table.known().sets] == [whole]
    assert table.known().count_by_shard() == {"new": 8}
    files.keep_only([index, bucket.path])
    known = table.known()
    assert known.missing == (known.paths[0],)
    assert known.count_by_shard() == {"new": 4}
    assert len(all_rows(table)) == 8


def test_what_files_of_a_set_have_in_common_is_written_once(table: Table) -> None:
    commit(table, "abcdefgh")
    known, some = table.known(), all_rows(table)
    files = KeyFiles(Storage(table.uri))
    shards = [f"{i:032x}" for i in range(500)]
    buckets = [files.write_bucket("aa", some, i, 8) for i in range(8)]
    index = files.write_index("aa", known.paths, shards, KeyCounts.of(some), 3, buckets)
    sizes = [Path(table.uri, file.path).stat().st_size for file in buckets]
    assert max(sizes) < 3000 < 500 * 32 < Path(table.uri, index).stat().st_size


@pytest.mark.parametrize(
    "wrong",
    [
        lambda told: told["files"][1].__setitem__(1, [3, 4]),
        lambda told: told["files"].pop(2),
        lambda told: told["files"].append(told["files"][0]),
        lambda told: told["files"][0].__setitem__(2, 99),
        lambda told: told["counts"].pop(),
        lambda told: told["parts"].append(told["parts"][0]),
        lambda told: told.__setitem__("files", []),
        lambda told: told.__setitem__("set", "abc"),
    ],
)  # fmt: skip
def test_an_index_that_contradicts_itself_is_damaged(
    wrong: Callable[[Any], object], table: Table
) -> None:
    commit(table, "abcdefghijklm")
    index, *_ = as_set(table.known(), all_rows(table), 3, num_buckets=4)
    told = json.loads(table.storage.get(index))
    wrong(told)
    table.storage.put(index, json.dumps(told).encode())
    known = table.known()
    assert known.damaged == (index,)
    assert is_known(table, "abcdefghijklmz") == [True] * 13 + [False]


def test_what_is_not_named_as_ours_is_left_alone(table: Table) -> None:
    path = commit(table, "ab")
    folder = Path(table.uri, "_keys")
    names = (
        "notes.json",
        "abc-notes.json",
        "abc-bucket-1-ab.parquet",
        "abc-1.parquet",
        "x.parquet",
    )
    for name in names:
        (folder / name).write_text("somebody's")
    known = table.known()
    assert (known.damaged, known.find_wrong()) == ((), [])
    table.clean_up(IDENTITY, "0123ab", False)
    table.key_files.keep_only([path])
    assert sorted(p.name for p in folder.iterdir()) == sorted([*names, Path(path).name])


def test_rows_are_counted_by_part_kind_and_shard(table: Table) -> None:
    draws = np.random.default_rng(0)
    n = 1000
    ids = keys_of([f"{i}" for i in range(n)])
    kinds, shards = draws.integers(0, 4, n, np.int8), draws.integers(-1, 5, n, np.int32)
    some = KeyRows.of(ids, None, None, kinds, shards, draws.integers(0, 3, n, np.int32))
    pieces = [KeyCounts.of(some[slice(i, i + 300)]) for i in range(0, n, 300)]
    counts = KeyCounts.join(*pieces)
    by_part = [tuple(int(((some.places == p) & (kinds == k)).sum()) for k in range(4))
               for p in range(4)]  # fmt: skip
    assert counts.by_part(4) == by_part
    pairs = Counter(zip(some.places.tolist(), shards.tolist(), strict=True))
    assert {(p, s): n for p, s, n in counts.by_part_and_shard()} == pairs


def test_a_damaged_file_of_a_set_is_made_up_for_by_its_bucket_alone(table: Table) -> None:
    commit(table, "abcdefgh")
    files = as_set(table.known(), all_rows(table), version=3)
    path = Path(table.uri, files[1])
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    rows = all_rows(table)
    assert sorted(rows.ids.tolist()) == sorted(keys_of("abcdefgh").tolist())
    assert sum(len(some) for some in table.known().read()) == 8
    assert table.known().find_wrong() == [files[1]]


def test_what_is_staged_is_no_stray_and_is_known_to_who_asks(table: Table) -> None:
    commit(table, "ab")
    written, keys = write_with_keys(table.uri, block(["c", "d"], ("d",)))
    held = [(keys, written.held_by)]
    path = table.key_files.write("0123ab-9", held, {}, staged=CARD.fingerprint)
    assert path is not None
    assert table.strays() == []
    assert len(table.known().paths) == 1
    known = table.known(with_staged=True)
    assert list(known.parts) == [p.path for p in table.rows.parts()]
    assert set(known.staged) == set(written.held_by.values())
    assert sorted(all_rows(table).ids.tolist()) == sorted(keys_of("abcd").tolist())
    assert is_known(table, "abcd") == [True, True, False, False]
    # Of another model nothing is taken up.
    other = table.key_files.write("0123ab-8", held, {}, staged="other")
    assert len(table.known(with_staged=True).sets) == 2
    table.drop_staged()
    assert table.known(with_staged=True).staged == {}
    assert not Path(table.uri, path).exists()
    assert other is not None
    assert not Path(table.uri, other).exists()
    assert problems(table) == []
    assert not [p for p in Path(table.uri).rglob("part-*") if p.name in str(written)]


def test_a_staged_part_that_is_gone_or_committed_is_not_staged(table: Table) -> None:
    commit(table, "ab")
    written, keys = write_with_keys(table.uri, block(["c"]))
    assert written.part is not None
    held = [(keys, written.held_by)]
    table.key_files.write("0123ab-9", held, {}, staged=CARD.fingerprint)
    table.known()
    table.rows.commit([written.part], written.schema, CONFIGURATION, ("run", 5))
    known = table.known(with_staged=True)
    assert (known.staged, known.missing) == ({}, (written.part.path,))
    table.drop_staged()
    assert is_known(table, "abc") == [True] * 3
    gone, keys = write_with_keys(table.uri, block(["z"]))
    table.key_files.write("0123ab-7", [(keys, gone.held_by)], {}, staged=CARD.fingerprint)
    assert gone.part is not None
    Path(table.uri, gone.part.path).unlink()
    assert table.known(with_staged=True).staged == {}


def test_a_forged_file_has_nothing_deleted_that_no_run_has_written(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(table, "ab")
    mine = tmp_path / "mine.txt"
    mine.write_text("somebody's")
    (Path(table.uri) / "notes.parquet").write_text("somebody's")
    for name in ("../mine.txt", str(mine), "notes.parquet", "_delta_log/00000000000000000000.json"):
        held = [(rows("z"), {"embedded": name})]
        with monkeypatch.context() as patch:
            patch.setattr(module, "PART", re.compile(".*", re.DOTALL))
            path = table.key_files.write("0123ab-9", held, {}, staged=CARD.fingerprint)
        assert path is not None
        assert table.staged() == []
        table.drop_staged()
        assert table.known(with_staged=True).damaged == (path,)
        Path(table.uri, path).unlink()
        # An index that names it: of a set of which no part is there all files go.
        with monkeypatch.context() as patch:
            patch.setattr(module, "_BUCKET", re.compile(".*", re.DOTALL))
            forged = [KeyFile(name, (0, 1), 1)]
            counts = KeyCounts.of(replace(rows("z"), places=np.zeros(1, dtype=np.int32)))
            path = table.key_files.write_index("0123ab", ["gone"], [], counts, 1, forged)
        table.clean_up(IDENTITY, "0123ab", False)
        assert not Path(table.uri, path).exists()
    assert mine.exists()
    assert (Path(table.uri) / "notes.parquet").exists()
    assert (Path(table.uri) / "_delta_log" / "00000000000000000000.json").exists()
    assert Table(table.uri).version() == 1
