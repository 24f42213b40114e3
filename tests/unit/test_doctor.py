"""What is wrong is found before a run finds out, and nothing is where all is well."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import resource
import shutil
import socket
import time
from collections import namedtuple
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from refreshing import Corpus, row
from weeks import StoreYear

from fmembed import cli, doctor
from fmembed.doctor import Finding, examine
from fmembed.rows.ids import LeftOut, keys_of
from fmembed.storage import Storage
from fmembed.table.lock import Lock
from fmembed.table.store import Store
from fmembed.table.table import Table

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def corpus(tmp_path: Path, minilm: Path) -> Corpus:
    """With a table in step with it."""
    made = Corpus(tmp_path, minilm)
    made.write("a.jsonl", [row(f"k{i}") for i in range(12)])
    made.refresh()
    return made


def off(found: list[Finding]) -> dict[str, Finding]:
    return {f.name: f for f in found if f.state != "ok"}


def test_nothing_is_found_where_all_is_well(corpus: Corpus) -> None:
    began = time.monotonic()
    found = examine(corpus.spec)
    assert time.monotonic() - began < 10
    assert not off(found), off(found)
    names = {f.name for f in found}
    assert {"packages", "devices", "source", "model", "output", "storage", "clock"} <= names
    assert {"lock", "parts", "keys", "retention", "ray"} <= names
    assert not off(examine(str(corpus.out)))
    assert not off(examine())


Plant = Callable[[Corpus, pytest.MonkeyPatch], Any]


def _spec(**fields: Any) -> Plant:
    def plant(corpus: Corpus, _: pytest.MonkeyPatch) -> Any:
        raw = corpus.spec.model_dump(mode="json", exclude_unset=True)
        for dotted, value in fields.items():
            part, name = dotted.split("__")
            raw[part][name] = value
        path = corpus.folder.parent / "config.yaml"
        path.write_text(json.dumps(raw))
        return path

    return plant


def _no_package(_: Corpus, patch: pytest.MonkeyPatch) -> None:
    known = importlib.metadata.version

    def version(name: str) -> str:
        return "2.59.0" if name == "ray" else known(name)

    patch.setattr(importlib.metadata, "version", version)


def _cpu_build(_: Corpus, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(doctor, "sees_cuda_driver", lambda: True)


def _few_files(_: Corpus, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(resource, "getrlimit", lambda _: (1024, 4096))


def _small(folder: str) -> Plant:
    def plant(_: Corpus, patch: pytest.MonkeyPatch) -> None:
        known = shutil.disk_usage

        def usage(path: Any) -> Any:
            return Usage(2**26, 0, 2**26) if str(path) == folder else known(path)

        patch.setattr(shutil, "disk_usage", usage)

    return plant


def _cache(corpus: Corpus, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("XDG_CACHE_HOME", "/proc/nowhere")


def _address(address: str) -> Plant:
    def plant(_: Corpus, patch: pytest.MonkeyPatch) -> None:
        patch.setenv("RAY_ADDRESS", address)

    return plant


def _key(corpus: Corpus, patch: pytest.MonkeyPatch) -> Any:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    patch.delenv("OPENAI_API_KEY", raising=False)
    endpoint = {"base_url": f"http://127.0.0.1:{port}/v1"}
    return _spec(model__endpoint=endpoint, model__dtype="auto")(corpus, patch)


def _extra(corpus: Corpus, patch: pytest.MonkeyPatch) -> Any:
    known = importlib.util.find_spec
    patch.setattr(importlib.util, "find_spec", lambda n: None if n == "peft" else known(n))
    return _spec(model__adapter="./adapter")(corpus, patch)


def _cut_weights(corpus: Corpus, patch: pytest.MonkeyPatch) -> Any:
    folder = corpus.folder.parent / "model"
    shutil.copytree(str(corpus.spec.model.id), folder)
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    return _spec(model__id=str(folder))(corpus, patch)


def _no_conditions(_: Corpus, patch: pytest.MonkeyPatch) -> None:
    def create(self: Storage, path: str, content: bytes) -> bool:
        self.put(path, content)
        return True

    patch.setattr(Storage, "create", create)


def _clock(_: Corpus, patch: pytest.MonkeyPatch) -> None:
    hour = timedelta(hours=1)
    patch.setattr(Storage, "modified", lambda *_: datetime.now(UTC) - hour)


def _dead_lock(corpus: Corpus, _: pytest.MonkeyPatch) -> None:
    owner = {
        "run": "r", "host": "other", "machine": "another", "pid": 1, "started": "2026-01-01",
    }  # fmt: skip
    path = corpus.out / "_lock/00000099.json"
    path.write_text(json.dumps(owner))
    os.utime(path, (0, time.time() - 3600))


def _stray(corpus: Corpus, _: pytest.MonkeyPatch) -> None:
    (part,) = Table(str(corpus.out)).rows.parts()
    half = f"part-{'0' * 32}.parquet#01234567.tmp"
    shutil.copy(corpus.out / part.path, corpus.out / half)


def _keys(corpus: Corpus, _: pytest.MonkeyPatch) -> None:
    for path in (corpus.out / "_keys").iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def _part(corpus: Corpus, _: pytest.MonkeyPatch) -> None:
    (part,) = Table(str(corpus.out)).rows.parts()
    (corpus.out / part.path).unlink()


def _record(corpus: Corpus, _: pytest.MonkeyPatch) -> None:
    for path in (corpus.out / "_runs").iterdir():
        path.unlink()


def _pending(corpus: Corpus, _: pytest.MonkeyPatch) -> None:
    Table(str(corpus.out)).deleted.begin(LeftOut(keys_of(["k3"]), keys_of([])))


def _aside(corpus: Corpus, _: pytest.MonkeyPatch) -> None:
    (corpus.out / "_quarantine").mkdir()
    (corpus.out / "_quarantine/part").write_bytes(b"x")


def _unkept(corpus: Corpus, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(doctor, "_MIN_HELD", 0)  # of a table so small nobody cares
    for i in range(6):
        corpus.write("a.jsonl", [row(f"k{n}", f"{i} {n}") for n in range(12)])
        corpus.refresh()


PLANTED: dict[str, tuple[Plant, str, str]] = {
    # what is planted: how, which check finds it, in which words
    "a wrong field": (_spec(source__inputs="x"), "config", "unknown key"),
    "no such source": (_spec(source__uri="/nowhere/at/all"), "source", "no such"),
    "no such column": (_spec(source__label="colour"), "source", "colour"),
    "no such model": (_spec(model__id="./nowhere"), "model", "no such folder"),
    "weights that are cut": (_cut_weights, "model", "model.safetensors"),
    "an extra that is missing": (_extra, "model", "needs the package peft: pip install"),
    "another model's table": (_spec(model__max_tokens=64), "output", "another model or setting"),
    "an output nobody may write": (_spec(output__uri="/proc/out"), "output", "/proc/out"),
    "a server that is down": (_key, "endpoint", "does not answer"),
    "a key that is not set": (_key, "key", "OPENAI_API_KEY is not set"),
    "another Ray": (_no_package, "packages", "ray is 2.59.0"),
    "torch without CUDA": (_cpu_build, "devices", "which cannot use it"),
    "few open files": (_few_files, "open files", "ulimit"),
    "little shared memory": (_small("/dev/shm"), "shared memory", "--shm-size"),  # noqa: S108
    "a full disk": (_small("/tmp"), "spill disk", "RAY_TMPDIR"),  # noqa: S108
    "no cache": (_cache, "cache", "XDG_CACHE_HOME"),
    "no cluster": (_address("127.0.0.1:1"), "cluster", "no Ray cluster answers"),
    "a dashboard's address": (_address("http://head:8265"), "cluster", "dashboard"),
    "no conditional writes": (_no_conditions, "storage", "conditional writes"),
    "a clock that is wrong": (_clock, "clock", "3,600 s apart"),
    "a dead run's lock": (_dead_lock, "lock", "no heartbeat"),
    "files of dead runs": (_stray, "strays", "take room"),
    "keys that are damaged": (_keys, "keys", "do not tell"),
    "a part that is gone": (_part, "parts", "missing or cut"),
    "a record that is gone": (_record, "record", "stopped before its end"),
    "a delete that was killed": (_pending, "deleted", "a delete was stopped"),
    "files set aside": (_aside, "quarantine", "_quarantine"),
    "versions that nobody vacuums": (_unkept, "retention", "fmembed vacuum"),
}


@pytest.mark.parametrize("what", PLANTED)
def test_what_is_planted_is_found(
    what: str, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, name, words = PLANTED[what]
    config = plant(corpus, monkeypatch) or corpus.spec
    found = off(examine(config))
    assert name in found, found
    assert words in found[name].line()
    assert found[name].remedy or found[name].state == "wrong"


def test_a_promoted_version_that_is_gone_is_found(
    tmp_path: Path, minilm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    year = StoreYear(tmp_path / "year", str(tmp_path / "store"), str(minilm), 40, {"first": 1.0})
    year.refresh("first")
    assert not off(examine(year.store))
    assert not off(examine(year.spec("first")))
    table = Table(Store.open(year.store).uri_of(Store.open(year.store).names()[0]))
    with Lock(table.storage, "other"):
        (told,) = [f for f in examine(year.store) if f.name == "lock"]
        assert "run other" in told.words
    for part in table.rows.parts():
        (Path(table.uri) / part.path).unlink()
    assert off(examine(year.store))["store"].state == "wrong"
    assert cli.run(["doctor", year.store]) == 1
    assert "wrong  store" in capsys.readouterr().out
    assert cli.run(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"]


def test_the_faults_of_a_manifest_are_told(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    config = "jobs/configs/cluster/kuberay.yaml"
    assert cli.run(["manifest", config, "--kind", "rayjob", "--output", str(path)]) == 0
    assert not off(examine(path))
    path.write_text(path.read_text().replace("activeDeadlineSeconds", "activeDeadline"))
    found = off(examine(path))
    assert found["manifest"].state == "wrong"
    assert "activeDeadline" in found["manifest"].words
