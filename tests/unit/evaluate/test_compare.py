"""Tables compared: on the rows that all have, and with a note of the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run_cli

import fmembed
from fmembed.errors import SpecError, TableError
from fmembed.exchange.importing import import_vectors

NUM = 600
LABELS = np.arange(NUM) % 3
IDS = np.array([f"r{i}" for i in range(NUM)])

pytestmark = pytest.mark.usefixtures("local_ray")


def save(folder: Path, name: str, noise: float, rows: Any = slice(None), **more: Any) -> str:
    rng = np.random.default_rng(len(name))
    made = np.eye(16, dtype=np.float32)[LABELS] + noise * rng.normal(size=(NUM, 16))
    columns = {"topic": np.array([f"t{v}" for v in LABELS])[rows], **more}
    np.savez(
        folder / f"{name}.npz", embeddings=made.astype(np.float32)[rows], listfiles=IDS[rows],
        **columns,
    )  # fmt: skip
    import_vectors(str(folder / f"{name}.npz"), str(folder / name), label="topic")
    return str(folder / name)


def test_better_worse_and_a_tie(tmp_path: Path) -> None:
    good = save(tmp_path, "good", 0.3)
    alike = save(tmp_path, "alike1", 0.3, slice(50, None))
    bad = save(tmp_path, "bad", 1.0)
    found = fmembed.compare([good, alike, bad])
    assert (found.label, found.rows, found.classes) == ("topic", NUM - 50, 3)
    assert found.notes == ["50 of 600 rows are not in all tables, and were left out"]
    for name in ("knn", "linear"):
        pairs = {(p.one, p.two): p for p in found.pairs[name]}
        assert pairs[good, alike].is_tie
        for other in (good, alike):
            assert not pairs[other, bad].is_tie
            assert pairs[other, bad].high < 0
        ranks = {r.table: (r.best_rank, r.worst_rank) for r in found.ranked[name]}
        assert ranks == {good: (1, 2), alike: (1, 2), bad: (3, 3)}
        assert [r.table for r in found.ranked[name]][-1] == bad
        assert not found.ranked[name][-1].is_pareto
    assert [(m.dim, m.bytes_a_row, m.rows_per_s) for m in found.models] == [(16, 64, None)] * 3


def test_the_command_says_it_in_lines_and_as_json(tmp_path: Path) -> None:
    tables = [save(tmp_path, "good", 0.3), save(tmp_path, "bad", 1.0)]
    done = run_cli("compare", *tables, "--probe", "knn", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ranked"]["knn"][0]["table"] == tables[0]
    done = run_cli("compare", *tables, "--probe", "knn")
    lines = done.stdout.splitlines()
    assert lines[0] == "compared  2 tables by topic: 600 rows that all have, of 3 labels"
    assert lines[1].startswith("knn       rank 1")
    assert lines[2].endswith("another is as good and costs no more")
    assert f"{tables[1]} against {tables[0]}: worse (-" in lines[3]


def test_what_cannot_be_compared_is_said_before_ray(tmp_path: Path) -> None:
    one, other = save(tmp_path, "one", 0.3), save(tmp_path, "other", 0.3, slice(580, None))
    for tables, more, told in [
        ([one], {}, "takes two tables or more"),
        ([one, one], {}, "each once"),
        ([one, other], {"names": ("clustering",)}, "takes the probes knn, linear"),
        ([one, other], {"label": "size"}, "no column 'size' in .*; it has topic"),
    ]:
        with pytest.raises(SpecError, match=told):
            fmembed.compare(tables, **more)  # type: ignore[arg-type]
    with pytest.raises(TableError, match="20 rows with a label are in all tables"):
        fmembed.compare([one, other])
    with pytest.raises(TableError, match="no such folder"):
        fmembed.compare([one, str(tmp_path / "none")])


def test_a_split_of_the_first_table_is_kept_to(tmp_path: Path) -> None:
    split = np.array(["test" if i < 150 else "train" for i in range(NUM)])
    one = save(tmp_path, "one", 0.5, split=split)
    other = save(tmp_path, "other", 0.5, split=split)
    ranked = fmembed.compare([one, other], ("knn",)).ranked["knn"]
    # Of 150 rows, not 600: shares of them are.
    assert all((r.value * 150) == pytest.approx(round(r.value * 150)) for r in ranked)
