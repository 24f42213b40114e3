"""Retrieval between rows (pictures, sounds) and their captions, after CLIP_benchmark.

A query counts as found at k when any of the items that belong to it is among the first k.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fmembed.probes.data import SEED, Bools, Floats, Ints, Need, Sample, bootstrap, normalized

VERSION = 1
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
    scores = [
        {"metric": f"recall {way}", "k": k, **_share(found < k)}
        for way, found in ranks.items()
        for k in _KS
        if k < (len(captions) if way == "row to caption" else len(rows)) or k == 1
    ]
    order = np.random.default_rng(SEED).permutation(len(captions))
    mixed = _best_ranks(rows, captions[order], pairs)
    # At random the first candidate is one of those that belong to the query.
    chance = float(np.bincount(pairs[:, 0]).mean() / len(captions))
    return {
        "scores": scores,
        "headline": scores[0],
        "baselines": {
            "chance": {"value": chance, "low": chance, "high": chance},
            "shuffled captions": _share(mixed < 1),
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


def _share(hits: Bools) -> dict[str, float]:
    return bootstrap(len(hits), lambda rows: float(np.mean(hits[rows])))
