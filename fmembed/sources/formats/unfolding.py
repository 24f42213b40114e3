"""What Parquet and Arrow files say of their content, looked at before it is unfolded.

Readers plan by a Parquet file's footer; Arrow takes memory by what each page's own header says. A
small file whose footer lies would take gigabytes (65 kB took 4.2 GiB), so that the two are
compared. An Arrow file is mapped as it stands; compressed buffers would be unfolded all at once.

Sources: `PageHeader` of the Parquet format, in Thrift's compact protocol; `Message` of the Arrow
format, in FlatBuffers. No library here hands out either.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

# What rows may unfold to at a time, and what a column chunk may whatever its footer says: writers
# are known that count its bytes wrongly.
BATCH_BYTES = 32 * 2**20
# Enough for the header of a dictionary's page, which has no statistics.
_HEADER_BYTES = 64
_MAX_DEPTH = 8
# Bytes of a value, by type; other types are as long as the footer says.
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
# Fields of PageHeader: what it unfolds to, its bytes, and the data headers (1 and 2), of which the
# first field is the number of values.
_UNFOLDED, _STORED, _DATA = 2, 3, (5, 8)
# Fields of Arrow's Message, DictionaryBatch and RecordBatch.
_MESSAGE_HEADER, _DICTIONARY_DATA, _BATCH_COMPRESSION = 2, 1, 3


class PageError(ValueError):
    """Pages that are not as their footer says; the message names the column."""


class CheckedPages(io.RawIOBase):
    """A Parquet file for Arrow to read; each column chunk is compared with the footer as it comes.

    Args:
        handle: The file, open in binary.
        group: The row group that will be read.
        leaves: The numbers of the columns that will be read.
    """

    def __init__(self, handle: Any, group: pq.RowGroupMetaData, leaves: Sequence[int]) -> None:
        self._handle = handle
        self._chunks = [group.column(i) for i in leaves]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._handle.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return int(self._handle.seek(offset, whence))

    def read(self, size: int = -1, /) -> bytes:
        """Bytes from where the file stands: Arrow asks for whole column chunks, or several.

        Raises:
            PageError: The pages of one say other sizes or numbers of values than the footer.
        """
        start = self.tell()
        content = bytes(self._handle.read(size))
        for chunk in self._chunks:
            at = _start(chunk) - start
            if 0 <= at < len(content):
                _check(content[at : at + chunk.total_compressed_size], chunk)
        return content


def unfolded_bytes(chunk: pq.ColumnChunkMetaData) -> int:
    """Bytes of a column chunk's values, by its footer.

    Numbers may be many more than their bytes: a million times the same is written in ten.
    """
    width = _WIDTHS.get(chunk.physical_type, 0)
    return max(int(chunk.total_uncompressed_size), int(chunk.num_values) * width)


def dictionary_bytes(handle: Any, chunk: pq.ColumnChunkMetaData) -> int:
    """Bytes of a column chunk's dictionary, by the header of its page."""
    handle.seek(chunk.dictionary_page_offset)
    header, _ = _page(bytes(handle.read(_HEADER_BYTES)), 0, chunk)
    return int(header.get(_UNFOLDED, 0))


def has_compressed_buffers(path: str) -> bool:
    """Whether an Arrow file, in the streaming format, holds buffers that are compressed.

    Raises:
        pyarrow.ArrowException: It is no such file, or cut.
        ValueError: A message's header cannot be read.
    """
    with pa.memory_map(path) as file:
        for message in pa.ipc.MessageReader.open_stream(file):
            if message.type not in ("record batch", "dictionary"):
                continue
            header = memoryview(message.metadata)
            try:
                batch = _field(header, _offset(header, 0), _MESSAGE_HEADER)
                if batch and message.type == "dictionary":
                    batch = _field(header, batch + _offset(header, batch), _DICTIONARY_DATA)
                if batch and _field(header, batch + _offset(header, batch), _BATCH_COMPRESSION):
                    return True
            except struct.error:
                raise ValueError("a message's header cannot be read") from None
    return False


def _field(header: memoryview, table: int, number: int) -> int:
    """Where a FlatBuffers table's field lies, or 0 if it has none."""
    fields = table - struct.unpack_from("<i", header, table)[0]
    at = 4 + 2 * number
    if at >= struct.unpack_from("<H", header, fields)[0]:
        return 0
    offset: int = struct.unpack_from("<H", header, fields + at)[0]
    return table + offset if offset else 0


def _offset(header: memoryview, at: int) -> int:
    offset: int = struct.unpack_from("<I", header, at)[0]
    return offset


def _start(chunk: pq.ColumnChunkMetaData) -> int:
    # As Arrow has it: a dictionary that is said to lie behind the data is none.
    offset, dictionary = chunk.data_page_offset, chunk.dictionary_page_offset
    return int(dictionary if chunk.has_dictionary_page and 0 < dictionary < offset else offset)


def _check(content: bytes, chunk: pq.ColumnChunkMetaData) -> None:
    most = max(2 * unfolded_bytes(chunk), BATCH_BYTES)
    at = num_bytes = num_values = 0
    # Only as far as Arrow reads: what comes after that is not unfolded.
    while num_values < chunk.num_values and at < len(content):
        header, at = _page(content, at, chunk)
        at += max(header.get(_STORED, 0), 0)
        num_bytes += max(header.get(_UNFOLDED, 0), 0)
        num_values += sum(max(data.get(1, 0), 0) for data in _data(header))
        if num_bytes > most or num_values > chunk.num_values:
            raise PageError(
                f"column {chunk.path_in_schema!r}: its pages say {num_bytes:,} bytes and "
                f"{num_values:,} values, its footer {chunk.total_uncompressed_size:,} and "
                f"{chunk.num_values:,}"
            )


def _page(content: bytes, at: int, chunk: pq.ColumnChunkMetaData) -> tuple[dict[int, Any], int]:
    """Header of the page at this place, and where what it describes begins."""
    try:
        header, after = _struct(content, at, 0)
    except (IndexError, ValueError):
        header, after = {_STORED: None}, at
    numbers = [header.get(_STORED, 0), header.get(_UNFOLDED, 0)]
    # Of what a spoiled byte makes another kind of value of.
    numbers += [data.get(1, 0) if isinstance(data, dict) else None for data in _data(header)]
    if not all(isinstance(number, int) for number in numbers):
        raise PageError(f"column {chunk.path_in_schema!r}: a page's header cannot be read")
    return header, after


def _data(header: dict[int, Any]) -> list[Any]:
    """What a header says of a page of values, if it is one."""
    return [header[field] for field in _DATA if field in header]


def _struct(content: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """Fields by their number: whole numbers, structs; of others nothing is kept."""
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    fields: dict[int, Any] = {}
    number = 0
    while (head := content[at]) != 0:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            value, at = _varint(content, at)
            number = (value >> 1) ^ -(value & 1)
        fields[number], at = _value(content, at, head & 15, depth)
    return fields, at + 1


def _value(content: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (1, 2):  # a truth value, in the field's own byte
        return None, at
    if kind == 3:
        return None, at + 1
    if kind in (4, 5, 6):
        value, at = _varint(content, at)
        return (value >> 1) ^ -(value & 1), at
    if kind == 7:
        return None, at + 8
    if kind == 8:
        length, at = _varint(content, at)
        return None, at + length
    if kind == 12:
        return _struct(content, at, depth + 1)
    raise ValueError(f"a page's header has no value of kind {kind}")


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of too many bytes")
