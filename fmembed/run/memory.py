"""What Ray Data may hold."""

from __future__ import annotations

import ray
import ray.data
import ray.exceptions
import ray.util.annotations

from fmembed.run.placement import Plan

# What may wait in the object store for each actor: seconds of its work.
_BUFFER_BYTES = {"cpu": 128 * 2**20, "cuda": 2 * 2**30}


def store_bytes(plan: Plan, held_bytes: int) -> int:
    """What Ray Data may hold between the stages: no more than keeps the actors busy.

    By default it fills a half of its object store when reading is faster than the model: the more
    rows, the more memory, up to that. It counts a block against the stage that made it for as long
    as anybody holds it, and half of the whole is for any stage: without room for twice what waits
    to be written, the actors were given nothing to do as soon as a part's worth was waiting, until
    all was read.
    """
    return plan.max_actors * _BUFFER_BYTES[plan.device] + 2 * held_bytes


# Ray's own 128 MiB are held several times over: by the task, its output buffer and the store.
_BLOCK_BYTES = 32 * 2**20


def bound_memory(plan: Plan) -> None:
    """Before a pass; while it runs, `progress.Stages` moves the bound with what is held."""
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = _BLOCK_BYTES
    options = context.execution_options
    options.resource_limits = options.resource_limits.copy(object_store_memory=store_bytes(plan, 0))
