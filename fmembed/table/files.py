"""The Parquet parts of a table: how they are named, written, checked and read.

Nothing here says whether a part is committed: that is the log's (log.py).
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fmembed.errors import DamagedError, reason
from fmembed.rows.carried import hash_carried
from fmembed.rows.columns import CONTENT_HASH, PARENT_ID, ROW_ID
from fmembed.rows.ids import Hashes, Keys, contents_of, keys_of
from fmembed.rows.vectors import vector_type
from fmembed.spec import OWN_COLUMNS
from fmembed.storage import Draft, Storage
from fmembed.table.card import PREFIX

# Where the rejected rows' log and parts are in a table.
REJECTED = "_rejected/"
# In a part's footer, beside the table's card: which run wrote it (as on each commit), and which of
# its writes it is of.
RUN, WRITE = f"{PREFIX}run", f"{PREFIX}write"
PART = re.compile(r"part-([0-9a-f]{32})\.parquet")
# A part smaller than this is read whole even for a few columns: then its checksum can be checked.
_WHOLE_BYTES = 64 * 2**20
# Of a row group, as Arrow holds it: what a part is read and written in where it is written anew. At
# once, a part of 256 MiB takes three times as much.
_GROUP_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Part:
    """A Parquet file that was written, not yet committed. `path` is relative to its log."""

    path: str
    size_bytes: int
    num_rows: int


class PartFiles:
    """The parts in one folder, committed or not."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def read_columns(self, part: Part, columns: Sequence[str] | None) -> pa.Table:
        """Read columns of one part, its checksums checked.

        All of it is fetched, and compared with the checksum that it is named after, where all
        columns are asked for or it is small; else the checksums of the pages that are read.

        Raises:
            DamagedError: It is missing, or not as it was written.
        """
        if columns is None or part.size_bytes <= _WHOLE_BYTES:
            return self.read_whole(part, columns)
        return self._read_pages(part, columns)

    def _read_pages(self, part: Part, columns: Sequence[str]) -> pa.Table:
        with self._reading(part), self._storage.open(part.path) as handle:
            parquet = pq.ParquetFile(handle, page_checksum_verification=True)
            rows = parquet.read(columns=list(columns))
        return self._counted(part, rows)

    def read_whole(self, part: Part, columns: Sequence[str] | None = None) -> pa.Table:
        """Read one part, compared with the checksum that it is named after.

        Raises:
            DamagedError: It is missing, or not as it was written.
        """
        with self._reading(part):
            rows = self._fetch(part).read(columns=None if columns is None else list(columns))
        return self._counted(part, rows)

    def read_pieces(self, part: Part) -> Iterator[pa.Table]:
        """As `read_whole`, a row group at a time; the checksum of all is known after the last."""
        with self._reading(part), ThreadPoolExecutor(1) as pool:
            content = self._storage.get_buffer(part.path)
            checked = pool.submit(self._check_bytes, part, content)
            parquet = _open(content)
            self._check_rows(part, parquet.metadata.num_rows)
            for i in range(parquet.num_row_groups):
                yield parquet.read_row_group(i).replace_schema_metadata(None)
            checked.result()

    def _fetch(self, part: Part) -> pq.ParquetFile:
        content = self._storage.get_buffer(part.path)
        self._check_bytes(part, content)
        return _open(content)

    def _check_bytes(self, part: Part, content: Any) -> None:
        # What another tool has written, as Delta's own delete, has another name and no checksum.
        if not PART.fullmatch(part.path):
            return
        named = _Named()
        named.update(content)
        if part.path != named.path:
            raise self._damaged(part, "its bytes do not match its checksum")

    @contextmanager
    def _reading(self, part: Part) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise self._damaged(part, "committed, but missing") from None
        except (pa.ArrowException, OSError) as e:
            raise self._damaged(part, f"not readable: {reason(e)}") from None

    def _counted(self, part: Part, rows: pa.Table) -> pa.Table:
        self._check_rows(part, rows.num_rows)
        return rows.replace_schema_metadata(None)

    def _check_rows(self, part: Part, num_rows: int) -> None:
        if num_rows != part.num_rows:
            raise self._damaged(part, f"{num_rows} rows where the log says {part.num_rows}")

    def _damaged(self, part: Part, what: str) -> DamagedError:
        return DamagedError(self._storage.uri, f"{part.path}: {what}")

    def read_schema(self, part: Part) -> pa.Schema:
        """The columns of one part, by its footer.

        Raises:
            DamagedError: It is missing, or not as it was written.
        """
        with self._reading(part), self._storage.open(part.path) as handle:
            return pq.read_schema(handle).remove_metadata()

    def num_rows(self, path: str) -> int:
        """Rows of a part by its footer; 0 where it cannot be read."""
        try:
            with self._storage.open(path) as handle:
                return int(pq.read_metadata(handle).num_rows)
        except (pa.ArrowException, OSError):
            return 0

    def read_stamp(self, path: str) -> dict[str, str]:
        """What the footer of a part says of whose it is; empty where it cannot be read."""
        try:
            with self._storage.open(path) as handle:
                metadata = pq.read_metadata(handle).metadata or {}
        except (pa.ArrowException, OSError):
            return {}
        return {
            k.decode(): v.decode(errors="replace")
            for k, v in metadata.items()
            if k.startswith(PREFIX.encode())
        }  # fmt: skip

    def read_keys(self, part: Part) -> tuple[Keys, Keys, Hashes]:
        """The source's ids of one part's rows, their contents, and the hashes of what they carry:
        once for each row, however many pieces it has.

        Of a part that another tool has written, with types of its own, the hashes are not known.

        Raises:
            DamagedError: It is missing, or not as it was written.
        """
        schema = self.read_schema(part)
        column = PARENT_ID if PARENT_ID in schema.names else ROW_ID
        is_own = PART.fullmatch(part.path)
        carried = [
            f.name for f in schema
            if is_own and f.name not in OWN_COLUMNS and vector_type(f.type) is None
        ]  # fmt: skip
        # By ranges, however small the part is: every run reads the ids of all and no vector.
        try:
            rows = self._read_pages(part, [column, CONTENT_HASH, *carried])
            # A dictionary, as Arrow groups no string_view, which Delta's own delete writes.
            first: dict[str, int] = {}
            for at, row_id in enumerate(rows[column].to_pylist()):
                first.setdefault(row_id, at)
            rows_at = list(first.values())
            hashes = rows[CONTENT_HASH].to_pylist()
            carried_hashes = hash_carried(rows, carried).fill_null(0).to_numpy()[rows_at]
            return keys_of(first), contents_of(hashes[at] for at in rows_at), carried_hashes
        except (KeyError, ValueError) as e:
            raise self._damaged(part, f"no ids and contents in it: {reason(e)}") from None

    def write(
        self, rows: pa.Table, vectors: Sequence[str] = (), stamp: Mapping[str, str] | None = None
    ) -> Part:
        """Write rows as one part: see `write_pieces`."""
        return self.write_pieces([rows], rows.schema, vectors, stamp)

    def write_pieces(
        self,
        pieces: Iterable[pa.Table],
        schema: pa.Schema,
        vectors: Sequence[str] = (),
        stamp: Mapping[str, str] | None = None,
    ) -> Part:
        """Write rows as one part.

        The part is named after the checksum of its bytes, so that `verify` needs no other record
        of it, and put in one piece, so that a torn write leaves nothing behind.

        Args:
            pieces: What to write, some rows at a time.
            schema: Columns of the part; one that a piece lacks is null in its rows.
            vectors: The columns of vectors.
            stamp: For the footer: the table's card, and which write of which run this is, so that
                the same rows written twice are two parts of two names.
        """
        # Dictionaries only grow vectors: 768 kB of them took 1,201 kB with, 689 kB without.
        unlike = (ROW_ID, CONTENT_HASH, *vectors)
        plain = [name for name in schema.names if name not in unlike]
        num_rows, named = 0, _Named()
        with self._storage.draft(_Named().path) as draft:
            sink = _Sink(draft, named)
            with pq.ParquetWriter(
                sink, schema, compression="zstd", use_dictionary=plain, write_page_checksum=True
            ) as writer:
                for rows in _grouped(pieces, schema):
                    per_row = max(rows.nbytes // max(rows.num_rows, 1), 1)
                    writer.write_table(rows, row_group_size=max(_GROUP_BYTES // per_row, 1))
                    num_rows += rows.num_rows
                writer.add_key_value_metadata(dict(stamp or {}))
            draft.publish(named.path)
        return Part(named.path, named.num_bytes, num_rows)


def _grouped(pieces: Iterable[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    """The same rows, in tables of a row group's size and more, but the last; one at least."""
    empty = schema.empty_table()
    waiting = [empty]
    for piece in pieces:
        if sum(rows.nbytes for rows in waiting) >= _GROUP_BYTES:
            yield pa.concat_tables(waiting)
            waiting = [empty]
        full = pa.concat_tables([empty, piece], promote_options="default")
        if len(full.schema) > len(schema):
            raise ValueError(f"columns that the part has not: {full.schema.names}")
        waiting.append(full.cast(schema))
    yield pa.concat_tables(waiting)


def _open(content: Any) -> pq.ParquetFile:
    return pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)


class _Named:
    """The name of a part, as its bytes become known."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self.num_bytes = 0

    def update(self, content: Any) -> None:
        self._hash.update(content)
        self.num_bytes += len(content)

    @property
    def path(self) -> str:
        return f"part-{self._hash.hexdigest()}.parquet"


class _Sink(io.RawIOBase):
    """A file for pyarrow: a draft, and its name."""

    def __init__(self, draft: Draft, named: _Named) -> None:
        super().__init__()
        self._draft, self._named = draft, named

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._named.num_bytes

    def write(self, content: Any) -> int:
        self._named.update(content)
        return self._draft.write(content)
