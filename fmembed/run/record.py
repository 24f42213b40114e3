"""One run on Ray: source to vectors to commits, and what came of it."""

from __future__ import annotations

import contextlib
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
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

from fmembed.checkpoint.opening import Checkpoint
from fmembed.errors import (
    FmembedError,
    Interrupted,
    LockedError,
    SourceError,
    SpecError,
    StorageError,
    TableError,
)
from fmembed.inputs import Inputs, open_inputs
from fmembed.model.embed import Embed
from fmembed.model.server import Endpoint
from fmembed.prepare.stage import Preprocess
from fmembed.result import RunResult, check_run
from fmembed.rows.columns import accepted, table_schema
from fmembed.rows.ids import RowIds
from fmembed.rows.precision import (
    PRECISIONS,
    Ranges,
    delta_field,
    measure_ranges,
    ranges_from_lists,
    ranges_to_lists,
)
from fmembed.run.cluster import connect
from fmembed.run.commits import Commits, check_rejected
from fmembed.run.faults import MAX_ACTOR_RESTARTS, explain, is_loss, root_cause
from fmembed.run.memory import bound_memory, store_bytes
from fmembed.run.placement import Plan, estimate_work, plan_compute
from fmembed.run.progress import WRITE, Stages
from fmembed.run.prometheus import RunMetrics
from fmembed.run.signals import Signals
from fmembed.run.verdict import PREFIXES, judge
from fmembed.run.work import skip_committed
from fmembed.sources.opening import read
from fmembed.sources.shards import sample
from fmembed.sources.source import Source
from fmembed.spec import ModelSpec, RunSpec, SourceSpec
from fmembed.table.card import Card, StoredOutput, fingerprint
from fmembed.table.lock import Lock
from fmembed.table.records import Commit
from fmembed.table.table import Table

# At work and waiting. Ray hands out four by itself, and the actor that loads first got five of
# eight windows while the other one had nothing to do.
_MAX_WINDOWS_IN_FLIGHT = 2
# Passes that may break in a row without a row committed; a pass that commits some starts anew.
_MAX_BROKEN_PASSES = 3
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
        leave = connect(verbose)
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
                    leave = connect(verbose) or leave
                    run.go(source, lock, quiet)
                result = run.finish()
        else:
            result = run.finish()
        run.check_rejected()
        if not result.table_rows:
            return result
        # Late, because scikit-learn takes a second to import and the model should not wait for it.
        from fmembed.evaluate.probing import evaluate, stored_results

        found = None
        if not (result.rows_embedded or result.rows_rejected):
            found = stored_results(table, spec, asdict(result))
        if found is None:
            if spec.probes:
                leave = connect(verbose) or leave
            found = evaluate(table, spec, asdict(result), spec.source, spec.model)
        return RunResult(**found)
    except ray.exceptions.RayError as e:
        raise explain(e) from e
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
    from fmembed.evaluate.probing import check_made_by, evaluate

    table = Table.open(uri)
    if names is not None:
        overrides = {**overrides, "probes": list(names)}
    if spec is None:
        spec, source, model = _stored_spec(table, overrides)
    else:
        spec = RunSpec.from_yaml(None, {**spec.model_dump(mode="json"), **overrides})
        check_made_by(table, spec)
        source, model = spec.source, spec.model
    leave = False
    last = table.last_run()
    if last is None or not table.rows.parts():
        raise FmembedError(f"table: no run has finished on {uri}; run fmembed embed again first")
    run = {**check_run(last, uri), "table": table.uri}
    try:
        leave = connect(verbose)
        return RunResult(**evaluate(table, spec, run, source, model))
    except ray.exceptions.RayError as e:
        raise explain(e) from e
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
        bound_memory(plan)
        if any(PRECISIONS[o.precision].needs_ranges for o in checkpoint.outputs):
            known = self._table.card()
            is_known = known is not None and known.fingerprint == fingerprint(self._identity)
            self._ranges = (
                ranges_from_lists(known.ranges)
                if known is not None and is_known
                else self._calibrate(source, plan)
            )
        card = Card(
            table=uuid.uuid4().hex,
            fingerprint=fingerprint(self._identity),
            identity=self._identity,
            modality=checkpoint.modality,
            outputs={o.column: StoredOutput(**asdict(o)) for o in checkpoint.outputs},
            ranges=ranges_to_lists(self._ranges),
            spec=self._spec.stored(),
        )
        vectors = [delta_field(o) for o in checkpoint.outputs]
        pieces_are_rows = self._spec.preprocess.pieces_are_rows(checkpoint.modality)
        schema = table_schema(self._left.carried, vectors, pieces_are_rows)
        card = self._table.claim(card, schema, self.id)
        commits = Commits(self._spec.output, self._table, lock, self.id, card)
        self._commits = commits
        try:
            with Stages(source.num_rows, quiet) as stages, Signals(commits) as signals:
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
        stages: Stages,
        signals: Signals,
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
                is_systematic = isinstance(root_cause(e), ray.exceptions.ActorDiedError)
                limit = 1 if is_systematic else _MAX_BROKEN_PASSES
                if not is_loss(e) or (num_broken >= limit and commits.num_embedded == num_before):
                    raise
                stages.say(
                    f"lost a node, actor or worker ({type(root_cause(e)).__name__}); going on from "
                    f"the {commits.num_embedded:,} rows that this run has committed"
                )
            lock.check()
            self._table.remove_strays(self.id)
            self.look(source)

    def _pass(self, commits: Commits, plan: Plan, stages: Stages, signals: Signals) -> None:
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
                stages.set(WRITE, commits.num_written, commits.busy_s)
                if commits.num_commits != num_commits:
                    self._publish(commits, stages)
            commits.commit()
            stages.set(WRITE, commits.num_written, commits.busy_s)
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
            if is_loss(e):
                commits.commit_written()
            raise
        finally:
            commits.settle()

    def _publish(self, commits: Commits, stages: Stages) -> None:
        self._stages = {name: asdict(stage) for name, stage in stages.stages.items()}
        rows = {"embedded": commits.num_embedded, "rejected": commits.num_rejected}
        self._metrics = self._metrics or RunMetrics(self.id)
        self._metrics.publish(rows, self._judge(commits.counts))

    def _judge(self, counts: Mapping[str, float]) -> dict[str, Any]:
        seconds = time.monotonic() - self._clock
        return judge(counts, self._stages, self._compute, seconds, self._num_shards)

    def _line(self, source: Source, plan: Plan) -> Iterator[Any]:
        """The stages that Ray runs: source to vectors, as bundles of references to Arrow blocks."""
        rows = read(source, self._committed, num_cpus=plan.cpus_per_task)
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
                max_restarts=MAX_ACTOR_RESTARTS,
                max_task_retries=MAX_ACTOR_RESTARTS,
            )

    def _calibrate(self, source: Source, plan: Plan) -> Ranges:
        """The ranges of int8, from rows spread over the whole source, in full precision.

        Once for a table: they are stored in its metadata, and every later run takes those.

        Raises:
            SourceError: None of these rows can be embedded.
        """
        exact = tuple(replace(o, precision="float32") for o in self._checkpoint.outputs)
        checkpoint = replace(self._checkpoint, outputs=exact)
        sampled = sample(source, _CALIBRATION_ROWS, _CALIBRATION_SHARDS)
        rows = read(sampled, num_cpus=plan.cpus_per_task)
        # A few rows only: one actor loads the model faster than several.
        one = replace(plan, min_actors=1, max_actors=1)
        needed = [
            o.column for o in self._checkpoint.outputs if PRECISIONS[o.precision].needs_ranges
        ]
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
        return measure_ranges(vectors)

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
            counts={k: int(n) for k, n in counts.items() if not k.startswith(PREFIXES)},
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
