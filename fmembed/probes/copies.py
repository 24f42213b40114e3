"""Rows that are copies of others: of their content, of their vector, or nearly of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmembed.probes.arrays import Bools, Floats, Ints
from fmembed.probes.data import Graph, is_usable

# Vectors nearer than this are one, but for rounding.
_SAME = 1e-5
# And as long as this.
_LENGTH = 1e-3
# Nearly a copy is what is this much nearer than the farthest of 30 neighbours. Of articles with a
# word left out or a comma put in, by all-MiniLM-L6-v2, 0.13 finds 92 in 100 and 0.17 all; what it
# finds among the articles themselves are stories that were told twice.
_NEAR = 0.17
# So many pairs of all rows may be that near by chance: of few dimensions many are.
_BY_CHANCE = 0.5
_MAX_GROUPS, _MAX_OF_GROUP = 10, 5


@dataclass(frozen=True)
class Copies:
    """Groups of rows, the largest first, as numbers of nodes of the graph.

    `repeated` have one content, `shared` unlike contents and one vector, `near` vectors that are
    nearly one and neither of the former, with a cosine of `cosine` at least. `same` has one number
    for rows of one content or vector, shape (nodes,).
    """

    graph: Graph
    repeated: list[Ints]
    shared: list[Ints]
    near: list[Ints]
    cosine: float
    same: Ints

    def findings(self) -> Iterator[dict[str, Any]]:
        """In words, with the first rows of the first groups."""
        for kind, groups, what in (
            ("copies", self.repeated, "have the content of another row"),
            ("same vector", self.shared, "share a vector, of unlike contents"),
            ("near copies", self.near, f"are nearly copies (cosine of {self.cosine:.6f} or more)"),
        ):
            if groups:
                num = sum(map(len, groups))
                in_groups = f"in {len(groups):,} group{'' if len(groups) == 1 else 's'}"
                words = f"{num:,} rows {what}, {in_groups}"
                yield {"kind": kind, "words": words, "rows": self._named(groups)}

    def figures(self) -> list[dict[str, Any]]:
        """Of all kinds the number of rows; and from which cosine on rows are nearly copies."""
        kinds = ("copies", self.repeated), ("same vector", self.shared), ("near copies", self.near)
        counted = [{"name": f"rows, {n}", "value": sum(map(len, g))} for n, g in kinds]
        return [*counted, {"name": "cosine of near copies", "value": self.cosine}]

    def _named(self, groups: list[Ints]) -> list[list[str]]:
        """The ids of the first, whatever the order of the rows."""
        named = [sorted(self.graph.row_ids[i] for i in group) for group in groups]
        named.sort(key=lambda ids: (-len(ids), ids))
        return [ids[:_MAX_OF_GROUP] for ids in named[:_MAX_GROUPS]]


def find_copies(graph: Graph) -> Copies:
    """Find them, of more than one row of a table each."""
    near, far = graph.neighbours.rows, graph.neighbours.distances
    num = len(graph.row_ids)
    from_, place = np.nonzero(is_near(far, near) & (near >= 0))
    edges, lengths = np.stack([from_, near[from_, place]]), far[from_, place]
    # More copies of a content or a vector than a row has neighbours are linked by what they are.
    by_content = _linked(graph.contents)
    usable = np.flatnonzero(is_usable(graph.vectors))
    by_vector = usable[_linked(_codes(graph.vectors[usable]))]
    content = _groups(num, [by_content])
    is_one = (lengths <= _SAME) & _is_as_long(graph.vectors, edges)
    same = _groups(num, [by_content, by_vector, edges[:, is_one]])
    like = _groups(num, [by_content, by_vector, edges])
    return Copies(
        graph,
        _listed(content),
        _listed(same, besides=content),
        _listed(like, besides=same),
        1 - float(lengths.max(initial=0.0)) ** 2 / 2,
        same,
    )


def is_near(distances: Floats, neighbours: Ints | None = None) -> Bools:
    """Which neighbours are nearly the row itself, shape (rows, k).

    How near unlike rows are depends on the model, and on where they lie: of one they have a cosine
    of 0.3, of another of 0.98. So it is a share of the distance to the farthest neighbour of a row;
    a smaller one where so many rows of so few dimensions would be that near by chance.

    Args:
        distances: Of rows to their nearest, ascending, shape (rows, k); infinite where there is
            none.
        neighbours: Which those are among the rows; other numbers are of no row. Without them all
            rows are taken to lie in as many dimensions.
    """
    is_there = np.isfinite(distances)
    farthest = np.where(is_there, distances, 0).max(axis=1, initial=0)
    flatness = _flatness(distances, neighbours)
    num_pairs = max(distances.size, 1)
    share = np.minimum(_NEAR, np.exp(flatness * np.log(_BY_CHANCE / num_pairs)))
    return np.asarray(is_there & (distances <= np.maximum(share * farthest, _SAME)[:, None]))


def _flatness(distances: Floats, neighbours: Ints | None) -> Floats:
    """One over the number of dimensions that rows lie in, shape (rows,): by how much farther the
    last neighbour is than the one two thirds of the way, so that copies change little of it; the
    mean of a row and its neighbours. 0 where nothing can be said.
    """
    rows, k = distances.shape
    inner = max(2 * k // 3, 1)
    if k < 3:
        return np.zeros(rows)
    one, last = distances[:, inner - 1].astype(np.float64), distances[:, -1].astype(np.float64)
    is_told = np.isfinite(last) & (one > _SAME)
    logs = np.zeros(rows)
    logs[is_told] = np.log(last[is_told] / one[is_told])
    if neighbours is None:
        logs[:] = float(np.median(logs[is_told])) if is_told.any() else 0.0
    else:
        is_row = (neighbours >= 0) & (neighbours < rows)
        near = np.where(is_row, neighbours, 0)
        weight = is_row & is_told[near]
        total = logs * is_told + (logs[near] * weight).sum(axis=1)
        logs = total / np.maximum(is_told + weight.sum(axis=1), 1)
    return np.asarray(logs / np.log(k / inner))


def _is_as_long(vectors: Floats, edges: Ints) -> Bools:
    """Whether both ends of a link are as long, shape (links,); of a node whose vector is not at
    hand that is taken for granted.
    """
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    found = np.ones(edges.shape[1], dtype=np.bool_)
    both = (edges < len(vectors)).all(axis=0)
    one, other = lengths[edges[0, both]], lengths[edges[1, both]]
    found[both] = np.abs(one - other) <= _LENGTH * np.maximum(one, other)
    return found


def _codes(vectors: Floats) -> Ints:
    """Equal vectors have one number, shape (rows,)."""
    whole = np.ascontiguousarray(vectors)
    rows = whole.view(np.dtype((np.void, whole.dtype.itemsize * whole.shape[1]))).ravel()
    return np.asarray(np.unique(rows, return_inverse=True)[1], dtype=np.int64)


def _linked(codes: Ints) -> Ints:
    """Each with the next one of the same code, shape (2, links)."""
    order = np.argsort(codes, kind="stable")
    is_same = codes[order][1:] == codes[order][:-1]
    return np.stack([order[:-1][is_same], order[1:][is_same]])


def _groups(num: int, links: Iterable[Ints]) -> Ints:
    """Which group each of `num` nodes is in, by links, shape (num,)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    one, other = np.concatenate(list(links), axis=1)
    matrix = coo_array((np.ones(len(one), dtype=np.int8), (one, other)), shape=(num, num))
    return np.asarray(connected_components(matrix, directed=False)[1], dtype=np.int64)


def _listed(groups: Ints, besides: Ints | None = None) -> list[Ints]:
    """Groups of two nodes and more, the largest first; of those `besides` a group counts only where
    it joins several, and then one node of each.
    """
    nodes = np.arange(len(groups))
    if besides is not None:
        nodes = np.unique(besides, return_index=True)[1]
    own = groups[nodes]
    order = np.argsort(own, kind="stable")
    found = np.split(nodes[order], np.flatnonzero(np.diff(own[order])) + 1)
    return sorted((g for g in found if len(g) > 1), key=lambda g: (-len(g), int(g[0])))
