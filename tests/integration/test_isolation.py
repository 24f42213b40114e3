"""What lies in the folder of a run is never imported, and nobody else on the network gets in."""

from __future__ import annotations

import ipaddress
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import ROOT, write_jsonl

# Of the standard library, of what a run imports, and of what libraries look for and do without.
PLANTED = (
    "json", "random", "sitecustomize", "usercustomize", "encodings", "numpy", "pyarrow", "yaml",
    "ray", "torch", "transformers", "tokenizers", "sklearn", "joblib", "deltalake", "safetensors",
    "torchvision", "tensorflow", "jax", "uvloop", "socks", "typing_extensions",
)  # fmt: skip
SCRIPT = "import fmembed; fmembed.embed(fmembed.RunSpec.from_yaml('run.yaml'))\n"


def plant(folder: Path, marks: Path, names: tuple[str, ...]) -> None:
    """Modules that leave a mark where they are run, and are of no other use."""
    marks.mkdir()
    for i, name in enumerate(names):
        file = folder / name / "__init__.py" if i % 2 else folder / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"open({str(marks / name)!r}, 'w').close()\n", encoding="utf-8")


def listening(process: psutil.Process) -> set[Any]:
    """The addresses at which a process and all below it take connections."""
    found = set()
    for p in [process, *process.children(recursive=True)]:
        try:
            found |= {c.laddr.ip for c in p.net_connections("tcp") if c.status == "LISTEN"}
        except psutil.Error:  # it has just ended
            continue
    return found


def run(command: list[str], cwd: Path) -> set[str]:
    """Run to the end; the addresses at which it listened meanwhile."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    errors = cwd.parent / "errors"
    with errors.open("w") as file:
        driver = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=file
        )
    addresses: set[str] = set()
    tree = psutil.Process(driver.pid)
    while driver.poll() is None:
        addresses |= listening(tree)
        time.sleep(0.2)
    assert driver.returncode == 0, errors.read_text()
    return addresses


def is_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


@pytest.mark.parametrize("way", ["console", "module", "job", "script"])
def test_a_run_imports_nothing_of_its_folder_and_listens_on_loopback(
    way: str, tmp_path: Path, tiny_bert: Path
) -> None:
    cwd, marks = tmp_path / "data", tmp_path / "marks"
    cwd.mkdir()
    # With -m Python itself takes a fmembed.py of the current folder for this package.
    plant(cwd, marks, PLANTED if way == "module" else (*PLANTED, "fmembed"))
    write_jsonl(cwd / "in.jsonl", [{"text": f"a b {i}", "l": "xy"[i % 2]} for i in range(40)])
    config = {
        "source": {"uri": "in.jsonl", "label": "l"},
        "model": {"id": str(tiny_bert), "dtype": "float32"},
        "output": {"uri": "out"},
        "probes": ["knn"],
    }
    (cwd / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    script = tmp_path / "scripts" / "mine.py"
    script.parent.mkdir()
    script.write_text(SCRIPT, encoding="utf-8")
    command = {
        "console": [str(Path(sys.executable).with_name("fmembed")), "embed"],
        "module": [sys.executable, "-m", "fmembed.cli", "embed"],
        "job": [sys.executable, str(ROOT / "jobs" / "embed.py")],
        "script": [sys.executable, str(script)],
    }[way]
    addresses = run([*command, "run.yaml"], cwd)
    assert [p.name for p in marks.iterdir()] == []
    assert (cwd / "out" / "_report.html").is_file()
    assert addresses
    assert all(map(is_loopback, addresses)), addresses
