"""Packed files are the files that were packed."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator

import pytest

from fmembed.sources import file_list
from fmembed.sources.file_list import FileList
from fmembed.sources.source import File


def some(num_files: int) -> Iterator[File]:
    return (File(f"/data/{i:05}.txt", f"{i:05}.txt", i, f"{i}.5") for i in range(num_files))


@pytest.mark.parametrize("num_files", [0, 1, 7, 8, 9, 100])
def test_it_is_a_sequence_of_what_was_packed(
    num_files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_list, "_CHUNK_FILES", 8)
    files = list(some(num_files))
    packed = FileList(files)
    assert list(packed) == files
    assert len(packed) == num_files
    assert [packed[i] for i in range(num_files)] == files
    for at in (slice(None, None, 3), slice(2, 20), slice(-3, None), slice(None, None, -2)):
        assert list(packed[at]) == files[at]
    with pytest.raises(IndexError):
        packed[num_files]
    assert pickle.loads(pickle.dumps(packed)) == packed == FileList(files)  # noqa: S301
    assert hash(FileList(files)) == hash(packed)


def test_names_of_any_bytes() -> None:
    odd = File("/a/caf\udce9\n\0\U0001f600.txt", "ä\udcff\udc80", 2**60, "")
    assert list(FileList([odd])) == [odd]


def test_whether_they_are_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_list, "_CHUNK_FILES", 4)
    files = list(some(12))
    assert FileList(files).is_sorted
    for a, b in ((0, 1), (3, 4), (2, 9)):
        swapped = files.copy()
        swapped[a], swapped[b] = files[b], files[a]
        assert not FileList(swapped).is_sorted


def test_no_file_is_held_as_an_object() -> None:
    packed = FileList(some(20_000))
    held = sum(sys.getsizeof(chunk) for chunk in packed._chunks)
    assert held / len(packed) < 30  # as objects 400 bytes each
