"""What the actors and tasks of a run are given: of one kind, or of several pools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from fmembed.checkpoint.opening import Checkpoint


@dataclass(frozen=True)
class Actors:
    """How many, and what each is given: `cpus_per_actor` is what Ray reserves, `num_threads` what
    torch uses.
    """

    device: str
    min_actors: int
    max_actors: int
    gpus_per_actor: float
    cpus_per_actor: float
    num_threads: int


@dataclass(frozen=True)
class Pool(Actors):
    """Those of one kind: their nodes have what `accelerator_type`, `resources` and `label_selector`
    ask for, as Ray takes them.
    """

    accelerator_type: str | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    label_selector: Mapping[str, str] = field(default_factory=dict)
    dtype: str | None = None

    @property
    def name(self) -> str:
        """What tells its nodes from others, for people; empty where nothing does."""
        labels = (f"{key} {value}" for key, value in self.label_selector.items())
        return ", ".join(filter(None, [self.accelerator_type, *self.resources, *labels]))

    @property
    def shape(self) -> dict[str, float]:
        """What Ray's scheduler is asked for."""
        asked = {"CPU": self.cpus_per_actor, "GPU": self.gpus_per_actor, **self.resources}
        if self.accelerator_type is not None:  # as Ray counts it
            asked[f"accelerator_type:{self.accelerator_type}"] = 0.001
        return {name: amount for name, amount in asked.items() if amount}

    def run_as(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint in the pool's own type."""
        return replace(checkpoint, dtype=self.dtype or checkpoint.dtype)

    @property
    def device_options(self) -> dict[str, Any]:
        """What the stage is told of its device."""
        told: dict[str, Any] = {"device": self.device, "num_threads": self.num_threads}
        if 0 < self.gpus_per_actor < 1:
            told["gpu_share"] = self.gpus_per_actor
        return told

    @property
    def options(self) -> dict[str, Any]:
        """What it asks for as options of a task or an actor."""
        named = {
            "accelerator_type": self.accelerator_type,
            "resources": dict(self.resources),
            "label_selector": dict(self.label_selector),
        }
        both = {"num_cpus": self.cpus_per_actor, "num_gpus": self.gpus_per_actor}
        return both | {name: value for name, value in named.items() if value}


@dataclass(frozen=True)
class Plan(Actors):
    """What all actors, and the tasks beside them, are given.

    `num_workers` is how many tasks can read and preprocess at once. `device_name` is the device's
    kind, as the cluster calls it; empty where it has none. Of several `pools` the numbers of actors
    are those of all, and what one is given is the first one's.
    """

    cpus_per_task: float
    num_workers: int
    window_rows: int
    batch_tokens: int | Literal["auto"]
    device_name: str = ""
    pools: tuple[Pool, ...] = ()

    @property
    def kinds(self) -> tuple[Pool, ...]:
        """The pools, be it one that the config has not called so."""
        return self.pools or (Pool(**{f.name: getattr(self, f.name) for f in fields(Actors)}),)

    def of(self, pool: Pool, num_actors: int | None = None) -> Plan:
        """The same with one of the pools alone, of so many actors in place of all of them."""
        low, high = num_actors or pool.min_actors, num_actors or pool.max_actors
        one = replace(pool, min_actors=low, max_actors=high)
        given = {f.name: getattr(one, f.name) for f in fields(Actors)}
        return replace(self, **given, pools=(one,) if self.pools else ())


def describe(plan: Plan) -> str:
    """Who runs the model, in words."""
    return " and ".join(_describe(pool) for pool in plan.kinds)


def _describe(pool: Pool) -> str:
    kind = "GPU" if pool.device == "cuda" else "CPU"
    kind += " actors" if pool.max_actors > 1 else " actor"
    how_many = f"{pool.min_actors:,} to " if pool.min_actors < pool.max_actors else ""
    told = ", ".join(filter(None, [pool.name, pool.dtype]))
    return f"{how_many}{pool.max_actors:,} {kind}{f' ({told})' if told else ''}"
