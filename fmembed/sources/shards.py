"""Files to shards: what one read task reads."""

from __future__ import annotations

import functools
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import Any

from fmembed.sources.file_list import FileList
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
        step = max(sum(len(shard.files) for shard in source.shards) // num_rows, 1)
        files = chain.from_iterable(shard.files for shard in source.shards)
        chosen = (Shard(tuple(islice(files, 0, num_rows * step, step))),)
        per_shard = num_rows
    return replace(source, shards=tuple(replace(s, max_rows=per_shard) for s in chosen))


def uncut(source: Source) -> list[Shard]:
    """The shards, but of a file that is cut at bytes all of it: nobody has located its parts."""
    if FORMATS[source.format].locate is None:
        return list(source.shards)
    whole = {s.files[0].path: Shard(s.files) for s in source.shards if s.start is not None}
    return [*(s for s in source.shards if s.start is None), *whole.values()]


def with_keys(
    spec: SourceSpec, shards: Iterable[Shard], revision: str = "", fs: Any = None
) -> tuple[Shard, ...]:
    """Name each shard after all that decides which rows it yields.

    Args:
        spec: The source.
        shards: What to name.
        revision: Of a dataset that is no list of files; else each file's own counts.
        fs: Where the files are of data that a program has given: their bytes count, as they lie
            elsewhere in each run.
    """
    # Limits stay out of the key: all they do is reject rows, and rejected rows are on record.
    limits = {"max_text_bytes", "max_media_bytes"}
    settings = spec.model_dump(mode="json", exclude={"label", "split", "carry", "caption", *limits})
    if spec.csv == CsvSpec():  # keys are on record that were made before there was such a setting
        del settings["csv"]
    settings["uri"] = "" if spec.is_given else unsigned(spec.uri)
    settings["root"] = unsigned(spec.root) if spec.root else None

    @functools.cache
    def digest(path: str) -> str:
        with fs.open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()

    def revision_of(file: File) -> str:
        return digest(file.path) if spec.is_given and fs is not None else file.revision

    def key(shard: Shard) -> str | None:
        if not all(f.revision for f in shard.files):
            return None
        files = [] if revision else [(f.name, f.size, revision_of(f)) for f in shard.files]
        content = json.dumps([settings, revision, files, shard.start, shard.stop])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    return tuple(replace(shard, key=key(shard)) for shard in shards)


def plan_shards(spec: SourceSpec, name: Format, fs: Any, files: Sequence[File]) -> Iterator[Shard]:
    """Group files that are rows, or many and small; cut the others, as far as the format can."""
    format_ = FORMATS[name]
    if format_.modality is not None:
        for shard in _group(files, _FILE_ROWS_BYTES):
            yield replace(shard, num_rows=len(shard.files))
        return
    least = _GROUP_BYTES if len(files) > _MANY_FILES else 0
    large = (f for f in files if f.size >= least)
    if format_.cut is not None:
        with ThreadPoolExecutor(_THREADS) as pool:
            for shards in pool.map(partial(format_.cut, spec, fs), large):
                yield from shards
    else:
        yield from (Shard((file,)) for file in large)
    yield from _group((f for f in files if f.size < least), _GROUP_BYTES)


def _group(files: Iterable[File], most_bytes: int) -> Iterator[Shard]:
    """Shards of neighbours: 512 files, or about so many bytes; some files end one by their name."""
    group: list[File] = []
    num_bytes = 0
    for file in files:
        group.append(file)
        num_bytes += file.size
        is_end = zlib.crc32(file.name.encode(errors="surrogateescape")) % _GROUP_FILES == 0
        if is_end or len(group) == _SHARD_FILES or num_bytes >= most_bytes:
            yield Shard(FileList(group), size=num_bytes)
            group, num_bytes = [], 0
    if group:
        yield Shard(FileList(group), size=num_bytes)
