"""The whole line on local Ray, with a tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import urllib.request
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import SENTENCES, run_cli, write_jsonl

import fmembed
from fmembed import ChangedError, RejectedError, RunSpec, TableError, pipeline
from fmembed.bench.ways import EmbedNothing
from fmembed.cli.runs import _print_result
from fmembed.run.memory import _BUFFER_BYTES, _Bound

WORDS = ["river", "market", "engine", "garden"]
ROWS = [
    {
        "text": f"{WORDS[i % 4]} {SENTENCES[i % 6]} number {i}",
        "topic": WORDS[i % 4],
        "key": f"k{i}",
    }
    for i in range(240)
]


def spec(tmp_path: Path, model: Path, **parts: Any) -> RunSpec:
    source = tmp_path / "in.jsonl"
    if not source.exists():
        write_jsonl(source, ROWS)
    raw: dict[str, Any] = {
        "source": {"uri": str(source), "id": "key", "label": "topic"},
        "model": {"id": str(model), "dtype": "float32"},
        "output": {"uri": str(tmp_path / "out")},
        "probes": ["knn"],
    }
    for name, part in parts.items():
        raw[name] = {**raw[name], **part} if isinstance(raw.get(name), dict) else part
    return RunSpec.parse(raw)


def embed_nothing(config: RunSpec, **options: Any) -> fmembed.RunResult:
    """The line, with random numbers for vectors: where they are not looked at, no model is loaded,
    which takes six seconds of CPU a run.
    """
    return pipeline.embed(config, stage=EmbedNothing, **options)


def vectors(uri: str) -> Any:
    rows = fmembed.read(uri).sort_by("row_id")
    return np.stack(rows["embedding"].to_pylist())


@pytest.mark.usefixtures("local_ray")
def test_what_is_not_read_or_does_not_fit_is_said(
    tmp_path: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [{"text": t, "n": i, "title": t} for i, t in enumerate(WORDS)])
    write_jsonl(folder / "_b.jsonl", [{"text": "hidden"}])
    (folder / "notes.md").write_text("notes")
    parts: dict[str, Any] = {
        "source": {"uri": str(folder), "id": None, "label": None, "carry": ["n"]},
        "output": {"max_rejected_fraction": 0.5},
        "probes": [],
    }
    first = embed_nothing(spec(tmp_path, tiny_bert, **parts))
    assert first.rows_embedded == 4
    assert set(first.passed_over.values()) == {1}
    assert [why.split(",")[0] for why in first.passed_over] == [
        "files whose names begin with a dot or underscore", "files with .md",
    ]  # fmt: skip
    html = (Path(first.table) / "_report.html").read_text(encoding="utf-8")
    assert all(f"1 {why}" in html for why in first.passed_over)
    _print_result(json.loads(json.dumps(asdict(first))), False, False)
    assert "not read  1 files with .md, no jsonl" in capsys.readouterr().out
    # The table's type stays: another week's value that does not fit is its own row's fate.
    write_jsonl(folder / "c.jsonl", [{"text": "more", "n": 7}, {"text": "half", "n": 0.5}])
    second = embed_nothing(spec(tmp_path, tiny_bert, **parts))
    assert (second.rows_embedded, second.causes) == (1, {"wrong type": 1})
    assert fmembed.read(second.table).schema.field("n").type == pa.int64()
    assert fmembed.verify(second.table).problems == []
    parts["source"]["input"] = "title"
    with pytest.raises(TableError, match=r"^source\.input: .* column 'text', this run .* 'title'"):
        embed_nothing(spec(tmp_path, tiny_bert, **parts))


@pytest.mark.usefixtures("local_ray")
def test_no_row_is_taken_for_done_because_of_its_name_alone(
    tmp_path: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def config(folder: str, out: str, on_changed: str = "refuse") -> RunSpec:
        source = {"uri": str(tmp_path / folder), "id": None, "label": None}
        output = {"uri": str(tmp_path / out), "on_changed": on_changed}
        return spec(tmp_path, tiny_bert, source=source, output=output, probes=[])

    def write(folder: str, texts: list[str], num_kept: int) -> None:
        """Texts as lines, and as files that are rows; those kept are not touched."""
        (tmp_path / folder).mkdir(exist_ok=True)
        write_jsonl(tmp_path / folder / "part.jsonl", [{"text": t} for t in texts])
        (tmp_path / f"{folder}-files").mkdir(exist_ok=True)
        for i, text in enumerate(texts[num_kept:], start=num_kept):
            (tmp_path / f"{folder}-files" / f"{i}.txt").write_text(text)

    write("en", WORDS, 0)
    write("de", [f"{w} auf Deutsch" for w in WORDS], 0)
    for kind in ("", "-files"):
        assert embed_nothing(config(f"en{kind}", f"out{kind}")).rows_embedded == 4
        # Another source, whose ids are the same: none of its rows is in the table.
        with pytest.raises(ChangedError, match=r"^source: 4 rows are others"):
            embed_nothing(config(f"de{kind}", f"out{kind}"))
        # The same rows at another place are the same.
        shutil.copytree(tmp_path / f"en{kind}", tmp_path / f"copy{kind}")
        copied = embed_nothing(config(f"copy{kind}", f"out{kind}"))
        assert (copied.rows_embedded, copied.rows_skipped, copied.rows_changed) == (0, 4, 0)
    before = {kind: vectors(str(tmp_path / f"out{kind}")) for kind in ("", "-files")}
    write("en", [*WORDS[:2], "mended", "changed", "new"], 2)
    for kind in ("", "-files"):
        with pytest.raises(ChangedError, match=r"^source: 2 rows are others"):
            embed_nothing(config(f"en{kind}", f"out{kind}"))
        # It is said each time, and what is new is in the table all the same.
        kept = embed_nothing(config(f"en{kind}", f"out{kind}", "keep"))
        assert (kept.rows_embedded, kept.rows_skipped, kept.rows_changed) == (0, 5, 2)
        now = vectors(kept.table)
        assert len(now) == 5
        assert (now[:4] == before[kind]).all()
        _print_result(json.loads(json.dumps(asdict(kept))), False, False)
        shown = capsys.readouterr().out
        assert "changed   2 rows are others by now (input, or carried columns)" in shown
        assert "nothing to do" not in shown
        assert fmembed.verify(kept.table).problems == []


@pytest.mark.usefixtures("local_ray")
def test_end_to_end_and_again(tmp_path: Path, tiny_bert: Path) -> None:
    first = fmembed.embed(spec(tmp_path, tiny_bert))
    assert (first.rows_read, first.rows_embedded, first.rows_rejected) == (240, 240, 0)
    assert first.probes["knn"]["value"] >= 0
    # The table carries no text: the competitor's texts were read from the source again.
    assert "TF-IDF + logistic regression" in first.probes["knn"]["baselines"]
    assert fmembed.verify(first.table).problems == []
    rows = fmembed.read(first.table)
    assert rows.schema.names == [
        "row_id", "content_hash", "embedding", "num_units", "truncated", "topic",
    ]  # fmt: skip
    assert rows.schema.field("embedding").type.equals(pa.list_(pa.float32(), 32))
    assert sorted(rows["row_id"].to_pylist()) == sorted(r["key"] for r in ROWS)
    html = (Path(first.table) / "_report.html").read_text(encoding="utf-8")
    assert html.count("<circle") == 240
    verdict = first.verdict
    assert sum(a["tokens"] for a in verdict["actors"].values()) == first.num_units
    assert verdict["seconds"]["load"] > 0 < verdict["seconds"]["forward"]
    assert 0 <= verdict["wait_share"] < 1
    assert 0 <= verdict["padding_waste"] < 0.1
    assert verdict["mfu"] > 0
    assert "give a run more rows" in verdict["advice"]
    assert "Where the time went" in html
    # The marker row that ends a shard is none of the source's.
    assert {stage["rows"] for stage in first.stages.values()} == {240}
    assert fmembed.read(first.table, engine="ray").count() == 240
    _check_metrics(first)

    before = {p: p.stat().st_mtime_ns for p in Path(first.table).rglob("*") if p.is_file()}
    second = fmembed.embed(spec(tmp_path, tiny_bert))
    assert (second.rows_read, second.rows_embedded, second.rows_skipped) == (240, 0, 240)
    assert second.probes == first.probes
    assert {p: p.stat().st_mtime_ns for p in Path(first.table).rglob("*") if p.is_file()} == before

    write_jsonl(tmp_path / "in.jsonl", [*ROWS, {"text": "new", "topic": "river", "key": "new"}])
    third = fmembed.embed(spec(tmp_path, tiny_bert))
    assert (third.rows_embedded, third.rows_skipped) == (1, 240)
    assert fmembed.verify(first.table).problems == []


def _check_metrics(result: fmembed.RunResult) -> None:
    """What Prometheus scrapes: the run's figures, and each actor's."""
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = f'run="{result.run_id}"'
    deadline = time.monotonic() + 60
    lines: list[str] = []
    while not any("run_seconds" in line for line in lines):
        assert time.monotonic() < deadline, "Ray's exporter has not told of the run"
        time.sleep(0.5)
        with urllib.request.urlopen(url) as answer:
            lines = [line for line in answer.read().decode().splitlines() if wanted in line]
    figures = {
        (line.partition("{")[0], *re.findall(r'(?:stage|outcome)="([^"]+)"', line)):
        float(line.rpartition(" ")[2])
        for line in lines
    }  # fmt: skip
    assert figures["ray_fmembed_run_rows", "embedded"] == result.rows_embedded
    for stage in ("read", "preprocess", "wait", "copy", "forward", "write"):
        assert ("ray_fmembed_run_seconds", stage) in figures
    forward = figures["ray_fmembed_run_seconds", "forward"]
    assert forward == pytest.approx(result.verdict["seconds"]["forward"])
    for name in ("wait_share", "padding_waste", "tokens_per_s", "mfu"):
        assert figures[f"ray_fmembed_run_{name}",] == pytest.approx(result.verdict[name])


@pytest.mark.usefixtures("local_ray")
def test_vectors_do_not_depend_on_actors_or_batches(tmp_path: Path, tiny_bert: Path) -> None:
    reference = None
    for i, compute in enumerate(
        [
            {"actors": 1, "batch_tokens": 512},
            {"actors": 2, "batch_tokens": 16_384},
            {"actors": [1, 2], "batch_tokens": 512, "window_rows": 50},
        ]
    ):
        output = {"uri": str(tmp_path / f"out{i}")}
        fmembed.embed(spec(tmp_path, tiny_bert, compute=compute, output=output, probes=[]))
        found = vectors(output["uri"])
        reference = found if reference is None else reference
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(reference, axis=1)
        assert ((found * reference).sum(1) / norms).min() > 0.99999


@pytest.mark.usefixtures("local_ray")
def test_bad_and_duplicate_rows_are_rejected(tmp_path: Path, tiny_bert: Path) -> None:
    # Duplicates in two files are written by two tasks, so the driver has to find them.
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [*ROWS[:100], {"text": "", "topic": "river", "key": "empty"}])
    nameless = {**ROWS[199], "topic": None}
    write_jsonl(folder / "b.jsonl", [*ROWS[90:199], nameless, ROWS[150]])
    out = {"uri": str(tmp_path / "out"), "max_rejected_fraction": 0.2, "part_bytes": 1}
    result = embed_nothing(
        spec(tmp_path, tiny_bert, source={"uri": str(folder)}, output=out,
             compute={"window_rows": 20})
    )  # fmt: skip
    assert (result.rows_read, result.rows_embedded, result.rows_rejected) == (212, 200, 12)
    assert result.causes == {"duplicate id": 11, "empty input": 1}
    assert result.probes["knn"]["unlabelled"] == 1
    page = (Path(result.table) / "_report.html").read_text(encoding="utf-8")
    assert "1 rows without a label take no part" in page
    assert fmembed.verify(result.table).problems == []
    stages = pq.read_table(Path(result.table) / "_rejected", columns=["row_id", "stage"])
    assert {"row_id": "empty", "stage": "read"} in stages.to_pylist()


@pytest.mark.usefixtures("local_ray")
def test_identical_files_end(tmp_path: Path, tiny_bert: Path) -> None:
    """Three files of the same rows, in parts so small that their twins meet in any order."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b", "c"):
        write_jsonl(folder / f"{name}.jsonl", [*ROWS[:60], {"text": "", "key": "empty"}])
    out = {"uri": str(tmp_path / "out"), "max_rejected_fraction": 1, "part_bytes": 1,
           "commit_every_s": 0.2}  # fmt: skip
    config = spec(
        tmp_path, tiny_bert, source={"uri": str(folder), "label": None}, output=out, probes=[],
        compute={"window_rows": 7},
    )  # fmt: skip
    result = embed_nothing(config)
    assert (result.rows_read, result.rows_embedded, result.rows_rejected) == (183, 60, 123)
    assert result.causes == {"duplicate id": 120, "empty input": 3}
    assert fmembed.verify(result.table).problems == []
    again = embed_nothing(config, retry_rejected=True)
    assert (again.rows_embedded, again.rows_rejected) == (0, 3)
    assert fmembed.verify(result.table).problems == []


@pytest.mark.usefixtures("local_ray")
def test_too_many_rejections_stop_the_run_and_keep_the_rest(
    tmp_path: Path, tiny_bert: Path
) -> None:
    write_jsonl(tmp_path / "in.jsonl", [*ROWS[:20], *({"key": f"x{i}"} for i in range(5))])
    with pytest.raises(RejectedError, match=r"5 of 25 rows.*5 null input; as x0: col"):
        embed_nothing(spec(tmp_path, tiny_bert))
    assert fmembed.read(str(tmp_path / "out")).num_rows == 20
    # The same command again has nothing to do, and is no success.
    with pytest.raises(RejectedError, match=r"5 of 25 rows.*5 null input; as x0: col"):
        embed_nothing(spec(tmp_path, tiny_bert))
    allowed = {"uri": str(tmp_path / "out"), "max_rejected_fraction": 0.5}
    assert embed_nothing(spec(tmp_path, tiny_bert, output=allowed)).rows_skipped == 25
    assert fmembed.verify(str(tmp_path / "out")).problems == []


def test_flags_do_what_the_config_does(tmp_path: Path, tiny_bert: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", ROWS[:40])
    done = run_cli(
        "embed", "--source", str(tmp_path / "in.jsonl"), "--id", "key", "--model", str(tiny_bert),
        "--dtype", "float32", "--output", "out", "--set", "compute.actors=2", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["rows_read"], result["rows_embedded"]) == (40, 40)
    assert done.stderr == ""  # nothing of Ray's, which has a log level to tell of
    assert result["table"] == str(tmp_path / "out")
    verified = run_cli("verify", "out", cwd=tmp_path)
    assert (verified.returncode, verified.stdout.splitlines()[-1]) == (0, "all is well")
    part = next((tmp_path / "out").glob("part-*.parquet"))
    part.write_bytes(part.read_bytes() + b"x")
    assert run_cli("verify", "out", cwd=tmp_path).returncode == 1


@pytest.mark.usefixtures("local_ray")
def test_whole_files_are_not_read_again_and_rejected_rows_can_be_tried_again(
    tmp_path: Path, tiny_bert: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", ROWS[:50])
    bad = [{"text": None, "topic": "river", "key": "late"}, ROWS[60]]
    write_jsonl(folder / "b.jsonl", [*ROWS[50:80], *bad])
    with (folder / "b.jsonl").open("a") as f:
        f.write('{"text": "cut\n')
    config = spec(
        tmp_path, tiny_bert, source={"uri": str(folder)}, probes=[],
        output={"uri": str(tmp_path / "out"), "max_rejected_fraction": 0.5},
    )  # fmt: skip
    first = embed_nothing(config)
    assert (first.rows_read, first.rows_embedded, first.rows_rejected) == (83, 80, 3)
    listed = run_cli("rejected", first.table)
    assert listed.stdout.splitlines() == [
        "rows rejected: 3",
        "1 bad JSON (stage read)",
        "  b.jsonl#32: Unterminated string starting at: line 1 column 10 (char 9)",
        "1 null input (stage read)",
        "  late: column 'text' is null",
        "1 duplicate id (stage write)",
        "  k60: another row of the source has the same id",
        "fmembed embed --retry-rejected, with the same config, tries them again",
    ]
    as_json = json.loads(run_cli("rejected", first.table, "--json", "--samples", "0").stdout)
    assert as_json["rows_rejected"] == 3
    assert [c["samples"] for c in as_json["causes"]] == [[], [], []]

    # Neither file is read again: what is in a.jsonl now could not be read.
    def spoil(path: Path) -> None:
        before = path.stat()
        path.write_bytes(b"\xff" * before.st_size)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    spoil(folder / "a.jsonl")
    again = embed_nothing(config)
    assert (again.rows_read, again.rows_skipped, again.rows_embedded) == (83, 83, 0)

    # Mended: the null row has a text, the cut line is whole; the twin stays what it is.
    rows = [{**bad[0], "text": "at last"}, bad[1], {"text": "whole", "topic": "x", "key": "cut"}]
    rows_b = [*ROWS[50:80], *rows]
    write_jsonl(folder / "b.jsonl", rows_b)
    retried = embed_nothing(config, retry_rejected=True)
    assert (retried.rows_embedded, retried.rows_rejected, retried.rows_skipped) == (2, 0, 81)
    listed = run_cli("rejected", first.table)
    assert listed.stdout.splitlines()[0] == "rows rejected: 1"
    found = fmembed.read(first.table)["row_id"].to_pylist()
    assert {"late", "cut"} < set(found)
    assert len(found) == len(set(found)) == 82
    assert fmembed.verify(first.table).problems == []
    # A label that is another one by now is not passed over.
    relabelled = [{**row, "topic": "another"} if row["key"] == "k55" else row for row in rows_b]
    write_jsonl(folder / "b.jsonl", relabelled)
    with pytest.raises(ChangedError, match=r"^source: 1 rows are others"):
        embed_nothing(config)
    # Nor are rows that are no longer in the source.
    write_jsonl(folder / "b.jsonl", ROWS[50:60])
    shorter = embed_nothing(config)
    assert (shorter.rows_read, shorter.rows_skipped, shorter.rows_absent) == (60, 60, 23)
    write_jsonl(folder / "b.jsonl", rows_b)
    # A second retry finds only the twin, which no retry can mend.
    assert embed_nothing(config, retry_rejected=True).rows_embedded == 0
    assert fmembed.verify(first.table).problems == []


@pytest.mark.usefixtures("local_ray")
def test_what_waits_to_be_written_takes_no_room_from_the_stages(
    tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors of 18 MB wait for the end here, nine times what the stages may hold."""

    class Slow(EmbedNothing):  # not of this module, which Ray's workers do not have
        def __call__(self, rows: Any) -> Any:
            time.sleep(0.1)
            return EmbedNothing.__call__(self, rows)

    rows = [{"text": f"{WORDS[i % 4]} {i}", "key": f"{i}"} for i in range(12_000)]
    write_jsonl(tmp_path / "in.jsonl", rows)
    limits: list[float] = []
    step = _Bound.on_execution_step

    def watch(self: Any, executor: Any) -> None:
        step(self, executor)
        limits.append(executor._resource_manager.get_global_limits().object_store_memory)

    monkeypatch.setattr(_Bound, "on_execution_step", watch)
    monkeypatch.setitem(_BUFFER_BYTES, "cpu", 2**20)
    source = {"label": None}
    result = pipeline.embed(
        spec(tmp_path, tiny_bert, source=source, compute={"window_rows": 250}, probes=[]),
        stage=Slow,
    )
    assert result.rows_embedded == 12_000
    assert min(limits) <= result.compute["max_actors"] * 2**20 < max(limits) / 4
