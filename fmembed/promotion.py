"""Which version the readers of a store get: a new one, where the gate lets it pass.

A refresh asks the gate by itself; a version that is there is promoted, or what was before it, by
hand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fmembed.errors import ConflictError, GateRefusedError, TableError
from fmembed.inputs import Inputs
from fmembed.result import RunResult
from fmembed.run.cluster import Cluster
from fmembed.spec import RunSpec
from fmembed.table.lock import holder
from fmembed.table.store import Kept, Pointer, Store, dataset_of
from fmembed.table.table import Table
from fmembed.telling import Teller

GateMode = Literal["enforce", "report", "off"]
_BY_HAND, _UNASKED = "by hand", "the gate was not asked"


def consider(
    inputs: Inputs, result: RunResult, mode: GateMode, cluster: Cluster | None, teller: Teller
) -> RunResult | None:
    """Ask the gate about the version that a refresh has left, unless it has been asked.

    Args:
        inputs: Of the run, whose table lies in a store.
        result: What the run has counted.
        mode: Where it is off the gate is not asked.
        cluster: Where it is asked; None to go by what is on record.
        teller: Says so.

    Returns:
        The result with what the gate has said; None where it has to be asked, and must not.
    """
    store, table = inputs.store, inputs.table
    assert store is not None
    result = replace(result, store=store.uri)
    name, version = _name(table), result.version
    if version is None or not result.table_rows:
        return result
    current, parts = store.current(), table.digest(version)
    if current is not None and current.is_of(name, version, parts):
        return replace(result, promotion="current", gate=current.gate or {})
    if store.was_left(name, version, parts):
        return replace(result, promotion="beside")
    if current is not None and dataset_of(current.table) != dataset_of(name):
        return replace(result, promotion="beside")
    if mode == "off":
        return replace(result, gate={"passed": True, "words": _UNASKED, "checks": []})
    record = _known(store, name, version, current)
    if record is None or record["asked"] != _question(inputs.spec):
        if cluster is None:
            return None
        record = _ask(store, table, version, current, inputs.spec, cluster, teller)
    return replace(result, gate=record)


def settle(inputs: Inputs, result: RunResult) -> RunResult:
    """Switch the pointer to what the gate has let pass, if something was to be decided.

    Raises:
        ConflictError: Something else was promoted meanwhile.
    """
    store = inputs.store
    if store is None or result.promotion or not result.gate or result.version is None:
        return result
    if not result.gate["passed"]:
        return replace(result, promotion="refused")
    current, name = store.current(), _name(inputs.table)
    parts = inputs.table.digest(result.version)
    if current is not None and current.is_of(name, result.version, parts):
        return replace(result, promotion="current")  # by somebody else meanwhile
    if _over(store, current) != result.gate.get("over", _over(store, current)):
        raise ConflictError(
            f"store: something else was promoted in {store.uri} while the gate was asked; the same "
            "command asks it again"
        )
    why = "the first" if current is None else "refreshed"
    if current is not None and current.table != name:
        why = "another model or dataset"
    store.promote(name, result.version, why, over=current, gate=_short(result.gate))
    return replace(result, promotion="promoted")


def promote(
    store: str | Path,
    table: str | None = None,
    version: int | None = None,
    *,
    why: str = _BY_HAND,
    force: bool = False,
    verbose: bool = False,
    quiet: bool = False,
) -> Pointer:
    """Make a version what the readers of a store get.

    The gate's word on it is taken from its record, or it is asked.

    Args:
        store: The store.
        table: One of its tables; None for the one whose newest version is not promoted.
        version: Of it; None for the newest.
        why: For people.
        force: Whatever the gate says.
        verbose: Show Ray's own output.
        quiet: Say nothing meanwhile.

    Raises:
        TableError: No such store, table or version, parts of it are gone, or it is promoted.
        GateRefusedError: The gate does not let it pass.
        ConflictError: Something else was promoted meanwhile.
    """
    found = Store.open(store)
    current = found.current()
    name = _choose(found, current) if table is None else table.rstrip("/").rpartition("/")[2]
    if name not in found.names():
        raise TableError(
            f"store: {found.uri} has no table {name[:80]!a}; it has "
            f"{', '.join(found.names()) or 'none'}"
        )
    opened = Table.open(found.uri_of(name))
    if version is None:
        version = opened.version() or 0
    opened.check_version(version)
    if current is not None and current.is_of(name, version, opened.digest(version)):
        raise TableError(f"store: version {version} of {name} is what is promoted in {found.uri}")
    found.check_usable_version(opened, version)
    record = _known(found, name, version, current)
    if record is None and not force:
        from fmembed.evaluate.stored_spec import stored_spec

        spec, _, _ = stored_spec(opened, {})
        with Cluster(verbose, Teller(quiet)) as cluster:
            record = _ask(found, opened, version, current, spec, cluster, Teller(quiet))
    if record is not None and not record["passed"] and not force:
        raise GateRefusedError(
            f"store: the gate refuses version {version} of {name}: {record['words']} (--force "
            "promotes it all the same)"
        )
    gate = {"passed": True, "words": _UNASKED} if record is None else _short(record)
    return found.promote(name, version, why, over=current, gate=gate)


def rollback(store: str | Path, to: int | None = None, *, why: str = _BY_HAND) -> Pointer:
    """Give the readers of a store what they had before.

    Args:
        store: The store.
        to: A generation, as `Store.history` has them; None for what was before.
        why: For people.

    Raises:
        TableError: No such store or generation, or what it led to is gone.
        ConflictError: Something else was promoted meanwhile.
    """
    return Store.open(store).rollback(why, to)


@dataclass(frozen=True)
class Status:
    """What a store holds: what is promoted, what would be after a rollback, and its tables.

    `writers` says by table which run is at work on it; `wrong` what is wrong with what is promoted.
    `before` is None where it cannot be gone back to.
    """

    store: str
    current: Pointer | None
    before: Pointer | None
    tables: tuple[Kept, ...]
    writers: dict[str, str]
    wrong: str = ""

    def lines(self) -> Iterator[str]:
        """The same for people, a line each."""
        yield f"store     {self.store}"
        if self.current is None:
            yield "promoted  nothing yet: fmembed promote makes a table what readers get"
        else:
            yield f"promoted  {describe(self.current)}"
        if self.wrong:
            yield f"wrong     {self.wrong}"
        if self.before is not None:
            yield f"before    {describe(self.before)}"
        for table in self.tables:
            version = "no version" if table.version is None else f"version {table.version}"
            yield (
                f"table     {table.name}: {version}, {table.rows:,} rows, "
                f"{table.rows_rejected:,} rejected, by {table.model} ({table.settings})"
                f"{self._stand(table)}"
            )
            if table.name in self.writers:
                yield f"writing   {table.name}: {self.writers[table.name]}"

    def _stand(self, table: Kept) -> str:
        if self.current is not None and (self.current.table, self.current.version) == (
            table.name, table.version,
        ):  # fmt: skip
            return ""
        if table.gate is not None and not table.gate["passed"]:
            return f"; refused: {table.gate['words']}"
        return "; not promoted"


def status(store: str | Path) -> Status:
    """What a store holds.

    Raises:
        TableError: There is none.
    """
    found = Store.open(store)
    pinned, tables = found.pinned(), tuple(found.tables())
    wrong = [fault_of(found, pointer) for pointer in pinned]
    writers = {table.name: holder(Table(found.uri_of(table.name)).storage) for table in tables}
    return Status(
        store=found.uri,
        current=pinned[0] if pinned else None,
        before=pinned[1] if len(pinned) > 1 and not wrong[1] else None,
        tables=tables,
        writers={name: who for name, who in writers.items() if who},
        wrong=wrong[0] if wrong else "",
    )


def fault_of(store: Store, pointer: Pointer) -> str:
    """Why readers should not get a version; empty where they may."""
    table = Table(store.uri_of(pointer.table))
    if not store.is_there(pointer):
        return f"version {pointer.version} of {pointer.table} is not there any more"
    try:
        store.check_usable_version(table, pointer.version)
    except TableError as e:
        return str(e).removeprefix("store: ")
    return ""


def describe(pointer: Pointer) -> str:
    """What is promoted, in words."""
    how = "" if pointer.kind == "promote" else f"{pointer.kind}, "
    gate = pointer.gate or {}
    if gate.get("words") == _UNASKED:
        how += f"{_UNASKED}, "
    elif gate.get("passed") is False:
        how += "past the gate, which refused it, "
    return (
        f"{pointer.table} version {pointer.version}, {pointer.rows:,} rows (generation "
        f"{pointer.generation}, {how}{pointer.time} by {pointer.by}: {pointer.why})"
    )


def _name(table: Table) -> str:
    return table.uri.rpartition("/")[2]


def _choose(store: Store, current: Pointer | None) -> str:
    """The one table whose newest version is not promoted.

    Raises:
        TableError: There is none, or there are several.
    """
    is_there = current is not None and store.is_there(current)
    promoted = (current.table, current.version) if current is not None and is_there else None
    tables = [t for t in store.tables() if t.version is not None and t.rows]
    able = [t.name for t in tables if (t.name, t.version) != promoted]
    if len(able) == 1:
        return able[0]
    if not able:
        raise TableError(f"store: {store.uri} has no version that is newer than what is promoted")
    raise TableError(f"store: which table of {store.uri}? It has {', '.join(able)}; name one")


def _known(store: Store, name: str, version: int, current: Pointer | None) -> dict[str, Any] | None:
    """What the gate has said, if it was asked with what is promoted now."""
    record = store.gate_record(name, version)
    return record if record is not None and record["over"] == _over(store, current) else None


def _over(store: Store, current: Pointer | None) -> dict[str, Any] | None:
    """What is compared with: nothing, where what was promoted is not there any more."""
    if current is None or not store.is_there(current):
        return None
    return {"table": current.table, "version": current.version}


def _question(spec: RunSpec) -> str:
    """A digest of what the gate goes by: with other limits or labels it is asked anew."""
    told = [spec.gate.model_dump(), spec.source.label, spec.source.split, spec.probes]
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()


def _ask(
    store: Store,
    table: Table,
    version: int,
    current: Pointer | None,
    spec: RunSpec,
    cluster: Cluster,
    teller: Teller,
) -> dict[str, Any]:
    from fmembed.evaluate.gate import run_gate

    cluster.connect()
    teller.say("asking the gate …")
    over = None
    if current is not None and _over(store, current) is not None:
        over = Table.open(store.uri_of(current.table)), current
    found: dict[str, Any] = run_gate(table, version, over, spec)
    record = {**found, "asked": _question(spec)}
    store.put_gate(_name(table), version, record)
    return record


def _short(gate: dict[str, Any]) -> dict[str, Any]:
    """What the pointer keeps of it: the whole record lies beside."""
    return {name: gate[name] for name in ("passed", "words") if name in gate}
