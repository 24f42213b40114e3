"""A config's manifest of each kind, as text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fmembed.errors import SpecError
from fmembed.manifest import kubernetes, launcher
from fmembed.manifest.job import dump
from fmembed.spec import RunSpec


@dataclass(frozen=True)
class _Kind:
    """`head` tells a reader of the file what he has to know, and cannot see in it."""

    documents: Callable[[RunSpec], list[dict[str, Any]]]
    head: str


_KINDS = {
    "rayjob": _Kind(
        kubernetes.rayjob,
        """\
# For KubeRay: kubectl apply -f FILE runs it once. An object that is there already is not run again:
# kubectl delete -f FILE first. What cluster.secret names has to be there.
""",
    ),
    "raycronjob": _Kind(
        kubernetes.raycronjob,
        """\
# For KubeRay 1.7 with its gate RayCronJob on, which is alpha and off by default: where it is off
# nothing ever starts, and --kind cronjob is for that. It has no concurrencyPolicy, and starts what
# was missed all at once: that two runs do not write one table is the table's lock's business.
""",
    ),
    "cronjob": _Kind(
        kubernetes.cronjob,
        """\
# For KubeRay without its gate RayCronJob: a CronJob whose pod makes a RayJob, waits for it and ends
# as it has ended. What cluster.secret names has to be there.
""",
    ),
    "cluster": _Kind(
        launcher.cluster,
        """\
# For Ray's cluster launcher: ray up FILE; ray dashboard FILE, and beside it
# ray job submit --working-dir . -- python jobs/refresh.py CONFIG --if-locked skip; ray down FILE.
# Written by fmembed manifest CONFIG --kind cluster.
""",
    ),
}
KINDS = tuple(_KINDS)


def write_manifest(spec: RunSpec, kind: str) -> str:
    """The file by which a config runs on a cluster.

    Args:
        spec: Its `cluster` says what machines.
        kind: `rayjob`, `raycronjob` and `cronjob` are for Kubernetes, `cluster` for Ray's launcher.

    Raises:
        SpecError: There is no such kind, no section `cluster`, it lacks what the kind needs, or the
            config cannot run on other machines.
    """
    if kind not in _KINDS:
        raise SpecError(f"--kind: takes {', '.join(KINDS)}, got {kind!a:.40}")
    if spec.cluster is None:
        raise SpecError(
            "cluster: missing; give at least cluster.name and cluster.provider "
            "(fmembed fields cluster lists the rest)"
        )
    return _KINDS[kind].head + dump(*_KINDS[kind].documents(spec))
