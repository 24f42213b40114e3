"""Which rows of a shard a reader hands on: those that are new, those that were chosen, or keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fmembed.rows.columns import (
    CARRIED,
    CONTENT_HASH,
    COPIED,
    DUPLICATE,
    HIDES,
    ROW_ID,
    STAGE,
    TWIN,
    reject,
)
from fmembed.rows.found import COPY, FoundRows, Places
from fmembed.rows.found import TWIN as IS_TWIN
from fmembed.rows.ids import Hashes, Keys, LeftOut, RowIds, contents_of, keys_of


class Pick(Protocol):
    """What is handed on of one shard."""

    @property
    def places(self) -> Places | None:
        """The numbers of the rows that may be handed on; None where that is for each to show."""

    def __call__(self, places: Places, rows: pa.Table) -> pa.Table:
        """Some of these rows of `columns.row_schema`, whose numbers are given, shape (rows,)."""

    def counts(self) -> tuple[int, int]:
        """Rows that were known, and how many of those are others by now."""


class NotKnown:
    """Rows that the table has neither embedded nor rejected; others are compared with it."""

    places = None

    def __init__(self, known: RowIds, out: LeftOut | None = None) -> None:
        """Prepare.

        Args:
            known: The rows that the table knows, and ids of what was deleted.
            out: What was deleted.
        """
        self._known, self._out = known, out
        self._num_skipped = 0
        # Known ids whose content here is that of the table, and those where it is another: of rows
        # that have one id, of which the first is in the table, neither has changed.
        self._same, self._other = [keys_of([])], [keys_of([])]

    def __call__(self, places: Places, rows: pa.Table) -> pa.Table:
        """As for `Pick`."""
        keys, contents, carried = _keys_of(rows)
        done = self._known.contains(keys)
        if self._out is not None and len(self._out.contents):
            done |= self._out.covers(keys, contents)
        is_other = self._known.changed(keys, contents, carried)
        self._num_skipped += int(done.sum())
        self._other.append(keys[is_other])
        self._same.append(keys[done & ~is_other])
        return rows.filter(pa.array(~done))

    def counts(self) -> tuple[int, int]:
        """As for `Pick`."""
        changed = np.setdiff1d(np.concatenate(self._other), np.concatenate(self._same))
        return self._num_skipped, len(changed)


@dataclass(frozen=True)
class ChosenRows:
    """Rows that were found and are to be read, each with its fate; sorted by shard and place."""

    rows: FoundRows
    fates: npt.NDArray[np.int8]

    @classmethod
    def of(cls, rows: FoundRows, fates: npt.NDArray[np.int8]) -> ChosenRows:
        """Of rows in any order."""
        order = np.lexsort((rows.places, rows.shards))
        return cls(rows[order], fates[order])

    def of_shard(self, shard: int) -> ChosenRows:
        """Those of one shard."""
        start, stop = np.searchsorted(self.rows.shards, [shard, shard + 1])
        return ChosenRows(self.rows[start:stop], self.fates[start:stop])


class Chosen:
    """Rows that were chosen when the source was looked at: the same, at the same places.

    A row that is another by then is left out, and counted as changed: it was not compared.
    """

    def __init__(self, chosen: ChosenRows, shard: int) -> None:
        self._chosen = chosen.of_shard(shard)
        self._num_seen = self._num_changed = 0

    @property
    def places(self) -> Places:
        """As for `Pick`."""
        return self._chosen.rows.places

    def __call__(self, places: Places, rows: pa.Table) -> pa.Table:
        """As for `Pick`."""
        picked = rows.filter(pa.array(np.isin(places, self.places)))
        at = np.flatnonzero(np.isin(self.places, places))
        self._num_seen += len(at)
        chosen, fates = self._chosen.rows[at], self._chosen.fates[at]
        keys, contents, _ = _keys_of(picked)
        is_same = (keys == chosen.ids) & (contents == chosen.contents)
        self._num_changed += int((~is_same).sum())
        picked, fates = picked.filter(pa.array(is_same)), fates[is_same]
        copied = pa.array(np.ones(len(fates), dtype=np.bool_), mask=fates != COPY)
        column = picked.schema.get_field_index(COPIED)
        picked = picked.set_column(column, picked.schema.field(column), copied)
        twins = np.flatnonzero(fates == IS_TWIN).tolist()
        return reject(picked, "write", dict.fromkeys(twins, (DUPLICATE, TWIN)))

    def counts(self) -> tuple[int, int]:
        """As for `Pick`; what is not there any more has changed as well."""
        num_gone = len(self._chosen.fates) - self._num_seen
        return 0, self._num_changed + num_gone


class KeysOnly:
    """All rows, without what is in them."""

    places = None

    def __call__(self, places: Places, rows: pa.Table) -> pa.Table:
        """As for `Pick`; with some of the columns."""
        return rows.select([ROW_ID, CONTENT_HASH, CARRIED, STAGE, HIDES])

    def counts(self) -> tuple[int, int]:
        """As for `Pick`."""
        return 0, 0


def _keys_of(rows: pa.Table) -> tuple[Keys, Keys, Hashes]:
    return (
        keys_of(rows[ROW_ID].to_pylist()),
        contents_of(rows[CONTENT_HASH].to_pylist()),
        rows[CARRIED].fill_null(0).to_numpy(),
    )
