"""Probes: named, versioned protocols on plain arrays; no Ray, no torch.

Each probe module has a NAME, a VERSION and `run(data, tfidf)`; PROBES names them all.
"""

from __future__ import annotations

import time
from typing import Any

from fmembed.probes import clustering, knn, linear
from fmembed.probes.data import MAX_ROWS, ProbeData, make_probe_data, tfidf_accuracy
from fmembed.probes.projection import MAX_ROWS as MAX_MAP_ROWS
from fmembed.probes.projection import project

__all__ = [
    "MAX_MAP_ROWS",
    "MAX_ROWS",
    "PROBES",
    "ProbeData",
    "make_probe_data",
    "project",
    "run_probe",
    "tfidf_accuracy",
]

PROBES = {module.NAME: module for module in (knn, linear, clustering)}


def run_probe(name: str, data: ProbeData, tfidf: dict[str, float] | None) -> dict[str, Any]:
    """Run one probe.

    Args:
        name: A key of PROBES.
        data: Labelled rows.
        tfidf: What `tfidf_accuracy` gave for the same rows.

    Returns:
        JSON: probe, version, num_train, num_test, seconds, and either `skipped` (why) or scores,
        headline and baselines, each score with its value and bootstrap 95 % interval (low, high).
    """
    module = PROBES[name]
    started = time.monotonic()
    if data.why_not is not None:
        result: dict[str, Any] = {"skipped": data.why_not}
    else:
        result = module.run(data, tfidf)
    return {
        "probe": name,
        "version": module.VERSION,
        "num_train": int((~data.test).sum()),
        "num_test": int(data.test.sum()),
        "num_classes": len(data.classes),
        "seconds": round(time.monotonic() - started, 2),
        **result,
    }
