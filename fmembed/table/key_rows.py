"""The keys of rows: of which id and content each is, and where. Their files are in `keys`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fmembed.rows.ids import Hashes, Keys, RowIds, first_halves, keys_of

# Whether a row is embedded; rejected; rejected as one whose id another row has, which is no reason
# to take the id for known: that other row may be in the table no longer; or rejected in place of
# all the rest of a file.
Kind = Literal["embedded", "rejected", "twin", "rest"]
KINDS: tuple[Kind, ...] = ("embedded", "rejected", "twin", "rest")
KIND_BITS = 2
Numbers = npt.NDArray[np.int32]


@dataclass(frozen=True)
class KeyRows:
    """Keys of some rows, in any order; shapes (rows,).

    `kinds` are places in `KINDS`, `shards` numbers of the source's shards, -1 where not known;
    `places` those of their parts in the list of the set that they were read from.
    """

    ids: Keys
    contents: Keys
    carried: Hashes
    kinds: npt.NDArray[np.int8]
    shards: Numbers
    places: Numbers

    @classmethod
    def of(
        cls,
        ids: Keys,
        contents: Keys | None = None,
        carried: Hashes | None = None,
        kinds: npt.NDArray[np.int8] | None = None,
        shards: Numbers | None = None,
        places: Numbers | None = None,
    ) -> KeyRows:
        """Keys of embedded rows, if nothing else is said, of which nothing else is known."""
        n = len(ids)
        return cls(
            ids,
            np.zeros(n, dtype="S16") if contents is None else contents,
            np.zeros(n, dtype=np.int64) if carried is None else carried,
            np.zeros(n, dtype=np.int8) if kinds is None else kinds,
            np.full(n, -1, dtype=np.int32) if shards is None else shards,
            np.full(n, -1, dtype=np.int32) if places is None else places,
        )

    @classmethod
    def join(cls, some: Sequence[KeyRows]) -> KeyRows:
        """One after another."""
        rows = [cls.of(keys_of([])), *some]
        return cls(*(np.concatenate([getattr(r, f.name) for r in rows]) for f in fields(cls)))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, which: npt.NDArray[Any] | slice) -> KeyRows:
        """Those rows."""
        return KeyRows(*(getattr(self, f.name)[which] for f in fields(self)))

    @property
    def embedded(self) -> Keys:
        """Ids of the rows that are embedded."""
        ids: Keys = self.ids[self.kinds == 0]
        return ids


class KeyCounts(NamedTuple):
    """Rows by part, kind and shard; both of shape (pairs,): what they are of, as one number, and
    how many.
    """

    pairs: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]

    @classmethod
    def of(cls, rows: KeyRows) -> KeyCounts:
        """Of some rows, by their places and shards."""
        pairs = (places_of(rows).astype(np.int64) << 32) | (rows.shards.astype(np.int64) + 1)
        return cls(*np.unique(pairs, return_counts=True))

    @classmethod
    def join(cls, *some: KeyCounts) -> KeyCounts:
        """All together."""
        pairs, at = np.unique(np.concatenate([c.pairs for c in some]), return_inverse=True)
        return cls(pairs, np.bincount(at, np.concatenate([c.rows for c in some])).astype(np.int64))

    def by_part(self, num_parts: int) -> list[tuple[int, int, int, int]]:
        """Rows of each part by their kinds."""
        held = np.bincount(self.pairs >> 32, self.rows, minlength=num_parts * len(KINDS))
        return [(a, b, c, d) for a, b, c, d in held.astype(np.int64).reshape(-1, 4).tolist()]

    def by_part_and_shard(self) -> list[tuple[int, int, int]]:
        """Part, shard and rows."""
        pairs = (self.pairs >> 32 + KIND_BITS << 32) | (self.pairs & 0xFFFFFFFF)
        both, at = np.unique(pairs, return_inverse=True)
        rows = np.bincount(at, self.rows).astype(np.int64)
        columns = ((both >> 32).tolist(), ((both & 0xFFFFFFFF) - 1).tolist(), rows.tolist())
        return list(zip(*columns, strict=True))


def bucket_bounds(bucket: int, num_buckets: int) -> tuple[int, int]:
    """The least and the greatest first half of the ids in a bucket, of a power of two."""
    width = 2**64 // num_buckets
    return bucket * width, (bucket + 1) * width - 1


def is_in_bucket(ids: Keys, bucket: int, num_buckets: int) -> npt.NDArray[np.bool_]:
    """Which ids are in a bucket, shape (rows,)."""
    low, high = bucket_bounds(bucket, num_buckets)
    first = first_halves(ids)
    return (first >= np.uint64(low)) & (first <= np.uint64(high))


def places_of_shards(shards: Mapping[int, str | None], places: Mapping[str, int]) -> Numbers:
    """By a shard's number the place of its key; the last is that of -1, a shard that is not known.

    Args:
        shards: Key of each shard by its number; None where it has none.
        places: Those of keys in a list.
    """
    place_of = np.full(max(shards, default=-1) + 2, -1, dtype=np.int32)
    for number, key in shards.items():
        place_of[number] = -1 if key is None else places[key]
    return place_of


def places_of(rows: KeyRows) -> Numbers:
    """Place of the part and kind, as the column `part` has them."""
    return (rows.places << KIND_BITS) | rows.kinds


def find_twins(committed: Iterable[Keys], given: Sequence[KeyRows]) -> dict[int, frozenset[bytes]]:
    """Which embedded rows have an id that another one has, of those that are about to be committed.

    Memory is that of the given rows and one bucket.

    Args:
        committed: Ids of the embedded rows that are committed, in pieces.
        given: Keys of the rows of each write, in order.

    Returns:
        By the number of a write the ids that an earlier write has, or a committed row.
    """
    writes = [rows.embedded for rows in given]
    twins: dict[int, set[bytes]] = {}
    everything = np.concatenate([keys_of([]), *writes])
    first = first_halves(everything)
    order = np.argsort(first)
    is_same = first[order][1:] == first[order][:-1]
    if is_same.any():
        suspects = np.unique(np.concatenate([order[:-1][is_same], order[1:][is_same]]))
        owner = np.repeat(np.arange(len(writes)), [len(ids) for ids in writes])
        seen: set[bytes] = set()
        for at in suspects.tolist():  # in the order of the writes
            key = bytes(everything[at])
            if key in seen:
                twins.setdefault(int(owner[at]), set()).add(key)
            seen.add(key)
    new = RowIds(everything)
    found = RowIds(np.concatenate([keys_of([]), *(ids[new.contains(ids)] for ids in committed)]))
    for i, ids in enumerate(writes if len(found) else ()):
        if some := ids[found.contains(ids)].tolist():
            twins.setdefault(i, set()).update(some)
    return {i: frozenset(keys) for i, keys in twins.items()}
