"""What a table knows of its source's rows: by its files of keys, or where those lack, its parts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow.compute as pc

from fmembed.errors import DamagedError
from fmembed.rows.columns import DUPLICATE, ROW_ID
from fmembed.rows.ids import Keys, RowIds, keys_of
from fmembed.storage import Storage, tell
from fmembed.table.files import REJECTED, Part, PartFiles
from fmembed.table.keys import KINDS, KeyFile, KeyFiles, KeyRows, Kind, bucket_bounds, is_in_bucket

# So many contents are kept of the rows of one id; of more, none is known: a lookup goes through
# all of them.
_MAX_TWINS = 8
# Rows of a file of keys that is made anew from parts.
_FILE_ROWS = 2**22


@dataclass(frozen=True)
class KnownRows:
    """What a version of a table knows of the source's rows, before any key is read.

    `parts` are its parts by their paths, those of `_rejected` with that in front; `told_by` says
    which of the files tells of each, `missing` are the paths of those that none tells of, `damaged`
    the files that cannot be opened; `num_rows` are embedded and rejected rows of the source.
    `staged` are parts that a refresh has written and not committed, of which `files` tell too.
    """

    uri: str
    files: tuple[KeyFile, ...]
    parts: Mapping[str, Part]
    missing: tuple[str, ...]
    damaged: tuple[str, ...] = ()
    num_rows: int = 0
    told_by: Mapping[str, str] = field(default_factory=dict)
    staged: Mapping[str, Part] = field(default_factory=dict)

    @property
    def without_counts(self) -> KnownRows:
        """What `read_bucket` needs of it."""
        return replace(self, files=tuple(replace(file, counts=()) for file in self.files))

    @property
    def paths(self) -> list[str]:
        """Of the parts of the version, then of those that are staged: what places count."""
        return [*self.parts, *self.staged]

    def count_by_shard(self) -> Counter[str]:
        """Rows of the version by the key of the shard that they were read from, as the files'
        metadata have it: those of which it is known.
        """
        counts = Counter[str]()
        for file in self._committed():
            for part, shard, rows in file.counts:
                if shard >= 0 and self._tells(file, file.parts[part].path):
                    counts[file.shards[shard]] += rows
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
        for file in self.files:
            least, most = bucket_bounds(*file.bucket)
            if most < low or least > high:
                continue
            own = [p.path if self._tells(file, p.path) else "" for p in file.parts]
            try:
                rows = KeyFiles(Storage(self.uri)).read_bucket(file, bucket, num_buckets)
            except DamagedError as e:
                tell(f"{self.uri}: {e.what}; the parts are read instead")
                missing += [(path, file.bucket) for path in dict.fromkeys(filter(None, own))]
                continue
            place_of = np.array([paths.get(path, -1) for path in own], dtype=np.int32)
            shard_of = np.array([*(shards.get(key, -1) for key in file.shards), -1], dtype=np.int32)
            rows = replace(rows, places=place_of[rows.places], shards=shard_of[rows.shards])
            found.append(rows if (place_of >= 0).all() else rows[rows.places >= 0])
        for path, some in missing:
            rows = self._read_part_of(path, some)
            rows = rows[is_in_bucket(rows.ids, bucket, num_buckets)]
            found.append(replace(rows, places=np.full(len(rows), paths[path], dtype=np.int32)))
        every = KeyRows.join(found)
        return every[np.argsort(every.places, kind="stable")]

    def load(self) -> RowIds:
        """Ids of all rows, committed or rejected, with what is known of the committed ones.

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
        ids.add(np.unique(np.concatenate([rejected.ids, rest.ids])))
        return ids

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
        for file in self._committed():
            try:
                rows = KeyRows.join(list(files.read(file)))
            except DamagedError as e:
                tell(f"{self.uri}: {e.what}; the parts are read instead")
                own = (part.path for part in file.parts if self._tells(file, part.path))
                missing += [(path, file.bucket) for path in dict.fromkeys(own)]
                continue
            is_current = np.array([self._tells(file, p.path) for p in file.parts], dtype=np.bool_)
            yield rows if is_current.all() else rows[is_current[rows.places]]
        for path, some in missing:
            yield self._read_part_of(path, some)

    def _committed(self) -> list[KeyFile]:
        return [file for file in self.files if not file.staged]

    def _tells(self, file: KeyFile, path: str) -> bool:
        return self.told_by.get(path) == file.teller

    def find_wrong(self) -> list[str]:
        """The files that are damaged, or tell of other rows than the parts they name hold.

        Raises:
            DamagedError: A part is missing, or not as it was written.
        """
        files, wrong = KeyFiles(Storage(self.uri)), list(self.damaged)
        for file in self._committed():
            try:
                rows = KeyRows.join(list(files.read(file)))
            except DamagedError:
                wrong.append(file.path)
                continue
            for path in dict.fromkeys(p.path for p in file.parts if self._tells(file, p.path)):
                places = [i for i, part in enumerate(file.parts) if part.path == path]
                told = rows[np.isin(rows.places, places)]
                held = self._read_part_of(path, file.bucket)
                if path.startswith(REJECTED):  # the part keeps no content
                    kinds = np.where(told.kinds == KINDS.index("rest"), 1, told.kinds)
                    told = KeyRows.of(told.ids, kinds=kinds.astype(np.int8))
                if _in_order(told) != _in_order(held):
                    wrong.append(file.path)
                    break
        return wrong

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
    files, damaged = KeyFiles(Storage(uri)).list()
    parts = {part.path: part for part in rows}
    parts |= {REJECTED + part.path: part for part in rejected}
    rows_by: dict[str, Counter[str]] = defaultdict(Counter)
    for file in files:
        if not file.staged:
            rows_by[file.teller] += file.rows_by_part
    told: Counter[str] = Counter()
    told_by: dict[str, str] = {}
    # The newest set first: it knows in which shard of the source each row was found last.
    totals = {file.teller: file.total for file in files}
    for teller in dict.fromkeys(f.teller for f in sorted(files, key=lambda f: -f.version)):
        if 0 <= totals[teller] != rows_by[teller].total():  # a set that lacks a file
            continue
        for path, n in rows_by[teller].items():
            # Not where another one tells of the part, or its rows are others.
            if path in parts and path not in told_by:
                is_split = pieces_are_rows and not path.startswith(REJECTED)
                if n == parts[path].num_rows or is_split:
                    told[path], told_by[path] = n, teller
    staged: dict[str, Part] = {}
    for file in files if fingerprint else ():
        if file.staged == fingerprint:
            held = _hold(uri, file, parts)
            staged |= held
            told_by |= dict.fromkeys(held, file.path)
    tellers = set(told_by.values())
    chosen = tuple(f for f in files if f.teller in tellers)
    missing = tuple(path for path in parts if path not in told)
    known = KnownRows(uri, chosen, parts, missing, tuple(damaged), 0, told_by, staged)
    num_missing = sum(
        len(known.read_part(path)) if pieces_are_rows else parts[path].num_rows for path in missing
    )
    return replace(known, num_rows=told.total() + num_missing)


def _hold(uri: str, file: KeyFile, parts: Mapping[str, Part]) -> dict[str, Part]:
    """The staged parts of a file, but those that are committed by now, or gone."""
    storage, held = Storage(uri), {}
    for path in file.rows_by_part.keys() - parts.keys():
        size_bytes = storage.size_bytes(path)
        if size_bytes is None:
            continue
        # Of its rows, not of the source's, which may be several of it.
        num_rows = PartFiles(storage).num_rows(path)
        held[path] = Part(path.removeprefix(REJECTED), size_bytes, num_rows)
    return held
