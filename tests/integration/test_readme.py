"""The README's commands, and what they promise of the demo."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import fmembed

NUM_TOKENS = 128
BEGINNING = ("--set", f"model.max_tokens={NUM_TOKENS}")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """The table of `bash jobs/demo.sh`, and the JSON it ends with.

    Of each article the beginning: all that the model can see of them takes two cores four minutes
    beside the other tests, this one.
    """
    out = tmp_path_factory.mktemp("demo") / "bbc"
    done = subprocess.run(
        ["bash", "jobs/demo.sh", "--output", str(out), "--json", *BEGINNING],
        cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout.splitlines()[-1])


def test_demo_embeds_everything(demo: tuple[Path, dict[str, object]]) -> None:
    out, result = demo
    counts = (result["rows_read"], result["rows_embedded"], result["rows_rejected"])
    assert counts == (2225, 2225, 0)
    assert result["probes"]["linear"]["value"] >= 0.95  # type: ignore[index]
    assert fmembed.verify(str(out)).problems == []


def test_demo_vectors_are_those_of_the_reference(
    demo: tuple[Path, dict[str, object]], minilm: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    rows = fmembed.read(str(demo[0]), columns=["text", "embedding", "num_units"])
    # Every fourth by length: each takes the reference as long as it took us.
    order = np.argsort(rows["num_units"].to_numpy(), kind="stable")
    rows = rows.take(np.union1d(order[::4], order[-8:]))
    model = SentenceTransformer(str(minilm), device="cpu")
    model.max_seq_length = NUM_TOKENS
    reference = model.encode(rows["text"].to_pylist(), batch_size=8)
    cosine = (np.stack(rows["embedding"].to_pylist()) * reference).sum(axis=1)
    assert cosine.min() > 0.9999


def test_demo_again_changes_nothing(demo: tuple[Path, dict[str, object]]) -> None:
    out, _ = demo
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    done = subprocess.run(
        ["bash", "jobs/demo.sh", "--output", str(out), *BEGINNING],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "nothing to do: all 2,225 rows are done" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before


def test_readme_commands(demo: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    """Each `fmembed` command of the README runs; installs and clusters have tests of their own."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    assert {"bash jobs/demo.sh", "bash tests/run.sh"} <= set(lines)
    commands = [line for line in lines if line.startswith(".venv/bin/fmembed ")]
    assert len(commands) >= 3
    for line in commands:
        arguments = line.replace("out/bbc", str(demo[0])).split()[1:]
        subprocess.run(
            [sys.executable, "-m", "fmembed.cli", *arguments],
            cwd=ROOT, capture_output=True, text=True, timeout=300, check=True,
        )  # fmt: skip
