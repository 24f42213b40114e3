"""The contract of a format, and what the formats share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from fmembed.errors import SourceError, reason
from fmembed.redaction import redact
from fmembed.sources.files import TooLargeError, check_regular
from fmembed.sources.source import BadRow, File, RawRow, Rejection, Shard, Source
from fmembed.spec import Format as FormatName
from fmembed.spec import Modality, SourceSpec

CHUNK_ROWS = 1000
# A table of this size is handed on, however few its rows: a sound may be a hundred megabytes.
CHUNK_BYTES = 16 * 2**20
READ_BYTES = 2**20
# Values in a line of JSON or a row of CSV: an empty object, two bytes long, takes Python 72.
MAX_VALUES = 4_000_000
# Leaves and levels of a carried column's type; what has more is kept as JSON.
_MAX_LEAVES, _MAX_LEVELS = 1000, 16
_MAX_SAMPLED_FILES = 100
# Where a row holds its fetched file's content, or a `Rejection`, beside the path it was found by.
FETCHED: Any = object()


@dataclass(frozen=True)
class Opened:
    """A dataset that was found.

    `shards` may be planned as they are asked for. `revision` changes with the content of a dataset
    that is not a list of files; else each file has its own.
    """

    spec: SourceSpec
    schema: pa.Schema
    shards: Iterable[Shard]
    revision: str = ""


def is_text_column(spec: SourceSpec, schema: pa.Schema) -> bool:
    """Whether the input column's type is text, as against bytes of a picture or sound."""
    type_ = schema.field(spec.input).type
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_))


@dataclass(frozen=True)
class Format:
    """All that the rest of `sources` knows of a format.

    Attributes:
        name: The word for it in `source.format`.
        suffixes: What its files' names end with, in lower case; none where it is not told by them.
        rows: Yields a file's rows in order, or those of the shard's `start` to `stop` if the format
            is cut. A bad row is yielded as a `Rejection` and the next one follows; what raises ends
            the file, and is recorded as a rejected row.
        schema: Names and types of the columns of these files; `by_first_file` makes one
            of a function that looks at the beginning of one file. None with `open`.
        cut: Cuts a file of this filesystem into shards; None where a file is never cut.
        modality: Set where each file is one row, of this modality.
        is_text: Whether the input is text, asked if the model takes text and pictures or sounds.
        open: For a dataset that a library finds and reads, instead of a list of files. Its shards
            have one file, which stands for the dataset.
        markers: Names of files that show a folder to be such a dataset.
    """

    name: FormatName
    suffixes: tuple[str, ...]
    rows: Callable[[Source, Shard, File], Iterator[RawRow]]
    schema: Callable[[Source, Sequence[File]], pa.Schema] | None = None
    cut: Callable[[Any, File], list[Shard]] | None = None
    modality: Modality | None = None
    is_text: Callable[[SourceSpec, pa.Schema], bool] = is_text_column
    open: Callable[[SourceSpec], Opened] | None = None
    markers: tuple[str, ...] = ()


def by_first_file(
    file_schema: Callable[[Source, File], pa.Schema],
) -> Callable[[Source, Sequence[File]], pa.Schema]:
    """Make of a file's columns those of many files.

    Returns:
        A function that gives the columns of the first file that has all that is named; of the first
        readable one where none has, so that a message can say what there is. It raises SourceError
        where none of the first 100 is readable.
    """

    def schema(source: Source, files: Sequence[File]) -> pa.Schema:
        named = set(source.spec.wanted)
        first: pa.Schema | None = None
        problem = ""
        for file in files[:_MAX_SAMPLED_FILES]:
            try:
                check_regular(source.fs, file.path)
                found = file_schema(source, file)
            except Exception as e:  # what decompressors and parsers raise, by format
                problem = f"{file.name}: {source.spec.conceal(reason(e))}"
                continue
            if named <= set(found.names):
                return found
            first = found if first is None else first
            problem = problem or f"{file.name} has no row"
        if first is None or not first.names:
            where = redact(source.spec.uri)
            raise SourceError(f"source.uri: no readable {source.format} file in {where}: {problem}")
        return first

    return schema


def too_large(num_bytes: int, source: Source) -> Rejection:
    """Why a row of so many bytes is rejected."""
    most = f"{source.limit} = {source.most_bytes:,}"
    return "row too large", f"{num_bytes:,} bytes, more than {most}"


def too_large_row(source: Source, row: dict[Any, Any], num_bytes: int) -> dict[Any, Any]:
    """Its id, and instead of the input why it is not embedded."""
    named = {source.spec.id: row.get(source.spec.id)} if source.spec.id else {}
    return {**named, FETCHED: too_large(num_bytes, source)}


def rejection(error: Exception, source: Source) -> Rejection:
    """Why a row is rejected whose reading raised this."""
    if isinstance(error, TooLargeError):
        return too_large(error.num_bytes, source)
    return error.error if isinstance(error, BadRow) else "unreadable file", reason(error)


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
