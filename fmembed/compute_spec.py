"""How the work of a run is spread: the section `compute` of a config."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fmembed.spec_part import Part as _Part

# What Ray's label selectors take of a label.
_LABELS = re.compile(r"!?[\w.-]+|!?in\(\s*[\w.-]+(?:\s*,\s*[\w.-]+)*\s*\)")


# Ray's name of the resource by which a node tells its accelerator.
_ACCELERATOR = "accelerator_type:"


def _selects(text: str, value: str | None) -> bool:
    """Whether a label's value is what a selector takes: value, !value, in(a, b) or !in(a, b)."""
    wanted = text.removeprefix("!")
    if wanted.startswith("in("):
        found = value in [word.strip() for word in wanted[3:-1].split(",")]
    else:
        found = value == wanted
    return found is not text.startswith("!")


class BudgetSpec(_Part):
    """What a run may cost: hours for which its actors hold a device, or money. It stops within a
    window of each actor of the limit; what is finished by then is committed, and another run goes
    on. Never part of the fingerprint.
    """

    device_hours: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    cost: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @property
    def is_set(self) -> bool:
        """Whether there is a limit."""
        return self.device_hours is not None or self.cost is not None


class _Actors(_Part):
    """Processes with the model, how many there are and the GPUs of each."""

    actors: int | tuple[int, int] | Literal["auto"] = "auto"
    gpus_per_actor: float | Literal["auto"] = "auto"

    @field_validator("actors")
    @classmethod
    def _check_actors(cls, value: Any) -> Any:
        if value == "auto":
            return value
        low, high = (value, value) if isinstance(value, int) else value
        if not 1 <= low <= high:
            raise ValueError("takes a number of at least 1, [min, max] with min <= max, or auto")
        return value

    @field_validator("gpus_per_actor")
    @classmethod
    def _check_gpus(cls, value: Any) -> Any:
        if value != "auto" and not 0 <= value < math.inf:
            raise ValueError("takes a number of at least 0, or auto")
        # Ray gives a process a part of one GPU, or whole ones.
        if value != "auto" and value > 1 and value != int(value):
            raise ValueError("takes a part of one GPU, or a whole number of them, or auto")
        return value


class PoolSpec(_Actors):
    """Actors on nodes of one kind, which the nodes' accelerator (as Ray names it), resources or
    labels (as Ray's label selectors) tell. `dtype` is what the model runs in there, null for
    `model.dtype`; `price_per_device_hour` null for the one of all.
    """

    accelerator_type: str | None = Field(default=None, min_length=1)
    resources: dict[str, float] = Field(default={})
    label_selector: dict[str, str] = Field(default={})
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    price_per_device_hour: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    @property
    def is_some(self) -> bool:
        """Whether it is for some nodes only."""
        return bool(self.accelerator_type or self.resources or self.label_selector)

    def words(self, gpus: float) -> str:
        """What an actor asks for, for people."""
        words = [f"accelerator_type {self.accelerator_type}"] if self.accelerator_type else []
        words += [f"{gpus:g} GPU"] if gpus else []
        words += [f"{name} {amount:g}" for name, amount in self.resources.items()]
        return ", ".join([*words, *(f"{k}: {v}" for k, v in self.label_selector.items())])

    def is_of(self, resources: Mapping[str, float], labels: Mapping[str, str] | None) -> bool:
        """Whether a node is of this kind.

        Args:
            resources: Of the node.
            labels: The same; None where nobody knows them, as of a node that has yet to come, whose
                accelerator may be left open, too.
        """
        kinds = {name for name in resources if name.startswith(_ACCELERATOR)}
        is_known = bool(kinds) or labels is not None
        if self.accelerator_type and is_known and _ACCELERATOR + self.accelerator_type not in kinds:
            return False
        if any(resources.get(name, 0) < amount for name, amount in self.resources.items()):
            return False
        return labels is None or all(
            _selects(text, labels.get(key)) for key, text in self.label_selector.items()
        )

    @field_validator("resources")
    @classmethod
    def _check_resources(cls, value: dict[str, float]) -> dict[str, float]:
        own = {"CPU": "is shared out by fmembed", "GPU": "is gpus_per_actor", "memory": "is Ray's"}
        for name, amount in value.items():
            if name in own:
                raise ValueError(f"{name} {own[name]}; takes resources that nodes are given a name")
            if not 0 < amount < math.inf or (amount > 1 and amount != int(amount)):
                raise ValueError("takes for each resource a part of one, or a whole number")
        return value

    @field_validator("label_selector")
    @classmethod
    def _check_labels(cls, value: dict[str, str]) -> dict[str, str]:
        for text in value.values():
            if not _LABELS.fullmatch(text):
                raise ValueError("takes for each label a value, !value, in(a, b) or !in(a, b)")
        return value


class ComputeSpec(_Actors):
    """How the work is spread. Never part of the fingerprint: it cannot change a vector.

    `pools` are in the place of `actors` and `gpus_per_actor`: actors of several kinds, which all
    draw from the same windows. Each is held to what a CPU makes of some rows, or the first of them,
    by cosine: `min_agreement`, where that is left open 0.9999, and 0.999 of 16 bits.
    `price_per_device_hour` is what an hour of one actor's device costs, in any currency. `wait_s`
    is for how long a run without a device waits for one, null for as long as it takes.
    """

    pools: tuple[PoolSpec, ...] = ()
    min_agreement: float | None = Field(default=None, ge=0, le=1)
    batch_tokens: int | Literal["auto"] = "auto"
    window_rows: int | Literal["auto"] = "auto"
    budget: BudgetSpec = BudgetSpec()
    price_per_device_hour: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    wait_s: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    @field_validator("batch_tokens", "window_rows")
    @classmethod
    def _check_positive(cls, value: Any) -> Any:
        if value != "auto" and value < 1:
            raise ValueError("takes a number of at least 1, or auto")
        return value

    @property
    def is_priced(self) -> bool:
        """Whether there is a price for each device."""
        if self.price_per_device_hour is not None:
            return True
        return bool(self.pools) and all(p.price_per_device_hour is not None for p in self.pools)

    @model_validator(mode="after")
    def _check_pools(self) -> ComputeSpec:
        if self.pools and not self.actors == self.gpus_per_actor == "auto":
            raise ValueError("takes pools, each with its actors, or actors and gpus_per_actor")
        if self.min_agreement is not None and not self.pools:
            raise ValueError("min_agreement is between pools; there are none")
        return self
