"""A shard of a source -> canonical rows (rows.row_schema), whatever the format.

Parsing is ours, because one bad input fails Ray's typed readers: here a bad file, line or value
becomes a rejected row and everything around it is kept.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import reprlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from fmembed.rows.columns import (
    ERROR,
    MESSAGE,
    SHARD,
    SKIPPED,
    STAGE,
    TOTAL,
    clean_message,
    row_schema,
)
from fmembed.rows.ids import RowIds, keys_of
from fmembed.sources.files import TooLargeError, check_regular, open_root
from fmembed.sources.formats.base import (
    CHUNK_BYTES,
    CHUNK_ROWS,
    FETCHED,
    BadRow,
    too_large,
    too_large_row,
    unreadable_row,
)
from fmembed.sources.formats.hf import read_hf
from fmembed.sources.formats.registry import READERS
from fmembed.sources.source import File, RawRow, Shard, Source
from fmembed.spec import SourceSpec

_MAX_ID_BYTES = 4096
_FETCH_THREADS = 16


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
        parts = [(source.spec.hf.split or "data", read_hf(source, shard))]
    else:
        parts = [(f.name, _read_file(source, shard, f)) for f in shard.files]
    for name, rows in parts:
        num_rows = 0
        try:
            for row in rows:
                yield row
                num_rows += 1
        except TooLargeError as e:  # a file that is one row
            bad = too_large(e.num_bytes, source)
            yield name, (bad.error, bad.message)
        except Exception as e:
            error, message = unreadable_row(e)
            # Two dots: lines that were left blank have numbers too, so a plain one may be taken.
            row_id = f"{name}#{shard.first_row + num_rows}.." if num_rows or shard.start else name
            yield row_id, (error, f"from row {num_rows} on: {message}" if num_rows else message)


def _read_file(source: Source, shard: Shard, file: File) -> Iterator[RawRow]:
    if not source.file_is_row:
        check_regular(source.fs, file.path)
    yield from READERS[source.format](source, shard, file)


def _chunks(source: Source, rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    chunk: list[RawRow] = []
    num_bytes, most = 0, source.most_bytes
    for row_id, row in rows:
        if isinstance(row, dict):
            size = 0
            for value in row.values():
                size += len(value) if isinstance(value, str | bytes) else _num_bytes(value)
            if size > most:
                row = too_large_row(source, row, size)
            num_bytes += size
        chunk.append((row_id, row))
        if len(chunk) == CHUNK_ROWS or num_bytes >= CHUNK_BYTES:
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
            return row_id, {**row, FETCHED: BadRow("wrong type", message)}
        # As the config names the root, or without its login and signature.
        given = path.removeprefix((source.spec.root or "").rstrip("/") + "/")
        given = given.removeprefix(root[1].rstrip("/") + "/")
        if given.startswith("/") or "://" in given or ".." in given.split("/") or "\\" in given:
            message = f"column {column!r}: {given[:200]!a} does not lie below source.root"
            return row_id, {**row, FETCHED: BadRow("outside the root", message)}
        try:
            content = read_below(given)
        except TooLargeError as e:
            return row_id, {**row, FETCHED: too_large(e.num_bytes, source)}
        except Exception as e:  # by filesystem: OSError, obstore's own, aiohttp's own
            return row_id, {**row, FETCHED: BadRow(*unreadable_row(e))}
        return row_id, {**row, FETCHED: content}

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
                raise BadRow(*raw)
            if spec.id is not None:
                row["row_id"] = _row_id(raw.get(spec.id), spec.id)
            value = raw.get(FETCHED, raw.get(spec.input))
            if isinstance(value, BadRow):
                raise value
            if source.modality == "text":
                row["_input"], content = _text(value, spec)
                raw = {**raw, spec.input: row["_input"]}
            else:
                row["_input"] = content = _bytes(value, spec)
            for field in source.carried:
                row[field.name] = _cast(raw.get(field.name), field)
            row["content_hash"] = hashlib.blake2b(content, digest_size=16).hexdigest()
        except BadRow as e:
            row = {"row_id": row["row_id"], STAGE: "read", ERROR: e.error}
            row[MESSAGE] = clean_message(spec.conceal(e.message))
        row[SHARD] = shard
        for name, values in columns.items():
            values.append(row.get(name))
    return pa.table(
        [pa.array(v, t) for v, t in zip(columns.values(), schema.types, strict=True)], schema=schema
    )


def _row_id(value: Any, column: str) -> str:
    if value is None or value == "":
        raise BadRow("null id", f"column {column!r} is empty")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRow(
            "wrong type",
            f"column {column!r}: takes text or an integer as id, got {type(value).__name__}",
        )
    try:
        row_id = str(value).encode()
    except UnicodeError:
        raise BadRow("not UTF-8", f"column {column!r}") from None
    except ValueError:  # Python's own limit of 4,300 digits
        raise BadRow("id too long", f"column {column!r}: an integer of too many digits") from None
    if len(row_id) > _MAX_ID_BYTES:
        message = f"column {column!r}: {len(row_id):,} bytes, more than {_MAX_ID_BYTES:,}"
        raise BadRow("id too long", message)
    return row_id.decode()


def _text(value: Any, spec: SourceSpec) -> tuple[str, bytes]:
    """The text and its raw bytes, or the reason why it cannot be embedded."""
    if value is None:
        raise BadRow("null input", f"column {spec.input!r} is null")
    try:
        if isinstance(value, bytes):
            text, content = value.decode("utf-8", errors=spec.encoding_errors), value
        elif isinstance(value, str):
            text, content = value, value.encode()
        else:
            raise BadRow(
                "wrong type", f"column {spec.input!r}: takes text, got {type(value).__name__}"
            )
    except UnicodeDecodeError as e:
        raise BadRow(
            "not UTF-8",
            f"byte {e.object[e.start]:#04x} at position {e.start}; "
            "source.encoding_errors: replace or ignore would keep the row",
        ) from None
    except UnicodeEncodeError as e:
        raise BadRow("not UTF-8", f"undecodable character at position {e.start}") from None
    if not text.strip():
        raise BadRow("empty input", f"column {spec.input!r} holds no text")
    return text, content


def _bytes(value: Any, spec: SourceSpec) -> bytes:
    """The bytes of a picture or sound, as a column of bytes or of `datasets` Image or Audio."""
    if isinstance(value, dict):
        # Only the bytes: a path that a row names is never opened.
        value = value.get("bytes")
    if value is None:
        raise BadRow("null input", f"column {spec.input!r} holds no bytes")
    if not isinstance(value, bytes):
        raise BadRow(
            "wrong type", f"column {spec.input!r}: takes bytes, got {type(value).__name__}"
        )
    if not value:
        raise BadRow("empty input", f"column {spec.input!r} holds no byte")
    return value


def _cast(value: Any, field: pa.Field) -> Any:
    if isinstance(value, bytes) and pa.types.is_string(field.type):
        value = value.decode(errors="replace").strip()
    try:
        if value is not None and pa.types.is_string(field.type) and not isinstance(value, str):
            value = json.dumps(value, default=str)
        return pa.scalar(value, field.type).as_py() if value is not None else None
    except RecursionError:
        raise BadRow("wrong type", f"column {field.name!r}: is nested too deeply") from None
    except (pa.ArrowException, UnicodeError, TypeError, ValueError, OverflowError):
        shown = ascii(value[:80]) if isinstance(value, str | bytes) else reprlib.repr(value)
        raise BadRow("wrong type", f"column {field.name!r}: {shown} is no {field.type}") from None
