"""What a table knows of its source's rows: by its files of keys, or where those lack, its parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow.compute as pc

from fmembed.errors import DamagedError
from fmembed.rows.columns import DUPLICATE, ROW_ID
from fmembed.rows.ids import Keys, RowIds, keys_of
from fmembed.storage import Storage, tell
from fmembed.table.files import REJECTED, Part, PartFiles
from fmembed.table.keys import KINDS, KeyFile, KeyFiles, KeyRows, Kind

# So many contents are kept of the rows of one id; of more, none is known: a lookup goes through
# all of them.
_MAX_TWINS = 8
# Rows of a file of keys that is made anew from parts.
_FILE_ROWS = 2**22


@dataclass(frozen=True)
class KnownRows:
    """What a version of a table knows of the source's rows, before any key is read.

    `parts` are its parts by their paths, those of `_rejected` with that in front; `missing` the
    paths of those that no file tells of, `damaged` the files that cannot be opened; `num_rows` are
    embedded and rejected rows of the source.
    """

    uri: str
    files: tuple[KeyFile, ...]
    parts: Mapping[str, Part]
    missing: tuple[str, ...]
    damaged: tuple[str, ...] = ()
    num_rows: int = 0

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
        counts = Counter(twins.ids.tolist())
        many = [key for key, n in counts.items() if n > _MAX_TWINS]
        if many:
            twins = twins[~np.isin(twins.ids, many)]
            ids.add(np.array(many, dtype="S16"))
        ids.add(twins.ids, twins.contents, twins.carried)
        ids.add(np.unique(rejected.ids))
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
        missing = list(self.missing)
        files = KeyFiles(Storage(self.uri))
        for file in self.files:
            try:
                rows = KeyRows.join(list(files.read(file)))
            except DamagedError as e:
                tell(f"{self.uri}: {e.what}; the parts are read instead")
                missing += dict.fromkeys(p.path for p in file.parts if p.path in self.parts)
                continue
            is_current = np.array([part.path in self.parts for part in file.parts], dtype=np.bool_)
            yield rows if is_current.all() else rows[is_current[rows.places]]
        for path in missing:
            yield self.read_part(path)

    def find_wrong(self) -> list[str]:
        """The files that are damaged, or tell of other rows than the parts they name hold.

        Raises:
            DamagedError: A part is missing, or not as it was written.
        """
        files, wrong = KeyFiles(Storage(self.uri)), list(self.damaged)
        for file in self.files:
            try:
                rows = KeyRows.join(list(files.read(file)))
            except DamagedError:
                wrong.append(file.path)
                continue
            for path in dict.fromkeys(part.path for part in file.parts if part.path in self.parts):
                places = [i for i, part in enumerate(file.parts) if part.path == path]
                told, held = rows[np.isin(rows.places, places)], self.read_part(path)
                if path.startswith(REJECTED):  # the part keeps no content
                    told = KeyRows.of(told.ids, kinds=told.kinds)
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
        files, part = PartFiles(Storage(f"{self.uri}/{folder}".rstrip("/"))), self.parts[path]
        if not folder:
            return KeyRows.of(*files.read_keys(part))
        rows = files.read_columns(part, [ROW_ID, "error"])
        is_twin = np.asarray(pc.equal(rows["error"], DUPLICATE), dtype=np.bool_)
        kinds = np.where(is_twin, 2, 1).astype(np.int8)
        return KeyRows.of(keys_of(rows[ROW_ID].to_pylist()), kinds=kinds)

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
    uri: str, rows: Sequence[Part], rejected: Sequence[Part], pieces_are_rows: bool
) -> KnownRows:
    """What the version with these parts knows.

    Args:
        uri: The table.
        rows: The parts of embedded rows.
        rejected: Those of rejected ones.
        pieces_are_rows: Whether a row of the source may be several of the table.
    """
    files, damaged = KeyFiles(Storage(uri)).list()
    parts = {part.path: part for part in rows}
    parts |= {REJECTED + part.path: part for part in rejected}
    told: Counter[str] = Counter()
    chosen = []
    for file in files:
        counts = Counter[str]()
        for part in file.parts:
            if part.path in parts:
                counts[part.path] += part.rows
        # A part that two files tell of, as where one was made anew; or whose rows are others.
        fits = all(
            path not in told
            and (n == parts[path].num_rows or (pieces_are_rows and not path.startswith(REJECTED)))
            for path, n in counts.items()
        )
        if counts and fits:
            chosen.append(file)
            told += counts
    missing = tuple(path for path in parts if path not in told)
    known = KnownRows(uri, tuple(chosen), parts, missing, tuple(damaged))
    num_missing = sum(
        len(known.read_part(path)) if pieces_are_rows else parts[path].num_rows for path in missing
    )
    return replace(known, num_rows=told.total() + num_missing)
