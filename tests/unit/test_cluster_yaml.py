from __future__ import annotations

import yaml
from conftest import ROOT

from fmembed.manifest.writing import write_manifest
from fmembed.spec import RunSpec


def test_rays_own_schema_accepts_it() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    validate_config(prepare_config(config))


def test_it_is_what_the_command_prints() -> None:
    spec = RunSpec.from_yaml(str(ROOT / "jobs/configs/cluster/aws.yaml"))
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    told = "fmembed manifest jobs/configs/cluster/aws.yaml --kind cluster --output cluster.yaml"
    assert write_manifest(spec, "cluster") == text, told
