"""What a table knows of its source's rows: by its files of keys, or where those lack, its parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow.compute as pc

from fmembed.errors import DamagedError
from fmembed.rows.columns import DUPLICATE, ROW_ID
from fmembed.rows.ids import Keys, LeftOut, RowIds, keys_of
from fmembed.storage import Storage, tell
from fmembed.table.deleted import Deleted
from fmembed.table.files import REJECTED, Part, PartFiles
from fmembed.table.key_rows import KINDS, KeyRows, Kind, bucket_bounds, is_in_bucket
from fmembed.table.keys import KeyFile, KeyFiles, KeySet

# So many contents are kept of the rows of one id; of more, none is known: a lookup goes through
# all of them.
_MAX_TWINS = 8
# Rows of a file of keys that is made anew from parts.
_FILE_ROWS = 2**22


@dataclass(frozen=True)
class KnownRows:
    """What a version of a table knows of the source's rows, before any key is read.

    `parts` are its parts by their paths, those of `_rejected` with that in front; `told_by` says
    which of the sets tells of each, by its path, `missing` are the paths of those that none tells
    of, `damaged` the files that cannot be opened; `num_rows` are embedded and rejected rows of the
    source. `staged` are parts that a refresh has written and not committed, of which `sets` tell
    too. `num_deleted` rows were deleted and stay out.
    """

    uri: str
    sets: tuple[KeySet, ...]
    parts: Mapping[str, Part]
    missing: tuple[str, ...]
    damaged: tuple[str, ...] = ()
    num_rows: int = 0
    told_by: Mapping[str, str] = field(default_factory=dict)
    staged: Mapping[str, Part] = field(default_factory=dict)
    num_deleted: int = 0

    @property
    def without_counts(self) -> KnownRows:
        """What `read_bucket` needs of it."""
        return replace(self, sets=tuple(replace(keys, counts=()) for keys in self.sets))

    @property
    def paths(self) -> list[str]:
        """Of the parts of the version, then of those that are staged: what places count."""
        return [*self.parts, *self.staged]

    def count_by_shard(self) -> Counter[str]:
        """Rows of the version by the key of the shard that they were read from, as metadata have
        it: those of which it is known.
        """
        counts = Counter[str]()
        for keys in self._committed():
            is_told = [self._tells(keys, part.path) for part in keys.parts]
            for part, shard, rows in keys.counts:
                if shard >= 0 and is_told[part]:
                    counts[keys.shards[shard]] += rows
        return counts

    def read_bucket(self, bucket: int, num_buckets: int, shards: Mapping[str, int]) -> KeyRows:
        """The keys of one bucket, staged ones too; of a damaged file the parts are read.

        Args:
            bucket: Which.
            num_buckets: Of how many, a power of two.
            shards: Numbers of the source's shards by their keys.

        Returns:
            In the order of `paths`, of which `places` tell; `shards` are those given.

        Raises:
            DamagedError: A part is missing, or not as it was written.
        """
        paths = {path: i for i, path in enumerate(self.paths)}
        found = []
        missing = [(path, (0, 1)) for path in self.missing]
        low, high = bucket_bounds(bucket, num_buckets)
        files = KeyFiles(Storage(self.uri))
        for keys in self.sets:
            own = [part.path if self._tells(keys, part.path) else "" for part in keys.parts]
            place_of = np.array([paths.get(path, -1) for path in own], dtype=np.int32)
            shard_of = np.array([*(shards.get(key, -1) for key in keys.shards), -1], dtype=np.int32)
            for file in keys.files:
                least, most = bucket_bounds(*file.bucket)
                if most < low or least > high:
                    continue
                try:
                    rows = files.read_bucket(file, bucket, num_buckets)
                    rows = replace(rows, places=place_of[rows.places], shards=shard_of[rows.shards])
                except (DamagedError, IndexError) as e:
                    self._tell(file, e)
                    missing += [(path, file.bucket) for path in filter(None, own)]
                    continue
                found.append(rows if (place_of >= 0).all() else rows[rows.places >= 0])
        for path, some in missing:
            rows = self._read_part_of(path, some)
            rows = rows[is_in_bucket(rows.ids, bucket, num_buckets)]
            found.append(replace(rows, places=np.full(len(rows), paths[path], dtype=np.int32)))
        every = KeyRows.join(found)
        return every[np.argsort(every.places, kind="stable")]

    def load(self) -> RowIds:
        """Ids of all rows, committed or rejected, with what is known of the committed ones; and of
        those that were deleted, of which nothing is known.

        Of an id that several rows have, the contents of all of them. 40 bytes a row.

        Raises:
            DamagedError: A part is missing, or not as it was written.
        """
        rows = KeyRows.join(list(self.read()))
        embedded, rejected, twins, rest = (rows[rows.kinds == i] for i in range(len(KINDS)))
        ids = RowIds(embedded.ids, embedded.contents, embedded.carried)
        # Not by its twin is a row known: it may be committed later than that one is rejected.
        twins = twins[ids.contains(twins.ids)]
        counts = Counter(twins.ids.tolist())
        many = [key for key, n in counts.items() if n > _MAX_TWINS]
        if many:
            twins = twins[~np.isin(twins.ids, many)]
            ids.add(np.array(many, dtype="S16"))
        ids.add(twins.ids, twins.contents, twins.carried)
        ids.add(np.unique(np.concatenate([rejected.ids, rest.ids, self.deleted().ids])))
        return ids

    def deleted(self) -> LeftOut:
        """What was deleted, and stays out.

        Raises:
            TableError: Its list is not as it was written.
        """
        if not self.num_deleted:
            return LeftOut(keys_of([]), keys_of([]))
        return Deleted(Storage(self.uri)).read()

    def which_are_embedded(self, keys: Keys) -> Keys:
        """Of some ids those of embedded rows; memory is that of one file."""
        wanted = RowIds(np.unique(keys))
        found = [ids[wanted.contains(ids)] for ids in self.embedded()]
        return np.concatenate([keys_of([]), *found])

    def embedded(self) -> Iterator[Keys]:
        """Ids of the embedded rows, a file or part at a time."""
        for rows in self.read():
            yield rows.embedded

    def read(self) -> Iterator[KeyRows]:
        """The keys, a file or part at a time; of a damaged file the parts are read.

        Raises:
            DamagedError: A part is missing, or not as it was written.
        """
        missing = [(path, (0, 1)) for path in self.missing]
        files = KeyFiles(Storage(self.uri))
        for keys in self._committed():
            is_told = np.array([self._tells(keys, p.path) for p in keys.parts], dtype=np.bool_)
            for file in keys.files:
                try:
                    rows = KeyRows.join(list(files.read(keys, file)))
                except DamagedError as e:
                    self._tell(file, e)
                    told = (p.path for p in keys.parts if self._tells(keys, p.path))
                    missing += [(path, file.bucket) for path in told]
                    continue
                yield rows if is_told.all() else rows[is_told[rows.places]]
        for path, some in missing:
            yield self._read_part_of(path, some)

    def _committed(self) -> list[KeySet]:
        return [keys for keys in self.sets if not keys.staged]

    def _tells(self, keys: KeySet, path: str) -> bool:
        return self.told_by.get(path) == keys.path

    def _tell(self, file: KeyFile, error: Exception) -> None:
        why = error.what if isinstance(error, DamagedError) else f"{file.path}: no such part"
        tell(f"{self.uri}: {why}; the parts are read instead")

    def find_wrong(self) -> list[str]:
        """The files that are damaged, or tell of other rows than the parts they name hold.

        Raises:
            DamagedError: A part is missing, or not as it was written.
        """
        wrong = list(self.damaged)
        for keys in self._committed():
            wrong += [file.path for file in keys.files if self._is_wrong(keys, file)]
        return wrong

    def _is_wrong(self, keys: KeySet, file: KeyFile) -> bool:
        try:
            rows = KeyRows.join(list(KeyFiles(Storage(self.uri)).read(keys, file)))
        except DamagedError:
            return True
        for place, path in enumerate(part.path for part in keys.parts):
            if not self._tells(keys, path):
                continue
            told, held = rows[rows.places == place], self._read_part_of(path, file.bucket)
            if path.startswith(REJECTED):  # the part keeps no content
                kinds = np.where(told.kinds == KINDS.index("rest"), 1, told.kinds)
                told = KeyRows.of(told.ids, kinds=kinds.astype(np.int8))
            if _in_order(told) != _in_order(held):
                return True
        return False

    def read_part(self, path: str) -> KeyRows:
        """The keys of one part, from its rows.

        Raises:
            DamagedError: It is missing, or not as it was written.
        """
        folder = REJECTED if path.startswith(REJECTED) else ""
        files = PartFiles(Storage(f"{self.uri}/{folder}".rstrip("/")))
        part = {**self.parts, **self.staged}[path]
        if not folder:
            return KeyRows.of(*files.read_keys(part))
        rows = files.read_columns(part, [ROW_ID, "error"])
        is_twin = np.asarray(pc.equal(rows["error"], DUPLICATE), dtype=np.bool_)
        kinds = np.where(is_twin, 2, 1).astype(np.int8)
        return KeyRows.of(keys_of(rows[ROW_ID].to_pylist()), kinds=kinds)

    def _read_part_of(self, path: str, bucket: tuple[int, int]) -> KeyRows:
        """The keys of one part, of those in a bucket."""
        rows = self.read_part(path)
        return rows if bucket == (0, 1) else rows[is_in_bucket(rows.ids, *bucket)]

    def write_missing(self, name: str) -> None:
        """Write the keys of the parts that no file tells of, some millions of rows a file."""
        some: list[tuple[KeyRows, Mapping[Kind, str]]] = []
        num_rows = 0
        for path in self.missing:
            kinds = KINDS[1:] if path.startswith(REJECTED) else KINDS[:1]
            some.append((self.read_part(path), dict.fromkeys(kinds, path)))
            num_rows += len(some[-1][0])
            if num_rows >= _FILE_ROWS or path == self.missing[-1]:
                KeyFiles(Storage(self.uri)).write(name, some, {})
                some, num_rows = [], 0


def _in_order(rows: KeyRows) -> list[tuple[bytes, bytes, int]]:
    columns = (rows.ids.tolist(), rows.contents.tolist(), rows.kinds.tolist())
    return sorted(zip(*columns, strict=True))


def know(
    uri: str,
    rows: Sequence[Part],
    rejected: Sequence[Part],
    pieces_are_rows: bool,
    fingerprint: str = "",
) -> KnownRows:
    """What the version with these parts knows.

    Args:
        uri: The table.
        rows: The parts of embedded rows.
        rejected: Those of rejected ones.
        pieces_are_rows: Whether a row of the source may be several of the table.
        fingerprint: The table's, where what is staged for it is asked for too.
    """
    sets, damaged = KeyFiles(Storage(uri)).list()
    parts = {part.path: part for part in rows}
    parts |= {REJECTED + part.path: part for part in rejected}

    def tells(path: str, num_rows: int) -> bool:
        """Whether the part is there, and its rows are not others."""
        is_split = pieces_are_rows and not path.startswith(REJECTED)
        return path in parts and (num_rows == parts[path].num_rows or is_split)

    def is_older(keys: KeySet) -> tuple[bool, int]:
        # The newest version's first: it knows in which shard of the source each row was found last.
        # One that a refresh was killed before it could commit tells of parts that are not there.
        is_whole = all(tells(path, n) for path, n in keys.rows_by_part.items())
        return not is_whole, -keys.version

    told: Counter[str] = Counter()
    told_by: dict[str, str] = {}
    for keys in sorted((keys for keys in sets if not keys.staged), key=is_older):
        for path, n in keys.rows_by_part.items():
            if path not in told_by and tells(path, n):
                told[path], told_by[path] = n, keys.path
    staged: dict[str, Part] = {}
    for keys in sets if fingerprint else ():
        if keys.staged == fingerprint:
            held = _hold(uri, keys, parts)
            staged |= held
            told_by |= dict.fromkeys(held, keys.path)
    tellers = set(told_by.values())
    chosen = tuple(keys for keys in sets if keys.path in tellers)
    missing = tuple(path for path in parts if path not in told)
    num_deleted = len(Deleted(Storage(uri)).read())
    known = KnownRows(uri, chosen, parts, missing, tuple(damaged), 0, told_by, staged, num_deleted)
    num_missing = sum(
        len(known.read_part(path)) if pieces_are_rows else parts[path].num_rows for path in missing
    )
    return replace(known, num_rows=told.total() + num_missing)


def _hold(uri: str, keys: KeySet, parts: Mapping[str, Part]) -> dict[str, Part]:
    """The staged parts of a set, but those that are committed by now, or gone."""
    storage, held = Storage(uri), {}
    for path in keys.rows_by_part.keys() - parts.keys():
        size_bytes = storage.size_bytes(path)
        if size_bytes is None:
            continue
        # Of its rows, not of the source's, which may be several of it.
        num_rows = PartFiles(storage).num_rows(path)
        held[path] = Part(path.removeprefix(REJECTED), size_bytes, num_rows)
    return held
