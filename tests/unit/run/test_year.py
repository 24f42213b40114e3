"""A table over many weeks, against a plain model of it and against one that is made anew."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

import inline
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from weeks import Killed, Year, killed_at

import fmembed
from fmembed.inputs import open_inputs
from fmembed.run.refresh import Refresh
from fmembed.sources.formats import ranges
from fmembed.table.lock import Lock
from fmembed.table.table import Table

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("part_bytes", [None, 500])
def test_weeks_of_changes_copies_kills_and_an_emptied_source(
    part_bytes: int | None, tmp_path: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of files that are read whole, and of such that are read in parts."""
    if part_bytes is not None:
        monkeypatch.setattr(ranges, "PART_BYTES", part_bytes)
    year = Year(tmp_path / "year", str(tmp_path / "table"), str(minilm), num_rows=150, seed=1)
    year.run(0)
    for week, what in enumerate(["refresh", "killed", "emptied", "embed", "killed", "refresh"], 1):
        year.change()
        year.write()
        year.run(week, what, kill_at=year.random.randrange(1, 20))
    year.check_as_from_scratch(str(tmp_path / "anew"))
    assert year.run(7).result.unchanged
    # What is kept is whole, and nothing else is.
    fmembed.vacuum(year.table, keep_days=0, keep_versions=3)
    whole = [v for v in fmembed.versions(year.table) if v.is_whole and v.parts]
    assert len(whole) == 3
    log = Table(year.table).rows
    parts = {p.path: p.size_bytes for v in whole for p in log.parts(v.version)}
    assert {p.name: p.stat().st_size for p in Path(year.table).glob("part-*")} == parts
    for version in whole:
        assert fmembed.read(year.table, version.version).num_rows == version.rows
    year.check(year.kept)


def test_wherever_a_refresh_is_killed_the_next_one_comes_to_the_same(
    tmp_path: Path, minilm: Path
) -> None:
    """At each of its writes; what the table holds meanwhile is the old version or the new one."""
    year = Year(tmp_path / "year", str(tmp_path / "table"), str(minilm), num_rows=20, seed=2)
    year.run(0)
    number, num_redone = 0, 0
    while True:
        number += 1
        before = dict(year.kept)
        year.change()
        year.write()
        wanted = year.wanted()
        needed = len({t for t, _ in wanted.values()} - {t for t, _ in before.values()})
        year.log.unlink(missing_ok=True)
        with killed_at(number, year.table) as count:
            try:
                inline.refresh(year.spec, year.stage, f"{number:012x}")
            except Killed:
                pass
            else:
                break
        held = Table(year.table)
        ids = {
            r
            for part in held.rows.parts()
            for r in held.read_part(part, None)["row_id"].to_pylist()
        }
        assert ids in (before.keys(), wanted.keys())
        inline.refresh(year.spec, year.stage, f"{number + 1000:012x}")
        year.kept = wanted
        year.check(wanted)
        num_redone += len(year.log.read_text().split()) - needed if year.log.exists() else 0
    assert count() < number
    assert number > 12
    # What was staged is never computed again: only kills before that cost anything.
    assert num_redone <= 3 * 2


class Refreshes(RuleBasedStateMachine):
    """Refreshes, embeds, kills in both, and two drivers at once, in any order."""

    model: Path

    @initialize(seed=st.integers(0, 2**16))
    def start(self, seed: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        table = str(self.folder / "table")
        self.year = Year(self.folder / "year", table, str(self.model), 12, seed=seed, num_files=3)
        self.num_runs = 0
        self.late: tuple[Refresh, Table] | None = None

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder, ignore_errors=True)

    def run_id(self) -> str:
        self.num_runs += 1
        return f"{self.num_runs:012x}"

    @rule()
    def change(self) -> None:
        self.year.change()
        self.year.write()

    @rule()
    def refresh(self) -> None:
        inline.refresh(self.year.spec, self.year.stage, self.run_id(), allow_removals=10**6)
        self.year.kept = self.year.wanted()
        self.year.check(self.year.kept)

    @rule(at=st.integers(1, 25))
    def killed_refresh(self, at: int) -> None:
        with killed_at(at, self.year.table):
            try:
                self.refresh()
            except Killed:
                self.see()

    @rule(at=st.integers(1, 12))
    def killed_embed(self, at: int) -> None:
        with killed_at(at, self.year.table), contextlib.suppress(Killed):
            inline.embed(self.year.spec, self.year.stage, self.run_id())
        self.see()

    @rule()
    def embed(self) -> None:
        inline.embed(self.year.spec, self.year.stage, self.run_id())
        self.see()

    @rule(keep=st.integers(1, 3), purge=st.booleans())
    def vacuum(self, keep: int, purge: bool) -> None:
        """What is kept is whole, and no part is there that only another version names."""
        if Table(self.year.table).card() is None:
            return
        fmembed.vacuum(
            self.year.table,
            keep_days=0,
            keep_versions=1 if purge else keep,
            purge=purge,
        )
        self.see()
        log, kept = Table(self.year.table).rows, 1 if purge else keep
        whole = [v for v in fmembed.versions(self.year.table) if v.is_whole]
        newest = sorted((v.version for v in whole), reverse=True)[:kept]
        named = {part.path for version in newest for part in log.parts(version)}
        # Besides, what a refresh has staged that was killed, and what an embed has not committed.
        table = Table(self.year.table)
        named |= set(table.known(with_staged=True).staged)
        named |= {path for log, path in table.strays() if log.uri == table.rows.uri}
        assert {path.name for path in Path(self.year.table).glob("part-*")} == named
        for version in newest:
            assert fmembed.read(self.year.table, version).num_rows >= 0

    @rule()
    def look(self) -> None:
        """A driver looks, and sleeps through its own heartbeat."""
        inputs = open_inputs(self.year.spec)
        if inputs.table.card() is None:
            return
        inputs.table.look_anew()  # as under the lock, which it loses
        line = Refresh(inputs, 10**6)
        with inline.inline_ray():
            line.find_work()
        self.late = (line, inputs.table)

    @rule()
    def wake(self) -> None:
        """It goes on: what it has seen of the table is what it commits on top of, or nothing is."""
        if self.late is None:
            return
        (line, table), self.late = self.late, None
        with inline.inline_ray(), Lock(table.storage, "1a7e00000000") as lock:
            line.settle(lock, "1a7e00000000")
        self.see()

    def see(self) -> None:
        """After what was broken off: rows of the source, or of what was there before."""
        table = Table(self.year.table)
        rows: dict[str, tuple[str, str]] = {}
        texts = {**self.year.kept, **self.year.wanted()}
        for part in table.rows.parts():
            for row in table.read_part(part, None).to_pylist():
                assert row["row_id"] not in rows
                rows[row["row_id"]] = (texts[row["row_id"]][0], row["topic"])
        self.year.kept = rows


Refreshes.TestCase.settings = settings(
    max_examples=5,
    derandomize=True,
    database=None,
    stateful_step_count=14,
    phases=[Phase.explicit, Phase.generate],
    report_multiple_bugs=False,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True, scope="module")
def with_model(minilm: Path) -> None:
    Refreshes.model = minilm


TestRefreshes = Refreshes.TestCase
