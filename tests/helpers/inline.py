"""A refresh in this process: the same code, without Ray's processes, a hundred times as fast.

For what happens to a table over many weeks. Ray itself, and the model, are looked at in
tests/integration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray.exceptions

from fmembed import promotion
from fmembed.evaluate import gate as gate_module
from fmembed.inputs import Inputs, open_inputs
from fmembed.pipeline import in_step
from fmembed.prepare.stage import Preprocess
from fmembed.result import RunResult
from fmembed.run import commits as commits_module
from fmembed.run import locating as locating_module
from fmembed.run import new_version as new_version_module
from fmembed.run import refresh as refresh_module
from fmembed.run.commits import Commits, Staging
from fmembed.run.record import Run
from fmembed.run.refresh import Foreseen, Refresh
from fmembed.sources.picks import NotKnown
from fmembed.sources.reading import read_shard
from fmembed.spec import RunSpec
from fmembed.table.lock import Lock
from fmembed.table.versions import tidy
from fmembed.telling import Teller


class _Ref:
    def __init__(self, value: Any) -> None:
        self.value = value


class _Task:
    def __init__(self, function: Callable[..., Any], num_returns: int = 1) -> None:
        self._function, self._num_returns = function, num_returns

    def options(self, num_returns: int = 1) -> _Task:
        return _Task(self._function, num_returns)

    def remote(self, *given: Any) -> Any:
        found = self._function(*(g.value if isinstance(g, _Ref) else g for g in given))
        return _Ref(found) if self._num_returns == 1 else [_Ref(each) for each in found]


def _get(refs: Any, timeout: float | None = None) -> Any:
    return [r.value for r in refs] if isinstance(refs, list) else refs.value


INLINE = SimpleNamespace(
    remote=lambda num_returns=1, **_: lambda function: _Task(function, num_returns),
    get=_get,
    put=_Ref,
    wait=lambda refs, **_: (refs, []),
    exceptions=ray.exceptions,
)


@contextmanager
def inline_ray() -> Iterator[None]:
    """For this long what the driver starts as tasks runs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (
            commits_module, gate_module, locating_module, new_version_module, refresh_module,
        ):  # fmt: skip
            patch.setattr(module, "ray", INLINE)
        yield


def _bundle(rows: pa.Table) -> Any:
    return SimpleNamespace(block_refs=[_Ref(rows)], size_bytes=lambda: rows.nbytes)


def _embed(inputs: Inputs, stage: type, work: Any, commits: Commits) -> None:
    """The line, a block after another."""
    spec, checkpoint = inputs.spec, inputs.checkpoint
    pieces_are_rows = spec.preprocess.pieces_are_rows(checkpoint.modality)
    model = stage(checkpoint, pieces_are_rows=pieces_are_rows)
    prepare = Preprocess(checkpoint, spec.preprocess)
    work = locating_module.locate_work(work, inputs.source, inputs.table)
    commits.begin(work.source.shards, work.known)
    ids = None if work.picks else work.known.load()
    for i, shard in enumerate(work.source.shards):
        pick = work.picks(i) if work.picks else NotKnown(ids, work.known.deleted())
        for rows in read_shard(work.source, shard, i, pick):
            for some in prepare.stream(rows):
                commits.add(_bundle(model(some)))
    commits.commit()


def embed(spec: RunSpec, stage: type, run_id: str = "") -> RunResult:
    """As `pipeline.embed`, without probes and the report."""
    inputs = open_inputs(spec)
    table, run = inputs.table, Run(inputs)
    run.id = run_id or run.id
    with inline_ray(), Lock(table.storage, run.id) as lock:
        table.look_anew()
        table.clean_up(inputs.identity, run.id, retry_rejected=False)
        if run.find_work():
            card = table.claim(inputs.card({}), inputs.schema(), run.id)
            commits = Commits(spec.output, table, lock, run.id, card)
            _embed(inputs, stage, run.work, commits)
            run._commits = commits
        return run.finish()


def foresee(spec: RunSpec, adds_only: bool = False) -> Foreseen:
    """What a plan goes by."""
    inputs = open_inputs(spec, may_be_empty=True)
    with inline_ray():
        return Refresh(inputs, None, adds_only).foresee(1000, 64)


def _promoted(inputs: Inputs, result: RunResult) -> RunResult:
    """What the gate makes of it, where the table lies in a store."""
    if inputs.store is None:
        return result
    cluster: Any = SimpleNamespace(connect=lambda: None)
    with inline_ray():
        teller = Teller(quiet=True)
        asked = promotion.consider(inputs, result, "enforce", cluster, teller)
    assert asked is not None
    return promotion.settle(inputs, asked)


def refresh(
    spec: RunSpec, stage: type, run_id: str = "", allow_removals: int | None = None
) -> RunResult:
    """As `pipeline.refresh`, without probes and the report."""
    inputs = open_inputs(spec, may_be_empty=True)
    table = inputs.table
    if (result := in_step(inputs)) is not None:
        return result
    if inputs.store is not None:
        inputs.store.make()
    line = Refresh(inputs, allow_removals)
    run = Run(inputs, lambda _: line.find_work())
    run.id = run_id or run.id
    with inline_ray(), Lock(table.storage, run.id) as lock:
        table.look_anew()
        table.clean_up(inputs.identity, run.id, retry_rejected=False)
        if run.find_work():
            card = table.claim(inputs.card({}), inputs.schema(), run.id)
            commits = Staging(spec.output, table, lock, run.id, card)
            _embed(inputs, stage, run.work, commits)
            line.fill_copies(commits)
            run._commits = commits
        settled = line.settle(lock, run.id)
        table.remove_strays(run.id)
        result = run.finish_refresh(settled)
        assert not settled.num_left, f"{settled.num_left} rows are left"
        if not result.unchanged:
            tidy(table, spec.output.keep_days, spec.output.keep_versions)
    return _promoted(inputs, result)
