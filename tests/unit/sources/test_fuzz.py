"""The fuzzer in small: `tools/fuzz.py` says what it spoils and what it counts."""

from __future__ import annotations

import pytest
from fuzz import FAULTS, KINDS, fuzz

pytestmark = pytest.mark.slow


def test_no_spoiled_file_harms_another() -> None:
    num_inputs = 12 * (len(KINDS) + 1)
    counts = fuzz(minutes=0, num_inputs=num_inputs, seed=0, keep=None)
    assert counts == {"inputs": num_inputs, **dict.fromkeys(FAULTS, 0)}
