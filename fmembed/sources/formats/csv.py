"""CSV and TSV: text as it stands, by `source.csv` where that says more than the name does."""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
from fsspec.utils import infer_compression

from fmembed.errors import SourceError
from fmembed.sources.formats.base import MAX_VALUES, READ_BYTES, Format, over_files
from fmembed.sources.formats.ranges import (
    Ends,
    count_ends,
    cut_bytes,
    locate_lines,
    open_part,
    open_shard,
    with_marks,
)
from fmembed.sources.source import BadRow, File, Mark, RawRow, Shard, Source
from fmembed.spec import SourceSpec

# Encodings in which no character has a byte that is another one's in ASCII, nor any state.
_PLAIN_ENCODINGS = re.compile(r"utf-8|ascii|iso8859-\d+|cp125\d|cp437|cp850|koi8-[ru]")
# The longest row that is held while rows are looked for; a longer one ends with a line in which all
# quotes are closed, as in `_Lines`.
_ROW_BYTES = 64 * 2**20
# Of a file whose records are not looked for, or its first.
_START = Mark(0, 0, 0)
# Where a quote is looked for in TSV before a run; each row is looked at when it is read.
_TOLD_FILES, _TOLD_ROWS = 10, 1000
_QUOTED = (
    "fields in quotes, which TSV does not know: source.csv.quote: '\"' reads them as CSV does (and "
    "as pandas writes them), '' as they stand, quotes and all"
)
# Lines of one row that are told one by one as lost: half a megabyte of gzip may hold ten million.
_MAX_LOST_LINES = 100_000


def read_csv(source: Source, shard: Shard, file: File) -> Iterator[RawRow]:
    dialect = _dialect(source, file)
    begin = shard.marks[0] if shard.marks is not None else _START
    known = None
    if begin != _START:
        try:
            known = _header_of(source, file, strict=True)
        except (BadRow, csv.Error):  # the first part says so
            return
    with _open(source, shard, file) as handle:
        lines = _Lines(handle, source.spec.max_text_bytes, dialect, begin.line)
        reader = _reader(lines, dialect)
        header = _header(reader, source) if known is None else known
        # A file may have a million columns: of each row only these are kept.
        wanted = {name: i for i, name in enumerate(header) if name in source.spec.wanted}
        has_no_quotes = _has_no_quotes(source, dialect)
        missing = [c for c in (source.spec.input, source.spec.id) if c and c not in wanted]
        if missing:
            if begin == _START:  # once of a file
                yield file.name, ("unreadable file", f"it has no column {missing[0]!r}")
            return
        for i in itertools.count(begin.row):
            row_id = f"{file.name}#{i}"
            lines.begin_row()
            first_line = lines.num_lines + 1
            try:
                values = next(reader)
            except StopIteration:
                break
            except BadRow as e:
                # One large row, if its quotes were closed in the end.
                last_line = lines.num_lines if lines.is_in_quotes else first_line
                yield from _lost_rows(row_id, e.error, e.message, first_line, last_line)
                continue
            except csv.Error as e:
                yield from _lost_rows(row_id, "bad CSV", str(e), first_line, lines.num_lines)
                continue
            if values and len(values) != len(header):
                message = f"{len(values)} fields where the header has {len(header)}"
                yield from _lost_rows(row_id, "bad CSV", message, first_line, lines.num_lines)
            elif values:
                row = {name: values[at] for name, at in wanted.items()}
                if has_no_quotes and _is_quoted(row.values()):
                    yield row_id, ("bad CSV", f"it has {_QUOTED}, in line {first_line:,}")
                else:
                    yield row_id, row


def _lost_rows(row_id: str, error: str, message: str, first: int, last: int) -> Iterator[RawRow]:
    """A bad row, and one for each further line that it took: they were rows, most likely, and count
    as such where it is asked how many may be rejected.
    """
    where = f"in line {first:,}"
    if last > first:  # what the second quote of a pair should have ended
        where = f"which took lines {first:,} to {last:,}; is a quote not closed?"
    yield row_id, (error, f"{message}, {where}")
    taken = (error, f"taken by the row that begins in line {first:,}")
    for line in range(first + 1, min(last, first + _MAX_LOST_LINES) + 1):
        yield f"{row_id}/line {line}", taken


def csv_schema(source: Source, files: Sequence[File]) -> pa.Schema:
    """The columns of all.

    Raises:
        SourceError: TSV with quotes after all, as pandas writes it: nothing says what they mean.
    """
    schema = over_files(_file_schema)(source, files)
    quoted = next((f for f in files[:_TOLD_FILES] if _begins_quoted(source, f)), None)
    if quoted is not None:
        raise SourceError(f"source.csv.quote: {quoted.name} has {_QUOTED}")
    return schema


def _has_no_quotes(source: Source, dialect: dict[str, Any]) -> bool:
    """Whether nothing is quoted because TSV has no quotes, and nobody has said so."""
    return dialect["quotechar"] is None and source.spec.csv.quote is None


def _is_quoted(fields: Iterable[str]) -> bool:
    return any(len(f) > 1 and f[0] == f[-1] == '"' for f in fields)


def _begins_quoted(source: Source, file: File) -> bool:
    dialect = _dialect(source, file)
    if not _has_no_quotes(source, dialect):
        return False
    try:
        with _open(source, Shard(), file) as handle:
            lines = _Lines(handle, source.spec.max_text_bytes, dialect)
            rows = itertools.islice(_reader(lines, dialect, strict=False), _TOLD_ROWS)
            return any(map(_is_quoted, rows))
    except Exception:  # its rows are rejected with the cause
        return False


def _file_schema(source: Source, file: File) -> pa.Schema:
    # Text as it stands: a guessed integer would turn 01234 into 1234.
    header = _header_of(source, file, strict=False)
    is_one = len(header) == 1 and header[0] not in source.spec.wanted
    if is_one and (other := _likely_delimiter(header[0])):
        raise ValueError(
            f"its only column is {header[0][:80]!r}; are its fields set apart by {other!r}? Name "
            "it as source.csv.delimiter"
        )
    if any("\ud800" <= c <= "\udfff" for c in "".join(header)):
        raise ValueError(
            f"its header is not {source.spec.csv.encoding}: name the encoding as "
            "source.csv.encoding (latin-1, cp1252, utf-16, ...)"
        )
    return pa.schema([pa.field(c, pa.string()) for c in dict.fromkeys(header)])


def _header_of(source: Source, file: File, strict: bool) -> list[str]:
    dialect = _dialect(source, file)
    with _open(source, Shard(), file) as handle:
        lines = _Lines(handle, source.spec.max_text_bytes, dialect)
        return _header(_reader(lines, dialect, strict), source)


def _header(reader: Any, source: Source) -> list[str]:
    """The names of the columns.

    Raises:
        BadRow: One that is used is there twice.
    """
    header: list[str] = next(reader, [])
    for name in source.spec.wanted:
        if header.count(name) > 1:
            raise BadRow("unreadable file", f"{header.count(name)} of its columns are {name!r}")
    return header


def _likely_delimiter(header: str) -> str | None:
    return next((c for c in "\t;|," if c in header), None)


class _Lines:
    """Lines for csv.reader, that end a row which grows too large.

    A field in quotes may go over any number of lines, and csv.reader holds it all.
    """

    def __init__(
        self, handle: Any, most: int, dialect: dict[str, Any], num_before: int = 0
    ) -> None:
        self._handle, self._most = handle, most
        self._delimiter, self._quote = dialect["delimiter"], dialect["quotechar"]
        # So many were begun; `csv.reader` does not know of those that it was never given.
        self.num_lines, self._is_at_end = num_before, True
        self.num_characters = 0
        self.begin_row()

    def begin_row(self) -> None:
        """What is read from here on is the next row."""
        self._length = self._num_values = self._num_quotes = 0

    @property
    def is_in_quotes(self) -> bool:
        """Whether a quote of the row is still open."""
        return self._num_quotes % 2 == 1

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
            while line and (line[-1] not in "\r\n" or self.is_in_quotes):
                line = self._read(READ_BYTES)
            most = f"source.max_text_bytes = {self._most:,}"
            raise BadRow("row too large", f"{self._length:,} characters, more than {most}")
        if self._num_values > MAX_VALUES:
            raise BadRow("row too large", f"more than {MAX_VALUES:,} values")
        return line

    def _read(self, most: int) -> str:
        line: str = self._handle.readline(most)
        self.num_lines += bool(line) and self._is_at_end
        self._is_at_end = line.endswith(("\r", "\n"))
        self._length += len(line)
        self.num_characters += len(line)
        self._num_quotes += line.count(self._quote) if self._quote else 0
        self._num_values += line.count(self._delimiter)
        return line


def _reader(lines: _Lines, dialect: dict[str, Any], strict: bool = True) -> Any:
    # The module's default limit of 131,072 characters a field is below a long article.
    csv.field_size_limit(2**31 - 1)
    return csv.reader(lines, **dialect, strict=strict)


def _open(source: Source, shard: Shard, file: File) -> Any:
    """A file's text, or that of a part of it.

    Raises:
        ValueError: It begins with the mark of another encoding.
    """
    encoding = codecs.lookup(source.spec.csv.encoding).name
    compression = infer_compression(file.name)
    if encoding == "utf-8" and (shard.marks is None or shard.marks[0] == _START):
        with source.fs.open(file.path, "rb", compression=compression) as handle:
            if handle.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise ValueError("it is UTF-16 by its first bytes; set source.csv.encoding: utf-16")
        encoding = "utf-8-sig"
    # Undecodable bytes become lone surrogates, which only their own row fails on later.
    chosen = source.spec.encoding_errors
    errors = "surrogateescape" if chosen == "strict" else chosen
    if shard.marks is not None:
        return io.TextIOWrapper(open_shard(source, shard, file), encoding, errors, newline="")
    return source.fs.open(
        file.path, "rt", compression=compression, encoding=encoding, errors=errors, newline=""
    )


def cut_csv(spec: SourceSpec, fs: Any, file: File) -> list[Shard]:
    """Cut a file whose encoding shows what is a line's end, a delimiter and a quote in each byte
    by itself.
    """
    told = spec.csv
    is_plain = _PLAIN_ENCODINGS.fullmatch(codecs.lookup(told.encoding).name)
    # What is left out may have hidden a quote.
    if is_plain is None or spec.encoding_errors == "ignore":
        return [Shard((file,))]
    if not ((told.delimiter or ",") + (told.quote or "")).isascii():
        return [Shard((file,))]
    marks_of_utf16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return cut_bytes(fs, file, lambda head: not head.startswith(marks_of_utf16))


def count_csv(source: Source, shard: Shard) -> Ends:
    """What ends lines, and quotes them."""
    (file,) = shard.files
    return count_ends(source, shard, (_dialect(source, file)["quotechar"] or "").encode())


def locate_csv(
    source: Source, parts: Sequence[Shard], ends: Sequence[Ends], begin: Mark
) -> list[Shard]:
    """Where rows begin: at each newline, if nothing is quoted; else only reading tells."""
    if not any(e.num_quotes or e.num_returns for e in ends):
        # Lines before that are no rows: the header, and what rows before have gone over.
        return locate_lines(parts, ends, begin, 1 if begin == _START else begin.line - begin.row)
    (file,), starts = parts[0].files, [part.start or 0 for part in parts[1:]]
    stop, marks = parts[-1].stop or 0, [begin]
    with open_part(source, file, begin.byte, stop) as raw:
        byte = begin.byte
        if begin == _START and raw.peek(3).startswith(codecs.BOM_UTF8):
            byte += len(raw.read(len(codecs.BOM_UTF8)))
        # A character a byte: rows end at the same ones in all encodings that are cut. And a limit
        # that is always the same: what is on record of some parts has to fit the others.
        text = io.TextIOWrapper(raw, "latin-1", newline="")
        dialect = _dialect(source, file)
        lines = _Lines(text, _ROW_BYTES, dialect, begin.line)
        reader = _reader(lines, dialect)
        with contextlib.suppress(StopIteration):
            if begin == _START:
                with contextlib.suppress(BadRow, csv.Error):
                    next(reader)
            for row in itertools.count(begin.row):
                at = byte + lines.num_characters
                while len(marks) <= len(starts) and at >= starts[len(marks) - 1]:
                    marks.append(Mark(at, row, lines.num_lines))
                if len(marks) > len(starts):
                    break
                lines.begin_row()
                with contextlib.suppress(BadRow, csv.Error):
                    next(reader)
    return with_marks(parts, marks + [Mark(stop, 0, 0)] * (len(parts) + 1 - len(marks)))


def _dialect(source: Source, file: File) -> dict[str, Any]:
    """What csv.reader takes. TSV has no quotes (the IANA's text/tab-separated-values)."""
    is_tsv = ".tsv" in file.name.lower()
    told = source.spec.csv
    delimiter = told.delimiter or ("\t" if is_tsv else ",")
    quote = ("" if is_tsv else '"') if told.quote is None else told.quote
    quoting = csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE
    return {"delimiter": delimiter, "quotechar": quote or None, "quoting": quoting}


CSV = Format(
    name="csv",
    suffixes=(".csv", ".tsv", ".csv.gz", ".tsv.gz"),
    more_suffixes=(".txt", ".tab", ".txt.gz"),
    rows=read_csv,
    schema=csv_schema,
    cut=cut_csv,
    count=count_csv,
    locate=locate_csv,
)
