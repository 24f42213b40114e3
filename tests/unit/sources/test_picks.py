"""What readers hand on: rows that were chosen, at the places where they were found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import write_jsonl

from fmembed.rows.columns import COPIED, DUPLICATE, ERROR, TOTAL, accepted
from fmembed.rows.found import BAD, BAD_ID, COPY, EMBED, GOOD, REJECT, REST, TWIN, FoundRows
from fmembed.sources.opening import open_source
from fmembed.sources.picks import Chosen, ChosenRows
from fmembed.sources.reading import read_shard
from fmembed.sources.scan import scan_shard
from fmembed.sources.source import Source
from fmembed.spec import SourceSpec

ROWS = [{"key": f"k{i}", "text": f"about {i}"} for i in range(2500)]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    write_jsonl(tmp_path / "0.jsonl", ROWS[:10])
    write_jsonl(tmp_path / "1.jsonl", [*ROWS, {"key": "bad", "text": ""}])
    return open_source(SourceSpec(uri=str(tmp_path), id="key"))


def scan(source: Source, index: int) -> FoundRows:
    return scan_shard(source, source.shards[index], index)


def read(source: Source, index: int, chosen: ChosenRows) -> tuple[pa.Table, dict[str, Any]]:
    pick = Chosen(chosen, index)
    rows = pa.concat_tables(read_shard(source, source.shards[index], index, pick))
    (marker,) = rows.filter(rows[TOTAL].is_valid()).to_pylist()
    return rows.filter(rows[TOTAL].is_null()), marker


def test_a_scan_keeps_the_keys_of_all_rows(source: Source) -> None:
    found = scan(source, 1)
    assert len(found) == 2501
    assert found.places.tolist() == list(range(2501))
    assert set(found.shards.tolist()) == {1}
    assert found.states.tolist() == [GOOD] * 2500 + [BAD]
    assert found.contents[-1] == b""
    assert (found.ids[:10] == scan(source, 0).ids).all()


def test_chosen_rows_come_with_their_fates(source: Source) -> None:
    places = {0: EMBED, 999: COPY, 1000: TWIN, 2400: EMBED, 2500: REJECT}
    found = [scan(source, i)[np.array(sorted(places) if i else [3])] for i in range(2)]
    fates = np.array([EMBED, *places.values()], dtype=np.int8)
    backwards = np.arange(6)[::-1]
    chosen = ChosenRows.of(FoundRows.join(found)[backwards], fates[backwards])
    rows, marker = read(source, 1, chosen)
    assert rows["row_id"].to_pylist() == ["k0", "k999", "k1000", "k2400", "bad"]
    assert rows[COPIED].to_pylist() == [None, True, None, None, None]
    assert rows[ERROR].to_pylist() == [None, None, DUPLICATE, None, "empty input"]
    assert accepted(rows).tolist() == [True, False, False, True, False]
    assert (marker["_total"], marker["_skipped"], marker["_changed"]) == (2501, 0, 0)
    assert read(source, 0, chosen)[0]["row_id"].to_pylist() == ["k3"]


def test_a_row_that_is_another_by_then_is_left_out_and_counted(source: Source) -> None:
    chosen = ChosenRows.of(scan(source, 0), np.full(10, EMBED, dtype=np.int8))
    path = source.shards[0].files[0].path
    write_jsonl(Path(path), [*ROWS[:3], {"key": "k3", "text": "other"}, *ROWS[5:8]])
    rows, marker = read(source, 0, chosen)
    assert rows["row_id"].to_pylist() == ["k0", "k1", "k2"]
    assert (marker["_total"], marker["_changed"]) == (7, 7)


def test_what_may_stand_for_other_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"key": "a", "text": "x"}\n{"key":\n{"text": "no id"}\n')
    (tmp_path / "b.jsonl").mkdir()
    source = open_source(SourceSpec(uri=str(tmp_path), id="key"))
    assert scan(source, 0).states.tolist() == [GOOD, BAD_ID, BAD_ID]
    # Where lines are their own ids, one that cannot be read is itself and no other.
    own = open_source(SourceSpec(uri=str(tmp_path)))
    assert scan(own, 0).states.tolist() == [GOOD, BAD, GOOD]
    (tmp_path / "a.jsonl").unlink()
    (broken,) = (scan_shard(s, s.shards[0], 0) for s in (source,))
    assert broken.states.tolist() == [REST]
