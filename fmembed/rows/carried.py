"""By what it is seen that a row's label, or another value that it carries, is another by now."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime
from datetime import time as dt_time
from typing import Any

import pyarrow as pa


def hash_carried(rows: pa.Table, names: Sequence[str]) -> pa.Array:
    """64 bits of the hash of what each row carries, shape (rows,), int64; null without a column.

    Of the values as they are stored, in words that no version of a library changes. 64 bits: they
    are compared with those of the same row alone.

    Args:
        rows: Rows with the columns.
        names: The columns, in the order of the table's.
    """
    if not names:
        return pa.nulls(rows.num_rows, pa.int64())
    values = zip(*(rows[name] for name in names), strict=True)
    return pa.array([_hash(row) for row in values], pa.int64())


def _hash(values: Iterable[pa.Scalar]) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for value in values:
        if isinstance(value, pa.BinaryScalar) and value.is_valid:  # not copied, as it may be large
            kind = b"text" if isinstance(value, pa.StringScalar) else b"bytes"
            content = value.as_buffer()
        else:
            kind, content = b"json", json.dumps(value.as_py(), default=_in_words).encode()
        digest.update(kind + len(content).to_bytes(8, "little"))
        digest.update(content)
    return int.from_bytes(digest.digest(), "little", signed=True)


def _in_words(value: Any) -> Any:
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, datetime):
        value = value.astimezone(UTC) if value.tzinfo else value
    if isinstance(value, date | datetime | dt_time):
        return value.isoformat()
    return str(value)  # decimals, durations, UUIDs
