"""Manifests of the config for KubeRay, as documents."""

from __future__ import annotations

from typing import Any

import yaml
from conftest import ROOT

from fmembed.manifest.writing import write_manifest
from fmembed.spec import RunSpec

CONFIGS = sorted((ROOT / "jobs/configs/cluster").glob("*.yaml"))
# Of the configs that are for Ray's launcher, what Kubernetes needs besides.
FOR_KUBERNETES = {
    "cluster.image": "registry.internal/fmembed:0.1.0-ray-2.60.0",
    "cluster.schedule": "0 3 * * *",
}
# And of the one that is for Kubernetes, what Ray's launcher does.
FOR_LAUNCHER = {"cluster.env": ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]}


def written(kind: str, **overrides: Any) -> list[Any]:
    """The documents of a kind, with fields of the config set to something else."""
    spec = RunSpec.from_yaml(str(ROOT / "jobs/configs/cluster/kuberay.yaml"), overrides)
    return list(yaml.safe_load_all(write_manifest(spec, kind)))
