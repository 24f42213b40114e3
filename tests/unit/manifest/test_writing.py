"""What is written for a cluster: whole, from zero, with the config in it and no secret."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import CONFIGS, FOR_KUBERNETES, FOR_LAUNCHER, written

from fmembed.errors import SpecError
from fmembed.manifest.writing import KINDS, write_manifest
from fmembed.spec import RunSpec

SHORT = {
    "source.uri": "s3://bucket/articles",
    "model.id": "sentence-transformers/all-MiniLM-L6-v2",
    "output.uri": "s3://bucket/table",
    "cluster.name": "articles",
    "cluster.provider": "aws",
}


def documents(kind: str, overrides: dict[str, Any]) -> list[Any]:
    text = write_manifest(RunSpec.from_yaml(None, {**SHORT, **overrides}), kind)
    return list(yaml.safe_load_all(text))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_has_a_manifest_of_every_kind(config: Path, kind: str) -> None:
    needed = FOR_LAUNCHER if kind == "cluster" else FOR_KUBERNETES
    found = write_manifest(RunSpec.from_yaml(str(config), needed), kind)
    assert found.startswith("# For ")
    assert all(isinstance(document, dict) for document in yaml.safe_load_all(found))


@pytest.mark.parametrize("with_image", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_rays_own_schema_takes_what_is_for_its_launcher(config: Path, with_image: bool) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    image = {"cluster.image": FOR_KUBERNETES["cluster.image"]} if with_image else {}
    spec = RunSpec.from_yaml(str(config), FOR_LAUNCHER | image)
    validate_config(prepare_config(yaml.safe_load(write_manifest(spec, "cluster"))))


@pytest.mark.parametrize(
    ("provider", "spot"),
    [
        ("aws", {"InstanceMarketOptions": {"MarketType": "spot"}}),
        (
            "gcp",
            {
                "scheduling": {
                    "onHostMaintenance": "TERMINATE",
                    "provisioningModel": "SPOT",
                    "instanceTerminationAction": "DELETE",
                }
            },
        ),
        ("azure", {"priority": "Spot"}),
    ],
)
def test_spot_machines_come_first_and_differ_in_nothing_but_that(
    provider: str, spot: dict[str, Any]
) -> None:
    gcp = {"cluster.launcher.project": "p", "cluster.launcher.machine_image": "i"}
    (found,) = documents("cluster", {"cluster.provider": provider, **gcp})
    types = found["available_node_types"]
    assert [t["min_workers"] for t in types.values()] == [0, 0, 0, 0]
    first, second = types["gpu-spot"], types["gpu-on-demand"]
    assert first["priority"] > second["priority"]
    assert first["resources"] == second["resources"] == {"CPU": 6, "GPU": 1}
    node, other = first["node_config"], second["node_config"]
    node, other = node.get("azure_arm_parameters", node), other.get("azure_arm_parameters", other)
    assert spot.items() <= node.items()
    assert {**node, **spot} == {**other, **spot}
    assert node != other


def test_the_config_reaches_the_job_without_the_section_cluster() -> None:
    config, job = written("rayjob")
    inner = yaml.safe_load(config["data"]["config.yaml"])
    assert "cluster" not in inner
    assert RunSpec.parse(inner).refresh.max_removed_fraction == 0.05
    assert job["spec"]["entrypoint"] == (
        "fmembed refresh /etc/fmembed/config.yaml --if-locked skip"
    )
    pod = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (mount,) = pod["containers"][0]["volumeMounts"]
    (volume,) = pod["volumes"]
    assert (mount["name"], mount["mountPath"]) == (volume["name"], "/etc/fmembed")
    assert volume["configMap"]["name"] == config["metadata"]["name"]


def test_a_head_alone_is_there_while_there_is_nothing_to_do() -> None:
    cluster = written("rayjob")[1]["spec"]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == 0
        pod = group["template"]["spec"]
        assert pod["restartPolicy"] == "Never"
        resources = pod["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"]
    _, spot, on_demand = cluster["workerGroupSpecs"]
    assert spot["template"]["spec"]["containers"] == on_demand["template"]["spec"]["containers"]
    assert spot["priority"] > on_demand["priority"]


def test_on_demand_pods_stay_away_from_spot_nodes_and_spot_pods_from_others() -> None:
    changes = {"cluster.provider": "azure", "cluster.gpu.selector": {"pool": "gpu"}}
    cluster = written("rayjob", **changes)[1]["spec"]["rayClusterSpec"]
    head, (cpu, spot, on_demand) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    label, value = "kubernetes.azure.com/scalesetpriority", "spot"
    selector = spot["template"]["spec"]["nodeSelector"]
    assert selector == {"pool": "gpu", label: value}
    keys = [t["key"] for t in spot["template"]["spec"]["tolerations"]]
    assert keys == ["nvidia.com/gpu", "sku", label]
    for group in (head, cpu, on_demand):
        pod = group["template"]["spec"]
        (term,) = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
            "nodeSelectorTerms"
        ]
        assert term["matchExpressions"] == [{"key": label, "operator": "NotIn", "values": [value]}]
        assert label not in [t["key"] for t in pod.get("tolerations", [])]


def test_secrets_are_taken_by_name() -> None:
    container = written("rayjob")[1]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"][
        "spec"
    ]["containers"][0]
    assert container["envFrom"] == [{"secretRef": {"name": "articles-storage"}}]
    named = written("rayjob", **{"cluster.env": ["AWS_SECRET_ACCESS_KEY"]})
    container = named[1]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"][
        "containers"
    ][0]
    assert "envFrom" not in container
    assert container["env"] == [
        {
            "name": "AWS_SECRET_ACCESS_KEY",
            "valueFrom": {
                "secretKeyRef": {"name": "articles-storage", "key": "AWS_SECRET_ACCESS_KEY"}
            },
        }
    ]
    (launched,) = written("cluster", **{"cluster.env": ["AWS_SECRET_ACCESS_KEY"]})
    assert launched["docker"]["run_options"] == ["--env=AWS_SECRET_ACCESS_KEY"]
    check = launched["head_start_ray_commands"][0]
    unset = subprocess.run(["bash", "-c", check], capture_output=True, text=True, env={})
    assert unset.returncode == 1
    assert unset.stderr == "AWS_SECRET_ACCESS_KEY is in cluster.env and not set here\n"
    there = {"AWS_SECRET_ACCESS_KEY": "x"}
    assert subprocess.run(["bash", "-c", check], env=there).returncode == 0


def test_what_all_machines_share_is_mounted_in_all_of_them() -> None:
    volumes = {"/data": "articles-claim", "/models": "nfs://files/models", "/cache": "host"}
    changes = {
        "cluster.volumes": volumes,
        "output.uri": "/data/table",
        "model.id": "/models/minilm",
        **FOR_KUBERNETES,
    }
    cluster = documents("rayjob", changes)[1]["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        found = {v["name"]: v for v in pod["volumes"] if v["name"].startswith("volume-")}
        at = {m["mountPath"]: found.get(m["name"]) for m in pod["containers"][0]["volumeMounts"]}
        assert at["/data"]["persistentVolumeClaim"] == {"claimName": "articles-claim"}
        assert at["/models"]["nfs"] == {"server": "files", "path": "/models"}
        assert at["/cache"]["hostPath"]["path"] == "/cache"


def test_the_cronjob_has_the_rayjob_and_may_make_it() -> None:
    config, account, role, binding, cron = written("cronjob")
    (inner,) = yaml.safe_load_all(config["data"]["rayjob.yaml"])
    assert inner == written("rayjob")[1]
    (rule,) = role["rules"]
    assert (rule["resources"], rule["verbs"]) == (["rayjobs"], ["create", "get"])
    assert binding["subjects"][0]["name"] == account["metadata"]["name"]
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    job = cron["spec"]["jobTemplate"]["spec"]
    assert job["template"]["spec"]["serviceAccountName"] == account["metadata"]["name"]
    # Longer than all attempts of the job for which it waits.
    assert job["activeDeadlineSeconds"] > 3 * (21_600 + 1_800)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_commands_of_rays_launcher_are_bash(config: Path) -> None:
    spec = RunSpec.from_yaml(str(config), FOR_LAUNCHER)
    found = yaml.safe_load(write_manifest(spec, "cluster"))
    commands = [c for name, part in found.items() if name.endswith("_commands") for c in part]
    assert len(commands) > 3
    for command in commands:
        assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0, command


def test_rays_autoscaler_reads_the_same_of_it() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _derive_autoscaling_config_from_ray_cr,
    )

    cluster = written("rayjob")[1]["spec"]["rayClusterSpec"]
    resource = {"metadata": {"name": "articles", "namespace": "embeddings"}, "spec": cluster}
    found = _derive_autoscaling_config_from_ray_cr(resource)
    types = found["available_node_types"]
    assert list(types) == ["headgroup", "cpu", "gpu-spot", "gpu-on-demand"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert [t["min_workers"] for t in types.values()] == [0, 0, 0, 0]
    assert [t["max_workers"] for t in types.values()] == [0, 8, 8, 2]
    spot, on_demand = types["gpu-spot"], types["gpu-on-demand"]
    assert spot["resources"] == on_demand["resources"]
    assert (spot["resources"]["CPU"], spot["resources"]["GPU"]) == (6, 1)
    assert spot["priority"] > on_demand["priority"]
    assert spot["labels"] == {"ray.io/market-type": "spot"}
    assert found["idle_timeout_minutes"] == 5.0


def test_a_store_is_a_place_like_a_table() -> None:
    stored = {**SHORT, **FOR_KUBERNETES, "output.store": "s3://bucket/store"}
    del stored["output.uri"]
    assert write_manifest(RunSpec.from_yaml(None, stored), "rayjob")
    stored["output.store"] = "out/store"
    with pytest.raises(SpecError, match=r"output\.store: out/store is a path of this machine"):
        write_manifest(RunSpec.from_yaml(None, stored), "rayjob")


def test_values_are_quoted_wherever_they_go() -> None:
    odd = {"source.input": "a: b #c\n- d", "cluster.launcher.extras": ["aws"]}
    (config, _) = documents("rayjob", {**odd, **FOR_KUBERNETES})
    assert yaml.safe_load(config["data"]["config.yaml"])["source"]["input"] == "a: b #c\n- d"
    (found,) = documents("cluster", {"cluster.launcher.checkout": "my folder: x", **odd})
    assert found["file_mounts"] == {"~/fmembed": "my folder: x"}
    assert any(line.endswith("-e '.[aws]'") for line in found["setup_commands"])


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("job", {}, "--kind: takes rayjob, raycronjob, cronjob, cluster, got 'job'"),
        ("rayjob", {}, "cluster.image: missing; Kubernetes runs images"),
        ("raycronjob", {"cluster.schedule": None}, "cluster.schedule: missing; give five"),
        ("cronjob", {"cluster.schedule": None}, "cluster.schedule: missing; give five"),
        ("rayjob", {"cluster.env": ["A_KEY"]}, "cluster.secret: missing; the Secret that holds"),
        ("rayjob", {"output.uri": "out/table"}, "output.uri: out/table is a path of this machine"),
        ("cluster", {"output.uri": "/data/x"}, "output.uri: /data/x is a path of this machine"),
        ("rayjob", {"source.uri": "-"}, "source.uri: - is standard input"),
        ("cluster", {"model.id": "./model"}, "model.id: ./model is a path of this machine"),
        (
            "rayjob",
            {"source.uri": "https://user:pw@host/x.csv"},
            "source.uri: holds a login or a query",
        ),
        (
            "rayjob",
            {"model.endpoint": {"base_url": "https://h/v1"}},
            "model.endpoint.api_key_env: no machine has OPENAI_API_KEY: name it in cluster.env",
        ),
        ("cluster", {"cluster.gpu.gpus": 3}, "cluster.gpu.machine: missing; fmembed knows no"),
        ("cluster", {"cluster.provider": "gcp"}, "cluster.launcher.project: missing"),
        ("cluster", {"cluster.provider": "onpremise"}, "cluster.launcher.head_ip: missing"),
        ("cluster", {"cluster.volumes": {"/data": "claim"}}, "is a claim of Kubernetes"),
        ("cluster", {"cluster.secret": "s3"}, "cluster.env: missing; Ray's launcher has no s3"),
        (
            "rayjob",
            {"cluster.provider": "onpremise", "cluster.gpu.accelerator": "L4"},
            "cluster.gpu.selector: missing",
        ),
        (
            "rayjob",
            {"cluster.provider": "gcp", "cluster.gpu.accelerator": "MI300"},
            "cluster.gpu.accelerator: fmembed knows not what gcp calls MI300",
        ),
        (
            "rayjob",
            {"compute.pools": [{"accelerator_type": "H100"}]},
            "compute.pools.0: the workers with GPUs of these files are all of one kind",
        ),
        (
            "rayjob",
            {"compute.pools": [{"actors": 2, "gpus_per_actor": 1}, {"actors": 2}]},
            "compute.pools.1.gpus_per_actor: takes numbers here",
        ),
    ],
)
def test_what_cannot_run_there_is_told_in_one_line(
    kind: str, changes: dict[str, Any], told: str
) -> None:
    needed = {} if told.startswith("cluster.image") else FOR_KUBERNETES
    with pytest.raises(SpecError) as e:
        documents(kind, {**needed, **changes})
    assert str(e.value).startswith(told) or told in str(e.value)
    assert "\n" not in str(e.value)
    assert "pw" not in str(e.value)


def test_a_config_without_the_section_is_told_what_to_give() -> None:
    plain = {name: value for name, value in SHORT.items() if not name.startswith("cluster")}
    with pytest.raises(SpecError, match=r"cluster: missing; give at least cluster\.name"):
        write_manifest(RunSpec.from_yaml(None, plain), "rayjob")
