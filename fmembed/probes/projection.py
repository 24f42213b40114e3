"""A flat map of the vectors, for the eye: t-SNE on at most 3,000 rows. No score comes from it."""

from __future__ import annotations

import numpy as np

from fmembed.probes.arrays import SEED, Floats

MAX_ROWS = 3_000


def project(vectors: Floats) -> tuple[str, Floats]:
    """Lay vectors on a plane.

    Args:
        vectors: Shape (rows, dim).

    Returns:
        The method's name, and shape (rows, 2) float64: t-SNE from 50 rows on, PCA below, zeros
        for fewer than 3, or where all are the same.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    rows, dim = vectors.shape
    # A row that is not finite has no place, and the squares of huge numbers are infinite.
    vectors = np.where(np.isfinite(vectors).all(axis=1, keepdims=True), vectors, 0)
    vectors = vectors.astype(np.float64) / max(float(np.abs(vectors).max(initial=0)), 1e-300)
    # t-SNE divides by their spread, and its compiled code then ended the process.
    if rows < 3 or not np.ptp(vectors, axis=0).any():
        return "none", np.zeros((rows, 2))
    if rows < 50 or dim < 3:
        flat = PCA(min(2, dim), random_state=SEED).fit_transform(vectors)
        return "PCA", np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))
    reduced = PCA(min(50, dim, rows - 1), random_state=SEED).fit_transform(vectors)
    flat = TSNE(2, init="pca", perplexity=min(30.0, rows / 4), random_state=SEED).fit_transform(
        reduced
    )
    return "t-SNE", flat.astype(np.float64)
