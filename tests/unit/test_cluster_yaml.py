from __future__ import annotations

import yaml
from conftest import ROOT


def test_rays_own_schema_accepts_it() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    validate_config(prepare_config(config))
