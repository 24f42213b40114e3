"""CSV and TSV as people have them: quotes, delimiters, encodings, and what is told of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from fmembed.errors import SourceError, SpecError
from fmembed.sources.opening import open_source
from fmembed.sources.reading import read_here
from fmembed.spec import RunSpec, SourceSpec


def rows_of(path: Path, **told: Any) -> list[tuple[str, str]]:
    """Of each row its text and label, or what was wrong and the message."""
    source = open_source(SourceSpec(uri=str(path), label="label", **told))
    rows = pa.concat_tables(read_here(source)).to_pylist()
    return [
        (r["_error"], r["_message"]) if r["_error"] else (r["_input"], r["label"])
        for r in rows
        if r["row_id"] is not None
    ]


def write(folder: Path, name: str, text: str, encoding: str = "utf-8") -> Path:
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


QUOTES = "\n".join(["text\tlabel", "one\ta", '"two is quoted\tb', "three\ta", 'four "4"\tb', ""])


def test_tsv_has_no_quotes(tmp_path: Path) -> None:
    path = write(tmp_path, "q.tsv", QUOTES)
    expected = [("one", "a"), ('"two is quoted', "b"), ("three", "a"), ('four "4"', "b")]
    assert rows_of(path) == expected


def test_tsv_has_quotes_if_asked(tmp_path: Path) -> None:
    path = write(tmp_path, "q.tsv", 'text\tlabel\n"one\ttwo"\ta\n')
    assert rows_of(path, csv={"quote": '"'}) == [("one\ttwo", "a")]


@pytest.mark.parametrize(
    ("content", "csv", "is_refused"),
    [
        ('"one and ""two"""\ta', {}, True),
        ('"one', {}, False),
        ('a "quoted" word\ta', {}, False),
        ('"one"\ta', {"quote": ""}, False),
        ('"one"\ta', {"quote": '"'}, False),
    ],
)
def test_quotes_in_tsv_are_refused_until_somebody_says_what_they_mean(
    content: str, csv: dict[str, str], is_refused: bool, tmp_path: Path
) -> None:
    path = write(tmp_path, "q.tsv", f"text\tlabel\nplain\tb\n{content}\n")
    spec = SourceSpec(uri=str(path), label="label", csv=csv)
    if is_refused:
        with pytest.raises(SourceError, match=r"source\.csv\.quote: q\.tsv has fields in quotes"):
            open_source(spec)
    else:
        open_source(spec)


def test_a_quoted_field_far_into_tsv_is_a_rejected_row(tmp_path: Path) -> None:
    rows = "".join(f"plain {i}\ta\n" for i in range(1200))
    path = write(tmp_path, "q.tsv", f'text\tlabel\n{rows}"as ""pandas"" writes"\ta\nlast\tb\n')
    *plain, quoted, last = rows_of(path)
    assert plain == [(f"plain {i}", "a") for i in range(1200)]
    assert last == ("last", "b")
    assert quoted[0] == "bad CSV"
    assert "source.csv.quote" in quoted[1]
    assert quoted[1].endswith("in line 1,202")


def test_a_quote_that_is_not_closed_says_what_it_took(tmp_path: Path) -> None:
    path = write(tmp_path, "q.csv", 'text,label\none,a\n"two,b\nthree,a\nfour,b\n')
    (first, second, *rest) = rows_of(path)
    assert first == ("one", "a")
    assert second == (
        "bad CSV", "unexpected end of data, which took lines 3 to 5; is a quote not closed?"
    )  # fmt: skip
    # Each of them counts where it is asked how many may be rejected.
    assert rest == [("bad CSV", "taken by the row that begins in line 3")] * 2


def test_a_quote_that_is_not_closed_in_a_large_file_says_what_it_took(tmp_path: Path) -> None:
    """The row is given up as too large before the file ends; its lines are lost all the same."""
    lines = ["text,label", "one,a", '"two,b', *(f"text number {i},c" for i in range(100))]
    path = write(tmp_path, "q.csv", "\n".join(lines) + "\n")
    (first, (error, message), *rest) = rows_of(path, max_text_bytes=200)
    assert first == ("one", "a")
    assert error == "row too large"
    assert message.endswith("which took lines 3 to 103; is a quote not closed?")
    assert rest == [("row too large", "taken by the row that begins in line 3")] * 100


def test_a_quote_that_is_closed_too_late_says_what_it_took(tmp_path: Path) -> None:
    path = write(tmp_path, "q.csv", 'text,label\n"two,b\nthree,"a"\nfour,b\n')
    (error, message), *rest = rows_of(path)
    assert error == "bad CSV"
    assert "lines 2 to 3; is a quote not closed?" in message
    assert rest == [("bad CSV", "taken by the row that begins in line 2"), ("four", "b")]


@pytest.mark.parametrize("delimiter", [";", "|", "\t", "§"])
@pytest.mark.parametrize("quote", ['"', "'"])
def test_other_delimiters_and_quotes(delimiter: str, quote: str, tmp_path: Path) -> None:
    text = f"text{delimiter}label\n{quote}one{delimiter}and{quote}{delimiter}a\n"
    path = write(tmp_path, "q.csv", text)
    told = {"delimiter": delimiter, "quote": quote}
    assert rows_of(path, csv=told) == [(f"one{delimiter}and", "a")]


@pytest.mark.parametrize("delimiter", [";", "|", "\t"])
def test_a_delimiter_that_looks_wrong_is_told(delimiter: str, tmp_path: Path) -> None:
    path = write(tmp_path, "q.csv", f"text{delimiter}label\none{delimiter}a\n")
    with pytest.raises(SourceError, match=r"are its fields set apart by .*source\.csv\.delimiter"):
        rows_of(path)


def test_a_column_may_have_any_name(tmp_path: Path) -> None:
    path = write(tmp_path, "q.csv", "text|label\none\n")
    assert open_source(SourceSpec(uri=str(path), input="text|label")).format == "csv"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1", "cp1252", "utf-8-sig"])
def test_encodings(encoding: str, tmp_path: Path) -> None:
    path = write(tmp_path, "q.csv", "text,label\nété,é\n", encoding)
    assert rows_of(path, csv={"encoding": encoding}) == [("été", "é")]


def test_an_encoding_that_looks_wrong_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, "q.csv", "text,label\nété,é\n", "utf-16")
    with pytest.raises(SourceError, match=r"UTF-16 by its first bytes; set source\.csv\.encoding"):
        rows_of(path)
    path = write(tmp_path, "l.csv", "text,label\nété,e\nplain,e\n", "latin-1")
    (error, message), plain = rows_of(path)
    assert error == "not UTF-8"
    assert "source.csv.encoding" in message
    assert plain == ("plain", "e")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "q.csv", "text,label,text\none,a,two\n")
    with pytest.raises(SourceError, match="2 of its columns are 'text'"):
        rows_of(path)
    # What nobody asks for may be there as often as it likes.
    path = write(tmp_path, "r.csv", "text,label,x,x\none,a,,\n")
    assert rows_of(path) == [("one", "a")]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"encoding": "nope"}, "is no encoding"),
        ({"delimiter": ",", "quote": ","}, "cannot be the same"),
        ({"delimiter": "\n"}, "the end of a line"),
        ({"delimiter": ";;"}, "source.csv.delimiter"),
    ],
)
def test_settings_that_cannot_be(told: dict[str, str], message: str) -> None:
    raw = {"source": {"uri": "x", "csv": told}, "model": {"id": "m"}, "output": {"uri": "o"}}
    with pytest.raises(SpecError, match=message):
        RunSpec.from_yaml(None, raw)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ('{"text": "a", "label": "x", "text": "b"}', "text"),
        ('{"text": "a", "label": {"p": [{"q": 1, "q": 2}]}}', "q"),
        # What nobody asks for may be there as often as it likes.
        ('{"text": "c", "label": "y", "unused": {"text": 1, "text": 2}}', None),
        ('{"text": "c", "label": {"p": 1}, "unused": 1, "unused": 2}', None),
    ],
)
def test_a_name_twice_in_a_line_of_json(line: str, name: str | None, tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", f'{{"text": "good", "label": "x"}}\n{line}\n')
    good, (first, second) = rows_of(path)
    assert good == ("good", "x")
    if name is None:
        assert first == "c"
    else:
        assert (first, second) == ("bad JSON", f"the name '{name}' is there twice")
