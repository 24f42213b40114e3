"""A store while it is read: a real process reads as often as it can, whatever happens to it."""

from __future__ import annotations

from pathlib import Path

import pytest
from weeks import Reader, StoreYear

import fmembed
from fmembed import promotion

pytestmark = pytest.mark.slow


def test_a_reader_sees_each_promoted_version_whole_and_nothing_else(
    tmp_path: Path, minilm: Path
) -> None:
    """Through refreshes, kills, a better model, a refused one, rollbacks, deletions, vacuum."""
    noises = {"first": 1.1, "better": 0.7, "worse": 2.2}
    year = StoreYear(tmp_path / "year", str(tmp_path / "store"), str(minilm), 300, noises)
    steps = [("first", 0), ("first", 5), ("better", 12), ("better", 25), ("better", 0)]
    with Reader(year) as reader:
        for name, kill_at in steps:
            reader.allow()
            assert year.refresh(name, kill_at).promotion in ("promoted", "current")
            reader.wait()
            assert year.refresh("worse").promotion == "refused"
            year.change()
        year.promoted = year.previous
        promotion.rollback(year.store)
        year.check()
        reader.wait()
        for table in fmembed.Store.open(year.store).tables():
            fmembed.vacuum(f"{year.store}/tables/{table.name}", keep_days=0, keep_versions=1)
        year.check()
        reader.wait()
        reader.allow()
        assert year.refresh("better").promotion == "promoted"
        reader.wait()
    assert "of 6 versions" in reader.told(num_back=1)
