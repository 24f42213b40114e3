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

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from fmembed.errors import DamagedError
from fmembed.rows.columns import DUPLICATE, ROW_ID
from fmembed.rows.ids import Hashes, Keys, RowIds, first_halves, keys_of, to_arrow, to_keys
from fmembed.storage import Storage, tell
from fmembed.table.card import PREFIX
from fmembed.table.files import REJECTED, Part, PartFiles

FOLDER = "_keys/"
# Whether a row is embedded; rejected; or rejected as one whose id another row has, which is no
# reason to take the id for known: that other row may be in the table no longer.
Kind = Literal["embedded", "rejected", "twin"]
KINDS: tuple[Kind, ...] = ("embedded", "rejected", "twin")
_CONTENT = f"{PREFIX}keys"
# A bucket is what is read at once: 2**20 rows of 40 bytes.
_BUCKET_ROWS = 2**20
_FILE_ROWS = 2**22
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

    `kinds` are places in `KINDS`, `shards` numbers of the source's shards, -1 where not known.
    """

    ids: Keys
    contents: Keys
    carried: Hashes
    kinds: npt.NDArray[np.int8]
    shards: _INTS

    @classmethod
    def of(
        cls,
        ids: Keys,
        contents: Keys | None = None,
        carried: Hashes | None = None,
        kinds: npt.NDArray[np.int8] | None = None,
        shards: _INTS | None = None,
    ) -> KeyRows:
        """Keys of embedded rows, if nothing else is said, of which nothing else is known."""
        n = len(ids)
        return cls(
            ids,
            np.zeros(n, dtype="S16") if contents is None else contents,
            np.zeros(n, dtype=np.int64) if carried is None else carried,
            np.zeros(n, dtype=np.int8) if kinds is None else kinds,
            np.full(n, -1, dtype=np.int32) if shards is None else shards,
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

    def list(self) -> list[KeyFile]:
        """All files, by their metadata; one that cannot be read is passed over."""
        found = []
        for path in self._storage.paths(FOLDER):
            if not path.endswith(".parquet"):
                continue
            try:
                found.append(self.open(path))
            except (pa.ArrowException, OSError, ValidationError, RecursionError):
                self._pass_over(path)
        return found

    def open(self, path: str) -> KeyFile:
        """One file, by its metadata."""
        with self._storage.open(path) as handle:
            metadata = pq.read_metadata(handle).metadata or {}
        content = _Content.model_validate_json(metadata.get(_CONTENT.encode(), b""))
        return KeyFile(path, tuple(content.parts), tuple(content.shards))

    def read(self, file: KeyFile) -> pa.Table | None:
        """Its columns id, content, part and shard; None where it is damaged."""
        try:
            with self._storage.open(file.path) as handle:
                return pq.ParquetFile(handle, page_checksum_verification=True).read()
        except (pa.ArrowException, OSError):
            self._pass_over(file.path)
            return None

    def read_buckets(self, path: str) -> Iterator[pa.Table]:
        """The same a bucket at a time.

        Raises:
            DamagedError: It cannot be read.
        """
        try:
            with self._storage.open(path) as handle:
                parquet = pq.ParquetFile(handle, page_checksum_verification=True)
                for i in range(parquet.num_row_groups):
                    yield parquet.read_row_group(i)
        except (pa.ArrowException, OSError) as e:
            raise DamagedError(self._storage.uri, f"{path}: not readable: {e}") from None

    def write(
        self,
        name: str,
        writes: Sequence[tuple[KeyRows, Mapping[Kind, str]]],
        shards: Mapping[int, str | None],
    ) -> str:
        """Write the keys of some parts as one file; its path.

        Args:
            name: How it is called.
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
                    places_of_rows = place_of[np.minimum(some.shards, len(place_of) - 1)]
                    chosen.append(replace(some, shards=places_of_rows))
                    parts.append(_PartKeys(path=part, kind=kind, rows=len(some)))
        at = np.repeat(np.arange(len(parts), dtype=np.int32), [part.rows for part in parts])
        content = _Content(parts=parts, shards=shard_keys)
        path = f"{FOLDER}{name}.parquet"
        self._storage.put(path, _to_parquet(KeyRows.join(chosen), at, content))
        return path

    def remove_strays(self, exists: Iterable[str]) -> None:
        """Delete the files of which no part is there any more."""
        there = set(exists)
        for file in self.list():
            if not any(part.path in there for part in file.parts):
                self._storage.delete(file.path)

    def _pass_over(self, path: str) -> None:
        tell(
            f"{path} in {self._storage.uri} is no file of keys, or a damaged one; "
            "it is passed over, and the parts are read instead"
        )


def _to_parquet(rows: KeyRows, parts: _INTS, content: _Content) -> memoryview:
    first = first_halves(rows.ids)
    order = np.argsort(first)
    first, rows = first[order], rows[order]
    table = pa.table(
        {
            "id": to_arrow(rows.ids),
            "content": to_arrow(rows.contents),
            "carried": rows.carried,
            "part": parts[order],
            "shard": rows.shards,
        }
    ).replace_schema_metadata({_CONTENT: content.model_dump_json()})
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


def find_twins(
    files: KeyFiles, paths: Sequence[str], given: Sequence[KeyRows]
) -> dict[int, frozenset[bytes]]:
    """Which embedded rows have an id that another one has, of those that are about to be committed.

    Memory is that of the given rows and one bucket.

    Args:
        files: Of the table.
        paths: Files of the rows that this run has committed; older ones no reader hands on.
        given: Keys of the rows of each write, in order.

    Returns:
        By the number of a write the ids that an earlier write has, or a file.
    """
    writes = [rows.embedded for rows in given]
    twins: dict[int, set[bytes]] = {}
    everything = np.concatenate([np.empty(0, "S16"), *writes])
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
    if paths:
        new = RowIds(everything)
        found = [np.empty(0, "S16")]
        for path in paths:
            file = files.open(path)
            is_embedded = np.array([part.kind == "embedded" for part in file.parts], dtype=np.bool_)
            for bucket in files.read_buckets(path):
                ids = to_keys(bucket["id"])[is_embedded[bucket["part"].to_numpy()]]
                found.append(ids[new.contains(ids)])
        committed = RowIds(np.concatenate(found))
        for i, ids in enumerate(writes if len(committed) else ()):
            if some := ids[committed.contains(ids)].tolist():
                twins.setdefault(i, set()).update(some)
    return {i: frozenset(keys) for i, keys in twins.items()}


@dataclass(frozen=True)
class KnownRows:
    """What a version of a table knows of the source's rows, before any key is read.

    `parts` are its parts by their paths, those of `_rejected` with that in front; `missing` the
    paths of those that no file tells of; `num_rows` are embedded and rejected rows of the source.
    """

    uri: str
    files: tuple[KeyFile, ...]
    parts: Mapping[str, Part]
    missing: tuple[str, ...]
    num_rows: int

    def load(self) -> RowIds:
        """Ids of all rows, committed or rejected, with what is known of the committed ones.

        Of an id that several rows have, the contents of all of them. 40 bytes a row.

        Raises:
            DamagedError: A part is missing, or not as it was written.
        """
        rows = KeyRows.join(list(self.read()))
        embedded, rejected, twins = (rows[rows.kinds == i] for i in range(len(KINDS)))
        ids = RowIds(embedded.ids, embedded.contents, embedded.carried)
        # Not by its twin is a row known: it may be committed later than that one is rejected.
        twins = twins[ids.contains(twins.ids)]
        ids.add(twins.ids, twins.contents, twins.carried)
        ids.add(rejected.ids)
        return ids

    def which_are_embedded(self, keys: Keys) -> Keys:
        """Of some ids those of embedded rows; memory is that of one file."""
        wanted = RowIds(keys)
        found = [np.empty(0, "S16")]
        for rows in self.read():
            ids = rows.embedded
            found.append(ids[wanted.contains(ids)])
        return np.concatenate(found)

    def read(self) -> Iterator[KeyRows]:
        """The keys, a file or part at a time; shards are not told.

        Raises:
            DamagedError: A part is missing, or not as it was written.
        """
        missing = list(self.missing)
        key_files = KeyFiles(Storage(self.uri))
        for file in self.files:
            table = key_files.read(file)
            if table is None:
                missing += dict.fromkeys(p.path for p in file.parts if p.path in self.parts)
                continue
            is_current = np.array([part.path in self.parts for part in file.parts], dtype=np.bool_)
            kinds = np.array([KINDS.index(part.kind) for part in file.parts], dtype=np.int8)
            at = table["part"].to_numpy()
            rows = _to_rows(table, kinds[at])
            yield rows if is_current.all() else rows[is_current[at]]
        for path in missing:
            yield self.read_part(path)

    def find_wrong(self) -> list[str]:
        """The files that tell of another row, or of another content, than the parts they name.

        Raises:
            DamagedError: A part is missing, or not as it was written.
        """
        wrong = []
        for file in self.files:
            table = KeyFiles(Storage(self.uri)).read(file)
            if table is None:
                continue
            at, rows = table["part"].to_numpy(), _to_rows(table)
            for path in dict.fromkeys(part.path for part in file.parts if part.path in self.parts):
                places = [i for i, part in enumerate(file.parts) if part.path == path]
                told, held = rows[np.isin(at, places)], self.read_part(path)
                if path.startswith(REJECTED):  # the part keeps no content
                    told = KeyRows.of(told.ids)
                if _pairs(told) != _pairs(held):
                    wrong.append(file.path)
                    break
        return wrong

    def read_part(self, path: str) -> KeyRows:
        """The keys of one part, from its rows.

        Raises:
            DamagedError: It is missing, or not as it was written.
        """
        folder = REJECTED if path.startswith(REJECTED) else ""
        files, part = PartFiles(Storage(f"{self.uri}/{folder}".rstrip("/"))), self.parts[path]
        if not folder:
            return KeyRows.of(*files.read_keys(part))
        rows = files.read_columns(part, [ROW_ID, "error"])
        is_twin = np.asarray(pc.equal(rows["error"], DUPLICATE), dtype=np.bool_)
        kinds = np.where(is_twin, 2, 1).astype(np.int8)
        return KeyRows.of(keys_of(rows[ROW_ID].to_pylist()), kinds=kinds)


def _to_rows(table: pa.Table, kinds: npt.NDArray[np.int8] | None = None) -> KeyRows:
    """The rows of a file of keys; shards are not told."""
    ids, contents = to_keys(table["id"]), to_keys(table["content"])
    return KeyRows.of(ids, contents, table["carried"].to_numpy(), kinds)


def _pairs(rows: KeyRows) -> list[tuple[bytes, bytes]]:
    return sorted(zip(rows.ids.tolist(), rows.contents.tolist(), strict=True))


def know(
    uri: str, files: Sequence[KeyFile], rows: Sequence[Part], rejected: Sequence[Part]
) -> KnownRows:
    """What a version with these parts knows.

    Args:
        uri: The table.
        files: Its files of keys.
        rows: The parts of embedded rows.
        rejected: Those of rejected ones.
    """
    parts = {part.path: part for part in rows}
    parts |= {REJECTED + part.path: part for part in rejected}
    told: set[str] = set()
    chosen, num_rows = [], 0
    for file in files:
        own = [part for part in file.parts if part.path in parts]
        # A part that two files tell of, as after a run was killed while it wrote one anew.
        if not own or any(part.path in told for part in own):
            continue
        chosen.append(file)
        num_rows += sum(part.rows for part in own)
        told.update(part.path for part in own)
    missing = tuple(path for path in parts if path not in told)
    num_rows += sum(parts[path].num_rows for path in missing)
    return KnownRows(uri, tuple(chosen), parts, missing, num_rows)


def write_missing(storage: Storage, known: KnownRows, name: str) -> None:
    """Write the keys of the parts that no file tells of, some millions of rows a file."""
    some: list[tuple[KeyRows, Mapping[Kind, str]]] = []
    num_rows = num_files = 0
    for path in known.missing:
        kinds: tuple[Kind, ...] = KINDS[1:] if path.startswith(REJECTED) else KINDS[:1]
        some.append((known.read_part(path), dict.fromkeys(kinds, path)))
        num_rows += len(some[-1][0])
        if num_rows >= _FILE_ROWS or path == known.missing[-1]:
            KeyFiles(storage).write(f"{name}-{num_files}", some, {})
            some, num_rows, num_files = [], 0, num_files + 1
