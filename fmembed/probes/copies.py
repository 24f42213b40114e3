"""Rows that are copies of others: of their content, of their vector, or nearly of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmembed.probes.arrays import Floats, Ints
from fmembed.probes.data import Graph

# Vectors nearer than this are one, but for rounding.
_SAME = 1e-4
# Nearly a copy is what is this much nearer than the neighbours of rows are. Of articles with a word
# left out or a comma put in, by all-MiniLM-L6-v2, 0.13 finds 92 in 100 and 0.17 all; what it finds
# among the articles themselves are stories that were told twice.
_NEAR = 0.17
# The neighbour that says how near they are: of groups of fewer copies it is none of them.
_TYPICAL = 9
_MAX_GROUPS, _MAX_OF_GROUP = 10, 5


@dataclass(frozen=True)
class Copies:
    """Groups of rows, the largest first, as numbers of nodes of the graph.

    `repeated` have one content, `shared` unlike contents and one vector, `near` vectors nearer than
    `distance` and neither of the former.
    """

    graph: Graph
    repeated: list[Ints]
    shared: list[Ints]
    near: list[Ints]
    distance: float

    def findings(self) -> Iterator[dict[str, Any]]:
        """In words, with the first rows of the first groups."""
        for kind, groups, what in (
            ("copies", self.repeated, "have the content of another row"),
            ("same vector", self.shared, "share a vector, of unlike contents"),
            ("near copies", self.near, f"are nearly copies (cosine of {self.cosine:.4f} or more)"),
        ):
            if groups:
                num = sum(map(len, groups))
                words = f"{num:,} rows {what}, in {len(groups):,} groups"
                yield {"kind": kind, "words": words, "rows": self._named(groups)}

    def figures(self) -> list[dict[str, Any]]:
        """Of all kinds the number of rows; and from which cosine on rows are nearly copies."""
        kinds = ("copies", self.repeated), ("same vector", self.shared), ("near copies", self.near)
        counted = [{"name": f"rows, {n}", "value": sum(map(len, g))} for n, g in kinds]
        return [*counted, {"name": "cosine of near copies", "value": self.cosine}]

    @property
    def cosine(self) -> float:
        """From which on rows are nearly copies."""
        return 1 - self.distance**2 / 2

    def _named(self, groups: list[Ints]) -> list[list[str]]:
        return [[self.graph.row_ids[i] for i in g[:_MAX_OF_GROUP]] for g in groups[:_MAX_GROUPS]]


def find_copies(graph: Graph) -> Copies:
    """Find them, of more than one row of a table each."""
    near, far = graph.neighbours.rows, graph.neighbours.distances
    threshold = near_distance(far)
    num = len(graph.row_ids)
    from_, place = np.nonzero((far <= max(threshold, _SAME)) & (near >= 0))
    edges, lengths = np.stack([from_, near[from_, place]]), far[from_, place]
    # More copies of a content or a vector than a row has neighbours are linked by what they are.
    by_content = _linked(graph.contents)
    by_vector = _linked(_codes(graph.vectors))
    content = _groups(num, [by_content])
    same = _groups(num, [by_content, by_vector, edges[:, lengths <= _SAME]])
    like = _groups(num, [by_content, by_vector, edges])
    return Copies(
        graph,
        _listed(content),
        _listed(same, besides=content),
        _listed(like, besides=same),
        threshold,
    )


def near_distance(distances: Floats) -> float:
    """From which distance on rows are no near copies.

    How near unlike rows are depends on the model: of one they have a cosine of 0.3, of another of
    0.98. So it is a share of the distance that a row has to its tenth neighbour.

    Args:
        distances: Of rows to their nearest, ascending, shape (rows, k).
    """
    tenth = distances[:, min(_TYPICAL, distances.shape[1] - 1)]
    tenth = tenth[np.isfinite(tenth)]
    return float(_NEAR * np.median(tenth)) if len(tenth) else 0.0


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
