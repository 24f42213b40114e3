"""Probing a table whose metadata and records are garbage: one line, before Ray is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from forged import NUM_ROWS, OUTPUT, RUN, SPEC, make_table

from fmembed import pipeline
from fmembed.cli import run
from fmembed.errors import SpecError, TableError
from fmembed.evaluate.probing import _with_competitor, stored_results
from fmembed.evaluate.sample import NO_SOURCE, check_rows, read_card
from fmembed.result import check_probe, check_run
from fmembed.spec import RunSpec

DEEP = "[" * 100_000
SCORE = {"metric": "accuracy", "value": 0.9, "low": 0.8, "high": 0.95}
PROBE = {
    "probe": "knn", "column": "embedding", "version": 1, "num_train": 1, "num_test": 1,
    "seconds": 0.1, "scores": [SCORE], "headline": SCORE,
    "baselines": {"majority": {"value": 0.4, "low": 0.3, "high": 0.5}, "TF-IDF": None},
}  # fmt: skip
VERDICT = {
    "seconds": {"read": 1.0}, "actors": {}, "wait_share": 0.1, "padding_waste": 0.1,
    "tokens_per_s": 1.0, "mfu": None, "batch_tokens": {}, "advice": "none",
}  # fmt: skip


def spec(**parts: Any) -> dict[str, Any]:
    return {"spec": {**SPEC, **parts}}


def numbers(values: Any) -> dict[str, Any]:
    return {"columns": {"embedding": values}}


UNLIKE = pa.array(np.zeros((NUM_ROWS, 9), np.float32).reshape(-1))

# What is written into the table, and what the line says.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "spec: no JSON": ({"spec": "{"}, "its metadata are damaged"),
    "spec: a list": ({"spec": []}, "its metadata are damaged"),
    "spec: a number": ({"spec": "7"}, "its metadata are damaged"),
    "spec: deep": ({"spec": DEEP}, "its metadata are damaged"),
    "spec: deep value": (
        {"spec": '{"source": {"uri": ' + "[" * 900 + "]" * 900 + "}}"},
        "the spec in its metadata is damaged",
    ),
    "spec: huge number": ({"spec": '{"source": ' + "9" * 5000 + "}"}, "its metadata are damaged"),
    "spec: huge value": (spec(source={"uri": ["x" * 1_000_000]}), "is damaged"),
    "spec: unknown key": (spec(run="rm"), "(run: "),
    "spec: unknown probe": (spec(probes=["evil"]), "probes.0"),
    "spec: wrong types": (spec(source={"uri": "x", "label": 5}), "source.label"),
    "spec: absent label": (spec(source={"uri": "x", "label": "<b>"}), "no column '<b>' in the"),
    "spec: absent split": (
        spec(source={"uri": "x", "label": "topic", "split": "s"}),
        "no column 's'",
    ),
    "modality": ({"modality": "smell"}, "its metadata are damaged"),
    "identity: no JSON": ({"outputs": "{"}, "its metadata are damaged"),
    "identity: lacks a name": ({"identity": None}, "its metadata are damaged"),
    "outputs: a list": ({"outputs": []}, "its metadata are damaged"),
    "outputs: a path": ({"outputs": {"../../evil": OUTPUT}}, "its metadata are damaged"),
    "outputs: absent": ({"outputs": {"other": OUTPUT}}, "other does not hold the vectors"),
    "outputs: no vectors": ({"outputs": {"topic": OUTPUT}}, "topic does not hold the vectors"),
    "outputs: no precision": (
        {"outputs": {"embedding": {**OUTPUT, "precision": "float128"}}},
        "its metadata are damaged",
    ),
    "ranges: none": (
        {"outputs": {"embedding": {**OUTPUT, "precision": "int8"}}},
        "embedding does not hold the vectors",
    ),
    "ranges: too short": (
        {
            "outputs": {"embedding": {**OUTPUT, "precision": "int8"}},
            "ranges": {"embedding": [[0.0], [1.0]]},
        },
        "embedding does not hold the vectors",
    ),
    "ranges: a number": (
        {
            "outputs": {"embedding": {**OUTPUT, "precision": "int8"}},
            "ranges": {"embedding": [0.0, 1.0]},
        },
        "its metadata are damaged",
    ),
    "identity: pieces": ({"identity": {"preprocess.pieces_are_rows": True}}, "no pieces"),
    "outputs: no pooling": (
        {"outputs": {"embedding": {**OUTPUT, "pooling": {"x": "y"}}}},
        "its metadata are damaged",
    ),
    "ranges: no numbers": ({"ranges": {"embedding": [["x"], ["y"]]}}, "metadata are damaged"),
    "ranges: deep": ({"ranges": DEEP}, "its metadata are damaged"),
    "run: a list": ({"run": []}, "the record of its last run"),
    "run: empty": ({"run": {}}, "(run_id)"),
    "run: text for a number": ({"run": {**RUN, "table_rows": "<script>"}}, "(table_rows)"),
    "run: no stages": ({"run": {**RUN, "stages": {"x": {"rows": "y"}}}}, "(stages.x.rows)"),
    "run: half a verdict": ({"run": {**RUN, "verdict": {"advice": "run rm"}}}, "(verdict"),
    "run: not finite": ({"run": {**RUN, "seconds": float("nan")}}, "(seconds)"),
    "run: a version below 0": ({"run": {**RUN, "version": -1}}, "(version)"),
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_damaged_table_is_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, said = CASES[case]
    table = make_table(tmp_path / "out", **made)

    def look(*_: Any) -> Any:
        raise AssertionError("it was taken for whole")

    monkeypatch.setattr("fmembed.run.cluster.connect", lambda _: False)  # what is said needs no Ray
    monkeypatch.setattr("fmembed.evaluate.probing.read_sample", look)
    code = run(["probe", table.uri])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("fmembed: ")
    assert said in err
    assert len(err) < 700


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", DEEP.encode(), b"9" * 5000, b'"\\ud800"'])
def test_a_record_that_is_no_json(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = make_table(tmp_path / "out")
    for path in (Path(table.uri) / "_runs").iterdir():
        path.write_bytes(content)
    assert run(["probe", table.uri]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 2
    assert "it is passed over" in said
    assert "no run has finished" in said
    # A probe's too: it is run again.
    path = Path(table.uri) / "_probes" / "00000001-knn-embedding.json"
    path.parent.mkdir()
    path.write_bytes(content)
    assert table.get_probe(1, "knn", "embedding") is None


ROWS: dict[str, dict[str, Any]] = {
    "a hash that is none": {"content_hash": pa.array(["zz"] * NUM_ROWS)},
    "no hash": {"content_hash": pa.array([1] * NUM_ROWS)},
    "ids that are numbers": {"row_id": pa.array([b"\xff"] * NUM_ROWS)},
    "a null vector": {
        "embedding": pa.array([None, *[[0.0] * 8] * (NUM_ROWS - 1)], pa.list_(pa.float32(), 8))
    },
    "a null number": {
        "embedding": pa.array([[None] * 8] * NUM_ROWS, pa.list_(pa.float32(), 8)),
    },
}


@pytest.mark.parametrize("case", list(ROWS))
def test_rows_that_no_run_has_written(case: str, tmp_path: Path) -> None:
    table = make_table(tmp_path / "out")
    rows = table.read_part(table.rows.parts()[0], None)
    for name, column in ROWS[case].items():
        rows = rows.set_column(rows.schema.get_field_index(name), name, column)
    with pytest.raises(TableError, match="its rows are damaged"):
        check_rows(table, rows, read_card(table).pooled)


def test_text_that_is_no_utf8(tmp_path: Path) -> None:
    table = make_table(tmp_path / "out")
    rows = table.read_part(table.rows.parts()[0], None)
    offsets = pa.py_buffer(np.arange(0, NUM_ROWS + 1, dtype=np.int32).tobytes())
    bad = pa.Array.from_buffers(
        pa.string(), NUM_ROWS, [None, offsets, pa.py_buffer(b"\xff" * NUM_ROWS)]
    )
    rows = rows.set_column(rows.schema.get_field_index("topic"), "topic", bad)
    with pytest.raises(TableError, match="its rows are damaged"):
        check_rows(table, rows, read_card(table).pooled)


def test_records_as_they_are_written_pass() -> None:
    assert check_run({**RUN, "verdict": VERDICT}, "").verdict == VERDICT
    assert check_run({**RUN, "verdict": {}}, "").verdict == {}
    assert check_probe(json.loads(json.dumps(PROBE)), "knn", "embedding") == PROBE
    chance = {"value": 0.2, "low": 0.1, "high": 0.3, "shuffles": 1000, "p": 0.001}
    now = {**PROBE, "baselines": {**PROBE["baselines"], "shuffled labels": chance}}
    assert check_probe(now, "knn", "embedding") == now
    health = {k: v for k, v in PROBE.items() if k not in ("scores", "headline", "baselines")}
    figures = [{"name": "hubness", "value": 1e9, "random": 0.1}]
    health |= {"probe": "health", "findings": [], "figures": figures, "num_rows": 1}
    assert check_probe(health, "health", "embedding") == health
    for lost in ("findings", "figures", "num_rows"):
        left = {k: v for k, v in health.items() if k != lost}
        assert check_probe(left, "health", "embedding") is None
        assert check_probe({**health, lost: None}, "health", "embedding") is None
    skipped = {k: PROBE[k] for k in ("probe", "column", "version", "num_train", "num_test")}
    skipped |= {"seconds": 0.0, "skipped": "why"}
    assert check_probe(skipped, "knn", "embedding") == skipped


@pytest.mark.parametrize(
    "change",
    [
        {"probe": "linear"},
        {"column": "other"},
        {"headline": None},
        {"headline": {**SCORE, "value": "<script>alert(1)</script>"}},
        {"scores": [{**SCORE, "low": None}]},
        {"baselines": {"majority": "x"}},
        {"baselines": {"shuffled labels": {"value": 0, "low": 0, "high": 0, "shuffles": 20}}},
        {"baselines": {"shuffled labels": {"value": 0, "low": 0, "high": 0, "p": "<b>"}}},
        {"num_test": "<b>"},
        {"C": "1; background: url(x)"},
        {"skipped": ["x"]},
        {"confusion": {"classes": ["a", "b"], "counts": [[1]]}},
        {"confusion": {"classes": ["a"], "counts": [["x"]]}},
        {"suspicious": [{"row_id": 1}]},
        {"version": {}},
        {"baselines": {}},
        {"baselines": {"TF-IDF": None}},
        {"headline": {**SCORE, "value": 1e308}},
        {"num_test": 10**4000},
        {"wrong_labels": 10**4000},
        {"headline": None, "findings": [], "figures": [], "num_rows": 1},
    ],
)
def test_records_of_other_shapes_do_not(change: dict[str, Any]) -> None:
    assert check_probe({**PROBE, **change}, "knn", "embedding") is None


def test_an_earlier_result_without_the_source_is_not_enough_for_embed(tmp_path: Path) -> None:
    table = make_table(tmp_path / "out")
    own, made = RunSpec.parse(SPEC), check_run(RUN, table.uri)
    table.put_report("x")
    table.put_probe(1, PROBE)
    found = stored_results(table, own, made)
    assert found is not None
    assert found.probes["knn"]["value"] == 0.9
    table.put_probe(1, {**PROBE, "missing": NO_SOURCE})
    assert stored_results(table, own, made) is None
    table.put_probe(1, {**PROBE, "num_test": "x"})
    assert stored_results(table, own, made) is None


def test_a_competitor_that_was_found_of_the_same_rows_stays() -> None:
    """As of a table that was copied to where its source is not."""
    tfidf = {"value": 0.8, "low": 0.7, "high": 0.9}
    known = {**PROBE, "baselines": {**PROBE["baselines"], "TF-IDF": tfidf}}  # type: ignore[dict-item]
    found = {**PROBE, "missing": NO_SOURCE}
    assert _with_competitor(found, known) == known
    assert _with_competitor(found, None) == found
    # Of other labels, or where it was not found either.
    other = {**known, "headline": {**SCORE, "value": 0.7}}
    assert _with_competitor(found, other) == found
    rarer = {**known, "baselines": {**known["baselines"], "majority": tfidf}}
    assert _with_competitor(found, rarer) == found
    assert _with_competitor(found, found) == found
    assert _with_competitor(PROBE, known) == PROBE


def test_what_probes_need_is_told_before_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = make_table(tmp_path / "out", spec={**SPEC, "source": {"uri": "x"}}, run=RUN)
    monkeypatch.setattr("fmembed.run.cluster.connect", lambda _: pytest.fail("Ray would start"))
    with pytest.raises(
        SpecError, match=r"^probe: knn needs a column: --label COLUMN .*; it has topic"
    ):
        pipeline.probe(table.uri, ("knn",))
    with pytest.raises(SpecError, match=r"crossmodal needs a column: --set source.caption=COLUMN"):
        pipeline.probe(table.uri, ("crossmodal",))
    with pytest.raises(pytest.fail.Exception):  # it goes on, to draw the map
        pipeline.probe(table.uri)
    assert "not run: knn needs a column" in capsys.readouterr().err
