"""The stages that Ray runs: a source to rows, rows to what the model takes, and that to vectors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import ray.data
import ray.util.annotations
from ray.data import ActorPoolStrategy, Datasource, ReadTask, TaskPoolStrategy
from ray.data.block import BlockMetadata

from fmembed.checkpoint.families import FAMILIES
from fmembed.checkpoint.opening import Checkpoint
from fmembed.errors import reason
from fmembed.model.embed import Embed
from fmembed.prepare.stage import Preprocess
from fmembed.rows.outputs import Output
from fmembed.rows.precision import PRECISIONS, Ranges
from fmembed.rows.vectors import vector_type
from fmembed.run.apart import PreprocessApart, read_apart
from fmembed.run.faults import MAX_ACTOR_RESTARTS, MAX_TASK_RETRIES, explain, explain_model_death
from fmembed.run.plan import Plan
from fmembed.run.pools import Measure, in_pools, options_of
from fmembed.sources.picks import NotKnown, Pick
from fmembed.sources.reading import read_shard
from fmembed.sources.source import Shard, Source
from fmembed.spec import PreprocessSpec
from fmembed.table.known import KnownRows

# What stands in the name of the Ray Data operator that reads: "Read" and the datasource's name.
READER = "ReadShards"
# With fewer shards for each worker that reads and prepares, some of these would have none.
_SHARDS_PER_WORKER = 2
# Windows in flight per actor: one being embedded, one waiting. Ray hands out four by itself, and
# the actor that loads first got five of eight windows while the other one had nothing to do.
_MAX_WINDOWS_IN_FLIGHT = 2


# Makes, in the process that reads, what it hands on of the shard with a number.
Picks = Callable[[int], Pick]


def not_known(known: KnownRows) -> Picks | None:
    """Pick the rows that a table does not know; all, where it knows none."""
    if not known.parts and not known.num_deleted:
        return None
    # Not by the driver, which holds no row's key.
    ids = ray.remote(num_cpus=0)(KnownRows.load).remote(known)
    out = ray.put(known.deleted())
    return lambda _: NotKnown(ray.get(ids), ray.get(out))


def read(
    source: Source, plan: Plan, picks: Picks | None = None, apart: bool = False
) -> ray.data.Dataset:
    """Read the shards as Ray Data blocks of `columns.row_schema(source.carried)`.

    Args:
        source: What `open_source` found.
        plan: CPUs of a task, and how many tasks.
        picks: Which rows to hand on; the marker row that ends a shard says how many were not.
        apart: Whether in a process apart, so that a row may end it.
    """
    described, shards, num_bytes = source.without_shards, source.shards, source.num_bytes

    # A task is sent what its function holds: one shard, and never the list of all files.
    def read_fn(index: int, shard: Shard) -> Callable[[], Iterator[pa.Table]]:
        def read_blocks() -> Iterator[pa.Table]:
            pick = picks(index) if picks is not None else None
            yield from (read_apart if apart else read_shard)(described, shard, index, pick)

        return read_blocks

    class Shards(Datasource):
        def estimate_inmemory_data_size(self) -> int:
            return num_bytes

        def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
            unknown = BlockMetadata(
                num_rows=None, size_bytes=None, exec_stats=None, input_files=None
            )
            return [ReadTask(read_fn(i, shard), unknown) for i, shard in enumerate(shards)]

    # With more blocks than read tasks Ray splits every block anew (67 pieces in a trial).
    datasource = Shards()  # type: ignore[no-untyped-call]
    with _bounded():
        dataset: ray.data.Dataset = ray.data.read_datasource(
            datasource,
            override_num_blocks=len(shards),
            num_cpus=plan.cpus_per_task,
            compute=TaskPoolStrategy(size=_count_tasks(plan, len(shards), apart)[0]),
            ray_remote_args={"max_retries": MAX_TASK_RETRIES},
        )
    return dataset


def prepare(
    rows: ray.data.Dataset,
    checkpoint: Checkpoint,
    spec: PreprocessSpec,
    plan: Plan,
    num_shards: int,
    apart: bool = False,
) -> ray.data.Dataset:
    """Canonical rows to what the model takes, in windows: a task for each block.

    A task that reads prepares what it has read, which so never travels. Where there are fewer
    shards than keep all workers busy, others prepare beside it.

    Args:
        rows: As `read` yields them.
        checkpoint: The model.
        spec: How it is given its inputs.
        plan: CPUs of a task, rows of a window.
        num_shards: How many shards the rows are read from.
        apart: Whether in a process apart, so that a row may end it.
    """
    preprocess = PreprocessApart if apart else Preprocess
    readers, preparers = _count_tasks(plan, num_shards, apart)
    with _bounded():
        ready = rows.map_batches(
            preprocess(checkpoint, spec).stream,
            batch_format="pyarrow",
            batch_size=None,
            num_cpus=plan.cpus_per_task,
            compute=TaskPoolStrategy(size=preparers or readers),
            # Ray Data (2.60) makes one task of two whose options are the same, and only of those.
            max_retries=MAX_TASK_RETRIES + bool(preparers),
        )
    return ready.repartition(target_num_rows_per_block=plan.window_rows)


def _count_tasks(plan: Plan, num_shards: int, apart: bool) -> tuple[int, int]:
    """How many tasks read, and how many prepare beside them: none, where those that read do.

    No more than there are workers, as CPUs would be full of them, and the task that cuts windows
    wait until one has read its shard.
    """
    workers = plan.num_workers
    if apart or workers == 1 or num_shards >= _SHARDS_PER_WORKER * workers:
        return workers, 0
    readers = max(min(num_shards, workers // 2), 1)
    return readers, workers - readers


def apply(
    stage: type,
    checkpoint: Checkpoint,
    options: dict[str, Any],
    pieces: ray.data.Dataset,
    plan: Plan,
    measure: Measure | None = None,
) -> ray.data.Dataset:
    """What the model takes to columns of vectors, in a pool of actors.

    Args:
        stage: Made once in each actor, of the checkpoint and the options; then called with an Arrow
            table for each window.
        checkpoint: The model.
        options: As `stage_options` says them.
        pieces: Windows of rows.
        plan: How many actors, and what each of them is given.
        measure: What actors of several pools are held to; without, all are of the plan's first one.
    """
    kinds = plan.kinds if measure is not None else plan.kinds[:1]
    asked = kinds[0].options
    if measure is not None:
        stage, options = in_pools(stage), {**options, "pools": kinds, "measure": measure}
        # Of these Ray Data reckons with what the greatest of them is given.
        asked = {n: max(k.options[n] for k in kinds) for n in ("num_cpus", "num_gpus")}
        asked["ray_remote_args_fn"] = options_of(kinds)
    with _bounded():
        return pieces.map_batches(
            stage,
            fn_constructor_args=(checkpoint,),
            fn_constructor_kwargs=options,
            batch_format="pyarrow",
            batch_size=plan.window_rows,
            compute=ActorPoolStrategy(
                min_size=plan.min_actors,
                max_size=plan.max_actors,
                max_tasks_in_flight_per_actor=_MAX_WINDOWS_IN_FLIGHT,
            ),
            scheduling_strategy="SPREAD",
            # Bounded by what is done in between: see `waiting.Watch`.
            max_restarts=-1,
            max_task_retries=-1,
            **asked,
        )


@contextmanager
def _bounded() -> Iterator[None]:
    """Bound retries and restarts: Ray 2.60 deprecates `ray_remote_args`, the only way to do so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        yield


def try_model(checkpoint: Checkpoint, plan: Plan, get: Callable[[Any], Any] = ray.get) -> None:
    """Load a model once, before a pool of actors does, where its family is not one of the usual.

    In a process of its own that ends with it, on the device of the actors.

    Args:
        checkpoint: The model.
        plan: What an actor is given.
        get: Waits for it.

    Raises:
        ModelError: It cannot be run, or not so that a row's vector is its own.
    """
    is_tested = checkpoint.model_type in FAMILIES
    usual = checkpoint.family.company == "any" if checkpoint.modality == "text" else is_tested
    if checkpoint.endpoint is not None or usual:
        return

    first = plan.kinds[0]
    asked = {**first.options, "num_cpus": 0}

    @ray.remote(max_calls=1, max_retries=MAX_ACTOR_RESTARTS, **asked)
    def load() -> None:
        Embed(first.run_as(checkpoint), **first.device_options)

    try:
        get(load.remote())
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as e:
        raise explain_model_death(reason(e)) from None
    except ray.exceptions.RayError as e:
        raise explain(e) from None


def stage_options(
    checkpoint: Checkpoint, spec: PreprocessSpec, plan: Plan, ranges: Ranges, dim: int
) -> dict[str, Any]:
    """What an actor of the model stage is told besides its checkpoint.

    Args:
        checkpoint: The model.
        spec: Whether pieces are rows.
        plan: Device, threads and the budget of a batch.
        ranges: Of int8.
        dim: Of a server's vectors.
    """
    pieces_are_rows = spec.pieces_are_rows(checkpoint.modality)
    options: dict[str, Any] = {"ranges": ranges, "pieces_are_rows": pieces_are_rows}
    if checkpoint.endpoint is not None:
        return {**options, "dim": dim}
    return {
        **options,
        **plan.kinds[0].device_options,
        "batch_tokens": plan.batch_tokens,
    }


def stored_dims(outputs: Sequence[Output], schema: pa.Schema) -> dict[str, int]:
    """The length of a table's vectors by column, as `model.embed.WithoutModel` is told it.

    Args:
        outputs: The columns.
        schema: Of the table's parts.
    """
    dims = {}
    for output in outputs:
        type_ = vector_type(schema.field(output.column).type)
        assert type_ is not None
        dims[output.column] = type_.list_size * PRECISIONS[output.precision].dims_each
    return dims
