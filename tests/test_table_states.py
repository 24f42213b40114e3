"""The table against a model of it: any order of writes, commits, crashes, resumes and refreshes."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_table import CONFIGURATION, DIM, IDENTITY, VECTORS, block

from fmembed.integrity import verify
from fmembed.rows import REJECTED_SCHEMA, RowIds, keys_of
from fmembed.table import ConflictError, Part, Table, Written, read, write_part

SOURCE = [f"id{i}" for i in range(30)]
BAD = {"id3", "id17"}  # rows that every run rejects


@dataclass
class Driver:
    """A run as the table sees it: what it has read, written, and how often it committed."""

    run_id: str
    table: Table
    known: RowIds
    written: list[tuple[list[str], Written]] = field(default_factory=list)
    num_commits: int = 0


class TableStates(RuleBasedStateMachine):
    """Two drivers that may crash at any point, and a dict that says what must be there."""

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.mkdtemp()
        self.uri = str(Path(self.folder) / "t")
        self.embedded: dict[str, int] = {}
        self.rejected: set[str] = set()
        self.versions: dict[int, set[str]] = {}
        self.num_runs = 0
        self.drivers = [self.open(), self.open()]

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def open(self) -> Driver:
        self.num_runs += 1
        table = Table.open_output(self.uri, IDENTITY)
        return Driver(f"run{self.num_runs}", table, table.row_ids())

    @rule(who=st.integers(0, 1), ids=st.sets(st.sampled_from(SOURCE), min_size=1, max_size=8))
    def write(self, who: int, ids: set[str]) -> None:
        """A write task gets rows that the driver's read has not skipped."""
        driver = self.drivers[who]
        todo = [i for i in sorted(ids) if not driver.known.contains(keys_of([i]))[0]]
        if not todo:
            return
        rows = block(todo, tuple(BAD & set(todo)), seed=self.num_runs)
        written = write_part(self.uri, [rows], VECTORS)
        driver.known.add(keys_of(todo))
        driver.written.append((todo, written))

    @rule(who=st.integers(0, 1), crash=st.sampled_from(["no", "before", "between", "after"]))
    def commit(self, who: int, crash: str) -> None:
        """Commit all that is written; a crash loses the driver, never the table's word."""
        driver = self.drivers[who]
        if crash == "before" or not driver.written:
            if crash != "no":
                self.drivers[who] = self.open()
            return
        parts = [w.part for _, w in driver.written if w.part]
        bad = [w.rejected for _, w in driver.written if w.rejected]
        ids = {i for todo, _ in driver.written for i in todo}
        transaction = (driver.run_id, driver.num_commits)
        try:
            if bad:
                driver.table.rejected.commit(bad, REJECTED_SCHEMA, CONFIGURATION, transaction)
                self.rejected |= ids & BAD
            if crash == "between":
                self.drivers[who] = self.open()
                return
            if parts:
                schema = driver.written[0][1].schema
                driver.table.rows.commit(parts, schema, CONFIGURATION, transaction)
                # The same commit again, as after an answer that was lost.
                version = driver.table.version()
                driver.table.rows.commit(parts, schema, CONFIGURATION, transaction)
                assert driver.table.version() == version
                for i in ids - BAD:
                    assert i not in self.embedded, f"{i} was let in twice"
                    self.embedded[i] = 1
        except ConflictError:
            # Only where the other driver has committed in between: it starts anew.
            assert self.num_runs > 1
            self.drivers[who] = self.open()
            return
        driver.written, driver.num_commits = [], driver.num_commits + 1
        if crash == "after":
            self.drivers[who] = self.open()

    @rule(who=st.integers(0, 1))
    def resume(self, who: int) -> None:
        """Run the same command again: strays go, ids are read anew, the other driver is a zombie.

        Only a driver that holds the lock removes strays, so the other one's uncommitted parts are
        fair game: its next commit has to fail.
        """
        self.drivers[who] = self.open()
        other = self.drivers[1 - who]
        self.drivers[who].table.remove_strays()
        assert self.drivers[who].table.strays() == []
        other.written = []

    @precondition(lambda self: self.embedded)
    @rule(who=st.integers(0, 1), data=st.data())
    def refresh(self, who: int, data: Any) -> None:
        """Replace a part by a changed one, in one transaction; the old version stays readable."""
        driver = self.drivers[who] = self.open()
        old = driver.table.rows.parts()
        chosen = data.draw(st.sampled_from(sorted(old, key=lambda p: p.path)))
        rows = driver.table.rows.read_columns(chosen.path, None)
        dropped = rows["row_id"].to_pylist()[0]
        part: list[Part] = []
        if rows.num_rows > 1:
            part = [driver.table.rows.write(rows.slice(1))]
        before = driver.table.version()
        assert before is not None
        self.versions[before] = set(self.embedded)
        schema = pa.schema(read(self.uri).schema)
        driver.table.rows.commit(part, schema, CONFIGURATION, (driver.run_id, 0), removed=[chosen])
        driver.num_commits = 1
        del self.embedded[dropped]
        self.drivers[who] = self.open()

    @rule(who=st.integers(0, 1))
    def forget(self, who: int) -> None:
        """`--retry-rejected`: the rejected rows count as never read."""
        driver = self.drivers[who] = self.open()
        driver.table.forget_rejected(driver.run_id)
        self.rejected = set()
        self.drivers[who] = self.open()

    @invariant()
    def the_table_is_as_the_model_says(self) -> None:
        if not hasattr(self, "uri"):
            return
        table = Table(self.uri)
        rejected = table.read_rejected()["row_id"].to_pylist()
        assert sorted(rejected) == sorted(self.rejected)
        found = [] if table.version() is None else read(self.uri)["row_id"].to_pylist()
        assert sorted(found) == sorted(self.embedded)
        assert len(table.row_ids()) == len(found) + len(rejected)

    @invariant()
    def verify_agrees(self) -> None:
        if not hasattr(self, "uri") or Table(self.uri).version() is None:
            return
        result = verify(self.uri)
        assert (result.rows, result.rows_rejected) == (len(self.embedded), len(self.rejected))
        assert result.dim in (0, DIM)
        kept = [p for p in result.problems if "stray" not in p and "no run" not in p]
        assert kept == []

    @invariant()
    def old_versions_are_readable(self) -> None:
        for version, ids in getattr(self, "versions", {}).items():
            assert set(read(self.uri, version)["row_id"].to_pylist()) == ids


TableStates.TestCase.settings = settings(
    max_examples=60,
    derandomize=True,
    database=None,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestTableStates = TableStates.TestCase
