"""A text file's lines, for formats that are made of them."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterator
from typing import Any

from fsspec.utils import infer_compression

from fmembed.sources.formats.base import READ_BYTES
from fmembed.sources.formats.ranges import open_shard
from fmembed.sources.source import BadRow, File, Shard, Source


def read_lines(source: Source, shard: Shard, file: File) -> Iterator[tuple[int, bytes | int]]:
    """A file's lines with their numbers, unfolded, as bytes without their ends or a mark of the
    byte order; of a part of one those that begin in it.

    Of one longer than `source.max_text_bytes` only its length: a megabyte of gzip may hold a line
    of a gigabyte, and no more of it is kept than is allowed.
    """
    if infer_compression(file.name) is not None and not _has_bytes(source, file):
        raise BadRow("unreadable file", "it has no byte, and so is not what its name says")
    with open_shard(source, shard, file) as handle:
        for i, line in enumerate(_lines(handle, source.spec.max_text_bytes), shard.first_row):
            if i == 0 and isinstance(line, bytes):
                line = line.removeprefix(codecs.BOM_UTF8)
            yield i, line


def _has_bytes(source: Source, file: File) -> bool:
    if file.size:
        return True
    with source.fs.open(file.path, "rb") as handle:
        return bool(handle.read(1))


def _lines(handle: Any, most: int) -> Iterator[bytes | int]:
    # Decompressors give what they have before they fail on what follows.
    read = getattr(handle, "read1", handle.read)
    kept: list[bytes] = []
    length = 0

    def line() -> bytes | int:
        return length if length > most else b"".join(kept)

    while chunk := bytes(read(READ_BYTES)):
        for is_rest, piece in zip(
            itertools.chain(itertools.repeat(False, chunk.count(b"\n")), [True]),
            chunk.split(b"\n"),
            strict=True,
        ):
            length += len(piece)
            if length > most:
                kept = []
            else:
                kept.append(piece)
            if not is_rest:
                yield line()
                kept, length = [], 0
    if length:
        yield line()
