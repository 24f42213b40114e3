"""Probes: named, versioned protocols on plain arrays; no Ray, no torch.

Each probe module has a NAME, a VERSION and a `run`; PROBES names them all. scikit-learn takes
two seconds to import, so that is done where it computes: the driver only names probes.
"""

from __future__ import annotations

import time
from typing import Any

from fmembed.probes import cheap, clustering, crossmodal, knn, linear, zeroshot
from fmembed.probes.crossmodal import PairData
from fmembed.probes.data import MAX_ROWS, ProbeData, cheap_accuracy, make_probe_data
from fmembed.probes.projection import MAX_ROWS as MAX_MAP_ROWS
from fmembed.probes.projection import project
from fmembed.probes.zeroshot import TEMPLATES

__all__ = [
    "CHEAP",
    "MAX_MAP_ROWS",
    "MAX_ROWS",
    "PROBES",
    "TEMPLATES",
    "PairData",
    "ProbeData",
    "cheap_accuracy",
    "make_probe_data",
    "project",
    "run_probe",
]

PROBES = {module.NAME: module for module in (knn, linear, clustering, zeroshot, crossmodal)}
# Contents of pictures or sounds to (name, features).
CHEAP = {"image": cheap.pixels, "audio": cheap.spectrum}


def run_probe(name: str, data: ProbeData | PairData, *more: Any) -> dict[str, Any]:
    """Run one probe.

    Args:
        name: A key of PROBES.
        data: Labelled rows; for crossmodal, rows with captions.
        more: For zeroshot the vectors of the prompts, for crossmodal nothing, else what
            `cheap_accuracy` gave for the same rows.

    Returns:
        JSON: probe, version, num_train, num_test, seconds, and either `skipped` (why) or scores,
        headline and baselines, each score with its value and bootstrap 95 % interval (low, high).
    """
    module: Any = PROBES[name]
    started = time.monotonic()
    result: dict[str, Any] = {"probe": name, "version": module.VERSION}
    if isinstance(data, ProbeData):
        result["num_train"], result["num_test"] = int((~data.test).sum()), int(data.test.sum())
        result["num_classes"] = len(data.classes)
        # Zero-shot trains nothing: rows in the test split are enough.
        why_not = data.why_not_zeroshot if name == zeroshot.NAME else data.why_not
    else:
        result["num_train"], result["num_test"] = 0, len(data.vectors)
        why_not = data.why_not
    result |= {"skipped": why_not} if why_not is not None else module.run(data, *more)
    return {**result, "seconds": round(time.monotonic() - started, 2)}
