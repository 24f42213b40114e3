"""Data that a program holds, as a source's files."""

from __future__ import annotations

import datetime
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from media import picture
from PIL import Image

from fmembed.errors import SourceError
from fmembed.prepare.image import _decode_image
from fmembed.sources import given as module
from fmembed.sources.given import lay_out
from fmembed.sources.opening import open_source
from fmembed.sources.reading import read_shard
from fmembed.spec import RunSpec
from fmembed.storage import Storage

TEXTS = ["one", "two", "three"]


def decode(content: bytes) -> Any:
    return _decode_image(content, 10**6)


def rows_of(
    data: Any, folder: Path, modalities: Any = ("text",), **fields: Any
) -> list[dict[str, Any]]:
    """What a run reads of it."""
    folder.mkdir(exist_ok=True)
    told = {name.replace("_", ".", 1): value for name, value in fields.items()}
    found = lay_out(data, Storage(str(folder)), told)
    named = {"model.id": "m", "output.uri": "o", **found.fields, **told}
    source = open_source(RunSpec.from_yaml(None, named).source, modalities)
    rows: list[dict[str, Any]] = []
    for i, shard in enumerate(source.shards):
        for table in read_shard(source, shard, i):
            rows += [row for row in table.to_pylist() if row["_total"] is None]
    return rows


def test_texts_are_known_by_their_number(tmp_path: Path) -> None:
    rows = rows_of(TEXTS, tmp_path / "list")
    assert [(r["row_id"], r["_input"]) for r in rows] == [
        ("0", "one"),
        ("1", "two"),
        ("2", "three"),
    ]
    assert rows_of(iter(TEXTS), tmp_path / "iter") == rows
    assert rows_of(tuple(TEXTS), tmp_path / "tuple") == rows
    assert rows_of(pd.Series(TEXTS), tmp_path / "series") == rows
    assert rows_of(np.array(TEXTS), tmp_path / "numpy") == rows


def test_a_bad_text_is_a_rejected_row(tmp_path: Path) -> None:
    rows = rows_of(["one", None, "", "\ud800", "é"], tmp_path / "in")
    assert [r["_error"] for r in rows] == [None, "null input", "empty input", "not UTF-8", None]
    assert rows[4]["_input"] == "é"


def test_what_comes_in_many_files_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FILE_ROWS", 7)
    texts = [f"text {i}" for i in range(23)]
    texts[9] = "\ud800"  # makes one file of bytes among those of text
    rows = rows_of((t for t in texts), tmp_path / "in")
    assert len(list((tmp_path / "in").iterdir())) == 4
    good = {r["row_id"]: r["_input"] for r in rows if r["_error"] is None}
    assert good == {str(i): text for i, text in enumerate(texts) if i != 9}
    assert [r["row_id"] for r in rows if r["_error"]] == ["9"]
    table = pa.table({"text": [f"text {i}" for i in range(23)]})
    assert len(rows_of(table, tmp_path / "table")) == 23


def test_a_file_is_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FILE_BYTES", 1000)
    assert len(rows_of(["x" * 400] * 10, tmp_path / "in")) == 10
    assert len(list((tmp_path / "in").iterdir())) >= 4


def test_dicts_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FILE_ROWS", 2)
    day = datetime.date(2026, 1, 2)
    data = [
        {"text": "one", "key": "a", "stars": None, "day": day},
        {"text": "two", "key": "b"},
        {"text": "three", "key": "c", "stars": 3, "more": [1, 2]},
        {"text": "four", "key": "d", "stars": 3.5},
    ]
    rows = rows_of(data, tmp_path / "in", source_carry=["stars", "day", "more"], source_id="key")
    assert [r["row_id"] for r in rows] == ["a", "b", "c", "d"]
    assert [r["stars"] for r in rows] == [None, None, 3.0, 3.5]
    assert [r["day"] for r in rows] == [day, None, None, None]
    assert [r["more"] for r in rows] == [None, None, [1, 2], None]
    assert [r["row_id"] for r in rows_of(data, tmp_path / "no_id")] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ([], "there is nothing in it"),
        (pa.table({"text": pa.array([], pa.string())}), "there is no row in it"),
        (7, "takes a path, a config, a list, a table or a dataset, got builtins int"),
        ([7], r"data\[0\]: takes a text, dict, path, bytes or picture, got int"),
        (["a", 7], r"data\[1\]: takes a text, as the first one, got int"),
        ([{"text": "a"}, "b"], r"data\[1\]: takes a dict, as the first one, got str"),
        ([{"text": "a"}, {"text": 3}], "the values of 'text' in rows 0 to 1 are not of one type"),
        ([{"text": "a", "_index": 3}], "it has a column _index"),
        (pd.DataFrame({"text": ["a", 3]}), "a column of the DataFrame is of several types"),
        ([2**53 + 1, 0.5], "got int"),
    ],
)
def test_what_is_no_data_is_told(data: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=told):
        lay_out(data, Storage(str(tmp_path)), {})


def test_values_that_one_type_cannot_hold_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FILE_ROWS", 1)
    for other in ("b", 0.5):  # a number of 54 bits would lose one as a float
        data: list[Mapping[str, Any]] = [{"n": 2**53 + 1}, {"n": other}]
        with pytest.raises(SourceError, match="data: a column is of several types"):
            lay_out(data, Storage(str(tmp_path)), {})


def test_tables_are_taken_as_they_are(tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": TEXTS, "stars": [1, 2, 3]}, index=[7, 8, 9])
    expected = [("0", "one", 1), ("1", "two", 2), ("2", "three", 3)]
    arrow, polars = pa.table(frame.to_dict("list")), pl.from_pandas(frame)
    for i, data in enumerate([frame, polars, polars.lazy(), arrow, arrow.to_reader()]):
        rows = rows_of(data, tmp_path / str(i), source_carry=["stars"])
        assert [(r["row_id"], r["_input"], r["stars"]) for r in rows] == expected
        assert rows_of(frame, tmp_path / f"id{i}", source_id="stars")[2]["row_id"] == "3"


def test_a_dataset_keeps_its_names_of_classes_and_its_choice_of_rows(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "topic": datasets.ClassLabel(names=["no", "yes"])}
    )
    data = datasets.Dataset.from_dict({"text": TEXTS, "topic": [0, 1, 1]}, features=features)
    rows = rows_of(data.select([2, 0]), tmp_path / "in", source_label="topic")
    assert [(r["_input"], r["topic"]) for r in rows] == [("three", "yes"), ("one", "no")]
    streamed = rows_of(data.to_iterable_dataset(), tmp_path / "it")
    assert [r["_input"] for r in streamed] == TEXTS


def test_a_dataset_brings_its_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    data = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")]})
    data = data.cast_column("image", datasets.Image())
    rows = rows_of(data, tmp_path / "in", ("image",), source_input="image")
    assert rows[0]["_input"] == picture()


def test_paths_are_files_where_they_are(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "one.png", tmp_path / "b.png", tmp_path / "none.png"]
    paths[0].parent.mkdir()
    for path in paths[:2]:
        path.write_bytes(picture())
    rows = rows_of(paths, tmp_path / "in", ("image",))
    assert [r["row_id"] for r in rows] == ["a/one.png", "b.png", "none.png"]
    assert [r["_error"] is None for r in rows] == [True, True, False]
    twice = rows_of([paths[1], paths[1]], tmp_path / "twice", ("image",))
    assert [r["row_id"] for r in twice] == ["0", "1"]


def test_contents_are_pictures(tmp_path: Path) -> None:
    rows = rows_of([picture(), None, b""], tmp_path / "in", ("image",))
    assert [r["_error"] for r in rows] == [None, "null input", "empty input"]
    assert rows[0]["_input"] == picture()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "HSV", "YCbCr"])
def test_pictures_of_pillow_are_as_their_files(mode: str, tmp_path: Path) -> None:
    made = Image.open(io.BytesIO(picture())).convert("RGB").convert(mode)
    rows = rows_of([made, None], tmp_path / "in", ("image",))
    assert [r["_error"] for r in rows] == [None, "null input"]
    np.testing.assert_array_equal(decode(rows[0]["_input"]), np.asarray(made.convert("RGB")))


@pytest.mark.parametrize(("mode", "dtype"), [("I;16", np.uint16), ("I", np.int32), ("F", "<f4")])
def test_grey_of_many_levels_is_as_its_file(mode: str, dtype: Any, tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 24).astype(dtype).reshape(4, 6)
    made, file = Image.fromarray(levels), io.BytesIO()
    made.save(file, "TIFF")
    (row,) = rows_of([made], tmp_path / "in", ("image",))
    assert made.mode == mode
    np.testing.assert_array_equal(decode(row["_input"]), decode(file.getvalue()))


def test_a_picture_of_pillow_is_turned_as_its_file_would_be(tmp_path: Path) -> None:
    made = Image.open(io.BytesIO(picture())).convert("RGB").resize((6, 4))
    made.getexif()[0x0112] = 6  # a quarter of a turn
    (row,) = rows_of([made], tmp_path / "in", ("image",))
    assert decode(row["_input"]).shape == (6, 4, 3)


def test_where_rows_are_in_the_data_is_known(tmp_path: Path) -> None:
    def laid(data: Any, name: str, **fields: Any) -> Any:
        (tmp_path / name).mkdir()
        return lay_out(data, Storage(str(tmp_path / name)), fields)

    texts = laid(TEXTS, "list")
    assert texts.positions(["2", "0", "other"]) == [2, 0, sys.maxsize]
    frame = laid(pd.DataFrame({"text": TEXTS, "key": [7, 5, 7]}), "frame", **{"source.id": "key"})
    assert frame.positions(["5", "7", "8"]) == [1, 0, sys.maxsize]
    rows = laid([{"text": t, "key": k} for t, k in zip(TEXTS, "cab", strict=True)], "dicts",
                **{"source.id": "key"})  # fmt: skip
    assert rows.positions(["a", "b", "c"]) == [1, 2, 0]
    data = datasets.Dataset.from_dict({"text": TEXTS, "key": ["x", "y", "z"]})
    assert laid(data, "hub").positions(["data#2", "data#0"]) == [2, 0]
    assert laid(data, "keyed", **{"source.id": "key"}).positions(["z", "x"]) == [2, 0]
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    paths = laid([tmp_path / "b.txt", tmp_path / "a.txt"], "paths")
    assert paths.positions(["a.txt", "b.txt"]) == [1, 0]
    with pytest.raises(
        SourceError, match=r"data\[0\]: .*a.txt' is a file here; give files as path"
    ):
        laid([str(tmp_path / "a.txt")], "names")


def test_a_damaged_picture_of_pillow_is_its_rows_fate(tmp_path: Path) -> None:
    cut = Image.open(io.BytesIO(picture(64, 64, "JPEG")[:-200]))
    good = Image.open(io.BytesIO(picture()))
    rows = rows_of([good, cut, good], tmp_path / "in", ("image",))
    assert [r["_error"] for r in rows] == [None, None, None]
    assert rows[1]["_input"].startswith(b"no picture: Pillow cannot read it")
    with pytest.raises(SourceError, match="data: an array is a picture as uint8 of shape"):
        rows_of([np.ones((4, 4))], tmp_path / "floats", ("image",))


def test_a_tiff_that_lost_nothing_loses_nothing(tmp_path: Path) -> None:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    Image.fromarray(noise, "CMYK").save(file, "TIFF", compression="jpeg")
    opened = Image.open(file)
    (row,) = rows_of([opened], tmp_path / "in", ("image",))
    np.testing.assert_array_equal(decode(row["_input"]), np.asarray(opened.convert("RGB")))
