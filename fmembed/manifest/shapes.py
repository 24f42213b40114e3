"""The fields that the check knows, and what each takes.

They are those that fmembed writes, and at the levels that are KubeRay's own the others of its
version 1.7 too. There the set is closed: an API server drops a field that it does not know without
a word, so that what somebody believes to hold does not. A pod has some hundred fields more, any of
which a user may add with reason: of those one is a fault only where it is a known one mistyped.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# What a field takes: a type; a mapping of fields; a list of one thing; ANY, or MAP of any names.
Shape = Any
ANY: Shape = object()
MAP: Shape = {}

_METADATA = {"name": str, "namespace": str, "labels": MAP, "annotations": MAP}
_RESOURCES = {"limits": ANY, "requests": ANY}
_KEY = {"name": str, "key": str, "optional": bool}
_FROM = {"secretKeyRef": _KEY, "configMapKeyRef": _KEY, "fieldRef": {"fieldPath": str}}
_CONTAINER = {
    "name": str,
    "image": str,
    "imagePullPolicy": str,
    "command": [str],
    "args": [str],
    "env": [{"name": str, "value": str, "valueFrom": _FROM}],
    "envFrom": [{"secretRef": {"name": str}, "configMapRef": {"name": str}}],
    "resources": _RESOURCES,
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool, "subPath": str}],
}
_POD = {
    "restartPolicy": str,
    "serviceAccountName": str,
    "terminationGracePeriodSeconds": int,
    "nodeSelector": MAP,
    "affinity": ANY,
    "tolerations": [{"key": str, "operator": str, "value": str, "effect": str}],
    "containers": [_CONTAINER],
    "volumes": [
        {
            "name": str,
            "configMap": {"name": str},
            "persistentVolumeClaim": {"claimName": str},
            "nfs": {"server": str, "path": str},
            "hostPath": {"path": str, "type": str},
        }
    ],
}
_TEMPLATE = {"metadata": ANY, "spec": _POD}
_GROUP = {"rayStartParams": MAP, "labels": MAP, "resources": MAP, "template": _TEMPLATE}
_CLUSTER = {
    "rayVersion": str,
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {
        "version": str,
        "idleTimeoutSeconds": int,
        **dict.fromkeys(
            (
                "args", "command", "env", "envFrom", "image", "imagePullPolicy", "resources",
                "securityContext", "upscalingMode", "volumeMounts",
            ),
            ANY,
        ),
    },
    "headGroupSpec": {
        **_GROUP,
        **dict.fromkeys(("enableIngress", "headService", "ingressOptions", "serviceType"), ANY),
    },
    "workerGroupSpecs": [
        {
            **_GROUP,
            "groupName": str,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "priority": int,
            "idleTimeoutSeconds": int,
            "numOfHosts": int,
            "suspend": bool,
            "scaleStrategy": ANY,
        }
    ],
    **dict.fromkeys(
        (
            "authOptions", "gcsFaultToleranceOptions", "headServiceAnnotations",
            "historyServerOptions", "managedBy", "networkPolicy", "suspend", "tlsOptions",
            "upgradeStrategy",
        ),
        ANY,
    ),
}  # fmt: skip
_JOB = {
    "entrypoint": str,
    "submissionMode": str,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "activeDeadlineSeconds": int,
    "preRunningDeadlineSeconds": int,
    "backoffLimit": int,
    "submitterConfig": {"backoffLimit": int},
    "rayClusterSpec": _CLUSTER,
    **dict.fromkeys(
        (
            "clusterSelector", "deletionStrategy", "entrypointNumCpus", "entrypointNumGpus",
            "entrypointResources", "jobId", "managedBy", "metadata", "runtimeEnvYAML",
            "submitterPodTemplate", "suspend",
        ),
        ANY,
    ),
}  # fmt: skip
_CRON = {
    "schedule": str,
    "timeZone": str,
    "suspend": bool,
    "concurrencyPolicy": str,
    "startingDeadlineSeconds": int,
    "successfulJobsHistoryLimit": int,
    "failedJobsHistoryLimit": int,
    "jobTemplate": {
        "metadata": ANY,
        "spec": {
            "backoffLimit": int,
            "activeDeadlineSeconds": int,
            "podFailurePolicy": ANY,
            "ttlSecondsAfterFinished": int,
            "template": _TEMPLATE,
        },
    },
}


def _document(**fields: Shape) -> Shape:
    return {"apiVersion": str, "kind": str, "metadata": _METADATA, **fields}


# By kind: the API's version, and the document.
DOCUMENTS: dict[str, tuple[str, Shape]] = {
    "RayJob": ("ray.io/v1", _document(spec=_JOB)),
    "RayCronJob": (
        "ray.io/v1",
        _document(spec={"schedule": str, "timeZone": str, "suspend": bool, "jobTemplate": _JOB}),
    ),
    "CronJob": ("batch/v1", _document(spec=_CRON)),
    "ConfigMap": ("v1", _document(data=MAP, immutable=bool)),
    "ServiceAccount": ("v1", _document()),
    "Role": ("rbac.authorization.k8s.io/v1", _document(rules=ANY)),
    "RoleBinding": ("rbac.authorization.k8s.io/v1", _document(roleRef=ANY, subjects=ANY)),
}
_TYPES = {str: "a text", int: "a whole number", bool: "true or false"}


@dataclass(frozen=True)
class Finding:
    """What is wrong, or, where it is no fault, what the check cannot say anything of."""

    where: str
    what: str
    is_fault: bool = True

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what


def misfits(
    value: Any, shape: Shape, where: str = "", *, is_closed: bool = True
) -> Iterator[Finding]:
    """Fields that are not known, and values of another type."""
    if shape is ANY or value is None:
        return
    if isinstance(shape, type):
        # To Python true is a number.
        if not isinstance(value, shape) or (shape is int and isinstance(value, bool)):
            hint = f": write '{value}'" if shape is str else ""
            yield Finding(where, f"takes {_TYPES[shape]}{hint}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield Finding(where, "takes a list")
            return
        for i, item in enumerate(value):
            yield from misfits(item, shape[0], f"{where}[{i}]", is_closed=is_closed)
    elif not isinstance(value, dict):
        yield Finding(where, "takes a mapping")
    elif shape is MAP:
        for name, item in value.items():
            if not isinstance(item, str):
                yield Finding(f"{where}.{name}", f"takes a text: write '{item}'")
    else:
        for name, item in value.items():
            at = f"{where}.{name}" if where else str(name)
            if name in shape:
                inside = is_closed and shape is not _TEMPLATE
                yield from misfits(item, shape[name], at, is_closed=inside)
            else:
                yield _unknown(str(name), list(shape), at, is_closed)


def _unknown(name: str, known: list[str], where: str, is_closed: bool) -> Finding:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7 if is_closed else 0.9)
    hint = f"did you mean {close[0]}?" if close else "remove it"
    if is_closed:
        return Finding(
            where, f"no field here; it would be dropped without a word, and hold nothing: {hint}"
        )
    if close:
        return Finding(where, f"no field here: {hint}")
    return Finding(where, "not known to this check", is_fault=False)
