"""Which rows are known: their ids as keys of 16 bytes."""

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


class RowIds:
    """A set of row ids as sorted 16-byte keys: 16 bytes a row, membership by binary search."""

    def __init__(self, keys: Keys | None = None) -> None:
        self._keys: Keys = np.sort(keys) if keys is not None else np.empty(0, dtype="S16")
        self._recent: list[Keys] = []
        self._num_recent = 0

    def __len__(self) -> int:
        return len(self._keys) + self._num_recent

    @property
    def nbytes(self) -> int:
        """Memory of the keys."""
        return int(self._keys.nbytes) + sum(int(keys.nbytes) for keys in self._recent)

    def contains(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Whether each key is in the set, shape (rows,)."""
        found = np.zeros(len(keys), dtype=np.bool_)
        for known in (self._keys, *self._recent):
            if len(known):
                at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
                found |= known[at] == keys
        return found

    def add(self, keys: Keys) -> None:
        """Add keys. Merged into the sorted array only once they amount to a tenth of it."""
        self._recent.append(np.sort(keys))
        self._num_recent += len(keys)
        if self._num_recent * 10 > len(self._keys) or len(self._recent) > 64:
            self._keys = np.sort(np.concatenate([self._keys, *self._recent]))
            self._recent, self._num_recent = [], 0
