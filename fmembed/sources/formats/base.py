"""The contract of a format, and what the formats share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from fmembed.errors import SourceError, reason
from fmembed.redaction import redact
from fmembed.sources.files import TooLargeError, check_regular
from fmembed.sources.source import BadRow, File, Mark, RawRow, Rejection, Shard, Source
from fmembed.sources.types import common_schema
from fmembed.spec import Format as FormatName
from fmembed.spec import Modality, SourceSpec

CHUNK_ROWS = 1000
# A table of this size is handed on, however few its rows: a sound may be a hundred megabytes.
CHUNK_BYTES = 16 * 2**20
READ_BYTES = 2**20
# Values in a line of JSON or a row of CSV: an empty object, two bytes long, takes Python 72.
MAX_VALUES = 4_000_000
_MAX_SAMPLED_FILES, _THREADS = 100, 16
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
        more_suffixes: What other formats' files end with too: looked for where this one is named
            and none ends with its own.
        rows: Yields a file's rows in order, or those of the shard's `start` to `stop` if the format
            is cut; of one that is cut at bytes those between its `marks`. A bad row is yielded as a
            `Rejection` and the next one follows; what raises ends the file, and is recorded as a
            rejected row.
        schema: Names and types of the columns of these files; `over_files` makes one of a
            function that looks at the beginning of one file. None with `open`.
        cut: Cuts a file of this filesystem into shards; None where a file is never cut.
        count: Looks through a shard that is cut at bytes, for `locate`; None where none is.
        locate: Of a file's shards, from one whose first record is known to the last, where the
            records of each begin and end, by what `count` says of each.
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
    cut: Callable[[SourceSpec, Any, File], list[Shard]] | None = None
    count: Callable[[Source, Shard], Any] | None = None
    locate: Callable[[Source, Sequence[Shard], Sequence[Any], Mark], list[Shard]] | None = None
    modality: Modality | None = None
    is_text: Callable[[SourceSpec, pa.Schema], bool] = is_text_column
    open: Callable[[SourceSpec], Opened] | None = None
    markers: tuple[str, ...] = ()
    more_suffixes: tuple[str, ...] = ()


def over_files(
    file_schema: Callable[[Source, File], pa.Schema],
) -> Callable[[Source, Sequence[File]], pa.Schema]:
    """Make of a file's columns those of many files.

    Returns:
        A function that gives the columns of up to 100 files, spread over all: each column that one
        of them has, with a type that holds what all have of it. It raises SourceError where none of
        them is readable. A value that does not fit, in a file that was not looked at, is its own
        row's fate.
    """

    def schema(source: Source, files: Sequence[File]) -> pa.Schema:
        found: list[pa.Schema] = []
        problem = ""

        def look(file: File) -> pa.Schema | str:
            try:
                check_regular(source.fs, file.path)
                return file_schema(source, file)
            except Exception as e:  # what decompressors and parsers raise, by format
                return f"{file.name}: {source.spec.conceal(reason(e))}"

        with ThreadPoolExecutor(_THREADS) as pool:  # over a network most of it is waiting
            for file, seen in zip(looked_at(files), pool.map(look, looked_at(files)), strict=True):
                if isinstance(seen, str):
                    problem = seen
                elif seen.names:
                    found.append(seen)
                else:
                    problem = problem or f"{file.name} has no row"
        if not found:
            where = redact(source.spec.uri)
            raise SourceError(f"source.uri: no readable {source.format} file in {where}: {problem}")
        return common_schema(found)

    return schema


def looked_at(files: Sequence[File]) -> list[File]:
    """The files that tell the columns of all: the first one, and others spread over the rest."""
    step = -(-len(files) // _MAX_SAMPLED_FILES)
    return list(files[:: max(step, 1)])


def too_large(num_bytes: int, source: Source) -> Rejection:
    """Why a row of so many bytes is rejected."""
    most = f"{source.limit} = {source.most_bytes:,}"
    return "row too large", f"{num_bytes:,} bytes, more than {most}"


def without_input(source: Source, row: dict[Any, Any], why: Rejection) -> dict[Any, Any]:
    """A row's id, and instead of the input why it is not embedded."""
    named = {source.spec.id: row.get(source.spec.id)} if source.spec.id else {}
    return {**named, FETCHED: why}


def rejection(error: Exception, source: Source) -> Rejection:
    """Why a row is rejected whose reading raised this."""
    if isinstance(error, TooLargeError):
        return too_large(error.num_bytes, source)
    return error.error if isinstance(error, BadRow) else "unreadable file", reason(error)
