"""What is there is read, or counted by the reason why it is not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

from fmembed.errors import SourceError
from fmembed.sources.opening import open_source
from fmembed.sources.source import Source
from fmembed.sources.walking import HIDDEN, HIDDEN_FOLDER, SEEN
from fmembed.spec import SourceSpec


def names_of(source: Source) -> list[str]:
    return [f.name for shard in source.shards for f in shard.files]


def opened(uri: Path | str, modality: Any = "text", **told: Any) -> Source:
    return open_source(SourceSpec(uri=str(uri), **told), [modality])


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "a"}\n')


def test_hidden_names_are_counted(tmp_path: Path) -> None:
    make(tmp_path, "one.txt", "_two.txt", ".three.txt", "_class/four.txt", "pos/five.txt")
    source = opened(tmp_path)
    assert names_of(source) == ["one.txt", "pos/five.txt"]
    assert source.passed_over == {HIDDEN: 2, HIDDEN_FOLDER: 1}


def test_where_all_is_hidden_the_message_says_so(tmp_path: Path) -> None:
    make(tmp_path, "_one.txt")
    with pytest.raises(SourceError, match=r"no file in .*; passed over: 1 files whose names begin"):
        opened(tmp_path)


def test_other_suffixes_are_counted(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl", "B.JSONL", "c.json", "d.json", "README", "x.csv")
    source = opened(tmp_path)
    assert names_of(source) == ["B.JSONL", "a.jsonl"]
    assert source.passed_over == {
        "files with .json, no jsonl": 2,
        "files with no suffix, no jsonl": 1,
        "files with .csv, no jsonl": 1,
    }


@pytest.mark.parametrize(
    ("format_", "modality", "names"),
    [
        ("jsonl", "text", ["a.json", "b.JSON"]),
        ("parquet", "text", ["a.parq"]),
        ("csv", "text", ["a.txt", "b.tab"]),
        ("jsonl", "text", ["a.jsonl", "c.NDJSON"]),
        ("image_folder", "image", ["a.jfif", "b.avif", "c.JPG"]),
        ("audio_folder", "audio", ["a.opus", "c.oga"]),
        ("audio_folder", "audio", ["a.m4a", "b.aac"]),
    ],
)
def test_a_format_that_is_named_takes_more_suffixes(
    format_: Any, modality: Any, names: list[str], tmp_path: Path
) -> None:
    make(tmp_path, *names)
    if format_ == "parquet":
        with pytest.raises(SourceError, match=r"a\.parq"):  # found, and no Parquet
            opened(tmp_path, modality, format=format_)
        return
    told = {"csv": {"delimiter": ":"}, "input": '{"text"'} if format_ == "csv" else {}
    assert names_of(opened(tmp_path, modality, format=format_, **told)) == sorted(names)


def test_a_pattern_names_its_files(tmp_path: Path) -> None:
    make(tmp_path, "a.dat", "b.dat", "c.jsonl")
    assert names_of(opened(f"{tmp_path}/*.dat", format="jsonl")) == ["a.dat", "b.dat"]
    source = opened(f"{tmp_path}/*", format="jsonl")
    assert names_of(source) == ["c.jsonl"]
    assert source.passed_over == {"files with .dat, no jsonl": 2}


def test_links_are_followed_and_each_folder_is_read_once(tmp_path: Path) -> None:
    outside, data = tmp_path / "outside", tmp_path / "data"
    make(outside, "b.jsonl", "deep/c.jsonl")
    make(data, "a.jsonl", "sub/d.jsonl")
    (data / "e.jsonl").symlink_to(outside / "b.jsonl")
    (data / "linked").symlink_to(outside)
    (data / "again").symlink_to(data / "sub")
    (outside / "deep" / "up").symlink_to(data)  # round in circles
    source = opened(data)
    assert names_of(source) == [
        "a.jsonl", "e.jsonl", "linked/b.jsonl", "linked/deep/c.jsonl", "sub/d.jsonl",
    ]  # fmt: skip
    assert source.passed_over == {SEEN: 2}


def test_a_snapshot_of_the_hub_is_all_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    make(blobs, "aa", "bb")
    (snapshot / "data").mkdir(parents=True)
    for n, blob in enumerate(("aa", "bb")):
        os.symlink(f"../../../blobs/{blob}", snapshot / "data" / f"{n}.jsonl")
    assert names_of(opened(snapshot)) == ["data/0.jsonl", "data/1.jsonl"]


@pytest.mark.parametrize("name", ["a[1]", "b[x-z]*", "c?"])
def test_brackets_in_a_path_that_exists(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    write_jsonl(tmp_path / name / f"{name}.jsonl", [{"text": "a"}])
    assert names_of(opened(tmp_path / name)) == [f"{name}.jsonl"]
    assert names_of(opened(tmp_path / name / f"{name}.jsonl")) == [f"{name}.jsonl"]


def test_partition_folders(tmp_path: Path) -> None:
    make(tmp_path, "year=2024/month=1/a.jsonl", "year=2025/month=2/b.jsonl", "year=2025/_SUCCESS")
    source = opened(tmp_path)
    assert names_of(source) == ["year=2024/month=1/a.jsonl", "year=2025/month=2/b.jsonl"]
    assert source.passed_over == {HIDDEN: 1}


def test_a_link_that_goes_round_in_circles_is_a_row_of_its_own(tmp_path: Path) -> None:
    make(tmp_path, "a.txt")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "_loop").symlink_to("_loop")
    source = opened(tmp_path)
    assert names_of(source) == ["a.txt", "loop.txt"]
    assert source.passed_over == {HIDDEN: 1}
