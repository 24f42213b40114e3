"""Arrays as NumPy saves them."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from fmembed.errors import SourceError
from fmembed.sources.formats import numpy_file as module
from fmembed.sources.opening import open_source
from fmembed.sources.reading import read_here
from fmembed.spec import SourceSpec

PICTURES = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), dtype=np.uint8)


def read(path: Path, modality: Any = "text", **told: Any) -> list[dict[str, Any]]:
    source = open_source(SourceSpec(uri=str(path), **told), (modality,))
    rows = pa.concat_tables(read_here(source)).to_pylist()
    return [r for r in rows if r["row_id"] is not None]


def test_an_array_of_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_BYTES", 100)
    texts = [f"text {i} ü" for i in range(50)]
    np.save(tmp_path / "a.npy", np.array(texts))
    rows = read(tmp_path / "a.npy")
    assert [(r["row_id"], r["_input"]) for r in rows] == [
        (f"a.npy#{i}", t) for i, t in enumerate(texts)
    ]
    assert [r["_input"] for r in read(tmp_path / "a.npy", input="body")] == texts


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_of_one_length_are_columns(save: Any, tmp_path: Path) -> None:
    days = np.array(["2026-01-01", "2026-01-02", "NaT", "1999-12-31", "2026-01-05"], "M8[D]")
    save(
        tmp_path / "a.npz", X=PICTURES, y=np.arange(5), name=np.array(list("abcde")), day=days,
        point=np.eye(5)[:, :2], good=np.array([True, False] * 2 + [True]),
    )  # fmt: skip
    rows = read(
        tmp_path / "a.npz", "image", input="X", id="name", label="y", carry=("day", "point", "good")
    )
    assert [r["row_id"] for r in rows] == list("abcde")
    assert [r["y"] for r in rows] == [0, 1, 2, 3, 4]
    assert [r["day"] and str(r["day"])[:10] for r in rows] == [
        "2026-01-01", "2026-01-02", None, "1999-12-31", "2026-01-05"
    ]  # fmt: skip
    assert rows[1]["point"] == [0.0, 1.0]
    assert [r["good"] for r in rows] == [True, False, True, False, True]
    for row, pixels in zip(rows, PICTURES, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row["_input"]))), pixels)


@pytest.mark.parametrize("pictures", [PICTURES[..., 0], PICTURES[..., :1]])
def test_grey_pictures(pictures: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", pictures)
    rows = read(tmp_path / "a.npy", "image")
    for row, pixels in zip(rows, PICTURES[..., 0], strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row["_input"]))), pixels)


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.array(["a", None], dtype=object), "holds Python's objects, which are pickles"),
        (np.float32(PICTURES), r"pictures are uint8, 0 to 255"),
        (PICTURES.transpose(0, 3, 1, 2), r"colours last: save array.transpose\(0, 2, 3, 1\)"),
        (np.ones((5, 784)), r"pictures have a height and a width .* a rate"),
        (np.arange(5), r"a row is a text \(array.astype\(str\)\) or a picture"),
        (np.array("one"), "no array of rows"),
        (np.asfortranarray(PICTURES), "no array of rows: save np.ascontiguousarray"),
        (np.ones(3, complex), "is of complex128"),
        (np.zeros(3, [("a", int)]), "a row is a text, a number or a picture"),
    ],
)
def test_what_is_neither_text_nor_picture_is_told(array: Any, told: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", X=array)
    with pytest.raises(SourceError, match=told):
        read(tmp_path / "a.npz", "image", input="X")


def test_an_array_that_is_not_there_is_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=PICTURES, labels=np.arange(5))
    with pytest.raises(SourceError, match=r"no column 'image' in .* did you mean 'images'"):
        read(tmp_path / "a.npz", "image", input="image")


def test_unlike_lengths_and_cut_files_are_rejected(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", X=np.array(["a", "b"]), y=np.arange(3))
    (row,) = read(tmp_path / "a.npz", input="X", label="y")
    assert "unlike numbers of rows: X 2, y 3" in row["_message"]
    np.save(tmp_path / "b.npy", np.array([f"text {i}" for i in range(9)]))
    content = (tmp_path / "b.npy").read_bytes()
    (tmp_path / "b.npy").write_bytes(content[:-30])
    *good, bad = read(tmp_path / "b.npy")
    assert [r["_input"] for r in good] == [f"text {i}" for i in range(7)]
    assert "ends 2 rows before it should" in bad["_message"]


def test_what_a_column_cannot_hold_is_its_rows_fate(tmp_path: Path) -> None:
    """Microseconds hold no nanoseconds, and Unicode no more than its characters."""
    texts = np.array(["one", "two", "three"])
    points = np.array([[0x78787878, 66], [97, 98], [99, 0]], "<u4").view("<U2").reshape(3)
    times = np.array(["2026-01-01T00:00:00.123456789", "2026-01-02", "NaT"], "M8[ns]")
    np.savez(tmp_path / "a.npz", text=texts, when=times, odd=points)
    rows = read(tmp_path / "a.npz", id="text", carry=("when",))
    assert [r["row_id"] for r in rows] == ["one", "two", "three"]
    assert [r["_error"] for r in rows] == ["wrong type", None, None]
    rows = read(tmp_path / "a.npz", input="odd")
    assert [r["_error"] for r in rows] == ["not UTF-8", None, None]
    rows = read(tmp_path / "a.npz", carry=("odd",))
    assert [r["odd"] for r in rows if not r["_error"]] == ["ab", "c"]
    np.savez(tmp_path / "b.npz", text=texts[:1], when=np.array([2**62], "M8[s]"))
    assert [r["_error"] for r in read(tmp_path / "b.npz", carry=("when",))] == ["wrong type"]


def test_what_nobody_asks_for_is_no_harm(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz", text=np.array(["one", "two"]), more=np.array([{}, None], dtype=object),
        small=PICTURES[:2, :2, :2, 0],
    )  # fmt: skip
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("README", "what this is")
    rows = read(tmp_path / "a.npz", carry=("small",))
    assert [r["_input"] for r in rows] == ["one", "two"]
    assert rows[0]["small"] == PICTURES[0, :2, :2, 0].tolist()  # carried, and no picture
    (tmp_path / "b.npy").write_bytes((tmp_path / "a.npz").read_bytes())  # by what it is
    assert len(read(tmp_path / "b.npy")) == 2


def test_of_two_arrays_in_a_file_the_second_is_told(tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        np.save(file, np.array(["one"]))
        np.save(file, np.array(["two"]))
    first, second = read(tmp_path / "a.npy")
    assert (first["_input"], second["_error"]) == ("one", "unreadable file")
