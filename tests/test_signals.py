"""The parts of the pipeline that need no Ray."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest

from fmembed.run import _Signals
from fmembed.spec import Interrupted


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_a_commit_and_is_sent_again_until_it_is_heard(
    signum: signal.Signals,
) -> None:
    commits: Any = SimpleNamespace(is_committing=True)
    before = signal.getsignal(signum)
    with _Signals(commits) as signals:
        os.kill(os.getpid(), signum)  # in the middle of a commit: nothing is raised
        commits.is_committing = False
        for _ in range(2):  # the first is lost, as in a destructor; it comes again
            with pytest.raises(Interrupted) as interrupted:
                time.sleep(30)
        signals.heard()
        assert interrupted.value.exit_code == 128 + signum
        time.sleep(1.2)  # and no more after it was heard
    assert signal.getsignal(signum) == before
