"""A store: tables side by side, and the one version of one of them that its readers get.

    <store>/_store.json                  that it is one
    <store>/tables/<name>-<fingerprint>/   a table for each dataset and fingerprint
    <store>/CURRENT/<generation>.json    what is promoted; the highest generation counts
    <store>/_gates/<table>-<version>.json  what the gate has said of a version

The pointer is switched by one conditional write: its next generation is created unless there is
one, which local disks and all clouds do atomically. The generations before it are its history.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import os
import re
import socket
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

from fmembed.errors import ConflictError, StorageError, TableError
from fmembed.redaction import redact
from fmembed.storage import Storage
from fmembed.table.deleted import STORE_MARK
from fmembed.table.table import Table

TABLES = "tables"
_GENERATION = re.compile(r"CURRENT/(\d{8,18})\.json")
# Of a table's name, what is no letter, number, dash or dot; and how much of a fingerprint is in it.
_ODD = re.compile(r"[^A-Za-z0-9.-]+")
SHORT = 12
# What a table may be called: no place outside of the store.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Generations that are kept: one listing on a cloud. An hourly refresh makes so many in six weeks.
_KEPT = 1000
_MAX_LOOKS = 5


@dataclass(frozen=True)
class Pointer:
    """What is promoted, and how it came to it.

    `table` is a folder of the store, `parts` a digest of the version's parts: a log that was made
    anew counts anew. `before` is the generation that a rollback goes to, 0 for none. `kind` is
    `promote`, `rollback` or `delete`, which takes readers to the version without the rows.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    generation: int
    table: str
    version: int
    fingerprint: str
    parts: str
    rows: int
    rows_rejected: int
    kind: str
    time: str
    by: str
    why: str
    before: int = 0
    gate: dict[str, Any] | None = None

    def leads_to(self, other: Pointer | None) -> bool:
        """Whether both lead to the same version."""
        return other is not None and self.is_of(other.table, other.version, other.parts)

    def is_of(self, table: str, version: int, parts: str) -> bool:
        """Whether it leads to this version, and not to one of the same number."""
        return (self.table, self.version, self.parts) == (table, version, parts)


_POINTER = TypeAdapter(Pointer)


class _Check(BaseModel):
    name: str
    passed: bool | None
    words: str
    figures: dict[str, float] = {}


class _Gate(BaseModel):
    """What `evaluate.gate.run_gate` gives, and of which parts it is."""

    passed: bool
    words: str
    parts: str = ""
    asked: str = ""
    over: dict[str, str | int] | None = None
    checks: list[_Check] = []
    seconds: float = 0.0


_GATE = TypeAdapter(_Gate)


@dataclass(frozen=True)
class Kept:
    """A table of a store: its newest version, and which of its versions the pointer needs.

    `gate` is what the gate has said of the newest version, None where it was not asked.
    """

    name: str
    version: int | None
    fingerprint: str
    model: str
    settings: str
    rows: int
    rows_rejected: int
    pinned: tuple[int, ...]
    gate: dict[str, Any] | None


class Store:
    """A store at a folder or URL."""

    def __init__(self, uri: str) -> None:
        self.storage = Storage(uri)
        self.uri = self.storage.uri

    @classmethod
    def find(cls, uri: str | Path) -> Store | None:
        """The store that lies here; None where none does."""
        if not isinstance(uri, str | Path):
            return None
        path = str(uri).removeprefix("file://")
        if "://" not in path and not os.path.isdir(Path(path).expanduser()):
            return None
        store = cls(path)
        return store if store.storage.size_bytes(STORE_MARK) is not None else None

    @classmethod
    def open(cls, uri: str | Path) -> Store:
        """Open a store that exists.

        Raises:
            TableError: There is none.
        """
        if (store := cls.find(uri)) is None:
            raise TableError(
                f"store: {uri} is no store; fmembed refresh --store makes one, with a table in it"
            )
        return store

    @classmethod
    def of(cls, table: Table) -> tuple[Store, str] | None:
        """The store that a table lies in, and its name there."""
        outer, _, name = table.uri.rpartition(f"/{TABLES}/")
        if not outer or "/" in name or (store := cls.find(outer)) is None:
            return None
        return store, name

    def check_usable(self) -> None:
        """Make sure that here is a store, or nothing yet.

        Raises:
            TableError: Something else lies here.
        """
        if self.storage.local is not None and self.storage.local.is_file():
            raise TableError(f"output.store: {self.uri} is a file; give a folder or a URL")
        if self.storage.size_bytes(STORE_MARK) is not None:
            return
        own = ("CURRENT/", f"{TABLES}/", "_gates/", "_lock/")
        if there := [p for p in self.storage.paths() if p not in own]:
            raise TableError(
                f"output.store: {self.uri} is not empty (there is {there[0][:80]}) and no store; "
                "give another folder"
            )

    def make(self) -> None:
        """Make it a store, if it is none yet."""
        self.storage.create(STORE_MARK, json.dumps({"store": 1}).encode())

    def name(self, dataset: str, fingerprint: str) -> str:
        """What the table of a dataset and a fingerprint is called: see `dataset_of`."""
        said = _ODD.sub("-", dataset).strip("-.")[:40] or "rows"
        if said != dataset:  # so are others made
            said += f"-{hashlib.blake2b(dataset.encode(), digest_size=3).hexdigest()}"
        return f"{said}-{fingerprint[:SHORT]}"

    def uri_of(self, name: str) -> str:
        """Where a table lies."""
        return f"{self.uri}/{TABLES}/{name}"

    def names(self) -> list[str]:
        """The tables."""
        prefix = f"{TABLES}/"
        found = self.storage.paths(prefix)
        return [path.removeprefix(prefix).rstrip("/") for path in found if path.endswith("/")]

    def tables(self) -> list[Kept]:
        """The tables, and what stands for each."""
        pinned, found = self.pinned(), []
        for name in self.names():
            table = Table(self.uri_of(name))
            if (card := table.card()) is None:
                continue
            told = card.spec.get("model")
            version = table.version()
            found.append(
                Kept(
                    name=name,
                    version=version,
                    fingerprint=card.fingerprint,
                    model=redact(str(told.get("id", "?")))[:200] if isinstance(told, dict) else "?",
                    settings=card.settings,
                    rows=sum(part.num_rows for part in table.rows.parts()),
                    rows_rejected=table.num_rejected(),
                    pinned=tuple(sorted({p.version for p in pinned if p.table == name})),
                    gate=None if version is None else self.gate_record(name, version),
                )
            )
        return found

    def current(self) -> Pointer | None:
        """What is promoted; None where nothing was."""
        for _ in range(_MAX_LOOKS):
            generations = self._generations()
            if not generations:
                return None
            try:
                return self._read(generations[-1])
            except FileNotFoundError:
                continue  # a thousand promotions have come between the two calls
        raise StorageError(
            f"store: storage lists a pointer in {self.uri} that it does not have; try again"
        )

    def history(self, limit: int) -> list[Pointer]:
        """What was promoted, the newest first; at most so many."""
        found = []
        for generation in self._generations()[::-1][:limit]:
            # One that is damaged, or was written by a later version, is passed over.
            with contextlib.suppress(FileNotFoundError, StorageError):
                found.append(self._read(generation))
        return found

    def pinned(self) -> list[Pointer]:
        """What no retention may take away: what is promoted, and what a rollback would go to."""
        current = self.current()
        if current is None:
            return []
        try:
            return [current, self._read(current.before)] if current.before else [current]
        except (FileNotFoundError, StorageError):
            return [current]

    def is_there(self, pointer: Pointer) -> bool:
        """Whether what a pointer leads to is what was promoted."""
        table = Table(self.uri_of(pointer.table))
        newest = table.version()
        if newest is None or not table.rows.oldest() <= pointer.version <= newest:
            return False
        return table.digest(pointer.version) == pointer.parts

    def check_same(self, pointer: Pointer, table: Table) -> None:
        """Make sure that a version is the one that was promoted, and not one of the same number.

        Raises:
            TableError: It is another one.
        """
        if table.digest(pointer.version) != pointer.parts:
            raise TableError(
                f"store: version {pointer.version} of {table.uri} is another one than was "
                "promoted, as after its log was made anew; promote it again"
            )

    def was_left(self, name: str, version: int, parts: str) -> bool:
        """Whether readers were switched away from a table, or from this version of it: by another
        table that took its place, or by a rollback. As far as the history goes.
        """
        history = self.history(_KEPT)
        if not history:
            return False
        current, *before = history
        if current.is_of(name, version, parts):
            return False
        if current.table == name:
            return any(p.is_of(name, version, parts) for p in before)
        return any(p.table == name for p in before)

    def promote(
        self,
        name: str,
        version: int,
        why: str,
        *,
        over: Pointer | None,
        gate: dict[str, Any] | None = None,
        kind: str = "promote",
    ) -> Pointer:
        """Switch the pointer to a version of a table.

        Args:
            name: The table.
            version: Which of its versions.
            why: For people.
            over: What is promoted now, as it was looked at before the decision.
            gate: What the gate has said.
            kind: See `Pointer`.

        Raises:
            TableError: No such table or version, or parts of it are gone.
            ConflictError: Something else was promoted meanwhile.
        """
        table = self._open(name)
        card = table.card()
        assert card is not None
        table.check_version(version)
        pointer = Pointer(
            generation=(over.generation if over else 0) + 1,
            table=name,
            version=version,
            fingerprint=card.fingerprint,
            parts=table.digest(version),
            rows=sum(part.num_rows for part in table.rows.parts(version)),
            rows_rejected=table.num_rejected(),
            kind=kind,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            by=_who(),
            why=why,
            before=0 if over is None else over.before if kind == "delete" else over.generation,
            gate=gate,
        )
        if not pointer.rows and kind != "delete":
            raise TableError(f"store: version {version} of {name} has no row; it is not promoted")
        self.check_usable_version(table, version)
        return self._switch(pointer, table, over)

    def rollback(self, why: str, to: int | None = None) -> Pointer:
        """Switch the pointer back.

        Args:
            why: For people.
            to: A generation; None for the one that what is promoted now came after.

        Raises:
            TableError: There is none, or what it led to is gone.
            ConflictError: Something else was promoted meanwhile.
        """
        current = self.current()
        if current is None:
            raise TableError(f"store: nothing was promoted yet in {self.uri}")
        if to is None and not current.before:
            raise TableError(f"store: nothing was promoted in {self.uri} before what is now")
        generation = current.before if to is None else to
        try:
            target = self._read(generation)
        except FileNotFoundError:
            raise TableError(
                f"store: {self.uri} has no generation {generation} on record; fmembed versions "
                "lists them"
            ) from None
        table = self._open(target.table)
        table.check_version(target.version)
        self.check_same(target, table)
        self.check_usable_version(table, target.version)
        switched = replace(
            target,
            generation=current.generation + 1,
            kind="rollback",
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            by=_who(),
            why=why,
            gate=None,
        )
        return self._switch(switched, table, current)

    def follow(self, name: str, old: int, new: int, why: str) -> Pointer | None:
        """Take readers from a version to the one without the rows that were deleted from it.

        Returns:
            None where something else is promoted.
        """
        current = self.current()
        if current is None or (current.table, current.version) != (name, old) or old == new:
            return None
        return self.promote(name, new, why, over=current, kind="delete")

    def put_gate(self, name: str, version: int, record: dict[str, Any]) -> None:
        """Record what the gate has said of a version."""
        content = json.dumps({**record, "parts": self._open(name).digest(version)}, indent=1)
        self.storage.put(_gate_path(name, version), content.encode())

    def gate_record(self, name: str, version: int) -> dict[str, Any] | None:
        """What the gate has said of a version; None where it was not asked."""
        try:
            record = json.loads(self.storage.get(_gate_path(name, version)))
            told = _GATE.validate_python(record).model_dump()
        except (FileNotFoundError, ValueError, RecursionError):
            return None
        # A log that was cut back comes to the same number again.
        return told if told.pop("parts") == self._open(name).digest(version) else None

    def _open(self, name: str) -> Table:
        if name not in self.names():
            have = ", ".join(self.names()) or "none"
            raise TableError(f"store: {self.uri} has no table {name[:80]!a}; it has {have}")
        return Table.open(self.uri_of(name))

    def check_usable_version(self, table: Table, version: int) -> None:
        """Make sure that a version is there, and has no row that was deleted since."""
        if version < table.deleted.since or table.deleted.is_pending:
            raise TableError(
                f"store: rows were deleted since version {version} of {table.uri} was made, which "
                "has them still; promote a newer one, after fmembed refresh if need be"
            )
        there = table.storage.sizes("")
        if any(part.path not in there for part in table.rows.parts(version)):
            raise TableError(
                f"store: parts of version {version} of {table.uri} are gone, as after a vacuum; it "
                "cannot be promoted"
            )

    def _switch(self, pointer: Pointer, table: Table, over: Pointer | None) -> Pointer:
        if not self.storage.create(_path(pointer.generation), _written(pointer)):
            raise ConflictError(
                f"store: something else was promoted in {self.uri} meanwhile; look at fmembed "
                "status, then do the same again"
            )
        generations = self._generations()
        if pointer.generation < generations[-1] - _KEPT // 2:
            # A slow one, whose number had been used and tidied away meanwhile.
            self.storage.delete(_path(pointer.generation))
            raise ConflictError(f"store: {self.uri} has moved on meanwhile; do the same again")
        for old in generations[:-_KEPT]:
            self.storage.delete(_path(old))
        try:  # once more: a vacuum or a delete may have looked before it was promoted
            self.check_usable_version(table, pointer.version)
        except TableError:
            if over is not None and self.is_there(over):
                back = replace(
                    over, generation=pointer.generation + 1, kind="rollback",
                    why="what was promoted over it was taken away meanwhile",
                )  # fmt: skip
                self.storage.create(_path(back.generation), _written(back))
            raise
        return pointer

    def _generations(self) -> list[int]:
        found = (_GENERATION.fullmatch(path) for path in self.storage.paths("CURRENT/"))
        return sorted(int(match[1]) for match in found if match)

    def _read(self, generation: int) -> Pointer:
        try:
            pointer = _POINTER.validate_json(self.storage.get(_path(generation)))
            if pointer.generation != generation or not _NAME.fullmatch(pointer.table):
                raise ValueError("of another place")
            return pointer
        except ValueError:  # pydantic's is one
            raise StorageError(
                f"store: {_path(generation)} in {self.uri} is not as it was written; delete it, "
                "and the one before it is promoted again"
            ) from None


def dataset_of(name: str) -> str:
    """What of a table's name is its dataset's."""
    return name.rpartition("-")[0]


def _gate_path(name: str, version: int) -> str:
    return f"_gates/{name}-{version:08d}.json"


def _written(pointer: Pointer) -> bytes:
    return json.dumps(asdict(pointer), indent=1).encode()


def _path(generation: int) -> str:
    return f"CURRENT/{generation:08d}.json"


def _who() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a user without a name, as in many containers
        user = "?"
    return f"{user}@{socket.gethostname()}"
