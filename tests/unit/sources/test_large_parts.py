"""One large file read in parts: the same rows, by the same ids, as from one end to the other."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmembed.errors import SourceError
from fmembed.sources import locating
from fmembed.sources.formats import ranges
from fmembed.sources.opening import open_source
from fmembed.sources.reading import read_shard
from fmembed.sources.source import Mark, Shard, Source
from fmembed.spec import SourceSpec

Rows = list[tuple[Any, ...]]


def rows_of(source: Source, shards: list[Shard]) -> Rows:
    tables = [rows for i, shard in enumerate(shards) for rows in read_shard(source, shard, i)]
    rows = pa.concat_tables(tables).to_pylist()
    names = ("row_id", "_input", "label", "cls", "_error", "_message")
    return [tuple(r.get(n) for n in names) for r in rows if r["row_id"] is not None]


def locate(source: Source, wanted: list[Shard], ends: dict[str, Mark]) -> list[Shard]:
    """As `run.locating.locate`, in this process."""
    found = {}
    for some in locating.list_unlocated(source, wanted, ends):
        counts = [locating.count_part(source, part) for part in some.parts]
        for shard in locating.locate(source, some, counts):
            found[shard.start] = shard
    return [found.get(shard.start, shard) for shard in wanted]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(ranges, "PART_BYTES", 64)
    return monkeypatch


def check(path: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int, **told: Any) -> Source:
    """All ways to read a file's parts give what reading it whole does."""
    spec = SourceSpec(uri=str(path), **told)
    monkeypatch.setattr(ranges, "PART_BYTES", 2**30)
    whole = open_source(spec)
    expected = rows_of(whole, list(whole.shards))
    monkeypatch.setattr(ranges, "PART_BYTES", part_bytes)
    source = open_source(spec)
    shards = list(source.shards)
    located = locate(source, shards, {})
    assert rows_of(source, located) == expected
    # Where nobody has looked before; read on from where a run has come to; only here and there.
    ends = {s.key: s.marks[1] for s in located if s.key and s.marks}
    for i in {1, len(shards) // 2, len(shards) - 1} - {0} if len(shards) > 1 else ():
        assert rows_of(source, shards[i : i + 1]) == rows_of(source, located[i : i + 1])
        known = {s.key: ends[s.key] for s in shards[:i] if s.key in ends}
        again = locate(source, shards[i:], known)
        assert rows_of(source, again) == rows_of(source, located[i:])
        some = locate(source, shards[i : i + 1], {})
        assert rows_of(source, some) == rows_of(source, located[i : i + 1])
    if len(shards) > 1:
        assert sum(s.num_bytes for s in shards) == source.num_bytes == path.stat().st_size
    return source


LINES = [
    '{"text": "one", "label": "a"}', '{"text": "zwei ä", "label": "b"}', "", "   ",
    '{"text": ', "[1]", '{"text": "a long one %s", "label": "c"}' % ("x" * 150), "\ufeffno",
]  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lines=st.lists(st.sampled_from(LINES), min_size=1, max_size=30),
    end=st.sampled_from(["\n", "\r\n"]),
    is_ended=st.booleans(),
    has_bom=st.booleans(),
    part_bytes=st.sampled_from([16, 40, 64, 200]),
    read_bytes=st.sampled_from([5, 64, 2**20]),
)
def test_json_lines(
    lines: list[str], end: str, is_ended: bool, has_bom: bool, part_bytes: int, read_bytes: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("jsonl") / "rows.jsonl"
    text = end.join(['{"text": "first", "label": "z"}', *lines]) + (end if is_ended else "")
    path.write_bytes((b"\xef\xbb\xbf" if has_bom else b"") + text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "READ_BYTES", read_bytes)
        check(path, patch, part_bytes, label="label", id=None)


FIELDS = [
    "one", "zwei ä", '"quoted"', '"with, comma"', '"two ""quotes"""', '"over\nlines\n\nthree"',
    '5" disk', "", '"' + "long\n" * 40 + '"',
]  # fmt: skip


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(
        st.one_of(
            st.tuples(st.sampled_from(FIELDS), st.sampled_from(["a", "b"])).map(",".join),
            st.sampled_from(["", "a,b,c", "only", '"not closed,a', '"ab"c,d']),
        ),
        min_size=1,
        max_size=25,
    ),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    is_ended=st.booleans(),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "latin-1"]),
    quote=st.sampled_from([None, ""]),
    part_bytes=st.sampled_from([16, 50, 200]),
    read_bytes=st.sampled_from([5, 64, 2**20]),
)
def test_csv(
    rows: list[str], end: str, is_ended: bool, encoding: str, quote: str | None, part_bytes: int,
    read_bytes: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("csv") / "rows.csv"
    text = end.join(["text,label", *rows]) + (end if is_ended else "")
    path.write_bytes(text.encode(encoding))
    told = {"encoding": "latin-1" if encoding == "latin-1" else "utf-8", "quote": quote}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "READ_BYTES", read_bytes)
        check(path, patch, part_bytes, label="label", csv=told)


def test_plain_csv_is_located_without_reading_its_rows(
    tmp_path: Path, small_parts: pytest.MonkeyPatch
) -> None:
    """Quotes decide whether more than the ends of lines has to be looked at."""
    from fmembed.sources.formats import csv as csv_format

    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "some text,a\n" * 100)
    small_parts.setattr(csv_format, "open_part", None)
    source = open_source(SourceSpec(uri=str(path)))
    assert len(source.shards) == 19
    located = locate(source, list(source.shards), {})
    assert [s.first_row for s in located[:3]] == [0, 5, 10]


def test_parts_do_not_depend_on_how_large_a_row_may_be(
    tmp_path: Path, small_parts: pytest.MonkeyPatch
) -> None:
    """What is on record of some has to fit the others, when the limit is another one."""
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"one",a\n' + "ä" * 100 + ",b\n" + '"three",c\n' * 20)
    marks = []
    for most in (150, 10_000):
        source = check(path, small_parts, 64, label="label", max_text_bytes=most)
        marks.append([s.marks for s in locate(source, list(source.shards), {})])
    assert marks[0] == marks[1]
    assert len({begin.byte for begin, _ in filter(None, marks[0])}) > 4


def test_long_fields_are_looked_through_whoever_does(
    tmp_path: Path, small_parts: pytest.MonkeyPatch
) -> None:
    """The module's own limit of a field's length is below a long article."""
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"' + "long\n" * 40_000 + '",a\n' + '"short",b\n' * 9000)
    csv.field_size_limit(2**17)
    source = open_source(SourceSpec(uri=str(path), label="label"))
    csv.field_size_limit(2**17)
    located = locate(source, list(source.shards)[:3], {})
    assert [s.marks for s in located] == [
        (Mark(0, 0, 0), Mark(200_016, 1, 40_002)),
        *[(Mark(200_016, 1, 40_002),) * 2] * 2,
    ]


@pytest.mark.parametrize("known", [1, 2, 4])
def test_a_row_that_goes_on_to_the_end_is_no_other_parts(
    known: int, tmp_path: Path, small_parts: pytest.MonkeyPatch
) -> None:
    """A quote is not closed; what comes after it is of that row, whoever looks from where."""
    path = tmp_path / "rows.csv"
    path.write_text('text,label\none,a\n"not closed,b\n' + "more,c\n" * 40)
    source = open_source(SourceSpec(uri=str(path), label="label"))
    shards = list(source.shards)
    located = locate(source, shards, {})
    ends = {s.key: s.marks[1] for s in located[:known] if s.key and s.marks}
    assert rows_of(source, locate(source, shards[known:], ends)) == []


@pytest.mark.parametrize("end", [(0, 0, 0), (64, -1, 0), (64, 3, -2), (10**9, 0, 0)])
def test_a_record_of_a_part_that_makes_no_sense_is_passed_over(
    end: tuple[int, int, int], tmp_path: Path, small_parts: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "number {i}"}}\n' for i in range(20)))
    source = open_source(SourceSpec(uri=str(path)))
    shards = list(source.shards)
    assert (
        locate(source, shards[1:], {shards[0].key or "": Mark(*end)})
        == (locate(source, shards, {})[1:])
    )


@pytest.mark.parametrize(
    "told",
    [{"csv": {"encoding": "utf-8-sig"}}, {"csv": {"encoding": "iso2022_jp"}},
     {"csv": {"encoding": "mac_arabic"}}, {"encoding_errors": "ignore"}],
)  # fmt: skip
def test_csv_whose_bytes_may_be_something_else_is_not_cut(
    told: dict[str, Any], tmp_path: Path, small_parts: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.csv").write_text("text,label\n" + "one,a\n" * 100)
    source = open_source(SourceSpec(uri=str(tmp_path / "rows.csv"), **told))
    assert len(source.shards) == 1


@pytest.mark.parametrize("header", ['text,"label"x', "text,label,text"], ids=["bad", "twice"])
def test_a_csv_without_a_header_is_rejected_once(
    header: str, tmp_path: Path, small_parts: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.csv").write_text("text,label\none,a\n")
    (tmp_path / "b.csv").write_text(f"{header}\n" + "one,a\n" * 40)
    source = open_source(SourceSpec(uri=str(tmp_path), label="label"))
    rows = rows_of(source, locate(source, list(source.shards), {}))
    assert [(r[0], r[4]) for r in rows][1:] == [("b.csv", "unreadable file")]


def test_a_csv_without_the_column_is_rejected_once(
    tmp_path: Path, small_parts: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.csv").write_text("text,label\none,a\n")
    (folder / "b.csv").write_text("other,label\n" + "one,a\n" * 40)
    source = open_source(SourceSpec(uri=str(folder), label="label"))
    assert len(source.shards) > 3
    rows = rows_of(source, locate(source, list(source.shards), {}))
    assert [(r[0], r[4]) for r in rows] == [("a.csv#0", None), ("b.csv", "unreadable file")]


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv", "small.jsonl"])
def test_what_cannot_be_cut_is_not(
    name: str, tmp_path: Path, small_parts: pytest.MonkeyPatch
) -> None:
    """What is compressed, in an encoding whose bytes mean nothing alone, or small."""
    import gzip

    rows = [{"text": f"number {i}", "label": "a"} for i in range(40)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if name.endswith(".gz"):
        content = gzip.compress(text.encode(), 0)
    elif name.endswith(".csv"):
        content = ("text,label\n" + "one,a\n" * 40).encode("utf-16")
    else:
        content = text[: text.index("\n", 80)].encode()
    (tmp_path / name).write_bytes(content)
    told: Any = {"csv": {"encoding": "utf-16"}} if name.endswith(".csv") else {}
    source = open_source(SourceSpec(uri=str(tmp_path / name), **told))
    assert [s.start for s in source.shards] == [None]


def add(archive: tarfile.TarFile, name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type = len(content), kind
    archive.addfile(member, io.BytesIO(content))


MEMBERS = [
    ("txt",), ("txt", "cls"), ("cls", "txt"), ("txt", "cls", "txt", "cls"), ("json",), ("._txt",),
]  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    samples=st.lists(
        st.tuples(st.sampled_from(MEMBERS), st.sampled_from([3, 600, 3000]), st.integers(0, 6)),
        min_size=1,
        max_size=12,
    ),
    kind=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT]),
    is_long=st.booleans(),
    num_archives=st.integers(1, 2),
    lost=st.sampled_from([0, 0, 700, 20_000]),
    part_bytes=st.sampled_from([1024, 4096, 10_000]),
)
def test_tar(
    samples: list[tuple[tuple[str, ...], int, int]], kind: int, is_long: bool, num_archives: int,
    lost: int, part_bytes: int, tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    """Samples of several members, some twice; long names; archives put together or cut short."""
    path = tmp_path_factory.mktemp("tar") / "rows.tar"
    folder = "long" * 40 if is_long and kind != tarfile.USTAR_FORMAT else "in"
    content = b""
    for number in range(num_archives):
        sink = io.BytesIO()
        with tarfile.open(fileobj=sink, mode="w", format=kind) as archive:
            add(archive, folder, b"", tarfile.DIRTYPE)
            for names, size, key in samples:
                for name in names:
                    hidden, plain = ("._", name[2:]) if name.startswith("._") else ("", name)
                    text = f"{number} {key} ".encode() + b"x" * size
                    add(archive, f"{folder}/{hidden}{key}.{plain}", text)
        content += sink.getvalue()
    path.write_bytes(content[: max(len(content) - lost, 600)])
    told = (
        {"input": "txt", "label": "cls"}
        if any("cls" in n for n, *_ in samples)
        else {"input": "txt"}
    )
    if not any("txt" in names for names, *_ in samples):
        return
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SourceError):
        check(path, patch, part_bytes, **told)


def test_a_part_that_begins_as_a_compressed_file_does_is_none(
    tmp_path: Path, small_parts: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.tar"
    with tarfile.open(path, "w") as archive:
        for name in ["a", *(f"BZh{i:03}" for i in range(10))]:
            add(archive, f"{name}.txt", b"text")
    assert len(check(path, small_parts, 1024, input="txt").shards) > 5


def test_headers_that_tarfile_cannot_read_end_the_archive(
    tmp_path: Path, small_parts: pytest.MonkeyPatch
) -> None:
    """Whatever it raises of them; what is before them is read."""
    path = tmp_path / "rows.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for i in range(20):
            member = tarfile.TarInfo(f"{i}.txt")
            member.size = 4
            if i == 14:
                member.pax_headers = {"GNU.sparse.map": "abc"}
            archive.addfile(member, io.BytesIO(b"text"))
    source = check(path, small_parts, 1024, input="txt")
    rows = rows_of(source, locate(source, list(source.shards), {}))
    assert [r[4] for r in rows] == [None] * 13 + ["unreadable file"]


def test_an_archive_with_a_header_for_all_that_follows_is_one_part(
    tmp_path: Path, small_parts: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.tar"
    headers = {"comment": "of all"}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers=headers) as archive:
        for i in range(10):
            add(archive, f"{i}.txt", b"text")
    source = check(path, small_parts, 1024, input="txt")
    located = locate(source, list(source.shards), {})
    assert [s.marks[0].byte for s in located if s.marks][1:] == [path.stat().st_size] * (
        len(located) - 1
    )
