"""What a run has cost by now, in hours of devices and in money; and when that is enough."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import ray

from fmembed.errors import BudgetSpentError
from fmembed.rows.counts import sum_counts
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
    held_s = sum(n for key, n in counts.items() if key.startswith("actor/")
                 and key.rpartition("/")[2] in _HELD)  # fmt: skip
    spent = {"device_hours": held_s / 3600}
    endpoint = spec.model.endpoint
    if endpoint is not None and endpoint.usd_per_million_tokens is not None:
        tokens = counts.get("endpoint_tokens", 0)
        spent["cost"] = tokens * endpoint.usd_per_million_tokens / 1e6
    elif spec.compute.price_per_device_hour is not None:
        spent["cost"] = spent["device_hours"] * spec.compute.price_per_device_hour
    return spent


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
