"""Small files that unfold to more than memory holds: one rejected row each, and memory bounded.

Each is read by a process of its own, whose peak is what it says itself (VmHWM).
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fmembed.errors import SourceError
from fmembed.sources.opening import open_source
from fmembed.spec import SourceSpec

pytestmark = pytest.mark.slow

MIB = 2**20
# Above what the process holds before it reads: a row of 64 MiB several times over.
MOST_MIB = 400
READ = """
import json, sys
from fmembed.sources.opening import open_source
from fmembed.sources.reading import read_shard
from fmembed.spec import SourceSpec

def peak_mib():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("VmHWM")) / 1024

spec, modality = json.loads(sys.argv[1])
before = peak_mib()
source = open_source(SourceSpec(**spec), (modality,))
rows = []
for i, shard in enumerate(source.shards):
    for table in read_shard(source, shard, i):
        columns = ["row_id", "_error", "_message"]
        rows += [r for r in table.select(columns).to_pylist() if r["row_id"]]
print(json.dumps([rows, peak_mib() - before]))
"""


def read(modality: str = "text", **spec: Any) -> tuple[list[dict[str, Any]], float]:
    """What a process of its own reads, and the MiB that it took."""
    command = [sys.executable, "-c", READ, json.dumps([spec, modality])]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    rows, peak = json.loads(run.stdout)
    return rows, peak


def gz(*pieces: bytes | tuple[bytes, int]) -> bytes:
    """Gzip members one after another, some many times: made in no time, they unfold as one."""
    made = [(p, 1) if isinstance(p, bytes) else p for p in pieces]
    return b"".join(gzip.compress(piece, 1) * times for piece, times in made)


def jsonl_line(folder: Path) -> dict[str, Any]:
    bomb = gz(b'{"text": "good 0"}\n{"text": "', (b"a" * MIB, 600), b'"}\n{"text": "good 1"}\n')
    (folder / "a.jsonl.gz").write_bytes(bomb)
    return {"uri": str(folder / "a.jsonl.gz")}


def jsonl_without_an_end(folder: Path) -> dict[str, Any]:
    (folder / "a.jsonl.gz").write_bytes(gz(b'{"text": "good 0"}\n', (b"\0" * MIB, 600)))
    return {"uri": str(folder / "a.jsonl.gz")}


def jsonl_of_values(folder: Path) -> dict[str, Any]:
    """50 MB of empty objects, of 72 bytes each to Python."""
    bomb = gz(b'{"text": "good 0"}\n{"text": [{}', (b",{}" * 350_000, 50), b"]}\n")
    (folder / "a.jsonl.gz").write_bytes(bomb)
    return {"uri": str(folder / "a.jsonl.gz")}


def jsonl_of_large_rows(folder: Path) -> dict[str, Any]:
    """Each bearable; a hundred of them, which a sample or a table would hold at once, are not."""
    line = gz(b'{"text": "good", "junk": "', (b"a" * MIB, 30), b'"}\n')
    (folder / "a.jsonl.gz").write_bytes(line * 20)
    return {"uri": str(folder / "a.jsonl.gz"), "carry": ["junk"]}


def csv_field(folder: Path) -> dict[str, Any]:
    bomb = gz(b"id,text\n1,good\n2,", (b"a" * MIB, 600), b"\n3,good\n")
    (folder / "a.csv.gz").write_bytes(bomb)
    return {"uri": str(folder / "a.csv.gz")}


def csv_quoted_lines(folder: Path) -> dict[str, Any]:
    line = (b"a" * 1023 + b"\n") * 1024
    bomb = gz(b'id,text\n1,good\n2,"', (line, 400), b'",x\n3,"good ""one"""\n')
    (folder / "a.csv.gz").write_bytes(bomb)
    return {"uri": str(folder / "a.csv.gz"), "max_text_bytes": 8 * MIB}


def csv_open_quote(folder: Path) -> dict[str, Any]:
    bomb = gz(b'id,text\n1,good\n2,"', ((b"a" * 1023 + b"\n") * 1024, 400))
    (folder / "a.csv.gz").write_bytes(bomb)
    return {"uri": str(folder / "a.csv.gz"), "max_text_bytes": 8 * MIB}


def csv_of_columns(folder: Path) -> dict[str, Any]:
    """A thousand rows of 100,000 fields, of which one is wanted."""
    row = b"good" + b"," * 100_000 + b"\n"
    header = b"text" + b"".join(b",c%d" % i for i in range(100_000)) + b"\n"
    (folder / "a.csv.gz").write_bytes(gz(header, (row, 60)))
    return {"uri": str(folder / "a.csv.gz")}


def csv_of_commas(folder: Path) -> dict[str, Any]:
    bomb = gz(b"id,text\n1,good\n2", (b"," * MIB, 40), b"\n3,good\n")
    (folder / "a.csv.gz").write_bytes(bomb)
    return {"uri": str(folder / "a.csv.gz")}


def text_file(folder: Path) -> dict[str, Any]:
    (folder / "b.txt").write_text("good")
    with (folder / "a.txt").open("wb") as file:
        file.truncate(10 * 2**30)
    return {"uri": str(folder)}


def below_root(folder: Path) -> dict[str, Any]:
    with (folder / "a.png").open("wb") as file:
        file.truncate(10 * 2**30)
    (folder / "b.png").write_bytes(b"good")
    lines = [json.dumps({"path": name}) for name in ("b.png", "a.png", "b.png")]
    (folder / "in.jsonl").write_text("\n".join(lines))
    return {"uri": str(folder / "in.jsonl"), "input": "path", "root": str(folder)}


def parquet(folder: Path, texts: Any, **options: Any) -> dict[str, Any]:
    path = folder / "a.parquet"
    options = {"compression": "zstd", "use_dictionary": False, **options}
    pq.write_table(pa.table({"text": texts}), path, **options)
    assert path.stat().st_size < MIB
    return {"uri": str(path)}


def parquet_cells(folder: Path) -> dict[str, Any]:
    return parquet(folder, ["a" * (140 * MIB)] * 4, row_group_size=2)


def parquet_cell_among_others(folder: Path) -> dict[str, Any]:
    return parquet(folder, ["good"] * 40 + ["a" * (100 * MIB)] + ["good"] * 40)


def parquet_dictionary(folder: Path) -> dict[str, Any]:
    """4 MiB once, 200 times as a number."""
    dictionary = pa.DictionaryArray.from_arrays(pa.array([0] * 200), ["a" * (4 * MIB)])
    return parquet(folder, dictionary.cast(pa.string()), use_dictionary=True) | {
        "max_text_bytes": MIB
    }


def parquet_arrow_dictionary(folder: Path) -> dict[str, Any]:
    dictionary = pa.DictionaryArray.from_arrays(pa.array([0] * 200), ["a" * (4 * MIB)])
    return parquet(folder, dictionary, use_dictionary=True) | {"max_text_bytes": MIB}


def parquet_deltas(folder: Path) -> dict[str, Any]:
    """Each the one before it and a few letters more."""
    texts = ["a" * (4 * MIB) + str(i) for i in range(200)]
    options = {"column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    return parquet(folder, texts, **options) | {"max_text_bytes": MIB}


def varint(number: int) -> bytes:
    """As Thrift writes a positive number."""
    left, made = number << 1, b""
    while left > 127:
        made, left = made + bytes([left & 127 | 128]), left >> 7
    return made + bytes([left])


def lie(path: Path, truth: int, told: int) -> None:
    """Have a Parquet file's footer tell another number, written in as many bytes."""
    content = path.read_bytes()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    old, new = varint(truth), varint(told)
    new = new[:-1] + bytes([new[-1] | 128]) + b"\x80" * (len(old) - len(new) - 1) + b"\0"
    footer = content[start:]
    assert old in footer
    path.write_bytes(content[:start] + footer.replace(old, new[-len(old) :]))


def parquet_footer_lies(folder: Path) -> dict[str, Any]:
    """600 MiB in each page, of which the footer says that they are a kilobyte."""
    texts = ["a" * (600 * MIB), "good"]
    spec = parquet(folder, texts, row_group_size=1, write_statistics=False)
    path = folder / "a.parquet"
    column = pq.read_metadata(path).row_group(0).column(0)
    lie(path, column.total_uncompressed_size, 1000)
    assert pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size == 1000
    return spec


def parquet_numbers(folder: Path) -> dict[str, Any]:
    """A list of fifty million zeros, in ten bytes."""
    path = folder / "a.parquet"
    lists = [np.zeros(50_000_000, np.int8), np.zeros(3, np.int8)]
    table = pa.table({"text": ["good"] * 2, "tags": pa.array(lists)})
    pq.write_table(table, path, row_group_size=1)
    assert path.stat().st_size < MIB
    return {"uri": str(path), "carry": ["tags"]}


def parquet_counts_lie(folder: Path) -> dict[str, Any]:
    """The same of which the footer says that they are three."""
    spec = parquet_numbers(folder)
    lie(folder / "a.parquet", 50_000_000, 3)
    return spec


def saved_in_zstd(folder: Path) -> dict[str, Any]:
    """A dataset as `datasets` saves it, but for its buffers: those it leaves as they are."""
    datasets.Dataset.from_dict({"text": ["good"]}).save_to_disk(str(folder / "saved"))
    (path,) = (folder / "saved").glob("*.arrow")
    table = pa.table({"text": ["a" * (600 * MIB)]})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(path, table.schema, options=options) as stream:
        stream.write_table(table)
    assert path.stat().st_size < MIB
    return {"uri": str(folder / "saved"), "format": "hf"}


def parquet_lists(folder: Path) -> dict[str, Any]:
    path = folder / "a.parquet"
    table = pa.table({"text": ["good"] * 200, "tags": [["a" * 4096] * 512] * 200})
    pq.write_table(table, path)
    return {"uri": str(path), "carry": ["tags"]}


def tar(folder: Path, name: str = "a.tar") -> tarfile.TarFile:
    return tarfile.open(folder / name, "w")


def add(archive: tarfile.TarFile, name: str, content: bytes = b"good") -> None:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    archive.addfile(header, io.BytesIO(content))


def blocks(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    return b"".join(
        header.tobuf(tarfile.GNU_FORMAT) + content + b"\0" * (-len(content) % 512)
        for header, content in members
    )


def header(name: str, size: int, type_: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.size, made.type = size, type_
    return made


def tar_member(folder: Path) -> dict[str, Any]:
    one = blocks((header("a.txt", 4), b"good"))
    bomb = header("b.txt", 600 * MIB).tobuf(tarfile.GNU_FORMAT)
    last = blocks((header("c.txt", 4), b"good")) + b"\0" * 1024
    (folder / "a.tar.gz").write_bytes(gz(one, bomb, (b"\0" * MIB, 600), last))
    return {"uri": str(folder / "a.tar.gz"), "input": "txt"}


def tar_bz2(folder: Path) -> dict[str, Any]:
    """Under a name that says nothing of it: ten kilobytes unfold to gigabytes."""
    one = blocks((header("a.txt", 4), b"good"))
    bomb = bz2.compress(header("b.txt", 400 * MIB).tobuf(tarfile.GNU_FORMAT))
    zeros = bz2.compress(b"\0" * (20 * MIB)) * 20
    last = bz2.compress(blocks((header("c.txt", 4), b"good")) + b"\0" * 1024)
    (folder / "a.tar").write_bytes(bz2.compress(one) + bomb + zeros + last)
    return {"uri": str(folder / "a.tar"), "input": "txt"}


def tar_sparse(folder: Path) -> dict[str, Any]:
    """A member that claims 10 TiB and holds nothing."""
    bomb = bytearray(header("b.txt", 0, tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    bomb[386:398], bomb[398:410] = b"00000000000\0", b"00000000000\0"
    bomb[483:495] = (10 * 2**40).to_bytes(12, "big")
    bomb[483] |= 0x80
    bomb[148:156] = b" " * 8
    bomb[148:156] = b"%06o\0 " % sum(bomb)
    one, last = (blocks((header(f"{n}.txt", 4), b"good")) for n in "ac")
    (folder / "a.tar").write_bytes(one + bytes(bomb) + last + b"\0" * 1024)
    return {"uri": str(folder / "a.tar"), "input": "txt"}


def tar_pax(folder: Path) -> dict[str, Any]:
    two = blocks((header("a.txt", 4), b"good"), (header("b.txt", 4), b"good"))
    bomb = header("c.txt", 600 * MIB, tarfile.XHDTYPE).tobuf(tarfile.GNU_FORMAT)
    (folder / "a.tar.gz").write_bytes(gz(two, bomb, (b"\0" * MIB, 600)))
    return {"uri": str(folder / "a.tar.gz"), "input": "txt"}


def tar_long_name(folder: Path) -> dict[str, Any]:
    two = blocks((header("a.txt", 4), b"good"), (header("b.txt", 4), b"good"))
    bomb = header("c.txt", 600 * MIB, tarfile.GNUTYPE_LONGNAME).tobuf(tarfile.GNU_FORMAT)
    (folder / "a.tar.gz").write_bytes(gz(two, bomb, (b"x" * MIB, 600)))
    return {"uri": str(folder / "a.tar.gz"), "input": "txt"}


def tar_unwanted(folder: Path) -> dict[str, Any]:
    """A sample with 480 MiB of what nobody asked for."""
    head = header("a.bin", 60 * MIB).tobuf(tarfile.GNU_FORMAT)
    junk: list[Any] = [head, (b"\0" * MIB, 60)] * 8
    one = blocks((header("a.txt", 4), b"good"))
    (folder / "a.tar.gz").write_bytes(gz(one, *junk, b"\0" * 1024))
    return {"uri": str(folder / "a.tar.gz"), "input": "txt"}


TOO_LARGE, BROKEN = "row too large", "unreadable file"
# What is made, and what becomes of its rows, in order.
BOMBS: dict[str, tuple[Callable[[Path], dict[str, Any]], list[str | None]]] = {
    "a line of JSON": (jsonl_line, [None, TOO_LARGE, None]),
    "a line without an end": (jsonl_without_an_end, [None, TOO_LARGE]),
    "a line of values": (jsonl_of_values, [None, TOO_LARGE]),
    "large rows": (jsonl_of_large_rows, [None] * 20),
    "a field of CSV": (csv_field, [None, TOO_LARGE, None]),
    "a field over many lines": (csv_quoted_lines, [None, TOO_LARGE, None]),
    # The row, and so many of the lines that it took as are told one by one.
    "a quote without an end": (csv_open_quote, [None, *[TOO_LARGE] * 100_001]),
    "100,000 columns": (csv_of_columns, [None] * 60),
    "only commas": (csv_of_commas, [None, TOO_LARGE, None]),
    "a text file": (text_file, [TOO_LARGE, None]),
    "a file below the root": (below_root, [None, TOO_LARGE, None]),
    "cells of Parquet": (parquet_cells, [TOO_LARGE] * 4),
    "a cell among others": (
        parquet_cell_among_others, [*[None] * 40, TOO_LARGE, *[None] * 40],
    ),
    "Parquet's dictionary": (parquet_dictionary, [TOO_LARGE] * 200),
    "Arrow's dictionary": (parquet_arrow_dictionary, [TOO_LARGE] * 200),
    "Parquet's deltas": (parquet_deltas, [TOO_LARGE] * 200),
    "a footer that lies": (parquet_footer_lies, [BROKEN, None]),
    "many numbers in few bytes": (parquet_numbers, [TOO_LARGE, None]),
    "a footer that lies of their number": (parquet_counts_lie, [BROKEN, None]),
    "lists beside the text": (parquet_lists, [None] * 200),
    "a tar member": (tar_member, [None, TOO_LARGE, None]),
    "a tar in bzip2": (tar_bz2, [None, TOO_LARGE, None]),
    "a sparse tar member": (tar_sparse, [None, TOO_LARGE, None]),
    "a PAX header": (tar_pax, [None, BROKEN]),
    "a long name": (tar_long_name, [None, BROKEN]),
    "members that nobody wants": (tar_unwanted, [None]),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BOMBS))
def test_bombs(case: str, tmp_path: Path) -> None:
    make, causes = BOMBS[case]
    spec = make(tmp_path)
    rows, peak = read("image" if "root" in spec else "text", **spec)
    assert [r["_error"] for r in rows] == causes
    assert all(r["_message"] for r in rows if r["_error"])
    words = ("max_", "values", "bytes", "taken by the row")
    told = (r["_message"] for r in rows if r["_error"] == TOO_LARGE)
    assert all(any(word in message for word in words) for message in told)
    assert peak < MOST_MIB


def test_compressed_buffers_of_a_saved_dataset_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="are compressed"):
        open_source(SourceSpec(**saved_in_zstd(tmp_path)))


def test_a_row_may_be_as_large_as_it_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{"a" * n}"}}\n' for n in (10, 80, 100)))
    spec: dict[str, Any] = {"uri": str(tmp_path / "a.jsonl")}
    for most, causes in (
        (200, [None] * 3),
        (100, [None, None, TOO_LARGE]),
        (50, [None, *[TOO_LARGE] * 2]),
    ):
        rows, _ = read(**spec, max_text_bytes=most)
        assert [r["_error"] for r in rows] == causes
        assert [r["row_id"] for r in rows] == [f"a.jsonl#{i}" for i in range(3)]
    # Limits only reject: what is on record as read stays so.
    few = SourceSpec(**spec, max_text_bytes=50)
    assert open_source(few).shards == open_source(SourceSpec(**spec)).shards


def test_an_id_is_kept_where_the_rest_is_too_large(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["x", "y"], "text": ["a" * 2000, "b"]}), tmp_path / "a.parquet")
    rows, _ = read(uri=str(tmp_path), id="id", max_text_bytes=1500)
    assert [(r["row_id"], r["_error"]) for r in rows] == [("x", TOO_LARGE), ("y", None)]


def test_a_long_id_is_its_own_rows_fate(tmp_path: Path) -> None:
    ids = [json.dumps("x" * 5000), "9" * 5000, '"y"', "8" * 4200]
    lines = [f'{{"id": {id_}, "text": "a"}}' for id_ in ids]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    rows, _ = read(uri=str(tmp_path), id="id")
    assert [(r["row_id"], r["_error"]) for r in rows] == [
        ("a.jsonl#0", "id too long"), ("a.jsonl#1", "bad JSON"), ("y", None),
        ("a.jsonl#3", "id too long"),
    ]  # fmt: skip
    assert max(len(r["_message"] or "") for r in rows) < 200


@pytest.mark.parametrize("depth", [100, 900, 985, 100_000])
def test_deeply_nested_values(depth: int, tmp_path: Path) -> None:
    deep = "[" * depth + "]" * depth
    lines = ['{"text": "good"}', f'{{"text": "deep", "meta": {deep}}}', '{"text": "good"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for carry in ([], ["meta"]):
        if carry:
            (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"text": "b", "meta": [[1]]}']))
        rows, _ = read(uri=str(tmp_path), carry=carry)
        assert [r["_error"] for r in rows[:3:2]] == [None, None]
        assert rows[1]["_error"] in ((None,) if depth < 900 else (None, "bad JSON", "wrong type"))
        assert depth < 1000 or rows[1]["_error"] == "bad JSON"


def test_many_columns_are_not_all_told(tmp_path: Path) -> None:
    names = ["x" * 10_000, *(f"c{i:07}" for i in range(200_000))]
    (tmp_path / "a.csv").write_text(",".join(names) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps(dict.fromkeys(names, 1)))
    for name in ("a.csv", "b.jsonl"):
        with pytest.raises(SourceError, match=r"no column .text.*c0000019 and 199,981 more$") as e:
            open_source(SourceSpec(uri=str(tmp_path / name)))
        assert len(str(e.value)) < 1000


def test_a_column_of_a_thousand_kinds_is_text(tmp_path: Path) -> None:
    rows = [{"text": "a", "meta": {f"k{i}-{j}": 1 for j in range(100)}} for i in range(1000)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(SourceSpec(uri=str(tmp_path), carry=("meta",)))
    assert source.carried.field("meta").type == pa.string()
