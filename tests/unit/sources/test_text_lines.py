"""A text a line."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from fmembed.errors import SourceError
from fmembed.sources.formats import ranges
from fmembed.sources.opening import open_source
from fmembed.sources.reading import read_here
from fmembed.spec import SourceSpec

CONTENT = '\ufefffirst\r\nzwei ä\n\n   \nwith \ttab \n{"text": 1}\nlast'.encode()
ROWS = [("0", "first"), ("1", "zwei ä"), ("4", "with \ttab "), ("5", '{"text": 1}'), ("6", "last")]


def rows_of(folder: Path, **fields: Any) -> list[dict[str, Any]]:
    source = open_source(SourceSpec(uri=str(folder), format="lines", **fields))
    return [row for table in read_here(source) for row in table.to_pylist() if row["row_id"]]


@pytest.mark.parametrize("name", ["a.txt", "a.lines", "a.txt.gz", "a.TXT"])
def test_each_line_is_a_row(tmp_path: Path, name: str) -> None:
    content = gzip.compress(CONTENT) if name.endswith("gz") else CONTENT
    (tmp_path / name).write_bytes(content)
    found = [(r["row_id"], r["_input"]) for r in rows_of(tmp_path, input="body")]
    assert found == [(f"{name}#{number}", text) for number, text in ROWS]


def test_bad_lines_are_rejected_among_good_ones(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n\xff\n" + b"x" * 50 + b"\ntwo\n")
    rows = rows_of(tmp_path, max_text_bytes=20)
    assert [r["_error"] for r in rows] == [None, "not UTF-8", "row too large", None]
    (tmp_path / "a.txt").write_bytes("é".encode("latin-1"))
    assert rows_of(tmp_path, encoding_errors="replace")[0]["_input"] == "\ufffd"


def test_a_large_file_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text number {i} " + "x" * (i % 7) for i in range(200)]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    whole = rows_of(tmp_path)
    monkeypatch.setattr(ranges, "PART_BYTES", 300)
    source = open_source(SourceSpec(uri=str(tmp_path), format="lines"))
    assert len(source.shards) > 5
    found = [r for table in read_here(source) for r in table.to_pylist() if r["row_id"]]
    assert [(r["row_id"], r["_input"]) for r in found] == [
        (r["row_id"], r["_input"]) for r in whole
    ]


@pytest.mark.parametrize(("num_lines", "is_told"), [(3, False), (10, True), (200_000, True)])
def test_one_text_that_looks_like_a_list_is_told(
    num_lines: int, is_told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("a title\n" * num_lines)
    source = open_source(SourceSpec(uri=str(tmp_path / "a.txt")))
    assert source.format == "text_folder"
    told = capsys.readouterr().err
    assert ("a.txt is one row, its whole text: with source.format lines" in told) == is_told
    open_source(SourceSpec(uri=str(tmp_path / "a.txt"), format="lines"))
    assert not capsys.readouterr().err


def test_a_folder_of_texts_is_still_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo")
    assert open_source(SourceSpec(uri=str(tmp_path))).format == "text_folder"
    with pytest.raises(SourceError, match=r"source\.label: no column 'topic' in .*; it has text"):
        rows_of(tmp_path, label="topic")
