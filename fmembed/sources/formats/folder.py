"""A folder of files, each a row."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import Any

from fmembed.sources.files import read_whole
from fmembed.sources.source import File, RawRow, Shard, Source


def read_folder(source: Source, _: Shard, file: File) -> Iterator[RawRow]:
    content = read_whole(source.fs, file.path, source.most_bytes, file.size)
    row: dict[str, Any] = {source.spec.input: content}
    if source.spec.label:
        row[source.spec.label] = posixpath.basename(posixpath.dirname(file.name)) or None
    yield file.name, row
