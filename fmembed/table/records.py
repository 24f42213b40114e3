"""What runs have left on record beside a table, each tied to the commits that it speaks of.

    <table>/_shards/<run>.json                      shards of the source that are committed whole
    <table>/_runs/<version>-<version>-<run>.json    what a finished run counted

A record is no truth of its own: the log is. It counts only while the log holds the commits, and of
a shard all the parts, that it names: after a log was cut back, restored, or changed by another
tool, what is no longer in the table is read again. A record that cannot be read is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fmembed.result import RunResult
from fmembed.storage import Storage, tell

# The names of records; what else lies in their folders is somebody's.
RECORD = re.compile(r"_shards/[\w-]+\.json|_runs/\d{10}-\d{10}-[\w-]+\.json")


@dataclass(frozen=True)
class WholeShard:
    """A shard whose rows are all accounted for, and the parts that hold them; None where the files
    of keys say it row by row. Of a part of a file that is cut at bytes `end` is where its records
    end: the byte, and how many rows and lines of the file are before it.
    """

    key: str
    rows: int
    parts: frozenset[str] | None
    end: tuple[int, int, int] | None = None


_Record = TypeVar("_Record", bound=BaseModel)


class Commit(BaseModel):
    """The newest commits of a run to the two logs: number and version, None without one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    rows: int | None = None
    rejected: int | None = None
    rows_version: int = -1
    rejected_version: int = -1


class _Shard(BaseModel):
    key: str
    rows: int
    parts: list[int] | None
    end: tuple[int, int, int] | None = None


class _ShardRecord(BaseModel):
    commit: Commit
    parts: list[str] = []
    shards: list[_Shard] = []


class _RunRecord(BaseModel):
    commit: Commit
    result: Any


def put_shards(storage: Storage, commit: Commit, shards: Iterable[WholeShard]) -> None:
    """Record the shards whose rows a run has committed, up to a commit."""
    shards = list(shards)
    parts = sorted({part for shard in shards for part in shard.parts or ()})
    index = {part: i for i, part in enumerate(parts)}
    rows = [
        _Shard(
            key=s.key,
            rows=s.rows,
            parts=None if s.parts is None else sorted(index[p] for p in s.parts),
            end=s.end,
        )
        for s in shards
    ]
    record = _ShardRecord(commit=commit, parts=parts, shards=rows)
    storage.put(f"_shards/{commit.run}.json", record.model_dump_json().encode())


def drop_shards(storage: Storage, commit: Commit) -> None:
    """Delete what other runs have recorded of shards."""
    for path in storage.paths("_shards/"):
        if path != f"_shards/{commit.run}.json" and RECORD.fullmatch(path):
            storage.delete(path)


def read_shards(storage: Storage) -> list[tuple[Commit, list[WholeShard]]]:
    """All that runs have recorded of shards, by run."""
    found = []
    for path in storage.paths("_shards/"):
        record = _read(storage, path, _ShardRecord)
        if record is None:
            continue
        try:
            shards = [
                WholeShard(
                    s.key,
                    s.rows,
                    None if s.parts is None else frozenset(record.parts[i] for i in s.parts),
                    s.end,
                )
                for s in record.shards
            ]
        except IndexError:
            _pass_over(path, storage)
            continue
        found.append((record.commit, shards))
    return found


def put_run(storage: Storage, commit: Commit, result: RunResult) -> None:
    """Record what a run counted, named after the versions that it made."""
    record = _RunRecord(commit=commit, result=asdict(result))
    storage.put(run_path(commit), record.model_dump_json(indent=1).encode())


def run_path(commit: Commit) -> str:
    """Where the record of the run with this last commit is."""
    versions = (max(commit.rows_version, 0), max(commit.rejected_version, 0))
    return f"_runs/{versions[0]:010d}-{versions[1]:010d}-{commit.run}.json"


def read_runs(storage: Storage) -> Iterator[tuple[Commit, Any]]:
    """What runs have counted, those of the newest versions first; each is read when asked for.

    The counts are any JSON: `result.check_run` makes a RunResult of them.
    """
    for path in reversed(storage.paths("_runs/")):  # their names begin with the versions
        record = _read(storage, path, _RunRecord)
        if record is not None:
            yield record.commit, record.result


def read_all_runs(storage: Storage) -> Iterator[tuple[Commit, Any]]:
    """As `read_runs`, for who needs all: several at once."""
    paths = storage.paths("_runs/")
    for path, content in zip(paths, storage.get_all(paths), strict=True):
        record = None if content is None else _parse(storage, path, content, _RunRecord)
        if record is not None:
            yield record.commit, record.result


def _read(storage: Storage, path: str, model: type[_Record]) -> _Record | None:
    try:
        return _parse(storage, path, storage.get(path), model)
    except FileNotFoundError:
        return None


def _parse(storage: Storage, path: str, content: bytes, model: type[_Record]) -> _Record | None:
    try:
        return model.model_validate_json(content)
    except (ValidationError, RecursionError):
        _pass_over(path, storage)
        return None


def _pass_over(path: str, storage: Storage) -> None:
    tell(f"{path} in {storage.uri} is no record of a run, or a cut one; it is passed over")
