"""What listing many files takes: seconds, and memory of the driver.

    python tools/measure_listing.py --files 1000000
    python tools/measure_listing.py --files 10000000 --flat

Makes so many names of small texts (links to a thousand files: a disk has only so many inodes), in
folders of a thousand or all in one, opens them as a source in a process of its own, and prints a
line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

_NUM_CONTENTS = 1000


def make(folder: Path, num_files: int, flat: bool) -> None:
    contents = folder / "contents"
    contents.mkdir()
    (folder / "in").mkdir()
    for i in range(_NUM_CONTENTS):
        (contents / str(i)).write_text(f"text number {i}")
    for start in range(0, num_files, _NUM_CONTENTS):
        into = folder / "in" if flat else folder / "in" / f"{start // _NUM_CONTENTS:05}"
        into.mkdir(exist_ok=True)
        for i in range(start, min(start + _NUM_CONTENTS, num_files)):
            os.link(contents / str(i % _NUM_CONTENTS), into / f"document-{i:08}.txt")


def list_files(uri: str) -> None:
    from fmembed.sources.opening import open_source
    from fmembed.spec import SourceSpec

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    began = time.monotonic()
    source = open_source(SourceSpec(uri=uri))
    seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    held = psutil.Process().memory_info().rss // 2**20
    print(
        json.dumps(
            {
                "files": source.num_rows, "shards": len(source.shards),
                "seconds": round(seconds, 1), "before_mib": before, "peak_mib": peak,
                "held_mib": held,
            }
        )
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--flat", action="store_true", help="all in one folder")
    parser.add_argument("--list", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.list:
        list_files(given.list)
        return
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), given.files, given.flat)
        subprocess.run([sys.executable, __file__, "--list", f"{name}/in"], check=True)


if __name__ == "__main__":
    main()
