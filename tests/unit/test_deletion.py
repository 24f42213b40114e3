"""Rows that are taken out by hand, and stay out."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from refreshing import Corpus, row

import fmembed
from fmembed import cli, deletion
from fmembed.deletion import delete, undelete
from fmembed.errors import LockedError, SpecError, TableError
from fmembed.rows.ids import LeftOut, keys_of
from fmembed.run import buckets
from fmembed.table.lock import Lock
from fmembed.table.table import Table


@pytest.fixture
def corpus(tiny_bert: Path, tmp_path: Path) -> Corpus:
    found = Corpus(tmp_path, tiny_bert)
    found.write("a.jsonl", [row(f"a{i}", topic="ab"[i % 2]) for i in range(6)])
    found.write("b.jsonl", [row(f"b{i}") for i in range(4)])
    return found


def files_with(folder: Path, *words: bytes) -> list[str]:
    """The files below a folder that hold one of some words as they are."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return [str(p.relative_to(folder)) for p in files if any(w in p.read_bytes() for w in words)]


def test_rows_go_in_one_version_and_a_refresh_does_not_bring_them_back(corpus: Corpus) -> None:
    corpus.refresh()
    uri, before = str(corpus.out), corpus.rows()
    done = delete(uri, "row_id = 'a3' or topic = 'b'")
    assert (done.version, done.rows, done.rows_left) == (2, 3, 7)
    assert done.samples == ("a1", "a3", "a5")
    gone = {"a1", "a3", "a5"}
    assert corpus.rows() == {k: v for k, v in before.items() if k not in gone}
    assert fmembed.verify(uri).problems == []
    assert corpus.rows(1) == before  # until it is purged
    # Nothing is read: what is left of each file is on record.
    unchanged = corpus.refresh()
    assert (unchanged.unchanged, unchanged.rows_read, corpus.seen()) == (True, 7, [])
    (told,) = [n for name, n in unchanged.passed_over.items() if "fmembed delete" in name]
    assert told == 3
    # Nor where a file is read again, nor by another content, nor by an embedding run.
    corpus.write("a.jsonl", [row(f"a{i}", f"new {i}") for i in range(7)])
    refreshed = corpus.refresh()
    assert (refreshed.rows_new, refreshed.rows_changed, refreshed.rows_read) == (1, 3, 8)
    assert set(corpus.rows()) == {"a0", "a2", "a4", "a6", "b0", "b1", "b2", "b3"}
    corpus.write("c.jsonl", [row("a1"), row("c0")])
    assert corpus.embed().rows_embedded == 1
    assert "a1" not in corpus.rows()
    assert corpus.refresh().rows_read == 9


def test_an_embedding_run_does_not_bring_them_back(corpus: Corpus) -> None:
    corpus.embed()
    uri = str(corpus.out)
    assert delete(uri, ids=[f"a{i}" for i in range(6)]).rows == 6
    again = corpus.embed()
    assert (again.rows_embedded, set(corpus.rows())) == (0, {"b0", "b1", "b2", "b3"})
    assert delete(uri, "true").rows_left == 0
    assert fmembed.verify(uri).problems == []
    assert corpus.embed().rows_embedded == 0  # with no row that the table knows
    corpus.write("c.jsonl", [row("a1"), row("c0")])
    assert corpus.embed().rows_embedded == 1
    assert set(corpus.rows()) == {"c0"}
    assert corpus.refresh().unchanged
    assert fmembed.verify(uri).problems == []


def test_they_come_back_when_somebody_says_so(corpus: Corpus) -> None:
    corpus.refresh()
    before = corpus.rows()
    delete(str(corpus.out), ids=["a1", "b1"])
    corpus.refresh()
    assert undelete(str(corpus.out)) == 2
    assert corpus.refresh().rows_new == 2
    assert corpus.rows() == before
    delete(str(corpus.out), ids=["a1"])
    undelete(str(corpus.out))
    assert corpus.embed().rows_embedded == 1
    assert corpus.rows() == before
    assert undelete(str(corpus.out)) == 0


def test_a_purge_leaves_no_byte_of_them(corpus: Corpus) -> None:
    corpus.write("c.jsonl", [row("secret-id", "unforgettable words", topic="private")])
    corpus.write("d.jsonl", [row("also-secret", "")])  # which is rejected
    corpus.refresh()
    words = (b"secret-id", b"private", b"also-secret")
    hashes = [corpus.rows()["secret-id"]["content_hash"]]
    assert files_with(corpus.out, *words)
    done = delete(str(corpus.out), ids=["secret-id", "also-secret", "nobody"], purge=True)
    assert (done.rows, done.rows_rejected, done.num_absent) == (1, 1, 1)
    assert files_with(corpus.out, *words) == []
    assert files_with(corpus.out, *(bytes.fromhex(h) for h in hashes)) == []
    assert len(list(corpus.out.glob("part-*.parquet"))) == 1
    assert fmembed.verify(str(corpus.out)).problems == []
    with pytest.raises(TableError, match="no longer kept"):
        fmembed.read(str(corpus.out), 1)
    assert corpus.refresh().unchanged


def test_a_trial_changes_nothing(corpus: Corpus) -> None:
    corpus.refresh()
    files = sorted((str(p), p.stat().st_mtime_ns) for p in corpus.out.rglob("*") if p.is_file())
    done = delete(str(corpus.out), "topic = 'b'", dry_run=True, purge=True)
    assert (done.rows, done.rows_left, done.version, done.purged) == (3, 7, None, False)
    now = sorted((str(p), p.stat().st_mtime_ns) for p in corpus.out.rglob("*") if p.is_file())
    assert now == files


def test_nothing_to_delete_makes_no_version(corpus: Corpus) -> None:
    corpus.refresh()
    done = delete(str(corpus.out), ids=["nobody"])
    assert (done.rows, done.num_absent, done.version) == (0, 1, 1)
    assert corpus.refresh().unchanged
    # But an id that was to be forgotten does not come in later.
    corpus.write("c.jsonl", [row("nobody"), row("c0")])
    assert corpus.refresh().rows_new == 1
    assert "nobody" not in corpus.rows()


def test_of_a_text_in_chunks_all_pieces_go(tiny_bert: Path, tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, tiny_bert, preprocess={"chunk_tokens": 8})
    corpus.write("a.jsonl", [row(f"a{i}", "many words for some chunks " * 9) for i in range(3)])
    corpus.refresh()
    before = corpus.rows()
    assert len(before) > 6
    (piece,) = [k for k, v in before.items() if v["parent_id"] == "a1" and v["piece"] == 2]
    done = delete(str(corpus.out), f"row_id = '{piece}'")
    assert (done.rows, done.samples) == (1, ("a1",))
    assert corpus.rows() == {k: v for k, v in before.items() if v["parent_id"] != "a1"}
    assert fmembed.verify(str(corpus.out)).problems == []
    assert corpus.refresh().unchanged


def test_many_buckets_and_a_damaged_file_of_keys(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "_BUCKET_ROWS", 2)
    corpus.refresh()
    for path in corpus.out.glob("_keys/*bucket-0001*"):
        path.write_bytes(path.read_bytes()[:-9])
    assert delete(str(corpus.out), "row_id in ('a0', 'b3')").rows == 2
    assert fmembed.verify(str(corpus.out)).problems == []
    assert set(corpus.rows()) == {*(f"a{i}" for i in range(1, 6)), "b0", "b1", "b2"}
    assert corpus.refresh().unchanged


@pytest.mark.parametrize("stage", ["rewrite", "write_keys", "commit", "clean_up"])
def test_a_kill_in_between_brings_no_row_back(
    stage: str, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus.refresh()
    uri = str(corpus.out)
    rest = {k: v for k, v in corpus.rows().items() if k != "a1"}
    with monkeypatch.context() as patch:
        own = getattr(deletion.NewVersion, stage)

        def die(*given: Any) -> Any:
            own(*given)
            raise KeyboardInterrupt

        patch.setattr(deletion.NewVersion, stage, die)
        with pytest.raises(KeyboardInterrupt):
            delete(uri, ids=["a1"])
    # The list is written first: from then on the row leaves, if not at once.
    assert (len(Table(uri).deleted.read()), Table(uri).deleted.is_pending) == (1, True)
    Table(uri).put_report("which every run leaves")
    with_refresh = corpus.refresh()
    assert not with_refresh.rows_withheld
    assert corpus.rows() == rest
    assert not Table(uri).deleted.is_pending
    delete(uri, ids=["a1"])
    assert corpus.rows() == rest
    assert corpus.refresh().unchanged


def test_a_list_and_no_version_are_finished_by_a_refresh(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus.refresh()
    uri = str(corpus.out)
    with monkeypatch.context() as patch:
        patch.setattr(deletion.NewVersion, "commit", lambda _: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            delete(uri, ids=["a1"])
    assert "a1" in corpus.rows()
    Table(uri).put_report("which every run leaves")
    assert not corpus.refresh().rows_withheld
    assert "a1" not in corpus.rows()
    assert fmembed.verify(uri).problems == []


def test_a_damaged_list_ends_all_that_could_bring_rows_back(corpus: Corpus) -> None:
    corpus.refresh()
    uri = str(corpus.out)
    delete(uri, ids=["a1", "a2"])
    (path,) = corpus.out.glob("_deleted/*.ids")
    path.write_bytes(path.read_bytes()[16:])
    for run in (corpus.embed, corpus.refresh, lambda: delete(uri, ids=["a3"])):
        with pytest.raises(TableError, match=r"which says what was deleted .* is not as it was"):
            run()
    assert "is not as it was written" in " ".join(fmembed.verify(uri).problems)
    undelete(uri)
    assert corpus.refresh().rows_new == 2


def test_a_row_on_the_list_that_is_in_the_table_is_off(corpus: Corpus) -> None:
    corpus.refresh()
    table = Table(str(corpus.out))
    table.deleted.begin(LeftOut(keys_of(["a1"]), keys_of([])))
    (problem,) = fmembed.verify(str(corpus.out)).problems
    assert problem.startswith("1 rows are on the list of those that were deleted")


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("topik = 'a'", r"is no condition on the columns of .*\(row_id, .*topic.*\): .*topik"),
        ("topic =", "is no condition"),
        ("topic", "is no condition"),
        ("1/0 = 1", "is no condition .*ivide by zero"),  # which a filter would be without
        ("topic = b", r"No field named b.*\(a text stands in quotes"),
    ],
)
def test_a_wrong_condition_is_told(where: str, told: str, corpus: Corpus) -> None:
    corpus.refresh()
    with pytest.raises(TableError, match=told):
        delete(str(corpus.out), where)
    assert len(corpus.rows()) == 10


def test_wrong_arguments_are_told(corpus: Corpus, tmp_path: Path) -> None:
    corpus.refresh()
    uri = str(corpus.out)
    for given in ({}, {"where": "true", "ids": ["a"]}):
        with pytest.raises(SpecError, match=r"takes where, a condition on .*; one of them"):
            delete(uri, **given)
    with pytest.raises(SpecError, match="takes a list of ids"):
        delete(uri, ids="a1")
    for odd in (1, "\ud800"):
        with pytest.raises(SpecError, match="ids: takes texts, got"):
            delete(uri, ids=["a1", odd])  # type: ignore[list-item]
    with pytest.raises(TableError, match="no such folder"):
        delete(str(tmp_path / "none"), "true")
    with Lock(Table(uri).storage, "other"), pytest.raises(LockedError):
        delete(uri, "true")


def test_the_command(corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus.refresh()
    uri = str(corpus.out)
    assert cli.run(["delete", uri, "--where", "topic = 'b'", "--dry-run"]) == 0
    assert capsys.readouterr().out == "would delete 3 rows: a1, a3, a5\n"
    (tmp_path / "ids").write_text("a1\nnobody\n")
    assert cli.run(["delete", uri, "--ids", str(tmp_path / "ids")]) == 0
    first, second, third, *_ = capsys.readouterr().out.splitlines()
    assert first == "deleted 1 row: a1"
    assert second == "1 of the given ids are not in the table, and are kept out from now on: nobody"
    assert third == "version 2 has 9 rows; no run brings these back"
    assert cli.run(["delete", uri, "--where", "row_id = 'a2'", "--json", "--purge"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], told["rows_left"], told["purged"]) == (1, 8, True)
    assert cli.run(["info", uri]) == 0
    assert "deleted   3 stay out" in capsys.readouterr().out
    assert cli.run(["delete", uri]) == 2
    assert cli.run(["delete", uri, "--ids", str(tmp_path / "none")]) == 2
    capsys.readouterr()
    assert cli.run(["undelete", uri]) == 0
    assert capsys.readouterr().out.startswith("3 ids are kept out no more")


def test_ray_is_not_started(corpus: Corpus) -> None:
    corpus.refresh()
    code = (
        "import sys, fmembed; fmembed.delete(sys.argv[1], ids=['a1']); import ray; "
        "assert not ray.is_initialized()"
    )
    given = [sys.executable, "-c", code, str(corpus.out)]
    done = subprocess.run(given, env=dict(os.environ), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(corpus.rows()) == 9


def test_rows_that_are_known_by_their_place_are_kept_out_by_their_content(
    tiny_bert: Path, tmp_path: Path
) -> None:
    """Another row has that place by the next week, and it was not meant."""
    corpus = Corpus(tmp_path, tiny_bert, source={"id": None})
    rows = [row(f"k{i}") for i in range(8)]
    corpus.write("a.jsonl", [*rows, row("k3")])  # one text twice
    corpus.refresh()
    done = delete(str(corpus.out), ids=["a.jsonl#3", "a.jsonl#77"])
    assert (done.rows, done.num_absent, done.samples) == (2, 1, ("a.jsonl#3",))
    assert corpus.refresh().unchanged
    corpus.write("a.jsonl", [row("first"), *rows])
    corpus.refresh(allow_removals=9)
    hashes = {v["content_hash"] for v in corpus.rows().values()}
    corpus.check_kept_out(["about k3"], hashes)
    assert len(corpus.rows()) == 8  # of nine, all but the one
    corpus.write("b.jsonl", [row("k3"), row("new")])
    assert corpus.embed().rows_embedded == 1
    corpus.check_kept_out(["about k3"], {v["content_hash"] for v in corpus.rows().values()})


def test_what_stands_for_rows_that_nobody_knows_is_not_deleted(
    tiny_bert: Path, tmp_path: Path
) -> None:
    """It is a warning: as long as it is there no row leaves."""
    corpus = Corpus(tmp_path, tiny_bert)
    corpus.write("a.jsonl", [row(f"a{i}") for i in range(20)])
    content = gzip.compress("".join(
        json.dumps(row(f"b{i}", f"text {i} {i * 7919}")) + "\n" for i in range(40)
    ).encode())  # fmt: skip
    (corpus.folder / "b.jsonl.gz").write_bytes(content)
    corpus.refresh()
    (corpus.folder / "b.jsonl.gz").write_bytes(content[: len(content) // 2])
    assert corpus.refresh().rows_withheld
    (marker,) = Table(str(corpus.out)).read_rejected()["row_id"].to_pylist()
    delete(str(corpus.out), ids=[marker])
    again = corpus.refresh()
    assert again.rows_withheld
    assert len(corpus.rows()) == 60


def test_what_a_killed_refresh_has_finished_is_no_way_in(corpus: Corpus) -> None:
    corpus.refresh()
    corpus.write("c.jsonl", [row("late"), row("c0")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fmembed.run.refresh.NewVersion", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            corpus.refresh()
    assert Table(str(corpus.out)).staged()
    assert delete(str(corpus.out), ids=["late"]).num_absent == 1
    corpus.refresh()
    assert "late" not in corpus.rows()
    assert "c0" in corpus.rows()


def test_another_table_of_the_source_takes_the_list_over(
    corpus: Corpus, tiny_bert: Path, tmp_path: Path
) -> None:
    corpus.refresh()
    delete(str(corpus.out), ids=["a1", "b2"])
    (tmp_path / "more").mkdir()
    other = Corpus(tmp_path / "more", tiny_bert)
    for name in ("a.jsonl", "b.jsonl"):
        (other.folder / name).write_bytes((corpus.folder / name).read_bytes())
    other.refresh()
    done = delete(str(other.out), listed_in=str(corpus.out))
    assert (done.rows, done.rows_left) == (2, 8)
    assert other.refresh().unchanged
    assert set(other.rows()) == set(corpus.rows())


def test_a_kill_after_the_version_leaves_a_table_that_is_right(corpus: Corpus) -> None:
    corpus.refresh()
    uri = str(corpus.out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fmembed.table.table.put_run", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            delete(uri, ids=["a1"])
    assert delete(uri, ids=["a1"]).rows == 0
    assert fmembed.verify(uri).problems == []
    assert not Table(uri).has_report
