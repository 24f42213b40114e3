"""JSON that is no JSON Lines: an array, as most programs write one."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from fmembed.errors import SourceError
from fmembed.sources.formats import json_array as module
from fmembed.sources.opening import open_source
from fmembed.sources.reading import read_here
from fmembed.spec import SourceSpec

ROWS: list[dict[str, Any]] = [
    {"text": "plain", "n": 1},
    {"text": 'a "quote", [and], {a} and a \\ at its end\\', "n": 2, "more": {"a": [1, {"b": 2}]}},
    {"text": "umlauts: äöü, \u2028 and \U0001f600", "n": 3},
    {"text": "", "n": 4},
]  # fmt: skip


def read(path: Path, **told: Any) -> list[dict[str, Any]]:
    source = open_source(SourceSpec(uri=str(path), **told))
    rows = pa.concat_tables(read_here(source)).to_pylist()
    return [r for r in rows if r["row_id"] is not None]


def texts(path: Path, **told: Any) -> list[Any]:
    return [r["_input"] if r["_error"] is None else r["_error"] for r in read(path, **told)]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_", [True, False])
def test_an_array_is_a_row_an_element(indent: int | None, ascii_: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS, indent=indent, ensure_ascii=ascii_), encoding="utf-8")
    rows = read(path, carry=("n", "more"))
    assert [r["row_id"] for r in rows] == [f"a.json#{i}" for i in range(4)]
    assert [r["_input"] for r in rows[:3]] == [row["text"] for row in ROWS[:3]]
    assert rows[3]["_error"] == "empty input"
    assert [r["n"] for r in rows] == [1, 2, 3, None]
    assert rows[1]["more"] == {"a": ROWS[1]["more"]["a"]} or json.loads(rows[1]["more"])
    with gzip.open(tmp_path / "b.json.gz", "wt", encoding="utf-8") as file:
        json.dump(ROWS, file)
    assert texts(tmp_path / "b.json.gz") == texts(path)


def test_texts_are_rows_too(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(' [ "one", "t\\u0077o, [three]" ,"" ] \n')
    assert texts(path) == ["one", "two, [three]", "empty input"]


def test_lines_under_this_name_are_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("\n".join(map(json.dumps, ROWS[:3])))
    assert texts(tmp_path / "a.json") == [row["text"] for row in ROWS[:3]]


def test_one_object_over_many_lines_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS[1], indent=1))
    with pytest.raises(SourceError, match=r"goes over several lines: .* or an array"):
        read(tmp_path / "a.json")


def test_bad_elements_are_rejected_and_the_rest_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(
        b'[{"text": "one"}, 7, null, {"text": nope}, , {"text": "\xff"}, {"text": "last"}]'
    )
    assert texts(path) == [
        "one", "bad JSON", "bad JSON", "bad JSON", "bad JSON", "not UTF-8", "last"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "one"}, {"text": "tw', "the array does not end"),
        ('[{"text": "one"}, {"text": "two"}', "the array does not end"),
        ('[{"text": "one"}] {"text": "two"}', "the array ends at byte 16, not there"),
        ('[{"text": "one"}}', "the array ends at byte 16, not there"),
    ],
)
def test_what_does_not_end_is_rejected(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    first, *rest = read(path)
    assert first["_input"] == "one"
    assert message in rest[-1]["_message"]


def test_limits_hold_for_an_element(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "x" * 100}, {"text": "short"}]))
    assert texts(path, max_text_bytes=50) == ["row too large", "short"]
    monkeypatch.setattr(module, "_MOST_BYTES", 60)
    (row,) = read(path)
    assert (row["_error"], "JSON Lines" in row["_message"]) == ("file too large", True)


def test_a_long_array_is_sampled_from_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SAMPLE_BYTES", 200)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": f"text {i}"} for i in range(1000)]))
    assert texts(path) == [f"text {i}" for i in range(1000)]


def test_a_first_element_longer_than_the_sample_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SAMPLE_BYTES", 50)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "x" * 500}, {"text": "short"}]))
    assert texts(path) == ["x" * 500, "short"]


def test_texts_that_are_no_utf8_are_as_the_config_says(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'["ok", "a\xff"]')
    assert texts(path) == ["ok", "not UTF-8"]
    assert texts(path, encoding_errors="replace") == ["ok", "a\ufffd"]
    assert texts(path, encoding_errors="ignore") == ["ok", "a"]


def test_an_empty_array_has_no_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(SourceError, match="its array is empty, or begins with neither"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize("indent", [None, 1])
def test_rows_inside_of_an_object_are_told(indent: int | None, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"count": 4, "data": ROWS}, indent=indent))
    with pytest.raises(SourceError, match=r"it is one object, whose rows are in 'data': take them"):
        read(tmp_path / "a.json")
    # One that is a row of its own has a list of other things.
    (tmp_path / "b.json").write_text('{"text": "one", "tags": ["a", "b"]}')
    assert texts(tmp_path / "b.json") == ["one"]
