"""What of a source is left to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from fmembed.inputs import Inputs
from fmembed.sources.picks import Pick
from fmembed.sources.source import Source
from fmembed.table.known import KnownRows


@dataclass(frozen=True)
class Work:
    """What no version of the table holds; true where there is any.

    Args:
        source: With the shards that are left to read.
        known: The committed and rejected rows.
        num_skipped: Rows of the shards that need no second reading.
        picks: Makes what readers hand on of the shard with a number; what is not known, where
            nothing is said.
        apart: Whether rows are read and prepared in processes apart, because among them there may
            be some that end theirs.
        sees_model: Whether any row may be for the model: else they are copies, or are rejected.
    """

    source: Source
    known: KnownRows
    num_skipped: int
    picks: Callable[[int], Pick] | None = None
    apart: bool = False
    sees_model: bool = True

    def __bool__(self) -> bool:
        return bool(self.source.shards)


def find_work(inputs: Inputs) -> Work:
    """Compare the source with what the table's logs and records say by now."""
    known = inputs.table.known()
    left, num_skipped = skip_committed(inputs.source, inputs.table.whole_shards(known))
    return Work(left, known, num_skipped)


def passed_over(inputs: Inputs, num_unread: int) -> dict[str, int]:
    """What is not read, by reason: among it the files of rows whose lists are as they were, which
    may be others by now.
    """
    counts = dict(inputs.source.passed_over)
    if num_deleted := len(inputs.table.deleted.read()):
        counts["rows that fmembed delete has removed, where they are still there"] = num_deleted
    if inputs.source.root is not None and num_unread:
        counts["files below source.root, as the lists that name them are unchanged"] = num_unread
    return counts


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


def unread_shards(source: Source, known: KnownRows, recorded: Mapping[str, int]) -> set[int]:
    """The numbers of the shards whose rows are known one by one without reading them.

    Args:
        source: What `open_source` found.
        known: What the table knows.
        recorded: Key to rows of each shard that some run has seen whole.
    """
    counts = known.count_by_shard()
    keys = ((i, shard.key or "") for i, shard in enumerate(source.shards))
    return {i for i, key in keys if key in recorded and counts[key] == recorded[key]}


def is_in_step(inputs: Inputs) -> int | None:
    """How many rows the source has, where the table holds them and no others; None where that
    cannot be seen without reading.
    """
    table, source = inputs.table, inputs.source
    if table.card() is None or table.staged() or table.deleted.is_pending:
        return None
    known, recorded = table.known(), table.recorded_shards()
    if known.missing or len(unread_shards(source, known, recorded)) < len(source.shards):
        return None
    num_rows = sum(recorded[s.key] for s in source.shards if s.key is not None)
    return num_rows if known.num_rows == num_rows else None
