"""The benchmark's arithmetic, and each way on a few rows; its figures come from running it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from fmembed import bench
from fmembed.bench import data, suites, ways
from fmembed.bench.suites import STEADY, WHOLE, Bar, Suite, Way
from fmembed.errors import SpecError

pytestmark = pytest.mark.slow

RUNS = {
    "ours": [
        {"rows_per_s": rate, "whole_rows_per_s": whole, "wait_share": share, "parts": {"read": s},
         "total_mib": 1200}
        for rate, whole, share, s in ((30.0, 9.0, 0.02, 1.0), (10.0, 8.0, 0.04, 3.0),
                                      (20.0, 7.0, 0.03, 2.0))
    ],
    "theirs": [{"rows_per_s": 10.0, "batch": 32, "total_mib": 900}] * 3,
    "not run": [],
}  # fmt: skip


def test_bars_are_ratios_of_medians() -> None:
    bars = (
        Bar("ours", "theirs", STEADY, least=2.0),
        Bar("ours", "theirs", STEADY, least=2.1),
        Bar("ours", "", "wait_share", most=0.03),
        Bar("ours", "", "wait_share", most=0.02),
        Bar("ours", "theirs", STEADY, least=1.95, most=1.99),
    )
    found = bench.summarise(100, RUNS, bars)
    assert [(b["value"], b["met"]) for b in found["bars"]] == [
        (2.0, True), (2.0, False), (0.03, True), (0.03, False), (2.0, False),
    ]  # fmt: skip
    ours = found["ways"]["ours"]
    assert (ours[STEADY], ours["from"], ours["to"], ours["runs"]) == (20.0, 10.0, 30.0, 3)
    assert ours["parts"] == {"read": 2.0}
    assert list(found["ways"]) == ["ours", "theirs"]


def test_the_tables_show_what_was_missed() -> None:
    machine = {"processor": "some CPU", "cores": 2, "date": "2026-01-01", "versions": {"ray": "2"}}
    bars = (Bar("ours", "theirs", STEADY, least=2.1, most=9), Bar("ours", "", "wait_share"))
    text = bench.to_markdown({"articles": {"machine": machine, **bench.summarise(100, RUNS, bars)}})
    assert "**articles**, 100 rows, medians of 3 repetitions in turn; some CPU, 2 cores" in text
    assert "| ours | 20 | 10, 30 | 8 | 1,200 |" in text
    assert "| theirs (32) | 10 | 10, 10 |  | 900 |" in text
    assert "| ours / theirs | 2 | ≥ 2.1, ≤ 9 | missed |" in text
    assert "| ours, share of the time that the model waited | 0.03 |  |  |" in text
    assert "ours: read 2, wait_share 0.03" in text


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_every_bar_is_of_ways_that_are_run(has_bfloat16: bool) -> None:
    for suite in (*suites._on_cpu(has_bfloat16), *suites._on_gpu()):
        names = {way.name for way in suite.ways}
        assert len(names) == len(suite.ways)
        for bar in suite.bars:
            assert {bar.way, bar.other} - {""} <= names, suite.name
        assert any(bar.least or bar.most for bar in suite.bars)
        assert {way.run for way in suite.ways} <= {"fmembed", *ways.WAYS}
    dtypes = {way.dtype for suite in suites._on_cpu(False) for way in suite.ways}
    assert dtypes == {"float32"}


@pytest.mark.parametrize("way", ["sentence_transformers", "text_loop", "encoder"])
def test_ways_of_texts(way: str, tmp_path: Path, minilm: Path) -> None:
    data.sentences(tmp_path / "rows.parquet", 64)
    found = ways.WAYS[way](_task(tmp_path / "rows.parquet", "text", minilm))
    assert found["rows"] == 32
    assert found["seconds"] > 0
    if way == "encoder":
        assert 0 < found["share"] < 1.5


@pytest.mark.parametrize("way", ["image_pipeline", "media_one_by_one", "media_loop"])
def test_ways_of_pictures(way: str, tmp_path: Path) -> None:
    data.images(tmp_path / "files", 8)
    data.save_vit(tmp_path / "model", "tiny")
    found = ways.WAYS[way](_task(tmp_path / "files", "images", tmp_path / "model"))
    assert (found["rows"], found["seconds"] > 0) == (4, True)


@pytest.mark.parametrize("way", ["media_one_by_one", "media_loop"])
def test_ways_of_sounds(way: str, tmp_path: Path) -> None:
    data.sounds(tmp_path / "files", 8)
    data.save_wav2vec2(tmp_path / "model", "tiny")
    found = ways.WAYS[way](_task(tmp_path / "files", "audio", tmp_path / "model"))
    assert (found["rows"], found["seconds"] > 0) == (4, True)


def _task(source: Path, kind: str, model: Path) -> dict[str, Any]:
    return {
        "kind": kind, "data": str(source), "model": str(model), "dtype": "float32",
        "device": "cpu", "every": 2, "batch": 4,
    }  # fmt: skip


def test_two_ways_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in a process of its own, from the suite to both files."""
    suite = Suite(
        "few", 48, "text", (Way("bare loop", "text_loop"), Way("Daft", "daft")),
        (Bar("bare loop", "Daft", WHOLE, 0.0),), data.sentences,
    )  # fmt: skip
    monkeypatch.setattr(bench, "suites_on", lambda _: (suite,))
    few = bench.compare(["few"], "cpu", 1, str(tmp_path))["few"]
    assert few == json.loads((tmp_path / "bench.json").read_text())["few"]
    assert few["ways"]["bare loop"]["rows"] == few["ways"]["Daft"]["rows"] == 48
    assert few["bars"][0]["met"]
    assert "| Daft |" in (tmp_path / "bench.md").read_text()


@pytest.mark.usefixtures("local_ray")
def test_the_pipeline_with_a_model_that_computes_nothing(tmp_path: Path, minilm: Path) -> None:
    data.short_texts(tmp_path / "rows.parquet", 2000)
    task = {**_task(tmp_path / "rows.parquet", "text", minilm), "out": str(tmp_path / "out")}
    found = ways.without_model(task)
    assert found["rows"] == 2000
    assert found["us_a_row"] == pytest.approx(found["seconds"] * 1e6 / 2000)
    assert {"read", "preprocess", "write", "forward", "rest"} <= found["parts"].keys()
    # What is made of our own command's result.
    record = json.loads(next(Path(tmp_path, "out", "_runs").glob("*.json")).read_text())
    result = record["result"]
    ours = bench._ours(result)
    assert ours["rows"] == 2000
    assert ours["rows_per_s"] == result["steady_rows_per_s"]


def test_what_is_missing_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "find_spec", lambda name: None if name == "daft" else name)
    with pytest.raises(SpecError, match="bench: needs daft: pip install"):
        bench.check_peers("cpu")
    monkeypatch.undo()
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(SpecError, match="torch finds no CUDA device"):
            bench.check_peers("cuda")


def test_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the suite gives the command, and its bars over what the command gives."""

    def run(task: dict[str, Any]) -> dict[str, Any]:
        files = list(Path(task["data"]).rglob("*.txt"))
        assert all(60 < f.stat().st_size < 120 for f in files)
        assert (Path(task["model"]) / "model.safetensors").exists()
        log = Path(task["out"]) / "_delta_log"
        log.mkdir(parents=True)
        (log / f"{0:020}.json").write_text('{"metaData": {}}')
        (log / f"{1:020}.json").write_text('{"add": {}}')
        os.utime(log / f"{0:020}.json", (0, 0))
        os.utime(log / f"{1:020}.json", (time.time() + 7, time.time() + 7))
        return {"rows": len(files), STEADY: 900.0 - len(files), "driver_rss_mib": 500}

    monkeypatch.setattr(bench, "_run", run)
    (found,) = bench._files(tmp_path, 0.002, 1)
    assert [way["rows"] for way in found["ways"].values()] == [40, 400]
    bars = {bar["figure"]: bar for bar in found["bars"]}
    assert bars["first_s"]["value"] == pytest.approx(7, abs=0.5)
    assert bars["driver_rss_mib"]["value"] == 500
    assert bars[STEADY]["value"] == pytest.approx(500 / 860, abs=0.001)
    assert [bar["met"] for bar in bars.values()] == [True, True, False]
    assert bars["first_s"]["what"] == "x10, seconds to the first rows committed"
