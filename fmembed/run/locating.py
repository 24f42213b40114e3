"""The parts of large files located, by a task for each part that has to be looked through."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
import ray.exceptions

from fmembed.run.work import Work
from fmembed.sources import locating
from fmembed.sources.locating import Unlocated
from fmembed.sources.source import Mark, Shard, Source
from fmembed.storage import tell
from fmembed.table.table import Table

_MAX_RETRIES = 3
# What takes a core ten seconds to look through.
_LONG_BYTES = 4 * 2**30


def locate(source: Source, wanted: Sequence[Shard], ends: Mapping[str, Mark]) -> tuple[Shard, ...]:
    """Shards that are to be read, with where the records begin of those that are parts of a file.

    Args:
        source: All of it.
        wanted: The shards.
        ends: Of shards that were read before, by their keys, where their records end.
    """
    described = source.without_shards
    count = ray.remote(max_retries=_MAX_RETRIES)(locating.count_part)
    find = ray.remote(max_retries=_MAX_RETRIES)(_locate)
    refs = [
        find.remote(described, some, *(count.remote(described, part) for part in some.parts))
        for some in locating.list_unlocated(source, wanted, ends)
    ]
    found: dict[tuple[str, int | None], Shard] = {}
    for ref in refs:
        # A file that cannot be read is rejected with its cause by the tasks that read it.
        with contextlib.suppress(ray.exceptions.RayTaskError):
            found |= {(shard.files[0].path, shard.start): shard for shard in ray.get(ref)}

    def located(shard: Shard) -> Shard:
        other = found.get((shard.files[0].path, shard.start)) if shard.files else None
        if other is None or not locating.is_unlocated(source, shard):
            return shard
        return replace(shard, marks=other.marks, first_row=other.first_row)

    return tuple(map(located, wanted)) if found else tuple(wanted)


def locate_work(work: Work, source: Source, table: Table) -> Work:
    """What is left to do, with its shards located.

    Args:
        work: As it was found.
        source: All of it.
        table: Has on record where shards end that were read before.
    """
    some = [shard for shard in work.source.shards if locating.is_unlocated(source, shard)]
    if not some:
        return work
    num_bytes = sum(shard.num_bytes for shard in some)
    if num_bytes >= _LONG_BYTES:
        tell(f"looking where records begin in {num_bytes / 2**30:,.1f} GiB of large files, once")
    shards = locate(source, work.source.shards, ends_on_record(table))
    return replace(work, source=replace(work.source, shards=shards))


def ends_on_record(table: Table) -> dict[str, Mark]:
    """Where shards end that were read before, by their keys."""
    return {key: Mark(*end) for key, end in table.shard_ends().items()}


def _locate(source: Source, unlocated: Unlocated, *counts: Any) -> list[Shard]:
    return locating.locate(source, unlocated, counts)
