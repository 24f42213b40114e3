"""The neighbour graph of a table: exact, sampled, kept, and never believed unseen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import fmembed
from fmembed.evaluate import graph
from fmembed.exchange.importing import import_vectors
from fmembed.probes import Graph, normalized
from fmembed.table.table import Table

NUM, DIM = 900, 16

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Table:
    """Of several parts, with a vector of length 0."""
    made = np.random.default_rng(0).normal(size=(NUM, DIM)).astype(np.float32)
    made[17] = 0
    np.savez(tmp_path / "a.npz", embeddings=made, listfiles=np.array([f"r{i}" for i in range(NUM)]))
    monkeypatch.setattr("fmembed.exchange.importing._PART_BYTES", 1)
    monkeypatch.setattr("fmembed.exchange.foreign._BATCH_BYTES", 250 * 4 * DIM)
    import_vectors(str(tmp_path / "a.npz"), str(tmp_path / "table"))
    return Table.open(tmp_path / "table")


def make(table: Table) -> Graph:
    card = table.card()
    assert card is not None
    found: Graph = ray.get(graph.start(table, table.version(), "embedding", card))
    return found


def check(found: Graph, table: Table, among: set[str]) -> None:
    """Hold each row's neighbours to all pairs."""
    rows = fmembed.Embeddings(table.uri)
    ids = rows.arrow(["row_id"])["row_id"].to_pylist()
    vectors = normalized(rows.numpy()).astype(float)
    place = {row_id: i for i, row_id in enumerate(ids)}
    used = np.array([i for i, row_id in enumerate(ids) if row_id in among and vectors[i].any()])
    for q in range(len(found.vectors)):
        i = place[found.row_ids[q]]
        np.testing.assert_array_equal(found.vectors[q], rows.numpy()[i])
        near = [found.row_ids[n] for n in found.neighbours.rows[q] if n >= 0]
        if not vectors[i].any():
            assert near == []
            continue
        distances = np.linalg.norm(vectors[used] - vectors[i], axis=1)
        order = [int(used[o]) for o in np.argsort(distances, kind="stable") if used[o] != i]
        assert len(near) == len(set(near)) == min(30, len(order))
        # Of what is as near but for rounding either may come first.
        of = np.linalg.norm(vectors[[place[name] for name in near]] - vectors[i], axis=1)
        first = np.linalg.norm(vectors[order[: len(near)]] - vectors[i], axis=1)
        np.testing.assert_allclose(of, first, atol=1e-6)
        np.testing.assert_allclose(found.neighbours.distances[q, : len(near)], of, atol=1e-6)


def test_all_rows_look_among_all(table: Table) -> None:
    assert len(table.rows.parts()) > 2
    found = make(table)
    assert len(found.vectors) == len(found.row_ids) == found.num_rows == NUM
    assert len(set(found.contents.tolist())) == NUM
    check(found, table, set(found.row_ids))


@pytest.mark.parametrize("num_among", [NUM, 300])
def test_of_a_larger_table_some_look_among_many(
    table: Table, num_among: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "_MAX_QUERIES", 40)
    monkeypatch.setattr(graph, "_MIN_QUERIES", 20)
    monkeypatch.setattr(graph, "_MAX_ROWS", num_among)
    found = make(table)
    assert (len(found.vectors), found.num_rows) == (40, NUM)
    rows = fmembed.read(table.uri, columns=["row_id", "content_hash"]).to_pylist()
    by_hash = sorted(rows, key=lambda r: r["content_hash"])
    below = int(2**32 * num_among / NUM) if num_among < NUM else 2**32
    among = {r["row_id"] for r in rows if int(r["content_hash"][:8], 16) < below}
    assert abs(len(among) - num_among) < 100
    assert {*found.row_ids[:40]} == {r["row_id"] for r in by_hash[:40]}
    assert {*found.row_ids} <= among
    check(found, table, among)


def test_it_is_kept_read_again_and_replaced_by_that_of_the_next_version(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(table)
    (kept,) = (path for path in table.storage.sizes("_probes/") if "-graph-" in path)
    monkeypatch.setattr(graph, "_search", None)  # nobody looks for them again
    again = make(table)
    for name in ("rows", "distances"):
        np.testing.assert_array_equal(
            getattr(again.neighbours, name), getattr(made.neighbours, name)
        )
    assert again.row_ids == made.row_ids
    monkeypatch.undo()
    fmembed.delete(table.uri, ids=["r3"])
    newer = make(Table.open(table.uri))
    assert "r3" not in newer.row_ids
    assert len(newer.vectors) == NUM - 1
    (now,) = (path for path in table.storage.sizes("_probes/") if "-graph-" in path)
    assert now != kept


def _text(where: Path) -> None:
    where.write_text("<script>")


def _far(where: Path) -> None:
    rows = pq.read_table(where)
    wrong = pa.array(np.full((NUM, 30), 10**6, dtype=np.int32).ravel())
    column = pa.FixedSizeListArray.from_arrays(wrong, 30)
    pq.write_table(rows.set_column(2, "neighbours", column), where)


def _others(where: Path) -> None:
    rows = pq.read_table(where)
    ids = pa.array([f"other {i}" for i in range(rows.num_rows)])
    pq.write_table(rows.set_column(0, "row_id", ids), where)


def _short(where: Path) -> None:
    pq.write_table(pq.read_table(where).slice(5), where)


def _column(where: Path, name: str, change: Any) -> None:
    rows = pq.read_table(where)
    place = rows.schema.get_field_index(name)
    made = change(
        rows[name].combine_chunks().flatten().to_numpy().reshape(rows.num_rows, 30).copy()
    )
    column = pa.FixedSizeListArray.from_arrays(made.ravel(), made.shape[1])
    pq.write_table(rows.set_column(place, name, column), where)


def _lists_of_one(where: Path) -> None:
    _column(where, "neighbours", lambda near: near[:, :1])
    rows = pq.read_table(where)
    assert rows.schema.field("neighbours").type.list_size == 1


def _all_the_same(where: Path) -> None:
    _column(where, "neighbours", lambda near: np.zeros_like(near))


def _copies(where: Path) -> None:
    _column(where, "distances", np.zeros_like)


def _none_is_near(where: Path) -> None:
    _column(where, "neighbours", lambda near: np.full_like(near, -1))
    _column(where, "distances", lambda far: np.full_like(far, np.inf))


def _farther(where: Path) -> None:
    """As if the nearest were not there."""
    _column(where, "neighbours", lambda near: np.where(near >= 0, np.roll(near, 1, axis=0), near))


def _no_id(where: Path) -> None:
    rows = pq.read_table(where)
    more = rows.slice(0, 1).set_column(0, "row_id", pa.array([None], pa.string()))
    pq.write_table(pa.concat_tables([rows, more]), where)


@pytest.mark.parametrize(
    "forge",
    [
        _text, _far, _others, _short, _lists_of_one, _all_the_same, _copies, _none_is_near,
        _farther, _no_id,
    ],
)  # fmt: skip
def test_a_forged_one_is_made_anew(forge: Any, table: Table) -> None:
    made = make(table)
    (kept,) = (path for path in table.storage.sizes("_probes/") if "-graph-" in path)
    forge(Path(table.uri) / kept)
    again = make(table)
    np.testing.assert_array_equal(again.neighbours.rows, made.neighbours.rows)
    assert again.row_ids == made.row_ids


def test_an_empty_table_has_none(table: Table) -> None:
    fmembed.delete(table.uri, where="true")
    empty = Table.open(table.uri)
    card = empty.card()
    assert card is not None
    assert ray.get(graph.start(empty, empty.version(), "embedding", card)) == "there is no row"
