"""The version that a refresh makes: parts that stay, are new, or are written anew; and keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import ray

from fmembed.rows.columns import REJECTED_SCHEMA
from fmembed.run import buckets
from fmembed.run.commits import SETTLE_S
from fmembed.table.files import REJECTED, RUN, WRITE, Part
from fmembed.table.key_rows import KeyRows, places_of_shards
from fmembed.table.known import KnownRows
from fmembed.table.lock import Lock
from fmembed.table.records import Commit, WholeShard
from fmembed.table.rewriting import Held, plan_rewriting, rewrite
from fmembed.table.table import Table

_MAX_RETRIES = 3
# What a task adds up of.
_JOINED = 64


def join_all(join: Callable[..., Any], refs: Sequence[Any], tasks: Any = None) -> Any:
    """What `join` makes of what references lead to: by tasks, some at a time."""
    tasks = tasks or ray
    task = tasks.remote(max_retries=_MAX_RETRIES)(join)
    refs = list(refs)
    while len(refs) > 1:
        refs = [task.remote(*refs[i : i + _JOINED]) for i in range(0, len(refs), _JOINED)]
    return tasks.get(refs[0])


class NewVersion:
    """The parts that a new version is made of: written, and in the end committed."""

    def __init__(
        self,
        table: Table,
        known: KnownRows,
        held: Sequence[Held],
        run_id: str,
        lock: Lock,
        tasks: Any = None,
    ) -> None:
        """Prepare.

        Args:
            table: Whose version.
            known: What the newest one knows.
            held: Its parts, and what of them stays.
            run_id: Whose version.
            lock: Held on the table.
            tasks: What starts them, with Ray's names (run/here.py); Ray, if none.
        """
        self._tasks: Any = tasks or ray
        self._table, self._known, self._held = table, known, held
        self._run_id, self._lock = run_id, lock
        card = table.card()
        assert card is not None
        self._vectors = tuple(card.outputs)
        self._configuration = card.to_configuration()
        # By the number of a part: the first of those that become one with it, and the path of the
        # one that has its rows.
        self._first_of = list(range(len(held)))
        self._path_of = [h.path for h in held]
        self._rewriting: list[tuple[list[int], Any]] = []
        self._made: dict[str, Part] = {}
        self.num_rewritten = 0
        self._key_files: list[str] = []
        self._started: list[Any] = []

    def rewrite(self, dead: Sequence[Any], part_bytes: int) -> None:
        """Begin to write the parts anew of which rows are gone, and those that are many and small.

        Args:
            dead: References to the rows that are gone, by bucket.
            part_bytes: How large a part may become.
        """
        number_of = {h.path: i for i, h in enumerate(self._held)}
        groups = [
            group
            for is_rejected in (False, True)
            for group in plan_rewriting(
                [h for h in self._held if h.path.startswith(REJECTED) == is_rejected], part_bytes
            )
        ]
        task = self._tasks.remote(max_retries=_MAX_RETRIES)(_rewrite)
        for i, group in enumerate(groups):
            stamp = {**self._configuration, RUN: self._run_id, WRITE: f"rewrite-{i}"}
            numbers = [number_of[h.path] for h in group]
            wanted = {n: h.path for n, h in zip(numbers, group, strict=True) if h.live < h.rows}
            given = (self._table.uri, group, self._vectors, stamp, wanted)
            ref = task.remote(*given, *(dead if wanted else ()))
            self._rewriting.append((numbers, ref))
            self._started.append(ref)
            for n in numbers:
                self._first_of[n] = numbers[0]

    def _finish_rewriting(self) -> None:
        for numbers, ref in self._rewriting:
            part: Part = self._tasks.get(ref)
            folder = REJECTED if self._held[numbers[0]].path.startswith(REJECTED) else ""
            self._made[folder + part.path] = part
            for n in numbers:
                self._path_of[n] = folder + part.path
                self.num_rewritten += self._held[n].path in self._known.parts
        self._rewriting = []

    @property
    def _current(self) -> list[str]:
        """The paths of the new version's parts."""
        live = (path for path, h in zip(self._path_of, self._held, strict=True) if h.live)
        return list(dict.fromkeys(live))

    @property
    def added(self) -> dict[str, Part]:
        """The parts that the newest version has not yet, by their paths."""
        every = {h.path: h.part for h in self._held} | self._made
        return {path: every[path] for path in self._current if path not in self._known.parts}

    def write_keys(self, live: Sequence[Any], shards: Sequence[str | None]) -> None:
        """Write the keys of the new version's rows, a file a bucket; and wait for its parts.

        A part is known by its number until its rows are written, so keys need not wait for them.

        Args:
            live: References to the rows that stay or come in, by bucket.
            shards: Keys of the source's shards; None where one has none.
        """
        pairs = list(zip(self._first_of, self._held, strict=True))
        number_of = {n: i for i, n in enumerate(dict.fromkeys(n for n, h in pairs if h.live))}
        part_of = np.array([number_of.get(n, -1) for n in self._first_of], dtype=np.int32)
        named = sorted({key for key in shards if key is not None})
        places = {key: i for i, key in enumerate(named)}
        shard_of = places_of_shards(dict(enumerate(shards)), places)
        remote = self._tasks.remote(max_retries=_MAX_RETRIES, num_returns=2)
        task: Any = remote(buckets.write_keys)
        shared = [self._tasks.put(part_of), self._tasks.put(shard_of)]
        told = (self._table.uri, self._run_id)
        refs = [task.remote(*told, i, len(live), rows, *shared) for i, rows in enumerate(live)]
        self._started += [file for file, _ in refs]
        self._finish_rewriting()
        files = self._tasks.get([file for file, _ in refs])
        counts = join_all(buckets.add_up_keys, [counts for _, counts in refs], self._tasks)
        version = (self._table.version() or 0) + 1
        index = self._table.key_files.write_index(
            self._run_id, self._current, named, counts, version, files
        )
        self._key_files = [index, *(file.path for file in files)]

    def commit(self) -> Commit:
        """Commit the rejected rows, then the others, each at once; nothing where nothing is new."""
        made: dict[str, Any] = {
            "rows_version": self._table.rows.version(),
            "rejected_version": self._table.rejected.version(),
        }
        current, added = set(self._current), self.added
        gone = {path: part for path, part in self._known.parts.items() if path not in current}
        # Rejections first: see `Commits`.
        for name, log, folder in (
            ("rejected", self._table.rejected, REJECTED),
            ("rows", self._table.rows, ""),
        ):
            new = [p for path, p in added.items() if path.startswith(REJECTED) == bool(folder)]
            old = [p for path, p in gone.items() if path.startswith(REJECTED) == bool(folder)]
            if new or old:
                self._lock.check()
                schema = REJECTED_SCHEMA if folder else log.schema()
                transaction = (self._run_id, 0)
                version = log.commit(new, schema, self._configuration, transaction, old)
                made |= {name: 0, f"{name}_version": version}
        return Commit(run=self._run_id, **made)

    def settle(self) -> None:
        """Wait for writes that nobody will commit, so that their parts can be removed after."""
        if self._started:
            self._tasks.wait(self._started, num_returns=len(self._started), timeout=SETTLE_S)

    def clean_up(self, commit: Commit, whole: Sequence[WholeShard]) -> None:
        """Put on record which shards are whole, and delete what these records stand for by now."""
        self._table.supersede_shards(commit, whole)
        self._table.drop_staged()
        self._table.key_files.keep_only(self._key_files)


def _rewrite(
    uri: str,
    group: Sequence[Held],
    vectors: tuple[str, ...],
    stamp: dict[str, str],
    wanted: Mapping[int, str],
    *dead: KeyRows,
) -> Part:
    return rewrite(uri, group, vectors, stamp, buckets.list_dead(wanted, *dead))
