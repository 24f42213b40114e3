"""Which rows are known, and with which content: their ids and contents as keys of 16 bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.bytes_]


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


class RowIds:
    """A set of row ids, each with its content where that is known: 32 bytes a row, sorted by id,
    membership by binary search.
    """

    def __init__(self, keys: Keys | None = None, contents: Keys | None = None) -> None:
        self._keys = self._contents = np.empty(0, dtype="S16")
        self._recent: list[tuple[Keys, Keys]] = []
        self._num_recent = 0
        if keys is not None:
            self.add(keys, contents)

    def __len__(self) -> int:
        return len(self._keys) + self._num_recent

    @property
    def nbytes(self) -> int:
        """Memory of the keys."""
        return sum(int(a.nbytes) for some in self._all for a in some)

    @property
    def _all(self) -> list[tuple[Keys, Keys]]:
        return [(self._keys, self._contents), *self._recent]

    def contains(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Whether each key is in the set, shape (rows,)."""
        found = np.zeros(len(keys), dtype=np.bool_)
        for known, _ in self._all:
            found |= _find(known, keys)[1]
        return found

    def changed(self, keys: Keys, contents: Keys) -> npt.NDArray[np.bool_]:
        """Whether each key is in the set, and known to have another content, shape (rows,)."""
        changed = np.zeros(len(keys), dtype=np.bool_)
        for known, known_contents in self._all:
            at, is_known = _find(known, keys)
            before = known_contents[at[is_known]]
            changed[is_known] |= (before != b"") & (before != contents[is_known])
        return changed

    def add(self, keys: Keys, contents: Keys | None = None) -> None:
        """Add keys, with their contents where those are known. Merged into the sorted array only
        once they amount to a tenth of it.
        """
        if contents is None:
            contents = np.zeros(len(keys), dtype="S16")
        self._recent.append(_sort(keys, contents))
        self._num_recent += len(keys)
        if self._num_recent * 10 > len(self._keys) or len(self._recent) > 64:
            keys, contents = (np.concatenate(arrays) for arrays in zip(*self._all, strict=True))
            self._keys, self._contents = _sort(keys, contents)
            self._recent, self._num_recent = [], 0

    def forget_contents(self, keys: Keys) -> None:
        """Take the contents of some rows for unknown: of ids that several rows have."""
        for known, contents in self._all:
            at, is_known = _find(known, keys)
            contents[at[is_known]] = b""


def _sort(keys: Keys, contents: Keys) -> tuple[Keys, Keys]:
    order = np.argsort(keys)
    return keys[order], contents[order]


def _find(known: Keys, keys: Keys) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
    """Where each key is among sorted ones, and whether it is."""
    if not len(known):
        return np.zeros(len(keys), dtype=np.intp), np.zeros(len(keys), dtype=np.bool_)
    at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return at, known[at] == keys
