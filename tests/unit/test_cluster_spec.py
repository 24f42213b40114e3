"""The section `cluster` of a config: little is enough, and a mistake is told by every command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, run_cli

from fmembed.cluster_spec import (
    RAY_VERSION,
    fault_of_schedule,
    is_secret,
    is_zone,
    ray_version_of,
    toleration,
)
from fmembed.errors import SpecError
from fmembed.spec import RunSpec

BASE: dict[str, Any] = {
    "source": {"uri": "s3://bucket/articles"},
    "model": {"id": "sentence-transformers/all-MiniLM-L6-v2"},
    "output": {"uri": "s3://bucket/table"},
}


def parse(**cluster: Any) -> RunSpec:
    return RunSpec.parse({**BASE, "cluster": {"name": "a", "provider": "aws", **cluster}})


def test_a_name_and_a_provider_are_enough() -> None:
    cluster = parse().cluster
    assert cluster is not None
    assert cluster.command == "refresh"
    assert cluster.if_locked == "skip"
    assert cluster.max_spot == 4
    on_premise = parse(provider="onpremise").cluster
    assert on_premise is not None
    assert on_premise.max_spot == 0


def test_it_is_no_part_of_what_a_table_keeps() -> None:
    assert parse(schedule="0 3 * * *").stored() == RunSpec.parse(BASE).stored()


def test_its_version_of_ray_is_the_pinned_one() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"ray=={RAY_VERSION}" in lines


@pytest.mark.parametrize(
    ("cluster", "told"),
    [
        ({"name": "Articles"}, "cluster.name: takes at most 36 of a-z, 0-9 and -"),
        ({"name": "a" * 37}, "cluster.name: takes at most 36"),
        ({"name": "1a"}, "cluster.name: takes at most 36"),
        ({"provider": "gke"}, "cluster.provider: takes 'aws', 'gcp', 'azure' or 'onpremise'"),
        ({"shedule": "0 3 * * *"}, "cluster.shedule: unknown key; did you mean schedule?"),
        ({"gpu": {"cups": 4}}, "cluster.gpu.cups: unknown key; did you mean cpus?"),
        ({"schedule": "TZ=UTC 0 3 * * *"}, "cluster.schedule: takes no time zone"),
        ({"schedule": "@daily"}, "cluster.schedule: takes five fields"),
        ({"timezone": "Mars/Base"}, "cluster.timezone: takes the name of a time zone"),
        ({"image": "rayproject/ray:2.50.0"}, "cluster.image: its tag names Ray 2.50.0"),
        ({"image": "x/fmembed:1-ray2.9"}, "cluster.image: its tag names Ray 2.9"),
        ({"image": "me:pw@host/x"}, "cluster.image: takes registry/name:tag"),
        ({"secret": "sk-abcdef0123"}, "cluster.secret: takes the name of an object"),
        ({"secret": "A Secret"}, "cluster.secret: takes the name of an object"),
        ({"env": ["AKIAIOSFODNN7EXAMPLE"]}, "cluster.env: takes names of environment variables"),
        ({"env": ["HF_TOKEN=hf_abc"]}, "cluster.env: takes names of environment variables"),
        ({"secrets": {"key": "x"}}, "cluster: 'secrets' is no field: secrets are named"),
        ({"password": "hunter2"}, "cluster: 'password' is no field: secrets are named"),
        ({"service_account": "hf_abcdefghijkl"}, "cluster.service_account: takes a name"),
        ({"grace_s": 60}, "cluster: grace_s is 60, and Ray's drain_s 60: takes at least 75"),
        ({"volumes": {"data": "x"}}, "cluster.volumes: takes absolute paths"),
        ({"volumes": {"/a/../b": "x"}}, "cluster.volumes: takes absolute paths"),
        ({"volumes": {"/data": "s3://x"}}, "cluster.volumes: /data takes a claim's name"),
        ({"gpu": {"taints": ["a=b"]}}, "cluster.gpu.taints.0: takes taints as kubectl"),
        ({"gpu": {"max_spot": -1}}, "cluster.gpu.max_spot: takes a number of at least 0"),
        (
            {"provider": "onpremise", "gpu": {"max_spot": 2}},
            "cluster: gpu.max_spot: onpremise has no spot machines that fmembed knows",
        ),
        (
            {"cpu": {"max": 0}, "gpu": {"max_spot": 0, "max_on_demand": 0}},
            "cluster: cpu.max and gpu.max_on_demand are 0: the head alone runs no task",
        ),
    ],
)
def test_a_mistake_is_told_by_its_field(cluster: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError) as e:
        parse(**cluster)
    assert str(e.value).startswith(told)
    assert "\n" not in str(e.value)
    assert not any(secret in str(e.value) for secret in ("hunter2", "hf_abc", "AKIA", "sk-abc"))


def test_what_is_missing_is_named() -> None:
    with pytest.raises(SpecError, match=r"cluster\.name: missing; cluster takes backoff_limit"):
        RunSpec.parse({**BASE, "cluster": {"provider": "aws"}})


def test_a_run_tells_it_before_it_looks_for_anything(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**BASE, "cluster": {"name": "a", "provider": "aws"}}))
    done = run_cli("refresh", str(config), "--set", "cluster.schedule=daily")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("fmembed: cluster.schedule: takes five fields")


@pytest.mark.parametrize("schedule", ["0 3 * * *", "*/15 0-6,20 1 jan-mar MON", "5/10 ? * * 0-6/2"])
def test_schedules_that_are_some(schedule: str) -> None:
    assert fault_of_schedule(schedule) is None


@pytest.mark.parametrize(
    "schedule",
    ["", "* * * *", "60 * * * *", "* * 0 * *", "* * * 13 *", "* * * * 7", "*/0 * * * *",
     "5-1 * * * *", "1-2-3 * * * *", "x * * * *", "* * * * mon-sun,", "-1 * * * *", "٣ * * * *"],
)  # fmt: skip
def test_schedules_that_are_none(schedule: str) -> None:
    assert fault_of_schedule(schedule) is not None


@pytest.mark.parametrize(
    ("image", "version"),
    [
        ("rayproject/ray:2.60.0-py311-gpu", "2.60.0"),
        ("registry:5000/team/fmembed:0.1.0-ray-2.60.0", "2.60.0"),
        ("fmembed:torch2.13.0-ray2.59", "2.59"),
        ("fmembed:v2.50.1", "2.50.1"),
        ("fmembed:0.1.0", None),
        ("fmembed:xray-1.2.3", None),
        ("registry:5000/fmembed", None),
        ("fmembed@sha256:" + "0" * 64, None),
    ],
)
def test_the_version_that_a_tag_names(image: str, version: str | None) -> None:
    assert ray_version_of(image) == version


def test_names_joined_by_dashes_are_no_keys() -> None:
    assert not is_secret("fmembed-storage-credentials-2")
    assert not is_secret("articles.embeddings-eu-west-1.internal")
    assert is_secret("hf_abcdefghijklmnop")
    assert is_secret("wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY")


def test_taints_are_tolerated_as_kubectl_writes_them() -> None:
    assert toleration("a/b=c:NoSchedule") == {
        "key": "a/b", "operator": "Equal", "value": "c", "effect": "NoSchedule"
    }  # fmt: skip
    assert toleration("a:NoExecute") == {
        "key": "a", "operator": "Exists", "effect": "NoExecute"
    }  # fmt: skip


def test_time_zones_are_known() -> None:
    assert is_zone("Europe/Berlin")
    assert not is_zone("Europe/Atlantis")
    assert not is_zone("../../etc/passwd")
