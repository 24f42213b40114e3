"""The table against a model of it: any order of writes, commits, crashes, damages and mendings.

What must hold whatever happens: no file of others changes; no row that was said to be committed is
lost unless somebody has taken it away; what is not in the table is read again; no id is there
twice; one fingerprint a table.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from disk import Disk
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tables import CARD, CONFIGURATION, DIM, IDENTITY, SCHEMA, block, write, write_with_keys

from fmembed.errors import ConflictError, DamagedError, FmembedError, TableError
from fmembed.rows.columns import REJECTED_SCHEMA
from fmembed.rows.ids import RowIds, keys_of
from fmembed.table.files import Part
from fmembed.table.key_rows import KeyRows
from fmembed.table.output import check_usable
from fmembed.table.parts import Written
from fmembed.table.reading import read
from fmembed.table.records import Commit, WholeShard
from fmembed.table.repair import repair
from fmembed.table.table import Table
from fmembed.table.verify import verify

pytestmark = pytest.mark.slow

SOURCE = [f"id{i}" for i in range(30)]
BAD = {"id3", "id17"}  # rows that every run rejects
SHARDS = {f"shard{n}": SOURCE[n::15] for n in range(15)}
OTHER = IDENTITY | {"model.dtype": "bfloat16"}
# What lies in the folder of a table and is not its own.
FOREIGN = ("notes.txt", "part-00000-ab-c000.snappy.parquet", "part-notes.txt", "_SUCCESS")


@dataclass
class Driver:
    """A run as the table sees it: what it has read, written, and how often it committed."""

    run_id: str
    table: Table
    known: RowIds
    last: Commit
    written: list[tuple[list[str], Written, KeyRows]] = field(default_factory=list)
    num_commits: int = 0


class TableStates(RuleBasedStateMachine):
    """Two drivers that may crash at any point, and sets that say what must be there."""

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.uri = str(self.folder / "t")
        self.stack = contextlib.ExitStack()
        self.disk = self.stack.enter_context(Disk(self.folder).watched())
        self.embedded: set[str] = set()
        self.rejected: set[str] = set()
        self.versions: dict[int, set[str]] = {}
        self.recorded: set[str] = set()  # parts of commits that are on record
        self.num_runs = 0
        # A run with another model that looked while there was nothing.
        self.early = Table(self.uri)
        self.early.known()
        self.drivers = [self.open(), self.open()]
        for name in FOREIGN:
            (Path(self.uri) / name).write_text("somebody's")
        self.foreign = self.look_at_foreign()
        self.disk.settle()
        self.is_damaged = False
        self.is_replaced = False  # whether older versions hold the same rows in other parts

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.stack.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def look_at_foreign(self) -> dict[str, bytes]:
        return {name: (Path(self.uri) / name).read_bytes() for name in FOREIGN}

    def open(self) -> Driver:
        """Start a run: look, take the lock, look again, claim."""
        self.num_runs += 1
        run_id = f"run{self.num_runs}"
        table = Table.open_output(self.uri, IDENTITY)
        known = table.known().load()
        check_usable(table, IDENTITY)
        table.claim(CARD, SCHEMA, run_id)
        return Driver(run_id, table, known, Commit(run=run_id))

    def reopen(self, who: int) -> Driver:
        """Run the same command again; where the table is damaged, mend it first."""
        try:
            self.drivers[who] = self.open()
        except FmembedError:
            assert self.is_damaged
            self.mend()
            self.drivers[who] = self.open()
        return self.drivers[who]

    def mend(self) -> None:
        """Mend the table; rows whose parts can be read are not read again."""
        whole = self.readable()
        repair(self.uri)
        if not self.is_replaced:
            assert whole <= set(read(self.uri)["row_id"].to_pylist())
        self.is_damaged = False
        self.sync_model()
        self.versions = {}
        self.drivers = [self.open(), self.open()]

    def ids_in(self, part: str) -> list[str]:
        """Ids of a part's rows: its name differs with each run of the same steps, these do not.

        None of one that was cut before it was committed, and lies there still.
        """
        try:
            rows = pq.read_table(Path(self.uri, part), columns=["row_id"])
        except pa.ArrowInvalid:
            return []
        return list(rows["row_id"].to_pylist())

    def readable(self) -> set[str]:
        """Committed rows whose parts are as they were written."""
        log, found = Table(self.uri).rows, set()
        for path in Path(self.uri).glob("part-*.parquet"):
            with contextlib.suppress(DamagedError):
                part = Part(path.name, path.stat().st_size, log.files.num_rows(path.name))
                found |= set(log.files.read_whole(part, ["row_id"])["row_id"].to_pylist())
        return found & self.embedded

    def sync_model(self) -> None:
        """After a damage the model learns what is left; the rest has to be read again."""
        table = Table(self.uri)
        self.embedded = set(read(self.uri)["row_id"].to_pylist())
        self.rejected = set(table.read_rejected()["row_id"].to_pylist())

    # --- runs -------------------------------------------------------------------------------------

    @rule(who=st.integers(0, 1), ids=st.sets(st.sampled_from(SOURCE), min_size=1, max_size=8))
    def write(self, who: int, ids: set[str]) -> None:
        """A write task gets rows that the driver's read has not skipped."""
        driver = self.drivers[who]
        todo = [i for i in sorted(ids) if not driver.known.contains(keys_of([i]))[0]]
        if not todo:
            return
        rows = block(todo, tuple(BAD & set(todo)), seed=self.num_runs)
        twin, (written, keys) = write(self.uri, rows), write_with_keys(self.uri, rows)
        # The same rows of two identical files: two parts, so that one of them can be left out.
        assert not {twin.part, twin.rejected} & {written.part, written.rejected} - {None}
        driver.known.add(keys_of(todo))
        driver.written.append((todo, written, keys))

    @rule(
        who=st.integers(0, 1),
        crash=st.sampled_from(["no", "before", "between", "after"]),
        has_keys=st.booleans(),
    )
    def commit(self, who: int, crash: str, has_keys: bool) -> None:
        """Commit all that is written; a crash loses the driver, never the table's word.

        Without files of keys, as earlier versions have: the parts are read instead.
        """
        driver = self.drivers[who]
        if crash == "before" or not driver.written:
            if crash != "no":
                self.reopen(who)
            return
        parts = [w.part for _, w, _ in driver.written if w.part]
        bad = [w.rejected for _, w, _ in driver.written if w.rejected]
        ids = {i for todo, _, _ in driver.written for i in todo}
        number = driver.num_commits
        transaction = (driver.run_id, number)
        made: dict[str, int] = {}
        if has_keys:
            keys = [(k, w.held_by) for _, w, k in driver.written]
            driver.table.key_files.write(f"{driver.run_id}-{number}", keys, {})
        try:
            if bad:
                version = driver.table.rejected.commit(
                    bad, REJECTED_SCHEMA, CONFIGURATION, transaction
                )
                made |= {"rejected": number, "rejected_version": version}
                self.rejected |= ids & BAD
            if crash == "between":
                self.reopen(who)
                return
            if parts:
                schema = driver.written[0][1].schema
                version = driver.table.rows.commit(parts, schema, CONFIGURATION, transaction)
                made |= {"rows": number, "rows_version": version}
                # The same commit again, as after an answer that was lost.
                driver.table.rows.commit(parts, schema, CONFIGURATION, transaction)
                assert driver.table.version() == version
                for i in ids - BAD:
                    assert i not in self.embedded, f"{i} was let in twice"
                    self.embedded.add(i)
        except (ConflictError, DamagedError, TableError):
            # Only where the other driver has committed in between, or the table was damaged.
            assert self.num_runs > 1
            self.reopen(who)
            return
        driver.last = driver.last.model_copy(update=made)
        driver.written, driver.num_commits = [], driver.num_commits + 1
        self.record(driver)
        if crash == "after":
            self.reopen(who)

    def record(self, driver: Driver) -> None:
        """Put on record the shards of which all rows are in the table."""
        have = self.embedded | self.rejected
        parts = {p.path for p in driver.table.rows.parts()}
        parts |= {f"_rejected/{p.path}" for p in driver.table.rejected.parts()}
        whole = [
            WholeShard(key, len(ids), frozenset(parts))
            for key, ids in SHARDS.items()
            if set(ids) <= have
        ]
        driver.table.put_shards(driver.last, whole)
        self.recorded |= parts

    @rule(who=st.integers(0, 1))
    def resume(self, who: int) -> None:
        """Run the same command again: strays go, ids are read anew, the other driver is a zombie.

        Only a driver that holds the lock removes strays, so the other one's uncommitted parts are
        fair game: its next commit has to fail.
        """
        table = self.reopen(who).table
        is_cut = bool(table.lost_runs())
        strays = table.strays()
        assert table.remove_strays() == (0 if is_cut else len(strays))
        assert table.strays() == (strays if is_cut else [])
        self.drivers[1 - who].written = []

    @precondition(lambda self: self.embedded and not self.is_damaged)
    @rule(who=st.integers(0, 1), data=st.data())
    def refresh(self, who: int, data: Any) -> None:
        """Replace a part by a changed one, in one transaction; the old version stays readable."""
        self.is_replaced = True
        driver = self.reopen(who)
        old = sorted(driver.table.rows.parts(), key=lambda p: self.ids_in(p.path))
        chosen = data.draw(st.sampled_from(old))
        rows = driver.table.read_part(chosen, None)
        dropped = rows["row_id"].to_pylist()[0]
        part: list[Part] = []
        if rows.num_rows > 1:
            part = [driver.table.rows.files.write(rows.slice(1), ("embedding",), CONFIGURATION)]
        before = driver.table.version()
        assert before is not None
        self.versions[before] = set(self.embedded)
        schema = pa.schema(read(self.uri).schema)
        driver.table.rows.commit(part, schema, CONFIGURATION, (driver.run_id, 0), removed=[chosen])
        self.embedded.remove(dropped)
        self.reopen(who)

    @precondition(lambda self: not self.is_damaged)
    @rule(who=st.integers(0, 1))
    def forget(self, who: int) -> None:
        """`--retry-rejected`: the rejected rows count as never read."""
        driver = self.reopen(who)
        driver.table.forget_rejected(driver.run_id)
        self.rejected = set()
        self.reopen(who)

    @rule()
    def another_model(self) -> None:
        """A run with another model, which has looked before anything was there, gets nothing in."""
        if self.is_damaged:
            return
        if self.embedded or self.rejected:
            for look in (
                lambda i: check_usable(self.early, i),
                lambda i: Table.open_output(self.uri, i),
            ):
                try:
                    look(OTHER)
                except TableError:
                    continue
                raise AssertionError("another model's run may write here")
        written = write(self.uri, block(["id0"], seed=99))
        assert written.part is not None
        try:
            self.early.rows.commit([written.part], written.schema, {}, ("early", 0))
        except ConflictError:
            return
        raise AssertionError("another model's rows are in the table")

    # --- damages ----------------------------------------------------------------------------------

    @rule()
    def machine_crash(self) -> None:
        """Power is cut: what was said to be committed is there; both drivers are gone."""
        if self.is_damaged:
            self.mend()
        self.disk.crash()
        self.drivers = [self.open(), self.open()]

    @rule(
        what=st.sampled_from(["gone", "cut", "empty"]),
        log=st.sampled_from(["", "_rejected/"]),
    )
    def damage_entry(self, what: str, log: str) -> None:
        """The newest entry of a log is lost, cut, or empty."""
        entries = sorted(Path(self.uri, log, "_delta_log").glob("*.json"))
        # The first one made the log; without it there is none, which is another damage.
        self.damage(entries[-1] if len(entries) > 1 else None, what)

    @rule(what=st.sampled_from(["gone", "cut", "empty"]), data=st.data())
    def damage_part(self, what: str, data: Any) -> None:
        if self.is_damaged:
            return
        table = Table(self.uri)
        used = {p.path for log in (table.rows, table.rejected) for p in log.parts()}
        names = [p.name for p in Path(self.uri).glob(f"part-{'?' * 32}.parquet")]
        names += [f"_rejected/{p.name}" for p in Path(self.uri).glob("_rejected/part-*.parquet")]
        names.sort(key=lambda n: (n.startswith("_"), self.ids_in(n), n.split("/")[-1] in used))
        if names:
            self.damage(Path(self.uri, data.draw(st.sampled_from(names))), what)

    @rule(what=st.sampled_from(["gone", "cut", "empty", "forged"]), data=st.data())
    def damage_record(self, what: str, data: Any) -> None:
        """A record is no truth: without it, or with a cut one, nothing is wrong."""
        paths = sorted(Path(self.uri).glob("_shards/*.json"))
        if paths:
            path = data.draw(st.sampled_from(paths))
            _spoil(path, what)
            self.disk.settle()
            self.check_what_counts_as_done(Table(self.uri), RowIds())

    @rule(what=st.sampled_from(["gone", "cut", "empty", "forged"]), data=st.data())
    def damage_keys(self, what: str, data: Any) -> None:
        """Nor are the files of keys: without one, or with a cut one, its parts are read."""
        paths = sorted(Path(self.uri).glob("_keys/*.parquet"))
        if paths:
            _spoil(data.draw(st.sampled_from(paths)), what)
            self.disk.settle()

    @rule(folder=st.sampled_from(["_delta_log", "_rejected", "_rejected/_delta_log"]))
    def damage_folder(self, folder: str) -> None:
        if self.is_damaged or (folder == "_delta_log" and not self.embedded):
            return
        self.is_damaged = True
        shutil.rmtree(Path(self.uri, folder))
        self.disk.settle()
        self.look_at_damage()

    def damage(self, path: Path | None, what: str) -> None:
        if self.is_damaged or path is None:
            return
        self.is_damaged = True
        _spoil(path, what)
        self.disk.settle()
        self.look_at_damage()

    @precondition(lambda self: not self.is_damaged)
    @rule(data=st.data())
    def restore(self, data: Any) -> None:
        """Another tool takes the rows back to an older version."""
        self.is_replaced = True
        delta, log = DeltaTable(self.uri), Table(self.uri).rows
        # Not to one of which a part was damaged: that tool fails by itself.
        versions = [
            version
            for version in range(1, delta.version() + 1)
            if all(Path(self.uri, part.path).exists() for part in log.parts(version))
        ]
        if delta.version() > 1 and versions:
            delta.restore(data.draw(st.sampled_from(versions)))
            self.disk.settle()
            self.sync_model()

    @precondition(lambda self: self.embedded and not self.is_damaged)
    @rule(data=st.data())
    def delete(self, data: Any) -> None:
        """Another tool deletes a row, and writes its part anew."""
        self.is_replaced = True
        row = data.draw(st.sampled_from(sorted(self.embedded)))
        DeltaTable(self.uri).delete(f"row_id = '{row}'")
        self.disk.settle()
        self.embedded.remove(row)

    def look_at_damage(self) -> None:
        """A run on a damaged table ends with a line, or reads again what is not in the table."""
        before = {path for path in self.recorded if Path(self.uri, path).exists()}
        with contextlib.suppress(FmembedError):
            table = Table.open_output(self.uri, IDENTITY)
            known = table.known().load()
            check_usable(table, IDENTITY)
            table.remove_strays()
            self.check_what_counts_as_done(table, known)
        assert before == {path for path in self.recorded if Path(self.uri, path).exists()}

    # --- what holds -------------------------------------------------------------------------------

    def check_what_counts_as_done(self, table: Table, known: RowIds) -> None:
        """Only what is in the table."""
        with contextlib.suppress(DamagedError):
            rows = set(read(self.uri)["row_id"].to_pylist())
            rejected = set(table.read_rejected()["row_id"].to_pylist())
            done = {i for i in SOURCE if known.contains(keys_of([i]))[0]}
            for key in table.whole_shards(table.known()):
                done |= set(SHARDS[key])
            assert done <= rows | rejected

    @invariant()
    def the_table_is_as_the_model_says(self) -> None:
        if not hasattr(self, "uri"):
            return
        assert self.look_at_foreign() == self.foreign
        if self.is_damaged:
            return
        table = Table(self.uri)
        rejected = table.read_rejected()["row_id"].to_pylist()
        assert sorted(rejected) == sorted(self.rejected)
        found = read(self.uri)["row_id"].to_pylist() if table.rows.parts() else []
        assert sorted(found) == sorted(self.embedded)
        known = table.known().load()
        assert len(known) == len(found) + len(rejected)
        self.check_what_counts_as_done(table, known)
        card = table.card()
        assert card is not None
        assert card.fingerprint == CARD.fingerprint

    @invariant()
    def verify_agrees(self) -> None:
        if not hasattr(self, "uri") or self.is_damaged:
            return
        result = verify(self.uri)
        assert (result.rows, result.rows_rejected) == (len(self.embedded), len(self.rejected))
        assert result.dim in (0, DIM)
        passing = ("stray", "no run has", "table_r", "no longer holds")
        assert [p for p in result.problems if not any(word in p for word in passing)] == []

    @invariant()
    def old_versions_are_readable(self) -> None:
        if not getattr(self, "is_damaged", True):
            for version, ids in self.versions.items():
                assert set(read(self.uri, version)["row_id"].to_pylist()) == ids


def _spoil(path: Path, what: str) -> None:
    content = path.read_bytes()
    spoiled: dict[str, Callable[[], object]] = {
        "gone": path.unlink,
        "cut": lambda: path.write_bytes(content[: len(content) * 2 // 3]),
        "empty": lambda: path.write_bytes(b""),
        "forged": lambda: path.write_text('{"commit": {"run": 5}, "shards": [[[]]]}'),
    }
    spoiled[what]()


TableStates.TestCase.settings = settings(
    max_examples=60,
    derandomize=True,
    database=None,
    stateful_step_count=25,
    # Not shrunk: minutes of it, where a second run of the steps above the failure tells as much.
    phases=[Phase.explicit, Phase.generate],
    report_multiple_bugs=False,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestTableStates = TableStates.TestCase
