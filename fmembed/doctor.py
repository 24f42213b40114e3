"""What is wrong here, before a run finds out: this machine, a config, and what it names.

Each check looks at one thing and says what it found, and where that is wrong or slow what to do.
Ray is not started; nothing is changed but for one small object, which storage is tried with.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from packaging.requirements import Requirement

from fmembed import __version__, cache
from fmembed.checkpoint.files import list_weight_files, locate, read_config
from fmembed.checkpoint.opening import list_modalities, open_checkpoint
from fmembed.devices import cpu_has_bfloat16, cpu_name, sees_cuda_driver
from fmembed.errors import DamagedError, FmembedError, TableError, reason
from fmembed.inputs import open_inputs
from fmembed.manifest.check import check_file, is_manifest
from fmembed.promotion import fault_of
from fmembed.sources.opening import open_source
from fmembed.spec import RunSpec
from fmembed.startup import check_address, joins_cluster
from fmembed.storage import Storage
from fmembed.table.lock import EXPIRE_S, held_for, holder
from fmembed.table.store import Store
from fmembed.table.table import Table
from fmembed.table.versions import list_versions

State = Literal["ok", "slow", "wrong"]
_PYTHON = (3, 11)
# As Ray takes for its store by itself: a share of the memory, and where it keeps what does not fit.
_STORE_SHARE, _SHM, _SPILL = 0.3, Path("/dev/shm"), Path("/tmp")  # noqa: S108 - Ray's own
# Ray's own advice: each worker and object takes some.
_MIN_FILES = 4096
_ANSWER_S = 3.0
_SLOW_STORAGE_S = 1.0
# Versions and heartbeats are told apart by time.
_MAX_SKEW_S = 30.0
# Weights that are digested in some seconds.
_DIGESTED_BYTES = 4 * 2**30
# All versions' bytes beside the newest one's: 1 % changed each week makes a third of it in a month.
_MAX_HELD, _MIN_HELD = 4.0, 2**26
# Keys of a table so large are compared with its rows in some seconds.
_COMPARED_BYTES = 2**28


@dataclass(frozen=True)
class Finding:
    """What one check has found; `remedy` is empty where nothing is to be done."""

    name: str
    state: State
    words: str
    remedy: str = ""

    def line(self) -> str:
        """For people: three columns, and what to do."""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.state:<6} {self.name:<12} {self.words}{remedy}"


@dataclass
class _Subject:
    """What is looked at: a spec, and what of it could be opened."""

    spec: RunSpec | None = None
    table: Table | None = None
    store: Store | None = None
    manifest: str | None = None
    storages: list[Storage] = field(default_factory=list)


_Check = Callable[[_Subject], Iterator[Finding]]


def examine(
    config: str | Path | RunSpec | None = None, overrides: dict[str, Any] | None = None
) -> list[Finding]:
    """Look at this machine, and at what a config names, or a table or a store.

    Args:
        config: A YAML config or a spec; or the folder or URL of a table or a store; or a file of
            `fmembed manifest`; None for the machine alone.
        overrides: Dotted field names to values, laid over a config.

    Returns:
        What each check has found, in order; whatever fails in one, the others are made.
    """
    subject, found = _Subject(), []
    checks: list[_Check] = [_versions, _machine, _cluster]
    if config is not None:
        try:
            _open(subject, config, overrides or {})
        except FmembedError as e:
            found.append(_refused("config", e))
    if subject.spec is not None:
        checks += [_source, _model, _output]
    checks += [_manifest, _storage, _lock, _rows, _retention, _promoted]
    for check in checks:
        try:
            found += check(subject)
        except FmembedError as e:
            found.append(_refused(check.__name__.strip("_"), e))
    return found


def _open(subject: _Subject, config: str | Path | RunSpec, overrides: dict[str, Any]) -> None:
    if isinstance(config, RunSpec):
        subject.spec = config
    elif (store := Store.find(config)) is not None:
        subject.store = store
        subject.storages = [store.storage]
        current = store.current()
        if current is not None:
            subject.table = Table(store.uri_of(current.table))
    elif "://" in str(config) or Path(config).expanduser().is_dir():
        subject.table = Table.open(config)
        subject.storages = [subject.table.storage]
    elif is_manifest(str(config)):
        subject.manifest = str(config)
    else:
        subject.spec = RunSpec.from_yaml(str(config), overrides)
    if (spec := subject.spec) is not None:
        where = spec.output.store or spec.output.uri
        subject.storages = [Storage(where)]
        if spec.output.store is not None:
            subject.store = Store.find(where)


def _refused(name: str, error: FmembedError) -> Finding:
    said, _, remedy = str(error).rpartition("; ")
    return Finding(name, "wrong", said or remedy, remedy if said else "")


def _versions(_subject: _Subject) -> Iterator[Finding]:
    """Python, and each package that this one needs."""
    told = f"fmembed {__version__}, Python {platform.python_version()}"
    if sys.version_info[:2] < _PYTHON:
        yield Finding("python", "wrong", told, f"install Python {'.'.join(map(str, _PYTHON))}")
        return
    wrong = []
    for line in importlib.metadata.requires("fmembed") or ():
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{needed.name} is not installed (needs {needed.specifier})")
            continue
        if not needed.specifier.contains(version, prereleases=True):
            wrong.append(f"{needed.name} is {version} (needs {needed.specifier})")
    if wrong:
        yield Finding(
            "packages", "wrong", "; ".join(wrong), "pip install -c constraints.txt fmembed"
        )
        return
    names = ("ray", "torch", "transformers", "pyarrow", "deltalake")
    yield Finding(
        "packages", "ok",
        ", ".join([told, *(f"{n} {importlib.metadata.version(n)}" for n in names)]),
    )  # fmt: skip


def _machine(_subject: _Subject) -> Iterator[Finding]:
    """Devices, memory, and what Ray will need of both."""
    cpu = f"{os.cpu_count()} CPUs ({cpu_name()}{', bfloat16' if cpu_has_bfloat16() else ''})"
    torch = importlib.metadata.version("torch")
    if sees_cuda_driver() and "+cpu" in torch:
        yield Finding(
            "devices", "wrong", f"{cpu}, a GPU's driver, and torch {torch}, which cannot use it",
            "install torch's build for CUDA",
        )  # fmt: skip
    else:
        yield Finding("devices", "ok", cpu + (", a GPU" if sees_cuda_driver() else ", no GPU"))
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield _finding(
        "open files", files >= _MIN_FILES or files == resource.RLIM_INFINITY,
        f"a process may open {files:,}", f"ulimit -n {_MIN_FILES * 16}",
    )  # fmt: skip
    if joins_cluster():
        return  # the nodes' own
    store_bytes = int(_memory_bytes() * _STORE_SHARE)
    shared = shutil.disk_usage(_SHM).free if _SHM.is_dir() else 0
    yield _finding(
        "shared memory", shared >= store_bytes,
        f"{_gib(shared)} in {_SHM}, of which Ray's object store would take {_gib(store_bytes)}",
        "a container takes --shm-size; with less Ray keeps objects on disk",
    )  # fmt: skip
    free = shutil.disk_usage(_SPILL).free
    yield _finding(
        "spill disk", free >= store_bytes,
        f"{_gib(free)} free in {_SPILL}, where Ray puts what its store of {_gib(store_bytes)} does "
        "not hold",
        "free some, or name another folder by RAY_TMPDIR",
    )  # fmt: skip
    folder = cache.folder()
    if not _is_writable(folder):
        yield Finding(
            "cache", "slow", f"{folder} cannot be written to, so that nothing is remembered",
            "set XDG_CACHE_HOME or HOME to a folder of this user's",
        )  # fmt: skip


def _cluster(_subject: _Subject) -> Iterator[Finding]:
    if not joins_cluster():
        yield Finding("ray", "ok", "RAY_ADDRESS is unset: Ray is started on this machine")
        return
    address = os.environ["RAY_ADDRESS"]
    check_address(address)
    yield Finding("ray", "ok", f"a cluster answers at {address} (RAY_ADDRESS)")


def _source(subject: _Subject) -> Iterator[Finding]:
    spec = subject.spec
    assert spec is not None
    try:
        modalities = list_modalities(spec.model)
    except FmembedError:
        modalities = ("text", "image", "audio")  # said of the model
    source = open_source(spec.source, modalities)
    passed_over = "".join(f"; not read: {n:,} {why}" for why, n in source.passed_over.items())
    yield Finding(
        "source", "ok",
        f"{len(source.shards):,} shards of {source.format}, {source.num_bytes / 2**20:,.1f} MiB"
        + passed_over,
    )  # fmt: skip


def _model(subject: _Subject) -> Iterator[Finding]:
    spec = subject.spec
    assert spec is not None
    if (endpoint := spec.model.endpoint) is not None:
        yield from _endpoint(endpoint.base_url, endpoint.api_key_env)
        return
    modalities = list_modalities(spec.model)
    folder = locate(spec.model.id, spec.model.revision)
    config = read_config(folder) if (folder / "config.json").is_file() else {}
    num_bytes = sum(p.stat().st_size for p in list_weight_files(folder, config)) if config else 0
    if num_bytes <= _DIGESTED_BYTES:
        open_checkpoint(spec.model, cpu_has_bfloat16(), modalities[0])
    yield Finding(
        "model", "ok", f"{spec.model.id} embeds {' or '.join(modalities)}, {_gib(num_bytes)}"
    )


def _endpoint(url: str, name: str) -> Iterator[Finding]:
    parts = urlsplit(url)
    try:
        socket.create_connection(
            (parts.hostname or "", parts.port or {"https": 443}.get(parts.scheme, 80)), _ANSWER_S
        ).close()
        yield Finding("endpoint", "ok", f"{url} answers")
    except OSError as e:
        yield Finding("endpoint", "wrong", f"{url} does not answer ({reason(e)})", "start it")
    yield _finding(
        "key", name in os.environ, f"{name} is {'set' if name in os.environ else 'not set'}",
        "export it, with the server's key", "wrong",
    )  # fmt: skip


def _output(subject: _Subject) -> Iterator[Finding]:
    """All of the inputs together, as a run opens them: the table is this config's."""
    spec = subject.spec
    assert spec is not None
    try:
        inputs = open_inputs(spec, may_be_empty=True)
    except (TableError, DamagedError) as e:
        yield _refused("output", e)
        return
    except FmembedError:
        return  # said of the source or the model
    card = inputs.table.card()
    if card is None:
        yield Finding("output", "ok", f"{inputs.table.uri} is not there yet")
        return
    subject.table = inputs.table
    rows = sum(part.num_rows for part in inputs.table.rows.parts())
    yield Finding("output", "ok", f"{inputs.table.uri} has {rows:,} rows of this model")


def _manifest(subject: _Subject) -> Iterator[Finding]:
    if (path := subject.manifest) is None:
        return
    found = check_file(path)
    for each in found:
        yield Finding("manifest", "wrong" if each.is_fault else "slow", str(each))
    if not found:
        yield Finding("manifest", "ok", f"{path} holds")


def _storage(subject: _Subject) -> Iterator[Finding]:
    """Write, write where there is something, list, read, delete; and its clock."""
    for storage in subject.storages:
        began, path = time.monotonic(), f".probe-{uuid.uuid4().hex}"
        if storage.local is not None and not storage.local.is_dir():
            if not _is_writable(storage.local):
                yield Finding(
                    "storage", "wrong", f"{storage.uri} cannot be made by this user",
                    "give a folder that it may write to",
                )  # fmt: skip
            continue
        try:
            is_first = storage.create(path, b"1")
            is_second = storage.create(path, b"2")
            is_listed = path in storage.paths()
            content, modified = storage.get(path), storage.modified(path)
        finally:
            storage.delete(path)
        seconds, now = time.monotonic() - began, datetime.now(UTC)
        if not is_first or is_second or content != b"1":
            yield Finding(
                "storage", "wrong",
                f"{storage.uri} writes over what is there where it is asked not to",
                "runs could not keep out of each other's way: use storage with conditional writes",
            )  # fmt: skip
        elif not is_listed:
            yield Finding(
                "storage", "wrong", f"{storage.uri} does not list what was just written",
                "use storage that is consistent after a write",
            )  # fmt: skip
        else:
            is_fast = seconds <= _SLOW_STORAGE_S * 6
            yield _finding(
                "storage", is_fast, f"{storage.uri}: six requests in {seconds:.2f} s",
                "run nearer to it",
            )  # fmt: skip
        skew = abs((now - modified).total_seconds())
        yield _finding(
            "clock", skew <= _MAX_SKEW_S + seconds,
            f"this machine's clock and that of {storage.uri} are {skew:,.0f} s apart",
            "set it by NTP: versions are kept by time", "wrong",
        )  # fmt: skip


def _lock(subject: _Subject) -> Iterator[Finding]:
    if (table := subject.table) is None:
        return
    who, seconds = holder(table.storage), held_for(table.storage)
    if not who:
        yield Finding("lock", "ok", "no run is writing the table")
    elif seconds is not None and seconds > 2 * EXPIRE_S:
        yield Finding(
            "lock", "slow", f"{who} has shown no heartbeat for {seconds:,.0f} s",
            f"the next run waits {EXPIRE_S:g} s and takes it over",
        )  # fmt: skip
    else:
        yield Finding("lock", "ok", f"{who} is writing the table")


def _rows(subject: _Subject) -> Iterator[Finding]:
    """Whether the table is whole: parts, keys, records, what is left of dead runs."""
    if (table := subject.table) is None:
        return
    repair = f"fmembed verify --repair {table.uri}"
    if lost := table.lost_runs():
        yield Finding("log", "wrong", f"it no longer holds what run {lost[0]} committed", repair)
    there = table.storage.sizes("")
    parts = table.rows.parts()
    if gone := [part.path for part in parts if there.get(part.path) != part.size_bytes]:
        yield Finding(
            "parts", "wrong", f"{len(gone):,} of {len(parts):,} are missing or cut, as {gone[0]}",
            repair,
        )  # fmt: skip
        return
    yield Finding("parts", "ok", f"{len(parts):,} parts are there, whole")
    known = table.known()
    wrong = known.damaged or known.missing
    if not wrong and sum(part.size_bytes for part in parts) <= _COMPARED_BYTES:
        wrong = tuple(known.find_wrong())
    yield _finding(
        "keys", not wrong,
        f"{len(wrong):,} files of keys do not tell what the parts hold, as {wrong[0]}" if wrong
        else f"{known.num_rows:,} rows are known by their keys",
        f"rows may be left out as known: {repair}", "wrong",
    )  # fmt: skip
    writes = bool(holder(table.storage))
    if not writes and (strays := table.strays()):
        yield Finding(
            "strays", "slow", f"{len(strays):,} files of dead runs take room",
            "the next run removes them",
        )  # fmt: skip
    if not writes and table.is_uncounted():
        yield Finding(
            "record", "wrong", "the last run was stopped before its end",
            "run the same command again",
        )  # fmt: skip
    if table.deleted.was_stopped:
        yield Finding(
            "deleted", "wrong", "a delete was stopped before its end",
            "the same fmembed delete, or fmembed refresh, finishes it",
        )  # fmt: skip
    if aside := table.storage.walk("_quarantine/"):
        yield Finding(
            "quarantine", "slow", f"{len(aside):,} files that could not be read lie in _quarantine",
            "delete them once nothing of them is needed",
        )  # fmt: skip


def _retention(subject: _Subject) -> Iterator[Finding]:
    if (table := subject.table) is None or table.version() is None:
        return
    versions = [v for v in list_versions(table.uri) if v.is_whole and v.parts]
    held = sum(n for path, n in table.storage.sizes("").items() if path.startswith("part-"))
    newest = max(versions[0].num_bytes, 1) if versions else 1
    yield _finding(
        "retention", held <= max(_MAX_HELD * newest, _MIN_HELD),
        f"{len(versions):,} versions can be read; all parts take {held / 2**20:,.1f} MiB, those of "
        f"the newest {newest / 2**20:,.1f}",
        f"fmembed vacuum {table.uri}, with fewer --keep-days, or a smaller output.keep_days",
    )  # fmt: skip


def _promoted(subject: _Subject) -> Iterator[Finding]:
    if (store := subject.store) is None:
        return
    if (current := store.current()) is None:
        yield Finding(
            "store", "slow", "nothing is promoted yet, so that readers get nothing",
            f"fmembed refresh, or fmembed promote {store.uri}",
        )  # fmt: skip
        return
    if fault := fault_of(store, current):
        yield Finding(
            "store",
            "wrong",
            fault,
            f"fmembed promote another version, see fmembed status {store.uri}",
        )
        return
    refused = [t for t in store.tables() if t.gate is not None and not t.gate["passed"]]
    told = "".join(f"; refused by the gate: {t.name}" for t in refused)
    yield Finding("store", "ok", f"version {current.version} of {current.table} is promoted{told}")


def _finding(
    name: str, is_well: bool, words: str, remedy: str, otherwise: State = "slow"
) -> Finding:
    return Finding(name, "ok", words) if is_well else Finding(name, otherwise, words, remedy)


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _is_writable(path: Path) -> bool:
    """Whether files can be made in a folder, or it can be made."""
    there = next((p for p in (path, *path.parents) if p.exists()), Path("/"))
    try:
        with tempfile.TemporaryFile(dir=there):
            return True
    except OSError:
        return False


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"
