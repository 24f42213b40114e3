"""What of a config a job takes with it, and its command; refused where it could not run there."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from fmembed.cluster_spec import ClusterSpec
from fmembed.errors import SpecError
from fmembed.redaction import without_secrets
from fmembed.spec import RunSpec

# Where the config is in the head's container, in which the driver runs.
CONFIG_FOLDER, CONFIG_NAME = "/etc/fmembed", "config.yaml"


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as they are, and no anchors, which people do not read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump(*documents: Any) -> str:
    """Documents as YAML, keys in their order."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def command_line(cluster: ClusterSpec) -> str:
    """What the job runs."""
    config = f"{CONFIG_FOLDER}/{CONFIG_NAME}"
    return shlex.join(["fmembed", cluster.command, config, "--if-locked", cluster.if_locked])


def config_of_job(spec: RunSpec) -> str:
    """What the config says besides `cluster`, as YAML.

    Raises:
        SpecError: It holds a secret, or names what no machine of a cluster has.
    """
    raw = spec.model_dump(mode="json", exclude_unset=True, exclude={"cluster"})
    for name, value in _texts(raw):
        if without_secrets(value) != value:
            raise SpecError(
                f"{name}: holds a login or a query, which all who may read the manifest would see; "
                "give the URL without, and credentials by cluster.secret or cluster.env"
            )
    check_reachable(spec)
    return dump(_with_pools(raw, spec))


def _with_pools(raw: dict[str, Any], spec: RunSpec) -> dict[str, Any]:
    """With the GPUs that may come, where the config leaves that open: KubeRay (1.7) does not tell
    a run which workers its cluster may have, and none is there yet when it is planned.
    """
    cluster, compute = spec.cluster, spec.compute
    assert cluster is not None
    for i, pool in enumerate(compute.pools):
        kinds = (None, cluster.gpu.accelerator)
        if pool.accelerator_type not in kinds or pool.resources or pool.label_selector:
            raise SpecError(
                f"compute.pools.{i}: the workers with GPUs of these files are all of one kind, "
                "that of cluster.gpu; leave the pool out, or write its group of workers by hand "
                "into the file of a config without it"
            )
        for name in ("actors", "gpus_per_actor"):
            if getattr(pool, name) == "auto":
                raise SpecError(
                    f"compute.pools.{i}.{name}: takes numbers here, as a run is not told which "
                    "workers its cluster may have, and none is there yet when it is planned"
                )
    if compute.pools:
        return raw
    given = compute.gpus_per_actor
    if spec.model.endpoint is not None or not cluster.has_gpus or given == 0:
        return raw
    each = 1.0 if given == "auto" else given
    per_node = int(cluster.gpu.gpus / each + 1e-9)
    told: dict[str, Any] = {"gpus_per_actor": 1} if given == "auto" else {}
    if compute.actors == "auto" and per_node:
        told["actors"] = [1, per_node * (cluster.max_spot + cluster.gpu.max_on_demand)]
    return {**raw, "compute": {**raw.get("compute", {}), **told}}


def check_reachable(spec: RunSpec) -> None:
    """Refuse what other machines do not have.

    Raises:
        SpecError: A path that is not on a volume, or a key in a variable that is not handed on.
    """
    assert spec.cluster is not None
    adapter, root = spec.model.adapter, spec.source.root
    output, store = spec.output.uri, spec.output.store
    places = {"output.store": store} if store is not None else {"output.uri": output}
    places |= {"source.uri": spec.source.uri}
    places |= {"source.root": root} if root is not None else {}
    # Of these a word may be an id of the hub: a path where it is written as one, or there is one.
    maybe = {"model.id": spec.model.id} | ({"model.adapter": adapter} if adapter else {})
    maybe |= {"source.uri": places.pop("source.uri")} if spec.source.format == "hf" else {}
    places |= {
        name: value
        for name, value in maybe.items()
        if value.startswith(("/", ".", "~")) or Path(value).exists()
    }
    for name, value in places.items():
        if value == "-":
            raise SpecError(f"{name}: - is standard input, which a job has not; give a URL")
        path = value.removeprefix("file://")
        if "://" in path or value.startswith("package:"):
            continue
        if not any(f"{path}/".startswith(f"{volume}/") for volume in spec.cluster.volumes):
            raise SpecError(
                f"{name}: {value[:200]} is a path of this machine: give a URL, or an absolute path "
                "below one of cluster.volumes, which all machines share"
            )
    endpoint, cluster = spec.model.endpoint, spec.cluster
    # Without names the whole Secret is handed on, whatever is in it.
    all_of_it = cluster.secret is not None and not cluster.env
    if endpoint is not None and endpoint.api_key_env not in cluster.env and not all_of_it:
        raise SpecError(
            f"model.endpoint.api_key_env: no machine has {endpoint.api_key_env}: name it in "
            "cluster.env"
        )


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """All texts in a mapping, by dotted name."""
    if isinstance(value, str):
        yield name, value
    parts: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else ()
    parts = enumerate(value) if isinstance(value, list) else parts
    for key, part in parts:
        yield from _texts(part, f"{name}.{key}" if name else str(key))
