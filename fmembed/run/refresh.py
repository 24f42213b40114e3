"""A table kept in step with its source: what is new, changed or gone, in one new version.

The source is looked at and compared with the table a bucket of ids at a time (buckets.py); what is
to be done goes through the same stages as an embedding run, and is staged; then all is compared
once more, and what that says is committed at once. So whatever has happened in between, a kill
included, the new version is made of what the source holds: no row more, and none less.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.exceptions

from fmembed.inputs import Inputs
from fmembed.rows.found import COPY, EMBED, REJECT, TWIN
from fmembed.rows.ids import keys_of
from fmembed.run import buckets
from fmembed.run.buckets import Bucket, Drawn, Summary
from fmembed.run.commits import Staging
from fmembed.run.faults import TASK_DEATHS, root_cause
from fmembed.run.locating import ends_on_record, locate
from fmembed.run.new_version import NewVersion, join_all
from fmembed.run.removals import why_withheld
from fmembed.run.work import Work, unread_shards
from fmembed.sources.picks import Chosen
from fmembed.sources.source import Mark, Shard
from fmembed.table.copies import fill_copies
from fmembed.table.diff import Rules
from fmembed.table.files import Part
from fmembed.table.key_rows import KeyRows
from fmembed.table.known import KnownRows
from fmembed.table.lock import Lock
from fmembed.table.parts import Written
from fmembed.table.records import Commit, WholeShard
from fmembed.table.rewriting import Held

_MAX_RETRIES = 3
# Shards are read by so many tasks at most, so that what one of them has for a bucket is no mere
# row or two.
_SCAN_TASKS = 256
# Why a row that has gone wrong stays, where nothing else keeps it.
_KEPT = "they cannot be embedded any more (refresh.on_rejected: keep)"
# What a row is taken for where only reading tells how many there are.
_ROW_BYTES = 100


@dataclass(frozen=True)
class Settled:
    """What a refresh has made of the table, in rows of the source.

    `counts` are those of `diff.Compared`; `rows_removed` have left, `rows_withheld` would have, and
    `why_withheld` says why they have not. `commit` is the newest one. `look_s` are the seconds that
    looking at the source took, `settle_s` those that making the version did.
    """

    counts: Mapping[str, int]
    rows_read: int
    rows_removed: int
    rows_withheld: int
    why_withheld: str
    parts_written: int
    parts_rewritten: int
    commit: Commit
    look_s: float
    settle_s: float

    @property
    def num_left(self) -> int:
        """Rows that have changed while they were read, or that no run has come to by now."""
        return self.counts["todo"]


@dataclass(frozen=True)
class Foreseen:
    """What a refresh, or a run that only adds rows, would find to do now.

    `counts` are those of `diff.Compared`; `held` are the newest version's parts, with what would
    stay of them. `scan_s` are the seconds that reading took, of all `seconds`.
    """

    counts: Mapping[str, int]
    rows_read: int
    rows_removed: int
    rows_withheld: int
    why_withheld: str
    drawn: Drawn
    held: Sequence[Held]
    adds_only: bool
    scan_s: float
    seconds: float

    @property
    def num_embed(self) -> int:
        """Rows that the model would see."""
        return self.drawn.fates.get(EMBED, 0)

    @property
    def num_copies(self) -> int:
        """Rows that would take a vector that another one has, or has by then."""
        return self.drawn.fates.get(COPY, 0)

    @property
    def num_rejected(self) -> int:
        """Rows that would be rejected, by what reading says; and that a killed refresh has."""
        staged = 0 if self.adds_only else self.counts.get("rejected", 0)
        return self.drawn.fates.get(TWIN, 0) + self.drawn.fates.get(REJECT, 0) + staged

    @property
    def loads_model(self) -> bool:
        """Whether a model would be loaded: a run that only adds rows does for those that it rejects
        too.
        """
        return bool(self.num_embed) or (self.adds_only and self.moves_rows)

    @property
    def moves_rows(self) -> bool:
        """Whether any row would go through the stages."""
        return bool(self.drawn.fates)


class Refresh:
    """One refresh, from the first look at the source to the new version."""

    def __init__(self, inputs: Inputs, allow_removals: int | None, adds_only: bool = False) -> None:
        """Prepare; nothing is looked at yet.

        Args:
            inputs: The source, the table, and what may leave it.
            allow_removals: How many rows may leave, whatever share that is; None for the share that
                the config says.
            adds_only: Whether only what is new is looked for, as an embedding run does.
        """
        self._adds_only = adds_only
        self._inputs = inputs
        self._table = inputs.table
        self._allowed = allow_removals
        # Its shards; parts of large files that were read by now are located.
        self.shards = list(inputs.source.shards)
        # What was read by now of the source: references to the rows of each bucket.
        self._found: list[list[Any]] = []
        self._read: set[int] = set()
        self._scan_s = self._look_s = 0.0
        self._num_buckets = 0
        self._unread: frozenset[int] = frozenset()
        self._recorded: dict[str, int] = {}
        self._ends: dict[str, Mark] = {}
        self._rules = Rules()
        self._why_withheld = ""

    def find_work(self) -> Work:
        """Look at what has changed in the source, and compare all of it with the table."""
        known, summary, chosen = self._look()
        source = self._inputs.source
        num_unread = int(summary.found[sorted(self._unread)].sum())
        if not summary.counts["todo"]:
            return Work(replace(source, shards=()), known, num_unread)
        ref, numbers, sees_model, _ = self._choose(known, chosen)

        def picks(index: int) -> Chosen:
            return Chosen(ray.get(ref), numbers[index])

        shards = tuple(self.shards[i] for i in numbers)
        return Work(replace(source, shards=shards), known, num_unread, picks, sees_model=sees_model)

    def foresee(self, num_rows: int, num_shards: int) -> Foreseen:
        """Look, and see what would be done.

        Args:
            num_rows: Of those that the model would see at most so many are drawn.
            num_shards: From at most so many shards.
        """
        began, rules = time.monotonic(), self._rules
        known, summary, chosen = self._look()
        if rules != self._rules:
            summary, chosen = self._plan(known)
        some, staged = chosen, keys_of([])
        if not self._adds_only:
            ref, _, _, staged = self._choose(known, chosen)
            some = [ref]
        task: Any = ray.remote(max_retries=_MAX_RETRIES)(buckets.draw)
        drawn: Drawn = ray.get(task.remote(num_rows, num_shards, staged, *some))
        counts = summary.counts
        num_leaving = 0 if self._adds_only else counts["gone"] + counts["gone_wrong"]
        num_kept = 0 if self._adds_only else counts["kept"]
        live = (summary.live - summary.replaced).tolist()
        named = zip(known.paths, known.parts.values(), summary.rows.tolist(), live, strict=False)
        return Foreseen(
            counts=counts,
            rows_read=int(summary.found.sum()),
            rows_removed=num_leaving if self._rules.removes else 0,
            rows_withheld=num_kept + (0 if self._rules.removes else num_leaving),
            why_withheld=self._why_withheld or (_KEPT if num_kept else ""),
            drawn=drawn,
            held=[Held(*each) for each in named],
            adds_only=self._adds_only,
            scan_s=self._scan_s,
            seconds=time.monotonic() - began,
        )

    def _look(self) -> tuple[KnownRows, Summary, list[Any]]:
        """Compare; what the table knows, what was counted, and by bucket what is to be done."""
        began = time.monotonic()
        # An embedding run starts from what is committed.
        known = self._table.known(with_staged=not self._adds_only)
        source = self._inputs.source
        self._recorded = self._table.recorded_shards()
        self._ends = ends_on_record(self._table)
        unread = unread_shards(source, known, self._recorded)
        if not self._num_buckets:
            num_rows = source.num_rows or source.num_bytes // _ROW_BYTES
            self._num_buckets = buckets.count_buckets(max(known.num_rows, num_rows))
        self._rules = Rules(True, self._inputs.spec.refresh.on_rejected == "remove")
        while True:
            self._unread = frozenset(unread - self._read)
            self._scan([i for i in range(len(source.shards)) if i not in self._unread])
            summary, chosen = self._plan(known)
            again = self._not_known(summary)
            if not again:
                break
            unread -= again
        self._rules = self._decide_removals(summary.counts)
        self._look_s += time.monotonic() - began
        return known, summary, chosen

    def _not_known(self, summary: Summary) -> frozenset[int]:
        """Shards that have to be read after all.

        One of their rows had an id that another row had too, which is gone. Or their rows are not
        those that were counted: a file of keys is damaged, and its parts, which are read instead,
        do not say of which shard a row is; or somebody else has written a part anew meanwhile.
        """
        shards = self._inputs.source.shards
        counted = {i: self._recorded[shards[i].key or ""] for i in self._unread}
        return summary.to_read | {i for i, n in counted.items() if summary.found[i] != n}

    def _scan(self, wanted: Sequence[int]) -> None:
        """Read shards that were not read before."""
        left = [i for i in wanted if i not in self._read]
        if not left:
            return
        began = time.monotonic()
        source = self._inputs.source
        located = locate(source, [self.shards[i] for i in left], self._ends)
        for i, shard in zip(left, located, strict=True):
            self.shards[i] = shard
        described, num_tasks = source.without_shards, min(len(left), _SCAN_TASKS)
        groups = [[(i, self.shards[i]) for i in left[at::num_tasks]] for at in range(num_tasks)]
        num_returns = self._num_buckets + 1
        task: Any = ray.remote(max_retries=_MAX_RETRIES, num_returns=num_returns)(buckets.scan)

        def scan(apart: bool) -> list[list[Any]]:
            refs = [task.remote(described, group, self._num_buckets, apart) for group in groups]
            ray.get([num_rows for num_rows, *_ in refs])  # raises what a task has
            return [pieces for _, *pieces in refs]

        try:
            self._found += scan(apart=False)
        except ray.exceptions.RayError as e:
            if not isinstance(root_cause(e), TASK_DEATHS):
                raise
            self._found += scan(apart=True)
        self._read.update(left)
        self._scan_s += time.monotonic() - began

    def _on_buckets(self, task: Any, known: KnownRows, *more: Any) -> list[Any]:
        """Start a task for each bucket: given the rows that were read, or the same for all."""
        source = self._inputs.source
        numbers = {s.key: i for i, s in enumerate(source.shards) if s.key is not None}
        told, num_shards = known.without_counts, len(source.shards)
        given = ray.put(
            Bucket(told, self._num_buckets, numbers, num_shards, self._unread, self._rules)
        )
        numbers_of = range(self._num_buckets)
        if more:
            return [task.remote(given, i, *more) for i in numbers_of]
        return [task.remote(given, i, *(found[i] for found in self._found)) for i in numbers_of]

    def _plan(self, known: KnownRows) -> tuple[Summary, list[Any]]:
        look = buckets.plan_new if self._adds_only else buckets.plan_bucket
        task = ray.remote(max_retries=_MAX_RETRIES, num_returns=2)(look)
        refs = self._on_buckets(task, known)
        return _add_up([summary for summary, _ in refs]), [chosen for _, chosen in refs]

    def _decide_removals(self, counts: Mapping[str, int]) -> Rules:
        """Whether rows may leave, by what the source has no more."""
        spec = self._inputs.spec
        self._why_withheld = why = why_withheld(spec, self._inputs.source, counts, self._allowed)
        return Rules(not why, spec.refresh.on_rejected == "remove" and not why)

    def _choose(self, known: KnownRows, chosen: Sequence[Any]) -> tuple[Any, list[int], bool, Any]:
        """A reference to the rows that readers hand on; the numbers of the shards that they read;
        whether the model is to see any; and one to the contents that only what is staged has.
        """
        holders: list[Any] = []
        if known.paths:
            wanted = ray.remote(max_retries=_MAX_RETRIES)(buckets.list_wanted).remote(*chosen)
            holders = self._find_holders(known, wanted)
        task = ray.remote(max_retries=_MAX_RETRIES, num_returns=4)(buckets.choose)
        given = (len(chosen), len(known.parts), *chosen, *holders)
        ref, numbers_ref, sees_ref, staged = task.remote(*given)
        numbers, sees_model = ray.get([numbers_ref, sees_ref])
        return ref, numbers, sees_model, staged

    def _find_holders(self, known: KnownRows, contents: Any) -> list[Any]:
        """References to rows that have a vector of these contents, by bucket."""
        task = ray.remote(max_retries=_MAX_RETRIES)(buckets.find_holders)
        return self._on_buckets(task, known, contents)

    def fill_copies(self, commits: Staging) -> None:
        """Give the rows that were read without a vector that of their content."""
        if not commits.copies:
            return
        known = self._table.known(with_staged=True)
        contents = ray.remote(max_retries=_MAX_RETRIES)(buckets.list_contents)
        holders = self._find_holders(known, contents.remote(*commits.copies))
        joined = ray.remote(max_retries=_MAX_RETRIES)(buckets.join).remote(*holders)
        parts = {**known.parts, **known.staged}
        part_bytes = self._inputs.spec.output.part_bytes
        given = (joined, parts, len(known.parts), part_bytes)
        commits.fill(_fill, [(copies, *given) for copies in commits.copies])

    def settle(self, lock: Lock, run_id: str) -> Settled:
        """Compare once more, and commit what the new version is made of."""
        began = time.monotonic()
        known = self._table.known(with_staged=True)
        task = ray.remote(max_retries=_MAX_RETRIES, num_returns=3)(buckets.settle_bucket)
        while True:
            refs = self._on_buckets(task, known)
            summary = _add_up([summary for summary, _, _ in refs])
            if again := self._not_known(summary):
                self._unread -= again
                self._scan(sorted(again))
                continue
            counts = summary.counts
            decided = self._rules
            if decided.removes:  # that no more leave than may, whatever was decided before the work
                self._rules = self._decide_removals(counts)
            if decided == self._rules:
                break
        parts = [*known.parts.values(), *known.staged.values()]
        both = (summary.rows.tolist(), summary.live.tolist())
        named = zip(known.paths, parts, *both, strict=True)
        held = [Held(*each) for each in named]
        new = NewVersion(self._table, known, held, run_id, lock)
        shards = [shard.key for shard in self._inputs.source.shards]
        try:
            new.rewrite([dead for _, _, dead in refs], self._inputs.spec.output.part_bytes)
            new.write_keys([stays for _, stays, _ in refs], shards)
            commit = new.commit()
        finally:
            new.settle()
        whole = [
            WholeShard(shard.key, n, None, self._end_of(shard))
            for shard, n in zip(self.shards, summary.found.tolist(), strict=True)
            if shard.key
        ]
        new.clean_up(commit, whole)
        self._table.deleted.finish(self._table.rows.version())
        num_leaving = counts["gone"] + counts["gone_wrong"]
        return Settled(
            counts=counts,
            rows_read=int(summary.found.sum()),
            rows_removed=num_leaving if self._rules.removes else 0,
            rows_withheld=counts["kept"] + (0 if self._rules.removes else num_leaving),
            why_withheld=self._why_withheld or (_KEPT if counts["kept"] else ""),
            parts_written=len(new.added),
            parts_rewritten=new.num_rewritten,
            commit=commit,
            look_s=self._look_s,
            settle_s=time.monotonic() - began,
        )

    def _end_of(self, shard: Shard) -> Mark | None:
        """Where a part of a file ends, that was read now or before."""
        return shard.marks[1] if shard.marks is not None else self._ends.get(shard.key or "")


def _add_up(summaries: Sequence[Any]) -> Summary:
    """The sum of what references lead to, as each counts all parts and shards."""
    total: Summary = join_all(buckets.add_up, summaries)
    return total


def _fill(
    uri: str,
    vectors: tuple[str, ...],
    stamp: dict[str, str],
    copies: Any,
    holders: KeyRows,
    parts: Mapping[str, Part],
    num_old: int,
    part_bytes: int,
) -> tuple[list[Written], list[KeyRows]]:
    return fill_copies(uri, vectors, stamp, [copies], holders, parts, num_old, part_bytes)
