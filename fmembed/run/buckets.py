"""What a refresh does a bucket of ids at a time: in tasks, of which the driver holds references.

A bucket is the ids that begin with the same bits. A task holds one, whatever the table's size; the
driver holds sums by part and shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fmembed.rows.columns import CONTENT_HASH
from fmembed.rows.found import BAD, COPY, DONE, EMBED, GOOD, KEPT, REJECT, REST, FoundRows
from fmembed.rows.ids import Keys, RowIds, contents_of, keys_of
from fmembed.run.apart import read_apart
from fmembed.sources.picks import ChosenRows
from fmembed.sources.reading import read_shard
from fmembed.sources.scan import scan_shard
from fmembed.sources.source import Shard, Source
from fmembed.storage import Storage
from fmembed.table.diff import Rules, compare
from fmembed.table.key_rows import KINDS, KeyCounts, KeyRows, is_in_bucket
from fmembed.table.keys import KeyFile, KeyFiles
from fmembed.table.known import KnownRows

# Rows of a bucket, of which a task takes some 250 bytes each while it compares them.
_BUCKET_ROWS, _MOST_BUCKETS = 2**20, 2**12
_EMBEDDED, _REJECTED, _, _REST = range(len(KINDS))


def count_buckets(num_rows: int) -> int:
    """How many buckets so many rows are compared in: a power of two."""
    return min(1 << (max(num_rows - 1, 0) // _BUCKET_ROWS).bit_length(), _MOST_BUCKETS)


@dataclass(frozen=True)
class Bucket:
    """What all tasks of one comparison are told.

    Args:
        known: What the table knows, staged rows too.
        num_buckets: How many there are.
        shards: Numbers of the source's shards by their keys.
        num_shards: How many there are, those without a key too.
        unread: Those whose rows are known from the table, and not read.
        rules: What may leave.
    """

    known: KnownRows
    num_buckets: int
    shards: Mapping[str, int]
    num_shards: int
    unread: frozenset[int]
    rules: Rules


@dataclass(frozen=True)
class Summary:
    """What a comparison of one bucket, or of several, has counted.

    `counts` are those of `diff.Compared`; `rows` and `live` are rows by part, all and those that
    stay, shape (parts,), and `replaced` those that stay only until another one of their id is
    stored; `found` rows by shard, shape (shards,). `to_read` are shards that were not read, and
    have a row of which more is to be done.
    """

    counts: Mapping[str, int]
    rows: npt.NDArray[np.int64]
    live: npt.NDArray[np.int64]
    replaced: npt.NDArray[np.int64]
    found: npt.NDArray[np.int64]
    to_read: frozenset[int]


def add_up(*summaries: Summary) -> Summary:
    """What was counted of all of some buckets; there is at least one."""
    counts = Counter[str]()
    for summary in summaries:
        counts.update(summary.counts)
    rows, live, replaced, found = (
        np.sum([getattr(s, name) for s in summaries], axis=0)
        for name in ("rows", "live", "replaced", "found")
    )
    to_read = frozenset[int]().union(*(s.to_read for s in summaries))
    return Summary(counts, rows, live, replaced, found, to_read)


def scan(
    source: Source, shards: Sequence[tuple[int, Shard]], num_buckets: int, apart: bool
) -> tuple[int | FoundRows, ...]:
    """Read shards whole; how many rows they have, and these, a piece for each bucket."""
    read = read_apart if apart else read_shard
    found = FoundRows.join([scan_shard(source, shard, i, read) for i, shard in shards])
    pieces = (found[is_in_bucket(found.ids, i, num_buckets)] for i in range(num_buckets))
    return len(found), *pieces


def plan_bucket(given: Bucket, bucket: int, *found: FoundRows) -> tuple[Summary, ChosenRows]:
    """Compare one bucket, to see what is to be done.

    Returns:
        Its summary, and the rows of which something is to be done.
    """
    _, rows, fates, summary = _compare(given, bucket, found)
    is_todo = ~np.isin(fates, (DONE, KEPT))
    return summary, ChosenRows(rows[is_todo], fates[is_todo])


def plan_new(given: Bucket, bucket: int, *found: FoundRows) -> tuple[Summary, ChosenRows]:
    """As `plan_bucket`, for a run that only adds rows: of ids that the table has neither embedded
    nor rejected, unless as another row's.
    """
    (stored, _), rows, fates, summary = _compare(given, bucket, found)
    is_known = np.isin(stored.kinds, (_EMBEDDED, _REJECTED, _REST))
    is_old = (stored.places < len(given.known.parts)) & is_known
    is_new = ~np.isin(fates, (DONE, KEPT)) & ~RowIds(stored.ids[is_old]).contains(rows.ids)
    return summary, ChosenRows(rows[is_new], fates[is_new])


def settle_bucket(
    given: Bucket, bucket: int, *found: FoundRows
) -> tuple[Summary, KeyRows, KeyRows]:
    """Compare one bucket once all is done, to see what the new version is made of.

    Returns:
        Its summary; the rows that stay or come in; and the others.
    """
    (rows, live), _, _, summary = _compare(given, bucket, found)
    return summary, rows[live], rows[~live]


def _compare(
    given: Bucket, bucket: int, found: Sequence[FoundRows]
) -> tuple[tuple[KeyRows, npt.NDArray[np.bool_]], FoundRows, npt.NDArray[np.int8], Summary]:
    stored = given.known.read_bucket(bucket, given.num_buckets, given.shards)
    paths = given.known.paths
    is_old = stored.places < len(given.known.parts)
    is_unread = is_old & np.isin(stored.shards, np.array(sorted(given.unread), dtype=np.int32))
    rows = FoundRows.join([_as_found(stored[is_unread]), *found])
    # As if neither had what was deleted; but what stands for rows that nobody knows is a warning.
    out = given.known.deleted()
    is_out = out.covers(rows.ids, rows.contents) & np.isin(rows.states, (GOOD, BAD))
    rows = rows[~is_out]
    rows = rows[np.lexsort((rows.places, rows.shards))]
    stays = ~(out.covers(stored.ids, stored.contents) & (stored.kinds != _REST))
    compared = compare(rows, stored[stays], is_old[stays], given.rules)
    live, stands_for = np.zeros(len(stored), dtype=np.bool_), np.full(len(stored), -1)
    live[stays], stands_for[stays] = compared.live, compared.stands_for
    stored = _as_now(stored, rows, stands_for)
    is_left = (rows.places < 0) & ~np.isin(compared.fates, (DONE, KEPT))
    is_again = np.isin(compared.fates, (EMBED, COPY, REJECT))
    is_replaced = is_old & live & RowIds(rows.ids[is_again]).contains(stored.ids)
    summary = Summary(
        counts=compared.counts,
        rows=np.bincount(stored.places, minlength=len(paths)),
        live=np.bincount(stored.places[live], minlength=len(paths)),
        replaced=np.bincount(stored.places[is_replaced], minlength=len(paths)),
        found=np.bincount(rows.shards, minlength=given.num_shards),
        to_read=frozenset(np.unique(rows.shards[is_left]).tolist()),
    )
    return (stored, live), rows, compared.fates, summary


def _as_now(stored: KeyRows, found: FoundRows, stands_for: npt.NDArray[np.int64]) -> KeyRows:
    """Stored rows, with what the source says by now of those that it has.

    A twin may stand for another row than the one it was rejected for, and of a row that keys were
    made anew of from a part, less is known than was found.
    """
    if not len(found):
        return replace(stored, shards=np.full(len(stored), -1, dtype=np.int32))
    is_found = stands_for >= 0
    at = np.maximum(stands_for, 0)

    def now(new: Any, old: Any) -> Any:
        return np.where(is_found, new[at], old).astype(old.dtype)

    is_rest = is_found & (found.states[at] == REST) & (stored.kinds == _REJECTED)
    return replace(
        stored,
        contents=now(found.contents, stored.contents),
        carried=now(found.carried, stored.carried),
        kinds=np.where(is_rest, _REST, stored.kinds).astype(np.int8),
        shards=now(found.shards, np.full(len(stored), -1, dtype=np.int32)),
    )


def _as_found(rows: KeyRows) -> FoundRows:
    """What a source has, by what the table has of the shards that were not read."""
    is_bad = np.isin(rows.kinds, (_REJECTED, _REST)) & (rows.contents == b"")
    states = np.where(rows.kinds == _REST, REST, np.where(is_bad, BAD, GOOD)).astype(np.int8)
    places = np.full(len(rows), -1, dtype=np.int64)
    return FoundRows(rows.ids, rows.contents, rows.carried, states, rows.shards, places)


def find_holders(given: Bucket, bucket: int, contents: Keys) -> KeyRows:
    """Of the rows of one bucket, staged ones too, those that are of some contents: one of each."""
    rows = given.known.read_bucket(bucket, given.num_buckets, {})
    is_kind = np.isin(rows.kinds, (_EMBEDDED, _REJECTED))
    rows = rows[is_kind & RowIds(contents).contains(rows.contents)]
    rows = rows[np.argsort(rows.kinds, kind="stable")]
    return rows[np.unique(rows.contents, return_index=True)[1]]


def list_wanted(*chosen: ChosenRows) -> Keys:
    """The contents of the rows that are to be embedded, each once."""
    contents = [some.rows.contents[some.fates == EMBED] for some in chosen]
    return np.unique(np.concatenate([keys_of([]), *contents]))


def list_contents(*copies: pa.Table) -> Keys:
    """The contents of rows that take their vectors from others, each once."""
    contents = [contents_of(rows[CONTENT_HASH].to_pylist()) for rows in copies]
    return np.unique(np.concatenate([keys_of([]), *contents]))


def choose(num_buckets: int, num_old: int, *given: Any) -> tuple[ChosenRows, list[int], bool, Keys]:
    """Of all rows that are to be embedded, which the model sees: of each content the first one.

    Args:
        num_buckets: How many buckets there are.
        num_old: How many parts the version has; those of places behind them are staged.
        given: By bucket the rows of which something is to be done; then, by bucket too, rows that
            have a vector of one of their contents by now.

    Returns:
        The rows with their last fates; the numbers of the shards that they are in; whether the
        model is to see any; and the contents of which only what is staged has a vector.
    """
    chosen: Sequence[ChosenRows] = given[:num_buckets]
    holders: Sequence[KeyRows] = given[num_buckets:]
    rows = FoundRows.join([some.rows for some in chosen])
    fates = np.concatenate([np.empty(0, dtype=np.int8), *(some.fates for some in chosen)])
    some = ChosenRows.of(rows, fates)
    rows, fates = some.rows, some.fates.copy()
    new = np.flatnonzero(fates == EMBED)
    held = [h.contents[h.kinds == _EMBEDDED] for h in holders]
    contents = rows.contents[new]
    has_vector = RowIds(np.concatenate([keys_of([]), *held])).contains(contents)
    is_first = np.zeros(len(new), dtype=np.bool_)
    is_first[np.unique(contents, return_index=True)[1]] = True
    fates[new[has_vector | ~is_first]] = COPY
    numbers, sees_model = np.unique(rows.shards).tolist(), bool((fates == EMBED).any())
    every = KeyRows.join(holders)
    is_staged = every.places >= num_old
    is_only = ~RowIds(every.contents[~is_staged]).contains(every.contents)
    only_staged: Keys = every.contents[is_staged & is_only]
    return ChosenRows(rows, fates), numbers, sees_model, only_staged


@dataclass(frozen=True)
class Drawn:
    """What is to be done, and some of the rows that the model is to see.

    `fates` counts the rows of each fate, `num_fanned_out` those to copy whose content the model is
    to see of another row, or has seen of one that is staged; `shards` are the numbers of the shards
    that they are in. `times` says how often each shard was drawn whose rows were, None where rows
    were drawn from all.
    """

    sample: ChosenRows
    fates: Mapping[int, int]
    num_fanned_out: int
    shards: Sequence[int]
    times: Mapping[int, int] | None


def draw(num_rows: int, num_shards: int, staged: Keys, *chosen: ChosenRows) -> Drawn:
    """Draw from the rows that the model is to see; the same ones of the same rows.

    Args:
        num_rows: How many at most.
        num_shards: From how many shards of the source at most, as each is read for them.
        staged: Contents of which only what is staged has a vector.
        chosen: All rows of which something is to be done.
    """
    rows = FoundRows.join([some.rows for some in chosen])
    fates = np.concatenate([np.empty(0, dtype=np.int8), *(some.fates for some in chosen)])
    every = ChosenRows.of(rows, fates)
    rows, fates = every.rows, every.fates
    at = np.flatnonzero(fates == EMBED)
    new = np.concatenate([rows.contents[at], staged])
    is_seen = RowIds(new).contains(rows.contents[fates == COPY])
    draws = np.random.default_rng(0)
    shards, sizes = np.unique(rows.shards[at], return_counts=True)
    times: dict[int, int] | None = None
    if len(shards) > num_shards:
        # Each with the likelihood of its size: the mean of their means is that of all rows.
        some = draws.choice(shards, num_shards, p=sizes / sizes.sum())
        times = Counter(some.tolist())
        at = np.concatenate([
            draws.permutation(at[rows.shards[at] == shard])[: n * num_rows // num_shards]
            for shard, n in times.items()
        ])  # fmt: skip
    at = np.sort(draws.permutation(at)[:num_rows])
    return Drawn(
        sample=ChosenRows(rows[at], fates[at]),
        fates=Counter(fates.tolist()),
        num_fanned_out=int(is_seen.sum()),
        shards=np.unique(rows.shards).tolist(),
        times=times,
    )


def join(*rows: KeyRows) -> KeyRows:
    """Of all buckets."""
    return KeyRows.join(rows)


def list_dead(places: Mapping[int, str], *dead: KeyRows) -> dict[str, tuple[Keys, Any]]:
    """Of some parts the ids of the rows that are gone, and their kinds.

    Args:
        places: Paths of the parts, by their numbers.
        dead: Rows that are gone, by bucket, in the order of their parts' numbers.
    """
    found = {}
    for place, path in places.items():
        # Slices, so that of what other parts have lost nothing is copied.
        ends = [np.searchsorted(rows.places, [place, place + 1]) for rows in dead]
        own = [rows[start:stop] for rows, (start, stop) in zip(dead, ends, strict=True)]
        some = KeyRows.join(own)
        if len(some):
            found[path] = (some.ids, some.kinds)
    return found


def write_keys(
    uri: str,
    name: str,
    bucket: int,
    num_buckets: int,
    rows: KeyRows,
    part_of: npt.NDArray[np.int32],
    shard_of: npt.NDArray[np.int32],
) -> tuple[KeyFile, KeyCounts]:
    """Write the keys of one bucket of a new version; the file, and what is in it.

    Args:
        uri: The table.
        name: Of the set of files.
        bucket: Which.
        num_buckets: Of how many.
        rows: Its rows; their places are those of the parts that they were in.
        part_of: By such a place the number of the part that they are in now.
        shard_of: By the number of a shard its place in the set's list; last that of -1.
    """
    moved = replace(rows, places=part_of[rows.places], shards=shard_of[rows.shards])
    file = KeyFiles(Storage(uri)).write_bucket(name, moved, bucket, num_buckets)
    return file, KeyCounts.of(moved)


def add_up_keys(*counts: KeyCounts) -> KeyCounts:
    """What is in all files of some."""
    return KeyCounts.join(*counts)
