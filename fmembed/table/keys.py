"""The keys of a table's rows, in files beside its parts: by them a run knows what is done.

    <table>/_keys/<run>-<number>-<random>.parquet          those of one commit
    <table>/_keys/<run>-<random>.json                      an index: of all rows of a version, which
    <table>/_keys/<run>-bucket-<number>-<random>.parquet   are in these files, by their first bits

A row takes 40 bytes: `id` and `content`, the blake2b-128 of its id and of its raw input (zeros
where nothing was read), and `carried`, 64 bits of that of its carried values (0 where there is
none, or it is not known); and, as places in two lists, its `part`, with the row's kind as the last
two bits, and the `shard` of the source that it was read from (-1 where that is not known). The
lists stand in the file's metadata, or in the index. Rows are sorted by id, in row groups of which
each has all ids with the same first bits.

A file is no truth of its own, the log is: a key counts while the newest version has its part. Keys
of parts that no file tells of are read from the parts, so all of them may be deleted.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, model_validator

from fmembed.errors import DamagedError, StorageError, reason
from fmembed.rows.ids import Keys, first_halves, to_arrow, to_keys
from fmembed.storage import HALF_WRITTEN, Storage
from fmembed.table.card import PREFIX
from fmembed.table.files import PART, REJECTED
from fmembed.table.key_rows import (
    KIND_BITS,
    KINDS,
    KeyCounts,
    KeyRows,
    Kind,
    bucket_bounds,
    places_of,
    places_of_shards,
)

FOLDER = "_keys/"
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
_INDEX = re.compile(rf"{FOLDER}[0-9a-f]+-[0-9a-f]{{8}}\.json")
_BUCKET = re.compile(rf"{FOLDER}[0-9a-f]+-bucket-\d{{4,7}}-[0-9a-f]{{8}}\.parquet")
_NAME = re.compile(rf"{FOLDER}[0-9a-f]+-[\w-]*[0-9a-f]{{8}}\.parquet|{_INDEX.pattern}")
# Of a row group: what a bucket reads of a file is a whole number of these. 5 MB.
_GROUP_ROWS = 2**17
_MAX_BUCKETS = 2**20


class KeyFile(NamedTuple):
    """A file: which bucket of ids it holds, and of how many; and how many rows."""

    path: str
    bucket: tuple[int, int]
    rows: int


class PartKeys(NamedTuple):
    """A part, and its rows by their kinds."""

    path: str
    rows: tuple[int, int, int, int]


class _Content(BaseModel):
    """See `KeySet`."""

    model_config = ConfigDict(extra="forbid")

    parts: list[PartKeys]
    shards: list[str]
    counts: list[tuple[int, int, int]]
    staged: str = ""
    version: int = -1
    files: list[KeyFile] = []

    @model_validator(mode="after")
    def _check_places(self) -> _Content:
        """That no flipped bit makes of it what is nowhere."""
        for part, shard, rows in self.counts:
            is_there = 0 <= part < len(self.parts) and -1 <= shard < len(self.shards)
            if not is_there or rows < 1:
                raise ValueError("counts of no part or shard")
        # These are deleted in the end.
        if not all(_BUCKET.fullmatch(file.path) for file in self.files):
            raise ValueError("a file that is no bucket's")
        buckets = sorted(file.bucket for file in self.files)
        if buckets != [(i, len(buckets)) for i in range(len(buckets))]:
            raise ValueError("a bucket that is missing, or there twice")
        if len(buckets) > _MAX_BUCKETS or len(buckets) & (len(buckets) - 1):
            raise ValueError("no power of two")
        sums = [sum(rows for _, _, rows in self.counts), sum(sum(p.rows) for p in self.parts)]
        sums += [sum(file.rows for file in self.files)] if self.files else []
        if len(set(sums)) > 1 or len({part.path for part in self.parts}) < len(self.parts):
            raise ValueError("it contradicts itself")
        if self.staged and not all(
            PART.fullmatch(part.path.removeprefix(REJECTED)) for part in self.parts
        ):
            raise ValueError("staged is what no run has written")
        return self


@dataclass(frozen=True)
class KeySet:
    """Files of keys that tell of the same parts: one of a commit, or one a bucket of a version.

    `path` is that of the one, or of the index. `counts` are rows by the places of part and shard,
    -1 for none. `version` is the one of which they tell all rows, -1 of a commit's. `staged` is the
    fingerprint of parts that are not committed, else empty.
    """

    path: str
    files: tuple[KeyFile, ...]
    parts: tuple[PartKeys, ...]
    shards: tuple[str, ...]
    counts: tuple[tuple[int, int, int], ...] = ()
    version: int = -1
    staged: str = ""

    @property
    def paths(self) -> list[str]:
        """All its files."""
        return list(dict.fromkeys([self.path, *(file.path for file in self.files)]))

    @property
    def rows_by_part(self) -> dict[str, int]:
        """Rows of each part, by its path."""
        return {part.path: sum(part.rows) for part in self.parts}


class _Found(NamedTuple):
    """What is in the folder: sets, paths of what cannot be opened, and of what is left of a set of
    which a file is missing, as an index is written last: that tells of nothing.
    """

    sets: list[KeySet]
    damaged: list[str]
    left: list[str]


class KeyFiles:
    """The files of keys of one table."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def list(self) -> tuple[list[KeySet], list[str]]:
        """All that tells of parts, by its metadata; and paths of files that cannot be opened."""
        found = self._look()
        return found.sets, found.damaged

    def _look(self) -> _Found:
        found = _Found([], [], [])
        paths = self._storage.paths(FOLDER)
        there = set(paths)
        for path in paths:
            if _BUCKET.fullmatch(path) or not _NAME.fullmatch(path):
                continue
            try:
                is_index = _INDEX.fullmatch(path)
                keys = self._open_index(path) if is_index else self._open(path)
            except DamagedError:
                found.damaged.append(path)
                continue
            if there.issuperset(keys.paths):
                found.sets.append(keys)
            else:
                found.left.append(path)
        told = {file.path for keys in found.sets for file in keys.files}
        found.left.extend(p for p in paths if _BUCKET.fullmatch(p) and p not in told)
        return found

    def _open(self, path: str) -> KeySet:
        with self._reading(path), self._storage.open(path) as handle:
            metadata = pq.read_metadata(handle).metadata or {}
            content = _Content.model_validate_json(metadata.get(_CONTENT.encode(), b""))
        num_rows = sum(sum(part.rows) for part in content.parts)
        return _as_set(path, content, [KeyFile(path, (0, 1), num_rows)])

    def _open_index(self, path: str) -> KeySet:
        with self._reading(path):
            content = _Content.model_validate_json(self._storage.get(path))
            if not content.files:
                raise ValueError("it names no file")
        return _as_set(path, content, content.files)

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        """Whatever a flipped bit makes of a file's footer, libraries raise."""
        try:
            yield
        except (StorageError, DamagedError):
            raise
        except Exception as e:
            raise DamagedError(self._storage.uri, f"{path}: not readable: {reason(e)}") from None

    def read(self, keys: KeySet, file: KeyFile) -> Iterator[KeyRows]:
        """The rows of one file of a set, some at a time; places and shards are those of its lists.

        Raises:
            DamagedError: It is not as it was written.
        """
        counts = np.zeros(len(keys.parts) * len(KINDS), dtype=np.int64)
        with self._reading(file.path), self._storage.open(file.path) as handle:
            parquet = _check(handle, file)
            for i in range(parquet.num_row_groups):
                rows = _read_group(parquet, i)
                # Raises where a place is none.
                counts += np.bincount(places_of(rows), minlength=len(counts))
                yield rows
            told = [n for part in keys.parts for n in part.rows]
            if len(keys.files) == 1 and counts.tolist() != told:
                raise ValueError("it holds other numbers of rows than it says")

    def read_bucket(self, file: KeyFile, bucket: int, num_buckets: int) -> KeyRows:
        """The rows of one file whose ids are in a bucket, of a power of two; as `read` gives them.

        Raises:
            DamagedError: It is not as it was written.
        """
        low, high = bucket_bounds(bucket, num_buckets)
        found = []
        with self._reading(file.path), self._storage.open(file.path) as handle:
            parquet = _check(handle, file)
            for i in range(parquet.num_row_groups):
                told = parquet.metadata.row_group(i).column(0).statistics
                if told is not None and told.has_min_max:
                    least, most = (int.from_bytes(b[:8], "big") for b in (told.min, told.max))
                    if most < low or least > high:
                        continue
                rows = _read_group(parquet, i)
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
            keys = self._open(path)
            for rows in self.read(keys, keys.files[0]):
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
        chosen: list[KeyRows] = []
        part_places: dict[str, int] = {}
        named = sorted({key for key in shards.values() if key is not None})
        place_of = places_of_shards(shards, {key: i for i, key in enumerate(named)})
        for rows, held_by in writes:
            for kind, part in held_by.items():
                some = rows[rows.kinds == KINDS.index(kind)]
                if len(some):
                    place = part_places.setdefault(part, len(part_places))
                    at = np.full(len(some), place, dtype=np.int32)
                    of_shards = place_of[np.minimum(some.shards, len(place_of) - 1)]
                    chosen.append(replace(some, shards=of_shards, places=at))
        if not chosen:
            return None
        rows = KeyRows.join(chosen)
        content = _describe(list(part_places), named, KeyCounts.of(rows))
        path = f"{FOLDER}{name}-{uuid.uuid4().hex[:8]}.parquet"
        content = content.model_copy(update={"staged": staged})
        self._storage.put(path, _to_parquet(rows, {_CONTENT: content.model_dump_json()}))
        return path

    def write_bucket(self, name: str, rows: KeyRows, bucket: int, num_buckets: int) -> KeyFile:
        """Write the keys of one bucket of a version, of which `write_index` tells.

        Args:
            name: Of the set.
            rows: The keys; places and shards are those in the lists of the index.
            bucket: Which.
            num_buckets: Of how many.
        """
        path = f"{FOLDER}{name}-bucket-{bucket:04d}-{uuid.uuid4().hex[:8]}.parquet"
        self._storage.put(path, _to_parquet(rows, {}))
        return KeyFile(path, (bucket, num_buckets), len(rows))

    def write_index(
        self,
        name: str,
        parts: Sequence[str],
        shards: Sequence[str],
        counts: KeyCounts,
        version: int,
        files: Sequence[KeyFile],
    ) -> str:
        """Write what the files of a set have in common, after them; its path.

        Args:
            name: Of the set.
            parts: Paths of parts.
            shards: Keys of shards.
            counts: Of all buckets.
            version: Of the table that has all these parts.
            files: Those of the buckets.
        """
        content = _describe(parts, shards, counts)
        content = content.model_copy(update={"version": version, "files": list(files)})
        path = f"{FOLDER}{name}-{uuid.uuid4().hex[:8]}.json"
        self._storage.put(path, content.model_dump_json().encode())
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
        found = self._look()
        for keys in found.sets:  # of what is staged too
            if not any(part.path in there for part in keys.parts):
                found.left.extend(keys.paths)
        for path in found.left:
            if _NAME.fullmatch(path):
                self._storage.delete(path)
        for path in damaged:
            if _NAME.fullmatch(path):
                self._storage.move(path, f"_quarantine/{path}")
        if local := self._storage.local:
            for half in (local / FOLDER).glob("*.tmp"):
                if _NAME.fullmatch(HALF_WRITTEN.sub("", f"{FOLDER}{half.name}")):
                    self._storage.delete(f"{FOLDER}{half.name}")


def _as_set(path: str, content: _Content, files: Sequence[KeyFile]) -> KeySet:
    return KeySet(
        path, tuple(files), tuple(content.parts), tuple(content.shards), tuple(content.counts),
        content.version, content.staged,
    )  # fmt: skip


def _describe(parts: Sequence[str], shards: Sequence[str], counts: KeyCounts) -> _Content:
    rows = counts.by_part(len(parts))
    held = [PartKeys(path, n) for path, n in zip(parts, rows, strict=True)]
    return _Content.model_construct(
        parts=held, shards=list(shards), counts=counts.by_part_and_shard()
    )


def _check(handle: Any, file: KeyFile) -> pq.ParquetFile:
    parquet = pq.ParquetFile(handle, page_checksum_verification=True)
    if not parquet.schema_arrow.remove_metadata().equals(_SCHEMA):
        raise ValueError("other columns")
    if parquet.metadata.num_rows != file.rows:
        raise ValueError("it holds another number of rows than is said of it")
    return parquet


def _read_group(parquet: pq.ParquetFile, at: int) -> KeyRows:
    table = parquet.read_row_group(at)
    places, shards = table["part"].to_numpy(), table["shard"].to_numpy()
    ids, contents = to_keys(table["id"]), to_keys(table["content"])
    kinds = (places & (len(KINDS) - 1)).astype(np.int8)
    return KeyRows(ids, contents, table["carried"].to_numpy(), kinds, shards, places >> KIND_BITS)


def _to_parquet(rows: KeyRows, metadata: Mapping[str, str]) -> memoryview:
    first = first_halves(rows.ids)
    order = np.argsort(first)
    first, rows = first[order], rows[order]
    ids, contents = to_arrow(rows.ids), to_arrow(rows.contents)
    table = pa.table(
        [ids, contents, rows.carried, places_of(rows), rows.shards],
        schema=_SCHEMA.with_metadata(metadata),
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
