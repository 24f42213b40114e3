"""Which rows are known, and with which content: their ids and contents as keys of 16 bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Keys = npt.NDArray[np.bytes_]
# Of what a row carries; 0 where there is nothing, or it is not known.
Hashes = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]
_Halves = npt.NDArray[np.uint64]


def keys_of(row_ids: Iterable[str]) -> Keys:
    """Hash row ids to 16 bytes each (blake2b-128), shape (rows,), dtype S16.

    128 bits because a collision would skip a row that was never embedded: at 10**9 rows the
    chance is below 10**-20, with 64 bits it would be 3 %.
    """
    digests = [hashlib.blake2b(i.encode(), digest_size=16).digest() for i in row_ids]
    return np.array(digests, dtype="S16")


def contents_of(hashes: Iterable[str | None]) -> Keys:
    """A column of content hashes (hex) as 16 bytes each, shape (rows,), dtype S16; null is none."""
    return np.array([bytes.fromhex(h or "") for h in hashes], dtype="S16")


def to_arrow(keys: Keys) -> pa.Array:
    """Keys as an Arrow array of 16 bytes each, not copied."""
    return pa.Array.from_buffers(pa.binary(16), len(keys), [None, pa.py_buffer(keys)])


def to_keys(column: pa.ChunkedArray) -> Keys:
    """What `to_arrow` made, as keys again."""
    chunk = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    return np.frombuffer(chunk.buffers()[1], dtype="S16")[chunk.offset :][: len(chunk)]


def first_halves(keys: Keys) -> _Halves:
    """The first 64 bits of each key as a number: its order is theirs, and comparing it is cheap."""
    return halves(keys)[0]


def halves(keys: Keys) -> tuple[_Halves, _Halves]:
    """Both halves of each key as numbers."""
    both = np.ascontiguousarray(keys).view(">u8").reshape(-1, 2).astype(np.uint64)
    return np.ascontiguousarray(both[:, 0]), np.ascontiguousarray(both[:, 1])


@dataclass(frozen=True)
class LeftOut:
    """Rows that were deleted and stay out: by their ids; or by their contents, where an id says no
    more than where a row was.
    """

    ids: Keys
    contents: Keys

    def __len__(self) -> int:
        return len(self.ids) + len(self.contents)

    def join(self, other: LeftOut) -> LeftOut:
        """Both."""
        return LeftOut(
            np.concatenate([self.ids, other.ids]), np.concatenate([self.contents, other.contents])
        )

    def covers(self, ids: Keys, contents: Keys) -> _Bools:
        """Which of some rows are among them, shape (rows,)."""
        by_content = RowIds(self.contents).contains(contents) & (contents != b"")
        return np.asarray(RowIds(self.ids).contains(ids) | by_content, dtype=np.bool_)


class RowIds:
    """Row ids, each with its content and the hash of what is carried where those are known: 40
    bytes a row, sorted by the first half of the id, membership by binary search. An id may be there
    several times, with other contents.
    """

    def __init__(
        self,
        keys: Keys | None = None,
        contents: Keys | None = None,
        carried: Hashes | None = None,
    ) -> None:
        self._sorted = _Sorted(keys_of([]), keys_of([]), np.empty(0, dtype=np.int64))
        self._recent: list[_Sorted] = []
        self._num_recent = 0
        if keys is not None:
            self.add(keys, contents, carried)

    def __len__(self) -> int:
        return len(self._sorted) + self._num_recent

    @property
    def nbytes(self) -> int:
        """Memory of the keys."""
        return sum(some.nbytes for some in (self._sorted, *self._recent))

    def contains(self, keys: Keys) -> _Bools:
        """Whether each key is in the set, shape (rows,)."""
        return self._look_up(keys)[0]

    def changed(self, keys: Keys, contents: Keys, carried: Hashes | None = None) -> _Bools:
        """Whether each key is in the set, and known to have another content or other carried
        values, shape (rows,).

        Of an id that is there several times, others than all of them.
        """
        if carried is None:
            carried = np.zeros(len(keys), dtype=np.int64)
        found, is_same = self._look_up(keys, contents, carried)
        return found & ~is_same

    def _look_up(
        self, keys: Keys, contents: Keys | None = None, carried: Hashes | None = None
    ) -> tuple[_Bools, _Bools]:
        """Whether each key is there; and whether with this content, or one that is not known."""
        found, is_same = (np.zeros(len(keys), dtype=np.bool_) for _ in range(2))
        for some in (self._sorted, *self._recent):
            for rows, at in some.find(keys):
                found[rows] = True
                if contents is not None and carried is not None:
                    known, hashes = some.contents[at], some.carried[at]
                    has_content = (known == b"") | (known == contents[rows])
                    # 0 is none, or one that is not known.
                    both = (hashes != 0) & (carried[rows] != 0)
                    is_same[rows] |= has_content & ~(both & (hashes != carried[rows]))
        return found, is_same

    def add(self, keys: Keys, contents: Keys | None = None, carried: Hashes | None = None) -> None:
        """Add keys, with their contents and hashes where those are known. Merged into the sorted
        array only once they amount to a tenth of it.
        """
        if contents is None:
            contents = np.zeros(len(keys), dtype="S16")
        if carried is None:
            carried = np.zeros(len(keys), dtype=np.int64)
        self._recent.append(_Sorted(keys, contents, carried))
        self._num_recent += len(keys)
        if self._num_recent * 10 > len(self._sorted) or len(self._recent) > 64:
            self._sorted = _Sorted.merge([self._sorted, *self._recent])
            self._recent, self._num_recent = [], 0


class _Sorted:
    """Keys in the order of their first halves, with their contents and hashes."""

    def __init__(self, keys: Keys, contents: Keys, carried: Hashes) -> None:
        self._sort(*halves(keys), contents, carried)

    def _sort(self, first: _Halves, rest: _Halves, contents: Keys, carried: Hashes) -> None:
        order = np.argsort(first)
        self._first, self._rest = first[order], rest[order]
        self.contents, self.carried = contents[order], carried[order]

    @classmethod
    def merge(cls, some: list[_Sorted]) -> _Sorted:
        merged = cls.__new__(cls)
        merged._sort(
            np.concatenate([s._first for s in some]),
            np.concatenate([s._rest for s in some]),
            np.concatenate([s.contents for s in some]),
            np.concatenate([s.carried for s in some]),
        )
        return merged

    def __len__(self) -> int:
        return len(self._first)

    @property
    def nbytes(self) -> int:
        arrays = (self._first, self._rest, self.contents, self.carried)
        return sum(a.nbytes for a in arrays)

    def find(self, keys: Keys) -> Iterable[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]]:
        """Which of some keys are here, and where; several times where they are so often here."""
        first, rest = halves(keys)
        at = np.searchsorted(self._first, first)
        rows = np.arange(len(keys))
        while len(rows):
            is_here = at < len(self._first)
            is_here[is_here] = self._first[at[is_here]] == first[rows[is_here]]
            rows, at = rows[is_here], at[is_here]
            is_whole = self._rest[at] == rest[rows]
            yield rows[is_whole], at[is_whole]
            at = at + 1
