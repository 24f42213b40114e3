"""A corpus of bad inputs: each rejected with a cause or refused with a message, nothing lost."""

from __future__ import annotations

import bz2
import gzip
import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fmembed.checkpoint.opening import open_checkpoint
from fmembed.errors import SourceError
from fmembed.prepare.stage import Preprocess
from fmembed.sources.opening import open_source
from fmembed.sources.reading import read_here, read_shard
from fmembed.spec import ModelSpec, PreprocessSpec, SourceSpec

GOOD = [{"id": f"g{i}", "text": f"good {i}"} for i in range(4)]
HEAD = [json.dumps(r).encode() for r in GOOD[:2]]
TAIL = [json.dumps(r).encode() for r in GOOD[2:]]


def jsonl(*lines: bytes) -> Callable[[Path], str]:
    """A file of two good lines, the bad ones, two good lines."""

    def make(folder: Path) -> str:
        (folder / "a.jsonl").write_bytes(b"\n".join([*HEAD, *lines, *TAIL]) + b"\n")
        return str(folder / "a.jsonl")

    return make


def csv(bad: bytes) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        lines = [b"id,text", b"g0,good 0", b"g1,good 1", bad, b"g2,good 2", b"g3,good 3"]
        (folder / "a.csv").write_bytes(b"\n".join(lines) + b"\n")
        return str(folder / "a.csv")

    return make


def file(name: str, content: bytes) -> Callable[[Path], str]:
    """A good file and a bad one of the same kind."""

    def make(folder: Path) -> str:
        if name.endswith(".txt"):
            for r in GOOD:
                (folder / f"{r['id']}.txt").write_text(r["text"])
        elif "parquet" in name:
            pq.write_table(pa.Table.from_pylist(GOOD), folder / "good.parquet")
        elif "csv" in name:
            text = "id,text\n" + "".join(f"{r['id']},{r['text']}\n" for r in GOOD)
            (folder / "good.csv").write_text(text)
        else:
            (folder / "good.jsonl").write_bytes(b"\n".join([*HEAD, *TAIL]))
        (folder / name).write_bytes(content)
        return str(folder)

    return make


def parquet_bytes(rows: pa.Table, **options: object) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, **options)
    return sink.getvalue().to_pybytes()


def parquet_column(values: pa.Array) -> Callable[[Path], str]:
    """Two good rows, the bad ones, two good rows, in one Parquet column of the bad ones' type."""

    def make(folder: Path) -> str:
        ids = [f"x{i}" for i in range(len(values))]
        pq.write_table(pa.table({"id": ids, "text": values}), folder / "b.parquet")
        pq.write_table(pa.Table.from_pylist(GOOD), folder / "a.parquet")
        return str(folder)

    return make


def broken_page(folder: Path) -> str:
    """A good file, and one with a few bytes of its data turned."""
    texts = [random.Random(i).randbytes(2000).hex() for i in range(2)]  # noqa: S311
    rows = pa.table({"id": ["y0", "y1"], "text": texts})
    pq.write_table(pa.Table.from_pylist(GOOD), folder / "a.parquet")
    path = folder / "b.parquet"
    pq.write_table(rows, path, compression="gzip", use_dictionary=False, write_statistics=False)
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    content = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    content[middle : middle + 8] = b"\xff" * 8
    path.write_bytes(bytes(content))
    return str(folder)


def utf8_view(raw: bytes) -> pa.Array:
    """A string column that holds bytes which are no UTF-8, as careless writers make it."""
    offsets = pa.py_buffer(b"\0\0\0\0" + len(raw).to_bytes(4, "little"))
    return pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(raw)])


BOMB = gzip.compress(b'{"id": "bomb", "text": "' + b"a" * 50_000_000 + b'"}\n')
CUT_GZIP = gzip.compress(b"\n".join([*HEAD, *TAIL] * 500))[:-200]
ONE = pa.table({"id": ["x0"], "text": ["fine"]})

# What is made, and the causes of what is rejected, in order.
CASES: dict[str, tuple[Callable[[Path], str], list[str]]] = {
    "jsonl: cut object": (jsonl(b'{"text": "x"'), ["bad JSON"]),
    "jsonl: no JSON": (jsonl(b"hello"), ["bad JSON"]),
    "jsonl: array": (jsonl(b'["a"]'), ["bad JSON"]),
    "jsonl: number": (jsonl(b"5"), ["bad JSON"]),
    "jsonl: null": (jsonl(b"null"), ["bad JSON"]),
    "jsonl: two objects": (jsonl(b'{"id": "a"} {"id": "b"}'), ["bad JSON"]),
    "jsonl: deep nesting": (jsonl(b"[" * 100_000), ["bad JSON"]),
    "jsonl: huge integer": (jsonl(b'{"id": ' + b"9" * 5000 + b', "text": "x"}'), ["bad JSON"]),
    "jsonl: NUL bytes": (jsonl(b"\0\0\0\0"), ["bad JSON"]),
    "jsonl: UTF-16": (jsonl(json.dumps(GOOD[0]).encode("utf-16")), ["not UTF-8"]),
    "jsonl: Latin-1": (jsonl('{"id": "a", "text": "café"}'.encode("latin-1")), ["not UTF-8"]),
    "jsonl: lone surrogate": (jsonl(b'{"id": "a", "text": "\\ud800"}'), ["not UTF-8"]),
    "jsonl: surrogate id": (jsonl(b'{"id": "\\ud800", "text": "x"}'), ["not UTF-8"]),
    "jsonl: null text": (jsonl(b'{"id": "a", "text": null}'), ["null input"]),
    "jsonl: no text": (jsonl(b'{"id": "a"}'), ["null input"]),
    "jsonl: empty text": (jsonl(b'{"id": "a", "text": ""}'), ["empty input"]),
    "jsonl: spaces": (jsonl(b'{"id": "a", "text": " \\n\\t "}'), ["empty input"]),
    "jsonl: number as text": (jsonl(b'{"id": "a", "text": 1.5}'), ["wrong type"]),
    "jsonl: list as text": (jsonl(b'{"id": "a", "text": ["b"]}'), ["wrong type"]),
    "jsonl: object as text": (jsonl(b'{"id": "a", "text": {"b": 1}}'), ["wrong type"]),
    "jsonl: boolean as text": (jsonl(b'{"id": "a", "text": true}'), ["wrong type"]),
    "jsonl: null id": (jsonl(b'{"id": null, "text": "x"}'), ["null id"]),
    "jsonl: empty id": (jsonl(b'{"id": "", "text": "x"}'), ["null id"]),
    "jsonl: list as id": (jsonl(b'{"id": [1], "text": "x"}'), ["wrong type"]),
    "jsonl: real as id": (jsonl(b'{"id": 1.5, "text": "x"}'), ["wrong type"]),
    "jsonl: several": (jsonl(b"{", b"}", b'{"id": "a"}'), ["bad JSON", "bad JSON", "null input"]),
    "jsonl.gz: cut": (file("bad.jsonl.gz", CUT_GZIP), ["unreadable file"]),
    "jsonl.gz: not gzip": (file("bad.jsonl.gz", b"plain text"), ["unreadable file"]),
    "jsonl.gz: bad deflate": (
        file("bad.jsonl.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + b"\xff" * 40),
        ["unreadable file"],
    ),
    "jsonl.gz: zlib stream": (file("bad.jsonl.gz", zlib.compress(HEAD[0])), ["unreadable file"]),
    "jsonl.gz: bzip2": (file("bad.jsonl.gz", bz2.compress(HEAD[0])), ["unreadable file"]),
    "jsonl: empty file": (file("bad.jsonl", b""), []),
    "jsonl: blank lines": (file("bad.jsonl", b"\n\n \n"), []),
    "jsonl: binary": (file("bad.jsonl", bytes(range(256))), ["bad JSON", "not UTF-8"]),
    "csv: too many fields": (csv(b"a,b,c"), ["bad CSV"]),
    "csv: too few fields": (csv(b"a"), ["bad CSV"]),
    "csv: empty text": (csv(b"a,"), ["empty input"]),
    "csv: empty id": (csv(b",x"), ["null id"]),
    "csv: Latin-1": (csv("a,café".encode("latin-1")), ["not UTF-8"]),
    "csv: text after a quote": (csv(b'a,"b"c'), ["bad CSV"]),
    "csv: NUL byte": (csv(b"a,b\0c"), []),
    "csv: without the column": (file("bad.csv", b"id,body\n1,x\n"), ["unreadable file"]),
    "csv: empty file": (file("bad.csv", b""), ["unreadable file"]),
    "parquet: no Parquet": (file("bad.parquet", b"PAR1 nothing PAR1"), ["unreadable file"]),
    "parquet: empty file": (file("bad.parquet", b""), ["unreadable file"]),
    "parquet: cut": (file("bad.parquet", parquet_bytes(ONE)[:-30]), ["unreadable file"]),
    "parquet: without the column": (
        file("bad.parquet", parquet_bytes(pa.table({"id": ["x"], "body": ["y"]}))),
        ["unreadable file"],
    ),
    "parquet: broken page": (broken_page, ["unreadable file"] * 2),
    "parquet: nulls": (parquet_column(pa.array([None, "fine"])), ["null input"]),
    "parquet: integers": (parquet_column(pa.array([1, 2])), ["wrong type"] * 2),
    "parquet: lists": (parquet_column(pa.array([["a"], ["b"]])), ["wrong type"] * 2),
    "parquet: binary, not UTF-8": (
        parquet_column(pa.array([b"fine", b"\xff\xfe"])),
        ["not UTF-8"],
    ),
    "parquet: string, not UTF-8": (parquet_column(utf8_view(b"caf\xe9")), ["not UTF-8"]),
    "txt: Latin-1": (file("bad.txt", "café".encode("latin-1")), ["not UTF-8"]),
    "txt: empty": (file("bad.txt", b""), ["empty input"]),
    "txt: binary": (file("bad.txt", b"\x89PNG\r\n\x1a\n"), ["not UTF-8"]),
    "txt: spaces": (file("bad.txt", b" \n\n "), ["empty input"]),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_malformed(case: str, tmp_path: Path, tiny_bert: Path) -> None:
    make, causes = CASES[case]
    uri = make(tmp_path)
    with_ids = not case.startswith("txt")
    source = open_source(SourceSpec(uri=uri, id="id" if with_ids else None))
    tokenize = Preprocess(open_checkpoint(ModelSpec(id=str(tiny_bert)), False), PreprocessSpec())
    rows = []
    for i, shard in enumerate(source.shards):
        read = pa.concat_tables(read_shard(source, shard, i))
        total = read["_total"].to_pylist()[-1]
        assert read.num_rows == total + 1
        rows += tokenize(read).to_pylist()[:-1]
    rejected = [r for r in rows if r["_stage"]]
    assert [r["_error"] for r in rejected] == causes
    assert all(r["row_id"] and r["_message"] and r["_stage"] == "read" for r in rejected)
    assert all(r["model_input"] is None for r in rejected)
    good = {r["row_id"] for r in rows if not r["_stage"]}
    assert good >= {r["id"] if with_ids else f"{r['id']}.txt" for r in GOOD}


REFUSED: dict[str, tuple[str, bytes | None, str]] = {
    "nothing there": ("none.jsonl", None, "no such file"),
    "an unknown kind": ("a.xyz", b"x", "cannot tell the format"),
    "only a broken Parquet file": ("a.parquet", b"no", "no readable parquet file"),
    "an array in JSON": ("a.jsonl", b'[{"text": "a"},\n{"text": "b"}]', "a line begins an array"),
    "only binary JSON lines": ("a.jsonl", b"\xff\xfe\n", "no JSON object in it"),
    "an empty CSV file": ("a.csv", b"", "no readable csv file"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused(case: str, tmp_path: Path) -> None:
    name, content, message = REFUSED[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        open_source(SourceSpec(uri=str(tmp_path / name), id="id"))


def test_what_breaks_off_has_an_id_that_no_row_has(tmp_path: Path) -> None:
    lines = b'{"text": "a"}\n\n\n{"text": "b"}\n' * 300
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-12])
    source = open_source(SourceSpec(uri=str(tmp_path)))
    rows = pa.concat_tables(read_here(source)).to_pylist()[:-1]
    ids = [r["row_id"] for r in rows]
    assert len(ids) == len(set(ids)) > 10
    assert rows[-1]["_error"] == "unreadable file"
    assert ids[-1].endswith("..")


def test_the_corpus_is_large_enough() -> None:
    assert len(CASES) + len(REFUSED) >= 60


def test_a_gzip_bomb_is_one_long_row(tmp_path: Path) -> None:
    """50 MB in 49 kB: read as what it is, a line, without a second copy of the file on disk."""
    source = open_source(SourceSpec(uri=file("bomb.jsonl.gz", BOMB)(tmp_path), id="id"))
    rows = [r for t in read_here(source) for r in t.to_pylist() if r["row_id"]]
    lengths = {r["row_id"]: len(r["_input"]) for r in rows}
    assert lengths["bomb"] == 50_000_000
    assert len(lengths) == 5
