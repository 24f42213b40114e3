"""Files to shards: what one read task reads."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from fmembed.sources.formats.registry import FORMATS
from fmembed.sources.listing import unsigned
from fmembed.sources.source import File, Shard, Source
from fmembed.spec import CsvSpec, Format, SourceSpec

_SHARD_FILES = 512
# Where files are rows: what a read task holds at once.
_FILE_ROWS_BYTES = 16 * 2**20
# With more files than these, small ones share a read task, because each task costs Ray some 20 ms
# whatever it reads; and they are not opened to be cut (a Parquet file, from a local disk: 0.3 ms).
_MANY_FILES = 1000
_GROUP_BYTES = 4 * 2**20
# One file in so many ends its group by its name, so that a new file moves no other group's ends.
_GROUP_FILES = 256
_THREADS = 16


def sample(source: Source, num_rows: int, num_shards: int) -> Source:
    """Some of the source, spread over all of it: the beginnings of shards, `num_rows` in all."""
    step = max(len(source.shards) // num_shards, 1)
    chosen = source.shards[::step][:num_shards]
    per_shard = -(-num_rows // max(len(chosen), 1))
    if source.file_is_row:
        files = [f for shard in source.shards for f in shard.files]
        chosen = (Shard(tuple(files[:: max(len(files) // num_rows, 1)][:num_rows])),)
        per_shard = num_rows
    return replace(source, shards=tuple(replace(s, max_rows=per_shard) for s in chosen))


def uncut(source: Source) -> list[Shard]:
    """The shards, but of a file that is cut at bytes all of it: nobody has located its parts."""
    if FORMATS[source.format].locate is None:
        return list(source.shards)
    by_files = {shard.files: shard for shard in source.shards}
    return [s if s.start is None else Shard(files) for files, s in by_files.items()]


def with_keys(spec: SourceSpec, shards: Iterable[Shard], revision: str = "") -> tuple[Shard, ...]:
    """Name each shard after all that decides which rows it yields.

    Args:
        spec: The source.
        shards: What to name.
        revision: Of a dataset that is no list of files; else each file's own counts.
    """
    # Limits stay out of the key: all they do is reject rows, and rejected rows are on record.
    limits = {"max_text_bytes", "max_media_bytes"}
    settings = spec.model_dump(mode="json", exclude={"label", "split", "carry", "caption", *limits})
    if spec.csv == CsvSpec():  # keys are on record that were made before there was such a setting
        del settings["csv"]
    settings["uri"] = unsigned(spec.uri)
    settings["root"] = unsigned(spec.root) if spec.root else None

    def key(shard: Shard) -> str | None:
        if not all(f.revision for f in shard.files):
            return None
        files = [] if revision else [(f.name, f.size, f.revision) for f in shard.files]
        content = json.dumps([settings, revision, files, shard.start, shard.stop])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    return tuple(replace(shard, key=key(shard)) for shard in shards)


def plan_shards(spec: SourceSpec, name: Format, fs: Any, files: list[File]) -> Iterator[Shard]:
    """Group files that are rows, or many and small; cut the others, as far as the format can."""
    format_ = FORMATS[name]
    if format_.modality is not None:
        for group in _group(files, _FILE_ROWS_BYTES):
            yield Shard(group, num_rows=len(group))
        return
    small: list[File] = []
    if len(files) > _MANY_FILES:
        small = [f for f in files if f.size < _GROUP_BYTES]
        files = [f for f in files if f.size >= _GROUP_BYTES]
    if format_.cut is not None:
        with ThreadPoolExecutor(_THREADS) as pool:
            for shards in pool.map(partial(format_.cut, spec, fs), files):
                yield from shards
    else:
        yield from (Shard((file,)) for file in files)
    yield from (Shard(group) for group in _group(small, _GROUP_BYTES))


def _group(files: Iterable[File], most_bytes: int) -> Iterator[tuple[File, ...]]:
    """Neighbours, up to 512 files or about so many bytes; some files end a group by their name."""
    group: list[File] = []
    num_bytes = 0
    for file in files:
        group.append(file)
        num_bytes += file.size
        is_end = zlib.crc32(file.name.encode(errors="surrogateescape")) % _GROUP_FILES == 0
        if is_end or len(group) == _SHARD_FILES or num_bytes >= most_bytes:
            yield tuple(group)
            group, num_bytes = [], 0
    if group:
        yield tuple(group)
