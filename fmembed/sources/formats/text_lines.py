"""Plain text of which each line is a row."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from fmembed.sources.formats.base import Format, over_files
from fmembed.sources.formats.lines import read_lines
from fmembed.sources.formats.ranges import count_ends, cut_bytes, locate_lines
from fmembed.sources.source import File, RawRow, Shard, Source


def read_text_lines(source: Source, shard: Shard, file: File) -> Iterator[RawRow]:
    most = source.spec.max_text_bytes
    for i, line in read_lines(source, shard, file):
        if isinstance(line, int):
            why = f"{line:,} bytes, more than source.max_text_bytes = {most:,}"
            yield f"{file.name}#{i}", ("row too large", why)
        elif line.strip():  # a blank line is none, as in JSON Lines; it has its number
            yield f"{file.name}#{i}", {source.spec.input: line.removesuffix(b"\r")}


def _schema(source: Source, _: File) -> pa.Schema:
    """A column of whatever name the config gives it."""
    return pa.schema([pa.field(source.spec.input, pa.string())])


# Not told by a suffix: a folder of .txt files has a text in each. Who names the format means this.
LINES = Format(
    name="lines",
    suffixes=(".lines",),
    more_suffixes=(".txt", ".text", ".txt.gz", ".txt.zst"),
    rows=read_text_lines,
    schema=over_files(_schema),
    cut=lambda _, fs, file: cut_bytes(fs, file),
    count=count_ends,
    locate=lambda _, parts, ends, begin: locate_lines(parts, ends, begin),
)
