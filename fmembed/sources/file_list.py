"""Many files in little memory."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import overload

from fmembed.sources.source import File

# Of ten million files, with names of 30 characters, 4,096 a chunk take 230 MB, and 64 take 420 MB.
_CHUNK_FILES = 4096


class FileList(Sequence[File]):
    """Files, packed: as objects ten million take 5 GB.

    `is_sorted` tells whether they are in the order of their paths.
    """

    __slots__ = ("_chunks", "_num_files", "is_sorted")

    def __init__(self, files: Iterable[File]) -> None:
        """Pack files as they come: no more than 4,096 of them are held."""
        chunks: list[bytes] = []
        self.is_sorted, self._num_files, last = True, 0, ""
        files = iter(files)
        while some := list(islice(files, _CHUNK_FILES)):
            paths = [last, *(file.path for file in some)]
            self.is_sorted = self.is_sorted and paths == sorted(paths)
            last = paths[-1]
            self._num_files += len(some)
            # No UTF-8 but ASCII: names may have bytes that are none.
            chunks.append(zlib.compress(json.dumps(some).encode("ascii"), 1))
        self._chunks = tuple(chunks)

    def __len__(self) -> int:
        return self._num_files

    def __iter__(self) -> Iterator[File]:
        for chunk in self._chunks:
            yield from _unpacked(chunk)

    @overload
    def __getitem__(self, at: int) -> File: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[File]: ...

    def __getitem__(self, at: int | slice) -> File | Sequence[File]:
        """A file; or a slice's, as objects."""
        if isinstance(at, slice):
            return list(self._chosen(range(self._num_files)[at]))
        return next(self._chosen([range(self._num_files)[at]]))

    def _chosen(self, places: Iterable[int]) -> Iterator[File]:
        number, chunk = -1, list[File]()
        for place in places:
            if place // _CHUNK_FILES != number:
                number = place // _CHUNK_FILES
                chunk = list(_unpacked(self._chunks[number]))
            yield chunk[place % _CHUNK_FILES]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FileList) and self._chunks == other._chunks

    def __hash__(self) -> int:
        return hash(self._chunks)


def _unpacked(chunk: bytes) -> Iterator[File]:
    return map(File._make, json.loads(zlib.decompress(chunk)))
