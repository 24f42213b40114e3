"""The keys of a table's rows, in files beside its parts: by them a run knows what is done.

    <table>/_keys/<run>-<number>.parquet    those of one commit, or of one bucket of all

A row takes 40 bytes: `id` and `content`, the blake2b-128 of its id and of its raw input (zeros
where nothing was read), and `carried`, 64 bits of that of its carried values (0 where there is
none, or it is not known); and, as places in two lists of the file's metadata, its `part` and the
`shard` of the source that it was read from (-1 where that is not known). Rows are sorted by id, in
row groups of which each has all ids with the same first bits.

A file is no truth of its own, the log is: a key counts while the newest version has its part. Keys
of parts that no file tells of are read from the parts, so all of them may be deleted.
"""

from __future__ import annotations

import re
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, model_validator

from fmembed.errors import DamagedError, StorageError, reason
from fmembed.rows.ids import Hashes, Keys, RowIds, first_halves, keys_of, to_arrow, to_keys
from fmembed.storage import HALF_WRITTEN, Storage
from fmembed.table.card import PREFIX
from fmembed.table.files import PART, REJECTED

FOLDER = "_keys/"
# Whether a row is embedded; rejected; rejected as one whose id another row has, which is no reason
# to take the id for known: that other row may be in the table no longer; or rejected in place of
# all the rest of a file.
Kind = Literal["embedded", "rejected", "twin", "rest"]
KINDS: tuple[Kind, ...] = ("embedded", "rejected", "twin", "rest")
_CONTENT = f"{PREFIX}keys"
_SCHEMA = pa.schema(
    [
        pa.field("id", pa.binary(16), nullable=False),
        pa.field("content", pa.binary(16), nullable=False),
        pa.field("carried", pa.int64(), nullable=False),
        pa.field("part", pa.int32(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
    ]
)
# What a file's name is made of by a run; others in the folder are somebody's.
_NAME = re.compile(rf"{FOLDER}[0-9a-f]+-[\w-]+\.parquet")
# Of a row group: what a bucket reads of a file is a whole number of these. 5 MB.
_GROUP_ROWS = 2**17
_MAX_BUCKETS = 2**20
_INTS = npt.NDArray[np.int32]


class _PartKeys(BaseModel):
    path: str
    kind: Kind
    rows: int


class _Content(BaseModel):
    """See `KeyFile`; files of earlier versions have parts and shards only."""

    parts: list[_PartKeys]
    shards: list[str] = []
    counts: list[tuple[int, int, int]] = []
    set: str = ""
    version: int = -1
    bucket: tuple[int, int] = (0, 1)
    total: int = -1
    staged: str = ""

    @model_validator(mode="after")
    def _check_places(self) -> _Content:
        """That no flipped bit makes of it what is nowhere."""
        bucket, num_buckets = self.bucket
        if not 0 <= bucket < num_buckets <= _MAX_BUCKETS or num_buckets & (num_buckets - 1):
            raise ValueError("no such bucket")
        for part, shard, rows in self.counts:
            is_there = 0 <= part < len(self.parts) and -1 <= shard < len(self.shards)
            if not is_there or rows < 1:
                raise ValueError("counts of no part or shard")
        # These are deleted in the end.
        if self.staged and not all(
            PART.fullmatch(part.path.removeprefix(REJECTED)) for part in self.parts
        ):
            raise ValueError("staged is what no run has written")
        return self


@dataclass(frozen=True)
class KeyRows:
    """Keys of some rows, in any order; shapes (rows,).

    `kinds` are places in `KINDS`, `shards` numbers of the source's shards, -1 where not known;
    `places` those of their parts in the list of the file that they were read from.
    """

    ids: Keys
    contents: Keys
    carried: Hashes
    kinds: npt.NDArray[np.int8]
    shards: _INTS
    places: _INTS

    @classmethod
    def of(
        cls,
        ids: Keys,
        contents: Keys | None = None,
        carried: Hashes | None = None,
        kinds: npt.NDArray[np.int8] | None = None,
        shards: _INTS | None = None,
        places: _INTS | None = None,
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


@dataclass(frozen=True)
class KeyFile:
    """A file of keys, by its metadata.

    `counts` are rows by the places of part and shard, -1 for none. A file is one commit's, or, with
    a `version`, one of a `set` that tells of all rows of that version: those of its `bucket`, which
    and of how many; `total` are the rows of all buckets. `staged` is the fingerprint of parts that
    are not committed, else empty.
    """

    path: str
    parts: tuple[_PartKeys, ...]
    shards: tuple[str, ...]
    counts: tuple[tuple[int, int, int], ...] = ()
    set: str = ""
    version: int = -1
    bucket: tuple[int, int] = (0, 1)
    total: int = -1
    staged: str = ""

    @property
    def teller(self) -> str:
        """What tells of its parts: the file, or all files of its set together."""
        return f"{self.version} {self.set}" if self.set else self.path

    @property
    def rows_by_part(self) -> Counter[str]:
        """Rows of each part, by its path."""
        counts = Counter[str]()
        for part in self.parts:
            counts[part.path] += part.rows
        return counts


class KeyFiles:
    """The files of keys of one table."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def list(self) -> tuple[list[KeyFile], list[str]]:
        """All files, by their metadata; and the paths of those that cannot be opened."""
        found, damaged = [], []
        for path in self._storage.paths(FOLDER):
            if not path.endswith(".parquet"):
                continue
            try:
                found.append(self._open(path))
            except DamagedError:
                damaged.append(path)
        return found, damaged

    def _open(self, path: str) -> KeyFile:
        with self._reading(path), self._storage.open(path) as handle:
            metadata = pq.read_metadata(handle).metadata or {}
            content = _Content.model_validate_json(metadata.get(_CONTENT.encode(), b""))
        return KeyFile(
            path, tuple(content.parts), tuple(content.shards), tuple(content.counts),
            content.set, content.version, content.bucket, content.total, content.staged,
        )  # fmt: skip

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        """Whatever a flipped bit makes of a file's footer, libraries raise."""
        try:
            yield
        except (StorageError, DamagedError):
            raise
        except Exception as e:
            raise DamagedError(self._storage.uri, f"{path}: not readable: {reason(e)}") from None

    def read(self, file: KeyFile) -> Iterator[KeyRows]:
        """The rows of one file, a bucket at a time; their shards are places in its list.

        Raises:
            DamagedError: It is not as it was written.
        """
        kinds = np.array([KINDS.index(part.kind) for part in file.parts], dtype=np.int8)
        counts = np.zeros(len(file.parts), dtype=np.int64)
        with self._reading(file.path), self._storage.open(file.path) as handle:
            parquet = pq.ParquetFile(handle, page_checksum_verification=True)
            if not parquet.schema_arrow.remove_metadata().equals(_SCHEMA):
                raise ValueError("other columns")
            for i in range(parquet.num_row_groups):
                rows = _read_group(parquet, i, kinds)
                # Raises where a place is none.
                counts += np.bincount(rows.places, minlength=len(counts))
                yield rows
            if counts.tolist() != [part.rows for part in file.parts]:
                raise ValueError("it holds other numbers of rows than it says")

    def read_bucket(self, file: KeyFile, bucket: int, num_buckets: int) -> KeyRows:
        """The rows of one file whose ids are in a bucket, of a power of two; as `read` gives them.

        Raises:
            DamagedError: It is not as it was written.
        """
        kinds = np.array([KINDS.index(part.kind) for part in file.parts], dtype=np.int8)
        low, high = bucket_bounds(bucket, num_buckets)
        found = []
        with self._reading(file.path), self._storage.open(file.path) as handle:
            parquet = pq.ParquetFile(handle, page_checksum_verification=True)
            if not parquet.schema_arrow.remove_metadata().equals(_SCHEMA):
                raise ValueError("other columns")
            for i in range(parquet.num_row_groups):
                told = parquet.metadata.row_group(i).column(0).statistics
                if told is not None and told.has_min_max:
                    least, most = (int.from_bytes(b[:8], "big") for b in (told.min, told.max))
                    if most < low or least > high:
                        continue
                rows = _read_group(parquet, i, kinds)
                first = first_halves(rows.ids)
                start = int(np.searchsorted(first, np.uint64(low)))
                stop = int(np.searchsorted(first, np.uint64(high), side="right"))
                found.append(rows[slice(start, stop)])
        return KeyRows.join(found)

    def embedded(self, paths: Sequence[str]) -> Iterator[Keys]:
        """Ids of the embedded rows in some files, a bucket at a time.

        Raises:
            DamagedError: One is gone, or not as it was written.
        """
        for path in paths:
            for rows in self.read(self._open(path)):
                yield rows.embedded

    def write(
        self,
        name: str,
        writes: Sequence[tuple[KeyRows, Mapping[Kind, str]]],
        shards: Mapping[int, str | None],
        staged: str = "",
    ) -> str | None:
        """Write the keys of some parts as one file; its path, None where they hold no row.

        Args:
            name: How it is called; each try has a name of its own.
            writes: Keys of some rows, and by their kind the part that holds them.
            shards: Key of each shard by its number; None where it has none.
            staged: The table's fingerprint, where the parts are not about to be committed.
        """
        parts: list[_PartKeys] = []
        chosen: list[KeyRows] = []
        shard_keys = sorted({key for key in shards.values() if key is not None})
        places = {key: i for i, key in enumerate(shard_keys)}
        place_of = np.full(max(shards, default=-1) + 2, -1, dtype=np.int32)
        for index, key in shards.items():
            place_of[index] = -1 if key is None else places[key]
        for rows, held_by in writes:
            for kind, part in held_by.items():
                some = rows[rows.kinds == KINDS.index(kind)]
                if len(some):
                    # The last place stands for -1, a shard that is not known.
                    of_shards = place_of[np.minimum(some.shards, len(place_of) - 1)]
                    at = np.full(len(some), len(parts), dtype=np.int32)
                    chosen.append(replace(some, shards=of_shards, places=at))
                    parts.append(_PartKeys(path=part, kind=kind, rows=len(some)))
        if not parts:
            return None
        content = _Content(parts=parts, shards=shard_keys, staged=staged)
        return self._put(name, KeyRows.join(chosen), content)

    def write_set(
        self,
        name: str,
        rows: KeyRows,
        parts: Sequence[str],
        shards: Sequence[str | None],
        version: int,
        bucket: tuple[int, int],
        total: int,
    ) -> str | None:
        """Write the keys of one bucket of a version; the path of the file, None without a row.

        Args:
            name: Of the set.
            rows: The keys; places of parts, and shards, are those in the next two.
            parts: Paths of parts.
            shards: Keys of shards; None where one has none.
            version: Of the table that has all these parts.
            bucket: Which, and of how many.
            total: Rows of all buckets, by which it is seen that a file of the set is missing.
        """
        if not len(rows):
            return None
        kinds, of_part = np.unique(
            rows.places.astype(np.int64) * len(KINDS) + rows.kinds, return_inverse=True
        )
        num_rows = np.bincount(of_part)
        told = [
            _PartKeys(path=parts[at // len(KINDS)], kind=KINDS[at % len(KINDS)], rows=n)
            for at, n in zip(kinds.tolist(), num_rows.tolist(), strict=True)
        ]
        used, of_shard = np.unique(rows.shards, return_inverse=True)
        keys = [shards[at] if at >= 0 else None for at in used.tolist()]
        named = sorted({key for key in keys if key is not None})
        places = {key: i for i, key in enumerate(named)}
        place_of = np.array([-1 if k is None else places[k] for k in keys], dtype=np.int32)
        rows = replace(rows, places=of_part.astype(np.int32), shards=place_of[of_shard])
        content = _Content(
            parts=told, shards=named, set=name, version=version, bucket=bucket, total=total
        )
        return self._put(f"{name}-{bucket[0]:04d}", rows, content)

    def _put(self, name: str, rows: KeyRows, content: _Content) -> str:
        pairs = np.stack([rows.places, rows.shards], axis=1)
        both, num_rows = np.unique(pairs, axis=0, return_counts=True)
        counts = [(*pair, n) for pair, n in zip(both.tolist(), num_rows.tolist(), strict=True)]
        content = content.model_copy(update={"counts": counts})
        path = f"{FOLDER}{name}-{uuid.uuid4().hex[:8]}.parquet"
        self._storage.put(path, _to_parquet(rows, content))
        return path

    def keep_only(self, paths: Iterable[str]) -> None:
        """Delete the other files of keys of this project's: a set tells what they told."""
        kept = set(paths)
        for path in self._storage.paths(FOLDER):
            if _NAME.fullmatch(path) and path not in kept:
                self._storage.delete(path)

    def clean_up(self, exists: Iterable[str], damaged: Sequence[str]) -> None:
        """Delete the files of which no part is there any more, and what a killed run has left half
        written; put damaged ones aside. Only under the lock.
        """
        there = set(exists)
        for file in self.list()[0]:  # of what is staged too
            if _NAME.fullmatch(file.path) and not any(p.path in there for p in file.parts):
                self._storage.delete(file.path)
        for path in damaged:
            if _NAME.fullmatch(path):
                self._storage.move(path, f"_quarantine/{path}")
        if local := self._storage.local:
            for half in (local / FOLDER).glob("*.tmp"):
                if _NAME.fullmatch(HALF_WRITTEN.sub("", f"{FOLDER}{half.name}")):
                    self._storage.delete(f"{FOLDER}{half.name}")


def bucket_bounds(bucket: int, num_buckets: int) -> tuple[int, int]:
    """The least and the greatest first half of the ids in a bucket, of a power of two."""
    width = 2**64 // num_buckets
    return bucket * width, (bucket + 1) * width - 1


def is_in_bucket(ids: Keys, bucket: int, num_buckets: int) -> npt.NDArray[np.bool_]:
    """Which ids are in a bucket, shape (rows,)."""
    low, high = bucket_bounds(bucket, num_buckets)
    first = first_halves(ids)
    return (first >= np.uint64(low)) & (first <= np.uint64(high))


def _read_group(parquet: pq.ParquetFile, at: int, kinds: npt.NDArray[np.int8]) -> KeyRows:
    table = parquet.read_row_group(at)
    places, shards = table["part"].to_numpy(), table["shard"].to_numpy()
    ids, contents = to_keys(table["id"]), to_keys(table["content"])
    carried = table["carried"].to_numpy()
    return KeyRows(ids, contents, carried, kinds[places], shards, places)


def _to_parquet(rows: KeyRows, content: _Content) -> memoryview:
    first = first_halves(rows.ids)
    order = np.argsort(first)
    first, rows = first[order], rows[order]
    ids, contents = to_arrow(rows.ids), to_arrow(rows.contents)
    table = pa.table(
        [ids, contents, rows.carried, rows.places, rows.shards],
        schema=_SCHEMA.with_metadata({_CONTENT: content.model_dump_json()}),
    )
    sink = pa.BufferOutputStream()
    num_bits = max((len(rows) - 1) // _GROUP_ROWS, 0).bit_length()
    ends = [
        int(np.searchsorted(first, np.uint64(i) << np.uint64(64 - num_bits)))
        for i in range(1, 2**num_bits)
    ]
    with pq.ParquetWriter(
        sink, table.schema, compression="none", use_dictionary=["part", "shard"],
        write_statistics=["id"], write_page_checksum=True,
    ) as writer:  # fmt: skip
        for start, stop in zip([0, *ends], [*ends, len(rows)], strict=True):
            writer.write_table(
                table.slice(start, stop - start), row_group_size=max(stop - start, 1)
            )
    return memoryview(sink.getvalue()).cast("B")


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
