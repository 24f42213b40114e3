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

from fmembed.inputs import Inputs, open_inputs
from fmembed.prepare.stage import Preprocess
from fmembed.run import commits as commits_module
from fmembed.run import refresh as refresh_module
from fmembed.run.commits import Commits, Staging
from fmembed.run.refresh import Refresh, Settled
from fmembed.run.work import find_work, is_in_step
from fmembed.sources.picks import NotKnown
from fmembed.sources.reading import read_shard
from fmembed.spec import RunSpec
from fmembed.table.lock import Lock


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


def _get(refs: Any) -> Any:
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
        for module in (commits_module, refresh_module):
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
    commits.begin(work.source.shards, work.known)
    ids = None if work.picks else work.known.load()
    for i, shard in enumerate(work.source.shards):
        pick = work.picks(i) if work.picks else NotKnown(ids)
        for rows in read_shard(work.source, shard, i, pick):
            for some in prepare.stream(rows):
                commits.add(_bundle(model(some)))
    commits.commit()


def embed(spec: RunSpec, stage: type, run_id: str) -> None:
    """As `pipeline.embed`."""
    inputs = open_inputs(spec)
    with inline_ray(), Lock(inputs.table.storage, run_id) as lock:
        inputs.table.clean_up(inputs.identity, run_id, retry_rejected=False)
        work = find_work(inputs)
        if work:
            card = inputs.table.claim(inputs.card({}), inputs.schema(), run_id)
            commits = Commits(spec.output, inputs.table, lock, run_id, card)
            _embed(inputs, stage, work, commits)


def refresh(
    spec: RunSpec, stage: type, run_id: str, allow_removals: int | None = None
) -> Settled | None:
    """As `pipeline.refresh`; None where there was nothing to do."""
    inputs = open_inputs(spec, may_be_empty=True)
    table = inputs.table
    if is_in_step(inputs) is not None and not table.strays():
        return None
    line = Refresh(inputs, allow_removals)
    with inline_ray(), Lock(table.storage, run_id) as lock:
        table.clean_up(inputs.identity, run_id, retry_rejected=False)
        work = line.find_work()
        if work:
            card = table.claim(inputs.card({}), inputs.schema(), run_id)
            commits = Staging(spec.output, table, lock, run_id, card)
            _embed(inputs, stage, work, commits)
            line.fill_copies(commits)
        settled = line.settle(lock, run_id)
        table.remove_strays(run_id)
        return settled
