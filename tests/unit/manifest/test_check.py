"""Each planted mistake is found, by its field and with its remedy, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, run_cli
from hypothesis import given, settings
from hypothesis import strategies as st
from manifests import CONFIGS, FOR_KUBERNETES, FOR_LAUNCHER, written

from fmembed.errors import SpecError
from fmembed.manifest.check import check_documents, check_file
from fmembed.manifest.writing import KINDS, write_manifest
from fmembed.spec import RunSpec

Change = Callable[[dict[str, Any]], object]


def spec(doc: Any) -> Any:
    """The spec of the RayJob in a document of either kind."""
    return doc["spec"].get("jobTemplate", doc["spec"])


def group(doc: Any, name: str = "gpu-spot") -> Any:
    groups = spec(doc)["rayClusterSpec"]["workerGroupSpecs"]
    return next(g for g in groups if g["groupName"] == name)


def pod(doc: Any, name: str = "gpu-spot") -> Any:
    return group(doc, name)["template"]["spec"]


def container(doc: Any, name: str = "gpu-spot") -> Any:
    return pod(doc, name)["containers"][0]


def head(doc: Any) -> Any:
    return spec(doc)["rayClusterSpec"]["headGroupSpec"]


def head_container(doc: Any) -> Any:
    return head(doc)["template"]["spec"]["containers"][0]


def env(name: str, value: str) -> Change:
    return lambda d: container(d)["env"].append({"name": name, "value": value})


# What is planted, where the fault is told, and what is told of it.
OF_A_JOB: dict[str, tuple[Change, str, str]] = {
    "deletionStrategy": (
        lambda d: spec(d).update(deletionStrategy={"deletionRules": []}),
        "deletionStrategy",
        "set shutdownAfterJobFinishes: true",
    ),
    "no active deadline": (
        lambda d: spec(d).pop("activeDeadlineSeconds"),
        "activeDeadlineSeconds",
        "as 86400",
    ),
    "an active deadline of none": (
        lambda d: spec(d).update(activeDeadlineSeconds=0),
        "activeDeadlineSeconds",
        "as 86400",
    ),
    "GPUs that wait": (lambda d: group(d).update(minReplicas=1), "minReplicas", "takes 0"),
    "GPUs at the start": (lambda d: group(d).update(replicas=2), "replicas", "takes 0"),
    "a cluster that stays": (
        lambda d: (spec(d).pop("shutdownAfterJobFinishes"), spec(d).pop("ttlSecondsAfterFinished")),
        "shutdownAfterJobFinishes",
        "takes true",
    ),
    "a time to live of what does not end": (
        lambda d: spec(d).pop("shutdownAfterJobFinishes"),
        "ttlSecondsAfterFinished",
        "takes shutdownAfterJobFinishes: true beside it",
    ),
    "a pod that comes back": (
        lambda d: pod(d).update(restartPolicy="OnFailure"),
        "restartPolicy",
        "takes Never",
    ),
    "Kubernetes' own restart policy": (
        lambda d: pod(d, "cpu").pop("restartPolicy"),
        "restartPolicy",
        "takes Never",
    ),
    "a kill that ties with the drain": (
        lambda d: pod(d).update(terminationGracePeriodSeconds=60),
        "terminationGracePeriodSeconds",
        "takes at least 75",
    ),
    "a grace that is Kubernetes' own": (
        lambda d: pod(d, "cpu").pop("terminationGracePeriodSeconds"),
        "terminationGracePeriodSeconds",
        "takes at least 75",
    ),
    "a drain of Ray's own, and no grace for it": (
        lambda d: (container(d)["env"].clear(), pod(d).update(terminationGracePeriodSeconds=40)),
        "terminationGracePeriodSeconds",
        "takes at least 45",
    ),
    "a name of capitals": (
        lambda d: d["metadata"].update(name="Articles"),
        "metadata.name",
        "of a-z, 0-9 and -",
    ),
    "a name too long": (
        lambda d: d["metadata"].update(name="a" * 48),
        "metadata.name",
        "takes at most",
    ),
    "no name": (lambda d: d["metadata"].pop("name"), "metadata.name", "takes at most"),
    "a mode mistyped": (
        lambda d: spec(d).update(submissionMode="K8SJobMode"),
        "submissionMode",
        "takes K8sJobMode, HTTPMode",
    ),
    "retries of what nobody submits": (
        lambda d: spec(d).update(submissionMode="InteractiveMode"),
        "backoffLimit",
        "takes 0 with InteractiveMode",
    ),
    "a submitter beside a sidecar": (
        lambda d: spec(d).update(submissionMode="SidecarMode"),
        "submitterConfig",
        "remove it",
    ),
    "another's cluster": (
        lambda d: (
            spec(d).update(clusterSelector={"ray.io/cluster": "x"}, backoffLimit=0),
            spec(d).pop("rayClusterSpec"),
        ),
        "clusterSelector",
        "give rayClusterSpec",
    ),
    "no cluster": (lambda d: spec(d).pop("rayClusterSpec"), "rayClusterSpec", "missing"),
    "nothing to run": (lambda d: spec(d).pop("entrypoint"), "entrypoint", "missing"),
    "a head that works": (
        lambda d: head(d)["rayStartParams"].update({"num-cpus": "4"}),
        "num-cpus",
        "takes '0'",
    ),
    "a head that works by default": (
        lambda d: head(d)["rayStartParams"].pop("num-cpus"),
        "num-cpus",
        "takes '0'",
    ),
    "a number for a text": (
        lambda d: head(d)["rayStartParams"].update({"num-cpus": 0}),
        "num-cpus",
        "takes a text: write '0'",
    ),
    "a head with a GPU": (
        lambda d: [
            part.update({"nvidia.com/gpu": "1"}) for part in head_container(d)["resources"].values()
        ],
        "headGroupSpec.template",
        "remove nvidia.com/gpu",
    ),
    "a head that claims a GPU": (
        lambda d: head(d)["rayStartParams"].update({"num-gpus": "1"}),
        "headGroupSpec.template",
        "the head has a GPU",
    ),
    "an image of another Ray": (
        lambda d: container(d).update(image="rayproject/ray:2.50.0-py311-gpu"),
        "image",
        "has Ray 2.50.0: takes one with 2.60.0",
    ),
    "another Ray": (
        lambda d: spec(d)["rayClusterSpec"].update(rayVersion="2.9.0"),
        "rayVersion",
        "takes 2.60.0",
    ),
    "two shapes with GPUs": (
        lambda d: [
            part.update(cpu="30") for part in container(d, "gpu-on-demand")["resources"].values()
        ],
        "workerGroupSpecs[gpu-on-demand].template.spec",
        "give both the same limits",
    ),
    "on-demand machines first": (
        lambda d: group(d, "gpu-on-demand").update(priority=20),
        "priority",
        "takes more than the on-demand group's",
    ),
    "less asked for than used": (
        lambda d: container(d)["resources"]["requests"].update(memory="1Gi"),
        "resources.requests",
        "takes what limits say",
    ),
    "no limits": (
        lambda d: container(d, "cpu")["resources"].pop("limits"),
        "resources.limits",
        "takes cpu and memory",
    ),
    "a secret's value": (env("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI"), "env", "secretKeyRef"),
    "a secret by its form": (env("WHATEVER", "hf_abcdefghijklmnop"), "env", "secretKeyRef"),
    "a secret in the command": (
        lambda d: spec(d).update(entrypoint="API_TOKEN=abc123 fmembed refresh --if-locked skip"),
        "entrypoint",
        "name a Secret",
    ),
    "a login in a URL": (
        lambda d: spec(d).update(runtimeEnvYAML="working_dir: https://me:pw@host/x.zip"),
        "runtimeEnvYAML",
        "name a Secret",
    ),
    "no autoscaler": (
        lambda d: spec(d)["rayClusterSpec"].pop("enableInTreeAutoscaling"),
        "enableInTreeAutoscaling",
        "takes true",
    ),
    "the old autoscaler": (
        lambda d: spec(d)["rayClusterSpec"].pop("autoscalerOptions"),
        "autoscalerOptions.version",
        "takes v2",
    ),
    "an unknown field of the job": (
        lambda d: spec(d).update(activeDeadlineSecond=5),
        "activeDeadlineSecond",
        "did you mean activeDeadlineSeconds?",
    ),
    "an unknown field of a group": (
        lambda d: group(d).update(spot=True),
        "spot",
        "remove it",
    ),
    "a field of a pod mistyped": (
        lambda d: pod(d).update(nodeSelectors={}),
        "nodeSelectors",
        "did you mean nodeSelector?",
    ),
    "two groups of one name": (
        lambda d: group(d, "cpu").update(groupName="gpu-spot"),
        "groupName",
        "a name of its own",
    ),
    "no workers at all": (lambda d: group(d).update(maxReplicas=0), "maxReplicas", "at least 1"),
    "a volume that is not there": (
        lambda d: container(d).update(volumeMounts=[{"name": "data", "mountPath": "/data"}]),
        "volumeMounts",
        "no volume is called 'data'",
    ),
    "a config that is not mounted": (
        lambda d: head_container(d).update(volumeMounts=[]),
        "headGroupSpec",
        "nothing is mounted at /etc/fmembed",
    ),
    "another file of the config": (
        lambda d: spec(d).update(entrypoint="fmembed refresh /etc/fmembed/a.yaml --if-locked skip"),
        "entrypoint",
        "the ConfigMap has no a.yaml",
    ),
}
OF_A_CRON: dict[str, tuple[Change, str, str]] = {
    "a zone in the schedule": (
        lambda d: d["spec"].update(schedule="CRON_TZ=UTC 0 3 * * *"),
        "spec.schedule",
        "spec.timeZone says the zone",
    ),
    "six fields": (
        lambda d: d["spec"].update(schedule="0 0 3 * * *"),
        "spec.schedule",
        "takes five fields",
    ),
    "an hour that is none": (
        lambda d: d["spec"].update(schedule="0 24 * * *"),
        "spec.schedule",
        "its hour is '24'",
    ),
    "an unknown zone": (
        lambda d: d["spec"].update(timeZone="Europe/Atlantis"),
        "spec.timeZone",
        "no time zone is called 'Europe/Atlantis'",
    ),
    "the operator's zone": (lambda d: d["spec"].pop("timeZone"), "spec.timeZone", "one is Etc/UTC"),
}


def faults(documents: list[Any]) -> list[str]:
    return [str(f) for f in check_documents(documents) if f.is_fault]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_nothing_is_wrong_with_what_is_written(config: Path, kind: str) -> None:
    needed = FOR_LAUNCHER if kind == "cluster" else FOR_KUBERNETES
    found = write_manifest(RunSpec.from_yaml(str(config), needed), kind)
    assert not check_documents(yaml.safe_load_all(found))


@pytest.mark.parametrize("kind", ["rayjob", "raycronjob"])
@pytest.mark.parametrize("mistake", OF_A_JOB)
def test_a_mistake_in_a_job_is_found_alone(mistake: str, kind: str) -> None:
    plant, where, told = OF_A_JOB[mistake]
    documents = written(kind)
    assert not check_documents(documents)
    plant(documents[-1])
    found = faults(documents)
    assert found, mistake
    assert any(where in f and told in f for f in found), found
    # What is cut from one field may leave another without what it needs.
    assert len(found) <= 2, found


@pytest.mark.parametrize("kind", ["raycronjob", "cronjob"])
@pytest.mark.parametrize("mistake", OF_A_CRON)
def test_a_mistake_in_a_schedule_is_found_alone(mistake: str, kind: str) -> None:
    plant, where, told = OF_A_CRON[mistake]
    documents = written(kind)
    plant(documents[-1])
    (found,) = faults(documents)
    assert f"{where}: " in found
    assert told in found


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (
            lambda d: d["spec"].update(concurrencyPolicy="Forbid"),
            "spec.concurrencyPolicy: no field here; it would be dropped without a word",
        ),
        (
            lambda d: d["spec"].update(startingDeadlineSeconds=60),
            "spec.startingDeadlineSeconds: no field here",
        ),
        (lambda d: d["metadata"].update(name="a" * 37), "metadata.name: takes at most 36"),
        (
            lambda d: spec(d).update(entrypoint="fmembed refresh /etc/fmembed/config.yaml"),
            "spec.jobTemplate.entrypoint: two runs may start at once",
        ),
        (lambda d: d.update(apiVersion="ray.io/v1alpha1"), "apiVersion: takes ray.io/v1"),
    ],
)
def test_what_a_raycronjob_does_not_do_is_told(plant: Change, told: str) -> None:
    documents = written("raycronjob")
    plant(documents[-1])
    (found,) = faults(documents)
    assert told in found


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (lambda d: d["spec"].pop("concurrencyPolicy"), "spec.concurrencyPolicy: takes Forbid"),
        (
            lambda d: d["spec"].update(concurrencyPolicy="Allow"),
            "spec.concurrencyPolicy: takes Forbid",
        ),
        (lambda d: d["spec"].pop("startingDeadlineSeconds"), "takes at least 10"),
        (
            lambda d: d["spec"]["jobTemplate"]["spec"].pop("activeDeadlineSeconds"),
            "activeDeadlineSeconds: missing",
        ),
        (
            lambda d: d["spec"]["jobTemplate"]["spec"]["template"]["spec"].pop("restartPolicy"),
            "restartPolicy: takes Never",
        ),
    ],
)
def test_what_a_cronjob_lacks_is_told(plant: Change, told: str) -> None:
    documents = written("cronjob")
    plant(documents[-1])
    (found,) = faults(documents)
    assert told in found


def test_the_rayjob_inside_of_a_cronjobs_config_is_checked_too() -> None:
    documents = written("cronjob")
    inner = yaml.safe_load(documents[0]["data"]["rayjob.yaml"])
    inner["spec"].pop("shutdownAfterJobFinishes")
    inner["spec"].pop("ttlSecondsAfterFinished")
    documents[0]["data"]["rayjob.yaml"] = yaml.safe_dump(inner)
    (found,) = faults(documents)
    assert found.startswith("ConfigMap articles-config: data.rayjob.yaml: RayJob articles: ")
    documents[0]["data"]["config.yaml"] = "source: {uri: x}\nmodle: {}\n"
    assert "data.config.yaml: modle: unknown key; did you mean model?" in faults(documents)[0]


def test_what_is_not_known_is_a_note_where_it_may_be_meant() -> None:
    documents = written("rayjob")
    pod(documents[1])["securityContext"] = {"runAsUser": 1000}
    documents.append({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}})
    found = check_documents(documents)
    assert [f.is_fault for f in found] == [False, False]
    assert all("not known to this check" in str(f) for f in found)


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (
            lambda d: d["available_node_types"]["gpu-spot"].update(min_workers=1),
            "available_node_types.gpu-spot.min_workers: takes 0",
        ),
        (
            lambda d: d["available_node_types"]["head"]["resources"].update(CPU=4),
            "available_node_types.head.resources.CPU: takes 0",
        ),
        (
            lambda d: d["available_node_types"]["head"]["resources"].update(GPU=1),
            "available_node_types.head.resources.GPU: takes 0",
        ),
        (
            lambda d: d["available_node_types"]["gpu-spot"]["resources"].update(CPU=30),
            "gpu-spot and gpu-on-demand have GPUs and other resources",
        ),
        (lambda d: d.update(spot=True), "file: Ray refuses it: Additional properties"),
        (lambda d: d["docker"].update(image="rayproject/ray:2.50.0"), "docker.image: has Ray"),
        (
            lambda d: d["docker"]["run_options"].append("--env=HF_TOKEN=hf_abcdefghijkl"),
            "docker.run_options[2]: holds a secret",
        ),
        (lambda d: d.update(head_node_type="x"), "head_node_type: names none of"),
    ],
)
def test_a_mistake_in_a_file_of_rays_launcher_is_found(plant: Change, told: str) -> None:
    (found,) = written("cluster", **FOR_LAUNCHER)
    plant(found)
    (fault,) = faults([found])
    assert told in fault
    assert "hf_" not in fault


def test_no_value_of_a_secret_is_shown() -> None:
    documents = written("rayjob")
    env("API_KEY", "s3cr3t-value")(documents[1])
    documents.append({"apiVersion": "v1", "kind": "Secret", "data": {"key": "czNjcjN0"}})
    found = faults(documents)
    assert len(found) == 2
    documents[0]["data"] |= {"HF_TOKEN": "s3cr3t-value"}
    found = faults(documents)
    assert len(found) == 3
    assert not any("s3cr3t" in f or "czNj" in f for f in found)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None, database=None)
@given(data=st.data(), odd=_JSON, kind=st.sampled_from(["rayjob", "cronjob", "cluster"]))
def test_anything_anywhere_is_told_and_raises_nothing(data: Any, odd: Any, kind: str) -> None:
    documents = json.loads(_WRITTEN[kind])
    place: Any = documents
    for _ in range(data.draw(st.integers(1, 12))):
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key]:
            break
        parent, place = place, place[key]
    else:
        place = parent
    place[key] = odd
    for finding in check_documents(documents):
        assert str(finding)


_KINDS = ("rayjob", "cronjob", "cluster")
_WRITTEN = {kind: json.dumps(written(kind, **FOR_LAUNCHER)) for kind in _KINDS}


def test_the_command_tells_faults_and_ends_with_1(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    config = str(ROOT / "jobs/configs/cluster/kuberay.yaml")
    done = run_cli("manifest", config, "--kind", "raycronjob", "--output", str(good))
    assert (done.returncode, done.stdout) == (0, f"wrote {good}\n")
    bad.write_text(good.read_text().replace("minReplicas: 0", "minReplicas: 1"))
    done = run_cli("manifest", "--check", str(good), str(bad))
    assert done.returncode == 1
    assert done.stdout.startswith(f"{good}: holds\n{bad}: RayCronJob articles: spec.jobTemplate.")
    done = run_cli("manifest", "--check", str(bad), "--json")
    assert json.loads(done.stdout)["faults"] == 2  # of the two groups with GPUs
    done = run_cli(
        "manifest",
        config,
        "--kind",
        "cluster",
        "--set",
        "cluster.idle_s=60",
        "--set",
        "cluster.env=[A_KEY]",
    )
    assert "idle_timeout_minutes: 1.0" in done.stdout


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [1", "not valid YAML"),
        ("a: &a [*a]", "an alias stands inside of what it names"),
        ("x" * (2**20 + 1), "takes at most 1,048,576 bytes"),
    ],
)
def test_what_is_no_manifest_is_told(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=told):
        check_file(str(path))
    with pytest.raises(SpecError, match="No such file"):
        check_file(str(tmp_path / "nothing.yaml"))
    path.write_text("source: {uri: x}")
    assert "neither an object of Kubernetes" in str(check_file(str(path))[0])
    path.write_text("")
    assert "holds no document" in str(check_file(str(path))[0])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["c.yaml"], "manifest: takes one config, and --kind rayjob, raycronjob, cronjob, cluster"),
        (["c.yaml", "--kind", "rayjob", "--check"], "manifest: --check takes files"),
        (["no.yaml", "--kind", "rayjob"], "config no.yaml: No such file or directory"),
    ],
)
def test_a_wrong_command_is_told_in_one_line(arguments: list[str], told: str) -> None:
    done = run_cli("manifest", *arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
