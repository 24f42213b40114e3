"""The line: read -> prepare -> embed -> write parts -> commit -> probe -> report.

`fmembed.inputs` finds and checks what a run is of before Ray is imported, which takes seconds, as
torch does; so what is imported here is imported late.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmembed.errors import BudgetSpentError, FmembedError, SpecError
from fmembed.forecast import Forecast, Range
from fmembed.inputs import Inputs, has_folders_as_labels, open_inputs
from fmembed.result import RunResult
from fmembed.spec import RunSpec
from fmembed.startup import joins_cluster
from fmembed.telling import Teller

if TYPE_CHECKING:
    from fmembed.evaluate.compare import Comparison
    from fmembed.promotion import GateMode
    from fmembed.run.cluster import Cluster
    from fmembed.run.record import Run
    from fmembed.run.refresh import Refresh
    from fmembed.table.lock import Lock
    from fmembed.table.table import Table


def embed(
    spec: RunSpec,
    *,
    retry_rejected: bool = False,
    waits: bool = False,
    verbose: bool = False,
    quiet: bool = False,
    stage: type | None = None,
) -> RunResult:
    """Run the whole line once; run it again to resume.

    Args:
        spec: What to do.
        retry_rejected: Try the rows again that earlier runs have rejected.
        waits: Where another run is writing the table, wait for its end.
        verbose: Show Ray's own output.
        quiet: Draw no progress.
        stage: What stands in for the model, as `model.embed.Embed` is made and called.

    Returns:
        What was counted, and where the table and the report are.

    Raises:
        UserError: The spec, the source, the checkpoint or the output is wrong; nothing was written.
        RejectedError: Too many rows were rejected; what was embedded is committed.
        ChangedError: Rows are others than when they were embedded, and keep their old
            vectors; what else is new is committed.
        Interrupted: SIGINT, SIGTERM or SIGHUP; what was finished is committed.
        BudgetSpentError: The run has cost what `compute.budget` allows; what was finished is
            committed.
        WaitedError: No device came for as long as `compute.wait_s` allows; what was finished is
            committed.
        LockedError: Another run is writing the table.
        FmembedError: Anything else; what was committed stays.
    """
    # On a cluster what `dtype: auto` means depends on its nodes: it is joined first.
    inputs = None if joins_cluster() else open_inputs(spec)

    from fmembed.run.cluster import Cluster
    from fmembed.run.record import Run
    from fmembed.table.lock import Lock

    teller = Teller(quiet)
    with Cluster(verbose, teller) as cluster:
        if inputs is None:
            cluster.connect()
            inputs = open_inputs(spec, gpus_may_come=cluster.may_get_gpus())
        table, run, stopped = inputs.table, Run(inputs), None
        if not run.find_work() and not table.has_leftovers(retry_rejected):
            result = run.finish()  # no lock is taken, no file changed
        else:
            with Lock(table.storage, run.id, waits=waits) as lock:
                table.look_anew()
                if inputs.store is not None:
                    inputs.store.make()
                # Whoever had the lock may have made the table since it was looked at.
                if table.clean_up(inputs.identity, run.id, retry_rejected):
                    run.find_work()
                if run.work:
                    cluster.connect()
                    stopped = embed_rows(run, inputs, lock, teller, stage)
                result = run.finish()
        if stopped is not None:
            raise stopped
        run.check_rejected()
        result = evaluate(table, inputs.spec, result, cluster, teller)
        run.check_changed()
        return result if inputs.store is None else replace(result, store=inputs.store.uri)


def refresh(
    spec: RunSpec,
    *,
    allow_removals: int | None = None,
    gate: GateMode = "enforce",
    waits: bool = False,
    verbose: bool = False,
    quiet: bool = False,
    stage: type | None = None,
) -> RunResult:
    """Keep a table in step with its source: one new version, of what the source holds now.

    Rows that are new or have changed are embedded, each content once; one that the table has a
    vector of is copied. Rows that the source has no more leave, unless they are many, or it cannot
    be read whole. Where nothing has changed nothing is read, and Ray is not started.

    In a store the new version becomes what its readers get, unless the gate refuses it. A table
    that another one has taken the place of stays beside it.

    Args:
        spec: What to do; `spec.refresh` says what may leave, `spec.gate` what may be promoted.
        allow_removals: So many rows may leave, in place of `refresh.max_removed_fraction`.
        gate: In a store: where it is "off", the gate is not asked. Where it refuses, the version
            that is promoted stays; "report" makes no difference here, but to the exit code.
        waits: Where another run is writing the table, wait for its end.
        verbose: Show Ray's own output.
        quiet: Draw no progress.
        stage: What stands in for the model, as `model.embed.Embed` is made and called.

    Returns:
        What was counted, and where the table and the report are. `rows_withheld` says how many rows
        stay that should have left, and `withheld` why; `promotion` what has become of it in a
        store.

    Raises:
        UserError: The spec, the source, the checkpoint or the output is wrong; nothing was written.
        RejectedError: Too many rows are rejected; the new version is committed.
        Interrupted: SIGINT, SIGTERM or SIGHUP; what was finished is kept for the next refresh.
        BudgetSpentError: The run has cost what `compute.budget` allows; the new version has what
            was finished, and of the rest what was there before.
        WaitedError: No device came for as long as `compute.wait_s` allows; what was finished is
            kept for the next refresh.
        LockedError: Another run is writing the table.
        FmembedError: Anything else; the table is as it was, and what was finished is kept, or rows
            have changed while they were read, and come in with the next refresh.
    """
    _check_allowed(allow_removals)
    inputs = None if joins_cluster() else open_inputs(spec, may_be_empty=True)
    if inputs is not None and (result := in_step(inputs, gate)) is not None:
        return result

    from fmembed import promotion
    from fmembed.run.cluster import Cluster
    from fmembed.run.passes import cleaned_up
    from fmembed.run.record import Run
    from fmembed.run.refresh import Refresh
    from fmembed.table.lock import Lock
    from fmembed.table.versions import tidy

    teller = Teller(quiet)
    with Cluster(verbose, teller) as cluster:
        began = time.monotonic()
        if inputs is None:
            cluster.connect()
            inputs = open_inputs(spec, True, cluster.may_get_gpus())
            if (result := in_step(inputs, gate)) is not None:
                return result
        table, line = inputs.table, Refresh(inputs, allow_removals)
        run = Run(inputs, lambda _: line.find_work(), began)
        # Before Ray is started here: where another run is at work there is nothing to do.
        with Lock(table.storage, run.id, waits=waits) as lock:
            table.look_anew()
            cluster.connect()
            if inputs.store is not None:
                inputs.store.make()
            table.clean_up(inputs.identity, run.id, retry_rejected=False)
            stopped = None
            teller.say("comparing the source with the table …")
            if run.find_work():
                stopped = embed_rows(run, inputs, lock, teller, stage, line)
            if table.card() is None:
                return run.finish()  # a source of no row, and no table of it
            teller.say("making the new version …")
            with cleaned_up(table, lock, run.id):
                settled = line.settle(lock, run.id)
            result = run.finish_refresh(settled)
            if not result.unchanged:
                tidy(table, spec.output.keep_days, spec.output.keep_versions)
        if stopped is not None:
            spent = str(stopped).partition(";")[0]
            raise BudgetSpentError(
                f"{spent}; what was embedded by then is in the new version, {settled.num_left:,} "
                "rows are left: the same command goes on"
            )
        run.check_rejected()
        if inputs.store is not None:
            result = promotion.consider(inputs, result, gate, cluster, teller) or result
        result = evaluate(table, inputs.spec, result, cluster, teller)
        if settled.num_left:
            raise FmembedError(
                f"source: {settled.num_left:,} rows are left, which have changed while they were "
                "read, or come in place of another one of their id that cannot be embedded; all "
                "else is committed: run the same again"
            )
        return promotion.settle(inputs, result)


def plan(
    spec: RunSpec,
    *,
    refresh: bool = False,
    allow_removals: int | None = None,
    verbose: bool = False,
    quiet: bool = False,
) -> Forecast:
    """Say what a run would do now, how long it would take and what it would cost; write nothing.

    Rows are counted, by reading what the run would read. Of those that the model would see at most
    1,000 are drawn and prepared. Where no run on record tells how fast the model is on devices of
    this kind, it is loaded and given these for some seconds; a server is never asked.

    Args:
        spec: Of the run.
        refresh: Whether the run is a refresh; else it is one that embeds what is new.
        allow_removals: As for `refresh`.
        verbose: Show Ray's own output.
        quiet: Say nothing meanwhile.

    Raises:
        UserError: The spec, the source, the checkpoint or the output is wrong.
        FmembedError: Anything else.
    """
    _check_allowed(allow_removals)
    if allow_removals is not None and not refresh:
        raise SpecError("allow_removals: only a refresh removes rows; ask for the plan of one")
    inputs = None if joins_cluster() else open_inputs(spec, may_be_empty=refresh)
    if inputs is not None and (forecast := plan_of_nothing(inputs, refresh)) is not None:
        return forecast

    from fmembed.run.cluster import Cluster
    from fmembed.run.planning import make_plan

    teller = Teller(quiet)
    with Cluster(verbose, teller) as cluster:
        began = time.monotonic()
        cluster.connect()
        start_s = time.monotonic() - began
        teller.say("reading the source, and trying the model where no run on record tells …")
        inputs = inputs or open_inputs(spec, refresh, cluster.may_get_gpus())
        return make_plan(inputs, refresh, allow_removals, start_s, teller)


def plan_of_nothing(inputs: Inputs, refresh: bool) -> Forecast | None:
    """The plan of a run that has nothing to do, which is seen without reading a row.

    Returns:
        None where there may be something to do.
    """
    from fmembed.run.work import find_work, is_in_step

    num_rows = is_in_step(inputs) if refresh else None
    if not refresh and not (work := find_work(inputs)):
        num_rows = work.num_skipped
    if num_rows is None:
        return None
    table, none = inputs.table, Range.exactly(0)
    return Forecast(
        kind="refresh" if refresh else "embed",
        table=table.uri,
        version=table.version(),
        rows_read=num_rows,
        rows_unchanged=max(num_rows - table.num_rejected(), 0),
        seconds=none,
        device_hours=none,
        parts_written=none,
        bytes_written=none,
    )


def _check_allowed(allow_removals: int | None) -> None:
    if allow_removals is not None and allow_removals < 0:
        raise SpecError(f"allow_removals: takes a number of rows, got {allow_removals}")


def in_step(inputs: Inputs, gate: GateMode = "enforce") -> RunResult | None:
    """What a refresh returns that has nothing to do, which is seen without reading a row.

    Returns:
        None where there may be something to do.
    """
    from fmembed.evaluate import probing
    from fmembed.run.work import is_in_step, passed_over

    began = time.monotonic()
    table, num_rows = inputs.table, is_in_step(inputs)
    if num_rows is None or table.has_leftovers(retry_rejected=False):
        return None
    card = table.card()
    assert card is not None
    num_rejected = table.num_rejected()
    result = RunResult(
        run_id=uuid.uuid4().hex[:12],
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        table=table.uri,
        version=table.version(),
        fingerprint=card.fingerprint,
        rows_read=num_rows,
        rows_skipped=num_rows,
        rows_unchanged=num_rows - num_rejected,
        table_rows=sum(part.num_rows for part in table.rows.parts()),
        table_rejected=num_rejected,
        passed_over=passed_over(inputs, num_rows),
        kind="refresh",
        unchanged=True,
    )
    allowed = inputs.spec.output.max_rejected_fraction
    if num_rejected > allowed * num_rows:
        return None  # that is said with its causes
    stored = probing.stored_results(table, inputs.spec, result)
    if stored is not None and inputs.store is not None:
        from fmembed import promotion

        considered = promotion.consider(inputs, stored, gate, None, Teller(quiet=True))
        stored = considered and promotion.settle(inputs, considered)
    return stored and replace(stored, seconds=round(time.monotonic() - began, 2))


def embed_rows(
    run: Run,
    inputs: Inputs,
    lock: Lock,
    teller: Teller,
    stage: type | None,
    line: Refresh | None = None,
) -> BudgetSpentError | None:
    """Stream what is left through the stages and commit what comes out; in a refresh, stage it.

    Rows never reach the driver: it holds references to blocks, has tasks write them as parts, and
    commits the parts.

    Returns:
        What has ended it before its end.
    """
    from fmembed.model.embed import Embed, WithoutModel
    from fmembed.run.commits import Commits, Staging
    from fmembed.run.memory import bound_memory, moving_bound
    from fmembed.run.pace import shorten_windows
    from fmembed.run.passes import cleaned_up, passes
    from fmembed.run.placement import is_blind, place
    from fmembed.run.plan import describe
    from fmembed.run.pools import measure
    from fmembed.run.progress import Progress
    from fmembed.run.ranges import find_ranges
    from fmembed.run.signals import Signals
    from fmembed.run.spending import Spending
    from fmembed.run.stages import (
        apply,
        not_known,
        prepare,
        read,
        stage_options,
        stored_dims,
        try_model,
    )
    from fmembed.run.verdict import EMBED, READ
    from fmembed.run.waiting import Watch, see_node, watched

    spec, checkpoint, table = inputs.spec, inputs.checkpoint, inputs.table
    run.locate()
    assert run.work is not None
    left = run.work.source
    # Of a table without a row nobody knows yet how long its vectors are.
    stored = table.schema()
    sees_model = run.work.sees_model or not stored.names
    stage = stage or (Embed if sees_model else WithoutModel)
    plan = place(inputs, left, sees_model)
    watch = Watch(plan, stage.__name__, teller, spec.compute.wait_s)
    if is_blind(plan):
        see_node(plan, watch)
        plan = place(inputs, left, sees_model)
        watch = Watch(plan, stage.__name__, teller, spec.compute.wait_s)
    if sees_model:
        plan = shorten_windows(plan, inputs)
    bound_memory(plan)
    if sees_model:
        try_model(checkpoint, plan, watch.get)
    with watched(watch):
        ranges = find_ranges(inputs, left, plan, stage, run.server_dim, watch.get)
    card = table.claim(inputs.card(ranges), inputs.schema(), run.id)
    kind = Commits if line is None else Staging
    commits = kind(spec.output, table, lock, run.id, card)
    options = stage_options(checkpoint, spec.preprocess, plan, ranges, run.server_dim)
    held_to = None
    if plan.pools:
        teller.say("embedding some rows, to which the pools are held …")
        held_to = measure(stage, inputs, left, plan, ranges, watch.get)
    if not sees_model:
        options["dims"] = stored_dims(checkpoint.outputs, stored)
    spending = Spending(spec)
    if sees_model:
        is_server = checkpoint.endpoint is not None
        teller.say("asking the server …" if is_server else f"loading the model, {describe(plan)} …")
    with (
        cleaned_up(table, lock, run.id),
        Progress(teller) as progress,
        Signals(commits) as signals,
        moving_bound(plan) as hold,
        watched(watch),
    ):
        progress.watch({"Preprocess": READ, stage.__name__: EMBED}, watch)
        run.begin(plan, commits, progress)
        try:
            for one in passes(run, table, lock, commits, progress, signals):
                with one as work:
                    progress.expect(work.source)
                    hold(commits.held_bytes)
                    picks = work.picks or not_known(work.known)
                    rows = read(work.source, plan, picks, work.apart)
                    num_shards = len(work.source.shards)
                    pieces = prepare(
                        rows, checkpoint, spec.preprocess, plan, num_shards, work.apart
                    )
                    vectors = apply(stage, checkpoint, options, pieces, plan, held_to)
                    for bundle in vectors.iter_internal_ref_bundles():
                        run.count(bundle)
                        run.show(has_committed=commits.add(bundle))
                        hold(commits.held_bytes)
                        spending.add(bundle)
                    commits.commit()
                    run.show(has_committed=True)
                    if line is not None and isinstance(commits, Staging):
                        line.fill_copies(commits)
        except BudgetSpentError as e:
            return e
    return None


def evaluate(
    table: Table, spec: RunSpec, result: RunResult, cluster: Cluster, teller: Teller
) -> RunResult:
    """Probe what the table holds by now and write the report, unless that is done already."""
    began = time.monotonic()
    if not result.table_rows:
        table.drop_report()  # which tells of rows that are gone
        return result
    # Late, because scikit-learn takes a second to import and the model should not wait for it.
    from fmembed.evaluate import probing

    if not (result.rows_embedded or result.rows_rejected):
        known = probing.stored_results(table, spec, result)
        if known is not None:
            return known
    if spec.probes:
        cluster.connect()
        is_labelled = probing.runnable(spec)
        teller.say(
            "probing …"
            if is_labelled
            else "drawing the map; no probe runs, as source.label names no column of labels …"
        )
    result = probing.evaluate(table, spec, result, spec.source, spec.model)
    return replace(result, probe_s=round(time.monotonic() - began, 2))


def probe(
    uri: str | Path,
    names: tuple[str, ...] | None = None,
    *,
    spec: RunSpec | str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    verbose: bool = False,
    quiet: bool = False,
) -> RunResult:
    """Probe an existing table anew and write its report; or vectors in a file, beside it.

    A table may be anybody's: the source and the model that its metadata name are never opened. What
    needs them is left out, and says so, unless they are named here.

    Args:
        uri: The table; or a file of vectors, as `exchange.foreign` takes them, of which
            `source.label` and `source.split` in `overrides` name columns, or a file of labels.
        names: Which probes; None for those the spec names.
        spec: What made the table, or a YAML file of it: its source and model are the user's own.
        overrides: Dotted field names to values, laid over `spec`, or else over the words of the
            table's own spec; `source.uri` and `model.id` are then opened.
        verbose: Show Ray's own output.
        quiet: Say nothing meanwhile.

    Raises:
        TableError: No table there, or not one as a run leaves it.
        SpecError: Another probe or column than there is, or a spec of another table.
        ModelError: The checkpoint that `spec` names cannot be found.
    """
    from fmembed.exchange.foreign import is_foreign

    if is_foreign(uri):
        if spec is not None:
            raise SpecError(f"--from-config: {uri} is a file of vectors, which no config has made")
        return _probe_file(str(uri), names, {**(overrides or {})}, verbose, quiet)
    if isinstance(spec, str | Path):
        spec = RunSpec.from_yaml(str(spec))
    from fmembed.evaluate import probing
    from fmembed.evaluate.sample import check_columns, read_card
    from fmembed.evaluate.stored_spec import stored_spec
    from fmembed.run.cluster import Cluster
    from fmembed.table.table import Table

    table = Table.open(uri)
    overrides = {**(overrides or {})}
    if names is not None:
        overrides["probes"] = list(names)
    if spec is None:
        spec, source, model = stored_spec(table, overrides)
    else:
        if "label" not in spec.source.model_fields_set and has_folders_as_labels(table):
            overrides.setdefault("source.label", "label")
        spec = RunSpec.from_yaml(None, {**spec.model_dump(mode="json"), **overrides})
        probing.check_made_by(table, spec)
        source, model = spec.source, spec.model
    last = table.last_run()
    if last is None or not table.rows.parts():
        raise FmembedError(f"table: no run has finished on {uri}; run fmembed embed again first")
    schema = check_columns(table, spec, read_card(table))  # before Ray starts
    began, teller = time.monotonic(), Teller(quiet)
    if absent := probing.describe_absent(spec, schema, spec.probes):
        if names is not None:
            raise SpecError(f"probe: {absent}")
        teller.say(f"not run: {absent}")
    with Cluster(verbose, teller) as cluster:
        cluster.connect()
        teller.say("probing …")
        result = probing.evaluate(table, spec, last, source, model)
        return replace(result, probe_s=round(time.monotonic() - began, 2))


def compare(
    tables: Sequence[str | Path],
    names: Sequence[str] = ("knn", "linear"),
    *,
    label: str | None = None,
    split: str | None = None,
    verbose: bool = False,
    quiet: bool = False,
) -> Comparison:
    """Compare tables of the same rows by what probes say of the labels.

    Args:
        tables: Two at least.
        names: Which probes: knn, linear.
        label: What is predicted; else what the first table's config says.
        split: What names the test split; as `label`. Without one all rows are judged, each by
            probes that were trained without it.
        verbose: Show Ray's own output.
        quiet: Say nothing meanwhile.

    Raises:
        TableError: No table there, or too few rows that all have.
        SpecError: No such column, or probe.
    """
    from fmembed.evaluate.compare import check, compare
    from fmembed.run.cluster import Cluster

    uris = [str(table) for table in tables]
    label, split = check(uris, names, label, split)  # before Ray starts
    with Cluster(verbose, Teller(quiet)) as cluster:
        cluster.connect()
        Teller(quiet).say("comparing …")
        return compare(uris, names, label, split)


def _probe_file(
    path: str,
    names: tuple[str, ...] | None,
    overrides: dict[str, Any],
    verbose: bool,
    quiet: bool,
) -> RunResult:
    """Probe vectors in a file, as a table that lasts as long; the report is put beside it."""
    from fmembed.exchange.importing import import_vectors
    from fmembed.table.table import Table

    label, split = overrides.pop("source.label", None), overrides.pop("source.split", None)
    where = Path(path).expanduser().resolve()
    report = where.with_name(f"{where.name}.report.html")
    try:  # now, and not after minutes
        report.open("ab").close()
    except OSError as e:
        raise SpecError(f"{report}: cannot be written: {e.strerror}") from None
    with tempfile.TemporaryDirectory(prefix="fmembed-") as folder:
        uri = f"{folder}/table"
        taken = import_vectors(path, uri, label=label, split=split, as_float32=True)
        for cause, num in taken.causes.items():
            Teller(quiet).say(f"not probed: {num:,} rows, {cause}")
        result = probe(uri, names, overrides=overrides, verbose=verbose, quiet=quiet)
        report.write_bytes(Table.open(uri).storage.get("_report.html"))
    return replace(result, table=path, report=str(report))
