"""A table as its readers take it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import duckdb
import inline
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from conftest import SENTENCES
from deltalake import DeltaTable
from forged import NUM_ROWS, SPEC, make_table
from refreshing import Corpus, row

import fmembed
from fmembed.errors import TableError
from fmembed.model.embed import Embed
from fmembed.spec import RunSpec


class Uncounted(Embed):
    """The model, whose seconds are not told to a run without Ray's counts."""

    def __call__(self, rows: pa.Table) -> pa.Table:
        found = super().__call__(rows)
        at = found.schema.get_field_index("_counts")
        return found.set_column(at, found.schema.field(at), pa.nulls(found.num_rows, pa.string()))


def made_by(folder: Path, model: Path, **parts: Any) -> fmembed.Embeddings:
    """A table of six texts by the model itself; the third is rejected."""
    (folder / "in.jsonl").write_text(
        "".join(
            json.dumps({"text": "" if i == 2 else text, "topic": "ab"[i % 2], "stars": i}) + "\n"
            for i, text in enumerate(SENTENCES)
        )
    )
    spec = {
        "source": {"uri": str(folder / "in.jsonl"), "label": "topic", "carry": ["stars"]},
        "model": {"id": str(model), "dtype": "float32", **parts},
        "output": {"uri": str(folder / "out"), "max_rejected_fraction": 1.0},
        "probes": [],
    }
    inline.embed(RunSpec.parse(spec), Uncounted)
    return fmembed.open(str(folder / "out"))


KEPT = [text for i, text in enumerate(SENTENCES) if i != 2]


@pytest.mark.filterwarnings("ignore:.*longer than the model:UserWarning")
def test_vectors_are_one_array_and_labels_another(tmp_path: Path, tiny_bert: Path) -> None:
    table = made_by(tmp_path, tiny_bert)
    assert len(table) == 5
    assert table.vectors == ["embedding"]
    vectors, topics = table.numpy(label="topic")
    assert (vectors.shape, vectors.dtype) == ((5, 32), np.float32)
    assert vectors.flags.c_contiguous
    assert topics.tolist() == ["a", "b", "b", "a", "b"]
    np.testing.assert_array_equal(table.numpy("embedding"), vectors)
    expected = fmembed.encode(KEPT, model={"id": str(tiny_bert), "dtype": "float32"})
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-5)
    _, stars = table.numpy(label="stars")
    assert (stars.tolist(), stars.dtype) == ([0, 1, 3, 4, 5], np.int64)


@pytest.mark.filterwarnings("ignore:.*longer than the model:UserWarning")
def test_whatever_is_stored_comes_as_float32(tmp_path: Path, tiny_bert: Path) -> None:
    outputs = {"half": {"precision": "float16"}, "bits": {"precision": "binary", "dims": 16},
               "each": {"pooling": "tokens"}}  # fmt: skip
    table = made_by(tmp_path, tiny_bert, outputs=outputs)
    model = {"id": str(tiny_bert), "dtype": "float32"}
    plain = fmembed.encode(KEPT, model=model)
    np.testing.assert_allclose(table.numpy(), plain, atol=2e-3)
    np.testing.assert_array_equal(table.numpy("bits"), np.where(plain[:, :16] > 0, 1, -1))
    tokens = table.numpy("each")
    assert [t.dtype for t in tokens] == [np.float32] * 5
    np.testing.assert_allclose(np.stack([t.mean(axis=0) for t in tokens]), plain, atol=1e-4)
    info = table.info()
    assert info.dims == {"half": 32, "bits": 16, "each": 32}
    assert "vectors   5 vectors × 16 binary, column bits" in info.lines()


def test_frames_have_the_rows(tmp_path: Path) -> None:
    table = fmembed.open(make_table(tmp_path / "t").uri)
    vectors = table.numpy()
    arrow = table.arrow(["row_id", "topic"])
    assert isinstance(arrow, pa.Table)
    assert arrow.column_names == ["row_id", "topic"]
    frame = table.pandas()
    assert isinstance(frame, pd.DataFrame)
    np.testing.assert_array_equal(np.stack(frame["embedding"]), vectors)
    frame = table.polars()
    assert isinstance(frame, pl.DataFrame)
    assert frame.schema["embedding"] == pl.Array(pl.Float32, 8)
    np.testing.assert_array_equal(frame["embedding"].to_numpy(), vectors)
    assert table.columns == frame.columns


def test_other_readers_take_it_as_the_readme_says(tmp_path: Path) -> None:
    uri = make_table(tmp_path / "t").uri
    vectors = fmembed.open(uri).numpy()
    rows = fmembed.read(uri)
    found = duckdb.sql("select row_id, embedding from rows").fetchnumpy()
    np.testing.assert_array_equal(np.stack(found["embedding"]), vectors)
    frame = pl.read_parquet(fmembed.files(uri))
    assert frame.schema["embedding"] == pl.Array(pl.Float32, 8)
    np.testing.assert_array_equal(frame["embedding"].to_numpy(), vectors)
    frame = pl.read_delta(uri, use_pyarrow=True)
    np.testing.assert_array_equal(np.stack(frame["embedding"].to_list()), vectors)
    arrow = DeltaTable(uri).to_pyarrow_table()
    np.testing.assert_array_equal(np.stack(arrow["embedding"].to_pylist()), vectors)
    assert rows.num_rows == arrow.num_rows
    # Where this begins to work, the README may say so.
    with pytest.raises(pl.exceptions.SchemaError, match=r"incoming: Array\(Float32, 8\)"):
        pl.read_delta(uri)


def test_what_the_table_has_not_is_told(tmp_path: Path) -> None:
    uri = make_table(tmp_path / "t").uri
    table = fmembed.open(uri)
    for ask in (lambda: table.arrow(["nope"]), lambda: table.numpy(label="nope")):
        with pytest.raises(TableError, match=r"columns: .* has no 'nope'; it has row_id"):
            ask()
    with pytest.raises(TableError, match=r"column: .* has no vectors in 'topic'; it has embedding"):
        table.numpy("topic")
    with pytest.raises(TableError, match="version"):
        fmembed.open(uri, 7)
    with pytest.raises(TableError, match="no such folder"):
        fmembed.open(str(tmp_path / "none"))
    (tmp_path / "d.csv").write_text("text\n")
    with pytest.raises(TableError, match=r"d\.csv is a file; a table is a folder"):
        fmembed.open(str(tmp_path / "d.csv"))


def test_a_version_without_a_row_has_vectors_of_no_row(tmp_path: Path) -> None:
    table = fmembed.open(make_table(tmp_path / "t").uri, 0)
    assert len(table) == 0
    assert table.numpy().shape[0] == 0
    assert table.info().rows == 0


def test_info_tells_what_is_there_and_what_is_missing(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t")
    table.put_report("<p>report</p>")
    found = fmembed.open(table.uri).info()
    assert (found.rows, found.dims, found.version) == (NUM_ROWS, {"embedding": 8}, 1)
    assert (found.model, found.source, found.input) == ("model", "in.jsonl", "text")
    assert found.columns == ("topic", "text")
    assert found.missing == ("probes: fmembed probe finds scores",)
    lines = list(found.lines())
    assert f"vectors   {NUM_ROWS} vectors × 8 float32" in lines
    assert "model     model (mean, 64 tokens, float32)" in lines
    assert "from      in.jsonl, column text" in lines

    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "t", copy)
    shutil.rmtree(copy / "_runs")
    (copy / "_report.html").unlink()
    next(copy.glob("part-*.parquet")).unlink()
    moved = fmembed.open(str(copy)).info()
    assert moved.table == str(copy)
    assert [m[:20] for m in moved.missing] == [
        f"1 of {found.parts} parts, as part"[:20], "a record of its last", "probes: fmembed prob",
        "its report (_report.",
    ]  # fmt: skip


def test_scores_are_part_of_it(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t")
    score = {"metric": "accuracy", "value": 0.9, "low": 0.8, "high": 0.95}
    found = {"probe": "knn", "version": 1, "column": "embedding", "num_train": 48, "num_test": 12,
             "seconds": 0.1, "scores": [score], "headline": score,
             "baselines": {"majority": {"value": 0.4, "low": 0.3, "high": 0.5}}}  # fmt: skip
    table.put_probe(table.version(), found)
    opened = fmembed.open(table.uri)
    assert opened.probes["knn"]["value"] == 0.9
    assert "knn       accuracy 0.900 [0.800, 0.950]; majority 0.400" in opened.info().lines()
    assert "knn 0.900" in repr(opened)
    (Path(table.uri) / "_probes" / "00000001-knn-embedding.json").write_text('{"probe": 1}')
    assert fmembed.open(table.uri).probes == {}


@pytest.mark.parametrize("spec", [{}, {"source": [], "model": "x"}, {**SPEC, "source": {"uri": 3}}])
def test_a_spec_may_hold_anything(tmp_path: Path, spec: Any) -> None:
    assert list(fmembed.open(make_table(tmp_path / "t", spec=spec).uri).info().lines())


def test_a_notebook_shows_the_report_without_rights(tmp_path: Path) -> None:
    spec = {**SPEC, "source": {"uri": "<script>alert(1)</script>", "input": "\x1b[31mtext"}}
    table = make_table(tmp_path / "t", spec=spec)
    opened = fmembed.open(table.uri)
    assert "iframe" not in opened._repr_html_()
    table.put_report('<p class="x">it\'s & all</p>')
    shown = opened._repr_html_()
    assert "<script>" not in shown
    assert "\x1b" not in shown
    assert "sandbox='allow-scripts'" in shown
    assert 'srcdoc="&lt;p class=&quot;x&quot;&gt;it&#x27;s &amp; all&lt;/p&gt;"' in shown
    assert "\x1b" not in repr(opened)


def test_info_says_of_a_table_that_its_last_run_was_stopped(
    tmp_path: Path, tiny_bert: Path
) -> None:
    corpus = Corpus(tmp_path, tiny_bert)
    corpus.write("a.jsonl", [row("a")])
    corpus.refresh()
    assert not [m for m in fmembed.open(str(corpus.out)).info().missing if "run" in m]
    corpus.write("b.jsonl", [row("b")])
    with pytest.MonkeyPatch.context() as patch:  # killed between its commit and its record
        patch.setattr("fmembed.table.table.put_run", lambda *_: None)
        corpus.embed()
    (told,) = [m for m in fmembed.open(str(corpus.out)).info().missing if "run" in m]
    assert told == "the end of its last run, which was stopped or is under way"


def test_a_table_is_named_by_text_or_path_and_by_nothing_else(tmp_path: Path) -> None:
    path = Path(make_table(tmp_path / "t").uri)
    assert len(fmembed.open(path)) == fmembed.read(path).num_rows == NUM_ROWS
    fmembed.versions(path)
    fmembed.verify(path)
    assert fmembed.delete(path, ids=["nobody"], dry_run=True).rows == 0
    for odd in (None, 5, [], {}, b"t"):
        with pytest.raises(TableError, match="table: takes a folder or a URL, got"):
            fmembed.open(odd)  # type: ignore[arg-type]
    with pytest.raises(TableError, match="engine: takes arrow or ray, got 'zz'"):
        fmembed.read(path, engine="zz")  # type: ignore[call-overload]
    with pytest.raises(TableError, match="columns: takes a list of names, got 'topic'"):
        fmembed.read(path, columns="topic")  # type: ignore[call-overload]
    for given in ({"label": ["topic"]}, {"ids": "x"}):
        with pytest.raises(TableError, match="takes"):
            fmembed.open(path).numpy(**given)
