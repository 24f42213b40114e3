"""Parts written anew: without the rows that are gone, and many small ones as one.

A reader of Parquet sees every row of a part, so one that is gone is taken out of it at once; and
what changes from week to week gathers in young parts by itself, as changed rows come in new ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fmembed.rows.columns import DUPLICATE, PARENT_ID, ROW_ID
from fmembed.rows.ids import Keys, RowIds, keys_of
from fmembed.table.files import REJECTED, Part
from fmembed.table.key_rows import KINDS
from fmembed.table.table import Table

# A part of which less is left than this share of `output.part_bytes` is small; so many of them are
# made one. A table that is refreshed each week gets a small part or two each time.
_SMALL_SHARE, _MANY_SMALL = 1 / 4, 8


@dataclass(frozen=True)
class Held:
    """A part, and how many of the source's rows in it there are, and are to stay."""

    path: str
    part: Part
    rows: int
    live: int

    @property
    def num_bytes(self) -> int:
        """About what its live rows take."""
        return self.part.size_bytes * self.live // max(self.rows, 1)


def plan_rewriting(parts: Sequence[Held], part_bytes: int) -> list[list[Held]]:
    """Which parts are to be written anew, those together that become one.

    Args:
        parts: Parts of one log, in the order of its rows.
        part_bytes: How large one may become.
    """
    small = [p for p in parts if p.live and p.num_bytes < part_bytes * _SMALL_SHARE]
    merges = len(small) >= _MANY_SMALL
    chosen = [p for p in parts if p.live < p.rows or (merges and p in small)]
    groups: list[list[Held]] = []
    num_bytes = part_bytes
    for part in chosen:
        if not part.live:  # goes as it is
            continue
        if num_bytes + part.num_bytes > part_bytes:
            groups.append([])
            num_bytes = 0
        groups[-1].append(part)
        num_bytes += part.num_bytes
    return groups


def rewrite(
    uri: str,
    parts: Sequence[Held],
    vectors: Sequence[str],
    stamp: Mapping[str, str],
    dead: Mapping[str, tuple[Keys, npt.NDArray[np.int8]]],
) -> Part:
    """Write the live rows of some parts of one log as one part.

    Args:
        uri: The table.
        parts: Which; of one log, and at least one row of them live.
        vectors: The columns of vectors.
        stamp: For the new part's footer.
        dead: By path the ids of the rows that are gone, and their kinds.

    Raises:
        DamagedError: A part is missing, or not as it was written.
    """
    table = Table(uri)
    is_rejected = parts[0].path.startswith(REJECTED)
    files = (table.rejected if is_rejected else table.rows).files
    # Another tool may have added a column, which older parts lack.
    schema_of = files.read_schema if is_rejected else table.schema_of
    schema = pa.unify_schemas([schema_of(held.part) for held in parts])
    pieces = _ahead(_live_rows(table, parts, dead, is_rejected))
    return files.write_pieces(pieces, schema, () if is_rejected else vectors, stamp)


def _ahead(pieces: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same, each read in a thread while the one before it is written."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, pieces, None)
        while (piece := coming.result()) is not None:
            coming = pool.submit(next, pieces, None)
            yield piece


def _live_rows(
    table: Table,
    parts: Sequence[Held],
    dead: Mapping[str, tuple[Keys, npt.NDArray[np.int8]]],
    is_rejected: bool,
) -> Iterator[pa.Table]:
    for held in parts:
        gone = dead.get(held.path)
        if is_rejected:
            rows = table.rejected.files.read_whole(held.part)
            yield rows if gone is None else _without(rows, *gone)
            continue
        ids = None if gone is None else RowIds(gone[0])
        for rows in table.read_pieces(held.part):
            if ids is None:
                yield rows
                continue
            name = PARENT_ID if PARENT_ID in rows.schema.names else ROW_ID
            yield rows.filter(pa.array(~ids.contains(keys_of(rows[name].to_pylist()))))


def _without(rows: pa.Table, ids: Keys, kinds: npt.NDArray[np.int8]) -> pa.Table:
    """Rejected rows without some; an id may be there several times, as twins are."""
    is_twin = (kinds == KINDS.index("twin")).tolist()
    left = Counter(zip(ids.tolist(), is_twin, strict=True))
    own = keys_of(rows[ROW_ID].to_pylist()).tolist()
    own_twin = pc.equal(rows["error"], DUPLICATE).to_pylist()
    stays = []
    for key in zip(own, own_twin, strict=True):
        stays.append(left[key] <= 0)
        left[key] -= 1
    return rows.filter(pa.array(stays))
