"""The exact nearest neighbours of rows: much of what a table is can be told by them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fmembed.probes.arrays import Floats, Ints

NUM_NEIGHBOURS = 30


@dataclass(frozen=True)
class Neighbours:
    """The nearest of some rows, the nearest first, and none its own.

    Shapes: `rows` (queries, k) positions, -1 where there are not so many; `distances` (queries, k)
    float32, Euclidean between vectors of length 1, infinite there. A cosine is 1 - distance^2 / 2:
    near 1 a float32 could not tell one from another.
    """

    rows: Ints
    distances: Floats

    @property
    def cosines(self) -> Floats:
        """Shape (queries, k) float64; -inf where there are not so many."""
        return np.asarray(1 - self.distances.astype(np.float64) ** 2 / 2)


def nearest(
    queries: Floats,
    own: Ints,
    blocks: Iterable[tuple[Ints, Floats]],
    k: int = NUM_NEIGHBOURS,
) -> Neighbours:
    """Look for the k nearest of each query among rows that come a block at a time.

    scikit-learn's brute force computes distances of float32 in float64, so that what is nearer is
    so by more than rounding; of equally near ones the first positions are kept. Memory: a block,
    and k + 1 neighbours of all queries.

    Args:
        queries: Rows of length 1, shape (queries, dim) float32.
        own: Their positions, shape (queries,); a row is not its own neighbour.
        blocks: Positions, shape (rows,), and rows of length 1, shape (rows, dim) float32.
        k: How many.
    """
    from sklearn.neighbors import NearestNeighbors

    num = len(queries)
    rows = np.full((num, k), -1, dtype=np.int64)
    distances = np.full((num, k), np.inf, dtype=np.float64)
    for positions, vectors in blocks:
        if not len(positions) or not num:
            continue
        index = NearestNeighbors(algorithm="brute").fit(vectors)
        near, at = index.kneighbors(queries, min(k + 1, len(vectors)))
        found = positions[at]
        near = np.where(found == own[:, None], np.inf, near)
        both = np.concatenate([distances, near], axis=1)
        of_both = np.concatenate([rows, np.where(np.isinf(near), -1, found)], axis=1)
        order = np.lexsort((of_both, both), axis=1)[:, :k]
        rows = np.take_along_axis(of_both, order, axis=1)
        distances = np.take_along_axis(both, order, axis=1)
    return Neighbours(rows, distances.astype(np.float32))
