"""What differs from cloud to cloud: types of machines, and how nodes are marked."""

from __future__ import annotations

from dataclasses import dataclass, field

from fmembed.cluster_spec import ClusterSpec, Provider
from fmembed.errors import SpecError


@dataclass(frozen=True)
class _Facts:
    """One provider's. `machines` is by accelerator and how many of them a machine has."""

    region: str = ""
    head: str = ""
    cpu: str = ""
    accelerator: str | None = None
    machines: dict[tuple[str, int], str] = field(default_factory=dict)
    # Nodes of Kubernetes that are spot ones, and what keeps other pods away from them.
    spot_selector: dict[str, str] = field(default_factory=dict)
    spot_taints: tuple[str, ...] = ()
    gpu_taints: tuple[str, ...] = ("nvidia.com/gpu:NoSchedule",)


_PROVIDERS: dict[Provider, _Facts] = {
    "aws": _Facts(
        region="us-west-2",
        head="m6i.xlarge",
        cpu="m6i.4xlarge",
        accelerator="L4",
        machines={
            ("T4", 1): "g4dn.2xlarge",
            ("T4", 4): "g4dn.12xlarge",
            ("A10G", 1): "g5.2xlarge",
            ("A10G", 4): "g5.12xlarge",
            ("L4", 1): "g6.2xlarge",
            ("L4", 4): "g6.12xlarge",
            ("L40S", 1): "g6e.2xlarge",
            ("L40S", 4): "g6e.12xlarge",
            ("A100", 8): "p4d.24xlarge",
            ("H100", 8): "p5.48xlarge",
        },
        spot_selector={"eks.amazonaws.com/capacityType": "SPOT"},
    ),
    "gcp": _Facts(
        region="us-west1",
        head="n2-standard-4",
        cpu="n2-standard-16",
        accelerator="L4",
        machines={
            ("T4", 1): "n1-standard-8",
            ("T4", 4): "n1-standard-32",
            ("L4", 1): "g2-standard-8",
            ("L4", 2): "g2-standard-24",
            ("L4", 4): "g2-standard-48",
            ("A100", 1): "a2-highgpu-1g",
            ("A100", 2): "a2-highgpu-2g",
            ("A100", 4): "a2-highgpu-4g",
            ("A100", 8): "a2-highgpu-8g",
            ("H100", 8): "a3-highgpu-8g",
        },
        spot_selector={"cloud.google.com/gke-spot": "true"},
        spot_taints=("cloud.google.com/gke-spot=true:NoSchedule",),
    ),
    "azure": _Facts(
        region="westus2",
        head="Standard_D4s_v5",
        cpu="Standard_D16s_v5",
        accelerator="T4",
        machines={
            ("T4", 1): "Standard_NC8as_T4_v3",
            ("T4", 4): "Standard_NC64as_T4_v3",
            ("A100", 1): "Standard_NC24ads_A100_v4",
            ("A100", 2): "Standard_NC48ads_A100_v4",
            ("A100", 4): "Standard_NC96ads_A100_v4",
            ("H100", 1): "Standard_NC40ads_H100_v5",
            ("H100", 2): "Standard_NC80adis_H100_v5",
        },
        spot_selector={"kubernetes.azure.com/scalesetpriority": "spot"},
        spot_taints=("kubernetes.azure.com/scalesetpriority=spot:NoSchedule",),
        gpu_taints=("nvidia.com/gpu:NoSchedule", "sku=gpu:NoSchedule"),
    ),
    "onpremise": _Facts(),
}
# What Google calls them, of its machines and of its nodes of Kubernetes.
_OF_GOOGLE = {
    "T4": "nvidia-tesla-t4",
    "L4": "nvidia-l4",
    "A100": "nvidia-tesla-a100",
    "H100": "nvidia-h100-80gb",
}


@dataclass(frozen=True)
class Choices:
    """A cluster section with what it leaves open filled in by its provider."""

    spec: ClusterSpec

    @property
    def _facts(self) -> _Facts:
        return _PROVIDERS[self.spec.provider]

    @property
    def region(self) -> str:
        """Where machines are."""
        return self.spec.launcher.region or self._facts.region

    @property
    def head_machine(self) -> str:
        """The head's type."""
        return self.spec.head.machine or self._facts.head

    @property
    def cpu_machine(self) -> str:
        """The type of machines that read and prepare."""
        return self.spec.cpu.machine or self._facts.cpu

    @property
    def accelerator(self) -> str | None:
        """The GPUs' type, as Ray calls it."""
        return self.spec.gpu.accelerator or self._facts.accelerator

    @property
    def gpu_machine(self) -> str:
        """The type of machines with the model.

        Raises:
            SpecError: None is known with such GPUs.
        """
        gpu = self.spec.gpu
        known = self._facts.machines.get((self.accelerator or "", gpu.gpus))
        if gpu.machine is None and known is None:
            raise SpecError(
                f"cluster.gpu.machine: missing; fmembed knows no machine of {self.spec.provider} "
                f"with {gpu.gpus} x {self.accelerator or 'GPU'}: give its type"
            )
        return gpu.machine or str(known)

    @property
    def google_accelerator(self) -> str:
        """What Google calls the GPUs.

        Raises:
            SpecError: It is not known.
        """
        if (named := _OF_GOOGLE.get(self.accelerator or "")) is None:
            raise SpecError(
                f"cluster.gpu.accelerator: fmembed knows not what gcp calls {self.accelerator}; "
                f"takes {', '.join(_OF_GOOGLE)}, or give cluster.gpu.selector"
            )
        return named

    @property
    def gpu_selector(self) -> dict[str, str]:
        """Labels of Kubernetes' nodes with such GPUs.

        Raises:
            SpecError: They are not known.
        """
        if self.spec.gpu.selector is not None:
            return self.spec.gpu.selector
        if self.spec.provider == "gcp":
            return {"cloud.google.com/gke-accelerator": self.google_accelerator}
        if self.spec.provider != "onpremise":
            return {"node.kubernetes.io/instance-type": self.gpu_machine}
        if self.accelerator is None:
            return {}
        raise SpecError(
            "cluster.gpu.selector: missing; on premise fmembed knows no label of nodes with "
            f"{self.accelerator}: give one, as nvidia.com/gpu.product: NVIDIA-{self.accelerator}"
        )

    @property
    def gpu_taints(self) -> tuple[str, ...]:
        """Taints of nodes with GPUs."""
        given = self.spec.gpu.taints
        return self._facts.gpu_taints if given is None else given

    @property
    def spot_selector(self) -> dict[str, str]:
        """Labels of spot nodes; empty where there are none."""
        given = self.spec.gpu.spot_selector
        return self._facts.spot_selector if given is None else given

    @property
    def spot_taints(self) -> tuple[str, ...]:
        """Taints of spot nodes."""
        given = self.spec.gpu.spot_taints
        return self._facts.spot_taints if given is None else given
