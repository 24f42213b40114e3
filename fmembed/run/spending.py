"""What a run has cost by now, in hours of devices and in money; and when that is enough."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import ray

from fmembed.errors import BudgetSpentError
from fmembed.model.meter import POOL_SIGN
from fmembed.rows.counts import sum_counts
from fmembed.run.plan import Plan
from fmembed.spec import RunSpec

# What an actor holds its device for, of the figures that `meter.Meter` counts.
_HELD = ("load_s", "wait_s", "busy_s")


def price(spec: RunSpec, counts: Mapping[str, float]) -> dict[str, float]:
    """What some work has cost.

    Args:
        spec: Names the prices.
        counts: What the model's processes have counted, summed.

    Returns:
        `device_hours`, those for which an actor held its device: loading, waiting or at work; and
        `cost`, where the config names a price, in its currency.
    """
    hours: dict[str, float] = defaultdict(float)
    for key, number in counts.items():
        if key.startswith("actor/") and key.rpartition("/")[2] in _HELD:
            hours[_pool_of(key)] += number / 3600
    spent = {"device_hours": float(sum(hours.values()))}
    endpoint = spec.model.endpoint
    if endpoint is not None and endpoint.usd_per_million_tokens is not None:
        tokens = counts.get("endpoint_tokens", 0)
        spent["cost"] = tokens * endpoint.usd_per_million_tokens / 1e6
    elif spec.compute.is_priced:
        spent["cost"] = sum(h * _price_of(spec, pool) for pool, h in hours.items())
    return spent


def _pool_of(key: str) -> str:
    """The pool that a figure's actor is of, as its name begins; empty where there is one only."""
    name = key.split("/")[1]
    return name.partition("-")[0] if name.startswith(POOL_SIGN) else ""


def _price_of(spec: RunSpec, pool: str) -> float:
    compute, price = spec.compute, None
    if pool and (i := int(pool.removeprefix(POOL_SIGN))) < len(compute.pools):
        price = compute.pools[i].price_per_device_hour
    return (compute.price_per_device_hour if price is None else price) or 0.0


def mean_price(spec: RunSpec, plan: Plan) -> float | None:
    """What an hour of a device costs, in the mean over a plan's actors; None without a price."""
    if not spec.compute.is_priced:
        return None
    prices = (_price_of(spec, f"{POOL_SIGN}{i}") * k.max_actors for i, k in enumerate(plan.kinds))
    return sum(prices) / plan.max_actors


class Spending:
    """What has come out of the model is counted as it comes, where there is a limit to it."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._budget = spec.compute.budget
        self._counts: dict[str, float] = {}
        self._under_way: list[Any] = []
        self._task = ray.remote(num_cpus=0)(_sum_counts)

    def add(self, bundle: Any) -> None:
        """Count a bundle.

        Raises:
            BudgetSpentError: With it the budget is spent.
        """
        if not self._budget.is_set:
            return
        self._under_way.append(self._task.remote(*bundle.block_refs))
        num_left = len(self._under_way)
        done, self._under_way = ray.wait(self._under_way, num_returns=num_left, timeout=0)
        for counts in ray.get(done):
            for name, count in counts.items():
                self._counts[name] = self._counts.get(name, 0) + count
        spent = price(self._spec, self._counts)
        for name, limit in (
            ("device_hours", self._budget.device_hours), ("cost", self._budget.cost),
        ):  # fmt: skip
            if limit is not None and spent.get(name, 0) >= limit:
                raise BudgetSpentError(
                    f"compute.budget.{name}: {spent[name]:.6g} of {limit:g} are spent"
                )


def _sum_counts(*blocks: pa.Table) -> dict[str, float]:
    return sum_counts(pa.concat_tables(blocks, promote_options="default"))
