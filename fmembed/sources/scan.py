"""A look at all rows of a shard, of which only keys are kept: what a refresh begins with."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from fmembed.rows.columns import CARRIED, CONTENT_HASH, HIDES, ROW_ID, STAGE, TOTAL
from fmembed.rows.found import BAD, GOOD, FoundRows
from fmembed.rows.ids import contents_of, keys_of
from fmembed.sources.picks import KeysOnly, Pick
from fmembed.sources.reading import read_shard
from fmembed.sources.source import Shard, Source

Read = Callable[[Source, Shard, int, Pick], Iterator[pa.Table]]


def scan_shard(source: Source, shard: Shard, index: int, read: Read = read_shard) -> FoundRows:
    """Read a shard whole, and keep of each row its keys.

    Args:
        source: What it belongs to.
        shard: Which.
        index: Its number among the source's.
        read: How it is read.
    """
    found, num_rows = [], 0
    for rows in read(source, shard, index, KeysOnly()):
        if TOTAL in rows.schema.names:  # the marker
            continue
        n = rows.num_rows
        # Of a rejected row 0 is no more than that; the others count on from there.
        hides = rows[HIDES].fill_null(0).to_numpy()
        is_bad = np.asarray(rows[STAGE].is_valid(), dtype=np.bool_)
        found.append(
            FoundRows(
                keys_of(rows[ROW_ID].to_pylist()),
                contents_of(rows[CONTENT_HASH].to_pylist()),
                rows[CARRIED].fill_null(0).to_numpy(),
                np.where(is_bad, BAD + hides, GOOD).astype(np.int8),
                np.full(n, index, dtype=np.int32),
                np.arange(num_rows, num_rows + n),
            )
        )
        num_rows += n
    return FoundRows.join(found)
