"""RayJob, RayCronJob, and a CronJob that makes RayJobs: of KubeRay 1.7, and what Ray 2.60 does.

One job is one cluster: it comes up with a head alone, fetches workers from none, and goes with the
job. That a run is not doubled is the table's lock's business; nothing here can promise it.
"""

from __future__ import annotations

import copy
from typing import Any

from fmembed.cluster_spec import RAY_VERSION, ClusterSpec, nfs_of, toleration
from fmembed.errors import SpecError
from fmembed.manifest.job import (
    CONFIG_FOLDER,
    CONFIG_NAME,
    command_line,
    config_of_job,
    dump,
)
from fmembed.manifest.providers import Choices
from fmembed.spec import RunSpec

GPU = "nvidia.com/gpu"
# Ray's own names: of a node's label, and of the seconds for which it drains on SIGTERM.
MARKET, DRAIN = "ray.io/market-type", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
# Where a CronJob's pod finds the RayJob that it makes.
RAYJOB_NAME = "rayjob.yaml"
_CONFIG_VOLUME = "fmembed-config"
# `ray job submit` is tried so often; each try is at the same job.
_SUBMIT_RETRIES = 2
# How much longer than all of its attempts a RayJob may take to say that it has ended.
_MARGIN_S = 600


def rayjob(spec: RunSpec) -> list[dict[str, Any]]:
    """A ConfigMap with the config, and a RayJob that runs it once.

    Raises:
        SpecError: `cluster` lacks what Kubernetes needs, or the config cannot run there.
    """
    cluster = _cluster_of(spec)
    return [
        _config_map(cluster, {CONFIG_NAME: config_of_job(spec)}),
        {**_head_of("ray.io/v1", "RayJob", cluster), "spec": _job(cluster)},
    ]


def raycronjob(spec: RunSpec) -> list[dict[str, Any]]:
    """The same, by a schedule, where the operator has its gate RayCronJob on.

    Raises:
        SpecError: As `rayjob`; or there is no schedule.
    """
    cluster = _cluster_of(spec)
    cron = {
        "schedule": _schedule_of(cluster),
        "timeZone": cluster.timezone,
        "jobTemplate": _job(cluster),
    }
    return [
        _config_map(cluster, {CONFIG_NAME: config_of_job(spec)}),
        {**_head_of("ray.io/v1", "RayCronJob", cluster), "spec": cron},
    ]


def cronjob(spec: RunSpec) -> list[dict[str, Any]]:
    """A CronJob of Kubernetes, whose pod makes a RayJob, waits for it and ends as it has ended.

    Only because the pod waits does `concurrencyPolicy: Forbid` hold of the job as well.

    Raises:
        SpecError: As `raycronjob`.
    """
    cluster = _cluster_of(spec)
    account = f"{cluster.name}-submitter"
    template = {**_head_of("ray.io/v1", "RayJob", cluster), "spec": _job(cluster)}
    config = {CONFIG_NAME: config_of_job(spec), RAYJOB_NAME: dump(template)}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": account}
    subject = {"kind": "ServiceAccount", "name": account, "namespace": cluster.namespace}
    rules = [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}]
    rbac = "rbac.authorization.k8s.io/v1"
    return [
        _config_map(cluster, config),
        _head_of("v1", "ServiceAccount", cluster, account),
        {**_head_of(rbac, "Role", cluster, account), "rules": rules},
        {
            **_head_of(rbac, "RoleBinding", cluster, account),
            "roleRef": role,
            "subjects": [subject],
        },
        {**_head_of("batch/v1", "CronJob", cluster), "spec": _cron(cluster, account)},
    ]


def _cluster_of(spec: RunSpec) -> ClusterSpec:
    assert spec.cluster is not None
    if spec.cluster.image is None:
        raise SpecError(
            "cluster.image: missing; Kubernetes runs images: give one with fmembed and Ray "
            f"{RAY_VERSION} in it (docs/reference.md says how it is built)"
        )
    if spec.cluster.env and spec.cluster.secret is None:
        raise SpecError("cluster.secret: missing; the Secret that holds what cluster.env names")
    return spec.cluster


def _schedule_of(cluster: ClusterSpec) -> str:
    if cluster.schedule is None:
        raise SpecError("cluster.schedule: missing; give five fields, as 0 3 * * * for each night")
    return cluster.schedule


def _head_of(api: str, kind: str, cluster: ClusterSpec, name: str | None = None) -> dict[str, Any]:
    labels = {"app.kubernetes.io/name": "fmembed", "app.kubernetes.io/instance": cluster.name}
    metadata = {"name": name or cluster.name, "namespace": cluster.namespace, "labels": labels}
    return {"apiVersion": api, "kind": kind, "metadata": metadata}


def _config_map(cluster: ClusterSpec, files: dict[str, str]) -> dict[str, Any]:
    return {**_head_of("v1", "ConfigMap", cluster, _config_name(cluster)), "data": files}


def _config_name(cluster: ClusterSpec) -> str:
    return f"{cluster.name}-config"


def _job(cluster: ClusterSpec) -> dict[str, Any]:
    """The spec of a RayJob."""
    return {
        "entrypoint": command_line(cluster),
        "submissionMode": "K8sJobMode",
        # And not by deletionStrategy, whose rules miss a job that is ended by its deadline.
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": cluster.ttl_s,
        # Of each attempt.
        "activeDeadlineSeconds": cluster.deadline_s,
        "preRunningDeadlineSeconds": cluster.start_deadline_s,
        "backoffLimit": cluster.backoff_limit,
        "submitterConfig": {"backoffLimit": _SUBMIT_RETRIES},
        "rayClusterSpec": {
            "rayVersion": RAY_VERSION,
            "enableInTreeAutoscaling": True,
            "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": cluster.idle_s},
            "headGroupSpec": _head_group(cluster),
            "workerGroupSpecs": _worker_groups(cluster),
        },
    }


def _head_group(cluster: ClusterSpec) -> dict[str, Any]:
    resources = _resources(cluster.head.cpus, cluster.head.memory_gib)
    container = _container("ray-head", cluster, resources)
    container["volumeMounts"] = [
        {"name": _CONFIG_VOLUME, "mountPath": CONFIG_FOLDER, "readOnly": True},
        *container.get("volumeMounts", []),
    ]
    volumes = [_config_volume(cluster), *_volumes(cluster)]
    return {
        # No CPU for tasks: one that starves the head ends the job after 300 s without an answer.
        "rayStartParams": {"num-cpus": "0", "num-gpus": "0"},
        "template": {"spec": _pod(cluster, container, _on_demand(cluster), volumes)},
    }


def _worker_groups(cluster: ClusterSpec) -> list[dict[str, Any]]:
    groups = []
    if cluster.cpu.max:
        resources = _resources(cluster.cpu.cpus, cluster.cpu.memory_gib)
        groups.append(_group("cpu", cluster, cluster.cpu.max, resources, _on_demand(cluster)))
    gpu, choices = cluster.gpu, Choices(cluster)
    resources = _resources(gpu.cpus, gpu.memory_gib, gpu.gpus)
    tolerated = [toleration(taint) for taint in choices.gpu_taints]
    if cluster.max_spot:
        place = {
            "nodeSelector": {**choices.gpu_selector, **choices.spot_selector},
            "tolerations": tolerated + [toleration(taint) for taint in choices.spot_taints],
        }
        group = _group("gpu-spot", cluster, cluster.max_spot, resources, place)
        # Third in the autoscaler's order of choice, after fit and availability.
        groups.append({**group, "priority": 10, "labels": {MARKET: "spot"}})
    if gpu.max_on_demand:
        selector = choices.gpu_selector
        place = {
            **({"nodeSelector": selector} if selector else {}),
            **({"tolerations": tolerated} if tolerated else {}),
            **_on_demand(cluster),
        }
        group = _group("gpu-on-demand", cluster, gpu.max_on_demand, resources, place)
        groups.append({**group, "priority": 0, "labels": {MARKET: "on-demand"}})
    return groups


def _group(
    name: str, cluster: ClusterSpec, most: int, resources: dict[str, Any], place: dict[str, Any]
) -> dict[str, Any]:
    drain = {"name": DRAIN, "value": str(cluster.drain_s)}
    container = _container("ray-worker", cluster, resources, drain)
    pod = _pod(cluster, container, place, _volumes(cluster))
    # Longer than Ray's drain: by Kubernetes' own 30 s the kill and the end of the drain would tie.
    pod["terminationGracePeriodSeconds"] = cluster.grace_s
    return {
        "groupName": name,
        "replicas": 0,
        "minReplicas": 0,
        "maxReplicas": most,
        "rayStartParams": {},
        "template": {"spec": pod},
    }


def _on_demand(cluster: ClusterSpec) -> dict[str, Any]:
    """Away from spot nodes, whether or not these have a taint."""
    away = [
        {"key": key, "operator": "NotIn", "values": [value]}
        for key, value in Choices(cluster).spot_selector.items()
    ]
    # One term each: a node is a spot one by all of its labels, so that any other value will do.
    terms = [{"matchExpressions": [expression]} for expression in away]
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    return {"affinity": {"nodeAffinity": required}} if away else {}


def _resources(cpus: int, memory_gib: int, gpus: int = 0) -> dict[str, Any]:
    """Requests as limits: Ray takes its size from limits, Kubernetes its place from requests."""
    limits = {"cpu": str(cpus), "memory": f"{memory_gib}Gi"}
    limits |= {GPU: str(gpus)} if gpus else {}
    return {"limits": limits, "requests": copy.copy(limits)}


def _container(
    name: str, cluster: ClusterSpec, resources: dict[str, Any], *env: dict[str, Any]
) -> dict[str, Any]:
    container: dict[str, Any] = {"name": name, "image": cluster.image}
    if variables := [*env, *(_from_secret(cluster, key) for key in cluster.env)]:
        container["env"] = variables
    if cluster.secret is not None and not cluster.env:
        container["envFrom"] = [{"secretRef": {"name": cluster.secret}}]
    container["resources"] = resources
    if cluster.volumes:
        container["volumeMounts"] = [
            {"name": f"volume-{i}", "mountPath": path} for i, path in enumerate(cluster.volumes)
        ]
    return container


def _from_secret(cluster: ClusterSpec, name: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": cluster.secret, "key": name}}}


def _volumes(cluster: ClusterSpec) -> list[dict[str, Any]]:
    volumes = []
    for i, (path, volume) in enumerate(cluster.volumes.items()):
        source: dict[str, Any] = {"persistentVolumeClaim": {"claimName": volume}}
        if volume == "host":
            source = {"hostPath": {"path": path, "type": "Directory"}}
        elif (nfs := nfs_of(volume)) is not None:
            source = {"nfs": {"server": nfs[0], "path": nfs[1]}}
        volumes.append({"name": f"volume-{i}", **source})
    return volumes


def _config_volume(cluster: ClusterSpec) -> dict[str, Any]:
    return {"name": _CONFIG_VOLUME, "configMap": {"name": _config_name(cluster)}}


def _pod(
    cluster: ClusterSpec,
    container: dict[str, Any],
    place: dict[str, Any],
    volumes: list[dict[str, Any]],
) -> dict[str, Any]:
    return {
        # The autoscaler replaces pods; one that came back by itself would be another node to Ray.
        "restartPolicy": "Never",
        **({"serviceAccountName": cluster.service_account} if cluster.service_account else {}),
        **place,
        "containers": [container],
        **({"volumes": volumes} if volumes else {}),
    }


def _cron(cluster: ClusterSpec, account: str) -> dict[str, Any]:
    """The spec of a CronJob."""
    attempts = cluster.backoff_limit + 1
    longest = attempts * (cluster.deadline_s + cluster.start_deadline_s) + _MARGIN_S
    container = {
        "name": "submitter",
        "image": cluster.image,
        "command": ["python", "-m", "fmembed.manifest.submit", f"{CONFIG_FOLDER}/{RAYJOB_NAME}"],
        # The RayJob is called after the Job and belongs to it: a pod that takes another's place
        # finds it by its name, and it goes when the Job goes.
        "env": [
            _from_label("JOB_NAME", "batch.kubernetes.io/job-name"),
            _from_label("JOB_UID", "batch.kubernetes.io/controller-uid"),
        ],
        "resources": {
            "limits": {"cpu": "1", "memory": "1Gi"},
            "requests": {"cpu": "1", "memory": "1Gi"},
        },
        "volumeMounts": [{"name": _CONFIG_VOLUME, "mountPath": CONFIG_FOLDER, "readOnly": True}],
    }
    pod = {
        "restartPolicy": "Never",
        "serviceAccountName": account,
        **_on_demand(cluster),
        "containers": [container],
        "volumes": [_config_volume(cluster)],
    }
    # An exit of its own is the RayJob's end, and final; only a pod that was killed is replaced.
    final = {"containerName": "submitter", "operator": "NotIn", "values": [137, 143]}
    return {
        "schedule": _schedule_of(cluster),
        "timeZone": cluster.timezone,
        "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": cluster.start_deadline_s,
        "successfulJobsHistoryLimit": 3,
        "failedJobsHistoryLimit": 3,
        "jobTemplate": {
            "spec": {
                "backoffLimit": 3,
                "activeDeadlineSeconds": longest,
                "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": final}]},
                "template": {"spec": pod},
            }
        },
    }


def _from_label(name: str, label: str) -> dict[str, Any]:
    return {
        "name": name,
        "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{label}']"}},
    }
