"""Zero-shot classification by a text tower, after CLIP_benchmark's zeroshot_classification.py.

Each template is filled with each class and embedded, normalised, averaged over the templates, and
normalised again; a row goes to the class whose vector is nearest.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fmembed.probes.arrays import Floats, Ints
from fmembed.probes.data import Need, Sample, majority, normalized
from fmembed.probes.intervals import accuracy, mean_by_class, shuffled_accuracy

VERSION = 2
NEEDS: frozenset[Need] = frozenset(("labels", "prompts"))
TEMPLATES = {
    "image": ("a photo of a {}.", "a picture of the {}.", "an image of one {}."),
    "audio": ("this is a sound of {}.", "the sound of {}.", "a recording of {}."),
    "text": ("{}",),
}
_SCALE = 100.0


def run(sample: Sample) -> dict[str, Any]:
    """Accuracy among the first 1 and 5, and mean recall by class.

    On the test split where the dataset names one, else on all labelled rows: nothing is trained, so
    no row has to be kept back.
    """
    data, prompts = sample.labelled_rows(), sample.prompts
    assert prompts is not None
    rows = data.test if data.named_split else np.ones_like(data.test)
    truth = data.labels[rows]
    vectors = normalized(data.vectors[rows])
    logits = _SCALE * vectors @ class_vectors(prompts).T
    predicted = np.asarray(logits.argmax(axis=1), dtype=np.int64)
    scores = [{"metric": "accuracy", "k": 1, **accuracy(truth, predicted)}]
    if len(data.classes) > 5:
        # A stable sort: of equal classes the first.
        first = np.argsort(-logits, axis=1, kind="stable")[:, :5]
        hits = (first == truth[:, None]).any(axis=1)
        scores.append({"metric": "accuracy", "k": 5, **accuracy(hits, np.ones_like(hits))})
    scores.append({"metric": "mean recall by class", **mean_by_class(truth, predicted, "recall")})
    single = (vectors @ class_vectors(prompts[:, :1]).T).argmax(axis=1)
    return {
        "scores": scores,
        "headline": scores[0],
        "num_test": len(truth),
        "num_train": 0,
        "baselines": {
            "majority": majority(data) if data.named_split else _most_frequent(truth),
            "shuffled labels": shuffled_accuracy(truth, predicted),
            "first template alone": accuracy(truth, single),
        },
    }


def class_vectors(prompts: Floats) -> Floats:
    """One vector a class, shape (classes, dim)."""
    return normalized(normalized(prompts).mean(axis=1))


def _most_frequent(truth: Ints) -> dict[str, float]:
    return accuracy(truth, np.full_like(truth, np.bincount(truth).argmax()))
