"""The import rule by room, read from the source text."""

from __future__ import annotations

import ast

import pytest
from conftest import ROOT

# What each room may import of the project: a folder is a station of the line, a file at the top is
# a door, the line, or ground that all stand on.
GROUND = {
    "arrays": set(),
    "cache": set(),
    "redaction": set(),
    "startup": {"errors"},
    "telling": {"terminal"},
    "terminal": set(),
    "devices": set(),
    "errors": {"redaction"},
    "signals": {"errors"},
    "result": {"errors"},
    "forecast": set(),
    "summary": {"telling"},
    "config_file": {"errors", "redaction"},
    "spec_part": {"redaction"},
    "cluster_spec": {"redaction", "spec_part"},
    "compute_spec": {"spec_part"},
    "spec": {"cluster_spec", "compute_spec", "config_file", "errors", "redaction", "spec_part"},
    "fields": {"errors", "spec"},
    "storage": {"errors", "redaction", "terminal"},
}
_ALL = set(GROUND)
STATIONS = {
    "probes": set(),
    "rows": _ALL,
    "sources": _ALL | {"rows"},
    "checkpoint": _ALL | {"rows"},
    "table": _ALL | {"rows"},
    "prepare": _ALL | {"checkpoint", "rows"},
    "model": _ALL | {"checkpoint", "prepare", "rows"},
}
_STATIONS = _ALL | set(STATIONS)
ALLOWED = {
    **GROUND,
    **STATIONS,
    "inputs": _ALL | {"checkpoint", "rows", "sources", "table"},
    "api": _STATIONS | {"embeddings", "pipeline", "promotion"},
    "embeddings": _STATIONS | {"evaluate", "run"},
    "encoding": _STATIONS,
    "mteb": _STATIONS | {"encoding", "evaluate"},
    "exchange": _ALL | {"rows", "sources", "table"},
    "evaluate": _STATIONS,
    "run": _STATIONS | {"evaluate", "inputs"},
    "deletion": _STATIONS | {"run"},
    "first_config": _ALL | {"rows", "sources"},
    "doctor": _STATIONS | {"inputs", "manifest", "promotion"},
    "manifest": _ALL,
    "promotion": _STATIONS | {"evaluate", "inputs", "run"},
    "pipeline": _STATIONS | {"evaluate", "exchange", "inputs", "promotion", "run"},
    "bench": _STATIONS | {"inputs", "pipeline", "run"},
    "cli": _STATIONS
    | {"api", "bench", "deletion", "embeddings", "doctor", "exchange", "first_config", "manifest"}
    | {"pipeline", "promotion"},
    "__init__": _STATIONS
    | {"api", "deletion", "embeddings", "encoding", "exchange", "pipeline", "promotion"},
}
# Of those that take seconds to import; within a function in the files that are named.
HEAVY = {
    "ray": {
        "run",
        "evaluate",
        "bench",
        "table/reading.py",
        "model/meter.py",
    },
    "torch": {"model", "bench", "devices.py"},
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
    inner = path.removeprefix("fmembed/")
    room = inner.split("/")[0].removesuffix(".py")
    found = imports(path)
    for package, where in HEAVY.items():
        if any(i == package or i.startswith(package + ".") for i in found):
            assert room in where or inner in where, f"{path} imports {package}"
    rooms = {i.split(".")[1] for i in found if i.startswith("fmembed.")} - {"__version__", room}
    assert rooms <= ALLOWED[room], f"{path} imports {rooms - ALLOWED[room]}"


def test_jobs_have_no_logic_of_their_own() -> None:
    jobs = sorted((ROOT / "jobs").glob("*.py"))
    assert jobs
    for job in jobs:
        assert len(job.read_text(encoding="utf-8").splitlines()) < 60
        # digits.py makes an example's dataset, and needs none of the project.
        assert {i for i in imports(str(job)) if i.startswith("fmembed")} <= {"fmembed.cli.main"}
