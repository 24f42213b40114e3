"""Parquet, and rows that stand in Arrow's columns."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fmembed.errors import reason
from fmembed.sources.files import check_regular
from fmembed.sources.formats.base import (
    CHUNK_BYTES,
    CHUNK_ROWS,
    Format,
    over_files,
    rejection,
    too_large,
    without_input,
)
from fmembed.sources.formats.unfolding import (
    BATCH_BYTES,
    CheckedPages,
    PageError,
    dictionary_bytes,
    unfolded_bytes,
)
from fmembed.sources.source import BadRow, File, RawRow, Shard, Source
from fmembed.sources.types import Unreadable
from fmembed.spec import SourceSpec

_SHARD_BYTES = 64 * 2**20
SHARD_ROWS = 50_000
# Rows that are told one by one as lost.
_MAX_LOST_ROWS = 1_000_000


def read_parquet(source: Source, shard: Shard, file: File) -> Iterator[RawRow]:
    wanted = source.spec.wanted
    with source.fs.open(file.path, "rb") as handle:
        footer = pq.read_metadata(handle)
        names = footer.schema.to_arrow_schema().names
        missing = [c for c in (source.spec.input, source.spec.id) if c and c not in names]
        if missing:
            yield file.name, ("unreadable file", f"it has no column {missing[0]!r}")
            return
        twice = [c for c in wanted if names.count(c) > 1]
        if twice:
            yield file.name, ("unreadable file", f"two of its columns are {twice[0]!r}")
            return
        wanted = tuple(c for c in wanted if c in names)  # a carried one it lacks is null
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
                parquet = pq.ParquetFile(checked, metadata=footer, page_checksum_verification=True)
                for batch in parquet.iter_batches(rows, row_groups=[group], columns=wanted):
                    for row in batch_rows(batch, source):
                        yield f"{file.name}#{first + i}", row
                        i += 1
            except (OSError, PageError, pa.ArrowException, BadRow) as e:
                fate = rejection(e, source)
                for lost in range(i, min(num_rows, i + _MAX_LOST_ROWS)):
                    yield f"{file.name}#{first + lost}", fate
            first += num_rows


def parquet_schema(source: Source, file: File) -> pa.Schema:
    with source.fs.open(file.path, "rb") as handle:
        return pq.read_schema(handle)


def cut_row_groups(_: SourceSpec, fs: Any, file: File) -> list[Shard]:
    """Cut a Parquet file at row groups, about 64 MiB or 50,000 rows a shard."""
    try:
        check_regular(fs, file.path)
        with fs.open(file.path, "rb") as handle:
            metadata = pq.read_metadata(handle)
    except (OSError, pa.ArrowException, BadRow):
        return [Shard((file,))]  # the read task finds the same and rejects it with its cause
    shards: list[Shard] = []
    start = first_row = num_rows = num_bytes = 0
    for i in range(metadata.num_row_groups):
        num_rows += metadata.row_group(i).num_rows
        num_bytes += metadata.row_group(i).total_byte_size
        last = i + 1 == metadata.num_row_groups
        if num_rows and (num_rows >= SHARD_ROWS or num_bytes >= _SHARD_BYTES or last):
            size = file.size * num_rows // metadata.num_rows
            shards.append(Shard((file,), start, i + 1, first_row, num_rows, size=size))
            start, first_row, num_rows, num_bytes = i + 1, first_row + num_rows, 0, 0
    return shards


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
        BadRow: Its rows are too large, by what the file itself says; nothing was unfolded.
        PageError: A dictionary's page cannot be read.
    """
    columns = [group.column(i) for i in leaves]
    row_bytes = sum(map(unfolded_bytes, columns)) // max(group.num_rows, 1)
    # Twice, because small values stand in the pages' statistics too; `batch_rows` looks closer.
    if row_bytes > 2 * source.most_bytes:
        raise BadRow(*too_large(row_bytes, source))
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
    return int(min(max(BATCH_BYTES // max(largest, 1), 1), CHUNK_ROWS))


def batch_rows(batch: pa.RecordBatch, source: Source) -> Iterator[dict[Any, Any]]:
    """Rows as Python's values, few at a time where they are large."""
    is_plain = not any(pa.types.is_dictionary(t) or t.num_fields for t in batch.schema.types)
    if is_plain and batch.nbytes <= min(CHUNK_BYTES, source.most_bytes):
        yield from _values(batch)
        return
    sizes = sum((_lengths(column) for column in batch.columns), np.zeros(batch.num_rows, np.int64))
    is_good = sizes <= source.most_bytes
    steps = (np.cumsum(np.where(is_good, sizes, CHUNK_BYTES)) - 1) // CHUNK_BYTES
    cuts = [0, *(np.flatnonzero(np.diff(steps)) + 1).tolist(), batch.num_rows]
    for start, stop in itertools.pairwise(cuts):
        for i in np.flatnonzero(~is_good[start:stop]).tolist():
            # A row that is too large is alone in its piece or first in it; only its id is taken.
            assert i == 0
            ids = [c for c in (source.spec.id,) if c in batch.schema.names]
            (row,) = _values(batch.slice(start, 1).select(ids)) if ids else ({},)
            yield without_input(source, row, too_large(int(sizes[start]), source))
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
    columns = {n: _cells(c) for n, c in zip(batch.schema.names, batch.columns, strict=True)}
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _cells(column: pa.Array) -> list[Any]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        # Bytes that are no UTF-8 in a column of text: each row is judged on its own.
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            return [_cell(value) for value in column]
        large = pa.types.is_large_string(column.type)
        raw = column.cast(pa.large_binary() if large else pa.binary()).to_pylist()
        return [_text(value) for value in raw]
    except (ValueError, OverflowError):  # a year 10,000; nanoseconds, where there is no pandas
        return [_cell(value) for value in column]


def _text(value: bytes | None) -> str | bytes | None:
    try:
        return value if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def _cell(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except (ValueError, OverflowError) as e:  # UnicodeDecodeError is one
        return Unreadable(reason(e))


PARQUET = Format(
    name="parquet",
    suffixes=(".parquet", ".pq"),
    more_suffixes=(".parq",),
    rows=read_parquet,
    schema=over_files(parquet_schema),
    cut=cut_row_groups,
)
