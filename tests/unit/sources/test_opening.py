"""Every format gives the same rows; every bad input is a rejected row among good ones."""

from __future__ import annotations

import datetime
import gzip
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
from conftest import write_jsonl

from fmembed.errors import SourceError
from fmembed.rows.ids import RowIds, contents_of, keys_of
from fmembed.run.stages import read
from fmembed.run.work import skip_committed
from fmembed.sources.opening import open_source
from fmembed.sources.picks import NotKnown
from fmembed.sources.reading import read_here, read_shard
from fmembed.sources.shards import plan_shards
from fmembed.sources.source import File, Source
from fmembed.spec import Format, HubDataset, SourceSpec

ROWS = [{"text": f"text {i}, with a comma", "topic": "ab"[i % 2], "n": i} for i in range(20)]


def rows_of(spec: SourceSpec, committed: RowIds | None = None) -> list[dict[str, Any]]:
    """The rows of all shards, without their markers, which are checked."""
    source = open_source(spec)
    rows = []
    for i, shard in enumerate(source.shards):
        pick = None if committed is None else NotKnown(committed)
        *read, marker = pa.concat_tables(read_shard(source, shard, i, pick)).to_pylist()
        assert all(r["_shard"] == i and r["row_id"] for r in read)
        assert (marker["_shard"], marker["row_id"]) == (i, None)
        assert marker["_total"] == len(read) + marker["_skipped"]
        rows += read
    return rows


def parquet(folder: Path) -> str:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet", row_group_size=7)
    return str(folder / "a.parquet")


def jsonl(folder: Path) -> str:
    return str(write_jsonl(folder / "a.jsonl", ROWS))


def jsonl_gz(folder: Path) -> str:
    plain = write_jsonl(folder / "x", ROWS).read_bytes()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(plain))
    return str(folder / "*.gz")


def csv(folder: Path) -> str:
    lines = [f'"{r["text"]}",{r["topic"]},{r["n"]}' for r in ROWS]
    (folder / "a.csv").write_text("\n".join(["text,topic,n", *lines]), encoding="utf-8")
    return f"file://{folder}/a.csv"


def hf(folder: Path) -> str:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return str(folder / "saved")


@pytest.mark.parametrize("make", [parquet, jsonl, jsonl_gz, csv, hf])
def test_formats_agree(make: Callable[[Path], str], tmp_path: Path) -> None:
    rows = rows_of(SourceSpec(uri=make(tmp_path), label="topic", carry=("n",)))
    assert [r["_input"] for r in rows] == [r["text"] for r in ROWS]
    assert [r["topic"] for r in rows] == [r["topic"] for r in ROWS]
    assert [int(r["n"]) for r in rows] == [r["n"] for r in ROWS]
    assert len({r["row_id"] for r in rows}) == 20
    assert rows[3]["row_id"].endswith("#3")
    assert len(rows[0]["content_hash"]) == 32


def test_hf_by_name_streaming_and_not(tmp_path: Path) -> None:
    folder = tmp_path / "named"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "train.parquet")
    for streaming in (False, True):
        hub = HubDataset(split="train", streaming=streaming)
        rows = rows_of(SourceSpec(uri=str(folder), format="hf", label="topic", hf=hub))
        assert [r["_input"] for r in rows] == [r["text"] for r in ROWS]


def test_text_folder_label_is_the_folder(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "1.txt").write_text(f"about {label}", encoding="utf-8")
    (tmp_path / ".hidden.txt").write_text("no")
    spec = SourceSpec(uri=str(tmp_path), label="topic")
    rows = rows_of(spec)
    assert [(r["row_id"], r["topic"], r["_input"]) for r in rows] == [
        ("a/1.txt", "a", "about a"),
        ("b/1.txt", "b", "about b"),
    ]


def test_files_that_are_rows_are_read_again_when_they_change(tmp_path: Path) -> None:
    for i in range(600):
        (tmp_path / f"{i:03}.txt").write_text(f"about {i}")
    spec = SourceSpec(uri=str(tmp_path))
    shards = open_source(spec).shards
    whole = {shard.key: len(shard.files) for shard in shards if shard.key}
    assert len(whole) == len(shards) > 1
    left, num_skipped = skip_committed(open_source(spec), whole)
    assert (left.shards, num_skipped) == ((), 600)
    # Of the others only what they are grouped with: ends of groups are found by name.
    (tmp_path / "300.txt").write_text("about something else")
    (tmp_path / "301b.txt").write_text("new")
    left, num_skipped = skip_committed(open_source(spec), whole)
    assert num_skipped > 0
    again = {f.name for shard in left.shards for f in shard.files}
    assert {"300.txt", "301b.txt"} < again
    assert len(again) + num_skipped == 601


def test_rows_with_another_content_are_counted(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(f'{{"text": "about {i}"}}\n' for i in range(6)))
    spec = SourceSpec(uri=str(tmp_path))
    (first,) = [t for t in read_here(open_source(spec)) if t.num_rows > 1]
    known = RowIds(keys_of(first["row_id"].to_pylist()), contents_of(["ab" * 16] * 2 + [None] * 4))
    known.add(keys_of(["in.jsonl#6"]), contents_of(["ab" * 16]))
    (tmp_path / "in.jsonl").write_text(
        "".join(f'{{"text": "about {i}"}}\n' for i in range(6)) + "cut\n" + '{"text": "new"}\n'
    )
    source = open_source(spec)
    new, marker = read_shard(source, source.shards[0], 0, NotKnown(known))
    assert new["_input"].to_pylist() == ["new"]
    # Two texts are others by now, and what was embedded from row 6 is no row any more.
    assert marker.select(["_total", "_skipped", "_changed"]).to_pylist() == [
        {"_total": 8, "_skipped": 7, "_changed": 3}
    ]


def test_a_second_row_of_an_id_is_no_change_of_the_first(tmp_path: Path) -> None:
    rows = [{"id": "x", "text": "first"}, {"id": "x", "text": "second"}, {"id": "y", "text": "y"}]
    source = open_source(SourceSpec(uri=str(write_jsonl(tmp_path / "in.jsonl", rows)), id="id"))
    (table,) = [t for t in read_here(source) if t.num_rows > 1]
    contents = contents_of(table["content_hash"].to_pylist())
    for known, num_changed in ((contents[0], 0), (contents[1], 0), (contents[2], 1)):
        ids = RowIds(keys_of(["x"]), np.array([known]))
        *_, marker = read_shard(source, source.shards[0], 0, NotKnown(ids))
        assert marker["_changed"].to_pylist() == [num_changed]


NAMES = ("a%2Fb", "c%20d", "e f", "g#h", "i?j", "ü", "k::l", "m@n:o", "p+q&r=s", "http:", "t*u")


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_path_that_is_there_is_opened_as_it_is_named(scheme: str, tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / f"{name}.jsonl", [{"text": f"in {name}"}])
        (tmp_path / name / f"{name}.txt").write_text(name, encoding="utf-8")
    for name in NAMES:
        folder = f"{scheme}{tmp_path}/{name}"
        for uri in (f"{folder}/{name}.jsonl", folder):
            (row,) = rows_of(SourceSpec(uri=uri, format="jsonl"))
            assert (row["row_id"], row["_input"]) == (f"{name}.jsonl#0", f"in {name}")
        (row,) = rows_of(SourceSpec(uri=f"{folder}/{name}.txt"))
        assert (row["row_id"], row["_input"]) == (f"{name}.txt", name)
    rows = rows_of(SourceSpec(uri=f"{scheme}{tmp_path}", format="text_folder", label="topic"))
    assert sorted(r["row_id"] for r in rows) == sorted(f"{n}/{n}.txt" for n in NAMES)
    assert {r["topic"] for r in rows} == set(NAMES)
    # What is not there may still be a pattern.
    assert len(rows_of(SourceSpec(uri=f"{scheme}{tmp_path}/?/*.jsonl"))) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_root_is_opened_as_it_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / f"{name}.png").write_bytes(b"picture")
    write_jsonl(tmp_path / "in.jsonl", [{"path": f"{name}.png"}])
    root = str(tmp_path / name)
    spec = SourceSpec(uri=str(tmp_path / "in.jsonl"), input="path", root=root)
    source = open_source(spec, ("image",))
    (table, _) = list(read_shard(source, source.shards[0], 0))
    assert table["_input"].to_pylist() == [b"picture"]


def test_bad_lines_are_rejected_and_nothing_around_them_is_lost(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good 0"}',
        b'{"text": ',
        b'{"text": null}',
        b'{"text": 5}',
        b'{"text": "   "}',
        b'{"text": "caf\xe9"}',
        b"[1]",
        b'{"other": "x"}',
        b'{"text": "\\ud800"}',
        b'{"text": "good 9"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    rows = rows_of(SourceSpec(uri=str(tmp_path / "a.jsonl")))
    assert [r["_error"] for r in rows] == [
        None, "bad JSON", "null input", "wrong type", "empty input", "not UTF-8", "bad JSON",
        "null input", "not UTF-8", None,
    ]  # fmt: skip
    assert all(r["_message"] for r in rows[1:9])
    assert [r["row_id"] for r in rows] == [f"a.jsonl#{i}" for i in range(10)]


def test_bad_csv_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'id,text\n1,one\n2,two,three\n,four\n5,caf\xe9\n6,"six\nx"\n')
    rows = rows_of(SourceSpec(uri=str(tmp_path / "a.csv"), id="id"))
    assert [r["_error"] for r in rows] == [None, "bad CSV", "null id", "not UTF-8", None]
    assert rows[0]["row_id"] == "1"


def test_unreadable_parquet_among_good_ones(tmp_path: Path) -> None:
    parquet(tmp_path)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 this is none PAR1")
    rows = rows_of(SourceSpec(uri=str(tmp_path)))
    assert sum(r["_error"] is None for r in rows) == 20
    assert [(r["row_id"], r["_error"]) for r in rows if r["_error"]] == [
        ("b.parquet", "unreadable file")
    ]


def test_no_flipped_byte_of_pages_with_checksums_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.Table.from_pylist(ROWS), path, row_group_size=7, write_page_checksum=True,
        compression="none", use_dictionary=False,
    )  # fmt: skip
    whole = path.read_bytes()
    end = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")  # where the footer begins
    good = {r["text"] for r in ROWS}
    for at in range(4, end, 11):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x21]) + whole[at + 1 :])
        rows = rows_of(SourceSpec(uri=str(path), carry=("topic",)))
        texts = [r["_input"] for r in rows if not r["_error"]]
        assert set(texts) <= good, at
        # A group of rows is lost, at most, or none: a byte of statistics is not looked at.
        assert len(texts) >= 13, at
        assert len(rows) == 20, at
        assert all(r["_message"] and "NoneType" not in r["_message"] for r in rows if r["_error"])


def test_committed_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    spec = SourceSpec(uri=parquet(tmp_path))
    done = RowIds(keys_of(f"a.parquet#{i}" for i in range(15)))
    rows = rows_of(spec, done)
    assert [r["row_id"] for r in rows] == [f"a.parquet#{i}" for i in range(15, 20)]


@pytest.mark.parametrize("make", [parquet, jsonl, jsonl_gz, csv, hf])
def test_whole_shards_are_not_read_again_until_they_change(
    make: Callable[[Path], str], tmp_path: Path
) -> None:
    spec = SourceSpec(uri=make(tmp_path))
    source = open_source(spec)
    keys = [shard.key for shard in source.shards]
    assert all(keys)
    assert len(set(keys)) == len(keys)
    whole = {key: 20 for key in keys if key}
    left, num_skipped = skip_committed(open_source(spec), whole)
    assert (left.shards, num_skipped) == ((), 20)
    # Another column may mean other rows; another label does not.
    renamed = spec.model_copy(update={"input": "topic"})
    assert skip_committed(open_source(renamed), whole)[1] == 0
    if make is not hf:  # its fingerprint covers the columns chosen
        labelled = spec.model_copy(update={"label": "topic"})
        assert skip_committed(open_source(labelled), whole)[1] == 20
        changed = tmp_path / open_source(spec).shards[0].files[0].name
        before = changed.stat()
        os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
        assert skip_committed(open_source(spec), whole)[1] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"uri": "nowhere.jsonl"}, "source.uri: no such file"),
        ({"input": "body"}, "source.input: no column 'body'"),
        ({"label": "topik"}, r"source.label: no column 'topik' in .*; did you mean 'topic'\?$"),
        ({"carry": ("embedding",)}, "source.carry: 'embedding'"),
        ({"uri": "package:no_such_package"}, "source.uri: no Python package"),
    ],
)
def test_wrong_sources(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=message.replace("'", ".")):
        open_source(SourceSpec(**{"uri": parquet(tmp_path), **change}))


def test_a_folder_of_another_kind_than_the_model_takes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"image_folder.*which embeds text"):
        open_source(SourceSpec(uri=str(tmp_path)))


def rooted(tmp_path: Path, paths: list[Any]) -> list[dict[str, Any]]:
    """What is read of a table of paths below a folder."""
    root = tmp_path / "files"
    (root / "in").mkdir(parents=True)
    (root / "in" / "a.png").write_bytes(b"picture a")
    (root / "b.png").write_bytes(b"picture b")
    (tmp_path / "secret.png").write_bytes(b"secret")
    rows = [{"path": p, "n": i} for i, p in enumerate(paths)]
    write_jsonl(tmp_path / "in.jsonl", rows)
    spec = SourceSpec(uri=str(tmp_path / "in.jsonl"), input="path", root=str(root), carry=("path",))
    source = open_source(spec, ("image",))
    (table, _) = read_here(source)
    return table.to_pylist()


def test_paths_in_a_column_are_read_below_their_root(tmp_path: Path) -> None:
    root = tmp_path / "files"
    rows = rooted(tmp_path, ["in/a.png", "b.png", f"{root}/b.png", "none.png", None, 7])
    assert [r["_input"] for r in rows] == [b"picture a", b"picture b", b"picture b", *[None] * 3]
    assert [r["_error"] for r in rows] == [
        None, None, None, "unreadable file", "null input", "wrong type",
    ]  # fmt: skip
    # What was carried is the path, not the picture.
    assert rows[0]["path"] == "in/a.png"


@pytest.mark.parametrize(
    "path",
    ["../secret.png", "in/../../secret.png", "/etc/passwd", "file:///etc/passwd",
     "http://127.0.0.1:9/x", "in\\..\\..\\secret.png"],
)  # fmt: skip
def test_no_path_leads_out_of_the_root(tmp_path: Path, path: str) -> None:
    (row,) = rooted(tmp_path, [path])
    assert (row["_input"], row["_error"]) == (None, "outside the root")


def test_a_root_may_be_a_web_server(tmp_path: Path) -> None:
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "a b.png").write_bytes(b"picture")
    handler = partial(Handler, directory=str(tmp_path / "www"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_address[1]}"
        paths = ["a%20b.png", f"{root}/a%20b.png", "none.png", "http://127.0.0.1:9/a.png"]
        write_jsonl(tmp_path / "in.jsonl", [{"url": p} for p in paths])
        spec = SourceSpec(uri=str(tmp_path / "in.jsonl"), input="url", root=root)
        (table, _) = read_here(open_source(spec, ("image",)))
        server.shutdown()
    assert table["_input"].to_pylist() == [b"picture", b"picture", None, None]
    assert table["_error"].to_pylist()[2:] == ["unreadable file", "outside the root"]


def test_a_two_tower_model_goes_by_the_source(tmp_path: Path) -> None:
    both = ("image", "text")
    columns = {"text": ["a"], "bytes": [b"x"], "image": [{"bytes": b"x", "path": None}]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    uri = str(tmp_path / "x.parquet")
    for column, modality in (("text", "text"), ("bytes", "image"), ("image", "image")):
        assert open_source(SourceSpec(uri=uri, input=column), both).modality == modality
    named = SourceSpec(uri=uri, input="text", root=str(tmp_path))
    assert open_source(named, both).modality == "image"


def test_a_read_task_carries_its_own_shard_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmembed.sources.shards._SHARD_FILES", 5)
    for i in range(200):
        (tmp_path / f"{i:03}.txt").write_text("words")
    source = open_source(SourceSpec(uri=str(tmp_path)))
    assert len(source.shards) == 40
    few = replace(source, shards=source.shards[:1])
    sizes = []
    for some in (few, source):
        tasks = read_tasks(some)
        assert len(tasks) == len(some.shards)
        sizes.append(len(cloudpickle.dumps(tasks[0].read_fn)))
    # A byte here or there: numbers of another length.
    assert sizes[1] == pytest.approx(sizes[0], abs=32)
    last = pa.concat_tables(tasks[-1].read_fn()).to_pylist()
    assert [r["row_id"] for r in last] == [*(f"{i:03}.txt" for i in range(195, 200)), None]
    assert {r["_shard"] for r in last} == {39}


def read_tasks(source: Source) -> list[Any]:
    """What `read` hands to Ray."""
    handed: list[Any] = []
    plan: Any = SimpleNamespace(cpus_per_task=1.0, num_workers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray.data, "read_datasource", lambda shards, **_: handed.append(shards))
        read(source, plan)
    tasks: list[Any] = handed[0].get_read_tasks(1)
    return tasks


class Sized(int):
    """A file's size that counts how often it is looked at."""

    looks = 0

    def __radd__(self, other: int) -> int:
        Sized.looks += 1
        return other + int(self)


@pytest.mark.parametrize("format_", ["text_folder", "jsonl"])
def test_planning_looks_at_each_file_once(format_: Format) -> None:
    files = [File(f"/x/{i:06}", f"{i:06}", Sized(100)) for i in range(20_000)]
    Sized.looks = 0
    shards = list(plan_shards(SourceSpec(uri="x"), format_, None, files))
    assert Sized.looks == len(files)
    assert [f for s in shards for f in s.files] == files
    assert max(len(s.files) for s in shards) <= 512
    assert len(shards) < len(files) / 100


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_small_files_share_a_task(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmembed.sources.shards._MANY_FILES", 10)
    monkeypatch.setattr("fmembed.sources.shards._GROUP_FILES", 4)
    for i in range(40):
        path = tmp_path / f"{i:02}.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.table({"text": [f"{i} a", f"{i} b"]}), path, row_group_size=1)
        elif suffix == "csv":
            path.write_text(f"text\n{i} a\n{i} b\n")
        else:
            write_jsonl(path, [{"text": f"{i} a"}, {"text": f"{i} b"}])
    (tmp_path / f"20.{suffix}").write_bytes(b"\xffnone")
    spec = SourceSpec(uri=str(tmp_path))
    source = open_source(spec)
    assert 4 < len(source.shards) < 25
    # A bad file among them is its own row's fate.
    rows = rows_of(spec)
    good = {r["row_id"]: r["_input"] for r in rows if not r["_error"]}
    names = [i for i in range(40) if i != 20]
    assert good == {f"{i:02}.{suffix}#{n}": f"{i} {'ab'[n]}" for i in names for n in (0, 1)}
    assert [r["row_id"].partition("#")[0] for r in rows if r["_error"]] == [f"20.{suffix}"]
    # What is whole stays on record, but for the group of a file that is new or has changed.
    whole = {shard.key: 2 * len(shard.files) for shard in source.shards if shard.key}
    assert len(whole) == len(source.shards)
    assert skip_committed(open_source(spec), whole)[0].shards == ()
    for name in (f"07b.{suffix}", f"30.{suffix}"):
        shutil.copyfile(tmp_path / f"00.{suffix}", tmp_path / name)
        left, _ = skip_committed(open_source(spec), whole)
        assert name in {f.name for shard in left.shards for f in shard.files}
    assert len(left.shards) <= 3


def test_what_lies_below_a_folder_is_found_as_it_is(tmp_path: Path) -> None:
    """Links to files are read; to folders not; what is no file is listed, to be rejected."""
    folder = tmp_path / "in"
    (folder / "a" / "b").mkdir(parents=True)
    for name in ("one.txt", "a/two.txt", "a/b/three.txt"):
        (folder / name).write_text(name)
    (tmp_path / "blob").write_text("of a snapshot")
    (folder / "link.txt").symlink_to(tmp_path / "blob")
    (folder / "out").symlink_to(tmp_path)
    (folder / "a" / "gone.txt").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.txt")
    source = open_source(SourceSpec(uri=str(folder)))
    (shard,) = source.shards
    assert {f.name: f.size for f in shard.files} == {
        "a/b/three.txt": 13, "a/gone.txt": 0, "a/two.txt": 9, "link.txt": 13, "one.txt": 7,
        "pipe.txt": 0,
    }  # fmt: skip
    assert [f.name for f in shard.files if not f.revision] == ["a/gone.txt"]


def test_a_folder_that_cannot_be_listed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shut").mkdir()
    (tmp_path / "a.txt").write_text("a")
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if path.endswith("shut"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SourceError, match=r"source\.uri: cannot read .*: Permission denied"):
        open_source(SourceSpec(uri=str(tmp_path)))


def test_a_name_that_is_no_utf8_is_written_out(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("odd")
    rows = rows_of(SourceSpec(uri=str(tmp_path)))
    assert {r["row_id"]: r["_input"] for r in rows} == {"good.txt": "good", "caf\\xe9.txt": "odd"}


@pytest.mark.parametrize(
    "path", ["/outside.jsonl", "../outside.jsonl", "http://127.0.0.1:9/x.jsonl"]
)
def test_a_datasets_card_has_nothing_outside_read(path: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data.jsonl", ROWS)
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
        f'    path: "{path}"\n---\n'
    )
    hub = HubDataset(split="train")
    with pytest.raises(SourceError, match="which is not in the dataset's folder"):
        open_source(SourceSpec(uri=str(tmp_path), format="hf", hf=hub))


def test_nested_pictures_of_a_dataset_are_not_fetched() -> None:
    import datasets

    from fmembed.sources.formats.hf import _undecoded

    nested = {"a": datasets.List({"b": datasets.Image()}), "c": [datasets.Audio()]}
    plain = {"a": datasets.List({"b": datasets.Image(decode=False)}),
             "c": [datasets.Audio(decode=False)]}  # fmt: skip
    assert _undecoded(nested) == plain


def test_messages_of_plain_paths_stay_whole() -> None:
    message = "column 'text': takes text, got int"
    assert SourceSpec(uri="data/text/column").conceal(message) == message


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("a.parquet", {"n": [1, 2], "title": ["x", "y"]}),
        ("a.parquet", {"n": [1.5, 2.0], "title": ["x", "y"]}),
        ("a.parquet", {"n": [datetime.date(2026, 1, 1)] * 2, "title": ["x", "y"]}),
        ("a.jsonl", {"n": [1, 2], "title": ["x", "y"]}),
        ("a.jsonl", {"n": [True, False], "title": ["x", "y"]}),
    ],
)
def test_a_column_of_numbers_is_no_text(tmp_path: Path, name: str, rows: dict[str, Any]) -> None:
    table = pa.table(rows)
    if name.endswith("parquet"):
        pq.write_table(table, tmp_path / name)
    else:
        write_jsonl(tmp_path / name, table.to_pylist())
    told = (
        r"source\.input: column 'n' holds \w+(\[day\])?, and the model takes texts: name a column"
    )
    with pytest.raises(SourceError, match=told):
        open_source(SourceSpec(uri=str(tmp_path), input="n"))
    assert open_source(SourceSpec(uri=str(tmp_path), input="title")).shards


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_a_column_of_links_needs_a_root(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    table = pa.table({"photo": ["http://host/a.png", "http://host/b.png"]})
    if suffix == "parquet":
        pq.write_table(table, folder / "a.parquet")
    elif suffix == "jsonl":
        write_jsonl(folder / "a.jsonl", table.to_pylist())
    else:
        (folder / "a.csv").write_text("photo\nhttp://host/a.png\nhttp://host/b.png\n")
    with pytest.raises(
        SourceError, match=r"'photo' holds texts, and the model takes images: if th"
    ):
        open_source(SourceSpec(uri=str(folder), input="photo"), ("image",))
    spec = SourceSpec(uri=str(folder), input="photo", root=str(tmp_path))
    assert open_source(spec, ("image",)).modality == "image"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a.xlsx", r"a spreadsheet: save it as CSV .*read_excel"),
        ("a.PDF", "a document: extract its text first"),
        ("a.pkl", "a pickle, which can run code"),
        ("a.sqlite", "a database"),
        ("a.feather", "an Arrow file"),
    ],
)
def test_what_is_no_dataset_yet_is_told_how_it_becomes_one(
    name: str, told: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(SourceError, match=f"^source.uri: .* is {told}"):
        open_source(SourceSpec(uri=str(tmp_path / name)))
