"""What a cluster says that it may have."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml

from fmembed.run import capacity
from fmembed.run.capacity import Pool, declared_pools, nodes_to_come

KINDS = {
    "head": {"resources": {"CPU": 2}, "max_workers": 0},
    "cpu": {"resources": {"CPU": 8}, "min_workers": 1, "max_workers": 4},
    "gpu": {"resources": {"CPU": 8, "GPU": 1, "accelerator_type:T4": 1}, "max_workers": 2},
}


@pytest.fixture
def on_head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A driver on the head of a cluster that tells Ray nothing; where `ray up` puts its config."""
    state: Any = SimpleNamespace(get_cluster_config=lambda: None)
    monkeypatch.setattr("ray._private.state.state", state)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(capacity, "_is_on_head", lambda: True)
    monkeypatch.setattr(capacity, "_BOOTSTRAP", tmp_path / "bootstrap.yaml")
    return tmp_path / "bootstrap.yaml"


def test_the_pools_of_a_cluster_of_ray_up(on_head: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"max_workers": 3, "head_node_type": "head", "available_node_types": KINDS}
    on_head.write_text(yaml.safe_dump(config))
    gpu = {"CPU": 8.0, "GPU": 1.0, "accelerator_type:T4": 1.0}
    assert declared_pools() == [Pool({"CPU": 8.0}, 3), Pool(gpu, 2)]
    alive = [{"CPU": 8.0, "memory": 1.0}, {"CPU": 0.0}]
    monkeypatch.setattr(capacity, "nodes", lambda: alive)
    assert nodes_to_come() == [{"CPU": 8.0}] * 2 + [gpu] * 2
    monkeypatch.setattr(capacity, "_is_on_head", lambda: False)
    assert declared_pools() == []
    monkeypatch.setattr(capacity, "_is_on_head", lambda: True)
    monkeypatch.delenv("RAY_ADDRESS")  # a Ray of its own, started on that machine
    assert declared_pools() == []


@pytest.mark.parametrize(
    "text",
    ["", "[", "- a", "max_workers: x", "available_node_types: {gpu: {resources: {GPU: .nan}}}",
     "available_node_types: {gpu: {resources: [1]}}", "available_node_types: 3"],
)  # fmt: skip
def test_a_config_that_makes_no_sense_declares_nothing(on_head: Path, text: str) -> None:
    on_head.write_text(text)
    assert declared_pools() == []


def test_what_a_platform_tells_ray_is_taken(on_head: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def group(most: int, **resources: int) -> Any:
        return SimpleNamespace(resources=resources, max_count=most)

    groups = [group(0, CPU=1), group(-1, CPU=4, GPU=1), group(2, CPU=8)]
    state: Any = SimpleNamespace(
        get_cluster_config=lambda: SimpleNamespace(node_group_configs=groups)
    )
    monkeypatch.setattr("ray._private.state.state", state)
    assert declared_pools() == [Pool({"CPU": 4, "GPU": 1}, None), Pool({"CPU": 8}, 2)]


def test_a_machine_of_its_own_declares_nothing() -> None:
    assert declared_pools() == []
    assert not capacity.grows()


def test_an_autoscaler_that_is_about_to_begin_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def status(version: int, group: str) -> Any:
        node = SimpleNamespace(ray_node_type_name=group)
        return SimpleNamespace(
            autoscaling_state=SimpleNamespace(autoscaler_state_version=version),
            cluster_resource_state=SimpleNamespace(node_states=[node]),
        )

    def grows(patience_s: float, *statuses: Any) -> bool:
        left = iter(statuses)
        monkeypatch.setattr(capacity, "_status", lambda: next(left))
        return capacity.grows(patience_s)

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(capacity, "_LOOK_S", 0.0)
    assert grows(0.0, status(3, ""))
    assert grows(60.0, status(0, "headgroup"), status(0, "headgroup"), status(1, "headgroup"))
    assert not grows(0.0, status(0, "headgroup"))
    assert not grows(60.0, status(0, ""))  # nobody manages its nodes
