"""What is wrong with a manifest, in words with the remedy, before a cluster is asked for anything.

By KubeRay 1.7's own rules, of which its schema holds few, and by what a run that nobody watches has
to have: an end, no GPU that waits for work, and a lock where the scheduler promises nothing.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fmembed.cluster_spec import (
    DRAIN_MARGIN_S,
    MAX_JOB_NAME,
    MAX_NAME,
    RAY_VERSION,
    fault_of_schedule,
    is_label,
    is_secret,
    is_zone,
    ray_version_of,
)
from fmembed.config_file import MAX_CONFIG_BYTES, read_documents
from fmembed.errors import SpecError
from fmembed.manifest.job import CONFIG_FOLDER, CONFIG_NAME
from fmembed.manifest.kubernetes import DRAIN, GPU, MARKET, RAYJOB_NAME
from fmembed.manifest.shapes import DOCUMENTS, Finding, misfits
from fmembed.redaction import without_secrets
from fmembed.spec import RunSpec
from fmembed.spec_part import names_secret

# Ray's own, where a pod says nothing else.
_DRAIN_S = 30
# Kubernetes' own, likewise.
_GRACE_S = 30
_SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
_ASSIGNMENT = re.compile(r"\b([A-Za-z_]\w*)=(['\"]?)([^\s'\";]+)")


def check_file(path: str) -> list[Finding]:
    """What is wrong with a file of manifests, of Kubernetes or of Ray's cluster launcher.

    Args:
        path: Of a YAML file, with one document or several.

    Raises:
        SpecError: It cannot be read, or is no YAML.
    """
    return check_documents(_read(path))


def _read(path: str) -> Iterable[Any]:
    try:
        with Path(path).open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1).decode()
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8 text"
        raise SpecError(f"manifest {path}: {reason}; give the path of a YAML file") from None
    return read_documents(text, f"manifest {path}")


def is_manifest(path: str) -> bool:
    """Whether a file is for Kubernetes or for Ray's launcher, and no config of ours."""
    try:
        documents = list(_read(path))
    except SpecError:
        return False
    return any(
        isinstance(doc, dict) and bool(doc.keys() & {"apiVersion", "available_node_types"})
        for doc in documents
    )


def check_documents(documents: Iterable[Any]) -> list[Finding]:
    """What is wrong with documents of one file, and what the check knows nothing of."""
    found = [_plain(doc) for doc in documents if doc is not None]
    if not found:
        return [Finding("", "holds no document; fmembed manifest CONFIG --kind rayjob writes one")]
    return [finding for doc in found for finding in _check_document(doc, found)]


def _plain(value: Any) -> Any:
    """As JSON has it: YAML has dates, and names that are numbers."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | bool | int | float | None) else str(value)


def _check_document(doc: Any, documents: list[Any]) -> Iterator[Finding]:
    if not isinstance(doc, dict):
        yield Finding("", "takes documents that are mappings")
        return
    if "cluster_name" in doc:
        yield from _check_launcher(doc)
        return
    if "kind" not in doc:
        yield Finding(
            "", "neither an object of Kubernetes, which has a kind, nor a file of Ray's launcher, "
            "which has a cluster_name: give what fmembed manifest writes"
        )  # fmt: skip
        return
    kind = str(doc["kind"])
    name = str(_at(doc, "metadata", "name") or "")
    label = f"{kind[:40]} {name[:60]}".strip()
    yield from (
        Finding(f"{label}: {f.where}", f.what, f.is_fault)
        for f in _check_object(kind, name, doc, documents)
    )


def _check_object(
    kind: str, name: str, doc: dict[str, Any], documents: list[Any]
) -> Iterator[Finding]:
    if kind not in DOCUMENTS:
        if kind == "Secret":
            yield Finding("kind", "a Secret's values lie in the file: make it apart, by kubectl")
        else:
            yield Finding("kind", "not known to this check", is_fault=False)
        return
    api, shape = DOCUMENTS[kind]
    if doc.get("apiVersion") != api:
        yield Finding("apiVersion", f"takes {api}")
    yield from misfits(doc, shape, is_closed=api.startswith("ray.io"))
    yield from _secrets_in({key: part for key, part in doc.items() if key != "data"})
    most = {"RayCronJob": MAX_NAME, "RayJob": MAX_JOB_NAME, "CronJob": MAX_NAME}.get(kind)
    if most is not None and not is_label(name, most):
        yield Finding(
            "metadata.name",
            f"takes at most {most} of a-z, 0-9 and -, the first one a letter, got {name!a:.80}",
        )
    spec = _mapping(doc.get("spec"))
    match kind:
        case "RayJob":
            yield from _check_job(spec, "spec", documents)
        case "RayCronJob":
            yield from _check_schedule(spec)
            job = _mapping(spec.get("jobTemplate"))
            yield from _check_job(job, "spec.jobTemplate", documents)
            yield from _check_overlap(job)
        case "CronJob":
            yield from _check_cronjob(spec)
        case "ConfigMap":
            yield from _check_config(_mapping(doc.get("data")), documents)


def _check_schedule(spec: dict[str, Any]) -> Iterator[Finding]:
    fault = fault_of_schedule(str(spec.get("schedule") or ""))
    if fault is not None:
        yield Finding("spec.schedule", f"{fault}; spec.timeZone says the zone")
    zone = spec.get("timeZone")
    if zone is None:
        yield Finding("spec.timeZone", "missing: the operator's own would count; one is Etc/UTC")
    elif not is_zone(str(zone)):
        yield Finding("spec.timeZone", f"no time zone is called {str(zone)!a:.60}; one is Etc/UTC")


def _check_overlap(job: dict[str, Any]) -> Iterator[Finding]:
    words = _words(job.get("entrypoint"))
    if "fmembed" in words and not any(word.startswith("--if-locked") for word in words):
        yield Finding(
            "spec.jobTemplate.entrypoint",
            "two runs may start at once, as a RayCronJob has no concurrencyPolicy: add "
            "--if-locked skip",
        )


def _check_job(job: dict[str, Any], where: str, documents: list[Any]) -> Iterator[Finding]:
    """The spec of a RayJob."""
    mode = job.get("submissionMode", "K8sJobMode")
    if mode not in _SUBMISSION_MODES:
        yield Finding(
            f"{where}.submissionMode",
            f"takes {', '.join(_SUBMISSION_MODES)}, got {str(mode)!a:.40}",
        )
    if not job.get("entrypoint") and mode != "InteractiveMode":
        yield Finding(f"{where}.entrypoint", "missing: what the job runs")
    if job.get("shutdownAfterJobFinishes") is not True:
        yield Finding(
            f"{where}.shutdownAfterJobFinishes", "takes true: else the cluster stays, and costs"
        )
        if _number(job.get("ttlSecondsAfterFinished")) > 0:
            yield Finding(
                f"{where}.ttlSecondsAfterFinished",
                "takes shutdownAfterJobFinishes: true beside it; KubeRay refuses it alone",
            )
    if "deletionStrategy" in job:
        yield Finding(
            f"{where}.deletionStrategy",
            "its rules miss a job that is ended by its deadline, whose cluster then stays: remove "
            "it, and set shutdownAfterJobFinishes: true",
        )
    if not _number(job.get("activeDeadlineSeconds")) > 0:
        yield Finding(
            f"{where}.activeDeadlineSeconds",
            "missing: the last guard against a run that hangs; as 86400",
        )
    if "preRunningDeadlineSeconds" not in job:
        yield Finding(
            f"{where}.preRunningDeadlineSeconds",
            "missing: a head that gets no node waits for the other deadline",
            is_fault=False,
        )
    backoff = _number(job.get("backoffLimit", 0))
    if not 0 <= backoff < math.inf:
        yield Finding(f"{where}.backoffLimit", "takes a number of at least 0")
    if backoff > 0 and (mode == "InteractiveMode" or "clusterSelector" in job):
        yield Finding(
            f"{where}.backoffLimit",
            "takes 0 with InteractiveMode or clusterSelector: KubeRay refuses it there",
        )
    if mode == "SidecarMode" and {"submitterConfig", "submitterPodTemplate"} & job.keys():
        yield Finding(f"{where}.submitterConfig", "SidecarMode has no submitter: remove it")
    if "clusterSelector" in job:
        yield Finding(
            f"{where}.clusterSelector",
            "the job's end does not end that cluster: remove it, and give rayClusterSpec",
        )
    elif "rayClusterSpec" not in job:
        yield Finding(f"{where}.rayClusterSpec", "missing: the cluster that the job makes")
    else:
        cluster = _mapping(job["rayClusterSpec"])
        yield from _check_cluster(cluster, f"{where}.rayClusterSpec")
        yield from _check_mounted(job, cluster, where, documents)


def _check_cluster(cluster: dict[str, Any], where: str) -> Iterator[Finding]:
    version = str(cluster.get("rayVersion"))
    if version != RAY_VERSION:
        yield Finding(
            f"{where}.rayVersion", f"takes {RAY_VERSION}, fmembed's own, got {version!a:.40}"
        )
    if cluster.get("enableInTreeAutoscaling") is not True:
        yield Finding(
            f"{where}.enableInTreeAutoscaling", "takes true: else no worker comes from zero"
        )
    elif _at(cluster, "autoscalerOptions", "version") != "v2":
        yield Finding(
            f"{where}.autoscalerOptions.version", "takes v2: v1 knows no priority of groups"
        )
    head = _mapping(cluster.get("headGroupSpec"))
    yield from _check_head(head, f"{where}.headGroupSpec")
    groups = _list(cluster.get("workerGroupSpecs"))
    names = Counter(str(group.get("groupName")) for group in groups)
    gpu_groups = []
    for i, group in enumerate(groups):
        name = str(group.get("groupName"))
        at = f"{where}.workerGroupSpecs[{name[:60] if 'groupName' in group else i}]"
        if not is_label(name, 63) or names[name] > 1:
            yield Finding(f"{at}.groupName", "takes a name of its own of a-z, 0-9 and -")
        yield from _check_group(group, at)
        if _has_gpu(_pod_of(group)):
            gpu_groups.append((at, group))
    yield from _check_shapes(gpu_groups)


def _check_head(head: dict[str, Any], where: str) -> Iterator[Finding]:
    params, pod = _mapping(head.get("rayStartParams")), _pod_of(head)
    if str(params.get("num-cpus")) != "0":
        yield Finding(
            f"{where}.rayStartParams.num-cpus",
            "takes '0': a task that starves the head ends the whole job",
        )
    has_gpus = _number(params.get("num-gpus", 0)) > 0
    if has_gpus or _has_gpu(pod):
        yield Finding(f"{where}.template", f"the head has a GPU, which no task gets: remove {GPU}")
    yield from _check_pod(pod, f"{where}.template.spec")


def _check_group(group: dict[str, Any], where: str) -> Iterator[Finding]:
    least, most = _number(group.get("minReplicas")), _number(group.get("maxReplicas"))
    for name, number in (("minReplicas", least), ("maxReplicas", most)):
        if math.isnan(number):
            yield Finding(f"{where}.{name}", "missing: KubeRay takes no group without")
    if most < max(least, 1):
        yield Finding(f"{where}.maxReplicas", "takes at least 1, and no less than minReplicas")
    pod = _pod_of(group)
    for name in ("minReplicas", "replicas"):
        if _has_gpu(pod) and _number(group.get(name, 0)) > 0:
            yield Finding(f"{where}.{name}", "takes 0: a run with nothing to do would pay for GPUs")
    if pod.get("restartPolicy") != "Never":
        yield Finding(
            f"{where}.template.spec.restartPolicy",
            "takes Never: the autoscaler replaces pods, and takes one that came back for another",
        )
    drain = _drain_of(pod)
    grace = _number(pod.get("terminationGracePeriodSeconds", _GRACE_S))
    if not grace >= drain + DRAIN_MARGIN_S:
        yield Finding(
            f"{where}.template.spec.terminationGracePeriodSeconds",
            f"takes at least {drain + DRAIN_MARGIN_S:.0f}, {DRAIN_MARGIN_S} more than the "
            f"{drain:.0f} s for which Ray drains a node",
        )
    yield from _check_pod(pod, f"{where}.template.spec")


def _check_shapes(groups: list[tuple[str, dict[str, Any]]]) -> Iterator[Finding]:
    """Of groups with GPUs: one shape, and the spot ones first."""
    for (_, first), (where, group) in itertools.pairwise(groups):
        if _limits_of(first) != _limits_of(group):
            yield Finding(
                f"{where}.template.spec",
                "another shape than the group with GPUs before: the autoscaler takes the tighter "
                "fit before the higher priority; give both the same limits",
            )
    by_market: dict[Any, list[float]] = {}
    for _, group in groups:
        market = _at(group, "labels", MARKET)
        by_market.setdefault(market, []).append(_number(group.get("priority", 0)))
    spot, on_demand = by_market.get("spot", []), by_market.get("on-demand", [])
    if spot and on_demand and not min(spot) > max(on_demand):
        where = next(at for at, group in groups if _at(group, "labels", MARKET) == "spot")
        yield Finding(
            f"{where}.priority", "takes more than the on-demand group's: else that one comes first"
        )


def _check_pod(pod: dict[str, Any], where: str) -> Iterator[Finding]:
    containers = _list(pod.get("containers"))
    if not containers:
        yield Finding(f"{where}.containers", "missing: the container in which Ray runs")
    volumes = {str(volume.get("name")) for volume in _list(pod.get("volumes"))}
    for container in containers:
        at = f"{where}.containers[{str(container.get('name'))[:60]}]"
        named = ray_version_of(str(container.get("image", "")))
        if named is not None and not f"{RAY_VERSION}.".startswith(f"{named}."):
            yield Finding(
                f"{at}.image",
                f"has Ray {named}: takes one with {RAY_VERSION}, as rayVersion and fmembed",
            )
        limits = _mapping(_at(container, "resources", "limits"))
        requests = _mapping(_at(container, "resources", "requests"))
        if not {"cpu", "memory"} <= limits.keys():
            yield Finding(
                f"{at}.resources.limits", "takes cpu and memory, from which Ray knows its size"
            )
        # What is left out of requests is as limits say.
        elif {**limits, **requests} != limits and _texts_of(requests) != _texts_of(limits):
            yield Finding(
                f"{at}.resources.requests",
                "takes what limits say: Ray counts on the limits, and the node on the requests",
            )
        for mount in _list(container.get("volumeMounts")):
            if str(mount.get("name")) not in volumes:
                yield Finding(
                    f"{at}.volumeMounts", f"no volume is called {str(mount.get('name'))!a:.60}"
                )


def _check_mounted(
    job: dict[str, Any], cluster: dict[str, Any], where: str, documents: list[Any]
) -> Iterator[Finding]:
    """The config that the entrypoint names is in the head, of a ConfigMap of the file."""
    config = next((w for w in _words(job.get("entrypoint")) if w.startswith(CONFIG_FOLDER)), None)
    if config is None:
        return
    pod = _pod_of(_mapping(cluster.get("headGroupSpec")))
    mounts = [m for c in _list(pod.get("containers")) for m in _list(c.get("volumeMounts"))]
    name = next((m.get("name") for m in mounts if m.get("mountPath") == CONFIG_FOLDER), None)
    if name is None:
        yield Finding(
            f"{where}.rayClusterSpec.headGroupSpec",
            f"nothing is mounted at {CONFIG_FOLDER}, where the entrypoint looks for its config",
        )
        return
    volume = next((v for v in _list(pod.get("volumes")) if v.get("name") == name), {})
    wanted = _at(volume, "configMap", "name")
    maps = [d for d in documents if isinstance(d, dict) and d.get("kind") == "ConfigMap"]
    held = next((d for d in maps if _at(d, "metadata", "name") == wanted), None)
    if held is None:
        yield Finding(
            f"{where}.entrypoint",
            f"the ConfigMap {str(wanted)!a:.60} is not in this file",
            is_fault=False,
        )
    elif config.rpartition("/")[2] not in _mapping(held.get("data")):
        yield Finding(f"{where}.entrypoint", f"the ConfigMap has no {config.rpartition('/')[2]}")


def _check_cronjob(spec: dict[str, Any]) -> Iterator[Finding]:
    yield from _check_schedule(spec)
    if spec.get("concurrencyPolicy") != "Forbid":
        yield Finding(
            "spec.concurrencyPolicy", "takes Forbid: else a slow run and the next one overlap"
        )
    if not _number(spec.get("startingDeadlineSeconds")) >= 10:
        yield Finding(
            "spec.startingDeadlineSeconds",
            "takes at least 10: without it a controller that was away gives the schedule up after "
            "100 missed times",
        )
    job = _mapping(_at(spec, "jobTemplate", "spec"))
    if not _number(job.get("activeDeadlineSeconds")) > 0:
        yield Finding(
            "spec.jobTemplate.spec.activeDeadlineSeconds",
            "missing: a pod that waits for ever forbids all later ones",
        )
    pod = _pod_of(job)
    if pod.get("restartPolicy") != "Never":
        yield Finding("spec.jobTemplate.spec.template.spec.restartPolicy", "takes Never")
    commands = [w for c in _list(pod.get("containers")) for w in _list_of_texts(c.get("command"))]
    if "fmembed.manifest.submit" not in commands:
        yield Finding(
            "spec.jobTemplate.spec.template.spec.containers",
            "whether its pod waits for the RayJob's end is not known to this check; Forbid holds "
            "only if it does",
            is_fault=False,
        )


def _check_config(data: dict[str, Any], documents: list[Any]) -> Iterator[Finding]:
    if CONFIG_NAME in data:
        where = f"data.{CONFIG_NAME}"
        try:
            raw = read_documents(str(data[CONFIG_NAME]), where)
            spec = RunSpec.parse(raw[0] if len(raw) == 1 and isinstance(raw[0], dict) else {})
        except SpecError as e:
            yield Finding(where, str(e))
        else:
            told = spec.model_dump(mode="json")
            if without_secrets(told) != told:
                yield Finding(where, "a URL in it holds a login or a query: give it without")
    for name, value in data.items():
        if name not in (CONFIG_NAME, RAYJOB_NAME) and _is_secret(name, str(value)):
            yield Finding(f"data.{name:.60}", "its value is in the file: put it into a Secret")
    if RAYJOB_NAME in data:
        where = f"data.{RAYJOB_NAME}"
        try:
            inner = read_documents(str(data[RAYJOB_NAME]), where)
        except SpecError as e:
            yield Finding(where, str(e))
            return
        for doc in inner:
            for finding in _check_document(doc, documents):
                at = f"{where}: {finding.where}"
                yield Finding(at, finding.what, finding.is_fault)


def _secrets_in(value: Any, where: str = "") -> Iterator[Finding]:
    """Values of variables, and logins in URLs, that all who may read the file would see."""
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from _secrets_in(item, f"{where}[{i}]")
    elif isinstance(value, dict):
        name, told = value.get("name"), value.get("value")
        if isinstance(name, str) and isinstance(told, str) and _is_secret(name, told):
            yield Finding(
                where,
                f"the value of {name:.60} is in the file: put it into a Secret, and take it by "
                "valueFrom.secretKeyRef",
            )
            return
        for key, item in value.items():
            yield from _secrets_in(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, str):
        assigned = any(_is_secret(m[1], m[3]) for m in _ASSIGNMENT.finditer(value))
        if assigned or without_secrets(value) != value:
            yield Finding(where, "holds a secret: name a Secret or a variable in its place")


def _is_secret(name: str, value: str) -> bool:
    # A path to one, and another variable, say nothing of it.
    if not value or value.startswith(("/", "$", "~")):
        return False
    return names_secret(name) or is_secret(value)


def _check_launcher(doc: dict[str, Any]) -> Iterator[Finding]:
    """A file of Ray's cluster launcher, by Ray's own schema and by the same rules."""
    import jsonschema

    package = importlib.util.find_spec("ray")
    assert package is not None
    assert package.origin is not None
    schema = Path(package.origin).parent / "autoscaler/ray-schema.json"
    validator = jsonschema.Draft7Validator(json.loads(schema.read_text(encoding="utf-8")))
    for error in validator.iter_errors(doc):
        # Not what it quotes, which may be anything; but a name that is not known.
        unknown = error.message if error.validator == "additionalProperties" else ""
        where = ".".join(map(str, error.absolute_path)) or "file"
        yield Finding(where, f"Ray refuses it: {unknown[:200] or f'takes {error.validator_value}'}")
    yield from _secrets_in(doc)
    types = _mapping(doc.get("available_node_types"))
    head = str(doc.get("head_node_type"))
    gpus: dict[str, dict[str, Any]] = {}
    for name, kind in types.items():
        where, resources = f"available_node_types.{name}", _mapping(_at(kind, "resources"))
        if name == head:
            if _number(resources.get("CPU")) != 0:
                yield Finding(
                    f"{where}.resources.CPU", "takes 0: a task that starves the head ends the job"
                )
            if _number(resources.get("GPU", 0)) > 0:
                yield Finding(f"{where}.resources.GPU", "takes 0: no task of the head gets it")
            continue
        if _number(resources.get("GPU", 0)) > 0:
            gpus[name] = resources
            if _number(_at(kind, "min_workers") or 0) > 0:
                yield Finding(
                    f"{where}.min_workers", "takes 0: a cluster with nothing to do pays for GPUs"
                )
    if len({json.dumps(shape, sort_keys=True) for shape in gpus.values()}) > 1:
        yield Finding(
            "available_node_types",
            f"{' and '.join(gpus)} have GPUs and other resources: give them the same, so that "
            "priority decides",
        )
    provider = _mapping(doc.get("provider"))
    if provider.get("type") != "local" and types and head not in types:
        yield Finding("head_node_type", "names none of available_node_types")
    named = ray_version_of(str(_at(doc, "docker", "image") or ""))
    if named is not None and not f"{RAY_VERSION}.".startswith(f"{named}."):
        yield Finding("docker.image", f"has Ray {named}; fmembed runs on {RAY_VERSION}")


def _at(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[dict[str, Any]]:
    """Mappings of a list; what is none is told where types are looked at."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _list_of_texts(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _number(value: Any) -> float:
    """A number, or NaN, which is neither less nor more than any."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _words(entrypoint: Any) -> list[str]:
    try:
        return shlex.split(str(entrypoint or ""))
    except ValueError:
        return []


def _pod_of(group: dict[str, Any]) -> dict[str, Any]:
    return _mapping(_at(group, "template", "spec"))


def _limits_of(group: dict[str, Any]) -> dict[str, str]:
    containers = _list(_pod_of(group).get("containers"))
    return _texts_of(_mapping(_at(containers[0], "resources", "limits"))) if containers else {}


def _texts_of(quantities: dict[str, Any]) -> dict[str, str]:
    # 3 and '3' are one quantity.
    return {name: str(quantity) for name, quantity in quantities.items()}


def _has_gpu(pod: dict[str, Any]) -> bool:
    return any(
        "gpu" in name and _number(number) > 0
        for container in _list(pod.get("containers"))
        for part in ("limits", "requests")
        for name, number in _mapping(_at(container, "resources", part)).items()
    )


def _drain_of(pod: dict[str, Any]) -> float:
    told = [
        _number(variable.get("value"))
        for container in _list(pod.get("containers"))
        for variable in _list(container.get("env"))
        if variable.get("name") == DRAIN
    ]
    return next((number for number in told if not math.isnan(number)), _DRAIN_S)
