"""What a refresh does, looked at in this process: the same code without Ray (inline.py)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import inline
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_jsonl
from deltalake import DeltaTable
from refreshing import Corpus, row
from weeks import Killed, check_foreseen

import fmembed
from fmembed import NoFilesError, StorageError, TableError
from fmembed.prepare.stage import Preprocess
from fmembed.rows.columns import reject
from fmembed.run import buckets
from fmembed.run.new_version import NewVersion
from fmembed.run.refresh import Refresh
from fmembed.sources.walking import DEAD_LINKS
from fmembed.table.keys import KeyFiles
from fmembed.table.log import Log
from fmembed.table.repair import repair
from fmembed.table.table import Table

pytestmark = pytest.mark.slow


@pytest.fixture
def corpus(tmp_path: Path, tiny_bert: Path) -> Corpus:
    corpus = Corpus(tmp_path, tiny_bert)
    corpus.write("1.jsonl", [row(f"a{i}") for i in range(10)])
    corpus.write("2.jsonl", [row(f"b{i}") for i in range(10)])
    return corpus


def test_what_embed_has_made_is_refreshed_without_reading_it_again(corpus: Corpus) -> None:
    assert corpus.embed().rows_embedded == 20
    assert corpus.refresh().unchanged
    os.utime(corpus.folder / "1.jsonl", (1, 1))
    corpus.write("3.jsonl", [row("c1")])
    assert corpus.refresh().rows_new == 1
    assert corpus.seen() == ["c1"]
    # And the other way round.
    corpus.write("4.jsonl", [row("d1")])
    corpus.log.unlink()
    assert corpus.embed().rows_embedded == 1
    assert corpus.refresh().unchanged


@pytest.mark.parametrize("what", ["label", "order", "mtime", "layout", "path", "window"])
def test_what_is_no_change_of_content_asks_no_model(
    what: str, corpus: Corpus, tmp_path: Path
) -> None:
    corpus.refresh()
    before = corpus.rows()
    rows = [row(f"b{i}") for i in range(10)]
    if what == "label":
        corpus.write("2.jsonl", [{**r, "topic": "other"} for r in rows])
    elif what == "order":
        corpus.write("2.jsonl", rows[::-1])
    elif what == "mtime":
        os.utime(corpus.folder / "2.jsonl", (1, 1))
    elif what == "layout":
        corpus.write("2.jsonl", rows[:4])
        corpus.write("3.jsonl", rows[4:])
    elif what == "path":
        shutil.move(corpus.folder / "2.jsonl", corpus.folder / "moved.jsonl")
    else:
        compute = corpus.spec.compute.model_copy(update={"window_rows": 3})
        output = corpus.spec.output.model_copy(update={"part_bytes": 1000})
        corpus.spec = corpus.spec.model_copy(update={"compute": compute, "output": output})
    result = corpus.refresh()
    assert corpus.seen() == []
    assert (result.rows_embedded, result.rows_new, result.rows_removed) == (0, 0, 0)
    now = corpus.rows()
    assert {k: r["embedding"] for k, r in now.items()} == {
        k: r["embedding"] for k, r in before.items()
    }
    if what == "label":
        assert (result.rows_changed, result.rows_copied) == (10, 10)
        assert {r["topic"] for k, r in now.items() if k[0] == "b"} == {"other"}
        assert result.version == 2
    else:
        assert now == before
        assert (result.unchanged, result.version) == (True, 1)
    assert corpus.refresh().unchanged


def test_ids_that_are_files_names(tmp_path: Path, tiny_bert: Path) -> None:
    corpus = Corpus(tmp_path, tiny_bert, source={"id": None, "label": None})
    for name in "abcdefghijkl":
        (corpus.folder / f"{name}.txt").write_text(f"about {name}")
    corpus.refresh()
    # A renamed file is another row, with the vector that is there.
    shutil.move(corpus.folder / "a.txt", corpus.folder / "z.txt")
    result = corpus.refresh()
    assert (corpus.seen(), result.rows_new, result.rows_removed) == ([], 1, 1)
    assert corpus.rows().keys() == {f"{name}.txt" for name in "bcdefghijklz"}
    corpus.check_as_from_scratch(tmp_path / "anew")


def test_rejected_rows_take_part(corpus: Corpus, tmp_path: Path) -> None:
    corpus.write("3.jsonl", [row("x", ""), row("y", ""), row("z")])
    first = corpus.refresh()
    assert (first.rows_new, first.rows_rejected, first.causes) == (21, 2, {"empty input": 2})
    assert corpus.refresh().unchanged
    # One is mended, one stays, one goes wrong and keeps the vector that it had.
    corpus.write("3.jsonl", [row("x"), row("y", ""), row("z", "")])
    second = corpus.refresh()
    assert (second.rows_new, second.rows_rejected, second.rows_withheld) == (1, 0, 1)
    assert second.withheld == "they cannot be embedded any more (refresh.on_rejected: keep)"
    assert corpus.seen() == ["x"]
    assert "z" in corpus.rows()
    refresh = corpus.spec.refresh.model_copy(update={"on_rejected": "remove"})
    corpus.spec = corpus.spec.model_copy(update={"refresh": refresh})
    third = corpus.refresh()
    assert (third.rows_removed, third.rows_rejected, third.rows_withheld) == (1, 1, 0)
    assert "z" not in corpus.rows()
    assert corpus.refresh().unchanged
    corpus.write("3.jsonl", [row("z")])
    assert corpus.refresh().rows_new == 1
    assert Table(str(corpus.out)).num_rejected() == 0


def test_chunks_of_a_document_are_one(tmp_path: Path, tiny_bert: Path) -> None:
    corpus = Corpus(tmp_path, tiny_bert, preprocess={"chunk_tokens": 8})
    long = "word " * 30
    corpus.write("1.jsonl", [row("a", long), row("b", long), row("c", "a short one")])
    result = corpus.refresh()
    assert (result.contents_embedded, result.rows_embedded) == (2, 3)
    chunks = corpus.rows()
    assert {k.replace("a@", "b@") for k in chunks if k[0] == "a"} == {
        k for k in chunks if k[0] == "b"
    }
    # A shorter document loses its last chunks, and no other one does.
    corpus.write("1.jsonl", [row("a", "word " * 9), row("b", long), row("c", "a short one")])
    shorter = corpus.refresh()
    assert (shorter.rows_changed, shorter.rows_unchanged, corpus.seen()) == (1, 2, ["a"])
    now = corpus.rows()
    assert sum(k[0] == "a" for k in now) < sum(k[0] == "b" for k in now)
    assert {k: v for k, v in now.items() if k[0] != "a"} == {
        k: v for k, v in chunks.items() if k[0] != "a"
    }
    corpus.check_as_from_scratch(tmp_path / "anew")


def test_rows_of_one_id(corpus: Corpus) -> None:
    corpus.write("1.jsonl", [row("x", "first"), *[row(f"a{i}") for i in range(9)]])
    corpus.write("3.jsonl", [row("x", "second")])
    first = corpus.refresh()
    assert (first.rows_new, first.causes) == (20, {"duplicate id": 1})
    assert corpus.refresh().unchanged
    # The first one goes: the other one takes its place, though its file was not read again.
    corpus.write("1.jsonl", [row(f"a{i}") for i in range(9)])
    second = corpus.refresh()
    assert (second.rows_changed, second.rows_removed, corpus.seen()) == (1, 0, ["x"])
    assert Table(str(corpus.out)).num_rejected() == 0
    assert corpus.refresh().unchanged


def test_removals_are_guarded(corpus: Corpus) -> None:
    corpus.refresh()
    (corpus.folder / "2.jsonl").unlink()
    corpus.write("3.jsonl", [row("c1")])
    held = corpus.refresh()
    assert (held.rows_new, held.rows_removed, held.rows_withheld) == (1, 0, 10)
    assert "refresh.max_removed_fraction" in held.withheld
    assert len(corpus.rows()) == 21
    assert corpus.refresh(allow_removals=9).rows_withheld == 10  # said each time
    let = corpus.refresh(allow_removals=10)
    assert (let.rows_removed, let.rows_withheld, len(corpus.rows())) == (10, 0, 11)
    # All that was there is gone: an emptied folder is more often a mistake.
    for path in corpus.folder.iterdir():
        path.unlink()
    assert corpus.refresh().rows_withheld == 11
    assert len(corpus.rows()) == 11
    emptied = corpus.refresh(allow_removals=11)
    assert (emptied.rows_removed, emptied.table_rows) == (11, 0)
    assert corpus.refresh().unchanged
    shutil.rmtree(corpus.folder)
    with pytest.raises(fmembed.SourceError, match="no such file or folder"):
        corpus.refresh()


def test_rows_behind_a_link_that_leads_nowhere_are_not_gone(corpus: Corpus, tmp_path: Path) -> None:
    """As of a disk that is not mounted."""
    disk, off = tmp_path / "disk", tmp_path / "off"
    disk.mkdir()
    write_jsonl(disk / "d.jsonl", [row("d")])
    (corpus.folder / "link").symlink_to(disk)
    assert corpus.refresh().rows_new == 21
    disk.rename(off)
    corpus.write("2.jsonl", [row(f"b{i}") for i in range(1, 10)])
    held = corpus.refresh()
    assert (held.rows_removed, held.rows_withheld, len(corpus.rows())) == (0, 2, 21)
    assert "1 links in the source lead to nothing" in held.withheld
    assert held.passed_over == {DEAD_LINKS: 1}
    off.rename(disk)
    back = corpus.refresh()
    assert (back.rows_removed, back.rows_withheld) == (1, 0)
    disk.rename(off)
    assert corpus.refresh(allow_removals=1).rows_removed == 1
    assert corpus.refresh().unchanged


def test_where_most_files_are_of_another_format_by_now_that_is_said(corpus: Corpus) -> None:
    corpus.refresh()
    for i in range(3):
        (corpus.folder / f"{i}.csv").write_text(f"key,text,topic\nc{i},text {i},a\n")
    held = corpus.refresh()
    assert (held.rows_new, held.rows_withheld, len(corpus.rows())) == (3, 20, 23)
    assert "with 2 files passed over, as most are csv (source.format names another)" in (
        held.withheld
    )


def test_a_plan_knows_what_a_killed_refresh_has_done(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are staged: their copies are of this refresh, and the rejected ones come in."""
    corpus.refresh()
    twice = [row(f"c{i}", f"new {i % 5}") for i in range(10)]
    corpus.write("3.jsonl", [*twice, row("d", "about a1"), {"key": "e", "text": 7}])

    def die(*_: Any) -> None:
        raise Killed("fill_copies")

    with monkeypatch.context() as patch:
        patch.setattr(Refresh, "fill_copies", die)
        with pytest.raises(Killed):
            corpus.refresh()
    seen = inline.foresee(corpus.spec)
    assert (seen.num_embed, seen.num_copies, seen.drawn.num_fanned_out) == (0, 6, 5)
    result = corpus.refresh()
    check_foreseen(seen, result)
    assert (result.rows_rejected, seen.num_rejected) == (1, 1)


def test_a_version_that_fails_waits_for_what_it_has_begun(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a part that is published later would stay, as the strays are removed by then."""
    corpus.refresh()
    corpus.write("1.jsonl", [row(f"a{i}", "other" if i == 3 else None) for i in range(10)])
    begun: list[Any] = []

    def fail(new: NewVersion) -> None:
        begun.extend(ref for _, ref in new._rewriting)
        raise StorageError("full")

    def wait(refs: list[Any], num_returns: int, **_: Any) -> Any:
        assert num_returns == len(refs)
        if begun:
            waited.extend(refs)
        return refs, []

    waited: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(NewVersion, "_finish_rewriting", fail)
        patch.setattr(inline.INLINE, "wait", wait)
        with pytest.raises(StorageError, match="full"):
            corpus.refresh()
    assert begun
    assert len(waited) > len(begun)  # those that write keys too
    assert all(ref in waited for ref in begun)
    assert inline.refresh(corpus.spec, corpus.stage).rows_changed == 1


def test_nothing_is_made_of_a_source_that_never_had_a_file(tmp_path: Path, tiny_bert: Path) -> None:
    corpus = Corpus(tmp_path, tiny_bert)
    with pytest.raises(NoFilesError):
        corpus.refresh()
    assert not corpus.out.exists()


def test_a_source_that_cannot_be_read_whole_removes_nothing(
    tmp_path: Path, tiny_bert: Path
) -> None:
    corpus = Corpus(tmp_path, tiny_bert, refresh={"max_removed_fraction": 1.0})

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        pq.write_table(pa.Table.from_pylist(rows), corpus.folder / f"{name}.parquet")

    write("1", [row(f"a{i}") for i in range(10)])
    write("2", [row(f"b{i}") for i in range(10)])
    corpus.refresh()
    # Of what a broken file held nobody knows what is gone.
    broken = corpus.folder / "2.parquet"
    content = broken.read_bytes()
    broken.write_bytes(content[:-20])
    write("1", [row(f"a{i}") for i in range(9)] + [row("new")])
    for again in (False, True):  # as long as it is broken
        result = corpus.refresh()
        assert (result.rows_removed, result.rows_withheld) == (0, 11)
        assert "1 files of the source cannot be read to their ends" in result.withheld
        assert (result.rows_new, result.rows_rejected) == ((0, 0) if again else (1, 1))
    broken.write_bytes(content)
    mended = corpus.refresh()
    assert (mended.rows_removed, mended.rows_withheld, mended.rows_unchanged) == (1, 0, 20)
    assert corpus.seen() == []
    assert Table(str(corpus.out)).num_rejected() == 0


def test_a_line_that_has_lost_its_id_is_held_once(corpus: Corpus) -> None:
    corpus.refresh()
    lines = (corpus.folder / "2.jsonl").read_text().splitlines()
    (corpus.folder / "2.jsonl").write_text("\n".join([*lines[:9], lines[9][:-4]]) + "\n")
    held = corpus.refresh()
    assert (held.rows_withheld, held.causes) == (1, {"bad JSON": 1})
    assert "no id that can be read" in held.withheld
    assert corpus.refresh().rows_removed == 1
    assert corpus.refresh().unchanged


def test_small_parts_become_one(tmp_path: Path, tiny_bert: Path) -> None:
    corpus = Corpus(tmp_path, tiny_bert)
    corpus.write("0.jsonl", [row(f"a{i}") for i in range(50)])
    for week in range(1, 10):
        corpus.write(f"{week}.jsonl", [row(f"w{week}")])
        result = corpus.refresh()
        assert (result.rows_new, len(corpus.seen())) == (51 if week == 1 else 1,) * 2
    assert len(Table(str(corpus.out)).rows.parts()) < 8
    assert len(list(corpus.out.glob("_keys/*"))) == 2  # an index, and a bucket
    assert len(list(corpus.out.glob("_shards/*"))) == 1
    assert corpus.refresh().unchanged


def test_a_label_is_compared_with_the_parts_where_keys_are_missing(corpus: Corpus) -> None:
    corpus.embed()
    for path in corpus.out.glob("_keys/*"):
        path.unlink()
    assert corpus.refresh().unchanged
    for path in corpus.out.glob("_keys/*"):
        path.unlink()
    corpus.write("2.jsonl", [row(f"b{i}", topic="other" if i == 3 else "a") for i in range(10)])
    result = corpus.refresh()
    assert (result.rows_changed, result.rows_copied, corpus.seen()) == (1, 1, [])
    assert corpus.rows()["b3"]["topic"] == "other"


def spoil(path: Path) -> None:
    """Of a file of keys the rows, not the footer."""
    content = bytearray(path.read_bytes())
    content[60:90] = bytes(b ^ 255 for b in content[60:90])
    path.write_bytes(content)


def test_rows_are_not_gone_whose_keys_are_damaged(corpus: Corpus) -> None:
    corpus.embed()
    corpus.write("3.jsonl", [row(f"c{i}") for i in range(3)])
    corpus.embed()
    for path in sorted(corpus.out.glob("_keys/*")):
        spoil(path)
    corpus.write("4.jsonl", [row("d1")])
    corpus.log.unlink()
    result = corpus.refresh(allow_removals=100)
    assert (result.rows_new, result.rows_removed, corpus.seen()) == (1, 0, ["d1"])
    assert (result.rows_read, len(corpus.rows())) == (24, 24)
    assert corpus.refresh().unchanged


def test_what_another_tool_does_meanwhile_takes_no_other_row_out(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus.refresh()
    corpus.write("3.jsonl", [row("c1")])
    settle = Refresh.settle

    def late(self: Refresh, *given: Any) -> Any:
        DeltaTable(str(corpus.out)).delete("row_id = 'a3'")
        return settle(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Refresh, "settle", late)
        with pytest.raises(AssertionError, match="1 rows are left"):
            corpus.refresh(allow_removals=100)
    every = {r["key"] for r in corpus.all_rows()}
    assert corpus.rows().keys() == every - {"a3"}
    assert corpus.refresh().rows_new == 1
    assert corpus.rows().keys() == every


def dies(monkeypatch: pytest.MonkeyPatch, corpus: Corpus, owner: Any, name: str) -> None:
    """Refresh, and die where something is called."""

    def die(*_: Any, **__: Any) -> None:
        raise Killed(name)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, die)
        with pytest.raises(Killed):
            corpus.refresh()


def test_what_was_staged_and_is_committed_is_never_deleted(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies(monkeypatch, corpus, Table, "drop_staged")
    before = corpus.rows()
    assert len(before) == 20
    fmembed.vacuum(str(corpus.out), purge=True)
    assert corpus.rows() == before
    assert corpus.refresh().rows_new == 0
    # Nor when a later version has its part no more.
    corpus.write("3.jsonl", [row(f"c{i}") for i in range(20)])
    dies(monkeypatch, corpus, Table, "drop_staged")
    version = Table(str(corpus.out)).version()
    before = corpus.rows()
    corpus.write("3.jsonl", [row(f"c{i}") for i in range(19)])
    assert corpus.refresh().rows_removed == 1
    assert corpus.rows(version) == before


def test_what_is_staged_outlives_a_death_between_the_two_logs(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus.write("3.jsonl", [row("x", ""), row("z")])
    commit = Log.commit

    def first_only(self: Log, *given: Any, **named: Any) -> Any:
        if not self.uri.endswith("_rejected"):
            raise Killed("rows")
        return commit(self, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "commit", first_only)
        with pytest.raises(Killed):
            corpus.refresh()
    assert Table(str(corpus.out)).num_rejected() == 1
    result = corpus.refresh()
    assert (corpus.seen(), result.rows_new, len(corpus.rows())) == ([], 21, 21)


def test_a_repair_leaves_what_is_staged(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus.refresh()
    corpus.write("3.jsonl", [row("c1"), row("c2")])
    dies(monkeypatch, corpus, Refresh, "settle")
    assert fmembed.verify(str(corpus.out)).problems == []
    assert repair(str(corpus.out)) == []
    result = corpus.refresh()
    assert (corpus.seen(), result.rows_new, result.version) == ([], 2, 2)


def test_a_set_of_keys_that_lacks_a_file_tells_of_nothing(
    tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "_BUCKET_ROWS", 8)
    corpus = Corpus(tmp_path, tiny_bert, preprocess={"chunk_tokens": 8})
    corpus.write("1.jsonl", [row(f"a{i}", f"{i} " + "word " * 20) for i in range(40)])
    corpus.refresh()
    before = corpus.rows()
    assert len(list(corpus.out.glob("_keys/*"))) > 4
    corpus.write("2.jsonl", [row("b", "word " * 20)])
    write_bucket, count = KeyFiles.write_bucket, iter(range(100))

    def third_dies(self: KeyFiles, *given: Any) -> Any:
        if next(count) == 2:
            raise Killed("write_bucket")
        return write_bucket(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(KeyFiles, "write_bucket", third_dies)
        with pytest.raises(Killed):
            corpus.refresh()
    corpus.write("3.jsonl", [row("c", "word " * 9)])
    result = corpus.refresh()
    assert result.rows_new == 2
    now = corpus.rows()
    assert before.items() <= now.items()
    # A file of the set is lost: its parts are read instead.
    next(corpus.out.glob("_keys/*")).unlink()
    assert corpus.refresh().rows_new == 0
    assert corpus.rows() == now


def test_a_twin_that_has_changed_takes_its_place_as_it_is_now(corpus: Corpus) -> None:
    corpus.write("3.jsonl", [row("x", "one")])
    corpus.write("4.jsonl", [row("x", "one")])
    corpus.refresh()
    corpus.write("4.jsonl", [row("x", "another")])
    assert corpus.refresh().rows_new == 0
    corpus.write("3.jsonl", [row("y", "one")])
    corpus.refresh()
    corpus.check_as_from_scratch(corpus.folder.parent / "anew")
    assert corpus.refresh().unchanged


def test_another_row_of_the_id_is_tried_where_one_cannot_be_embedded(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = Preprocess.__call__

    def refuses(self: Preprocess, rows: pa.Table) -> pa.Table:
        bad = {i: ("bad", "text") for i, t in enumerate(rows["_input"].to_pylist()) if t == "BAD"}
        return prepare(self, reject(rows, "preprocess", bad))

    monkeypatch.setattr(Preprocess, "__call__", refuses)
    corpus.write("3.jsonl", [row("x", "BAD"), row("x", "fine"), row("y", "BAD")])
    with pytest.raises(AssertionError, match="1 rows are left"):  # one is tried after the other
        corpus.refresh()
    assert corpus.refresh().rows_new == 1
    assert "x" in corpus.rows()
    causes = {(r["row_id"], r["error"]) for r in Table(str(corpus.out)).read_rejected().to_pylist()}
    assert causes == {("x", "duplicate id"), ("y", "bad")}
    assert corpus.refresh().unchanged


def test_columns_that_the_table_has_not_are_refused(corpus: Corpus) -> None:
    corpus.refresh()
    source = corpus.spec.source.model_copy(update={"label": None})
    corpus.spec = corpus.spec.model_copy(update={"source": source})
    with pytest.raises(TableError, match=r"^source\.carry: the table at .* has the columns"):
        corpus.refresh()


def test_a_broken_file_is_remembered_where_keys_are_made_anew(
    tmp_path: Path, tiny_bert: Path
) -> None:
    corpus = Corpus(tmp_path, tiny_bert, refresh={"max_removed_fraction": 1.0})
    for name in "12":
        rows = pa.Table.from_pylist([row(f"{name}{i}") for i in range(3)])
        pq.write_table(rows, corpus.folder / f"{name}.parquet")
    corpus.refresh()
    broken = corpus.folder / "2.parquet"
    broken.write_bytes(broken.read_bytes()[:-20])
    assert corpus.refresh().rows_withheld == 3
    for path in corpus.out.glob("_keys/*"):
        path.unlink()
    for _ in range(3):
        result = corpus.refresh()
        assert (result.rows_removed, result.rows_withheld) == (0, 3)
    assert len(corpus.rows()) == 6
