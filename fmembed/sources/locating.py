"""Where the records of a file's parts begin, which only what comes before them tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fmembed.sources.formats.ranges import cut_between
from fmembed.sources.formats.registry import FORMATS
from fmembed.sources.source import Mark, Shard, Source


@dataclass(frozen=True)
class Unlocated:
    """Parts of one file, one after another up to its last one; the first begins at `begin`."""

    parts: tuple[Shard, ...]
    begin: Mark


def is_unlocated(source: Source, shard: Shard) -> bool:
    """Whether a shard is a part of which nobody has looked yet where its records begin."""
    is_part = shard.start is not None and shard.marks is None
    return is_part and FORMATS[source.format].locate is not None


def list_unlocated(
    source: Source, wanted: Sequence[Shard], ends: Mapping[str, Mark]
) -> list[Unlocated]:
    """What has to be looked through for parts that are to be read.

    Args:
        source: All of it.
        wanted: Shards that are to be read.
        ends: Of shards that were read before, by their keys, where their records end.
    """
    first: dict[str, int] = {}
    for shard in wanted:
        if is_unlocated(source, shard):
            path, start = shard.files[0].path, shard.start or 0
            first[path] = min(start, first.get(path, start))
    begins = {path: Mark(0, 0, 0) for path in first}
    froms = dict.fromkeys(first, 0)
    for shard in source.shards:
        path = shard.files[0].path if len(shard.files) == 1 else ""
        stop, end = shard.stop or 0, ends.get(shard.key or "")
        if path not in first or end is None or not froms[path] < stop <= first[path]:
            continue
        # Anybody may have written what is on record.
        if stop <= end.byte <= shard.files[0].size and min(end) >= 0:
            froms[path], begins[path] = stop, end
    parts: dict[str, list[Shard]] = {path: [] for path in first}
    for shard in source.shards:
        path = shard.files[0].path if len(shard.files) == 1 else ""
        if path in first and (shard.start or 0) >= froms[path]:
            parts[path].append(shard)
    return [Unlocated(tuple(parts[path]), begins[path]) for path in first]


def count_part(source: Source, part: Shard) -> Any:
    """Look through one of them."""
    count = FORMATS[source.format].count
    assert count is not None
    return count(source, part)


def locate(source: Source, unlocated: Unlocated, counts: Sequence[Any]) -> list[Shard]:
    """The parts, with where their records begin and end, by what is in each."""
    find = FORMATS[source.format].locate
    assert find is not None
    begin = unlocated.begin
    # A record of before may go over whole parts, and over the rest of the file.
    over = [p for p in unlocated.parts if (p.stop or 0) <= begin.byte]
    located = [replace(p, marks=(begin, begin), first_row=begin.row) for p in over]
    if rest := unlocated.parts[len(over) :]:
        located += find(source, rest, counts[len(over) :], begin)
    return located


def locate_alone(source: Source, shard: Shard) -> Shard:
    """One part, where nobody has looked at the others: what comes before it is looked through."""
    (file,) = shard.files
    assert shard.start is not None
    assert shard.stop is not None
    before, after = cut_between(file, 0, shard.start), cut_between(file, shard.stop, file.size)
    some = Unlocated((*before, shard, *after), Mark(0, 0, 0))
    counts = [count_part(source, part) for part in some.parts]
    return locate(source, some, counts)[len(before)]
