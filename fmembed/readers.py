"""A shard of a source -> canonical rows (rows.row_schema), whatever the format.

Parsing is ours, because one bad input fails Ray's typed readers: here a bad file, line or value
becomes a rejected row and everything around it is kept.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import hashlib
import io
import itertools
import json
import lzma
import posixpath
import reprlib
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.utils import infer_compression

from fmembed.files import RefusedError, TooLargeError, check_regular, open_root, read_whole
from fmembed.rows import (
    ERROR,
    MESSAGE,
    SHARD,
    SKIPPED,
    STAGE,
    TOTAL,
    RowIds,
    clean_message,
    keys_of,
    row_schema,
)
from fmembed.spec import Format, Modality, SourceError, SourceSpec, redact
from fmembed.storage import reason
from fmembed.unfolding import (
    BATCH_BYTES,
    CheckedPages,
    PageError,
    dictionary_bytes,
    has_compressed_buffers,
    unfolded_bytes,
)

# Formats where each file is a row.
FOLDERS = ("text_folder", "image_folder", "audio_folder")
SAVED_DATASET = ("state.json", "dataset_dict.json")
_CHUNK_ROWS = 1000
# A table of this size is handed on, however few its rows: a sound may be a hundred megabytes.
_CHUNK_BYTES = 16 * 2**20
_SAMPLE_ROWS = 10_000
_SAMPLE_BYTES = 32 * 2**20
_SAMPLED_TAR_ROWS, _SAMPLED_TAR_MEMBERS = 10, 10_000
_READ_BYTES = 2**20
_MAX_ID_BYTES = 4096
# Of a line: Python holds an empty object of two bytes in 72.
_MAX_VALUES = 4_000_000
# Leaves and levels of a carried column's type; what has more is kept as JSON.
_MAX_LEAVES, _MAX_LEVELS = 1000, 16
# Rows that are told one by one as lost.
_MAX_LOST_ROWS = 1_000_000
# Of a tar member's long name or extended header.
_MAX_HEADER_BYTES = 2**20
_FETCH_THREADS = 16

# Where a fetched file's content stands in its row, beside the path it was found by.
_FETCHED: Any = object()

# One row as a reader hands it over: its fallback id, and its columns or (error, message).
RawRow = tuple[str, dict[str, Any] | tuple[str, str]]


@dataclass(frozen=True, slots=True)
class File:
    """A file: where it is, and the name that row ids carry (relative to the source's root).

    `revision` is what storage says of its content: an entity tag, else the time of its last change.
    """

    path: str
    name: str
    size: int
    revision: str = ""


@dataclass(frozen=True, slots=True)
class Shard:
    """What one read task reads: files, one file's part, or a saved dataset's part.

    `start` and `stop` are row groups of a Parquet file, rows of a saved dataset, or shards of a
    streamed one; None means all. `first_row` numbers the first row of a Parquet shard. `num_rows`
    is None where only reading tells. `key` changes when the content does: a shard whose key is on
    record as committed is not read again; None where storage does not tell of changes, or where
    each file is a row and its id is enough.
    """

    files: tuple[File, ...] = ()
    start: int | None = None
    stop: int | None = None
    first_row: int = 0
    num_rows: int | None = None
    key: str | None = None
    max_rows: int | None = None


@dataclass(frozen=True)
class Source:
    """A source that was found, listed and checked.

    The shards stay on the driver: a task gets its own one, and the rest `without_shards`. `root` is
    the filesystem, and the folder in it, below which the input column's paths are.
    """

    spec: SourceSpec
    format: Format
    fs: Any
    shards: tuple[Shard, ...]
    carried: pa.Schema
    modality: Modality = "text"
    root: tuple[Any, str] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the files, as they are stored."""
        return sum(f.size for shard in self.shards for f in shard.files)

    @property
    def without_shards(self) -> Source:
        """What reading a shard takes besides the shard."""
        return replace(self, shards=())

    @property
    def num_rows(self) -> int | None:
        """Rows in the shards where that is known without reading them, else None."""
        counts = [shard.num_rows for shard in self.shards]
        return None if None in counts else sum(c for c in counts if c is not None)

    @property
    def limit(self) -> str:
        """The field that bounds a row's content."""
        return f"source.max_{'text' if self.modality == 'text' else 'media'}_bytes"

    @property
    def most_bytes(self) -> int:
        """What a row's content may hold, in bytes."""
        spec = self.spec
        return spec.max_text_bytes if self.modality == "text" else spec.max_media_bytes

    @property
    def file_is_row(self) -> bool:
        """Whether each file is one row, so that its id is known without reading it."""
        return self.format in FOLDERS


def read_shard(
    source: Source, shard: Shard, index: int, committed: RowIds | None = None
) -> Iterator[pa.Table]:
    """Read one shard: tables of up to 1,000 canonical rows, rejected ones among them, and the
    marker row that ends it.

    Args:
        source: What the shard belongs to; its own shards are not looked at.
        shard: What to read.
        index: Which of the source's shards it is, for the rows to say.
        committed: Rows to leave out.
    """
    schema = row_schema(source.carried, source.modality)
    num_rows = num_skipped = 0
    rows: Iterator[RawRow] = itertools.islice(_read_to_the_end(source, shard), shard.max_rows)
    if source.root is not None:
        rows = _fetch(source, rows, source.root)
    for chunk in _chunks(source, rows):
        table = _canonical(source, chunk, index, schema)
        num_rows += table.num_rows
        if committed is not None:
            done = committed.contains(keys_of(table["row_id"].to_pylist()))
            num_skipped += int(done.sum())
            table = table.filter(pa.array(~done))
        if table.num_rows:
            yield table
    marker = {SHARD: index, TOTAL: num_rows, SKIPPED: num_skipped}
    yield pa.Table.from_pylist([marker], schema=schema)


def _read_to_the_end(source: Source, shard: Shard) -> Iterator[RawRow]:
    """Read; what breaks off becomes a rejected row with its cause, and what came before stays.

    Decompressors and parsers raise what they like (zlib.error, zipfile.BadZipFile, ...), so there
    is no list of what to expect.
    """
    if source.format == "hf":
        parts = [(source.spec.hf.split or "data", _read_hf(source, shard))]
    else:
        parts = [(f.name, _read_file(source, shard, f)) for f in shard.files]
    for name, rows in parts:
        num_rows = 0
        try:
            for row in rows:
                yield row
                num_rows += 1
        except TooLargeError as e:  # a file that is one row
            bad = _too_large(e.num_bytes, source)
            yield name, (bad.error, bad.message)
        except Exception as e:
            error, message = _unreadable(e)
            # Two dots: lines that were left blank have numbers too, so a plain one may be taken.
            row_id = f"{name}#{shard.first_row + num_rows}.." if num_rows or shard.start else name
            yield row_id, (error, f"from row {num_rows} on: {message}" if num_rows else message)


def _read_file(source: Source, shard: Shard, file: File) -> Iterator[RawRow]:
    if not source.file_is_row:
        check_regular(source.fs, file.path)
    yield from _READERS[source.format](source, shard, file)


def _chunks(source: Source, rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    chunk: list[RawRow] = []
    num_bytes, most = 0, source.most_bytes
    for row_id, row in rows:
        if isinstance(row, dict):
            size = 0
            for value in row.values():
                size += len(value) if isinstance(value, str | bytes) else _num_bytes(value)
            if size > most:
                row = _too_large_row(source, row, size)
            num_bytes += size
        chunk.append((row_id, row))
        if len(chunk) == _CHUNK_ROWS or num_bytes >= _CHUNK_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


def _num_bytes(value: Any) -> int:
    """About what a value holds, nested ones too, however deep."""
    num_bytes, left = 0, [value]
    while left:
        value = left.pop()
        if isinstance(value, dict | list):
            num_bytes += 64 * len(value)
            left.extend(value.values() if isinstance(value, dict) else value)
        else:
            num_bytes += len(value) if isinstance(value, str | bytes) else 8
    return num_bytes


def _too_large_row(source: Source, row: dict[Any, Any], num_bytes: int) -> dict[Any, Any]:
    """Its id, and instead of the input why it is not embedded."""
    named = {source.spec.id: row.get(source.spec.id)} if source.spec.id else {}
    return {**named, _FETCHED: _too_large(num_bytes, source)}


def _fetch(source: Source, rows: Iterator[RawRow], root: tuple[Any, str]) -> Iterator[RawRow]:
    """Put the content in place of the paths; a file that cannot be read is its own row's fate."""
    read_below = open_root(*root, source.most_bytes)
    column = source.spec.input

    def fetch(item: RawRow) -> RawRow:
        row_id, row = item
        if isinstance(row, tuple) or row.get(column) is None:
            return item
        path = row[column]
        if not isinstance(path, str):
            message = f"column {column!r}: takes a path, got {type(path).__name__}"
            return row_id, {**row, _FETCHED: _BadRow("wrong type", message)}
        # As the config names the root, or without its login and signature.
        given = path.removeprefix((source.spec.root or "").rstrip("/") + "/")
        given = given.removeprefix(root[1].rstrip("/") + "/")
        if given.startswith("/") or "://" in given or ".." in given.split("/") or "\\" in given:
            message = f"column {column!r}: {given[:200]!a} does not lie below source.root"
            return row_id, {**row, _FETCHED: _BadRow("outside the root", message)}
        try:
            content = read_below(given)
        except TooLargeError as e:
            return row_id, {**row, _FETCHED: _too_large(e.num_bytes, source)}
        except Exception as e:  # by filesystem: OSError, obstore's own, aiohttp's own
            return row_id, {**row, _FETCHED: _BadRow(*_unreadable(e))}
        return row_id, {**row, _FETCHED: content}

    # Over a network most of a fetch is waiting.
    with ThreadPoolExecutor(_FETCH_THREADS) as pool:
        while some := list(itertools.islice(rows, 2 * _FETCH_THREADS)):
            yield from pool.map(fetch, some)


def _canonical(source: Source, chunk: list[RawRow], shard: int, schema: pa.Schema) -> pa.Table:
    spec = source.spec
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for fallback_id, raw in chunk:
        row: dict[str, Any] = {"row_id": fallback_id}
        try:
            if isinstance(raw, tuple):
                raise _BadRow(*raw)
            if spec.id is not None:
                row["row_id"] = _row_id(raw.get(spec.id), spec.id)
            value = raw.get(_FETCHED, raw.get(spec.input))
            if isinstance(value, _BadRow):
                raise value
            if source.modality == "text":
                row["_input"], content = _text(value, spec)
                raw = {**raw, spec.input: row["_input"]}
            else:
                row["_input"] = content = _bytes(value, spec)
            for field in source.carried:
                row[field.name] = _cast(raw.get(field.name), field)
            row["content_hash"] = hashlib.blake2b(content, digest_size=16).hexdigest()
        except _BadRow as e:
            row = {"row_id": row["row_id"], STAGE: "read", ERROR: e.error}
            row[MESSAGE] = clean_message(spec.conceal(e.message))
        row[SHARD] = shard
        for name, values in columns.items():
            values.append(row.get(name))
    return pa.table(
        [pa.array(v, t) for v, t in zip(columns.values(), schema.types, strict=True)], schema=schema
    )


class _BadRow(Exception):  # noqa: N818 - a row's fate, not a failure of the run
    def __init__(self, error: str, message: str) -> None:
        super().__init__(message)
        self.error, self.message = error, message


def _too_large(num_bytes: int, source: Source) -> _BadRow:
    return _BadRow(
        "row too large",
        f"{num_bytes:,} bytes, more than {source.limit} = {source.most_bytes:,}",
    )


def _row_id(value: Any, column: str) -> str:
    if value is None or value == "":
        raise _BadRow("null id", f"column {column!r} is empty")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _BadRow(
            "wrong type",
            f"column {column!r}: takes text or an integer as id, got {type(value).__name__}",
        )
    try:
        row_id = str(value).encode()
    except UnicodeError:
        raise _BadRow("not UTF-8", f"column {column!r}") from None
    except ValueError:  # Python's own limit of 4,300 digits
        raise _BadRow("id too long", f"column {column!r}: an integer of too many digits") from None
    if len(row_id) > _MAX_ID_BYTES:
        message = f"column {column!r}: {len(row_id):,} bytes, more than {_MAX_ID_BYTES:,}"
        raise _BadRow("id too long", message)
    return row_id.decode()


def _text(value: Any, spec: SourceSpec) -> tuple[str, bytes]:
    """The text and its raw bytes, or the reason why it cannot be embedded."""
    if value is None:
        raise _BadRow("null input", f"column {spec.input!r} is null")
    try:
        if isinstance(value, bytes):
            text, content = value.decode("utf-8", errors=spec.encoding_errors), value
        elif isinstance(value, str):
            text, content = value, value.encode()
        else:
            raise _BadRow(
                "wrong type", f"column {spec.input!r}: takes text, got {type(value).__name__}"
            )
    except UnicodeDecodeError as e:
        raise _BadRow(
            "not UTF-8",
            f"byte {e.object[e.start]:#04x} at position {e.start}; "
            "source.encoding_errors: replace or ignore would keep the row",
        ) from None
    except UnicodeEncodeError as e:
        raise _BadRow("not UTF-8", f"undecodable character at position {e.start}") from None
    if not text.strip():
        raise _BadRow("empty input", f"column {spec.input!r} holds no text")
    return text, content


def _bytes(value: Any, spec: SourceSpec) -> bytes:
    """The bytes of a picture or sound, as a column of bytes or of `datasets` Image or Audio."""
    if isinstance(value, dict):
        # Only the bytes: a path that a row names is never opened.
        value = value.get("bytes")
    if value is None:
        raise _BadRow("null input", f"column {spec.input!r} holds no bytes")
    if not isinstance(value, bytes):
        raise _BadRow(
            "wrong type", f"column {spec.input!r}: takes bytes, got {type(value).__name__}"
        )
    if not value:
        raise _BadRow("empty input", f"column {spec.input!r} holds no byte")
    return value


def _cast(value: Any, field: pa.Field) -> Any:
    if isinstance(value, bytes) and pa.types.is_string(field.type):
        value = value.decode(errors="replace").strip()
    try:
        if value is not None and pa.types.is_string(field.type) and not isinstance(value, str):
            value = json.dumps(value, default=str)
        return pa.scalar(value, field.type).as_py() if value is not None else None
    except RecursionError:
        raise _BadRow("wrong type", f"column {field.name!r}: is nested too deeply") from None
    except (pa.ArrowException, UnicodeError, TypeError, ValueError, OverflowError):
        shown = ascii(value[:80]) if isinstance(value, str | bytes) else reprlib.repr(value)
        raise _BadRow("wrong type", f"column {field.name!r}: {shown} is no {field.type}") from None


# --- formats --------------------------------------------------------------------------------------


def _lines(handle: Any, most: int) -> Iterator[bytes | int]:
    """A file's lines, without their ends; of one longer than `most` bytes only its length.

    A megabyte of gzip may hold a line of a gigabyte: no more of it is kept than is allowed.
    """
    # Decompressors give what they have before they fail on what follows.
    read = getattr(handle, "read1", handle.read)
    kept: list[bytes] = []
    length = 0

    def line() -> bytes | int:
        return length if length > most else b"".join(kept)

    while chunk := bytes(read(_READ_BYTES)):
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


def _read_folder(source: Source, _: Shard, file: File) -> Iterator[RawRow]:
    content = read_whole(source.fs, file.path, source.most_bytes, file.size)
    row: dict[str, Any] = {source.spec.input: content}
    if source.spec.label:
        row[source.spec.label] = posixpath.basename(posixpath.dirname(file.name)) or None
    yield file.name, row


def _read_jsonl(source: Source, _: Shard, file: File) -> Iterator[RawRow]:
    wanted = source.spec.wanted
    for i, line in _json_lines(source, file):
        row = _parse_json(line, source)
        if isinstance(row, dict):
            row = {c: row[c] for c in wanted if c in row}
        yield f"{file.name}#{i}", row


def _json_lines(source: Source, file: File) -> Iterator[tuple[int, bytes | int]]:
    """Number and content of each line that is not blank; its length, where it is too long."""
    with source.fs.open(file.path, "rb", compression=infer_compression(file.name)) as handle:
        for i, line in enumerate(_lines(handle, source.spec.max_text_bytes)):
            if i == 0 and isinstance(line, bytes):
                line = line.removeprefix(codecs.BOM_UTF8)
            if isinstance(line, int) or (line and not line.isspace()):
                yield i, line


def _parse_json(line: bytes | int, source: Source) -> dict[str, Any] | tuple[str, str]:
    most = source.spec.max_text_bytes
    if isinstance(line, int):
        return "row too large", f"{line:,} bytes, more than source.max_text_bytes = {most:,}"
    if len(line) > _MAX_VALUES and sum(map(line.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        return "row too large", f"more than {_MAX_VALUES:,} values in {len(line):,} bytes"
    try:
        value = json.loads(line.decode("utf-8", errors=source.spec.encoding_errors))
    except UnicodeDecodeError as e:
        return "not UTF-8", f"byte {e.object[e.start]:#04x} at position {e.start} of the line"
    except (ValueError, RecursionError) as e:
        return "bad JSON", str(e)
    if not isinstance(value, dict):
        return "bad JSON", f"the line is a {type(value).__name__}, not an object"
    return value


def _read_csv(source: Source, _: Shard, file: File) -> Iterator[RawRow]:
    with _open_csv(source, file) as handle:
        lines = _CsvLines(handle, source.spec.max_text_bytes, _delimiter(file))
        reader = csv.reader(lines, delimiter=_delimiter(file), strict=True)
        header = next(reader, [])
        # Of a million columns only these are kept of each row.
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
            except _BadRow as e:
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


class _CsvLines:
    """Lines for csv.reader, that end a row which grows too large.

    A field in quotes may go over any number of lines, and csv.reader holds it all.
    """

    def __init__(self, handle: Any, most: int, delimiter: str) -> None:
        self._handle, self._most, self._delimiter = handle, most, delimiter
        self.begin_row()

    def begin_row(self) -> None:
        """What is read from here on is the next row."""
        self._length = self._num_values = self._num_quotes = 0

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        """The next line.

        Raises:
            _BadRow: The row is too large; what comes after it is the next row.
        """
        line = self._read(self._most - self._length + 1)
        if not line:
            raise StopIteration
        if self._length > self._most:
            # Its end is where a line ends and all quotes are closed.
            while line and (line[-1] not in "\r\n" or self._num_quotes % 2):
                line = self._read(_READ_BYTES)
            most = f"source.max_text_bytes = {self._most:,}"
            raise _BadRow("row too large", f"{self._length:,} characters, more than {most}")
        if self._num_values > _MAX_VALUES:
            raise _BadRow("row too large", f"more than {_MAX_VALUES:,} values")
        return line

    def _read(self, most: int) -> str:
        line: str = self._handle.readline(most)
        self._length += len(line)
        self._num_quotes += line.count('"')
        self._num_values += line.count(self._delimiter)
        return line


def _open_csv(source: Source, file: File) -> Any:
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


def _read_parquet(source: Source, shard: Shard, file: File) -> Iterator[RawRow]:
    wanted = source.spec.wanted
    with source.fs.open(file.path, "rb") as handle:
        footer = pq.read_metadata(handle)
        names = footer.schema.to_arrow_schema().names
        missing = [c for c in wanted if c not in names]
        if missing:
            yield file.name, ("unreadable file", f"it has no column {missing[0]!r}")
            return
        leaves = _leaves(footer, wanted)
        first = shard.first_row
        stop = shard.stop if shard.stop is not None else footer.num_row_groups
        for group in range(shard.start or 0, stop):
            metadata = footer.row_group(group)
            num_rows = metadata.num_rows
            i = 0
            try:
                rows = _batch_size(handle, metadata, leaves, source)
                checked = CheckedPages(handle, metadata, leaves)
                parquet = pq.ParquetFile(checked, metadata=footer)
                for batch in parquet.iter_batches(rows, row_groups=[group], columns=wanted):
                    for row in _batch_rows(batch, source):
                        yield f"{file.name}#{first + i}", row
                        i += 1
            except (OSError, PageError, pa.ArrowException, _BadRow) as e:
                fate = (e.error, e.message) if isinstance(e, _BadRow) else _unreadable(e)
                for lost in range(i, min(num_rows, i + _MAX_LOST_ROWS)):
                    yield f"{file.name}#{first + lost}", fate
            first += num_rows


def _leaves(metadata: pq.FileMetaData, columns: Sequence[str]) -> list[int]:
    """The Parquet columns that these columns are made of."""
    # A name may have dots of its own.
    inside = tuple(f"{c}." for c in columns)
    paths = (metadata.schema.column(i).path for i in range(metadata.num_columns))
    return [i for i, path in enumerate(paths) if path in columns or path.startswith(inside)]


def _batch_size(
    handle: Any, group: pq.RowGroupMetaData, leaves: Sequence[int], source: Source
) -> int:
    """So many rows of a row group at a time that they do not unfold to more than is bearable.

    Raises:
        _BadRow: Its rows are too large, by what the file itself says; nothing was unfolded.
        PageError: A dictionary's page cannot be read.
    """
    columns = [group.column(i) for i in leaves]
    row_bytes = sum(map(unfolded_bytes, columns)) // max(group.num_rows, 1)
    # Twice, because small values stand in the pages' statistics too; `_batch_rows` looks closer.
    if row_bytes > 2 * source.most_bytes:
        raise _too_large(row_bytes, source)
    largest = row_bytes
    for column in columns:
        if column.physical_type != "BYTE_ARRAY":
            continue
        if column.has_dictionary_page:
            # A value that is there once may stand in every row, and more than once in a list.
            times = -(-column.num_values // max(group.num_rows, 1))
            largest = max(largest, times * dictionary_bytes(handle, column))
        if "DELTA_BYTE_ARRAY" in column.encodings:
            # Each value may be nearly all of the one before it; never less than four rows, because
            # most such files are harmless. Arrow takes some three times what comes out.
            largest = max(largest, min(4 * column.total_uncompressed_size, BATCH_BYTES // 4))
    return int(min(max(BATCH_BYTES // max(largest, 1), 1), _CHUNK_ROWS))


def _batch_rows(batch: pa.RecordBatch, source: Source) -> Iterator[dict[Any, Any]]:
    """Rows as Python's values, few at a time where they are large."""
    is_plain = not any(pa.types.is_dictionary(t) or t.num_fields for t in batch.schema.types)
    if is_plain and batch.nbytes <= min(_CHUNK_BYTES, source.most_bytes):
        yield from _values(batch)
        return
    sizes = sum((_lengths(column) for column in batch.columns), np.zeros(batch.num_rows, np.int64))
    is_good = sizes <= source.most_bytes
    steps = (np.cumsum(np.where(is_good, sizes, _CHUNK_BYTES)) - 1) // _CHUNK_BYTES
    cuts = [0, *(np.flatnonzero(np.diff(steps)) + 1).tolist(), batch.num_rows]
    for start, stop in itertools.pairwise(cuts):
        for i in np.flatnonzero(~is_good[start:stop]).tolist():
            # Alone in its piece, or first of it: only its id is taken.
            assert i == 0
            ids = [c for c in (source.spec.id,) if c in batch.schema.names]
            (row,) = _values(batch.slice(start, 1).select(ids)) if ids else ({},)
            yield _too_large_row(source, row, int(sizes[start]))
            start += 1
        yield from _values(batch.slice(start, stop - start))


def _lengths(column: pa.Array) -> npt.NDArray[np.int64]:
    """Bytes of each value, shape (rows,), without looking at them."""
    type_ = column.type
    none: npt.NDArray[np.int64] = np.zeros(len(column), np.int64)
    if pa.types.is_dictionary(type_):
        known = _lengths(column.dictionary)
        return known[column.indices.fill_null(0).to_numpy(False)] if len(known) else none
    if pa.types.is_struct(type_):
        return sum(map(_lengths, column.flatten()), none)
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        ends = np.cumsum(pc.list_value_length(column).fill_null(0).to_numpy(False))
        sums = np.concatenate([[0], np.cumsum(_lengths(column.flatten()) + 8)])
        inside: npt.NDArray[np.int64] = np.diff(sums[np.concatenate([[0], ends])])
        return inside
    if any(is_(type_) for is_ in _HAS_LENGTH):
        lengths: npt.NDArray[np.int64] = pc.binary_length(column).fill_null(0).to_numpy(False)
        return lengths.astype(np.int64)
    return np.full(len(column), 8, np.int64)


_HAS_LENGTH = (
    pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary,
)  # fmt: skip


def _values(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    # A string column may hold bytes that are no UTF-8; as binary each row is judged on its own.
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            columns[name] = column.to_pylist()
        except UnicodeDecodeError:
            large = pa.types.is_large_string(column.type)
            columns[name] = column.cast(pa.large_binary() if large else pa.binary()).to_pylist()
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _read_webdataset(source: Source, _: Shard, file: File) -> Iterator[RawRow]:
    """Samples of a tar file: members of one name, a column for each extension.

    Read as a stream: nothing is extracted, so that a member's name is never a path, and a link
    never leads anywhere.
    """
    wanted = frozenset(source.spec.wanted)
    samples = itertools.groupby(_members(source, file), key=lambda found: found[0])
    for i, (key, members) in enumerate(samples):
        row: dict[Any, Any] = {"__key__": key}
        fate: tuple[str, str] | None = None
        for _key, name, member, archive in members:
            if name not in wanted:
                continue
            most = source.most_bytes if name == source.spec.input else source.spec.max_text_bytes
            if not member.isreg():
                fate = "unreadable file", f"member {key}.{name}: neither a file nor a folder"
            elif member.size > most:
                message = f"member {key}.{name}: {member.size:,} bytes, more than {most:,}"
                fate = "row too large", message
            else:
                content = archive.extractfile(member)
                assert content is not None
                row[name] = content.read()
        yield f"{file.name}#{i}", fate or row


def _members(
    source: Source, file: File
) -> Iterator[tuple[str, str, tarfile.TarInfo, tarfile.TarFile]]:
    """Key and extension of each member, and where to read it before the next one is asked for."""
    with source.fs.open(file.path, "rb") as raw:
        buffered = io.BufferedReader(raw)
        start = buffered.peek(2)
        # By us, a little at a time: ten kilobytes, which tarfile unfolds at once, may be gigabytes.
        unfold = next((open_ for magic, open_ in _UNFOLD.items() if start.startswith(magic)), None)
        stream: Any = unfold(buffered) if unfold else buffered
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as archive:
            while (member := archive.next()) is not None:
                # It would keep them all.
                archive.members = []  # type: ignore[attr-defined]
                archive.pax_headers = {}
                if not member.isdir():
                    folder, _, base = member.name.rpartition("/")
                    stem, _, name = base.partition(".")
                    yield f"{folder}/{stem}" if folder else stem, name, member, archive


_UNFOLD: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open,
}  # fmt: skip


class _Header(tarfile.TarInfo):
    """A tar header; of one that is followed by its own extension the length is looked at first."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _EXTENSIONS and header.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {header.size:,} bytes")
        return header


_EXTENSIONS = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip


def _read_hf(source: Source, shard: Shard) -> Iterator[RawRow]:
    prefix = source.spec.hf.split or "data"
    dataset = load_hf(source.spec)
    if source.spec.hf.streaming:
        for s in range(shard.start or 0, shard.stop or 0):
            piece = dataset.shard(num_shards=dataset.num_shards, index=s)
            for i, row in enumerate(piece):
                yield f"{prefix}/{s}#{i}", row
        return
    # As Arrow holds it, on disk: a row is looked at before it becomes Python's.
    stored = dataset.with_format("arrow")
    i = shard.start or 0
    for start in range(i, shard.stop or 0, _CHUNK_ROWS):
        table: pa.Table = stored[start : min(start + _CHUNK_ROWS, shard.stop or 0)]
        for batch in table.to_batches():
            for row in _batch_rows(batch, source):
                yield f"{prefix}#{i}", row
                i += 1


_READERS: dict[str, Callable[[Source, Shard, File], Iterator[RawRow]]] = {
    "text_folder": _read_folder,
    "image_folder": _read_folder,
    "audio_folder": _read_folder,
    "webdataset": _read_webdataset,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
}


def _unreadable(error: Exception) -> tuple[str, str]:
    cause = error.cause if isinstance(error, RefusedError) else "unreadable file"
    return cause, reason(error)


# --- what a file holds --------------------------------------------------------------------------


def file_schema(source: Source, file: File) -> pa.Schema:
    check_regular(source.fs, file.path)
    if source.format == "parquet":
        with source.fs.open(file.path, "rb") as handle:
            return pq.read_schema(handle)
    if source.format == "csv":
        # Text as it stands: a guessed integer would turn 01234 into 1234.
        with _open_csv(source, file) as handle:
            lines = _CsvLines(handle, source.spec.max_text_bytes, _delimiter(file))
            header = next(csv.reader(lines, delimiter=_delimiter(file)), [])
        return pa.schema([pa.field(c, pa.string()) for c in header])
    if source.format == "webdataset":
        members = itertools.islice(_members(source, file), _SAMPLED_TAR_MEMBERS)
        samples = itertools.groupby(members, key=lambda found: found[0])
        names: dict[str, None] = {}
        try:
            for _, sample in itertools.islice(samples, _SAMPLED_TAR_ROWS):
                names.update((name, None) for _, name, *_ in sample)
        except Exception:  # as below
            if not names:
                raise
        # What is carried beside the input (cls, txt, json) is text.
        return pa.schema([pa.field(c, pa.string()) for c in ("__key__", *names)])
    objects: list[dict[str, Any]] = []
    num_bytes = 0
    try:
        for _, line in itertools.islice(_json_lines(source, file), _SAMPLE_ROWS):
            row = _parse_json(line, source)
            if isinstance(row, dict):
                objects.append(row)
                num_bytes += len(line) if isinstance(line, bytes) else 0
            if num_bytes > _SAMPLE_BYTES:
                break
    except Exception:  # the rest of the file is broken; its rows will be rejected with the cause
        if not objects:
            raise
    if not objects:
        raise ValueError("no JSON object in it")
    return _infer(objects, source.spec.wanted)


def _infer(objects: list[dict[str, Any]], wanted: Sequence[str]) -> pa.Schema:
    """The columns, with the types of those that are wanted: there may be a million others."""
    fields = {n: pa.string() for n in dict.fromkeys(itertools.chain.from_iterable(objects))}
    for name in wanted:
        if name in fields:
            fields[name] = _infer_type([o.get(name) for o in objects])
    return pa.schema(list(fields.items()))


def _infer_type(values: list[Any]) -> pa.DataType:
    """The type of all values; JSON's text where they have none, or one without bounds."""
    try:
        type_ = pa.infer_type(values)
        if pa.types.is_null(type_) or not is_bounded(type_):
            return pa.string()
        return pa.array(values).type
    except (pa.ArrowException, UnicodeError, OverflowError, RecursionError):
        return pa.string()


def is_bounded(type_: pa.DataType) -> bool:
    """Whether a nested type has few enough levels and leaves to be a column's type."""
    left, num_leaves = [(type_, 1)], 0
    while left:
        inner, level = left.pop()
        num_leaves += 1
        if level > _MAX_LEVELS or num_leaves > _MAX_LEAVES:
            return False
        left.extend((inner.field(i).type, level + 1) for i in range(inner.num_fields))
    return True


def load_hf(spec: SourceSpec) -> Any:
    """Load a dataset saved to disk, or by hub id; with one split chosen.

    Raises:
        SourceError: There is none, or it cannot be read.
    """
    import datasets

    hf = spec.hf
    _check_data_files(Path(spec.uri))
    try:
        if any((Path(spec.uri) / name).exists() for name in SAVED_DATASET):
            dataset = datasets.load_from_disk(spec.uri)
            if isinstance(dataset, datasets.DatasetDict) and hf.split in dataset:
                dataset = dataset[hf.split]
            if hf.streaming and isinstance(dataset, datasets.Dataset):
                dataset = dataset.to_iterable_dataset(num_shards=1)
        else:
            dataset = datasets.load_dataset(
                spec.uri, hf.name, split=hf.split, revision=hf.revision, streaming=hf.streaming
            )
    except (OSError, ValueError, RuntimeError) as e:
        why = spec.conceal(reason(e))
        raise SourceError(f"source.uri: cannot load dataset {redact(spec.uri)}: {why}") from None
    if isinstance(dataset, dict):
        raise SourceError(f"source.hf.split: name one of {', '.join(dataset)}")
    wanted = set(spec.wanted)
    if dataset.features and wanted <= set(dataset.features):
        dataset = dataset.select_columns(sorted(wanted))
    for name, feature in (dataset.features or {}).items():
        # Undecoded: decoding is ours, a row at a time, and one bad picture is one rejected row.
        undecoded = _undecoded(feature)
        if undecoded != feature:
            dataset = dataset.cast_column(name, undecoded)
    return dataset


def _undecoded(feature: Any) -> Any:
    """A feature that leaves bytes as they are, and opens no path that a row names."""
    if hasattr(feature, "decode"):
        return type(feature)(decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, list):
        return [_undecoded(inner) for inner in feature]
    if hasattr(feature, "feature"):
        length = {"length": feature.length} if hasattr(feature, "length") else {}
        return type(feature)(_undecoded(feature.feature), **length)
    return feature


def check_saved(folder: Path) -> None:
    """Refuse a saved dataset of which a small file would unfold to much, or lies elsewhere.

    Once for each run: it looks into every record batch.

    Raises:
        SourceError: Compressed buffers, which `datasets` never writes; a name with a folder; no
            list of files.
    """
    try:
        _check_saved(folder)
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as e:
        raise SourceError(f"source.uri: cannot load dataset {folder}: {reason(e)}") from None


def _check_saved(folder: Path) -> None:
    try:
        told = json.loads((folder / SAVED_DATASET[1]).read_bytes())["splits"]
    except FileNotFoundError:
        told = [""]
    for split in told:
        state = json.loads((folder / split / SAVED_DATASET[0]).read_bytes())
        for name in [split, *(entry["filename"] for entry in state["_data_files"])]:
            if "/" in name or name == "..":
                raise SourceError(
                    f"source.uri: {folder} has {name[:200]!a} read, which is not in the folder"
                )
        for entry in state["_data_files"]:
            path = folder / split / entry["filename"]
            if has_compressed_buffers(str(path)):
                raise SourceError(
                    f"source.uri: buffers of {path} are compressed and would be unfolded all at "
                    "once; save the dataset with `datasets` itself"
                )


def _check_data_files(folder: Path) -> None:
    """Refuse a local dataset whose card has files read that are not in its folder.

    Raises:
        SourceError: It names such a file, or a server.
    """
    card = folder / "README.md"
    if not card.is_file():
        return
    import huggingface_hub

    try:
        text = card.read_text(encoding="utf-8")
        made: Any = huggingface_hub.DatasetCard(text, ignore_metadata_errors=True)
        told = made.data.to_dict()
    except Exception as e:  # by version: a YAML error, or of its own
        raise SourceError(f"source.uri: {card} cannot be read: {reason(e)}") from None
    left = [told.get("configs")]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str) and (
            "://" in value or "::" in value or value.startswith(("/", "~")) or ".." in value
        ):
            raise SourceError(
                f"source.uri: {card} has {value[:200]!a} read, which is not in the dataset's folder"
            )
