"""Seconds and peak memory of vectors in and out: `python tools/measure_exchange.py [FORMAT ...]`.

Random float32 vectors, a million of 384 numbers (`--rows`), from NPY into a table, out to each
format and in again; the vectors that come out at the end are compared byte for byte with the first.
"""

from __future__ import annotations

import argparse
import filecmp
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from fmembed.exchange.exporting import export
from fmembed.exchange.foreign import FORMATS, ids_beside
from fmembed.exchange.importing import import_vectors

DIM = 384


def make(path: Path, num_rows: int) -> None:
    made = np.lib.format.open_memmap(path, "w+", np.float32, (num_rows, DIM))
    rng = np.random.default_rng(0)
    for start in range(0, num_rows, 50_000):
        num = min(50_000, num_rows - start)
        made[start : start + num] = rng.standard_normal((num, DIM), dtype=np.float32)
    made.flush()
    np.save(ids_beside(str(path)), np.array([f"row-{i:07d}" for i in range(num_rows)]))


def step(name: str, source: str, target: str) -> None:
    """In a process of its own, whose peak is that of the step: a child begins with its parent's."""
    if name == "make":
        make(Path(source), int(target))
        return
    began = time.monotonic()
    if name == "import":
        import_vectors(source, target)
    else:
        export(source, target, name)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name:<8} {Path(source).name} > {Path(target).name}: "
          f"{time.monotonic() - began:.1f} s, peak {peak:.2f} GiB", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("formats", nargs="*", default=FORMATS)
    parser.add_argument("--rows", type=int, default=1_000_000)
    given = parser.parse_args()

    def run(*arguments: str) -> None:
        subprocess.run([sys.executable, __file__, "--step", *arguments], check=True)

    with tempfile.TemporaryDirectory(prefix="fmembed-exchange-") as name:
        folder = Path(name)
        run("make", f"{name}/first.npy", str(given.rows))
        run("import", f"{name}/first.npy", f"{name}/table")
        for kind in given.formats:
            where, last = f"{name}/out.{kind}", folder / f"{kind}.npy"
            run(kind, f"{name}/table", where)
            run("import", where, f"{name}/{kind}-table")
            run("npy", f"{name}/{kind}-table", str(last))
            same = filecmp.cmp(folder / "first.npy", last, shallow=False)
            print(f"{kind}: {'the same' if same else 'OTHER'} bytes", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        step(*sys.argv[2:])
    else:
        main()
