"""One run on Ray: source to vectors to commits, and what came of it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.exceptions
import ray.util.annotations
from pydantic import ValidationError
from ray.data import ActorPoolStrategy
from ray.data.exceptions import SystemException

from fmembed import outputs, progress, verdict
from fmembed import source as source_module
from fmembed.card import Card, StoredOutput
from fmembed.checkpoint import Checkpoint
from fmembed.commits import Commits, check_rejected
from fmembed.endpoint import Endpoint, EndpointEncoder
from fmembed.inputs import Inputs, open_inputs
from fmembed.lock import Lock, LockedError
from fmembed.metrics import RunMetrics
from fmembed.outputs import Ranges
from fmembed.plan import Plan, estimate_work, plan_compute, store_bytes
from fmembed.preprocess import Preprocess
from fmembed.readers import Source
from fmembed.records import Commit
from fmembed.result import RunResult, check_run
from fmembed.rows import RowIds, accepted, table_schema
from fmembed.signals import stop_signals
from fmembed.source import skip_committed
from fmembed.spec import (
    FmembedError,
    Interrupted,
    ModelError,
    ModelSpec,
    RunSpec,
    SourceError,
    SourceSpec,
    SpecError,
    TableError,
    fingerprint,
)
from fmembed.startup import uncollected
from fmembed.storage import StorageError
from fmembed.table import Table

# Ray's own defaults are endless: a model that kills its process would never fail the run.
_MAX_ACTOR_RESTARTS = 3
# At work and waiting. Ray hands out four by itself, and the actor that loads first got five of
# eight windows while the other one had nothing to do.
_MAX_WINDOWS_IN_FLIGHT = 2
# Passes that may break in a row without a row committed; a pass that commits some starts anew.
_MAX_BROKEN_PASSES = 3
# What a lost node, worker or actor looks like from the driver, as against an error of the code.
_LOSSES = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.RpcError,
)
_KNOCK_S = 1.0
# Ray's own 128 MiB are held several times over: by the task, its output buffer and the store.
_BLOCK_BYTES = 32 * 2**20
# Rows from which the ranges of int8 are taken, spread over so many shards.
_CALIBRATION_ROWS, _CALIBRATION_SHARDS = 1024, 16
# Of a stored source, what names the table's own columns: all that a probe takes of it.
_COLUMNS = ("input", "id", "label", "split", "caption", "carry")


def embed(
    spec: RunSpec, inputs: Inputs | None, *, retry_rejected: bool, verbose: bool, quiet: bool
) -> RunResult:
    """As `pipeline.embed`; `inputs` are None where Ray has to be joined before they are opened."""
    leave = False
    if inputs is None:
        leave = progress.connect(verbose)
    try:
        inputs = inputs or open_inputs(spec)
        source, table = inputs.source, inputs.table
        run = _Run(inputs)
        run.look(source)
        run.check_endpoint()
        # A run that finds nothing to do takes no lock and changes no file.
        is_left = bool(run.num_shards or table.strays() or table.is_uncounted())
        if is_left or (retry_rejected and table.num_rejected()):
            with Lock(table.storage, run.id) as lock:
                # Whoever had the lock may have made the table since it was looked at.
                table.check_usable(inputs.identity)
                table.remove_strays()
                if retry_rejected:
                    table.forget_rejected(run.id)
                if table.has_moved or retry_rejected:
                    run.look(source)
                if run.num_shards:
                    leave = progress.connect(verbose) or leave
                    run.go(source, lock, quiet)
                result = run.finish()
        else:
            result = run.finish()
        run.check_rejected()
        if not result.table_rows:
            return result
        # Late, because scikit-learn takes a second to import and the model should not wait for it.
        from fmembed import evaluation

        found = None
        if not (result.rows_embedded or result.rows_rejected):
            found = evaluation.stored_results(table, spec, asdict(result))
        if found is None:
            if spec.probes:
                leave = progress.connect(verbose) or leave
            found = evaluation.evaluate(table, spec, asdict(result), spec.source, spec.model)
        return RunResult(**found)
    except ray.exceptions.RayError as e:
        raise _explain(e) from e
    finally:
        if leave:
            ray.shutdown()


def probe(
    uri: str,
    names: tuple[str, ...] | None,
    spec: RunSpec | None,
    overrides: dict[str, Any],
    *,
    verbose: bool,
) -> RunResult:
    """As `pipeline.probe`."""
    from fmembed import evaluation

    table = Table.open(uri)
    if names is not None:
        overrides = {**overrides, "probes": list(names)}
    if spec is None:
        spec, source, model = _stored_spec(table, overrides)
    else:
        spec = RunSpec.from_yaml(None, {**spec.model_dump(mode="json"), **overrides})
        evaluation.check_made_by(table, spec)
        source, model = spec.source, spec.model
    leave = False
    last = table.last_run()
    if last is None or not table.rows.parts():
        raise FmembedError(f"table: no run has finished on {uri}; run fmembed embed again first")
    run = {**check_run(last, uri), "table": table.uri}
    try:
        leave = progress.connect(verbose)
        return RunResult(**evaluation.evaluate(table, spec, run, source, model))
    except ray.exceptions.RayError as e:
        raise _explain(e) from e
    finally:
        if leave:
            ray.shutdown()


def _stored_spec(
    table: Table, overrides: dict[str, Any]
) -> tuple[RunSpec, SourceSpec | None, ModelSpec | None]:
    """The spec in a table's metadata, with flags over it; anybody may have written it.

    So it is words: it names columns and probes, and is shown. A source or a model that it names is
    never opened.

    Returns:
        The spec; and of source and model what the flags name, None where they do not.

    Raises:
        TableError: It is none.
        SpecError: A flag is wrong, or says more of a source or a model that no flag names.
    """
    card = table.card()
    assert card is not None
    try:
        told = RunSpec.model_validate(card.spec)
    except ValidationError as e:
        # Not the value, which is as long as somebody pleased.
        first = e.errors(include_url=False)[0]
        where = ": ".join([".".join(map(str, first["loc"])) or "spec", first["msg"]])
        raise TableError(
            f"table: {table.uri}: the spec in its metadata is damaged ({where[:200]}); "
            "give --from-config CONFIG"
        ) from None
    raw = told.model_dump(mode="json")
    for part, address in (("source", "source.uri"), ("model", "model.id")):
        if address in overrides:
            raw[part] = {k: v for k, v in raw[part].items() if part == "source" and k in _COLUMNS}
            continue
        columns = [f"source.{c}" for c in _COLUMNS] if part == "source" else []
        for name in overrides:
            if name.split(".")[0] == part and name not in columns:
                raise SpecError(f"{name}: of which {part}? give --{part} too, or --from-config")
    spec = RunSpec.from_yaml(None, {**raw, **overrides})
    source = spec.source if "source.uri" in overrides else None
    return spec, source, spec.model if "model.id" in overrides else None


class Embed:
    """The embed stage. Its processes import torch, which takes two seconds; the driver does not."""

    @uncollected()
    def __init__(self, checkpoint: Checkpoint, **options: Any) -> None:
        self._stage: Callable[[pa.Table], pa.Table]
        if checkpoint.endpoint is not None:
            self._stage = EndpointEncoder(checkpoint, **options)
        else:
            from fmembed.encoder import Encoder

            self._stage = Encoder(checkpoint, **options)

    def __call__(self, rows: pa.Table) -> pa.Table:
        return self._stage(rows)


class _Run:
    """One pass over a source: the data's way through Ray, and the driver's commits."""

    def __init__(self, inputs: Inputs) -> None:
        self.id = uuid.uuid4().hex[:12]
        self._spec = inputs.spec
        self._checkpoint = inputs.checkpoint
        self._identity = inputs.identity
        self._table = inputs.table
        self._started = datetime.now(UTC)
        self._clock = time.monotonic()
        self._left: Source | None = None
        self._committed = RowIds()
        self._num_skipped = 0
        self._commits: Commits | None = None
        self._stages: dict[str, Any] = {}
        self._compute: dict[str, Any] = {}
        self._ranges: Ranges = {}
        self._dim = 0
        self._num_shards = 0
        self._metrics: RunMetrics | None = None
        self._num_warm = self._warm_rows = 0
        self._warm = 0.0

    def look(self, source: Source) -> None:
        """See what of the source is left to read, given what is committed."""
        self._committed = self._table.row_ids()
        self._left, self._num_skipped = skip_committed(
            source, self._committed, self._table.whole_shards()
        )

    def check_endpoint(self) -> None:
        """Ask a server for one vector before anything is written, if there is anything to ask.

        Raises:
            ModelError: It does not answer, or not with a vector.
        """
        endpoint = self._checkpoint.endpoint
        if endpoint is not None and self.num_shards and not self._dim:
            self._dim = Endpoint(endpoint, self._checkpoint.id).check()

    @property
    def num_shards(self) -> int:
        """Shards left to read."""
        return len(self._left.shards) if self._left else 0

    def go(self, source: Source, lock: Lock, quiet: bool) -> None:
        """Stream what is left through the stages and commit what comes out.

        Ray restarts actors and tasks and computes lost blocks again; where it gives up, because a
        node took with it what cannot be computed again, another pass reads what is not committed.
        """
        checkpoint = self._checkpoint
        assert self._left is not None
        work = estimate_work(self._left, checkpoint, self._spec.preprocess.chunk_tokens is not None)
        plan = plan_compute(self._spec.compute, checkpoint.modality, checkpoint.num_bytes(), work)
        if checkpoint.endpoint is not None:
            plan = replace(plan, device="cpu", min_actors=1, max_actors=1, gpus_per_actor=0.0)
            self.check_endpoint()
        self._compute = asdict(plan)
        self._num_shards = self.num_shards
        _bound_memory(plan)
        if any(o.precision == "int8" for o in checkpoint.outputs):
            known = self._table.card()
            is_known = known is not None and known.fingerprint == fingerprint(self._identity)
            self._ranges = (
                outputs.ranges_from_lists(known.ranges)
                if known is not None and is_known
                else self._calibrate(source, plan)
            )
        card = Card(
            table=uuid.uuid4().hex,
            fingerprint=fingerprint(self._identity),
            identity=self._identity,
            modality=checkpoint.modality,
            outputs={o.column: StoredOutput(**asdict(o)) for o in checkpoint.outputs},
            ranges=outputs.ranges_to_lists(self._ranges),
            spec=self._spec.stored(),
        )
        vectors = [outputs.delta_field(o) for o in checkpoint.outputs]
        pieces_are_rows = self._spec.preprocess.pieces_are_rows(checkpoint.modality)
        schema = table_schema(self._left.carried, vectors, pieces_are_rows)
        card = self._table.claim(card, schema, self.id)
        commits = Commits(self._spec.output, self._table, lock, self.id, card)
        self._commits = commits
        try:
            with progress.Stages(source.num_rows, quiet) as stages, _Signals(commits) as signals:
                stages.watch(ray.data.DataContext.get_current())
                self._run_passes(source, lock, commits, plan, stages, signals)
                self._stages = {name: asdict(stage) for name, stage in stages.stages.items()}
        finally:
            # What failed is worth more than that its leftovers could not be removed.
            with contextlib.suppress(StorageError, LockedError):
                lock.check()  # another run's parts are no strays
                self._table.remove_strays(self.id)
        commits.check_rejected(at_end=True)

    def _run_passes(
        self,
        source: Source,
        lock: Lock,
        commits: Commits,
        plan: Plan,
        stages: progress.Stages,
        signals: _Signals,
    ) -> None:
        num_broken = 0
        while self.num_shards:
            num_before = commits.num_embedded
            try:
                self._pass(commits, plan, stages, signals)
                return
            except ray.exceptions.RayError as e:
                num_broken = 1 if commits.num_embedded > num_before else num_broken + 1
                # An actor that dies on every try without a row done is no accident.
                is_systematic = isinstance(_root(e), ray.exceptions.ActorDiedError)
                limit = 1 if is_systematic else _MAX_BROKEN_PASSES
                if not _is_loss(e) or (num_broken >= limit and commits.num_embedded == num_before):
                    raise
                stages.say(
                    f"lost a node, actor or worker ({type(_root(e)).__name__}); going on from the "
                    f"{commits.num_embedded:,} rows that this run has committed"
                )
            lock.check()
            self._table.remove_strays(self.id)
            self.look(source)

    def _pass(
        self, commits: Commits, plan: Plan, stages: progress.Stages, signals: _Signals
    ) -> None:
        assert self._left is not None
        commits.begin(self._left.shards, self._committed)
        stages.store_bytes = store_bytes(plan, 0)
        try:
            for bundle in self._line(self._left, plan):
                if self._num_warm < plan.min_actors:
                    # What each actor's first window took is no steady state: it was loading.
                    self._num_warm += 1
                    self._warm_rows += bundle.num_rows() or 0
                    self._warm = time.monotonic()
                num_commits = commits.num_commits
                commits.add(bundle)
                stages.store_bytes = store_bytes(plan, commits.held_bytes)
                stages.set(progress.WRITE, commits.num_written, commits.busy_s)
                if commits.num_commits != num_commits:
                    self._publish(commits, stages)
            commits.commit()
            stages.set(progress.WRITE, commits.num_written, commits.busy_s)
            self._publish(commits, stages)
        except Interrupted as e:
            signals.heard()
            with contextlib.suppress(ray.exceptions.RayError):
                commits.commit()
            raise Interrupted(
                f"{e}; {commits.num_embedded:,} rows of this run are committed, "
                "the same command resumes",
                e.exit_code - 128,
            ) from None
        except ray.exceptions.RayError as e:
            if _is_loss(e):
                commits.commit_written()
            raise
        finally:
            commits.settle()

    def _publish(self, commits: Commits, stages: progress.Stages) -> None:
        self._stages = {name: asdict(stage) for name, stage in stages.stages.items()}
        rows = {"embedded": commits.num_embedded, "rejected": commits.num_rejected}
        self._metrics = self._metrics or RunMetrics(self.id)
        self._metrics.publish(rows, self._judge(commits.counts))

    def _judge(self, counts: Mapping[str, float]) -> dict[str, Any]:
        seconds = time.monotonic() - self._clock
        return verdict.judge(counts, self._stages, self._compute, seconds, self._num_shards)

    def _line(self, source: Source, plan: Plan) -> Iterator[Any]:
        """The stages that Ray runs: source to vectors, as bundles of references to Arrow blocks."""
        rows = source_module.read(source, self._committed, num_cpus=plan.cpus_per_task)
        return iter(self._vectors(rows, self._checkpoint, plan).iter_internal_ref_bundles())

    def _vectors(
        self, rows: ray.data.Dataset, checkpoint: Checkpoint, plan: Plan
    ) -> ray.data.Dataset:
        ready = rows.map_batches(
            Preprocess(checkpoint, self._spec.preprocess).stream,
            batch_format="pyarrow",
            batch_size=None,
            num_cpus=plan.cpus_per_task,
        )
        windows = ready.repartition(target_num_rows_per_block=plan.window_rows)
        pieces_are_rows = self._spec.preprocess.pieces_are_rows(checkpoint.modality)
        options: dict[str, Any] = {"ranges": self._ranges, "pieces_are_rows": pieces_are_rows}
        if checkpoint.endpoint is not None:
            options["dim"] = self._dim
        else:
            options["device"], options["num_threads"] = plan.device, plan.num_threads
            options["batch_tokens"] = plan.batch_tokens
        with warnings.catch_warnings():
            # Ray 2.60 deprecates ray_remote_args and offers no other way to bound restarts.
            warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
            return windows.map_batches(
                Embed,
                fn_constructor_args=(checkpoint,),
                fn_constructor_kwargs=options,
                batch_format="pyarrow",
                batch_size=plan.window_rows,
                compute=ActorPoolStrategy(
                    min_size=plan.min_actors,
                    max_size=plan.max_actors,
                    max_tasks_in_flight_per_actor=_MAX_WINDOWS_IN_FLIGHT,
                ),
                num_cpus=plan.cpus_per_actor,
                num_gpus=plan.gpus_per_actor or None,
                scheduling_strategy="SPREAD",
                max_restarts=_MAX_ACTOR_RESTARTS,
                max_task_retries=_MAX_ACTOR_RESTARTS,
            )

    def _calibrate(self, source: Source, plan: Plan) -> Ranges:
        """The ranges of int8, from rows spread over the whole source, in full precision.

        Once for a table: they are stored in its metadata, and every later run takes those.

        Raises:
            SourceError: None of these rows can be embedded.
        """
        exact = tuple(replace(o, precision="float32") for o in self._checkpoint.outputs)
        checkpoint = replace(self._checkpoint, outputs=exact)
        sample = source_module.sample(source, _CALIBRATION_ROWS, _CALIBRATION_SHARDS)
        rows = source_module.read(sample, num_cpus=plan.cpus_per_task)
        # A few rows only: one actor loads the model faster than several.
        one = replace(plan, min_actors=1, max_actors=1)
        needed = [o.column for o in self._checkpoint.outputs if o.precision == "int8"]
        found: dict[str, list[Any]] = {column: [] for column in needed}
        pieces_are_rows = self._spec.preprocess.pieces_are_rows(checkpoint.modality)
        batches: Iterator[Any] = iter(
            self._vectors(rows, checkpoint, one).iter_batches(
                batch_format="pyarrow", batch_size=None
            )
        )
        for batch in batches:
            good = batch.filter(pa.array(accepted(batch)))
            for column in needed:
                flat = good[column].combine_chunks()
                if pieces_are_rows:
                    flat = flat.flatten()
                found[column].append(flat.flatten().to_numpy().reshape(-1, flat.type.list_size))
        vectors = {c: np.concatenate(v) for c, v in found.items() if v}
        if not vectors or not all(len(v) for v in vectors.values()):
            raise SourceError(
                "model.precision: int8 takes its ranges from a sample of the source, and none of "
                f"its rows can be embedded ({source.spec.stored_name})"
            )
        return outputs.measure_ranges(vectors)

    def check_rejected(self) -> None:
        """Hold a run that had nothing to do to the limit too: a job that is tried again after too
        many rejections is no success.

        Raises:
            RejectedError: More rows of the table are rejected than the config allows.
        """
        if self._commits is None:
            num_rows = len(self._committed) + self._table.num_twins
            check_rejected(self._table, self._spec.output, self._table.num_rejected(), num_rows)

    def finish(self) -> RunResult:
        """Count, and leave the record that `verify` compares the table with."""
        seconds = time.monotonic() - self._clock
        commits = self._commits
        num_embedded = commits.num_embedded if commits else 0
        num_rejected = commits.num_rejected if commits else 0
        num_skipped = self._num_skipped + (commits.num_skipped if commits else 0)
        counts = dict(commits.counts) if commits else {}
        steady = None
        if self._num_warm and num_embedded > self._warm_rows:
            rows = num_embedded - self._warm_rows
            steady = round(rows / (time.monotonic() - self._warm), 2)
        result = RunResult(
            run_id=self.id,
            started=self._started.isoformat(timespec="seconds"),
            table=self._table.uri,
            version=self._table.version(),
            fingerprint=fingerprint(self._identity),
            rows_read=num_embedded + num_rejected + num_skipped,
            rows_embedded=num_embedded,
            rows_rejected=num_rejected,
            rows_skipped=num_skipped,
            rows_per_s=round(num_embedded / seconds, 2),
            seconds=round(seconds, 2),
            table_rows=sum(p.num_rows for p in self._table.rows.parts()),
            table_rejected=self._table.num_rejected(),
            num_units=commits.num_units if commits else 0,
            num_truncated=commits.num_truncated if commits else 0,
            counts={k: int(n) for k, n in counts.items() if not k.startswith(verdict.PREFIXES)},
            steady_rows_per_s=steady,
            causes=dict(commits.causes) if commits else {},
            stages=self._stages,
            verdict=self._judge(counts),
            compute=self._compute,
        )
        if commits and (num_embedded or num_rejected):
            self._table.put_run(commits.last, asdict(result))
        elif self._table.is_uncounted():
            last = Commit(
                run=self.id,
                rows_version=self._table.rows.version(),
                rejected_version=self._table.rejected.version(),
            )
            self._table.put_run(last, asdict(result))
        return result


def _bound_memory(plan: Plan) -> None:
    """Before a pass; while it runs, `progress.Stages` moves the bound with what is held."""
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = _BLOCK_BYTES
    options = context.execution_options
    options.resource_limits = options.resource_limits.copy(object_store_memory=store_bytes(plan, 0))


# --- ends -----------------------------------------------------------------------------------------


class _Signals:
    """What stops a run (preemption, `ray job stop`, a terminal that goes), as `Interrupted`.

    Raised in the driver's main thread.

    An exception that a handler raises is lost where it strikes inside a destructor or a callback,
    of which Ray has many (a run in the tests went on after Ctrl-C). So the signal is sent again
    until somebody says that it was heard; and a commit under way is never torn, it comes after.
    """

    def __init__(self, commits: Commits) -> None:
        self._commits = commits
        self._before: dict[signal.Signals, Any] = {}
        self._knock: threading.Timer | None = None

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._stop) for s in stop_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        self.heard()
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def heard(self) -> None:
        """Stop sending the signal again."""
        if self._knock is not None:
            self._knock.cancel()

    def _stop(self, signum: int, _: Any) -> None:
        self.heard()
        self._knock = threading.Timer(_KNOCK_S, os.kill, (os.getpid(), signum))
        self._knock.daemon = True
        self._knock.start()
        if not self._commits.is_committing:
            raise Interrupted("interrupted", signum)


def _is_loss(error: BaseException) -> bool:
    return isinstance(_root(error), _LOSSES)


def _root(error: BaseException) -> BaseException:
    """The error at the end of the chain that Ray wrapped around it, or ours before it."""
    # Ray makes its wrapper an instance of what it wraps, with a traceback as its text.
    while isinstance(error, ray.exceptions.RayError) or not isinstance(error, FmembedError):
        cause = getattr(error, "cause", None) or error.__cause__
        # Ray Data names itself as the cause of what it did not raise.
        if not isinstance(cause, BaseException) or isinstance(cause, SystemException):
            break
        error = cause
    return error


def _explain(error: BaseException) -> FmembedError:
    """What the user should read of an error that Ray raised."""
    root = _root(error)
    if isinstance(root, FmembedError):
        return root
    lines = [line.strip() for line in str(root).splitlines() if line.strip()]
    rest = "committed rows stay, the same command resumes; -v shows Ray's own messages"
    if isinstance(root, ray.exceptions.ActorDiedError):
        # Of an error in an actor's constructor Ray hands on the text alone.
        if refused := re.search(r"fmembed\.spec\.ModelError: (.+)", str(root)):
            return ModelError(refused[1])
        return FmembedError(
            f"the model's process died {1 + _MAX_ACTOR_RESTARTS} times and was given up: "
            f"{lines[-1] if lines else 'no reason known'}; was it killed for memory "
            "(compute.actors, compute.batch_tokens), or does the model's own code end it? " + rest
        )
    reason = lines[-1] if lines else type(root).__name__
    return FmembedError(f"the run failed: {type(root).__name__}: {reason}; {rest}")
