"""One run at a time on a table: a lock that a dead run cannot keep.

    <table>/_lock/<generation>.json    who holds the table; the highest generation counts

Only "create unless there" is asked of storage, which local disks and all clouds do atomically. The
holder rewrites its own object every few seconds; whoever wants the table and finds another's lock
watches it, by its own clock, until it changes (refused) or stays the same for too long (taken over
by creating the next generation). A released lock stays as the last generation, marked so: numbers
never come twice, so that a slow watcher cannot create one that was already used.

The lock is for people: it tells the second who is first. What keeps a table exact even where a lock
fails (a machine that slept through its own heartbeat) is that a commit is refused unless the table
is as the run last saw it: see `log.Log.commit`.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fmembed import terminal
from fmembed.errors import LockedError, StorageError
from fmembed.storage import Storage

BEAT_S = 5.0
EXPIRE_S = 30.0

_GENERATION = re.compile(r"_lock/(\d{8,18})\.json")
_LAST = 10**18 - 1
# What an owner writes of itself, and as what; anything else is no lock of this project.
_OWNER = {"run": str, "host": str, "machine": str, "pid": int, "started": str}
_MAX_TRIES = 20


class Lock:
    """Hold a table from `with` to its end."""

    def __init__(
        self,
        storage: Storage,
        run_id: str,
        beat_s: float = BEAT_S,
        expire_s: float = EXPIRE_S,
        waits: bool = False,
    ) -> None:
        """Prepare; nothing is written yet.

        Args:
            storage: The table's.
            run_id: Whose lock.
            beat_s: Seconds between heartbeats.
            expire_s: Seconds without one after which a lock counts as left by a dead run.
            waits: Wait for the end of whoever holds it.
        """
        self._storage = storage
        self._beat_s, self._expire_s, self._waits = beat_s, expire_s, waits
        self._generation = 0
        self._beats = 0
        self._last_beat = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._owner: dict[str, Any] = {
            "run": run_id,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "process_started": _started(os.getpid()),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def __enter__(self) -> Lock:
        """Take the lock.

        Raises:
            LockedError: Another run is alive; the message names its host, pid and start.
        """
        for _ in range(_MAX_TRIES):
            if self._try_for_long():
                break
        else:
            raise StorageError(
                f"output.uri: the lock of {self._storage.uri} can be neither listed nor created; "
                "nothing was changed, run the same command again"
            )
        self._thread = threading.Thread(target=self._beat_on, name="fmembed-lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            if self._newest()[0] == self._generation:
                self._storage.put(_path(self._generation), self._content(released=True))
        except StorageError:
            # Storage is out of reach; the heartbeat has stopped, which says the same.
            pass

    def check(self) -> None:
        """Make sure that the lock is still ours; called before every commit.

        Raises:
            LockedError: Another run has taken the table over.
        """
        generation, other = self._newest()
        if generation != self._generation:
            raise LockedError(
                f"output.uri: {self._storage.uri} was taken over by {_name(other)} while this run "
                "was out of reach; what was committed stays, run the same command again later"
            )

    def _try_for_long(self) -> bool:
        told = ""
        while True:
            try:
                return self._try()
            except LockedError as e:
                if not self._waits:
                    raise
                who = str(e).partition("; ")[0]
                if who != told:
                    terminal.say(f"{who}; waiting for its end")
                told = who
                time.sleep(self._beat_s)

    def _try(self) -> bool:
        generation, owner = self._newest()
        if generation == _LAST:
            raise StorageError(
                f"output.uri: {self._storage.uri}/{_path(generation)} is the lock of no run, which "
                "count from one; delete it"
            )
        if owner is not None and not owner.get("released"):
            self._wait_until_dead(generation, owner)
        self._generation = generation + 1
        if not self._storage.create(_path(self._generation), self._content()):
            return False
        self._last_beat = time.monotonic()
        generations = _generations(self._storage)
        if generations[-1] != self._generation:
            # A slow watcher: the number had been used and removed meanwhile.
            self._storage.delete(_path(self._generation))
            return False
        for old in generations[:-1]:
            self._storage.delete(_path(old))
        return True

    def _wait_until_dead(self, generation: int, owner: dict[str, Any]) -> None:
        """Return once the owner is dead.

        Raises:
            LockedError: It is alive.
        """
        if owner["machine"] == self._owner["machine"]:
            started = _started(owner["pid"])
            if started is None or started != owner.get("process_started"):
                return
            raise self._refuse(owner)
        terminal.say(
            f"{self._storage.uri} is locked by {_name(owner)}; waiting up to "
            f"{self._expire_s:g} s for its heartbeat"
        )
        deadline = time.monotonic() + self._expire_s
        while time.monotonic() < deadline:
            time.sleep(min(self._beat_s / 4, 1.0))
            now, seen = self._newest()
            if seen is None or seen.get("released"):
                return
            if (now, seen) != (generation, owner):
                raise self._refuse(seen)

    def _refuse(self, owner: dict[str, Any]) -> LockedError:
        return LockedError(
            f"output.uri: {self._storage.uri} is being written by {_name(owner)}; wait until it "
            "ends or stop it, then run the same command again"
        )

    def _newest(self) -> tuple[int, dict[str, Any] | None]:
        for _ in range(_MAX_TRIES):
            generations = _generations(self._storage)
            if not generations:
                return 0, None
            try:
                content = self._storage.get(_path(generations[-1]))
            except FileNotFoundError:
                continue  # replaced by the next one between the two calls
            return generations[-1], _parse_owner(content)
        raise StorageError(
            f"output.uri: storage lists a lock in {self._storage.uri} that it does not have; "
            "nothing was changed, run the same command again"
        )

    def _content(self, released: bool = False) -> bytes:
        beat = {"beats": self._beats, "released": released}
        return json.dumps({**self._owner, **beat}).encode()

    def _beat_on(self) -> None:
        while not self._stop.wait(self._beat_s):
            self._beats += 1
            try:
                self._storage.put(_path(self._generation), self._content())
            except StorageError:
                continue  # the commit will say what is wrong with storage


def holder(storage: Storage) -> str:
    """Who holds the lock of a table, by what is written of it; empty where that is nobody."""
    generations = _generations(storage)
    if not generations:
        return ""
    try:
        owner = _parse_owner(storage.get(_path(generations[-1])))
    except FileNotFoundError:
        return ""
    if owner.get("released"):
        return ""
    if owner["machine"] == _machine():
        started = _started(owner["pid"])
        if started is None or started != owner.get("process_started"):
            return ""
    return _name(owner)


def held_for(storage: Storage) -> float | None:
    """Seconds since the lock's last heartbeat, by two clocks; None where there is no lock."""
    generations = _generations(storage)
    try:
        written = storage.modified(_path(generations[-1])) if generations else None
    except FileNotFoundError:
        return None
    return None if written is None else (datetime.now(UTC) - written).total_seconds()


def _parse_owner(content: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(content)
    except (ValueError, RecursionError):
        owner = None
    if isinstance(owner, dict) and all(isinstance(owner.get(n), k) for n, k in _OWNER.items()):
        return owner
    # Not written here: whoever did gets the time of a heartbeat.
    return dict.fromkeys(_OWNER, "unknown") | {"pid": 0}


def _generations(storage: Storage) -> list[int]:
    found = (_GENERATION.fullmatch(path) for path in storage.paths("_lock/"))
    return sorted(int(match[1]) for match in found if match)


def _path(generation: int) -> str:
    return f"_lock/{generation:08d}.json"


def _name(owner: dict[str, Any] | None) -> str:
    o = owner or {}
    return (
        f"run {o.get('run')} on host {o.get('host')}, pid {o.get('pid')}, "
        f"started {o.get('started')}"
    )


def _machine() -> str:
    """This boot of this machine, and this container on it: where a pid means something."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}-{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()}-{sys.platform}"


def _started(pid: int) -> str | None:
    """When a process of this machine started, in the kernel's ticks; None where it is gone.

    A pid alone is reused; a zombie that nobody has waited for is gone, though its pid is taken.
    """
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux: the pid has to do
        return "unknown"
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]
