"""Rows as they were read -> canonical rows (`columns.row_schema`): each value is checked and cast.

A bad one makes a rejected row of its own row alone.
"""

from __future__ import annotations

import hashlib
import reprlib
import uuid
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fmembed.rows.carried import hash_carried
from fmembed.rows.columns import (
    CARRIED,
    ERROR,
    HIDES,
    HIDES_ITSELF,
    HIDES_REST,
    MESSAGE,
    SHARD,
    STAGE,
    clean_message,
)
from fmembed.sources.formats.base import FETCHED
from fmembed.sources.source import BadRow, BrokenOff, RawRow, Source
from fmembed.sources.types import keep
from fmembed.spec import SourceSpec

_MAX_ID_BYTES = 4096


def canonical(source: Source, chunk: list[RawRow], shard: int, schema: pa.Schema) -> pa.Table:
    """Turn rows into a table.

    Args:
        source: What they are from.
        chunk: Rows as a format's reader yields them.
        shard: Which of the source's shards they are from.
        schema: `columns.row_schema` of the source.
    """
    spec = source.spec
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for fallback_id, raw in chunk:
        row: dict[str, Any] = {"row_id": fallback_id}
        try:
            if isinstance(raw, tuple):
                raise BadRow(*raw)
            if spec.id is not None:
                row["row_id"] = to_row_id(raw.get(spec.id), spec.id)
            value = raw.get(FETCHED, raw.get(spec.input))
            if FETCHED in raw and isinstance(value, tuple):
                raise BadRow(*value)
            if source.modality == "text":
                row["_input"], content = _text(value, spec)
                raw = {**raw, spec.input: row["_input"]}
            else:
                is_file = source.file_is_row or FETCHED in raw
                what = "its file" if is_file else f"column {spec.input!r}"
                row["_input"] = content = _bytes(value, what)
            for field in source.carried:
                row[field.name] = _kept(raw.get(field.name), field, spec)
            row["content_hash"] = hashlib.blake2b(content, digest_size=16).hexdigest()
        except BadRow as e:
            has_no_id = spec.id is not None and row["row_id"] == fallback_id
            row = {"row_id": row["row_id"], STAGE: "read", ERROR: e.error}
            row[MESSAGE] = clean_message(spec.conceal(e.message))
            if isinstance(raw, BrokenOff):
                row[HIDES] = HIDES_REST
            elif has_no_id:
                row[HIDES] = HIDES_ITSELF
        row[SHARD] = shard
        for name, values in columns.items():
            values.append(row.get(name))
    table = pa.table(
        [pa.array(v, t) for v, t in zip(columns.values(), schema.types, strict=True)], schema=schema
    )
    return _with_hash_of_carried(table, source.carried.names)


def _with_hash_of_carried(rows: pa.Table, names: Sequence[str]) -> pa.Table:
    """Of the good rows."""
    if not names:
        return rows
    is_good = rows[STAGE].is_null()
    hashes = pc.if_else(is_good, hash_carried(rows, names), pa.scalar(None, pa.int64()))
    at = rows.schema.get_field_index(CARRIED)
    return rows.set_column(at, rows.schema.field(at), hashes)


def to_row_id(value: Any, column: str) -> str:
    """An id as the table has it.

    Raises:
        BadRow: It is none.
    """
    if value is None or value == "":
        raise BadRow("null id", f"column {column!r} is empty")
    if isinstance(value, Decimal) and value.is_finite():
        value = f"{value:f}"  # never 1E+2
    if isinstance(value, bool) or not isinstance(value, str | int | uuid.UUID):
        raise BadRow(
            "wrong type",
            f"column {column!r}: takes text, an integer, a decimal or a UUID as id, "
            f"got {type(value).__name__}",
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
        code = ord(e.object[e.start])
        message = f"undecodable character at position {e.start}"
        if 0xDC80 <= code <= 0xDCFF:  # a byte of CSV, handed on as it stands
            message = (
                f"byte {code - 0xDC00:#04x} at position {e.start}; source.csv.encoding names "
                "another encoding, source.encoding_errors: replace or ignore would keep the row"
            )
        raise BadRow("not UTF-8", message) from None
    if not text.strip():
        raise BadRow("empty input", f"column {spec.input!r} holds no text")
    return text, content


def _bytes(value: Any, what: str) -> bytes:
    """The bytes of a picture or sound, as a column of bytes or of `datasets` Image or Audio.

    Args:
        value: As it was read.
        what: Where from, for the reason why it cannot be embedded.
    """
    if isinstance(value, dict):
        # Only the bytes: a path that a row names is never opened.
        value = value.get("bytes")
    if value is None:
        raise BadRow("null input", f"{what} holds no bytes")
    if not isinstance(value, bytes):
        paths = "; of paths, source.root says below which folder" if isinstance(value, str) else ""
        raise BadRow("wrong type", f"{what}: takes bytes, got {type(value).__name__}{paths}")
    if not value:
        raise BadRow("empty input", f"{what} holds no byte")
    return value


def _kept(value: Any, field: pa.Field, spec: SourceSpec) -> Any:
    """A carried value as it was given; in a column of text the text of bytes."""
    name = field.name
    try:
        if isinstance(value, bytes) and pa.types.is_string(field.type):
            value = value.decode(errors=spec.encoding_errors)
        return keep(value, field.type)
    except UnicodeError:
        raise BadRow("not UTF-8", f"column {name!r}") from None
    except RecursionError:
        raise BadRow("wrong type", f"column {name!r}: is nested too deeply") from None
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        shown = ascii(value[:80]) if isinstance(value, str | bytes) else reprlib.repr(value)
        message = f"column {name!r}: {shown} cannot be kept as it is in a column of {field.type}"
        raise BadRow("wrong type", message) from None
