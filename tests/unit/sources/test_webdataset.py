"""Archives as people make them: no picture gets another one's label, and no row is lost."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from fmembed.sources.opening import open_source
from fmembed.sources.reading import read_here
from fmembed.spec import SourceSpec


def tar(*members: tuple[str, bytes], format_: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format_) as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return file.getvalue()


def rows_of(path: Path, **told: Any) -> list[tuple[Any, Any]]:
    """Of each row its picture and its label, or what was wrong."""
    spec = SourceSpec(uri=str(path), input="png", label="cls", **told)
    rows = pa.concat_tables(read_here(open_source(spec, ["image"]))).to_pylist()
    assert len({r["row_id"] for r in rows}) == len(rows)
    return [(r["_error"] or r["_input"], r["cls"]) for r in rows if r["row_id"] is not None]


def sample(key: str, label: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", f"picture {key}".encode()), (f"{key}.cls", label.encode())]


A, B = sample("a", "1"), sample("b", "2")
ROWS = [(b"picture a", "1"), (b"picture b", "2")]
TWICE = ("ambiguous sample", None)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([A[0], A[1], ("a.png", b"another"), *B], [TWICE, TWICE, ROWS[1]]),
        ([A[0], ("a.png", b"another"), A[1], *B], [TWICE, TWICE, ROWS[1]]),
        ([*A, ("a.cls", b"3"), *B], [TWICE, TWICE, ROWS[1]]),
        ([A[0], ("a.PNG", b"another"), A[1], *B], [TWICE, TWICE, ROWS[1]]),
        # What nobody asks for may be there as often as it likes.
        ([*A, ("a.json", b"{}"), ("a.json", b"{}"), *B], ROWS),
        ([*A, *B, ("a.png", b"another")], [*ROWS, (b"another", None)]),
        ([A[0], ("._a.png", b"mac"), ("._a.cls", b"mac"), A[1], (".DS_Store", b""), *B], ROWS),
        ([*A, ("__MACOSX/._a.png", b"mac"), ("__MACOSX/b.png", b"mac"), *B], ROWS),
        ([("a.PNG", A[0][1]), ("a.Cls", b"1"), *B], ROWS),
        ([(f"x/{name}", c) for name, c in [*A, *B]], ROWS),
    ],
)
def test_members(
    members: list[tuple[str, bytes]], expected: list[tuple[Any, Any]], tmp_path: Path
) -> None:
    (tmp_path / "a.tar").write_bytes(tar(*members))
    assert rows_of(tmp_path) == expected


def test_an_extension_that_is_named_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar(("a.PNG", b"p"), ("a.cls", b"1")))
    spec = SourceSpec(uri=str(tmp_path), input="PNG")
    rows = pa.concat_tables(read_here(open_source(spec, ["image"]))).to_pylist()
    assert rows[0]["_input"] == b"p"


@pytest.mark.parametrize("padding", [0, 512, 10_240])
def test_archives_put_together(padding: int, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar(*A) + bytes(padding) + tar(*B))
    assert rows_of(tmp_path) == ROWS


@pytest.mark.parametrize("format_", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names(format_: int, tmp_path: Path) -> None:
    folder = "/".join(["folder" * 10] * 3)
    members = [(f"{folder}/{name}", c) for name, c in [*A, *B]]
    (tmp_path / "a.tar").write_bytes(tar(*members, format_=format_))
    assert rows_of(tmp_path) == ROWS


@pytest.mark.parametrize(
    ("spoil", "first"),
    [
        # A header that is none is not taken for the end; more of the sample may have come there.
        (lambda c: c[:2048] + b"\xff" * 512 + c[2560:], []),
        (lambda c: c[:3072] + b"\xff" * 512 + c[3584:], [ROWS[0]]),
        (lambda c: c[:2048], []),  # cut where a member ends
        (lambda c: c[:2200], []),  # cut in a header
        (lambda c: c[:3000], [ROWS[0]]),  # cut in the next sample
    ],
)
def test_what_breaks_off_is_said(spoil: Any, first: list[Any], tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(spoil(tar(*A, *B)))
    rows = rows_of(tmp_path)
    assert rows[: len(first)] == first
    assert rows[-1] == ("unreadable file", None)
    assert len(rows) <= 2
