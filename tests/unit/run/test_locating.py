"""One large file in parts, through runs that are killed and refreshes, in this process."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import inline
import pytest
from refreshing import Corpus, row
from weeks import Killed, killed_at

from fmembed.run import locating as locating_module
from fmembed.run import refresh as refresh_module
from fmembed.sources.formats import ranges
from fmembed.sources.formats.registry import FORMATS
from fmembed.table.table import Table


@pytest.fixture
def corpus(tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    monkeypatch.setattr(ranges, "PART_BYTES", 400)
    corpus = Corpus(tmp_path, tiny_bert, output={"part_bytes": 1, "commit_every_s": 1e-9})
    corpus.write("all.jsonl", [row(f"k{i}") for i in range(100)])
    return corpus


def read_parts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """From where to where files are read from here on."""
    seen: list[tuple[int, int]] = []
    original = ranges.open_part

    def open_part(source: Any, file: Any, start: int, stop: int) -> Any:
        seen.append((start, stop))
        return original(source, file, start, stop)

    monkeypatch.setattr(ranges, "open_part", open_part)
    return seen


def test_after_a_kill_nothing_before_is_read_again(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither to be embedded, nor to see where in the file the rest begins."""
    with killed_at(40, str(corpus.out)), contextlib.suppress(Killed):
        inline.embed(corpus.spec, corpus.stage, "1" * 12)
    (record,) = (corpus.out / "_shards").glob("*.json")
    ends = [s["end"][0] for s in json.loads(record.read_text())["shards"]]
    num_done = len(corpus.rows())
    assert 20 < num_done < 80
    assert len(ends) > 3
    seen = read_parts(monkeypatch)
    result = inline.embed(corpus.spec, corpus.stage, "2" * 12)
    assert (result.rows_embedded, len(corpus.rows())) == (100 - num_done, 100)
    assert min(start for start, _ in seen) == max(ends) // 400 * 400
    corpus.check_as_from_scratch(tmp_path / "anew")


def test_refreshes_know_the_parts_by_their_bytes(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = corpus.refresh()
    assert first.rows_new == 100
    assert corpus.refresh().unchanged
    ends = Table(str(corpus.out)).shard_ends()
    assert len(ends) > 10
    rows = [row(f"k{i}") for i in range(100)]
    rows[50] = row("k50", "another text, and a longer one than there was")
    corpus.write("all.jsonl", [*rows[:70], *rows[71:], row("new")])
    second = corpus.refresh()
    assert (second.rows_new, second.rows_changed, second.rows_removed) == (1, 1, 1)
    assert corpus.seen() == ["k50", "new"]
    corpus.check_as_from_scratch(tmp_path / "anew")
    assert Table(str(corpus.out)).shard_ends().keys().isdisjoint(ends)
    assert corpus.refresh().unchanged


def test_a_file_that_cannot_be_looked_through_takes_no_row_away(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parts are rejected; none of its rows is taken for gone."""
    corpus.refresh()
    corpus.write("all.jsonl", [row(f"k{i}") for i in range(101)])

    def gone(*_: Any) -> Any:
        raise OSError("gone")

    with monkeypatch.context() as patch:
        # What it returns where its tasks have failed.
        for module in (locating_module, refresh_module):
            patch.setattr(module, "locate", lambda _, wanted, __: tuple(wanted))
        patch.setitem(FORMATS, "jsonl", replace(FORMATS["jsonl"], count=gone))
        result = corpus.refresh()
    assert (result.rows_removed, result.rows_withheld) == (0, 100)
    assert "cannot be read to their ends" in result.withheld
    corpus.write("all.jsonl", [row(f"k{i}") for i in range(102)])
    mended = corpus.refresh()
    assert (mended.rows_new, mended.rows_removed, len(corpus.rows())) == (2, 0, 102)
