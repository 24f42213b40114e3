"""The keys of a table's rows, in files beside its parts: by them a run knows what is done.

    <table>/_keys/<run>-<number>.parquet    those of one commit's rows

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from fmembed.errors import DamagedError, StorageError, reason
from fmembed.rows.ids import Hashes, Keys, RowIds, first_halves, keys_of, to_arrow, to_keys
from fmembed.storage import HALF_WRITTEN, Storage
from fmembed.table.card import PREFIX

FOLDER = "_keys/"
# Whether a row is embedded; rejected; or rejected as one whose id another row has, which is no
# reason to take the id for known: that other row may be in the table no longer.
Kind = Literal["embedded", "rejected", "twin"]
KINDS: tuple[Kind, ...] = ("embedded", "rejected", "twin")
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
# A bucket is what is read at once: 2**20 rows of 40 bytes.
_BUCKET_ROWS = 2**20
_INTS = npt.NDArray[np.int32]


class _PartKeys(BaseModel):
    path: str
    kind: Kind
    rows: int


class _Content(BaseModel):
    parts: list[_PartKeys]
    shards: list[str] = []


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

    def __getitem__(self, which: npt.NDArray[Any]) -> KeyRows:
        """Those rows."""
        return KeyRows(*(getattr(self, f.name)[which] for f in fields(self)))

    @property
    def embedded(self) -> Keys:
        """Ids of the rows that are embedded."""
        ids: Keys = self.ids[self.kinds == 0]
        return ids


@dataclass(frozen=True)
class KeyFile:
    """A file of keys, by its metadata."""

    path: str
    parts: tuple[_PartKeys, ...]
    shards: tuple[str, ...]


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
        return KeyFile(path, tuple(content.parts), tuple(content.shards))

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
                table = parquet.read_row_group(i)
                at = table["part"].to_numpy()
                counts += np.bincount(at, minlength=len(counts))  # raises where one is no place
                shards = table["shard"].to_numpy()
                ids, contents = to_keys(table["id"]), to_keys(table["content"])
                carried = table["carried"].to_numpy()
                yield KeyRows(ids, contents, carried, kinds[at], shards, at)
            if counts.tolist() != [part.rows for part in file.parts]:
                raise ValueError("it holds other numbers of rows than it says")

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
    ) -> str | None:
        """Write the keys of some parts as one file; its path, None where they hold no row.

        Args:
            name: How it is called; each try has a name of its own.
            writes: Keys of some rows, and by their kind the part that holds them.
            shards: Key of each shard by its number; None where it has none.
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
        content = _Content(parts=parts, shards=shard_keys)
        path = f"{FOLDER}{name}-{uuid.uuid4().hex[:8]}.parquet"
        self._storage.put(path, _to_parquet(KeyRows.join(chosen), content))
        return path

    def clean_up(self, exists: Iterable[str], damaged: Sequence[str]) -> None:
        """Delete the files of which no part is there any more, and what a killed run has left half
        written; put damaged ones aside. Only under the lock.
        """
        there = set(exists)
        for file in self.list()[0]:
            if _NAME.fullmatch(file.path) and not any(p.path in there for p in file.parts):
                self._storage.delete(file.path)
        for path in damaged:
            if _NAME.fullmatch(path):
                self._storage.move(path, f"_quarantine/{path}")
        if local := self._storage.local:
            for half in (local / FOLDER).glob("*.tmp"):
                if _NAME.fullmatch(HALF_WRITTEN.sub("", f"{FOLDER}{half.name}")):
                    self._storage.delete(f"{FOLDER}{half.name}")


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
    num_bits = max((len(rows) - 1) // _BUCKET_ROWS, 0).bit_length()
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
