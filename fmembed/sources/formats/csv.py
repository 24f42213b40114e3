"""CSV and TSV: text as it stands."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from fsspec.utils import infer_compression

from fmembed.sources.formats.base import MAX_VALUES, READ_BYTES, Format, over_files
from fmembed.sources.source import BadRow, File, RawRow, Shard, Source


def read_csv(source: Source, _: Shard, file: File) -> Iterator[RawRow]:
    with _open(source, file) as handle:
        lines = _Lines(handle, source.spec.max_text_bytes, _delimiter(file))
        reader = csv.reader(lines, delimiter=_delimiter(file), strict=True)
        header = next(reader, [])
        # A file may have a million columns: of each row only these are kept.
        wanted = {name: i for i, name in enumerate(header) if name in source.spec.wanted}
        missing = [c for c in (source.spec.input, source.spec.id) if c and c not in wanted]
        if missing:
            yield file.name, ("unreadable file", f"it has no column {missing[0]!r}")
            return
        for i in itertools.count():
            lines.begin_row()
            try:
                values = next(reader)
            except StopIteration:
                break
            except BadRow as e:
                yield f"{file.name}#{i}", (e.error, e.message)
                continue
            except csv.Error as e:
                yield f"{file.name}#{i}", ("bad CSV", f"{e}, near line {reader.line_num}")
                continue
            if values and len(values) != len(header):
                message = f"{len(values)} fields where the header has {len(header)}"
                yield f"{file.name}#{i}", ("bad CSV", message)
            elif values:
                yield f"{file.name}#{i}", {name: values[at] for name, at in wanted.items()}


def csv_schema(source: Source, file: File) -> pa.Schema:
    # Text as it stands: a guessed integer would turn 01234 into 1234.
    with _open(source, file) as handle:
        lines = _Lines(handle, source.spec.max_text_bytes, _delimiter(file))
        header = next(csv.reader(lines, delimiter=_delimiter(file)), [])
    return pa.schema([pa.field(c, pa.string()) for c in header])


class _Lines:
    """Lines for csv.reader, that end a row which grows too large.

    A field in quotes may go over any number of lines, and csv.reader holds it all.
    """

    def __init__(self, handle: Any, most: int, delimiter: str) -> None:
        self._handle, self._most, self._delimiter = handle, most, delimiter
        self.begin_row()

    def begin_row(self) -> None:
        """What is read from here on is the next row."""
        self._length = self._num_values = self._num_quotes = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        """The next line.

        Raises:
            BadRow: The row is too large; what comes after it is the next row.
        """
        line = self._read(self._most - self._length + 1)
        if not line:
            raise StopIteration
        if self._length > self._most:
            # The row ends where a line ends and all quotes are closed.
            while line and (line[-1] not in "\r\n" or self._num_quotes % 2):
                line = self._read(READ_BYTES)
            most = f"source.max_text_bytes = {self._most:,}"
            raise BadRow("row too large", f"{self._length:,} characters, more than {most}")
        if self._num_values > MAX_VALUES:
            raise BadRow("row too large", f"more than {MAX_VALUES:,} values")
        return line

    def _read(self, most: int) -> str:
        line: str = self._handle.readline(most)
        self._length += len(line)
        self._num_quotes += line.count('"')
        self._num_values += line.count(self._delimiter)
        return line


def _open(source: Source, file: File) -> Any:
    # The module's default limit of 131,072 characters a field is below a long article.
    csv.field_size_limit(2**31 - 1)
    # Undecodable bytes become lone surrogates, which only their own row fails on later.
    chosen = source.spec.encoding_errors
    errors = "surrogateescape" if chosen == "strict" else chosen
    return source.fs.open(
        file.path, "rt", compression=infer_compression(file.name), encoding="utf-8-sig",
        errors=errors, newline="",
    )  # fmt: skip


def _delimiter(file: File) -> str:
    return "\t" if ".tsv" in file.name.lower() else ","


CSV = Format(
    name="csv",
    suffixes=(".csv", ".tsv", ".csv.gz", ".tsv.gz"),
    rows=read_csv,
    schema=over_files(csv_schema),
)
