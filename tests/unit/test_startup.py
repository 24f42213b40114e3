"""The garbage collector rests while something is loaded, and only then."""

from __future__ import annotations

import gc

import pytest

from fmembed.startup import uncollected


def test_the_collector_is_off_within_and_on_again_after_a_failure() -> None:
    @uncollected()
    def load() -> None:
        assert not gc.isenabled()
        raise ValueError

    assert gc.isenabled()
    try:
        with pytest.raises(ValueError):  # noqa: PT011 - ours, from above
            load()
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()
