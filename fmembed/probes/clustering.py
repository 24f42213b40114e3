"""k-means with as many clusters as labels, scored against the labels."""

from __future__ import annotations

from typing import Any

import numpy as np

from fmembed.probes.agreement import METRICS, agreement, shuffled_ami
from fmembed.probes.arrays import SEED, Ints
from fmembed.probes.data import Need, Sample, UnfitError, cheap_features

VERSION = 2
NEEDS: frozenset[Need] = frozenset(("labels",))


def run(sample: Sample) -> dict[str, Any]:
    """AMI, V-measure, NMI and ARI of the clusters of all rows, whatever their split.

    AMI comes first: V-measure and NMI grow with the number of labels, whatever the vectors say. Its
    competitor is no accuracy, but k-means on the cheap features.
    """
    data = sample.split_rows()
    if 2 * len(data.classes) > len(data.labels):
        # As a column of numbers: each row alone agrees with each row alone, which says nothing.
        raise UnfitError(
            f"{len(data.classes):,} labels for {len(data.labels):,} rows: needs two rows of a label"
        )
    found = cluster(data.vectors, len(data.classes))
    agreed = agreement(data.labels, found)
    scores = [{"metric": m, **agreed[m]} for m in METRICS]
    competitor = None
    features = cheap_features(data, np.ones(len(data.labels), dtype=np.bool_))
    if features is not None:
        competitor = agreement(data.labels, cluster(features, len(data.classes)))["AMI"]
    return {
        "scores": scores,
        "headline": scores[0],
        "baselines": {
            "majority": agreement(data.labels, np.zeros_like(found))["AMI"],
            "shuffled labels": shuffled_ami(data.labels, found),
            f"{data.cheap_name} + k-means": competitor,
        },
    }


def cluster(features: Any, num_clusters: int) -> Ints:
    """The cluster of each row by k-means, shape (rows,); features (rows, dim), dense or sparse."""
    from sklearn.cluster import KMeans

    kmeans = KMeans(min(num_clusters, features.shape[0]), n_init=5, random_state=SEED)
    return np.asarray(kmeans.fit_predict(features), dtype=np.int64)
