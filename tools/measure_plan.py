"""What `fmembed plan` says beside what the runs then do: of texts, pictures and sounds.

    python tools/measure_plan.py [text] [image] [audio] [--scale 1.0]

For each: a plan, which measures the model, and an embedding run; then some of the source is
changed, taken away and added, and a plan of a refresh, which goes by the run on record, and the
refresh. Each prints a line of JSON: of each figure what was said, between what, what it became, and
how far off that was. Needs the demo's packages for texts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fmembed.bench import data

# Rows of the first run, and then of those added.
_ROWS = {"text": (1600, 600), "image": (1200, 600), "audio": (300, 200)}


def make_texts(folder: Path, first: int, stop: int) -> None:
    texts = data._spread(data._bbc(), 2200)
    for i in range(first, stop):
        (folder / f"{i:05}.txt").write_text(texts[i])


def make_pictures(folder: Path, first: int, stop: int) -> None:
    for i in range(first, stop):
        data._make_image(folder / f"{i:05}", i, (500, 375))


def make_sounds(folder: Path, first: int, stop: int) -> None:
    for i in range(first, stop):
        data._make_sound(folder / f"{i:05}", i, 2 + 8 * (i * 7 % 17) / 16)


_MAKE: dict[str, Callable[[Path, int, int], None]] = {
    "text": make_texts, "image": make_pictures, "audio": make_sounds,
}  # fmt: skip


def make_model(kind: str, folder: Path) -> str:
    if kind == "text":
        return data.MINILM
    save = data.save_vit if kind == "image" else data.save_wav2vec2
    save(folder, "small")
    return str(folder)


def run(command: str, folder: Path, model: str, *more: str) -> dict[str, Any]:
    """One command, as a user or a scheduler starts it."""
    done = subprocess.run(
        [sys.executable, "-m", "fmembed.cli", command, *more, "--source", str(folder / "in"),
         "--model", model, "--dtype", "float32", "--output", str(folder / "out"),
         "--set", "probes=[]", "--set", "compute.price_per_device_hour=2", "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def sizes(folder: Path) -> dict[str, int]:
    return {f.name: f.stat().st_size for f in folder.glob("out/part-*.parquet")}


def compare(kind: str, what: str, folder: Path, model: str) -> None:
    """A plan, and the run."""
    more = ["--refresh"] if what == "refresh" else []
    plan, before = run("plan", folder, model, *more), sizes(folder)
    result = run(what, folder, model)
    new = [n for name, n in sizes(folder).items() if name not in before]
    for name in ("rows_read", "rows_new", "rows_changed", "rows_removed", "rows_embedded",
                 "rows_copied", "contents_embedded"):  # fmt: skip
        became = result[name]
        if what == "embed" and name in ("rows_new", "contents_embedded"):
            became = result["rows_embedded"]
        line = {"kind": kind, "what": what, "figure": name, "said": plan[name], "became": became}
        print(json.dumps({**line, "exact": plan[name] == became}), flush=True)
    size = 16_000 if kind == "audio" else 1  # of samples, a second
    figures = {
        plan["unit"]: (plan["units"], result["num_units"] / size),
        "seconds": (plan["seconds"], result["seconds"]),
        "device_hours": (plan["device_hours"], result["spent"]["device_hours"]),
        "cost": (plan["cost"], result["spent"]["cost"]),
        "parts_written": (plan["parts_written"], len(new)),
        "bytes_written": (plan["bytes_written"], sum(new)),
    }
    for name, (said, became) in figures.items():
        off = said["value"] / became - 1 if became else 0.0
        line = {
            "kind": kind,
            "what": what,
            "figure": name,
            **{k: round(v, 4) for k, v in said.items()},
        }
        print(json.dumps({**line, "became": round(became, 4), "off": f"{off:+.1%}"}), flush=True)


def measure(kind: str, scale: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        first, more = (int(n * scale) for n in _ROWS[kind])
        _MAKE[kind](folder / "in", 0, first)
        model = make_model(kind, folder / "model")
        compare(kind, "embed", folder, model)
        _MAKE[kind](folder / "in", first, first + more)
        files = sorted((folder / "in").iterdir())
        for path in files[:5]:  # another's content
            path.write_bytes(files[-1].read_bytes())
        for path in files[5:10]:
            path.unlink()
        compare(kind, "refresh", folder, model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help="text, image, audio; all, if none is named")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the rows")
    given = parser.parse_args()
    for kind in given.kinds or _MAKE:
        measure(kind, given.scale)


if __name__ == "__main__":
    main()
