"""What a source holds, row by row, as keys: what a refresh compares with what the table holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from fmembed.rows.ids import Hashes, Keys, keys_of

# What is to be done with a row that was found: nothing; give it to the model; take the vector that
# its content has already; reject it, as another row has its id, or for what reading says of it.
# Where it has gone wrong and the table keeps what it had, nothing either, but it is said.
DONE, EMBED, COPY, TWIN, REJECT, KEPT = range(6)
# Whether a row was rejected as it was read; as one whose own id is not known; in place of all the
# rest of a file.
GOOD, BAD, BAD_ID, REST = range(4)

Shards = npt.NDArray[np.int32]
Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FoundRows:
    """Rows of a source, in the order in which it holds them; shapes (rows,).

    `ids`, `contents` and `carried` are as in `rows.ids`; `states` say whether they could be read,
    without which a row has no content. `shards` are numbers of the source's shards, `places` the
    rows' numbers in them, -1 where the shard was not read: its rows are known from the table.
    """

    ids: Keys
    contents: Keys
    carried: Hashes
    states: npt.NDArray[np.int8]
    shards: Shards
    places: Places

    @classmethod
    def empty(cls) -> FoundRows:
        """None."""
        none = np.empty(0, dtype=np.int64)
        states, shards = none.astype(np.int8), none.astype(np.int32)
        return cls(keys_of([]), keys_of([]), none, states, shards, none)

    @classmethod
    def join(cls, some: Sequence[FoundRows]) -> FoundRows:
        """One after another."""
        rows = [cls.empty(), *some]
        return cls(*(np.concatenate([getattr(r, f.name) for r in rows]) for f in fields(cls)))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, which: npt.NDArray[Any] | slice) -> FoundRows:
        """Those rows."""
        return FoundRows(*(getattr(self, f.name)[which] for f in fields(self)))
