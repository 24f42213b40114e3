"""What the gate lets pass, and in which words it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gated
import numpy as np
import pyarrow as pa
import pytest

from fmembed.evaluate import gate as gate_module
from fmembed.evaluate.gate import run_gate
from fmembed.spec import GateSpec, RunSpec
from fmembed.table.store import Store
from fmembed.table.table import Table


@pytest.fixture(autouse=True)
def _inline(monkeypatch: pytest.MonkeyPatch) -> None:
    gated.run_inline(monkeypatch)


def spec(label: str | None = "topic", **gate: Any) -> RunSpec:
    return RunSpec.parse(
        {
            "source": {"uri": "in", "label": label, "carry": ["text"]},
            "model": {"id": "m"},
            "output": {"uri": "out"},
            "probes": ["knn", "linear"],
            "gate": gate,
        }
    )


def ask(
    folder: Path, old: gated.Rows | None, new: gated.Rows, gate: RunSpec | None = None, **made: Any
) -> dict[str, Any]:
    """Promote the one, ask about the other."""
    store = Store(str(folder / "store"))
    store.make()
    over = None
    if old is not None:
        made_old = gated.add_version(folder / "store/tables/old", old)
        pointer = store.promote("old", made_old.rows.version(), "first", over=None)
        over = (Table.open(store.uri_of("old")), pointer)
    made.setdefault("model", "w")
    name = "old" if made["model"] == "w" and old is not None else "new"
    table = gated.add_version(folder / "store/tables" / name, new, **made)
    found: dict[str, Any] = run_gate(table, table.rows.version(), over, gate or spec())
    return found


def refusals(found: dict[str, Any]) -> list[str]:
    assert found["passed"] == all(check["passed"] is not False for check in found["checks"])
    return [check["name"] for check in found["checks"] if check["passed"] is False]


def test_the_same_again_passes_and_a_first_version_too(tmp_path: Path) -> None:
    found = ask(tmp_path, gated.rows(), gated.rows())
    assert found["passed"]
    assert found["over"] == {"table": "old", "version": 1}
    assert "+0.0000" in found["words"]
    first = ask(tmp_path / "first", None, gated.rows())
    assert first["passed"]
    assert first["over"] is None


def test_another_model_that_is_as_good_passes_and_says_what_it_changes(tmp_path: Path) -> None:
    found = ask(tmp_path, gated.rows(noise=0.15), gated.rows(noise=0.12, seed=1), model="w2")
    assert found["passed"], found["words"]
    (told,) = (check for check in found["checks"] if check["name"] == "neighbours")
    assert "a map from the old vectors keeps" in told["words"]
    assert 0 <= told["figures"]["mutual"] <= 1


def test_noise_is_refused_with_and_without_labels(tmp_path: Path) -> None:
    noise = replace(gated.rows(), vectors=_unit(np.random.default_rng(5).normal(size=(400, 16))))
    found = ask(tmp_path / "a", gated.rows(noise=0.1), noise, model="w2")
    assert {"probe knn", "probe linear"} <= set(refusals(found))
    found = ask(tmp_path / "b", gated.rows(noise=0.1), noise, spec(None), model="w2")
    assert refusals(found) == ["neighbours"]
    assert "by chance" in found["words"]


def test_another_dimension_is_refused_unless_readers_can(tmp_path: Path) -> None:
    other = gated.rows(noise=0.1, seed=1, dim=24)
    found = ask(tmp_path / "a", gated.rows(noise=0.2), other, model="w2")
    assert refusals(found) == ["dimension"]
    assert "24 numbers" in found["words"]
    assert "gate.same_dim" in found["words"]
    allowed = spec(same_dim=False)
    assert ask(tmp_path / "b", gated.rows(noise=0.2), other, allowed, model="w2")["passed"]


def test_rejected_lost_and_collapsed_rows_are_refused_each_in_its_words(tmp_path: Path) -> None:
    good = gated.rows()
    half = replace(good, num_rejected=400)
    assert refusals(ask(tmp_path / "a", good, half)) == ["rejected"]
    assert refusals(ask(tmp_path / "b", None, half)) == ["rejected"]
    found = ask(tmp_path / "c", good, gated.rows(200), model="w2")
    assert "rows" in refusals(found)
    words = "200 rows, of the promoted version 400 (gate.max_lost_fraction = 0.1)"
    assert words in found["words"]
    # Of the same table a refresh has asked whether they may leave.
    assert "rows" not in refusals(ask(tmp_path / "same", good, gated.rows(200)))
    one = np.tile(good.vectors[:1], (400, 1)) + 1e-4 * good.vectors
    found = ask(tmp_path / "d", good, replace(good, vectors=_unit(one)), model="w2")
    assert "collapse" in refusals(found)
    assert "collapsed" in found["words"]


def test_not_a_number_copies_and_lengths_are_refused(tmp_path: Path) -> None:
    good = gated.rows()
    broken = good.vectors.copy()
    broken[3, 2] = np.nan
    found = ask(tmp_path / "a", good, replace(good, vectors=broken))
    assert refusals(found) == ["finite"]
    copies = good.vectors.copy()
    copies[:40] = copies[0]
    found = ask(tmp_path / "b", good, replace(good, vectors=copies))
    assert "copies" in refusals(found)
    assert "10.0% of unlike inputs share a vector" in found["words"]
    found = ask(tmp_path / "c", good, replace(good, vectors=good.vectors * 3))
    assert refusals(found) == ["norms"]


def test_a_mass_of_copies_of_an_input_is_refused(tmp_path: Path) -> None:
    """Of which the bootstrap makes one row."""
    good = gated.rows()
    texts = ["same same" if i < 160 else text for i, text in enumerate(good.texts)]
    found = ask(tmp_path, good, replace(good, texts=texts))
    assert refusals(found) == ["repeated rows"]
    assert "40.0% of the rows have the content of another row" in found["words"]


def test_a_column_that_readers_lose_is_refused(tmp_path: Path) -> None:
    found = ask(tmp_path, gated.rows(), gated.rows(seed=1), model="w2", column="other")
    assert refusals(found) == ["columns"]
    assert "embedding" in found["words"]


def test_labels_that_went_wrong_are_refused_within_one_model(tmp_path: Path) -> None:
    good = gated.rows()
    wrong = [*good.labels[200:], *good.labels[:200]]
    found = ask(tmp_path, good, replace(good, labels=wrong))
    assert set(refusals(found)) == {"probe knn", "probe linear"}
    assert any("have another label" in check["words"] for check in found["checks"])


def test_what_arrived_is_told_apart_where_it_is_of_another_kind(tmp_path: Path) -> None:
    good = gated.rows(1200)
    moved = good.vectors.copy()
    moved[:300] = _unit(moved[:300] + 0.7 * np.eye(16)[0])
    texts = [f"new {t}" if i < 300 else t for i, t in enumerate(good.texts)]
    drifted = replace(good, vectors=moved, texts=texts)
    found = ask(tmp_path / "a", good, drifted)
    told = {check["name"]: check for check in found["checks"]}
    assert told["arrivals"]["figures"]["auc"] > 0.6
    assert "of another kind" in told["arrivals"]["words"]
    assert told["arrivals"]["passed"] is None
    assert "300 of 1,200 rows have changed" in told["changed rows"]["words"]
    limited = ask(tmp_path / "b", good, drifted, spec(max_arrival_auc=0.6))
    assert "arrivals" in refusals(limited)


def test_few_rows_are_said_to_be_few(tmp_path: Path) -> None:
    few = ask(tmp_path / "a", gated.rows(noise=0.4), gated.rows(noise=0.4, seed=3), model="w2")
    refused = [check for check in few["checks"] if check["name"] in refusals(few)]
    assert refused
    assert all(
        "too few rows to tell" in check["words"] or check["figures"]["high"] < -0.01
        for check in refused
    )
    tiny = ask(tmp_path / "b", gated.rows(50), gated.rows(50, seed=3), model="w2")
    assert refusals(tiny) == ["same rows"]
    assert "too few to compare" in tiny["words"]
    again = ask(tmp_path / "c", gated.rows(50), gated.rows(50))
    assert again["passed"]


def test_vectors_that_are_others_for_the_same_rows_are_refused_without_a_label(
    tmp_path: Path,
) -> None:
    good = gated.rows()
    noise = replace(good, vectors=_unit(np.random.default_rng(5).normal(size=(400, 16))))
    assert refusals(ask(tmp_path, good, noise, spec(None))) == ["unchanged rows"]


@pytest.mark.parametrize("labels", ["each its own", "nearly one"])
def test_a_probe_that_tells_nothing_lets_no_noise_pass(labels: str, tmp_path: Path) -> None:
    good = gated.rows(noise=0.1)
    names = [f"{i}" if labels == "each its own" else "ab"[i < 3] for i in range(400)]
    noise = _unit(np.random.default_rng(5).normal(size=(400, 16)))
    found = ask(
        tmp_path, replace(good, labels=names), replace(good, labels=names, vectors=noise),
        model="w2",
    )  # fmt: skip
    assert refusals(found) == ["neighbours"]
    told = ("it tells nothing of them", "a label of their own")
    assert any(check["words"].endswith(told) for check in found["checks"])


def test_one_vector_of_no_length_hides_no_others(tmp_path: Path) -> None:
    good = gated.rows()
    long = good.vectors * 7
    long[0] = 0
    assert "norms" in refusals(ask(tmp_path, good, replace(good, vectors=long), model="w2"))


def _unit(vectors: Any) -> Any:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_vectors_of_tokens_are_said_not_to_be_looked_at_and_held_to_their_length() -> None:
    def card(dim: int) -> tuple[pa.Schema, Any]:
        vector = pa.list_(pa.float32(), dim)
        schema = pa.schema([("embedding", vector), ("late", pa.list_(vector))])
        outputs = {n: SimpleNamespace(precision="float32") for n in schema.names}
        return schema, SimpleNamespace(outputs=outputs, pooled=["embedding"])

    (schema, now), (old_schema, before) = card(8), card(8)
    (said,) = gate_module._compare_columns(schema, None, now, None, GateSpec())
    assert (said.passed, said.words) == (
        None, "late has a vector for each token, at which nobody looked"
    )  # fmt: skip
    (old_schema, before) = card(16)
    found = list(gate_module._compare_columns(schema, old_schema, now, before, GateSpec()))
    assert [check.passed for check in found] == [None, False, False]
    assert "vectors of late are 8 numbers" in found[2].words
