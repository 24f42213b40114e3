"""The import rule of the design, read from the source text."""

from __future__ import annotations

import ast

import pytest
from conftest import ROOT

# What each module may import of the project. Lines of the design: jobs, cli -> pipeline -> stages.
ALLOWED = {
    "redaction": set(),
    "spec": {"redaction"},
    "rows": {"spec"},
    "checkpoint": {"spec"},
    "storage": {"spec", "terminal"},
    "terminal": set(),
    "signals": set(),
    "lock": {"spec", "storage", "terminal"},
    "files": set(),
    "unfolding": set(),
    "readers": {"files", "rows", "spec", "storage", "unfolding"},
    "web": set(),
    "source": {"files", "readers", "redaction", "rows", "spec", "storage", "web"},
    "preprocess": {"checkpoint", "rows", "spec", "startup"},
    "batching": set(),
    "attention": set(),
    "linear": set(),
    "meter": {"batching", "linear"},
    "calibration": set(),
    "verdict": set(),
    "metrics": set(),
    "startup": set(),
    "outputs": {"checkpoint", "rows"},
    "towers": {"attention", "batching", "checkpoint", "linear", "outputs", "spec"},
    "encoder": {"batching", "calibration", "checkpoint", "meter", "outputs", "spec", "towers"},
    "endpoint": {"checkpoint", "outputs", "spec"},
    "card": {"spec"},
    "log": {"rows", "spec", "storage"},
    "parts": {"card", "log", "rows", "storage"},
    "records": {"storage"},
    "result": {"spec"},
    "table": {"card", "log", "parts", "records", "rows", "spec", "storage"},
    "integrity": {"log", "parts", "rows", "table"},
    "repair": {"card", "lock", "log", "parts", "records", "result", "rows", "spec", "table"},
    "commits": {"card", "lock", "parts", "readers", "records", "rows", "spec", "table"},
    "report": set(),
    "progress": {"redaction", "signals", "terminal"},
    "evaluation": {
        "checkpoint", "encoder", "endpoint", "outputs", "preprocess", "probes", "readers",
        "report", "result", "rows", "source", "spec", "storage", "table",
    },
    "plan": {"checkpoint", "readers", "rows", "source", "spec"},
    "inputs": {"checkpoint", "readers", "redaction", "source", "spec", "table"},
    "run": {
        "card", "checkpoint", "commits", "encoder", "endpoint", "evaluation", "inputs", "lock",
        "metrics", "outputs", "plan", "preprocess", "progress", "readers", "records", "result",
        "rows", "signals", "source", "spec", "startup", "storage", "table", "verdict",
    },
    "pipeline": {"inputs", "result", "run", "spec"},
    "bench": {
        "bench", "checkpoint", "encoder", "meter", "outputs", "pipeline", "run", "spec",
    },
    "cli": {"bench", "integrity", "pipeline", "repair", "signals", "spec", "table", "terminal"},
}  # fmt: skip
HEAVY = {
    "ray": {
        "source",
        "commits",
        "evaluation",
        "meter",
        "metrics",
        "plan",
        "run",
        "table",
        "cli",
        "progress",
        "bench",
    },
    "torch": {"attention", "bench", "encoder", "batching", "inputs", "linear", "meter", "towers"},
    "sklearn": {"probes"},
}
MODULES = sorted((ROOT / "fmembed").rglob("*.py"))


def imports(path: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", [str(m.relative_to(ROOT)) for m in MODULES])
def test_imports_go_one_way(path: str) -> None:
    name = path.split("/")[1].removesuffix(".py")
    found = imports(path)
    for package, where in HEAVY.items():
        if any(i == package or i.startswith(package + ".") for i in found):
            assert name in where, f"{path} imports {package}"
    inner = {i.split(".")[1] for i in found if i.startswith("fmembed.")} - {"__version__"}
    if name == "probes":
        assert inner <= {"probes"}
    elif name != "__init__":
        assert inner <= ALLOWED[name], f"{path} imports {inner - ALLOWED[name]}"


def test_jobs_have_no_logic_of_their_own() -> None:
    jobs = sorted((ROOT / "jobs").glob("*.py"))
    assert jobs
    for job in jobs:
        assert len(job.read_text(encoding="utf-8").splitlines()) < 60
        # digits.py makes an example's dataset, and needs none of the project.
        assert {i for i in imports(str(job)) if i.startswith("fmembed")} <= {"fmembed.cli.main"}
