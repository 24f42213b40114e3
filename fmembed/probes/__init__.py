"""Probes: named, versioned protocols on plain arrays; no Ray, no torch.

A probe is a module with a VERSION, NEEDS and a `run`, as `data.Probe` says; PROBES names them all.
scikit-learn takes two seconds to import, so that is done where it computes: the driver only names
probes.
"""

from __future__ import annotations

import time
from typing import Any

from fmembed.probes import (
    cheap,
    classification,
    clustering,
    crossmodal,
    dinov2,
    fewshot,
    health,
    knn,
    linear,
    zeroshot,
)
from fmembed.probes.data import (
    MAX_ROWS,
    CaptionedRows,
    Graph,
    LabelledRows,
    Need,
    Probe,
    Sample,
    UnfitError,
    codes,
    compete,
    is_usable,
    label_rows,
    normalized,
)
from fmembed.probes.intervals import accuracy
from fmembed.probes.leaks import find_leaks
from fmembed.probes.neighbours import NUM_NEIGHBOURS, Neighbours, nearest
from fmembed.probes.projection import MAX_ROWS as MAX_MAP_ROWS
from fmembed.probes.projection import project
from fmembed.probes.zeroshot import TEMPLATES

__all__ = [
    "CHEAP",
    "MAX_MAP_ROWS",
    "MAX_ROWS",
    "NUM_NEIGHBOURS",
    "PROBES",
    "TEMPLATES",
    "CaptionedRows",
    "Graph",
    "LabelledRows",
    "Need",
    "Neighbours",
    "Sample",
    "accuracy",
    "codes",
    "compete",
    "find_leaks",
    "is_usable",
    "label_rows",
    "nearest",
    "normalized",
    "project",
    "run_probe",
]

# The names are those of `spec.ProbeName`.
PROBES: dict[str, Probe] = {
    "health": health,
    "knn": knn,
    "linear": linear,
    "clustering": clustering,
    "zeroshot": zeroshot,
    "crossmodal": crossmodal,
    "fewshot": fewshot,
    "linear@dinov2": dinov2,
    "classification@mteb": classification,
}
# Contents of pictures or sounds to (name, features).
CHEAP = {"image": cheap.pixels, "audio": cheap.spectrum}


def run_probe(name: str, sample: Sample) -> dict[str, Any]:
    """Run one probe.

    Args:
        name: A key of PROBES.
        sample: All that its NEEDS name.

    Returns:
        JSON: probe, version, num_train, num_test, seconds, and either `skipped` (why) or what
        `data.Probe.run` gives: scores, headline and baselines, or figures and findings.
    """
    probe = PROBES[name]
    started = time.monotonic()
    try:
        found = probe.run(sample)
    except UnfitError as e:
        found = {"skipped": str(e)}
    result = {"probe": name, "version": probe.VERSION, **sample.counts, **found}
    return {**result, "seconds": round(time.monotonic() - started, 2)}
