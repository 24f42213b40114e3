"""What of a source is left to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fmembed.inputs import Inputs
from fmembed.sources.source import Source
from fmembed.table.known import KnownRows


@dataclass(frozen=True)
class Work:
    """What no version of the table holds; true where there is any.

    Args:
        source: With the shards that are left to read.
        known: The committed and rejected rows, which readers leave out.
        num_skipped: Rows of the shards that need no second reading.
        apart: Whether rows are read and prepared in processes apart, because among them there may
            be some that end theirs.
    """

    source: Source
    known: KnownRows
    num_skipped: int
    apart: bool = False

    def __bool__(self) -> bool:
        return bool(self.source.shards)


def find_work(inputs: Inputs) -> Work:
    """Compare the source with what the table's logs and records say by now."""
    known = inputs.table.known()
    left, num_skipped = skip_committed(inputs.source, inputs.table.whole_shards())
    return Work(left, known, num_skipped)


def skip_committed(source: Source, whole_shards: Mapping[str, int]) -> tuple[Source, int]:
    """Drop what needs no second reading, before anything is read.

    Args:
        source: What `open_source` found.
        whole_shards: Key to rows of the shards that are committed whole.

    Returns:
        The source without them, and the number of rows left out.
    """
    rows = [whole_shards.get(shard.key or "") for shard in source.shards]
    shards = tuple(s for s, n in zip(source.shards, rows, strict=True) if n is None)
    return replace(source, shards=shards), sum(n for n in rows if n is not None)
