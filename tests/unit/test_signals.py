"""What a signal does: within the embed stage, outside of it, and around Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fmembed.errors import Interrupted
from fmembed.run.signals import Signals
from fmembed.signals import Stopped, kept_from_ray, raise_stopped, stop_signals

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def receive(signum: signal.Signals) -> None:
    os.kill(os.getpid(), signum)
    time.sleep(30)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {signum: signal.getsignal(signum) for signum in ALL}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.slow
@pytest.mark.parametrize("signum", ALL)
def test_a_signal_waits_for_a_commit_and_is_sent_again_until_it_is_heard(
    signum: signal.Signals,
) -> None:
    commits: Any = SimpleNamespace(is_committing=True)
    before = signal.getsignal(signum)
    with Signals(commits) as signals:
        os.kill(os.getpid(), signum)  # in the middle of a commit: nothing is raised
        commits.is_committing = False
        for _ in range(2):  # the first is lost, as in a destructor; it comes again
            with pytest.raises(Interrupted) as interrupted:
                time.sleep(30)
        signals.heard()
        assert interrupted.value.exit_code == 128 + signum
        time.sleep(1.2)  # and no more after it was heard
    assert signal.getsignal(signum) == before


def test_an_error_that_compiled_code_makes_of_a_signal_is_the_signal() -> None:
    def strike() -> None:
        try:
            receive(signal.SIGTERM)
        except Interrupted as e:
            raise SystemError("returned a result with an exception set") from e

    commits: Any = SimpleNamespace(is_committing=False)
    with pytest.raises(Interrupted) as interrupted, Signals(commits):
        strike()
    assert interrupted.value.exit_code == 128 + signal.SIGTERM
    with pytest.raises(SystemError), Signals(commits):
        raise SystemError("of its own")


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    """As nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert stop_signals() == (signal.SIGINT, signal.SIGTERM)
    commits: Any = SimpleNamespace(is_committing=False)
    with raise_stopped(), Signals(commits):
        os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("signum", ALL)
def test_a_signal_outside_of_the_embed_stage(signum: signal.Signals) -> None:
    with raise_stopped():
        with pytest.raises(Stopped) as stopped:
            receive(signum)
        assert stopped.value.exit_code == 128 + signum
        stopped.value.heard()
    assert signal.getsignal(signum) == signal.SIG_DFL


def test_a_signal_that_is_lost_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmembed.signals._KNOCK_S", 0.1)

    def lose() -> None:  # as a destructor does
        with contextlib.suppress(BaseException):
            receive(signal.SIGTERM)

    def wait() -> None:
        time.sleep(30)

    with raise_stopped():
        lose()
        with pytest.raises(Stopped) as stopped:
            wait()
        stopped.value.heard()
        time.sleep(0.3)  # and no more after it was heard


def test_ray_takes_no_signal() -> None:
    """Ray's handler for SIGTERM ends the process with 15, while it starts and for ever after."""

    @kept_from_ray()
    def start(is_stopped: bool) -> None:
        signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(signum))
        if is_stopped:
            receive(signal.SIGTERM)

    with raise_stopped():
        handler = signal.getsignal(signal.SIGTERM)
        start(False)
        assert signal.getsignal(signal.SIGTERM) == handler
        with pytest.raises(Stopped) as stopped:
            start(True)
        stopped.value.heard()


def test_what_ray_starts_outlives_a_terminal_that_goes() -> None:
    child = [sys.executable, "-c", "import signal; print(signal.pthread_sigmask(0, []))"]
    said = []

    @kept_from_ray()
    def start() -> None:
        said.append(subprocess.run(child, capture_output=True, text=True, check=True).stdout)
        # To this thread: another one, as libraries have, would take what was sent to the process.
        signal.pthread_kill(threading.get_ident(), signal.SIGHUP)  # comes afterwards, is not lost
        said.append("started")

    with raise_stopped():
        with pytest.raises(Stopped) as stopped:
            start()
        stopped.value.heard()
    assert stopped.value.exit_code == 129
    assert "SIGHUP" in said[0]
    assert said[1] == "started"


SLOW = """
import time, fmembed.signals, fmembed.table.verify
from fmembed.cli import main
fmembed.signals._KNOCK_S = 0.5
class Lost:
    def __del__(self):
        time.sleep(60)
def verify(_):
    print("begun", flush=True)
    {strikes}
fmembed.table.verify.verify = verify
main(["verify", "somewhere"])
"""
IN_A_LIBRARY = """
    try:
        time.sleep(60)
    except Exception:
        pass
"""
IN_COMPILED_CODE = """
    try:
        time.sleep(60)
    except BaseException as e:
        raise SystemError("returned a result with an exception set") from e
"""
IN_A_DESTRUCTOR = """
    Lost()
    time.sleep(60)
"""


@pytest.mark.parametrize("strikes", [IN_A_LIBRARY, IN_COMPILED_CODE, IN_A_DESTRUCTOR])
@pytest.mark.parametrize("signum", ALL)
def test_a_command_that_is_stopped_says_so_in_one_line(
    signum: signal.Signals, strikes: str, tmp_path: Path
) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", SLOW.format(strikes=strikes)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert run.stdout
    assert run.stdout.readline() == "begun\n"
    run.send_signal(signum)
    _, said = run.communicate(timeout=30)
    expected = "fmembed: interrupted; what is committed stays, the same command resumes\n"
    assert (run.returncode, said) == (128 + signum, expected)
