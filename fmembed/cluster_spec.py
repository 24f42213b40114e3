"""ClusterSpec and its parts: what machines a config runs on, and when.

Only `fmembed manifest` does something with it; every other command checks it and passes it by. So
the same config runs on a laptop, and the section cannot change a vector.
"""

from __future__ import annotations

import re
import zoneinfo
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from fmembed.redaction import looks_like_key
from fmembed.spec_part import Part, is_variable

Provider = Literal["aws", "gcp", "azure", "onpremise"]

# Of constraints.txt: head, workers and driver have to be of one version.
RAY_VERSION = "2.60.0"
# A child of a RayCronJob is called after it, with a dash and the minutes since 1970; 47 fit.
MAX_NAME, MAX_JOB_NAME = 36, 47
# What is left after Ray's drain for the processes to end, before Kubernetes kills them.
DRAIN_MARGIN_S = 15

_LABEL = re.compile(r"[a-z](?:[-a-z0-9]*[a-z0-9])?")  # DNS-1035
_SUBDOMAIN = re.compile(r"[a-z0-9](?:[-a-z0-9.]{0,251}[a-z0-9])?")  # DNS-1123
_IMAGE = re.compile(r"[a-z0-9][\w./:-]*(?:@sha256:[0-9a-f]{64})?")
_TAINT = re.compile(
    r"(?P<key>[\w./-]+)(?:=(?P<value>[\w.-]*))?:(?P<effect>NoSchedule|NoExecute|PreferNoSchedule)"
)
_NFS = re.compile(r"nfs://([\w.-]+)(/[\w./-]*)")
_WORD = re.compile(r"[\w.@/:+-]+")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
# Lowest and highest value of each field of a schedule, and what they may be called.
_CRON = (
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of the month", 1, 31, ()),
    ("month", 1, 12, _MONTHS),
    ("day of the week", 0, 6, _DAYS),
)


def is_label(name: str, most: int) -> bool:
    """Whether a text is a DNS-1035 label of at most so many characters."""
    return len(name) <= most and _LABEL.fullmatch(name) is not None


def is_secret(value: str) -> bool:
    """Whether a value reads like a key, though names joined by dashes may be as long as one."""
    # Of the whole only the beginning, which says what many keys are: sk-, hf_, AKIA.
    return looks_like_key(value[:19]) or any(map(looks_like_key, re.split(r"[-.]", value)))


def fault_of_schedule(schedule: str) -> str | None:
    """What is wrong with a schedule, as Kubernetes and KubeRay read them, or None."""
    if "TZ" in schedule:
        return "takes no time zone: that is a field of its own"
    fields = schedule.split()
    if len(fields) != len(_CRON):
        return "takes five fields: minute, hour, day of the month, month, day of the week"
    for text, (name, low, high, words) in zip(fields, _CRON, strict=True):
        if not all(_is_in_range(item, low, high, words) for item in text.split(",")):
            sunday = " (Sunday is 0)" if words == _DAYS else ""
            return f"its {name} is {text!a:.40}, which is not within {low} to {high}{sunday}"
    return None


def _is_in_range(item: str, low: int, high: int, words: tuple[str, ...]) -> bool:
    match = re.fullmatch(r"(?:[*?]|(\w+)(?:-(\w+))?)(?:/(\d{1,4}))?", item, re.ASCII)
    if match is None or (match[3] is not None and int(match[3]) == 0):
        return False

    def number(word: str) -> int:
        if word.lower() in words:
            return low + words.index(word.lower())
        return int(word) if word.isdigit() and len(word) <= 4 else -1

    first = low if match[1] is None else number(match[1])
    last = first if match[2] is None else number(match[2])
    return low <= first <= last <= high


def is_zone(name: str) -> bool:
    """Whether the time zone is one; where this machine knows none, any is."""
    try:
        zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        return not zoneinfo.available_timezones()
    return True


def ray_version_of(image: str) -> str | None:
    """The version of Ray that an image's tag names, or None where it names none.

    `ray-2.60.0` anywhere in it, or a tag that begins with a version of 2, as Ray's own images have.
    """
    _, _, tag = image.partition("@")[0].rpartition("/")[2].partition(":")
    named = re.search(r"(?<![a-z])ray[-_.]?v?(\d+\.\d+(?:\.\d+)?)", tag) or re.match(
        r"v?(2\.\d+\.\d+)(?![\d.])", tag
    )
    return named[1] if named else None


def toleration(taint: str) -> dict[str, str]:
    """A taint as kubectl writes it, `key=value:NoSchedule` or `key:NoSchedule`, tolerated."""
    match = _TAINT.fullmatch(taint)
    assert match is not None
    if match["value"] is None:
        return {"key": match["key"], "operator": "Exists", "effect": match["effect"]}
    value = {"operator": "Equal", "value": match["value"]}
    return {"key": match["key"], **value, "effect": match["effect"]}


def nfs_of(volume: str) -> tuple[str, str] | None:
    """Server and path of `nfs://server/path`, or None where a volume is something else."""
    match = _NFS.fullmatch(volume)
    return (match[1], match[2]) if match else None


def _check_taint(value: str) -> str:
    if not _TAINT.fullmatch(value):
        raise ValueError("takes taints as kubectl writes them: key=value:NoSchedule")
    return value


def _check_word(value: str) -> str:
    if not _WORD.fullmatch(value) or is_secret(value):
        raise ValueError("takes a name: letters, digits and . _ - / : @ +")
    return value


_Word = Annotated[str, AfterValidator(_check_word)]
_Taint = Annotated[str, AfterValidator(_check_taint)]


class HeadSpec(Part):
    """The machine that schedules and commits. No task runs there, and it is never a spot one."""

    cpus: int = Field(default=3, ge=1)
    memory_gib: int = Field(default=12, ge=2)
    machine: _Word | None = None


class CpuSpec(Part):
    """Machines that read, prepare and write, on demand."""

    cpus: int = Field(default=14, ge=1)
    memory_gib: int = Field(default=52, ge=1)
    machine: _Word | None = None
    max: int = Field(default=8, ge=0, le=10_000)


class GpuSpec(Part):
    """Machines with the model: spot ones first, on-demand ones where those are not to be had.

    Both are of one shape. Ray's autoscaler looks at how well a machine fits before it looks at the
    group's priority, so that of two shapes the dearer one may win.
    """

    gpus: int = Field(default=1, ge=1, le=16)
    accelerator: _Word | None = None
    cpus: int = Field(default=6, ge=1)
    memory_gib: int = Field(default=24, ge=1)
    machine: _Word | None = None
    max_spot: int | None = Field(default=None, ge=0, le=10_000)
    max_on_demand: int = Field(default=2, ge=0, le=10_000)
    selector: dict[_Word, _Word] | None = None
    taints: tuple[_Taint, ...] | None = None
    spot_selector: dict[_Word, _Word] | None = None
    spot_taints: tuple[_Taint, ...] | None = None


class LauncherSpec(Part):
    """What Ray's own cluster launcher has to be told besides, for `--kind cluster`."""

    region: _Word | None = None
    zone: _Word | None = None
    project: _Word | None = None
    resource_group: _Word = "fmembed"
    head_ip: _Word | None = None
    worker_ips: tuple[_Word, ...] = ()
    ssh_user: _Word = "ubuntu"
    machine_image: _Word | None = None
    disk_gib: int = Field(default=256, ge=20)
    python: _Word = "python3.11"
    checkout: str = Field(default=".", min_length=1)
    extras: tuple[_Word, ...] = ()


class ClusterSpec(Part):
    """Where and when a config runs. Never part of the fingerprint.

    All workers come from zero, so that a run with nothing to do costs a head. Secrets are named
    and never given: `secret` is a Kubernetes Secret, `env` the variables that are taken from it, or
    that each machine of Ray's cluster launcher has. `volumes` says what is mounted where: a claim's
    name, `nfs://server/path`, or `host`, what each machine has at that path already.
    """

    name: str
    provider: Provider
    image: str | None = None
    command: Literal["refresh", "embed"] = "refresh"
    if_locked: Literal["skip", "wait", "fail"] = "skip"
    schedule: str | None = None
    timezone: str = "Etc/UTC"
    namespace: str = "default"
    service_account: _Word | None = None
    secret: str | None = None
    env: tuple[str, ...] = ()
    volumes: dict[str, str] = Field(default={})
    head: HeadSpec = HeadSpec()
    cpu: CpuSpec = CpuSpec()
    gpu: GpuSpec = GpuSpec()
    idle_s: int = Field(default=300, ge=10)
    drain_s: int = Field(default=60, ge=1, le=3600)
    grace_s: int = Field(default=90, ge=1, le=7200)
    deadline_s: int = Field(default=86_400, ge=60)
    start_deadline_s: int = Field(default=1_800, ge=60)
    backoff_limit: int = Field(default=2, ge=0, le=10)
    ttl_s: int = Field(default=300, ge=0)
    launcher: LauncherSpec = LauncherSpec()

    @property
    def max_spot(self) -> int:
        """Spot machines with GPUs, at most: four, where the provider has such."""
        given = self.gpu.max_spot
        return given if given is not None else 0 if self.provider == "onpremise" else 4

    @property
    def has_gpus(self) -> bool:
        """Whether there are machines with GPUs at all."""
        return self.max_spot + self.gpu.max_on_demand > 0

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if not is_label(value, MAX_NAME):
            raise ValueError(
                f"takes at most {MAX_NAME} of a-z, 0-9 and -, the first one a letter, the last one "
                "no dash"
            )
        return value

    @field_validator("image")
    @classmethod
    def _check_image(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not _IMAGE.fullmatch(value):
            raise ValueError("takes registry/name:tag, without user and password")
        version = ray_version_of(value)
        if version not in (None, RAY_VERSION, RAY_VERSION.rpartition(".")[0]):
            raise ValueError(
                f"its tag names Ray {version}, and fmembed runs on {RAY_VERSION}: build it on that "
                f"one, and say ray-{RAY_VERSION} in the tag"
            )
        return value

    @field_validator("schedule")
    @classmethod
    def _check_schedule(cls, value: str | None) -> str | None:
        fault = None if value is None else fault_of_schedule(value)
        if fault is not None:
            raise ValueError(f"{fault}; cluster.timezone says the zone, Etc/UTC if none")
        return value

    @field_validator("timezone")
    @classmethod
    def _check_timezone(cls, value: str) -> str:
        if not is_zone(value):
            raise ValueError("takes the name of a time zone, as Europe/Berlin or Etc/UTC")
        return value

    @field_validator("namespace", "secret")
    @classmethod
    def _check_object(cls, value: str | None) -> str | None:
        if value is not None and (not _SUBDOMAIN.fullmatch(value) or is_secret(value)):
            raise ValueError(
                "takes the name of an object of Kubernetes (a-z, 0-9, - and .), and no key; put "
                "the key into a Secret and give the Secret's name"
            )
        return value

    @field_validator("env")
    @classmethod
    def _check_env(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(map(is_variable, value)):
            raise ValueError(
                "takes names of environment variables, as AWS_ACCESS_KEY_ID, and neither values "
                "nor keys; put each into a variable and give its name"
            )
        return value

    @field_validator("volumes")
    @classmethod
    def _check_volumes(cls, value: dict[str, str]) -> dict[str, str]:
        for path, volume in value.items():
            if not re.fullmatch(r"(?:/[\w.-]+)+", path) or "/.." in path or path == "/etc/fmembed":
                raise ValueError("takes absolute paths, as /data, each with what is mounted there")
            if volume != "host" and not _SUBDOMAIN.fullmatch(volume) and not nfs_of(volume):
                raise ValueError(
                    f"{path} takes a claim's name, nfs://server/path, or host: what each machine "
                    "has there already"
                )
        return value

    @model_validator(mode="before")
    @classmethod
    def _refuse_secrets(cls, value: Any) -> Any:
        # They are looked for by those who write `secrets:` and the like.
        for name in value if isinstance(value, dict) else ():
            if isinstance(name, str) and re.search(r"(?i)passw|token|secrets|credential", name):
                raise ValueError(
                    f"{name[:40]!a} is no field: secrets are named and never given; secret: NAME "
                    "of a Kubernetes Secret, env: [NAMES] of variables"
                )
        return value

    @model_validator(mode="after")
    def _check_together(self) -> ClusterSpec:
        if self.grace_s < self.drain_s + DRAIN_MARGIN_S:
            raise ValueError(
                f"grace_s is {self.grace_s}, and Ray's drain_s {self.drain_s}: takes at least "
                f"{self.drain_s + DRAIN_MARGIN_S}, so that a worker is not killed while it drains"
            )
        if self.gpu.max_spot and self.provider == "onpremise" and not self.gpu.spot_selector:
            raise ValueError(
                "gpu.max_spot: onpremise has no spot machines that fmembed knows: give "
                "gpu.spot_selector, the labels of such nodes, or max_spot: 0"
            )
        if not self.cpu.max and not self.has_gpus:
            raise ValueError("cpu.max and gpu.max_on_demand are 0: the head alone runs no task")
        return self
