"""Actors of several kinds that draw from the same windows, each held to what the others make.

Ray Data (2.60) has one pool of actors for a stage, and hands each window to whoever has the fewest:
a fast actor is so given more of them. What an actor is given by Ray may be different for each
(`ray_remote_args_fn`); its environment tells the actor which of the pools it is of.

Devices compute with roundings of their own, and some are broken, or run in another type. So each
actor embeds some rows of the source before it is given any other, and is refused where its vectors
are not those that a CPU makes of them in float32; where that would take too long, those of the
actor that came first.
"""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fmembed.arrays import Floats
from fmembed.checkpoint.opening import Checkpoint
from fmembed.errors import ModelError
from fmembed.inputs import Inputs
from fmembed.model.meter import POOL
from fmembed.rows.counts import sum_counts, with_counts
from fmembed.rows.outputs import Output
from fmembed.rows.pieces import unpack_pieces
from fmembed.rows.precision import PRECISIONS, Ranges
from fmembed.run.apart import PreprocessApart, read_apart
from fmembed.run.faults import MAX_TASK_RETRIES, explain
from fmembed.run.placement import cpu_seconds, estimate_work
from fmembed.run.plan import Plan, Pool
from fmembed.run.verdict import ACTOR, PREFIXES
from fmembed.sources.shards import sample
from fmembed.sources.source import Source
from fmembed.spec import PreprocessSpec
from fmembed.storage import tell

# Rows that each actor embeds first, of so many shards; by a CPU if that takes it no longer.
_NUM_ROWS, _NUM_SHARDS, _MOST_CPU_S = 256, 16, 60.0
# How like vectors are, as cosine, that are made of the same rows in a type; and at least as they
# are stored: a step of int8 is 1/255 of a dimension's range, and of bits one in twenty may turn.
_AGREEMENT = {"float32": 0.9999, "bfloat16": 0.999, "float16": 0.999}
_STORED = {"float32": 1.0, "float16": 1.0, "int8": 0.999, "binary": 0.9}


@dataclass(frozen=True)
class Measure:
    """What each actor's vectors are held to.

    `rows` refers to the prepared rows; `vectors` to what a CPU makes of them, or is None: then
    `first` is the actor that keeps what came first.
    """

    rows: Any
    vectors: Any
    first: Any
    min_agreement: float | None


def measure(
    stage: type,
    inputs: Inputs,
    left: Source,
    plan: Plan,
    ranges: Ranges,
    get: Callable[[Any], Any] = ray.get,
) -> Measure:
    """Have rows read and prepared, and embedded where that is soon done.

    It is waited for: the run's own tasks could have all CPUs, and wait for actors that wait for it.

    Args:
        stage: The model, or what stands in for it.
        inputs: Of the run.
        left: What there is to read.
        plan: Who gets what.
        ranges: Of int8.
        get: Waits for it.

    Raises:
        FmembedError: The source cannot be read.
    """
    checkpoint, spec = inputs.checkpoint, inputs.spec.preprocess
    some = sample(left, _NUM_ROWS, _NUM_SHARDS)
    task: dict[str, Any] = {"num_cpus": plan.cpus_per_task, "max_retries": MAX_TASK_RETRIES}
    prepare: Any = ray.remote(num_returns=2, **task)(_prepare)
    rows, num_good = prepare.remote(some, checkpoint, spec)
    try:
        if not get(num_good):
            tell("compute.pools: no row of a sample can be embedded, so none is held to another")
    except ray.exceptions.RayError as e:
        raise explain(e) from None
    work = estimate_work(left, checkpoint, spec.chunk_tokens is not None)
    row_tokens = work.row_tokens or checkpoint.max_tokens
    num_bytes = checkpoint.num_bytes()
    is_soon = cpu_seconds(_NUM_ROWS * row_tokens, num_bytes) <= _MOST_CPU_S
    vectors = None
    if is_soon:
        given = {"ranges": ranges, "pieces_are_rows": spec.pieces_are_rows(checkpoint.modality)}
        exact = replace(checkpoint, dtype="float32")
        # Its process ends with it, and leaves the memory of the model.
        vectors = ray.remote(max_calls=1, **task)(_embed).remote(stage, exact, given, rows)
        try:
            get(vectors)
        except ray.exceptions.RayError:  # as where a node has not the memory
            vectors = None
    first = None
    if vectors is None:
        # Beside the driver, and no longer there than that: what it holds must not be lost.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(_First)
        first = actor.options(num_cpus=0, scheduling_strategy=here).remote()
    return Measure(rows, vectors, first, inputs.spec.compute.min_agreement)


def options_of(pools: Sequence[Pool]) -> Callable[[], dict[str, Any]]:
    """What makes Ray's options for one more actor, of the pool that lacks most.

    A variable of its environment tells an actor its pool.

    Args:
        pools: Each with as many actors as it is to have.
    """
    asked = Counter[int]()

    def make() -> dict[str, Any]:
        i = min(range(len(pools)), key=lambda i: asked[i] / pools[i].max_actors)
        asked[i] += 1
        return {**pools[i].options, "runtime_env": {"env_vars": {POOL: str(i)}}}

    return make


def in_pools(stage: type) -> type:
    """The stage as actors of several pools make it; its name has the stage's in it."""
    return type(f"{stage.__name__}InPool", (_InPool,), {"stage": stage})


class _InPool:
    """Makes the stage as its pool has it, and compares what it makes of the measure's rows."""

    stage: ClassVar[type]

    def __init__(
        self,
        checkpoint: Checkpoint,
        pools: Sequence[Pool],
        measure: Measure,
        ranges: Ranges,
        **options: Any,
    ) -> None:
        """Load the model.

        Args:
            checkpoint: Which model.
            pools: Of which this actor's environment tells its own.
            measure: What it is held to.
            ranges: Of int8.
            options: As for the stage, as is the next before; the pool's come before them.

        Raises:
            ModelError: Its vectors are others.
        """
        index = int(os.environ[POOL])
        pool = pools[index]
        checkpoint = pool.run_as(checkpoint)
        options.pop("gpu_share", None)  # of the first pool
        options |= pool.device_options
        self._stage = self.stage(checkpoint, ranges=ranges, **options)
        made = self._stage(ray.get(measure.rows))
        # What it has counted is this actor's time, and is stored with its first window.
        self._counts = _of_loading(sum_counts(made))
        mine = _Made(f"compute.pools.{index}", pool.name, checkpoint.dtype, made)
        if measure.vectors is not None:
            others = _Made("a CPU", "", "float32", ray.get(measure.vectors))
        else:
            try:
                others = ray.get(measure.first.keep.remote(mine))
            except ray.exceptions.RayActorError:
                raise ModelError(
                    f"compute.pools.{index}: the process is gone that held the vectors of the "
                    "first actor, to which the others are held; run the same again"
                ) from None
        check(mine, others, checkpoint.outputs, ranges, measure.min_agreement)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """As the stage."""
        made: pa.Table = self._stage(rows)
        if self._counts and made.num_rows:
            both, self._counts = Counter(self._counts), {}
            both.update(sum_counts(made))
            made = with_counts(made, both)
        return made


def _of_loading(counts: Mapping[str, float]) -> dict[str, float]:
    """Of what a process has counted before its first row of the run what stays true: that it had
    its device meanwhile, how fast that is, and how batches were chosen. The rest says how fast it
    is, by rows that it had to wait for.
    """
    kept: dict[str, float] = defaultdict(float)
    for name, count in counts.items():
        actor, _, figure = name.rpartition("/")
        if figure in ("load_s", "busy_s"):
            kept[f"{actor}/load_s"] += count
        elif figure == "peak_flops" or (name.startswith(PREFIXES) and not name.startswith(ACTOR)):
            kept[name] += count
    return kept


@dataclass(frozen=True)
class _Made:
    """Rows that have been embedded, by whom and in which type."""

    who: str
    kind: str
    dtype: str
    rows: pa.Table


class _First:
    """Keeps what came first."""

    def __init__(self) -> None:
        self._first: _Made | None = None

    def keep(self, made: _Made) -> _Made:
        """Keep it, unless there is one.

        Returns:
            What came first.
        """
        self._first = self._first or made
        return self._first


def check(
    mine: _Made,
    others: _Made,
    outputs: Sequence[Output],
    ranges: Ranges,
    min_agreement: float | None,
) -> None:
    """Hold vectors to others of the same rows.

    Args:
        mine: Of this actor.
        others: What they are held to.
        outputs: The columns.
        ranges: Of int8.
        min_agreement: Of the config.

    Raises:
        ModelError: A row's are less like the others than they may be; or it has none here and one
            there.
    """
    for output in outputs:
        least = min(_AGREEMENT[mine.dtype], _AGREEMENT[others.dtype])
        least = min(least, _STORED[output.precision])
        least = least if min_agreement is None else min_agreement
        found = agreement(mine.rows[output.column], others.rows[output.column], output, ranges)
        if not len(found) or (worst := float(found.min())) >= least:
            continue
        in_words = f"{mine.who} ({', '.join(filter(None, [mine.kind, mine.dtype]))})"
        off = int((found < least).sum())
        raise ModelError(
            f"{in_words}: its vectors are not those of {others.who} ({others.dtype}): of "
            f"{len(found):,} rows {off:,} have a cosine below {least:g}, the lowest {worst:.4f} "
            f"({output.column}); its device or its dtype is at fault: leave the pool out, give it "
            "another dtype, or say by compute.min_agreement what is near enough"
        )


def agreement(
    mine: pa.ChunkedArray, others: pa.ChunkedArray, output: Output, ranges: Ranges
) -> npt.NDArray[np.float64]:
    """Cosines of the vectors of the same rows; -1 where only one of both has one.

    Args:
        mine: A column as the stage makes it.
        others: The same of another one.
        output: The column's.
        ranges: Of int8.

    Returns:
        Shape (rows with a vector in either), float64.
    """
    found = []
    for one, other in zip(mine.to_pylist(), others.to_pylist(), strict=True):
        if one is None and other is None:
            continue
        if one is None or other is None or np.shape(one) != np.shape(other):
            found.append(-1.0)
            continue
        a, b = (_floats(v, output, ranges) for v in (one, other))
        found.append(_cosine(a, b))
    return np.array(found, dtype=np.float64)


def _floats(stored: Any, output: Output, ranges: Ranges) -> Floats:
    """A row's vectors as one: of pieces and tokens all, one after another."""
    precision = PRECISIONS[output.precision]
    type_ = precision.arrow.to_pandas_dtype()
    values = np.asarray(stored, dtype=type_).reshape(-1, np.shape(stored)[-1])
    return precision.read(values, ranges.get(output.column)).ravel()


def _cosine(a: Floats, b: Floats) -> float:
    x, y = a.astype(np.float64), b.astype(np.float64)
    lengths = math.sqrt(float(x @ x) * float(y @ y))
    if not lengths:  # a vector of zeros is like another one only
        return float(np.array_equal(x, y))
    return float(x @ y) / lengths


def _prepare(some: Source, checkpoint: Checkpoint, spec: PreprocessSpec) -> tuple[pa.Table, int]:
    """Rows as the model takes them, and how many of them it can take; in a process apart, as one of
    them may end it.
    """
    source = some.without_shards
    tables = [t for i, s in enumerate(some.shards) for t in read_apart(source, s, i, None)]
    prepared = PreprocessApart(checkpoint, spec).stream(pa.concat_tables(tables))
    rows = pa.concat_tables(prepared)
    return rows, len(unpack_pieces(rows).pieces)


def _embed(
    stage: type, checkpoint: Checkpoint, options: Mapping[str, Any], rows: pa.Table
) -> pa.Table:
    made: pa.Table = stage(checkpoint, **options, device="cpu")(rows)
    return made
