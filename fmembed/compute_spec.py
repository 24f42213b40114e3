"""How the work of a run is spread: the section `compute` of a config."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fmembed.spec_part import Part as _Part

# Names and values of labels, and what Ray's label selectors take of one.
_WORD = r"[A-Za-z0-9](?:[\w.-]{0,61}[A-Za-z0-9])?"
_PREFIX = re.compile(rf"{_WORD}(?:\.{_WORD})*/.+")
_LABELS = re.compile(rf"!?{_WORD}|!?in\(\s*{_WORD}(?:\s*,\s*{_WORD})*\s*\)")
# Ray counts in steps of so much.
_LEAST_SHARE = 1e-4
_MOST_ACTORS = 100_000


# Ray's name of the resource by which a node tells its accelerator.
_ACCELERATOR = "accelerator_type:"


def parse_selector(text: str) -> tuple[set[str], bool]:
    """What a selector says of a label's value: value, !value, in(a, b) or !in(a, b).

    Returns:
        Some values, and whether it is to be none of them.
    """
    wanted = text.removeprefix("!")
    words = wanted[3:-1].split(",") if wanted.startswith("in(") else [wanted]
    return {word.strip() for word in words}, text.startswith("!")


def _selects(text: str, value: str | None) -> bool:
    values, is_none_of = parse_selector(text)
    return (value in values) is not is_none_of


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

    @field_validator("actors", mode="before")
    @classmethod
    def _check_no_bool(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("takes a number of at least 1, [min, max] with min <= max, or auto")
        return value

    @field_validator("actors")
    @classmethod
    def _check_actors(cls, value: Any) -> Any:
        if value == "auto":
            return value
        low, high = (value, value) if isinstance(value, int) else value
        if not 1 <= low <= high:
            raise ValueError("takes a number of at least 1, [min, max] with min <= max, or auto")
        if high > _MOST_ACTORS:
            raise ValueError(f"takes at most {_MOST_ACTORS:,}")
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
        own = {
            "CPU": "is shared out by fmembed", "GPU": "is gpus_per_actor", "memory": "is Ray's",
            "object_store_memory": "is Ray's",
        }  # fmt: skip
        for name, amount in value.items():
            if name in own:
                raise ValueError(f"{name} {own[name]}; takes resources that nodes were given")
            if not name.strip() or name.startswith("node:"):
                raise ValueError("takes for each resource the name that nodes were given it by")
            if not _LEAST_SHARE <= amount < math.inf or (amount > 1 and amount != int(amount)):
                raise ValueError(
                    f"takes for each resource a part of one, {_LEAST_SHARE:g} at least, or a whole "
                    "number"
                )
        return value

    @field_validator("label_selector")
    @classmethod
    def _check_labels(cls, value: dict[str, str]) -> dict[str, str]:
        for key, text in value.items():
            name = key.rpartition("/")[2]
            if not re.fullmatch(_WORD, name) or (key != name and not _PREFIX.fullmatch(key)):
                raise ValueError("takes names of labels as Kubernetes has them, as zone or a.org/b")
            if not _LABELS.fullmatch(text):
                raise ValueError("takes for each label a value, !value, in(a, b) or !in(a, b)")
        # Ray takes a space for a part of the value.
        return {key: re.sub(r"\s", "", text) for key, text in value.items()}


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
    def first_gpus(self) -> float | Literal["auto"]:
        """The GPUs of an actor of the first pool that says so, or of all; "auto" where none does.

        By what `dtype: auto` means, which the nodes that happen to be there must not decide.
        """
        if not self.pools:
            return self.gpus_per_actor
        named = [1.0 if p.gpus_per_actor == "auto" and p.accelerator_type else p.gpus_per_actor
                 for p in self.pools]  # fmt: skip
        return next((g for g in named if g != "auto" and g > 0), "auto" if "auto" in named else 0.0)

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
            raise ValueError("min_agreement is what pools are held to; there are none")
        return self
