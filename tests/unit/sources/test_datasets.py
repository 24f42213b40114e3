"""Datasets of the library `datasets` as people save them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fmembed.sources.opening import open_source
from fmembed.sources.reading import read_here
from fmembed.spec import HubDataset, SourceSpec


def rows_of(uri: Path, modality: Any = "text", **told: Any) -> list[dict[str, Any]]:
    spec = SourceSpec(uri=str(uri), format="hf", **told)
    rows = pa.concat_tables(read_here(open_source(spec, [modality]))).to_pylist()
    return [r for r in rows if r["row_id"] is not None]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("format_", ["torch", "numpy", "arrow", "pandas", None])
def test_a_format_that_it_was_saved_with_is_undone(
    format_: str | None, streaming: bool, tmp_path: Path
) -> None:
    table = {"key": [7, 8], "text": ["one", "two"], "score": [0.5, 1.5]}
    datasets.Dataset.from_dict(table).with_format(format_).save_to_disk(str(tmp_path / "data"))
    told = {"id": "key", "carry": ("score",), "hf": HubDataset(streaming=streaming)}
    rows = rows_of(tmp_path / "data", **told)
    assert [r["_error"] for r in rows] == [None, None]
    found = [(r["row_id"], r["_input"], r["score"]) for r in rows]
    assert found == [("7", "one", 0.5), ("8", "two", 1.5)]


@pytest.mark.parametrize("streaming", [False, True])
def test_classes_have_names(streaming: bool, tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "kind": datasets.ClassLabel(names=["cat", "dog"])}
    )
    table = {"text": ["a", "b", "c", "d"], "kind": [1, 0, None, -1]}
    made = datasets.Dataset.from_dict(table, features=features)
    made.save_to_disk(str(tmp_path / "data"))
    rows = rows_of(tmp_path / "data", label="kind", hf=HubDataset(streaming=streaming))
    assert [r["kind"] for r in rows] == ["dog", "cat", None, None]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_whose_place_in_the_file_is_damaged_are_rejected_alone(
    streaming: bool, tmp_path: Path
) -> None:
    texts = [f"text {i} of some words" for i in range(40)]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "data"))
    (path,) = (tmp_path / "data").glob("*.arrow")
    places = np.cumsum([0, *map(len, texts)]).astype("<i4")
    content = bytearray(path.read_bytes())
    at = content.index(places.tobytes())
    content[at + 4 * 20 : at + 4 * 21] = (2**30).to_bytes(4, "little")  # where text 20 begins
    path.write_bytes(content)
    rows = rows_of(tmp_path / "data", hf=HubDataset(streaming=streaming))
    assert [i for i, row in enumerate(rows) if row["_error"]] == [19, 20]
    assert {row["_error"] for row in rows} == {None, "unreadable file"}
    assert [r["_input"] for i, r in enumerate(rows) if i not in (19, 20)] == texts[:19] + texts[21:]
    assert len({row["row_id"] for row in rows}) == 40


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), shade, np.uint8)).save(file, "png")
    return file.getvalue()


def test_pictures_by_their_path_in_the_dataset(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    for name, shade in (("cat/1.png", 10), ("cat/2.png", 20), ("dog/3.png", 30)):
        (folder / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "train" / name).write_bytes(png(shade))
    hub = HubDataset(split="train")
    rows = rows_of(folder, "image", input="image", label="label", hf=hub)
    assert [r["_error"] for r in rows] == [None] * 3
    assert sorted((r["_input"], r["label"]) for r in rows) == sorted(
        [(png(10), "cat"), (png(20), "cat"), (png(30), "dog")]
    )


def test_a_path_out_of_the_dataset_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(1))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "in.png").write_bytes(png(2))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    paths = [str(folder / "in.png"), str(tmp_path / "secret.png"), str(folder / "link.png")]
    paths += ["../secret.png", "in.png"]
    images = [{"bytes": None, "path": path} for path in paths]
    type_ = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(images, type_)}), folder / "part.parquet")
    hub = HubDataset(split="train")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: part.parquet\n"
        "dataset_info:\n  features:\n  - name: image\n    dtype: image\n---\n"
    )
    rows = rows_of(folder, "image", input="image", hf=hub)
    outside = ("outside the root", None)
    kept = (None, png(2))
    found = [(r["_error"], r["_input"]) for r in rows]
    assert found == [kept, outside, outside, outside, kept], json.dumps(paths)


def test_two_folders_of_one_name_are_two_datasets(tmp_path: Path) -> None:
    for place in ("one", "two"):
        folder = tmp_path / place / "data"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"text": [f"in {place}"]}), folder / "part.parquet")
        (folder / "README.md").write_text(
            "---\nconfigs:\n- config_name: default\n  data_files: part.parquet\n---\n"
        )
        rows = rows_of(folder, hf=HubDataset(split="train"))
        assert [r["_input"] for r in rows] == [f"in {place}"]
