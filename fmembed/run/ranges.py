"""The ranges of int8: what a step of each dimension is a fraction of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.exceptions

from fmembed.errors import SourceError
from fmembed.inputs import Inputs
from fmembed.rows.columns import accepted
from fmembed.rows.precision import PRECISIONS, Ranges, measure_ranges, ranges_from_lists
from fmembed.run.faults import TASK_DEATHS, root_cause
from fmembed.run.plan import Plan
from fmembed.run.pools import measure
from fmembed.run.stages import apply, prepare, read, stage_options
from fmembed.sources.shards import sample
from fmembed.sources.source import Source
from fmembed.table.card import fingerprint

# Rows that the ranges are taken from, spread over so many shards.
_NUM_ROWS, _NUM_SHARDS = 1024, 16


def find_ranges(
    inputs: Inputs,
    left: Source,
    plan: Plan,
    stage: type,
    dim: int,
    get: Callable[[Any], Any] = ray.get,
) -> Ranges:
    """The ranges that the table's card holds, else those of a sample; empty where none are needed.

    Once for a table: they are stored in its metadata, and every later run takes those.

    Args:
        inputs: Of the run.
        left: What it has to do: all, where there is no table.
        plan: Who gets what.
        stage: The model, or what stands in for it.
        dim: Of a server's vectors.
        get: Waits for what an actor of a pool is held to.

    Raises:
        SourceError: No row of the sample can be embedded.
    """
    if not _in_need(inputs):
        return {}
    known = inputs.table.card()
    if known is not None and known.fingerprint == fingerprint(inputs.identity):
        return ranges_from_lists(known.ranges)
    try:
        return _measure(inputs, left, plan, stage, dim, get, apart=False)
    except ray.exceptions.RayError as e:
        if not isinstance(root_cause(e), TASK_DEATHS):
            raise
    return _measure(inputs, left, plan, stage, dim, get, apart=True)


def _in_need(inputs: Inputs) -> list[str]:
    """The columns whose precision has steps."""
    outputs = inputs.checkpoint.outputs
    return [o.column for o in outputs if PRECISIONS[o.precision].needs_ranges]


def _measure(
    inputs: Inputs,
    left: Source,
    plan: Plan,
    stage: type,
    dim: int,
    get: Callable[[Any], Any],
    apart: bool,
) -> Ranges:
    """From rows spread over the whole source, in full precision."""
    spec = inputs.spec.preprocess
    exact = tuple(replace(o, precision="float32") for o in inputs.checkpoint.outputs)
    checkpoint = replace(inputs.checkpoint, outputs=exact)
    # A few rows only: one actor loads the model faster than several.
    one = plan.of(plan.kinds[0], num_actors=1)
    some = sample(left, _NUM_ROWS, _NUM_SHARDS)
    rows = read(some, plan, apart=apart)
    pieces = prepare(rows, checkpoint, spec, one, len(some.shards), apart)
    options = stage_options(checkpoint, spec, one, {}, dim)
    held_to = None
    if one.pools:
        held_to = measure(stage, replace(inputs, checkpoint=checkpoint), left, one, {}, get)
    embedded = apply(stage, checkpoint, options, pieces, one, held_to)
    needed = _in_need(inputs)
    found: dict[str, list[Any]] = {column: [] for column in needed}
    batches: Iterator[Any] = iter(embedded.iter_batches(batch_format="pyarrow", batch_size=None))
    for batch in batches:
        good = batch.filter(pa.array(accepted(batch)))
        for column in needed:
            flat = good[column].combine_chunks()
            if options["pieces_are_rows"]:
                flat = flat.flatten()
            found[column].append(flat.flatten().to_numpy().reshape(-1, flat.type.list_size))
    vectors = {c: np.concatenate(v) for c, v in found.items() if v}
    if not vectors or not all(len(v) for v in vectors.values()):
        raise SourceError(
            "model.precision: int8 takes its ranges from a sample of the source, and none of "
            f"its rows can be embedded ({inputs.source.spec.stored_name})"
        )
    return measure_ranges(vectors)
