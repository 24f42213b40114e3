"""Which version the readers of a store get, week after week."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gated
import inline
import pytest
from weeks import StoreYear

import fmembed
from fmembed import cli, doctor, promotion, summary
from fmembed.errors import GateRefusedError, StorageError, TableError
from fmembed.evaluate import gate as gate_module
from fmembed.table.lock import Lock
from fmembed.table.repair import repair
from fmembed.table.store import Store
from fmembed.table.table import Table

NOISES = {"first": 1.1, "better": 0.8, "best": 0.5, "worse": 2.2}


@pytest.fixture
def year(tmp_path: Path, minilm: Path) -> StoreYear:
    return StoreYear(tmp_path / "year", str(tmp_path / "store"), str(minilm), 400, NOISES)


@pytest.mark.slow
def test_the_right_rows_are_promoted_every_week(year: StoreYear) -> None:
    """As `tools/year.py --store`, of nine weeks: upgrades, a worse model, a rollback, kills."""
    assert year.refresh("first").promotion == "promoted"
    year.change()
    assert year.refresh("first", kill_at=7).promotion == "promoted"
    year.change()
    result = year.refresh("worse")
    assert result.promotion == "refused"
    assert "knn" in result.gate["words"]
    assert year.refresh("worse").promotion == "refused"  # from the record
    assert year.refresh("first").promotion == "promoted"
    before = year.promoted
    year.change()
    assert year.refresh("better", kill_at=11).promotion == "promoted"
    # The one it took the place of is kept in step, and stays beside it.
    assert year.refresh("first").promotion == "beside"
    year.change()
    assert year.refresh("better").promotion == "promoted"
    last, year.promoted = year.promoted, None
    promotion.rollback(year.store)
    promotion.rollback(year.store)
    year.promoted = before
    year.check()
    # What readers were switched away from does not come back by itself.
    assert year.refresh("better").promotion == "beside"
    year.change()
    assert year.refresh("first").promotion == "promoted"
    with pytest.raises(TableError, match="which table of"):
        promotion.promote(year.store, why="after all", force=True)
    names = Store.open(year.store).tables()
    (better,) = (t.name for t in names if t.version and t.version > 1 and not t.pinned)
    assert promotion.promote(year.store, better, why="after all", force=True).table == better
    assert last is not None
    year.promoted = "better", last[1]
    year.check()
    year.change()
    assert year.refresh("best").promotion == "promoted"


def test_a_refresh_that_has_nothing_to_do_asks_nobody_again(year: StoreYear) -> None:
    year.refresh("first")
    assert year.refresh("first").promotion == "current"
    found = promotion.status(year.store)
    assert found.current is not None
    assert found.current.gate == {"passed": True, "words": found.tables[0].gate["words"]}  # type: ignore[index]
    assert len(Store.open(year.store).history(9)) == 1


def test_what_the_gate_was_told_to_let_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated.run_inline(monkeypatch)
    store = Store(str(tmp_path / "s"))
    store.make()
    gated.add_version(Path(store.uri_of("one")), gated.rows(noise=0.1))
    assert promotion.promote(store.uri, quiet=True).table == "one"
    with pytest.raises(TableError, match="has no version that is newer"):
        promotion.promote(store.uri, quiet=True)
    with pytest.raises(TableError, match="is what is promoted"):
        promotion.promote(store.uri, "one", quiet=True)
    gated.add_version(Path(store.uri_of("two")), gated.rows(noise=0.9), model="w2")
    with pytest.raises(GateRefusedError, match="the gate refuses version 1 of two: knn") as refused:
        promotion.promote(store.uri, "two", quiet=True)
    assert refused.value.exit_code == 3
    lines = promotion.status(store.uri).lines()
    assert [line for line in lines if "two" in line and "refused" in line]
    assert promotion.promote(store.uri, "two", why="I know", force=True).why == "I know"
    with pytest.raises(TableError, match="has no table 'three'; it has one, two"):
        promotion.promote(store.uri, "three")


def test_rows_that_are_deleted_are_gone_for_readers_at_once(year: StoreYear) -> None:
    year.refresh("first")
    year.change()
    year.refresh("first")
    key = next(iter(year.rows))
    pointer = Store.open(year.store).current()
    assert pointer is not None
    done = fmembed.delete(Store.open(year.store).uri_of(pointer.table), ids=[key])
    assert (done.rows, done.is_behind) == (1, False)
    assert key not in fmembed.read(year.store)["row_id"].to_pylist()
    with pytest.raises(TableError, match="rows were deleted since version 1"):
        promotion.rollback(year.store)
    with pytest.raises(TableError, match="rows were deleted since version 2"):
        promotion.promote(year.store, pointer.table, 2, force=True)


def test_rows_deleted_while_the_gate_is_asked_do_not_come_back(
    year: StoreYear, monkeypatch: pytest.MonkeyPatch
) -> None:
    year.refresh("first")
    year.change()
    key, store = next(iter(year.rows)), Store.open(year.store)
    known = gate_module.run_gate

    def run_gate(*given: Any) -> Any:
        found = known(*given)
        fmembed.delete(store.uri_of(store.names()[0]), ids=[key])
        return found

    monkeypatch.setattr(gate_module, "run_gate", run_gate)
    with pytest.raises(TableError, match="rows were deleted since"):
        year.refresh("first")
    monkeypatch.undo()
    # What was promoted has it as long as nothing else is; the next refresh takes it out.
    year.rows.pop(key)
    assert year.refresh("first").promotion == "promoted"
    assert key not in fmembed.read(year.store)["row_id"].to_pylist()


def test_all_rows_may_be_deleted_and_readers_get_none(year: StoreYear) -> None:
    year.refresh("first")
    store = Store.open(year.store)
    fmembed.delete(store.uri_of(store.names()[0]), where="true")
    assert fmembed.read(year.store).num_rows == 0


def test_a_purge_that_cannot_be_deletes_nothing(year: StoreYear) -> None:
    year.refresh("first")
    year.change()
    year.refresh("first")
    promotion.rollback(year.store)
    uri, key = (
        Store.open(year.store).uri_of(Store.open(year.store).names()[0]),
        next(iter(year.rows)),
    )
    with pytest.raises(TableError, match="nothing was deleted"):
        fmembed.delete(uri, ids=[key], purge=True)
    assert Table(uri).version() == 2


def test_other_limits_are_another_question(year: StoreYear) -> None:
    year.refresh("better")
    refused = year.refresh("worse")
    assert refused.promotion == "refused"
    lenient = {"gate": {"margin": 1.0, "max_copies_increase": 1.0}}
    assert year.refresh("worse", spec=lenient).promotion == "promoted"


def test_another_dataset_does_not_take_the_readers(year: StoreYear) -> None:
    year.refresh("first")
    other = {"source": {"uri": str(year.source), "id": "key", "label": "topic", "name": "other"}}
    assert year.refresh("first", spec=other).promotion == "beside"


def test_after_a_log_was_made_anew_a_refresh_promotes_again(year: StoreYear) -> None:
    for _ in range(3):
        year.change()
        year.refresh("first")
    store = Store.open(year.store)
    uri = store.uri_of(store.names()[0])
    shutil.rmtree(f"{uri}/_delta_log")
    repair(uri)
    with pytest.raises(TableError):
        fmembed.read(year.store)
    year.change()
    assert year.refresh("first").promotion == "promoted"


def test_a_pointer_that_somebody_has_written_leads_nowhere_else(year: StoreYear) -> None:
    year.refresh("first")
    path = Path(year.store) / "CURRENT/00000001.json"
    told = json.loads(path.read_text())
    for wrong in ({"table": "../../outside"}, {"generation": 7}, {"later": "field"}):
        path.write_text(json.dumps({**told, **wrong}))
        with pytest.raises(StorageError, match="is not as it was written"):
            fmembed.read(year.store)
    path.write_text(json.dumps(told))
    year.change()
    year.refresh("first")
    path.write_text("{}")  # an old one: what is promoted is not it
    assert fmembed.read(year.store).num_rows
    assert year.refresh("first").promotion == "current"
    assert fmembed.vacuum(Store.open(year.store).uri_of(told["table"])).newest == 2


def test_looking_at_a_store_that_is_not_there_makes_none(year: StoreYear) -> None:
    doctor.examine(year.spec("first"))
    assert not Path(year.store).exists()
    assert year.refresh("first").promotion == "promoted"


def test_what_was_deleted_from_one_table_comes_back_in_no_other(year: StoreYear) -> None:
    year.refresh("first")
    year.refresh("better")
    store = Store.open(year.store)
    (key, *_), (one, other) = list(year.rows), store.names()
    assert fmembed.delete(store.uri_of(one), ids=[key]).rows == 1
    assert key in fmembed.read(store.uri_of(other))["row_id"].to_pylist()
    del year.rows[key]  # of the plain model: the source has it still
    for name in ("better", "first", "best"):
        year.refresh(name)
    for name in store.names():
        assert key not in fmembed.read(store.uri_of(name))["row_id"].to_pylist()
    assert len(store.names()) == 3
    assert year.refresh("best").promotion == "current"
    # All lists are emptied at once.
    assert fmembed.undelete(store.uri_of(one)) == 1
    for name in store.names():
        assert not len(Table(store.uri_of(name)).deleted.read())


def test_rows_are_deleted_from_a_whole_store(
    year: StoreYear, capsys: pytest.CaptureFixture[str]
) -> None:
    year.refresh("first")
    year.refresh("better")
    assert cli.run(["delete", year.store, "--where", "topic = 'war'"]) == 0
    assert capsys.readouterr().out.count("deleted") >= 2
    for table in Store.open(year.store).tables():
        topics = fmembed.read(f"{year.store}/tables/{table.name}")["topic"].to_pylist()
        assert "war" not in topics
    assert "war" not in fmembed.read(year.store)["topic"].to_pylist()


def test_the_commands(year: StoreYear, capsys: pytest.CaptureFixture[str]) -> None:
    year.refresh("first")
    year.change()
    year.refresh("first")
    assert cli.run(["status", year.store]) == 0
    out = capsys.readouterr().out
    assert "promoted  corpus-" in out
    assert "before    corpus-" in out
    assert cli.run(["versions", year.store]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert cli.run(["rollback", year.store, "--why", "a test"]) == 0
    assert "a test" in capsys.readouterr().out
    assert cli.run(["rollback", year.store]) == 2
    assert cli.run(["promote", year.store, "--force", "--json"]) == 0
    assert '"kind": "promote"' in capsys.readouterr().out
    assert cli.run(["status", str(year.folder)]) == 2
    assert "is no store" in capsys.readouterr().err
    assert cli.run(["info", year.store]) == 0
    assert f"{len(year.rows):,} vectors" in capsys.readouterr().out


def test_while_another_run_writes_a_run_fails_waits_or_is_skipped(
    year: StoreYear, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    year.refresh("first")
    year.change()
    config = tmp_path / "c.yaml"
    spec = year.spec("first")
    config.write_text(
        f"source: {{uri: {spec.source.uri}, id: key, label: topic, name: corpus}}\n"
        f"model: {{id: {year.model}, dtype: float32, max_tokens: {spec.model.max_tokens}}}\n"
        f"output: {{store: {year.store}}}\n"
    )
    table = Table(Store.open(year.store).uri_of(Store.open(year.store).names()[0]))
    with Lock(table.storage, "other"):
        assert cli.run(["refresh", str(config)]) == 1
        assert "is being written by run other" in capsys.readouterr().err
        assert cli.run(["refresh", str(config), "--if-locked", "skip", "--json"]) == 0
        said = capsys.readouterr()
        assert "skipped: output.uri" in said.err
        assert '"skipped"' in said.out
        assert "starting Ray" not in said.err
        assert [line for line in promotion.status(year.store).lines() if line.startswith("writing")]
    assert not promotion.status(year.store).writers


def test_a_lock_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = Table(str(tmp_path)).storage
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with Lock(storage, "first"):
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    threading.Timer(0.3, done.set).start()
    with Lock(storage, "second", beat_s=0.1, waits=True):
        thread.join()
    assert "written by run first" in capsys.readouterr().err


def test_what_a_run_says_of_a_version_that_stays_beside(year: StoreYear) -> None:
    year.refresh("first")
    year.change()
    year.refresh("first")
    year.promoted = year.previous
    promotion.rollback(year.store)
    result = year.refresh("first")
    assert result.promotion == "beside"
    told = list(summary.lines(asdict(result)))
    assert any(line.endswith("it stays beside what is promoted; fmembed promote switches to it")
               for line in told)  # fmt: skip
    assert not any(line.startswith("gate") for line in told)


def test_rows_deleted_while_an_older_version_is_promoted_are_told_of_and_can_be_left(
    year: StoreYear,
) -> None:
    year.refresh("first")
    year.change()
    year.refresh("first")
    promotion.rollback(year.store)
    done = fmembed.delete(
        Store.open(year.store).uri_of(Store.open(year.store).names()[0]), where="topic = 'war'"
    )
    assert done.is_behind
    assert "rows were deleted since version 1" in promotion.status(year.store).wrong
    assert [f for f in doctor.examine(year.store) if f.name == "store" and f.state == "wrong"]
    # A fifth of the rows is gone, and that is no loss.
    with inline.inline_ray(), pytest.MonkeyPatch.context() as patch:
        gated.run_inline(patch)
        promotion.promote(year.store, quiet=True)
    assert "war" not in fmembed.read(year.store)["topic"].to_pylist()
    found = promotion.status(year.store)
    assert (found.wrong, found.before) == ("", None)


def test_what_somebody_else_has_promoted_meanwhile_is_current(
    year: StoreYear, monkeypatch: pytest.MonkeyPatch
) -> None:
    year.refresh("first")
    year.change()
    known = gate_module.run_gate

    def run_gate(*given: Any) -> Any:
        found = known(*given)
        promotion.promote(year.store, force=True, quiet=True)
        return found

    monkeypatch.setattr(gate_module, "run_gate", run_gate)
    assert year.refresh("first").promotion == "current"
    lines = promotion.status(year.store).lines()
    assert any("the gate was not asked" in line for line in lines)


def test_a_store_is_named_as_one(
    year: StoreYear, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    year.refresh("first")
    config = tmp_path / "c.yaml"
    config.write_text(
        f"source: {{uri: {year.source}, id: key, label: topic, name: corpus}}\n"
        f"model: {{id: {year.model}, dtype: float32, max_tokens: 42}}\n"
        f"output: {{uri: {year.store}}}\n"
    )
    assert cli.run(["plan", str(config)]) == 2
    assert "is a store of tables: give it as output.store, or --store" in capsys.readouterr().err
    for place in (["--store", year.store], ["--set", f"output.store={year.store}"]):
        assert cli.run(["plan", str(config), "--refresh", *place, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["nothing"]
    assert cli.run(["doctor", str(config), "--set", f"output.store={year.store}"]) == 0
    assert cli.run(["vacuum", year.store, "--purge"]) == 0
    assert "1 are whole" in capsys.readouterr().out
