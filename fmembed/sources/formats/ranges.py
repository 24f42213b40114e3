"""One large file that is read in parts: cut at bytes, and read from record to record.

A record belongs to the part in which its first byte is. Where that is, and how many came before it,
nobody knows without reading what comes before: `Ends` are counted part by part, each by itself, and
`Format.locate` makes of them where the parts' records begin.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fsspec.implementations.cached import CachingFileSystem
from fsspec.utils import infer_compression

from fmembed.sources.files import check_regular, protocols
from fmembed.sources.formats.base import READ_BYTES
from fmembed.sources.source import File, Mark, Shard, Source

# Bytes of a part: some seconds of reading and tokenising. A file of less than twice as much is read
# whole.
PART_BYTES = 64 * 2**20
# Filesystems on which reading from anywhere takes no longer, by fsspec's names.
_SEEKABLE = {"file", "local", "s3", "s3a", "gs", "gcs", "az", "adl", "abfs", "abfss", "memory"}


def cut_bytes(fs: Any, file: File, fits: Callable[[bytes], bool] = lambda _: True) -> list[Shard]:
    """Cut a large file, if it can be read from anywhere: none that is compressed, nor one of a web
    server, which may send all or nothing, nor one that is unpacked or cached whole.

    Args:
        fs: Where.
        file: Which.
        fits: Whether one that begins so can be.
    """
    whole = [Shard((file,))]
    is_seekable = _SEEKABLE.intersection(protocols(fs)) and not isinstance(fs, CachingFileSystem)
    is_large = file.size >= 2 * PART_BYTES and infer_compression(file.name) is None
    if not (is_large and is_seekable):
        return whole
    try:
        check_regular(fs, file.path)
        with fs.open(file.path, "rb") as handle:
            if not fits(bytes(handle.read(4))):
                return whole
    except Exception:  # by filesystem; the read task finds the same and rejects it with its cause
        return whole
    return cut_between(file, 0, file.size)


def cut_between(file: File, start: int, stop: int) -> list[Shard]:
    """Parts of a file from one byte to another."""
    starts = range(start, stop, PART_BYTES)
    both = itertools.pairwise([*starts, stop])
    return [Shard((file,), a, b, size=b - a) for a, b in both]


class _Part(io.RawIOBase):
    """The bytes of an open file from here on, so many."""

    def __init__(self, handle: Any, num_bytes: int) -> None:
        self._handle, self._left = handle, num_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._handle.read(min(len(buffer), self._left))
        buffer[: len(found)] = found
        self._left -= len(found)
        return len(found)

    def close(self) -> None:
        self._handle.close()
        super().close()


def open_part(source: Source, file: File, start: int, stop: int) -> io.BufferedReader:
    """The bytes of a file from one to another."""
    handle = source.fs.open(file.path, "rb")
    handle.seek(start)
    return io.BufferedReader(_Part(handle, stop - start), READ_BYTES)


def open_shard(source: Source, shard: Shard, file: File) -> Any:
    """A shard's bytes, unfolded: of the whole file, or of the records that are its own."""
    if shard.marks is None:
        return source.fs.open(file.path, "rb", compression=infer_compression(file.name))
    begin, end = shard.marks
    return open_part(source, file, begin.byte, end.byte)


@dataclass(frozen=True)
class Ends:
    """What a part has of what ends a line, and of quotes.

    `first` is the byte after the first newline, -1 without one; `is_ended` says whether the last
    byte is one. `num_returns` counts carriage returns that no newline follows.
    """

    num_lines: int
    first: int
    is_ended: bool
    num_returns: int
    num_quotes: int


def count_ends(source: Source, shard: Shard, quote: bytes = b"") -> Ends:
    """Look through a part.

    Args:
        source: What it belongs to.
        shard: The part.
        quote: What is a quote; empty for nothing.
    """
    assert shard.start is not None
    assert shard.stop is not None
    (file,) = shard.files
    num_lines = num_returns = num_quotes = 0
    first, at, last, is_ended = -1, shard.start, b"", False
    # One byte more: a newline after a return may be the next part's.
    with open_part(source, file, shard.start, shard.stop + 1) as handle:
        while chunk := handle.read(READ_BYTES):
            own = chunk[: shard.stop - at]
            if first < 0 and (found := own.find(b"\n")) >= 0:
                first = at + found + 1
            num_lines += own.count(b"\n")
            num_quotes += own.count(quote) if quote else 0
            both = last + chunk
            num_returns += both.count(b"\r", 0, -1) - both.count(b"\r\n")
            at, last = at + len(chunk), chunk[-1:]
            is_ended = own.endswith(b"\n") if own else is_ended
    num_returns += last == b"\r" and at == shard.stop  # the end of the file
    return Ends(num_lines, first, is_ended, num_returns, num_quotes)


def locate_lines(
    parts: Sequence[Shard], ends: Sequence[Ends], begin: Mark, num_others: int = 0
) -> list[Shard]:
    """Parts of a file whose records are its lines, with where these begin and end.

    Args:
        parts: One after another, up to the file's last one.
        ends: What is in each.
        begin: Where the first one's records begin.
        num_others: Lines before all further records that are none themselves.
    """
    size = parts[-1].stop or 0
    # Newlines before the first part: the one before its first record may be in it.
    num_lines = begin.line - (begin.byte > (parts[0].start or 0))
    marks = [begin]
    for i, (part, counted) in enumerate(zip(parts, ends, strict=True), 1):
        num_lines += counted.num_lines
        byte, line = part.stop or 0, num_lines
        if not counted.is_ended:  # its last line goes on
            byte, line = next((e.first for e in ends[i:] if e.first >= 0), size), num_lines + 1
        marks.append(Mark(byte, line - num_others, line))
    return with_marks(parts, marks)


def with_marks(parts: Sequence[Shard], marks: Sequence[Mark]) -> list[Shard]:
    """Parts, of which each has its records from one mark to the next."""
    both = zip(parts, itertools.pairwise(marks), strict=True)
    return [replace(part, marks=some, first_row=some[0].row) for part, some in both]
