"""What Python's users call, and the spec that is made of it."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import inline
import numpy as np
import pandas as pd
import pytest
from forged import make_table
from refreshing import make_stage

import fmembed
from fmembed import RunSpec, SourceError, SpecError, api, cli, pipeline
from fmembed.result import RunResult
from fmembed.sources.given import Given
from fmembed.sources.opening import open_source
from fmembed.sources.reading import read_here

CONFIG = {"source": {"uri": "in"}, "model": {"id": "m"}, "output": {"uri": "out"}}


@pytest.fixture
def specs(monkeypatch: pytest.MonkeyPatch) -> list[RunSpec]:
    """The specs that runs were started with, and the files of their sources while they went."""
    seen: list[RunSpec] = []

    def run(spec: RunSpec, **_: Any) -> RunResult:
        seen.append(spec)
        if Path(spec.source.uri).is_dir():
            assert open_source(spec.source).shards
        return RunResult("r", "2026-01-01", "out", 1, "f")

    monkeypatch.setattr(pipeline, "embed", run)
    monkeypatch.setattr(pipeline, "refresh", run)
    return seen


def test_a_config_comes_as_a_file_a_dict_or_a_spec(specs: list[RunSpec], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("source: {uri: in}\nmodel: {id: m}\noutput: {uri: out}\n")
    for data in (path, str(path), CONFIG, RunSpec.parse(CONFIG)):
        fmembed.embed(data, quiet=True)
        fmembed.refresh(data, output="other", overrides={"probes": ["knn"]})
    expected = RunSpec.parse(CONFIG)
    changed = RunSpec.parse({**CONFIG, "output": {"uri": "other"}, "probes": ["knn"]})
    assert specs == [expected, changed] * 4
    assert CONFIG["output"] == {"uri": "out"}  # what was given is as it was


def test_a_path_is_a_source(specs: list[RunSpec]) -> None:
    model = {"id": "m", "dtype": "float32"}
    fmembed.embed(
        "data/x.csv", model=model, output=Path("out"), input="body", id="k", label="t",
        carry=["a"], overrides={"compute.actors": 2},
    )  # fmt: skip
    (spec,) = specs
    assert (spec.source.uri, spec.source.input, spec.source.id) == ("data/x.csv", "body", "k")
    assert (spec.source.label, spec.source.carry, spec.model.dtype) == ("t", ("a",), "float32")
    assert (spec.output.uri, spec.compute.actors) == ("out", 2)


def test_data_is_there_for_as_long_as_the_run(specs: list[RunSpec], tmp_path: Path) -> None:
    frame = pd.DataFrame({"body": ["one", "two"], "key": ["a", "b"], "topic": ["x", "y"]})
    given = {"model": "m", "output": "out", "spool": tmp_path}
    fmembed.embed(frame, input="body", id="key", label="topic", **given)
    fmembed.refresh(["one", "two"], **given)
    first, second = specs
    assert (first.source.id, second.source.id) == ("key", "_index")
    for spec in specs:
        assert Path(spec.source.uri).parent == tmp_path
        assert not Path(spec.source.uri).exists()
    assert first.stored()["source"]["uri"] == "a pandas.DataFrame of 2 rows"
    assert second.source.stored_name == "2 texts"


def test_a_mistake_is_told_before_data_is_written(specs: list[RunSpec], tmp_path: Path) -> None:
    def rows() -> Any:
        pytest.fail("read")
        yield

    for given, told in (
        ({}, "model: missing"),
        ({"model": "m"}, "output: missing"),
        ({"model": {"idd": "m"}, "output": "out"}, "model.idd: unknown key; did you mean id?"),
        ({"model": "m", "output": "out", "carry": "title"}, "carry: takes a list of columns"),
        ({"model": "m", "output": "out", "overrides": {"probs": []}}, "probs: unknown key"),
    ):
        with pytest.raises(SpecError, match=told):
            fmembed.embed(rows(), spool=tmp_path, **given)
    with pytest.raises(SpecError, match="data: a dict is a config"):
        fmembed.embed({"text": ["one"]}, model="m", output="out")
    assert not specs
    assert not list(tmp_path.iterdir())


def test_other_nodes_do_not_see_this_process(
    specs: list[RunSpec], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.delitem(api.sys.modules, "ray", raising=False)
    given = {"model": "m", "output": "out"}
    with pytest.raises(SpecError, match="spool: data that this process holds is not seen"):
        fmembed.embed(["one"], **given)
    fmembed.embed(["one"], spool=tmp_path, **given)
    monkeypatch.delenv("RAY_ADDRESS")
    for nodes, is_told in (([True, False], False), ([True, True], True)):
        ray = SimpleNamespace(
            is_initialized=lambda: True, nodes=lambda nodes=nodes: [{"Alive": a} for a in nodes]
        )
        monkeypatch.setitem(api.sys.modules, "ray", ray)  # type: ignore[arg-type]
        assert api._has_other_nodes() is is_told


def test_a_result_leads_to_its_table(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t")
    last = table.last_run()
    assert last is not None
    result = api._with_table(last)
    vectors, topics = result.numpy(label="topic")
    assert vectors.shape == (60, 8)
    assert len(topics) == len(result.to_pandas(["row_id"])) == len(result.open()) == 60
    empty = api._with_table(replace(last, version=0), Given({}, "no rows"))
    assert len(empty.numpy()) == len(empty.to_pandas(["topic"])) == 0
    given = Given({}, "rows", [f"r{i}" for i in reversed(range(60))])
    ordered = api._with_table(last, given)
    backwards, names, ids = ordered.numpy(label="topic", ids=True)
    assert ids.tolist() == given.ids
    np.testing.assert_array_equal(backwards, vectors[::-1])
    assert names.tolist() == topics.tolist()[::-1]
    assert ordered.to_pandas(["topic"])["topic"].tolist() == names.tolist()
    assert ordered.to_pandas()["row_id"].tolist() == given.ids
    assert repr(result).splitlines()[0].startswith("rows      60 read, 60 embedded")
    assert "60 read, 60 embedded" in result._repr_html_()


def rows_of(spec: RunSpec) -> list[tuple[str, str]]:
    source = open_source(spec.source)
    rows = [r for table in read_here(source) for r in table.to_pylist() if r["row_id"]]
    return [(r["row_id"], r["_input"]) for r in rows]


@pytest.mark.parametrize(
    ("content", "fields", "texts"),
    [
        (b"one\ntwo, too\n\nlast", {}, ["one", "two, too", "last"]),
        (b'\xef\xbb\xbf {"text": "one"}\n{"text": "two"}\n', {}, ["one", "two"]),
        (b'\n[{"text": "one"},\n {"text": "two"}]', {}, ["one", "two"]),
        (b"text,n\none,1\ntwo,2\n", {"format": "csv"}, ["one", "two"]),
        (b'{"text": "a line"}\n', {"format": "lines"}, ['{"text": "a line"}']),
    ],
)
def test_what_comes_on_a_stream_is_a_source(
    content: bytes, fields: dict[str, Any], texts: list[str]
) -> None:
    spec = RunSpec.parse(
        {"source": {"uri": "-", **fields}, "model": {"id": "m"}, "output": {"uri": "o"}}
    )
    with api.of_stream(spec, io.BytesIO(content)) as spooled:
        path = Path(spooled.source.uri)
        assert [text for _, text in rows_of(spooled)] == texts
        assert rows_of(spooled)[0][0] == "stdin#0"
        assert spooled.stored()["source"]["uri"] == "standard input"
    assert not path.exists()


def test_a_stream_without_a_byte_is_told() -> None:
    spec = RunSpec.parse({"source": {"uri": "-"}, "model": {"id": "m"}, "output": {"uri": "o"}})
    with (
        pytest.raises(SpecError, match="nothing came on standard input"),
        api.of_stream(spec, io.BytesIO()),
    ):
        pass


def test_nodes_of_a_cluster_do_not_see_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_has_other_nodes", lambda: True)
    spec = RunSpec.parse({"source": {"uri": "-"}, "model": {"id": "m"}, "output": {"uri": "o"}})
    with (
        pytest.raises(SpecError, match="put it into a file that all of them read"),
        api.of_stream(spec, io.BytesIO(b"one")),
    ):
        pass


def test_the_command_takes_standard_input(
    monkeypatch: pytest.MonkeyPatch, tiny_bert: Path, tmp_path: Path
) -> None:
    given: list[list[tuple[str, str]]] = []

    def embed(spec: RunSpec, **_: Any) -> RunResult:
        given.append(rows_of(spec))
        raise SpecError("seen")

    monkeypatch.setattr(pipeline, "embed", embed)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    named = ["--source", "-", "--model", str(tiny_bert), "--output", str(tmp_path / "out")]
    assert cli.run(["embed", *named]) == 2
    assert given == [[("stdin#0", "one"), ("stdin#1", "two")]]


def test_the_same_data_again_is_known_without_reading_it(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies in other files each time; what they hold is on record."""
    frame = pd.DataFrame({"body": ["one", "two", "three"], "key": ["a", "b", "c"]})
    told = {"source.input": "body", "source.id": "key", "model.id": str(tiny_bert),
            "output.uri": str(tmp_path / "out"), "probes": []}  # fmt: skip
    stage = make_stage(tmp_path / "seen")

    def embed(data: Any) -> RunResult:
        with api._spec_of(data, told, None) as (spec, _):
            return inline.embed(spec, stage)

    assert embed(frame).rows_embedded == 3
    read: list[Any] = []
    monkeypatch.setattr(inline, "read_shard", lambda *given: read.append(given) or iter(()))
    again = embed(frame.copy())
    assert (again.rows_skipped, read) == (3, [])
    embed(frame.assign(body=["one", "two", "other"]))
    assert len(read) == 1


def test_rows_of_one_id_are_told_before_the_work(
    specs: list[RunSpec], capsys: pytest.CaptureFixture[str]
) -> None:
    frame = pd.DataFrame({"text": [f"text {i}" for i in range(20)], "key": [*range(18), 3, 3]})
    given: dict[str, Any] = {"model": "m", "output": "out", "id": "key"}
    with pytest.raises(
        SpecError, match=r"source\.id: 2 of 20 rows have the key of an earlier row, as '3', and"
    ):
        fmembed.embed(frame, **given)
    assert specs == []
    fmembed.embed(frame, **given, overrides={"output.max_rejected_fraction": 0.1})
    assert (
        "2 of 20 rows have the key of an earlier row, as '3': they are" in capsys.readouterr().err
    )
    fmembed.embed(frame.iloc[[3, 18]], **given)  # so few, of which not all are rejected
    assert len(specs) == 2


def test_columns_of_one_name_are_told(specs: list[RunSpec]) -> None:
    frame = pd.DataFrame([["a", "b"]], columns=["text", "text"])
    with pytest.raises(SourceError, match="two columns of the DataFrame are called 'text'"):
        fmembed.embed(frame, model="m", output="out")


@pytest.mark.parametrize(
    ("content", "refused"),
    [
        (b"text,n\none,1\ntwo,2\n", True),
        (b"a\tb\nc\td\n", True),
        (b"text,n\none,1", True),  # without a last line's end
        (b'text,n\n"one, two",1\n"over\nlines",2\n', True),
        (b"text,n\n" + b"one,1\n" * 20_000, True),  # of which only the beginning is looked at
        (b"one, two\nthree\n", False),
        (b"[Music] plays, and stops\n[Applause] begins\n", False),
        (b"{x} is no JSON\n", False),
        (b"only, one line", False),
    ],
)
def test_what_may_be_csv_is_asked_for(content: bytes, refused: bool) -> None:
    spec = RunSpec.parse({"source": {"uri": "-"}, "model": {"id": "m"}, "output": {"uri": "o"}})
    with contextlib.ExitStack() as stack:
        if refused:
            with pytest.raises(SpecError, match="say --format csv, or --format lines"):
                stack.enter_context(api.of_stream(spec, io.BytesIO(content)))
        else:
            spooled = stack.enter_context(api.of_stream(spec, io.BytesIO(content)))
            assert spooled.source.format == "lines"


def test_of_a_table_with_more_rows_those_of_the_data_come_back(tmp_path: Path) -> None:
    ids = ["r7", "r2", "other", "r50"]
    found = api._with_table(
        RunResult(run_id="r", started="2026-01-01T00:00:00", version=1, fingerprint="f",
                  table=make_table(tmp_path / "t").uri),
        Given({}, "a list", ids),
    )  # fmt: skip
    _, names = found.numpy(ids=True)
    assert names.tolist() == ["r7", "r2", "r50"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"output": 5}, "output: takes a folder or a URL, got 5"),
        ({"overrides": 5}, "overrides: takes a dict of fields"),
        ({"overrides": {5: 1}}, "overrides: takes a dict of fields"),
        ({"if_locked": "skip"}, "if_locked: takes fail or wait, got 'skip'"),
    ],
)
def test_arguments_of_other_types_are_told(given: Any, told: str, specs: list[RunSpec]) -> None:
    with pytest.raises(SpecError, match=told):
        fmembed.embed(["a"], **{"model": "m", "output": "o", **given})


def test_a_refresh_of_data_in_a_store_goes_there_and_past_the_gate_if_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def refresh(spec: RunSpec, **given: Any) -> RunResult:
        asked.update(given, output=spec.output)
        return RunResult(run_id="r", started="", table="t", version=None, fingerprint="f")

    monkeypatch.setattr(pipeline, "refresh", refresh)
    fmembed.refresh(
        ["a"], model="m", store=tmp_path / "s", gate="off", if_locked="wait", quiet=True
    )
    assert asked["waits"]
    assert (asked["output"].store, asked["output"].uri) == (str(tmp_path / "s"), "")
    assert asked["gate"] == "off"
    with pytest.raises(SpecError, match=r"^output: takes uri, a table, or store"):
        fmembed.refresh(["a"], model="m", output="t", overrides={"output.store": "s"}, quiet=True)
