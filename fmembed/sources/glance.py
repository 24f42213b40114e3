"""A first look at a dataset of which nothing is known yet: its format, columns, some rows."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from fmembed.errors import SourceError, reason
from fmembed.sources.formats.folder import has_class_folders
from fmembed.sources.formats.registry import FORMATS
from fmembed.sources.opening import find_columns
from fmembed.sources.source import Shard, Source
from fmembed.spec import Format, Modality, SourceSpec

_ROWS, _FILES = 1000, 10


@dataclass(frozen=True)
class Glance:
    """What is seen: `rows` are some of the first ones, a dict of columns each; of files that are
    rows there are none, and `modality` says what they hold. `num_files` and `num_bytes` are of all;
    `has_classes` says that the files lie in folders of classes.
    """

    format: Format
    columns: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]
    modality: Modality | None
    num_files: int
    num_bytes: int
    has_classes: bool


def glance(uri: str, format_name: Format = "auto") -> Glance:
    """Look at a dataset.

    Args:
        uri: As `source.uri`.
        format_name: As `source.format`.

    Raises:
        SourceError: There is none, or none of whose rows can be read.
    """
    source, names = find_columns(SourceSpec(uri=uri, format=format_name))
    num_files = sum(len(shard.files) for shard in source.shards)
    format_ = FORMATS[source.format]
    rows: list[dict[str, Any]] = []
    problem = ""
    if format_.modality is None and names:
        wanted = {"input": names[0], "carry": tuple(names[1:])}
        source = replace(source, spec=source.spec.model_copy(update=wanted))
        for _, row in _read(source):
            if isinstance(row, dict):
                rows.append({name: _plain(row.get(name)) for name in names})
            else:
                problem = problem or row[1]
        if not rows:
            raise SourceError(f"source.uri: no row of {source.spec.stored_name} is read: {problem}")
    return Glance(
        format=source.format,
        columns=tuple(names) if format_.modality is None else (),
        rows=tuple(rows),
        modality=format_.modality,
        num_files=num_files,
        num_bytes=source.num_bytes,
        has_classes=source.file_is_row and has_class_folders(source),
    )


def _read(source: Source) -> Any:
    """The first rows of the first files; of a file that is cut its first part alone."""
    first = {shard.files[0].path: shard for shard in reversed(source.shards)}
    shards = itertools.islice(reversed(first.values()), _FILES)
    rows = itertools.chain.from_iterable(_read_shard(source, shard) for shard in shards)
    return itertools.islice(rows, _ROWS)


def _read_shard(source: Source, shard: Shard) -> Any:
    try:
        for file in shard.files:
            yield from FORMATS[source.format].rows(source, shard, file)
    except Exception as e:  # as `reading` says: by format
        yield "", ("unreadable file", reason(e))


def _plain(value: Any) -> Any:
    """A value of Python's; bytes of a text as text."""
    value = value.as_py() if isinstance(value, pa.Scalar) else value
    if not isinstance(value, bytes) or b"\0" in value:
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value
