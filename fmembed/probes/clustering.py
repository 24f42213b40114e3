"""k-means with as many clusters as labels, scored against the labels."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from fmembed.probes.data import SEED, Ints, Need, Sample, bootstrap, cheap_features, shuffled

VERSION = 1
NEEDS: frozenset[Need] = frozenset(("labels",))
_METRICS = ("V-measure", "NMI", "ARI")
_NUM_BOOTSTRAP = 200


def run(sample: Sample) -> dict[str, Any]:
    """V-measure, NMI and ARI of the clusters of all rows, whatever their split.

    Its competitor is no accuracy, but k-means on the cheap features.
    """
    data = sample.split_rows()
    found = _cluster(data.vectors, len(data.classes))
    scores = [{"metric": m, **_score(m, data.labels, found)} for m in _METRICS]
    competitor = None
    features = cheap_features(data, np.ones(len(data.labels), dtype=np.bool_))
    if features is not None:
        competitor = _score("V-measure", data.labels, _cluster(features, len(data.classes)))
    return {
        "scores": scores,
        "headline": scores[0],
        "baselines": {
            "majority": _score("V-measure", data.labels, np.zeros_like(found)),
            "shuffled labels": _score("V-measure", shuffled(data.labels), found),
            f"{data.cheap_name} + k-means": competitor,
        },
    }


def _cluster(features: Any, num_clusters: int) -> Ints:
    from sklearn.cluster import KMeans

    kmeans = KMeans(min(num_clusters, features.shape[0]), n_init=5, random_state=SEED)
    return np.asarray(kmeans.fit_predict(features), dtype=np.int64)


def _score(metric: str, truth: Ints, found: Ints) -> dict[str, float]:
    from sklearn import metrics

    if metric == "V-measure":
        score = metrics.v_measure_score
    elif metric == "NMI":
        # With the arithmetic mean it is the V-measure; the geometric mean is the other one in use.
        score = functools.partial(metrics.normalized_mutual_info_score, average_method="geometric")
    else:
        score = metrics.adjusted_rand_score
    return bootstrap(
        len(truth), lambda rows: float(score(truth[rows], found[rows])), num_samples=_NUM_BOOTSTRAP
    )
