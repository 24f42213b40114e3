"""What of a source is left to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from fmembed.rows.ids import RowIds, keys_of
from fmembed.sources.shards import plan_shards
from fmembed.sources.source import Source

if TYPE_CHECKING:
    pass


def skip_committed(
    source: Source, committed: RowIds, whole_shards: Mapping[str, int]
) -> tuple[Source, int]:
    """Drop what needs no second reading, before anything is read.

    Args:
        source: What `open_source` found.
        committed: Ids of committed and rejected rows; where a file is a row its name is its id.
        whole_shards: Key to rows of the shards that are committed whole.

    Returns:
        The source without them, and the number of rows left out.
    """
    if source.file_is_row:
        if not len(committed):
            return source, 0
        files = [f for shard in source.shards for f in shard.files]
        done = committed.contains(keys_of(f.name for f in files))
        left = [f for f, is_done in zip(files, done, strict=True) if not is_done]
        shards = tuple(plan_shards(source.format, source.fs, left))
        return replace(source, shards=shards), int(done.sum())
    rows = [whole_shards.get(shard.key or "") for shard in source.shards]
    shards = tuple(s for s, n in zip(source.shards, rows, strict=True) if n is None)
    return replace(source, shards=shards), sum(n for n in rows if n is not None)
