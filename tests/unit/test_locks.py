"""The locks say what constraints.txt says, and no file of another hash is installed."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

ENTRY = re.compile(
    r"^([A-Za-z0-9._-]+)==(\S+)(?: ;.*)? \\\n((?:    --hash=sha256:[0-9a-f]{64}.*\n)+)", re.M
)


def entries(name: str) -> dict[str, tuple[str, str]]:
    """Package to its version and its whole entry, of a lock."""
    text = (ROOT / name).read_text(encoding="utf-8")
    found = {canonical(m[1]): (m[2], m[0]) for m in ENTRY.finditer(text)}
    assert len(found) == text.count("==")
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_both_locks_together_are_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    demo, test = entries("demo.lock"), entries("test.lock")
    assert not demo.keys() & test.keys()
    locked = {name: version for name, (version, _) in (demo | test).items()}
    pinned = {canonical(name): version for name, version in pins.items()}
    del pinned["torch"]
    assert locked == pinned
    assert "-r demo.lock\n" in (ROOT / "test.lock").read_text(encoding="utf-8")


@pytest.mark.parametrize("is_spoiled", [False, True])
def test_a_file_of_another_hash_is_not_installed(is_spoiled: bool, tmp_path: Path) -> None:
    """As jobs/install.sh does it, with a lock of one package and an index of one file."""
    (tmp_path / "jobs").mkdir()
    shutil.copy(ROOT / "jobs" / "install.sh", tmp_path / "jobs")
    wheel = tmp_path / "index" / "small-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("small.py", "")
        about = "small-1.0.dist-info"
        file.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n")
        file.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
        file.writestr(f"{about}/RECORD", "")
    known = hashlib.sha256(wheel.read_bytes()).hexdigest()
    lock = f"small==1.0 --hash=sha256:{'0' * 64 if is_spoiled else known}\n"
    for name in ("demo.lock", "test.lock", "constraints.txt", "pyproject.toml"):
        (tmp_path / name).write_text(lock if name == "demo.lock" else "", encoding="utf-8")
    # Instead of a virtual environment, which takes seconds to make.
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@" --target {tmp_path}/installed\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", "-euc", "source jobs/install.sh demo"],
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel.parent)},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    # Either way there is no project to install here.
    assert done.returncode != 0
    assert ("DO NOT MATCH THE HASHES" in done.stderr) == is_spoiled, done.stderr
    assert (tmp_path / "installed" / "small.py").exists() != is_spoiled
