"""Retrieval between rows (pictures, sounds) and their captions, after CLIP_benchmark.

A query counts as found at k when any of the items that belong to it is among the first k.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fmembed.probes.arrays import Bools, Floats, Ints
from fmembed.probes.data import Need, Sample, normalized
from fmembed.probes.intervals import averaged, permutation_test

VERSION = 2
NEEDS: frozenset[Need] = frozenset(("captions",))
_KS = (1, 5, 10)
_CHUNK_ROWS = 1024


def run(sample: Sample) -> dict[str, Any]:
    """Recall at 1, 5 and 10, from rows to captions and back."""
    data = sample.captioned_rows()
    rows, row_at = _unique(data.vectors, data.row_codes)
    captions, caption_at = _unique(data.captions, data.caption_codes)
    pairs = np.unique(np.stack([row_at, caption_at], axis=1), axis=0)
    ranks = {
        "row to caption": _best_ranks(rows, captions, pairs),
        "caption to row": _best_ranks(captions, rows, pairs[:, ::-1]),
    }
    groups = _groups(pairs, len(rows), len(captions))
    scores = [
        {"metric": f"recall {way}", "k": k, **_share(found < k, groups[way])}
        for way, found in ranks.items()
        for k in _KS
        if k < (len(captions) if way == "row to caption" else len(rows)) or k == 1
    ]
    nearest = _nearest(rows, captions)
    # A pair as one number; they are sorted.
    own = pairs[:, 0] * len(captions) + pairs[:, 1]
    first = np.arange(len(rows)) * len(captions)

    def shuffle(rng: np.random.Generator) -> float:
        codes = first + rng.permutation(len(captions))[nearest]
        at = np.minimum(np.searchsorted(own, codes), len(own) - 1)
        return float((own[at] == codes).mean())

    # At random the first candidate is one of those that belong to the query.
    chance = float(np.bincount(pairs[:, 0]).mean() / len(captions))
    return {
        "scores": scores,
        "headline": scores[0],
        "baselines": {
            "chance": {"value": chance, "low": chance, "high": chance},
            "shuffled captions": permutation_test(
                float(np.mean(ranks["row to caption"] < 1)), shuffle
            ),
        },
    }


def _unique(vectors: Floats, codes: Ints) -> tuple[Floats, Ints]:
    """One normalised vector for each code, and where each row's is."""
    _, first, at = np.unique(codes, return_index=True, return_inverse=True)
    return normalized(vectors[first]), np.asarray(at, dtype=np.int64)


def _best_ranks(queries: Floats, candidates: Floats, pairs: Ints) -> Ints:
    """For each query the place of the first candidate that belongs to it; ties by their order."""
    best = np.full(len(queries), len(candidates), dtype=np.int64)
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    starts = np.searchsorted(pairs[:, 0], np.arange(len(queries) + 1))
    for start in range(0, len(queries), _CHUNK_ROWS):
        stop = min(start + _CHUNK_ROWS, len(queries))
        similarity = queries[start:stop] @ candidates.T
        own = pairs[starts[start] : starts[stop]]
        for query, candidate in own.tolist():
            row = similarity[query - start]
            mine = row[candidate]
            before: Bools = (row > mine) | ((row == mine) & (np.arange(len(row)) < candidate))
            best[query] = min(best[query], int(before.sum()))
    return best


def _nearest(queries: Floats, candidates: Floats) -> Ints:
    """For each query the place of the first candidate."""
    chunks = range(0, len(queries), _CHUNK_ROWS)
    found = [(queries[c : c + _CHUNK_ROWS] @ candidates.T).argmax(axis=1) for c in chunks]
    return np.concatenate(found).astype(np.int64)


def _groups(pairs: Ints, num_rows: int, num_captions: int) -> dict[str, Ints]:
    """By way, the group of each query: rows and captions that belong together, directly or not."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    size = num_rows + num_captions
    ends = (pairs[:, 0], num_rows + pairs[:, 1])
    _, group = connected_components(coo_matrix((np.ones(len(pairs)), ends), (size, size)))
    return {"row to caption": group[:num_rows], "caption to row": group[num_rows:]}


def _share(hits: Bools, groups: Ints) -> dict[str, float]:
    """The share of hits; the five captions of a picture are found or missed together."""
    value = float(hits.mean())
    _, group = np.unique(groups, return_inverse=True)
    moved = np.bincount(group, hits - value) / len(hits)
    return averaged(value, moved, len(moved))
