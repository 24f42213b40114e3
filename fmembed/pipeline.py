"""The line: read -> preprocess -> embed -> write parts -> commit -> probe -> report."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.exceptions
import ray.util.annotations
from ray.data import ActorPoolStrategy
from ray.data.exceptions import SystemException

from fmembed import encoder, probes, progress, report
from fmembed import source as source_module
from fmembed.checkpoint import Checkpoint, cpu_has_bfloat16, open_checkpoint
from fmembed.commits import Commits
from fmembed.lock import Lock
from fmembed.preprocess import Preprocess
from fmembed.readers import Source, read_shard
from fmembed.rows import RowIds, keys_of
from fmembed.source import open_source, skip_committed
from fmembed.spec import (
    ComputeSpec,
    FmembedError,
    Interrupted,
    RunSpec,
    SpecError,
    fingerprint,
)
from fmembed.storage import StorageError
from fmembed.table import Table, sample

# Ray's own defaults are endless: a model that kills its process would never fail the run.
_MAX_ACTOR_RESTARTS = 3
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
# Sorted by length and cut into batches: a CPU's window is seconds of work, a GPU's should be too.
_WINDOW_ROWS = {"cpu": 256, "cuda": 4096}
_UNITS = {"text": "tokens", "image": "patches", "audio": "samples"}
_KNOCK_S = 1.0
_MAX_FETCH_BYTES = 10 * 2**30


@dataclass(frozen=True)
class RunResult:
    """What a run did. rows_read = rows_embedded + rows_rejected + rows_skipped."""

    run_id: str
    started: str
    table: str
    version: int | None
    fingerprint: str
    rows_read: int = 0
    rows_embedded: int = 0
    rows_rejected: int = 0
    rows_skipped: int = 0
    rows_per_s: float = 0.0
    seconds: float = 0.0
    table_rows: int = 0
    table_rejected: int = 0
    num_units: int = 0
    num_truncated: int = 0
    num_halved: int = 0
    causes: dict[str, int] = field(default_factory=dict)
    stages: dict[str, Any] = field(default_factory=dict)
    compute: dict[str, Any] = field(default_factory=dict)
    probes: dict[str, Any] = field(default_factory=dict)
    report: str | None = None


@dataclass(frozen=True)
class Plan:
    """Who gets which CPUs. `cpus_per_actor` is what Ray reserves, `num_threads` what torch uses."""

    device: str
    min_actors: int
    max_actors: int
    gpus_per_actor: float
    cpus_per_actor: float
    num_threads: int
    cpus_per_task: float
    window_rows: int
    batch_tokens: int | None


def embed(
    spec: RunSpec, *, retry_rejected: bool = False, verbose: bool = False, quiet: bool = False
) -> RunResult:
    """Run the whole line once; run it again to resume.

    Args:
        spec: What to do.
        retry_rejected: Try the rows again that earlier runs have rejected.
        verbose: Show Ray's own output.
        quiet: Draw no progress.

    Returns:
        What was counted, and where the table and the report are.

    Raises:
        UserError: The spec, the source, the checkpoint or the output is wrong; nothing was written.
        RejectedError: Too many rows were rejected; what was embedded is committed.
        Interrupted: SIGINT or SIGTERM; what was finished is committed.
        LockedError: Another run is writing the table.
        FmembedError: Anything else; what was committed stays.
    """
    leave = False
    if os.environ.get("RAY_ADDRESS"):
        leave = progress.connect(verbose)
    try:
        checkpoint = open_checkpoint(spec.model, _native_bfloat16(spec))
        source = open_source(spec.source, checkpoint.modality)
        table = Table.open_output(spec.output.uri, checkpoint.identity)
        run = _Run(spec, checkpoint, table)
        run.look(source)
        # A run that finds nothing to do takes no lock and changes no file.
        if run.num_shards or table.strays() or (retry_rejected and table.num_rejected()):
            with Lock(table.storage, run.id) as lock:
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
        if result.version is None:
            return result
        if result.rows_embedded or result.rows_rejected or _probes_missing(spec, table):
            leave = progress.connect(verbose) or leave
            result = _probe(table, spec, result)
        else:
            result = _with_stored_probes(table, spec, result)
        return result
    except ray.exceptions.RayError as e:
        raise _explain(e) from e
    finally:
        if leave:
            ray.shutdown()


def probe(uri: str, names: tuple[str, ...] | None = None, *, verbose: bool = False) -> RunResult:
    """Probe an existing table anew and write its report.

    Args:
        uri: The table.
        names: Which probes; None for those its spec names.
        verbose: Show Ray's own output.

    Raises:
        TableError: No table there.
        SpecError: Another probe than there is.
    """
    table = Table.open(uri)
    raw = json.loads(table.configuration()["fmembed.spec"])
    if names is not None:
        raw["probes"] = list(names)
    spec = RunSpec.parse(raw)
    last = table.last_run()
    if last is None or table.version() is None:
        raise FmembedError(f"table: no run has finished on {uri}; run fmembed embed again first")
    leave = progress.connect(verbose)
    try:
        return _probe(table, spec, RunResult(**last))
    except ray.exceptions.RayError as e:
        raise _explain(e) from e
    finally:
        if leave:
            ray.shutdown()


class _Run:
    """One pass over a source: the data's way through Ray, and the driver's commits."""

    def __init__(self, spec: RunSpec, checkpoint: Checkpoint, table: Table) -> None:
        self.id = uuid.uuid4().hex[:12]
        self._spec = spec
        self._checkpoint = checkpoint
        self._table = table
        self._started = datetime.now(UTC)
        self._clock = time.monotonic()
        self._left: Source | None = None
        self._committed = RowIds()
        self._num_skipped = 0
        self._commits: Commits | None = None
        self._stages: dict[str, Any] = {}
        self._compute: dict[str, Any] = {}

    def look(self, source: Source) -> None:
        """See what of the source is left to read, given what is committed."""
        self._committed = self._table.row_ids()
        self._left, self._num_skipped = skip_committed(
            source, self._committed, self._table.whole_shards()
        )

    @property
    def num_shards(self) -> int:
        """Shards left to read."""
        return len(self._left.shards) if self._left else 0

    def go(self, source: Source, lock: Lock, quiet: bool) -> None:
        """Stream what is left through the stages and commit what comes out.

        Ray restarts actors and tasks and computes lost blocks again; where it gives up, because a
        node took with it what cannot be computed again, another pass reads what is not committed.
        """
        plan = plan_compute(self._spec.compute)
        self._compute = asdict(plan)
        configuration = {
            "fmembed.fingerprint": fingerprint(self._checkpoint.identity),
            "fmembed.identity": json.dumps(self._checkpoint.identity),
            "fmembed.modality": self._checkpoint.modality,
            "fmembed.spec": json.dumps(self._spec.stored()),
        }
        commits = Commits(self._spec.output, self._table, lock, self.id, configuration)
        self._commits = commits
        try:
            with progress.Stages(source.num_rows, quiet) as stages, _Signals(commits) as signals:
                stages.watch(ray.data.DataContext.get_current())
                self._run_passes(source, commits, plan, stages, signals)
                self._stages = {name: asdict(stage) for name, stage in stages.stages.items()}
        finally:
            # What failed is worth more than that its leftovers could not be removed.
            with contextlib.suppress(StorageError):
                self._table.remove_strays()
        commits.check_rejected(at_end=True)

    def _run_passes(
        self,
        source: Source,
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
            self._table.remove_strays()
            self.look(source)

    def _pass(
        self, commits: Commits, plan: Plan, stages: progress.Stages, signals: _Signals
    ) -> None:
        assert self._left is not None
        commits.begin(self._left.shards, self._committed)
        try:
            for bundle in self._line(self._left, plan):
                commits.add(bundle)
                stages.set(progress.WRITE, commits.num_written, commits.busy_s)
            commits.commit()
            stages.set(progress.WRITE, commits.num_written, commits.busy_s)
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

    def _line(self, source: Source, plan: Plan) -> Iterator[Any]:
        """The stages that Ray runs: source to vectors, as bundles of references to Arrow blocks."""
        checkpoint = self._checkpoint
        rows = source_module.read(source, self._committed, num_cpus=plan.cpus_per_task)
        tokens = rows.map_batches(
            Preprocess(checkpoint, self._spec.preprocess),
            batch_format="pyarrow",
            batch_size=None,
            num_cpus=plan.cpus_per_task,
        )
        windows = tokens.repartition(target_num_rows_per_block=plan.window_rows)
        with warnings.catch_warnings():
            # Ray 2.60 deprecates ray_remote_args and offers no other way to bound restarts.
            warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
            vectors = windows.map_batches(
                encoder.Encoder,
                fn_constructor_args=(checkpoint, plan.device, plan.num_threads, plan.batch_tokens),
                batch_format="pyarrow",
                batch_size=plan.window_rows,
                compute=ActorPoolStrategy(min_size=plan.min_actors, max_size=plan.max_actors),
                num_cpus=plan.cpus_per_actor,
                num_gpus=plan.gpus_per_actor or None,
                scheduling_strategy="SPREAD",
                max_restarts=_MAX_ACTOR_RESTARTS,
                max_task_retries=_MAX_ACTOR_RESTARTS,
            )
        return iter(vectors.iter_internal_ref_bundles())

    def finish(self) -> RunResult:
        """Count, and leave the record that `verify` compares the table with."""
        seconds = time.monotonic() - self._clock
        commits = self._commits
        num_embedded = commits.num_embedded if commits else 0
        num_rejected = commits.num_rejected if commits else 0
        num_skipped = self._num_skipped + (commits.num_skipped if commits else 0)
        result = RunResult(
            run_id=self.id,
            started=self._started.isoformat(timespec="seconds"),
            table=self._table.uri,
            version=self._table.version(),
            fingerprint=fingerprint(self._checkpoint.identity),
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
            num_halved=commits.num_halved if commits else 0,
            causes=dict(commits.causes) if commits else {},
            stages=self._stages,
            compute=self._compute,
        )
        if num_embedded or num_rejected:
            stamp = self._started.strftime("%Y%m%dT%H%M%S.%f")
            self._table.put_run(stamp, self.id, asdict(result))
        return result


# --- the plan -------------------------------------------------------------------------------------


def plan_compute(spec: ComputeSpec) -> Plan:
    """Split the cluster's CPUs and GPUs between actors and tasks so that both can run.

    Actors that reserve every CPU starve the reads that feed them, and Ray then waits for ever. So
    actors reserve so little that one CPU is left to the tasks wherever Ray puts them, be it all on
    the one node that is left after the others died (a soak hung in just that way). They are asked
    to spread, and the model's threads use all CPUs: reading and tokenising text take a few percent
    of what a model takes.

    Raises:
        SpecError: More GPUs are asked for than there are.
    """
    alive: list[Any] = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [n["Resources"] for n in alive if n["Alive"] and n["Resources"].get("CPU", 0) > 0]
    num_nodes = max(len(nodes), 1)
    cpus = min((int(n["CPU"]) for n in nodes), default=1)
    num_gpus = sum(n.get("GPU", 0) for n in nodes)
    gpus_per_actor = (
        spec.gpus_per_actor if spec.gpus_per_actor != "auto" else (1.0 if num_gpus else 0.0)
    )
    if gpus_per_actor > num_gpus:
        raise SpecError(
            f"compute.gpus_per_actor: {gpus_per_actor:g} asked, the cluster has {num_gpus:g}; "
            "set it to 0 for CPUs, or start the GPU nodes first"
        )
    fit = max(int(num_gpus / gpus_per_actor), 1) if gpus_per_actor else num_nodes
    if spec.actors == "auto":
        low, high = 1, fit
        low = fit
    else:
        low, high = (spec.actors, spec.actors) if isinstance(spec.actors, int) else spec.actors
    if gpus_per_actor and low > fit:
        raise SpecError(
            f"compute.actors: {low} asked with {gpus_per_actor:g} GPU each, the cluster's "
            f"{num_gpus:g} GPUs are enough for {fit}"
        )
    per_node = math.ceil(high / num_nodes)
    spare = cpus - 1 if cpus > 1 else 0.5
    device = "cuda" if gpus_per_actor else "cpu"
    return Plan(
        device=device,
        min_actors=low,
        max_actors=high,
        gpus_per_actor=gpus_per_actor,
        # Ray counts CPUs in steps of 1/10,000.
        cpus_per_actor=0.0 if gpus_per_actor else math.floor(spare / high * 1e4) / 1e4,
        num_threads=max(cpus // per_node, 1),
        cpus_per_task=1.0 if cpus > 1 else 0.5,
        window_rows=spec.window_rows if spec.window_rows != "auto" else _WINDOW_ROWS[device],
        batch_tokens=None if spec.batch_tokens == "auto" else int(spec.batch_tokens),
    )


def _native_bfloat16(spec: RunSpec) -> bool:
    """Whether the device that `dtype: auto` will run on computes bfloat16 natively."""
    if spec.model.dtype != "auto":
        return False
    on_cpu = spec.compute.gpus_per_actor == 0
    if ray.is_initialized():
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        if not on_cpu and resources.get("GPU", 0):
            return True
        return bool(ray.get(ray.remote(num_cpus=0)(cpu_has_bfloat16).remote()))
    return (not on_cpu and encoder.has_cuda()) or cpu_has_bfloat16()


# --- probes and report ----------------------------------------------------------------------------


def _probe(table: Table, spec: RunSpec, result: RunResult) -> RunResult:
    """Read a sample back from storage, probe it in Ray tasks, write the results and the report."""
    label, split = spec.source.label, spec.source.split
    columns = [c for c in (label, split) if c is not None]
    if spec.source.input in spec.source.columns:
        columns.append(spec.source.input)
    task = ray.remote(num_cpus=1)
    rows: pa.Table = ray.get(task(sample).remote(table.uri, columns, probes.MAX_ROWS, label))
    configuration = table.configuration()
    modality = configuration.get("fmembed.modality", "text")
    texts: list[str | None] | None = None
    if modality == "text":
        has_texts = spec.source.input in columns
        texts = rows[spec.source.input].to_pylist() if has_texts else _fetch_texts(spec, rows)
    row_ids = rows["row_id"].to_pylist()
    labels = rows[label].to_pylist() if label is not None else [None] * len(row_ids)
    vectors = rows["embedding"].combine_chunks().flatten().to_numpy()
    vectors = vectors.reshape(rows.num_rows, -1) if rows.num_rows else np.zeros((0, 0))
    mapped = slice(0, None, max(math.ceil(len(row_ids) / probes.MAX_MAP_ROWS), 1))
    flat = task(probes.project).remote(vectors[mapped])
    results: list[dict[str, Any]] = []
    if label is not None:
        splits = rows[split].to_pylist() if split is not None else None
        hashes = rows["content_hash"].to_pylist()
        data = ray.put(probes.make_probe_data(row_ids, hashes, vectors, labels, splits, texts))
        competitor = task(probes.tfidf_accuracy).remote(data)
        results = ray.get(
            [task(probes.run_probe).remote(name, data, competitor) for name in spec.probes]
        )
    for r in results:
        table.put_probe(result.version, r)
    # The report shows every probe of this version, those of an earlier command as well.
    stored = [table.get_probe(result.version, name) for name in probes.PROBES]
    results = [r for r in stored if r is not None]
    method, points = ray.get(flat)
    map_ = None
    if len(points):
        map_ = report.make_map(
            method,
            points,
            row_ids[mapped],
            [None if v is None else str(v) for v in labels[mapped]],
            texts[mapped] if texts is not None else None,
        )
    result = RunResult(
        **{**asdict(result), "probes": _headlines(results), "report": f"{table.uri}/_report.html"}
    )
    facts = _facts(spec, json.loads(configuration["fmembed.identity"]), modality, result)
    why = "no probe is named" if label is not None else "no source.label names the labels"
    html = report.render(
        spec.source.stored_name, asdict(result), facts, vectors.shape[1], results, why, map_
    )
    table.put_report(html)
    return result


def _fetch_texts(spec: RunSpec, rows: pa.Table) -> list[str | None] | None:
    """Read the sample's texts from the source again, where the table does not carry them.

    None where the source is gone, too large to read twice, or has changed since.
    """
    try:
        source = open_source(spec.source)
    except FmembedError:
        return None
    if sum(f.size for shard in source.shards for f in shard.files) > _MAX_FETCH_BYTES:
        return None
    wanted = ray.put(RowIds(keys_of(rows["row_id"].to_pylist())))
    fetch = ray.remote(num_cpus=1)(_fetch_shard)
    found: dict[str, tuple[str, str]] = {}
    reads = [fetch.remote(source, i, wanted) for i in range(len(source.shards))]
    for pairs in ray.get(reads):
        found.update(pairs)
    texts: list[str | None] = []
    for row_id, content_hash in zip(
        rows["row_id"].to_pylist(), rows["content_hash"].to_pylist(), strict=True
    ):
        known_hash, text = found.get(row_id, ("", ""))
        texts.append(text if known_hash == content_hash else None)
    return texts if all(t is not None for t in texts) else None


def _fetch_shard(source: Source, index: int, wanted: RowIds) -> dict[str, tuple[str, str]]:
    found = {}
    for rows in read_shard(source, index):
        rows = rows.filter(rows["_input"].is_valid())
        ids = rows["row_id"].to_pylist()
        here = wanted.contains(keys_of(ids))
        for i in np.flatnonzero(here).tolist():
            found[ids[i]] = (rows["content_hash"][i].as_py(), rows["_input"][i].as_py())
    return found


def _probes_missing(spec: RunSpec, table: Table) -> bool:
    version = table.version()
    named = spec.probes if spec.source.label is not None else ()
    return not table.has_report or any(table.get_probe(version, name) is None for name in named)


def _with_stored_probes(table: Table, spec: RunSpec, result: RunResult) -> RunResult:
    stored = [table.get_probe(result.version, name) for name in spec.probes]
    results = [r for r in stored if r is not None]
    return RunResult(
        **{**asdict(result), "probes": _headlines(results), "report": f"{table.uri}/_report.html"}
    )


def _headlines(results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        r["probe"]: {"skipped": r["skipped"]}
        if "skipped" in r
        else {
            **r["headline"],
            "baselines": {n: b["value"] for n, b in r["baselines"].items() if b is not None},
        }
        for r in results
    }


def _facts(
    spec: RunSpec, identity: dict[str, Any], modality: str, result: RunResult
) -> list[tuple[str, str]]:
    stored = spec.stored()
    prompt = identity["model.prompt"]
    text = [
        ("tokens at most", str(identity["model.max_tokens"])),
        ("prompt", repr(prompt) if prompt else "none"),
    ]
    return [
        ("source", f"{stored['source']['uri']} (format {spec.source.format})"),
        ("input column", spec.source.input),
        ("carried columns", ", ".join(spec.source.columns) or "none"),
        ("model", stored["model"]["id"]),
        ("revision", identity["model.revision"] or "a local folder"),
        ("weights, blake2b", identity["model.weights"]),
        (
            "pooling",
            identity["model.pooling"] + (", normalised" if identity["model.normalize"] else ""),
        ),
        *(text if modality == "text" else []),
        ("dtype", identity["model.dtype"]),
        ("remote code", "allowed by the config" if spec.model.trust_remote_code else "off"),
        (f"{_UNITS[modality]} in this run", f"{result.num_units:,}"),
        ("rows cut in this run", f"{result.num_truncated:,}"),
        ("batches halved for memory in this run", f"{result.num_halved:,}"),
        ("run", f"{result.run_id}, started {result.started}"),
    ]


# --- ends -----------------------------------------------------------------------------------------


class _Signals:
    """SIGINT and SIGTERM (preemption, `ray job stop`) as `Interrupted` in the driver's main thread.

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
            signals = (signal.SIGINT, signal.SIGTERM)
            self._before = {s: signal.signal(s, self._stop) for s in signals}
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
        return FmembedError(
            f"the model's process died {1 + _MAX_ACTOR_RESTARTS} times and was given up: "
            f"{lines[-1] if lines else 'no reason known'}; was it killed for memory "
            "(compute.actors, compute.batch_tokens), or does the model's own code end it? " + rest
        )
    reason = lines[-1] if lines else type(root).__name__
    return FmembedError(f"the run failed: {type(root).__name__}: {reason}; {rest}")
