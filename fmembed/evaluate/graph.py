"""The neighbour graph of a version's column: made once by Ray tasks, and kept beside the table.

All rows are looked through for the nearest of each of some, the same in every run: of a larger
table those with the smallest content hashes. Nothing but those and one part is in memory at a time,
and none of it in the driver's.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from fmembed import probes
from fmembed.arrays import Floats, Ints
from fmembed.evaluate.sample import to_floats
from fmembed.probes import Graph, Neighbours
from fmembed.rows.columns import CONTENT_HASH, ROW_ID
from fmembed.table.card import Card
from fmembed.table.table import Table

# Rows whose neighbours are looked for, at most; and products of rows, of which a core takes some
# 50 million of 384 numbers a second.
_MAX_QUERIES, _MIN_QUERIES, _MAX_PAIRS = 50_000, 2_000, 10_000_000_000
# Rows among which they are looked for, at most.
_MAX_ROWS = 1_000_000
# Of a task.
_QUERIES_EACH = 12_500
# Of vectors of length 1; rows of a kept graph that are looked for again, and what may differ then.
_FARTHEST, _CHECKED, _ROUNDING = 2.001, 50, 1e-4


@dataclass(frozen=True)
class _Which:
    """Of a version of a table the rows that are looked at, in the order of its parts: all, or those
    whose content hash begins with less than `below`.
    """

    uri: str
    version: int | None
    column: str
    card: Card
    below: int | None

    def blocks(self, columns: Sequence[str]) -> Iterator[tuple[Ints, pa.Table]]:
        """Part after part: the positions of its rows among all that are looked at, and columns."""
        table, start = Table.open(self.uri), 0
        for part in table.rows.parts(self.version):
            rows = table.read_part(part, list(dict.fromkeys([CONTENT_HASH, *columns])))
            if self.below is not None:
                rows = rows.filter(pa.array(_begin(rows) < self.below))
            yield np.arange(start, start + rows.num_rows), rows
            start += rows.num_rows

    def vectors(self) -> Iterator[tuple[Ints, Floats]]:
        """Part after part: positions and vectors of length 1, where there is such a vector."""
        for positions, rows in self.blocks([self.column]):
            vectors = to_floats(rows, self.column, self.card)
            usable = probes.is_usable(vectors)
            yield positions[usable], probes.normalized(vectors[usable])


@dataclass(frozen=True)
class _Queries:
    """Rows whose neighbours are looked for: their positions, ascending, and what they hold."""

    which: _Which
    positions: Ints
    row_ids: list[str]
    hashes: list[str]
    vectors: Floats
    num_rows: int


def start(table: Table, version: int | None, column: str, card: Card) -> Any:
    """Start the tasks that make the graph, or read it where it has been made before.

    Returns:
        A reference to the `probes.Graph`, or to why there is none.
    """
    task: Any = ray.remote(num_cpus=1)
    num_rows = sum(part.num_rows for part in table.rows.parts(version))
    if not num_rows:
        return ray.put("there is no row")
    num_among = min(num_rows, _MAX_ROWS)
    below = None if num_among == num_rows else int(2**32 * num_among / num_rows)
    which = _Which(table.uri, version, column, card, below)
    num = min(num_among, _MAX_QUERIES, max(_MIN_QUERIES, _MAX_PAIRS // max(num_among, 1)))
    queries = task(_choose).remote(which, num, num_rows)
    path = _path(table, version, column)
    if table.storage.size_bytes(path) is not None:
        return task(_load).remote(queries, path)
    found = [task(_search).remote(queries, at) for at in range(0, max(num, 1), _QUERIES_EACH)]
    return task(_join).remote(queries, path, *found)


def _begin(rows: pa.Table) -> Ints:
    """The first 32 bits of content hashes."""
    return np.array([int(h[:8], 16) for h in rows[CONTENT_HASH].to_pylist()], dtype=np.int64)


def _choose(which: _Which, num: int, num_rows: int) -> _Queries:
    hashes: list[str] = []
    for _, rows in which.blocks([]):
        hashes += rows[CONTENT_HASH].to_pylist()
    order = sorted(range(len(hashes)), key=lambda i: (hashes[i], i))[:num]
    positions = np.sort(np.array(order, dtype=np.int64))
    parts = []
    for at, rows in which.blocks([ROW_ID, which.column]):
        here = positions[(positions >= at[0]) & (positions <= at[-1])] if len(at) else at
        parts.append(rows.take(pa.array(here - (at[0] if len(at) else 0))))
    chosen = pa.concat_tables(parts)
    vectors = to_floats(chosen, which.column, which.card)
    ids, kept = chosen[ROW_ID].to_pylist(), chosen[CONTENT_HASH].to_pylist()
    return _Queries(which, positions, ids, kept, vectors, num_rows)


def _search(queries: _Queries, at: int) -> tuple[Ints, Neighbours]:
    """For as many queries from `at` on as a task has: their numbers, and their neighbours by
    position.
    """
    numbers = np.arange(at, min(at + _QUERIES_EACH, len(queries.positions)))
    numbers = numbers[probes.is_usable(queries.vectors[numbers])]
    unit = probes.normalized(queries.vectors[numbers])
    own = queries.positions[numbers]
    return numbers, probes.nearest(unit, own, queries.which.vectors())


def _join(queries: _Queries, path: str, *found: tuple[Ints, Neighbours]) -> Graph:
    """The graph; it is kept, too."""
    num = len(queries.positions)
    rows = np.full((num, probes.NUM_NEIGHBOURS), -1, dtype=np.int64)
    distances = np.full(rows.shape, np.inf, dtype=np.float32)
    for numbers, neighbours in found:
        rows[numbers], distances[numbers] = neighbours.rows, neighbours.distances
    others = np.setdiff1d(rows[rows >= 0], queries.positions)
    ids, hashes = list(queries.row_ids), list(queries.hashes)
    if len(others):
        for at, block in queries.which.blocks([ROW_ID]):
            here = others[(others >= at[0]) & (others <= at[-1])] if len(at) else at
            kept = block.take(pa.array(here - (at[0] if len(at) else 0)))
            ids += kept[ROW_ID].to_pylist()
            hashes += kept[CONTENT_HASH].to_pylist()
    # Positions become numbers of nodes: the queries come first, then the others.
    nodes = np.concatenate([queries.positions, others])
    order = np.argsort(nodes)
    places = order[np.minimum(np.searchsorted(nodes[order], rows), len(nodes) - 1)]
    rows = np.where(rows < 0, -1, places)
    _put(Table.open(queries.which.uri), path, ids, hashes, rows, distances)
    return _graph(queries, ids, hashes, rows, distances)


def _graph(
    queries: _Queries, ids: list[str], hashes: list[str], rows: Ints, distances: Floats
) -> Graph:
    contents = probes.codes(hashes)
    return Graph(ids, contents, queries.vectors, Neighbours(rows, distances), queries.num_rows)


def _path(table: Table, version: int | None, column: str) -> str:
    return f"_probes/{version or 0:08d}-graph-{column}-{table.digest(version)}.parquet"


def _put(
    table: Table, path: str, ids: list[str], hashes: list[str], rows: Ints, distances: Floats
) -> None:
    """Keep a graph, in place of that of another version."""
    k = rows.shape[1]
    more = len(ids) - len(rows)
    # Nodes that nobody looked from have no neighbours, and come last.
    far = np.concatenate([distances, np.full((more, k), np.inf, dtype=np.float32)])
    near = np.concatenate([rows, np.full((more, k), -1, dtype=np.int64)]).astype(np.int32)
    made = pa.table({
        ROW_ID: ids,
        CONTENT_HASH: hashes,
        "neighbours": pa.FixedSizeListArray.from_arrays(near.ravel(), k),
        "distances": pa.FixedSizeListArray.from_arrays(far.ravel(), k),
    })  # fmt: skip
    out = io.BytesIO()
    pq.write_table(made, out, compression="zstd")
    table.storage.put(path, out.getvalue())
    end = path.partition("-graph-")[2].rpartition("-")[0]
    for other in table.storage.sizes("_probes/"):
        if f"-graph-{end}-" in other and other != path and other.endswith(".parquet"):
            table.storage.delete(other)


def _load(queries: _Queries, path: str) -> Graph:
    """A graph that was kept, which anybody may have written; made anew where it is none."""
    num, k = len(queries.positions), probes.NUM_NEIGHBOURS
    try:
        table = Table.open(queries.which.uri)
        kept = pq.read_table(io.BytesIO(table.storage.get(path)))
        ids, hashes = kept[ROW_ID].to_pylist(), kept[CONTENT_HASH].to_pylist()
        rows, distances = (
            kept[name]
            .combine_chunks()
            .flatten()
            .to_numpy()
            .reshape(len(ids), k)[:num]
            .astype(type_)
            for name, type_ in (("neighbours", np.int64), ("distances", np.float32))
        )
        is_ours = ids[:num] == queries.row_ids and hashes[:num] == queries.hashes
        is_ours &= all(isinstance(text, str) for text in (*ids, *hashes))
        if is_ours and _is_whole(rows, distances, len(ids)) and _is_true(queries, rows, distances):
            return _graph(queries, ids, hashes, rows, distances)
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, AttributeError):
        pass
    found = [_search(queries, at) for at in range(0, max(num, 1), _QUERIES_EACH)]
    return _join(queries, path, *found)


def _is_whole(rows: Ints, distances: Floats, num_nodes: int) -> bool:
    """Whether these can be neighbours: other nodes, each once, the nearest first."""
    is_none, ordered = rows < 0, np.sort(rows, axis=1)
    is_twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    is_own = rows == np.arange(len(rows))[:, None]
    is_right = (rows >= -1) & (rows < num_nodes) & (is_none == np.isinf(distances)) & ~is_own
    is_right &= is_none | ((distances >= 0) & (distances <= _FARTHEST))
    is_after = distances[:, 1:] >= distances[:, :-1]
    return bool(is_right.all() and is_after.all() and not is_twice.any())


def _is_true(queries: _Queries, rows: Ints, distances: Floats) -> bool:
    """Whether some of the distances are those of the vectors, and no neighbour is kept back."""
    usable = np.flatnonzero(probes.is_usable(queries.vectors))
    if ((rows[usable] >= 0).sum(axis=1) < min(rows.shape[1], len(usable) - 1)).any():
        return False
    rng = np.random.default_rng()  # not to be foreseen
    some = rng.choice(usable, min(_CHECKED, len(usable)), replace=False)
    unit = probes.normalized(queries.vectors)
    found = probes.nearest(unit[some], some, [(usable, unit[usable])], 1)
    # The nearest of all is no farther than that of the queries alone.
    return bool((distances[some, 0] <= found.distances[:, 0] + _ROUNDING).all()) and bool(
        len(rows) < queries.num_rows
        or np.allclose(distances[some, 0], found.distances[:, 0], atol=_ROUNDING)
    )
