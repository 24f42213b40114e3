"""What all formats share: a row's fate, and where a format's errors go."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from fmembed.errors import reason
from fmembed.sources.files import RefusedError
from fmembed.sources.source import Source

CHUNK_ROWS = 1000
# A table of this size is handed on, however few its rows: a sound may be a hundred megabytes.
CHUNK_BYTES = 16 * 2**20
SAMPLE_ROWS = 10_000
SAMPLE_BYTES = 32 * 2**20
READ_BYTES = 2**20
# Of a line: Python holds an empty object of two bytes in 72.
MAX_VALUES = 4_000_000
# Leaves and levels of a carried column's type; what has more is kept as JSON.
_MAX_LEAVES, _MAX_LEVELS = 1000, 16
# Where a fetched file's content stands in its row, beside the path it was found by.
FETCHED: Any = object()


def too_large_row(source: Source, row: dict[Any, Any], num_bytes: int) -> dict[Any, Any]:
    """Its id, and instead of the input why it is not embedded."""
    named = {source.spec.id: row.get(source.spec.id)} if source.spec.id else {}
    return {**named, FETCHED: too_large(num_bytes, source)}


class BadRow(Exception):  # noqa: N818 - a row's fate, not a failure of the run
    def __init__(self, error: str, message: str) -> None:
        super().__init__(message)
        self.error, self.message = error, message


def too_large(num_bytes: int, source: Source) -> BadRow:
    return BadRow(
        "row too large",
        f"{num_bytes:,} bytes, more than {source.limit} = {source.most_bytes:,}",
    )


def unreadable_row(error: Exception) -> tuple[str, str]:
    cause = error.cause if isinstance(error, RefusedError) else "unreadable file"
    return cause, reason(error)


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
