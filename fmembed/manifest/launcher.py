"""The file of Ray's own cluster launcher: `ray up`, then `ray job submit`.

Ray's start commands there do not stay in front of the node, and nothing of Ray's asks the cloud for
the notice that a spot machine is about to go: it is lost without a drain, and the run goes on from
what its windows have finished.
"""

from __future__ import annotations

import shlex
from typing import Any

from fmembed.cluster_spec import ClusterSpec, nfs_of
from fmembed.errors import SpecError
from fmembed.manifest.job import check_reachable
from fmembed.manifest.kubernetes import MARKET
from fmembed.manifest.providers import Choices
from fmembed.spec import RunSpec

# On each node the folder that is copied there, with the environment that the lock makes.
_COPY = "~/fmembed"
_NOT_COPIED = [".git", ".venv", "out", "**/__pycache__", ".mypy_cache", ".ruff_cache"]
_PORTS = "--port=6379 --object-manager-port=8076"


def cluster(spec: RunSpec) -> list[dict[str, Any]]:
    """The launcher's file, which is one document.

    Raises:
        SpecError: `cluster` lacks what the provider needs, or the config cannot run there.
    """
    section = spec.cluster
    assert section is not None
    check_reachable(spec)
    _check(section)
    types = {} if section.provider == "onpremise" else _node_types(section)
    config: dict[str, Any] = {
        "cluster_name": section.name,
        "provider": _provider(section),
        "auth": {"ssh_user": section.launcher.ssh_user},
        "idle_timeout_minutes": section.idle_s / 60,
    }
    if types:
        config["max_workers"] = sum(kind["max_workers"] for kind in types.values())
        config["available_node_types"] = types
        config["head_node_type"] = "head"
    return [{**config, **_install(section), **_start(section)}]


def _check(section: ClusterSpec) -> None:
    launcher = section.launcher
    if section.provider == "gcp":
        for name in ("project", "machine_image"):
            if getattr(launcher, name) is None:
                raise SpecError(
                    f"cluster.launcher.{name}: missing; gcp has no default; gcloud projects list "
                    "and gcloud compute images list tell them"
                )
    if section.provider == "onpremise" and not (launcher.head_ip and launcher.worker_ips):
        raise SpecError(
            "cluster.launcher.head_ip: missing, or worker_ips; on premise Ray's launcher takes the "
            "addresses of machines that are there"
        )
    if section.secret is not None and not section.env:
        raise SpecError(
            f"cluster.env: missing; Ray's launcher has no {section.secret}: name the variables "
            "that a run needs and each machine has, or set cluster.secret to null"
        )
    for path, volume in section.volumes.items():
        if volume != "host" and nfs_of(volume) is None:
            raise SpecError(
                f"cluster.volumes.{path}: {volume} is a claim of Kubernetes; Ray's launcher takes "
                "nfs://server/path, or host: what each machine has there already"
            )


def _provider(section: ClusterSpec) -> dict[str, Any]:
    launcher, region = section.launcher, Choices(section).region
    zone = {"availability_zone": launcher.zone} if launcher.zone else {}
    # A machine that was stopped and kept is paid for by its disk.
    kept = {"cache_stopped_nodes": False}
    match section.provider:
        case "aws":
            return {"type": "aws", "region": region, **zone, **kept}
        case "gcp":
            zone = zone or {"availability_zone": f"{region}-a"}
            return {
                "type": "gcp", "region": region, **zone, "project_id": launcher.project, **kept
            }  # fmt: skip
        case "azure":
            group = {"resource_group": launcher.resource_group}
            if section.service_account:
                # One that is there already: by both of its names Ray makes none.
                group["msi_name"] = section.service_account
                group["msi_resource_group"] = launcher.resource_group
            return {"type": "azure", "location": region, **group, **zone, **kept}
        case "onpremise":
            return {
                "type": "local",
                "head_ip": launcher.head_ip,
                "worker_ips": list(launcher.worker_ips),
            }


def _node_types(section: ClusterSpec) -> dict[str, dict[str, Any]]:
    choices, gpu = Choices(section), section.gpu
    types = {
        "head": {
            "node_config": _machine(section, choices.head_machine),
            "resources": {"CPU": 0, "GPU": 0},
            "min_workers": 0,
            "max_workers": 0,
        }
    }
    if section.cpu.max:
        types["cpu"] = {
            "node_config": _machine(section, choices.cpu_machine),
            "resources": {"CPU": section.cpu.cpus},
            "min_workers": 0,
            "max_workers": section.cpu.max,
        }
    # Spot first, by its priority.
    for name, most, spot in (
        ("gpu-spot", section.max_spot, True),
        ("gpu-on-demand", gpu.max_on_demand, False),
    ):
        if not most:
            continue
        types[name] = {
            "node_config": _machine(section, choices.gpu_machine, gpus=gpu.gpus, spot=spot),
            "resources": {"CPU": gpu.cpus, "GPU": gpu.gpus},
            "labels": {MARKET: "spot" if spot else "on-demand"},
            "priority": 10 if spot else 0,
            "min_workers": 0,
            "max_workers": most,
        }
    return types


def _machine(
    section: ClusterSpec, kind: str, *, gpus: int = 0, spot: bool = False
) -> dict[str, Any]:
    launcher, account = section.launcher, section.service_account
    image = launcher.machine_image
    if section.provider == "aws":
        disk = {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": launcher.disk_gib}}
        config: dict[str, Any] = {"InstanceType": kind, "BlockDeviceMappings": [disk]}
        config |= {"ImageId": image} if image else {}
        config |= {"IamInstanceProfile": {"Name": account}} if account else {}
        return config | ({"InstanceMarketOptions": {"MarketType": "spot"}} if spot else {})
    if section.provider == "gcp":
        return _google_machine(section, kind, gpus, spot)
    # Azure's images of Ray's own defaults, by publisher, or one of the user's by its address.
    parameters: dict[str, Any] = {"vmSize": kind, "osDiskSize": launcher.disk_gib}
    parameters |= {"imageId": image} if image else {
        "imagePublisher": "microsoft-dsvm",
        "imageOffer": "ubuntu-2204",
        "imageSku": "2204-gen2",
        "imageVersion": "latest",
    }  # fmt: skip
    parameters |= {"priority": "Spot"} if spot else {}
    return {"azure_arm_parameters": parameters}


def _google_machine(section: ClusterSpec, kind: str, gpus: int, spot: bool) -> dict[str, Any]:
    account = section.service_account
    source = {
        "diskSizeGb": section.launcher.disk_gib,
        "sourceImage": section.launcher.machine_image,
    }
    disk = {"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": source}
    config: dict[str, Any] = {"machineType": kind, "disks": [disk]}
    if account:
        scope = "https://www.googleapis.com/auth/cloud-platform"
        config["serviceAccounts"] = [{"email": account, "scopes": [scope]}]
    # A machine with GPUs cannot be moved while it runs.
    scheduling: dict[str, Any] = {"onHostMaintenance": "TERMINATE"} if gpus else {}
    if gpus:
        driver = {"key": "install-nvidia-driver", "value": "True"}
        config["metadata"] = {"items": [driver]}
        # The other types bring their own.
        if kind.startswith("n1-"):
            named = Choices(section).google_accelerator
            config["guestAccelerators"] = [{"acceleratorType": named, "acceleratorCount": gpus}]
    if spot:
        scheduling |= {"provisioningModel": "SPOT", "instanceTerminationAction": "DELETE"}
    return config | ({"scheduling": scheduling} if scheduling else {})


def _install(section: ClusterSpec) -> dict[str, Any]:
    """By an image, or from the lock of a copied checkout; and what is mounted."""
    mounts = [line for path, volume in section.volumes.items() for line in _mount(path, volume)]
    config: dict[str, Any] = {"initialization_commands": mounts} if mounts else {}
    if section.image is not None:
        options = [f"--volume={path}:{path}" for path in section.volumes]
        options += [f"--env={name}" for name in section.env]  # by name: its value is the machine's
        docker = {"image": section.image, "container_name": "fmembed", "run_options": options}
        # In place of what Ray's defaults install there.
        return {**config, "docker": docker, "setup_commands": []}
    launcher = section.launcher
    python, path = shlex.quote(launcher.python), 'export PATH="$HOME/fmembed/.venv/bin:$PATH"'
    extras = ",".join(launcher.extras)
    constrained = f"{_COPY}/.venv/bin/python -m pip install -c constraints.txt"
    more = f"cd {_COPY} && {constrained} --no-build-isolation -e {shlex.quote(f'.[{extras}]')}"
    return {
        **config,
        "file_mounts": {_COPY: launcher.checkout},
        "rsync_exclude": _NOT_COPIED,
        "setup_commands": [
            f"command -v {python} > /dev/null || "
            f"(sudo apt-get update && sudo apt-get install -y {python} {python}-venv)",
            f"cd {_COPY} && PYTHON={python} && source jobs/install.sh demo",
            *([more] if extras else []),
            f"grep -qF fmembed/.venv ~/.bashrc || echo {shlex.quote(path)} >> ~/.bashrc",
        ],
    }


def _mount(path: str, volume: str) -> list[str]:
    if (nfs := nfs_of(volume)) is None:
        return []
    share, at = shlex.quote(f"{nfs[0]}:{nfs[1]}"), shlex.quote(path)
    return [
        "command -v mount.nfs > /dev/null || "
        "(sudo apt-get update && sudo apt-get install -y nfs-common)",
        f"sudo mkdir -p {at} && (mountpoint -q {at} || sudo mount -t nfs {share} {at})",
    ]


def _start(section: ClusterSpec) -> dict[str, Any]:
    """How Ray is started: not without the variables that are named, and on the head for no task."""
    # A variable that is missing is found out here, and not by a run that has fetched its GPUs.
    needed = [
        f'test -n "${name}" || {{ echo {name} is in cluster.env and not set here >&2; exit 1; }}'
        for name in section.env
    ]
    head = (
        f"ulimit -n 65536; ray start --head {_PORTS} --num-cpus=0 --num-gpus=0 "
        "--autoscaling-config=~/ray_bootstrap_config.yaml"
    )
    worker = "ulimit -n 65536; ray start --address=$RAY_HEAD_IP:6379 --object-manager-port=8076"
    return {
        "head_start_ray_commands": [*needed, "ray stop", head],
        "worker_start_ray_commands": [*needed, "ray stop", worker],
    }
