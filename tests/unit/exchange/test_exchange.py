"""Vectors in and out: every number, id and column as it was, and what no table can hold refused."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run_cli
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

import fmembed
from fmembed.errors import FmembedError, RejectedError, SourceError, SpecError, TableError
from fmembed.exchange.exporting import export
from fmembed.exchange.foreign import FORMATS, is_foreign, open_foreign
from fmembed.exchange.importing import import_vectors
from fmembed.table.log import Log
from fmembed.table.table import Table

NUM, DIM = 700, 24
IDS = [f"photos/{i}.png" for i in range(NUM)]


def vectors(dtype: str = "float32") -> Any:
    return np.random.default_rng(0).normal(size=(NUM, DIM)).astype(dtype)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Of the first layout of an NPZ."""
    made = tmp_path / "theirs.npz"
    topic = np.array([f"topic é {i % 3}" for i in range(NUM)])
    np.savez(made, embeddings=vectors(), listfiles=np.array(IDS), topic=topic, year=np.arange(NUM))
    assert import_vectors(str(made), str(tmp_path / "table")).rows_embedded == NUM
    return tmp_path / "table"


def read(uri: Path) -> tuple[list[str], Any, pa.Table]:
    found = fmembed.Embeddings(str(uri))
    return found.arrow(["row_id"])["row_id"].to_pylist(), found.numpy(), found.arrow()


@pytest.mark.parametrize("to", FORMATS)
def test_every_format_gives_back_what_it_was_given(to: str, table: Path, tmp_path: Path) -> None:
    where = tmp_path / {"hf": "saved", "lance": "saved.lance"}.get(to, f"saved.{to}")
    # By the command: Lance warns in each process that forks after it was imported.
    done = run_cli("export", str(table), str(where), "--to", to, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["rows"], told["dim"], told["dtype"], told["format"]) == (NUM, DIM, "float32", to)
    again = tmp_path / "again"
    done = run_cli("import", str(where), "--output", str(again), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows_embedded"] == NUM
    ids, found, rows = read(again)
    assert ids == IDS
    np.testing.assert_array_equal(found, vectors())
    if to not in ("npy", "faiss"):  # which have no columns
        assert rows["topic"].to_pylist() == [f"topic é {i % 3}" for i in range(NUM)]
        assert rows["year"].to_pylist() == list(range(NUM))
    assert not fmembed.verify(str(again)).problems


@pytest.mark.parametrize("to", ["npz", "npy", "parquet", "hf"])
def test_halves_stay_halves(to: str, tmp_path: Path) -> None:
    np.save(tmp_path / "half.npy", vectors("float16"))
    import_vectors(str(tmp_path / "half.npy"), str(tmp_path / "table"))
    where = tmp_path / {"hf": "saved"}.get(to, f"saved.{to}")
    assert export(tmp_path / "table", str(where), to).dtype == "float16"
    found = open_foreign(str(where))
    assert found.dtype == np.float16
    np.testing.assert_array_equal(
        np.concatenate([b.vectors for b in found.read()]), vectors("float16")
    )


def test_an_unchanged_notebook_reads_what_is_written(table: Path, tmp_path: Path) -> None:
    export(table, str(tmp_path / "out.npz"))
    with np.load(tmp_path / "out.npz") as data:  # allow_pickle is off, as it is by default
        assert data["embeddings"].dtype == np.float32
        np.testing.assert_array_equal(data["embeddings"], vectors())
        assert data["listfiles"].tolist() == IDS


def test_the_layout_of_splits_goes_in_and_out_and_scores_as_scikit_learn_does(
    tmp_path: Path, local_ray: None
) -> None:
    digits = load_digits()
    x, y = digits.data.astype(np.float32), digits.target
    named = np.array([f"digit {i}" for i in range(10)])
    np.savez_compressed(
        tmp_path / "theirs.npz", X_train=x[:1300], X_test=x[1300:], y_train=y[:1300],
        y_test=y[1300:], class_names=named,
    )  # fmt: skip
    import_vectors(str(tmp_path / "theirs.npz"), str(tmp_path / "table"))
    export(tmp_path / "table", str(tmp_path / "ours.npz"), label="label", split="split")
    with np.load(tmp_path / "theirs.npz") as theirs, np.load(tmp_path / "ours.npz") as ours:
        for name in theirs.files:
            np.testing.assert_array_equal(theirs[name], ours[name])
        assert ours["listfiles_test"].tolist() == [f"test#{i}" for i in range(len(x) - 1300)]
    result = fmembed.probe(str(tmp_path / "theirs.npz"), names=("knn",))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    knn = KNeighborsClassifier(10, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07))
    expected = knn.fit(unit[:1300], y[:1300]).score(unit[1300:], y[1300:])
    found = result.probes["knn"]
    assert (found["value"], found["num_test"]) == (pytest.approx(expected, abs=1e-12), 497)
    assert result.report == str(tmp_path / "theirs.npz.report.html")
    assert "digit 3" in Path(result.report).read_text()


def test_a_file_with_lines_of_ids_and_labels(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", vectors())
    (tmp_path / "ids.txt").write_text("\n".join(IDS) + "\n")
    (tmp_path / "labels.txt").write_text("\n".join(str(i % 2) for i in range(NUM)) + "\n")
    import_vectors(
        str(tmp_path / "v.npy"), str(tmp_path / "table"), ids=str(tmp_path / "ids.txt"),
        label=str(tmp_path / "labels.txt"),
    )  # fmt: skip
    ids, _, rows = read(tmp_path / "table")
    assert ids == IDS
    assert rows["label"].to_pylist() == [str(i % 2) for i in range(NUM)]
    (tmp_path / "ids.txt").write_text("one\n")
    with pytest.raises(SourceError, match=r"has 1 lines; .* 700 rows"):
        import_vectors(str(tmp_path / "v.npy"), "other", ids=str(tmp_path / "ids.txt"))


def test_rows_that_no_table_holds_are_rejected_with_the_cause(tmp_path: Path) -> None:
    made = vectors()
    made[5, 1], made[9, 0] = np.nan, np.inf
    ids = list(IDS)
    ids[600] = ids[1]
    np.savez(tmp_path / "a.npz", embeddings=made, listfiles=np.array(ids))
    result = import_vectors(str(tmp_path / "a.npz"), str(tmp_path / "table"))
    assert result.causes == {"not finite": 2, "duplicate id": 1}
    assert result.rows_read == result.rows_embedded + result.rows_rejected == NUM
    found, _, _ = read(tmp_path / "table")
    assert found == [name for i, name in enumerate(ids) if i not in (5, 9, 600)]
    assert not fmembed.verify(str(tmp_path / "table")).problems
    np.savez(tmp_path / "b.npz", embeddings=made * np.nan)
    with pytest.raises(RejectedError, match="all rows were rejected: 700 not finite"):
        import_vectors(str(tmp_path / "b.npz"), str(tmp_path / "other"))


def test_an_id_that_comes_again_far_later_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmembed.exchange.importing._PART_BYTES", 1)
    monkeypatch.setattr("fmembed.exchange.foreign._BATCH_BYTES", 100 * 4 * DIM)
    ids = [*IDS[:-1], IDS[0]]
    np.savez(tmp_path / "a.npz", embeddings=vectors(), listfiles=np.array(ids))
    result = import_vectors(str(tmp_path / "a.npz"), str(tmp_path / "table"))
    assert (result.parts_written, result.causes) == (7, {"duplicate id": 1})
    assert not fmembed.verify(str(tmp_path / "table")).problems


class _Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def _pickle(where: Path) -> None:
    np.save(where, np.array([_Evil()] * 3, dtype=object), allow_pickle=True)


def _truncated(where: Path) -> None:
    np.save(where, vectors())
    where.write_bytes(where.read_bytes()[:-100])


WRONG = {
    "objects": ("a.npy", _pickle, "holds Python objects, which are a pickle"),
    "cut": ("a.npy", _truncated, "ends after"),
    "no numpy": ("a.npy", lambda w: w.write_bytes(pickle.dumps([1])), "cannot be read as npy"),
    "no zip": ("a.npz", lambda w: w.write_bytes(b"PK..."), "cannot be read as npz"),
    "flat": ("a.npy", lambda w: np.save(w, np.zeros(9, np.float32)), r"has the shape \(9,\)"),
    "whole numbers": ("a.npy", lambda w: np.save(w, np.zeros((9, 4), np.int8)), "holds int8"),
    "rounded": ("a.npy", lambda w: np.save(w, vectors("float64") / 3), "--as-float32"),
    "by column": ("a.npy", lambda w: np.save(w, np.asfortranarray(vectors())), "column by column"),
    "which": (
        "a.npz", lambda w: np.savez(w, a=vectors(), b=vectors()),
        "which column holds the vectors.* a, b",
    ),
    "classes": (
        "a.npz",
        lambda w: np.savez(
            w, X_train=vectors(), y_train=np.full(NUM, 7), class_names=np.array(["a", "b"])
        ),
        "names class 7; class_names has 2",
    ),
    "labels": (
        "a.npz", lambda w: np.savez(w, X_train=vectors(), y_train=np.zeros((NUM, 2))),
        r"y_train has the shape \(700, 2\)",
    ),
    "lengths": (
        "a.parquet",
        lambda w: pq.write_table(pa.table({"vector": [[1.0, 2.0], [3.0]]}), w),
        "of unlike lengths, 1 to 2",
    ),
    "nulls": (
        "a.parquet",
        lambda w: pq.write_table(
            pa.table({"vector": pa.array([[1.0], None], pa.list_(pa.float32()))}), w
        ),
        "rows without a vector",
    ),
    "taken": (
        "a.npz", lambda w: np.savez(w, embeddings=vectors(), num_units=np.arange(NUM)),
        "has a column 'num_units' of its own",
    ),
    "other": ("a.csv", lambda w: w.write_text("1,2"), "takes a file of vectors"),
    "absent": ("a.npz", lambda w: None, "(?i)no such file"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_no_table_takes_is_refused_in_a_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, make, told = WRONG[case]
    make(tmp_path / name)
    with pytest.raises(SourceError, match=told):
        import_vectors(name, "table")
    assert not (tmp_path / "executed").exists()
    # Nothing is left that is in the way of the right one.
    np.save("right.npy", vectors())
    assert import_vectors("right.npy", "table").rows_embedded == NUM
    assert not fmembed.verify("table").problems


def test_doubles_that_are_none_are_taken(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", vectors().astype(np.float64))
    import_vectors(str(tmp_path / "a.npy"), str(tmp_path / "table"))
    np.testing.assert_array_equal(read(tmp_path / "table")[1], vectors())
    np.save(tmp_path / "b.npy", vectors("float64") / 3)
    import_vectors(str(tmp_path / "b.npy"), str(tmp_path / "rounded"), as_float32=True)
    found = read(tmp_path / "rounded")[1]
    np.testing.assert_array_equal(found, (vectors("float64") / 3).astype(np.float32))


def test_a_table_of_ours_is_not_written_to(table: Path, tmp_path: Path) -> None:
    before = sorted((p, p.stat().st_size) for p in table.rglob("*"))
    with pytest.raises(TableError):
        import_vectors(str(tmp_path / "theirs.npz"), str(table))
    assert sorted((p, p.stat().st_size) for p in table.rglob("*")) == before


def test_vectors_that_were_imported_are_no_model_s(table: Path, tiny_bert: Path) -> None:
    info = fmembed.Embeddings(str(table)).info()
    assert info.model == "imported"
    data = table.parent / "rows.jsonl"
    data.write_text('{"text": "one"}\n')
    with pytest.raises(TableError, match="imported"):
        fmembed.embed(str(data), model=str(tiny_bert), output=str(table))


def test_where_and_what_to_write_is_checked_first(table: Path, tmp_path: Path) -> None:
    for path, given, told in [
        ("a.npz", {"columns": ["size"]}, "columns: no 'size' in .* topic, year"),
        ("a.npz", {"column": "topic"}, "holds no vectors"),
        ("a.npz", {"label": "topic"}, "takes both"),
        ("a.npy", {"label": "topic", "split": "year"}, "an NPZ takes both"),
        ("none/a.npz", {}, "there is no folder"),
        ("a.xyz", {}, "takes one of npz, npy"),
        (".", {"to": "npz"}, "is a folder"),
    ]:
        with pytest.raises(SpecError, match=told):
            export(table, str(tmp_path / path), **given)  # type: ignore[arg-type]
    assert not list(tmp_path.glob(".*"))


def test_a_file_that_is_there_stays_where_writing_breaks_off(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = tmp_path / "out.npz"
    where.write_bytes(b"before")

    def fail(*_: Any) -> Any:
        raise OSError("full")

    monkeypatch.setattr("fmembed.exchange.exporting._put_texts", fail)
    with pytest.raises(FmembedError, match="cannot be written as npz: full"):
        export(table, str(where))
    assert where.read_bytes() == b"before"
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_a_table_is_no_file_of_vectors(table: Path, tmp_path: Path) -> None:
    assert not is_foreign(table)
    assert is_foreign(tmp_path / "theirs.npz")
    assert not is_foreign(tmp_path / "none.npz")


def test_contents_are_told_by_the_vector(table: Path) -> None:
    row = read(table)[2].slice(3, 1)
    expected = hashlib.blake2b(vectors()[3].tobytes(), digest_size=16).hexdigest()
    assert row["content_hash"].to_pylist() == [expected]


class _Killed(BaseException):
    """What nothing catches."""


@pytest.mark.parametrize("where", ["a part", "a commit", "the second commit"])
def test_a_killed_import_leaves_no_row_and_the_same_command_begins_anew(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmembed.exchange.importing._PART_BYTES", 1)
    monkeypatch.setattr("fmembed.exchange.foreign._BATCH_BYTES", 200 * 4 * DIM)
    made = vectors()
    made[3] = np.nan  # so that there are two commits
    np.save(tmp_path / "a.npy", made)
    given = str(tmp_path / "a.npy"), str(tmp_path / "table")
    calls = Counter[str]()

    def die_at(name: str, nth: int) -> None:
        module, _, attribute = name.rpartition(".")
        owner: Any = importlib.import_module(module) if module[-3:] != "Log" else Log
        real = getattr(owner, attribute)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            if calls[name] == nth:
                raise _Killed
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, attribute, call)

    # As SIGKILL would: nothing is cleaned up.
    monkeypatch.setattr(Table, "remove_strays", lambda *_, **__: 0)
    if where == "a part":
        die_at("fmembed.exchange.importing.write_part", 3)
    else:
        die_at("fmembed.table.log.Log.commit", 1 if where == "a commit" else 2)
    with pytest.raises(_Killed):
        import_vectors(*given)
    assert fmembed.read(given[1]).num_rows == 0
    monkeypatch.undo()
    result = import_vectors(*given)
    assert (result.rows_embedded, result.rows_rejected) == (NUM - 1, 1)
    assert not fmembed.verify(given[1]).problems
    assert fmembed.read(given[1]).num_rows == NUM - 1
    with pytest.raises(TableError, match="holds rows; give a folder with nothing there"):
        import_vectors(*given)


def test_an_import_that_fails_leaves_no_part(tmp_path: Path) -> None:
    """The one number that float32 does not hold is the last."""
    made = vectors().astype(np.float64)
    made[-1, -1] = 1 / 3
    np.save(tmp_path / "a.npy", made)
    given = str(tmp_path / "a.npy"), str(tmp_path / "table")
    with pytest.raises(SourceError, match="--as-float32 rounds them"):
        import_vectors(*given)
    assert not list((tmp_path / "table").glob("part-*"))
    assert import_vectors(*given, as_float32=True).rows_embedded == NUM


def test_columns_keep_their_types_or_are_refused(tmp_path: Path) -> None:
    day = np.datetime64("2020-01-01T00:00:00", "s")
    np.savez(
        tmp_path / "a.npz", embeddings=vectors(), ids=np.array(IDS).astype("S"),
        when=day + np.arange(NUM), big=np.arange(NUM, dtype=">i2"), size=np.arange(NUM, dtype="u1"),
        word=np.array([b"w\xc3\xa9"] * NUM), flag=np.arange(NUM) % 2 == 0, odd=np.zeros((NUM, 2)),
        half=np.arange(NUM, dtype="f4"),
    )  # fmt: skip
    import_vectors(str(tmp_path / "a.npz"), str(tmp_path / "table"), ids="ids")
    ids, _, rows = read(tmp_path / "table")
    assert ids == IDS
    types = {f.name: str(f.type) for f in rows.schema}
    assert (types["when"], types["big"], types["size"], types["flag"], types["half"]) == (
        "timestamp[us]", "int16", "int16", "bool", "float",
    )  # fmt: skip
    assert rows["word"].to_pylist()[:2] == ["wé", "wé"]
    assert rows["size"].to_pylist() == [i % 256 for i in range(NUM)]
    assert "odd" not in types
    for value, told in [
        (pa.array([2**63] * 2, pa.uint64()), "the column n does not fit"),
        (pa.array([1, 2], pa.duration("s")), "a table has no type for the column n"),
        (pa.array([1, 2]).cast(pa.timestamp("ns")), "the column n does not fit"),
    ]:
        pq.write_table(pa.table({"vector": [[1.0], [2.0]], "n": value}), tmp_path / "b.parquet")
        given = str(tmp_path / "b.parquet"), str(tmp_path / "other")
        with pytest.raises(SourceError, match=told):
            import_vectors(*given)
    assert import_vectors(*given, columns=[]).rows_embedded == 2


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        ([1.5, 2.5], "its ids hold 1.5, of type float"),
        ([["a"], ["b"]], "of type list"),
        ([b"\xff", b"a"], "ids hold bytes that are no UTF-8"),
        ([True, False], "of type bool"),
    ],
)
def test_what_is_no_id_is_refused(ids: list[Any], told: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"vector": [[1.0], [2.0]], "id": ids}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=told):
        import_vectors(str(tmp_path / "a.parquet"), str(tmp_path / "table"))


def test_a_row_without_an_id_is_rejected(tmp_path: Path) -> None:
    made = pa.table({"vector": [[1.0], [2.0], [3.0]], "id": ["None", None, "b"]})
    pq.write_table(made, tmp_path / "a.parquet")
    result = import_vectors(str(tmp_path / "a.parquet"), str(tmp_path / "table"))
    assert result.causes == {"no id": 1}
    assert read(tmp_path / "table")[0] == ["None", "b"]


def test_lines_are_split_where_a_file_is_and_nowhere_else(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", vectors()[:4])
    (tmp_path / "ids.txt").write_bytes("a\x0cb\r\nc\u2028d\r\ne\r\nf\r\n".encode())
    (tmp_path / "labels.txt").write_text("x\n\ny\nx\n")
    import_vectors(
        str(tmp_path / "v.npy"), str(tmp_path / "table"), ids=str(tmp_path / "ids.txt"),
        label=str(tmp_path / "labels.txt"),
    )  # fmt: skip
    ids, _, rows = read(tmp_path / "table")
    assert ids == ["a\x0cb", "c\u2028d", "e", "f"]
    assert rows["label"].to_pylist() == ["x", None, "y", "x"]


def test_what_an_npz_has_no_room_for_is_refused(table: Path, tmp_path: Path) -> None:
    for name, told in [("listfiles", "an array 'listfiles' of its own"), ("embeddings", "of its")]:
        made = pa.table({"vector": [[1.0], [2.0]], "id": ["a", "b"], name: ["x", "y"]})
        pq.write_table(made, tmp_path / f"{name}.parquet")
        other = tmp_path / name
        import_vectors(str(tmp_path / f"{name}.parquet"), str(other), column="vector")
        with pytest.raises(SpecError, match=told):
            export(other, str(tmp_path / "out.npz"))
    with pytest.raises(SpecError, match="columns: names 'topic' twice"):
        export(table, str(tmp_path / "out.npz"), columns=["topic", "topic"])
    pq.write_table(pa.table({"vector": [[1.0], [2.0]], "id": ["a\0", "a"]}), tmp_path / "n.parquet")
    import_vectors(str(tmp_path / "n.parquet"), str(tmp_path / "nul"))
    for to in ("npz", "npy"):
        with pytest.raises(SpecError, match="ends in a NUL"):
            export(tmp_path / "nul", str(tmp_path / f"out.{to}"))
    assert not list(tmp_path.glob("out*"))


def test_labels_that_are_missing_stay_so(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz", X_train=vectors()[:4], X_test=vectors()[4:6],
        y_train=np.array([0.0, 1.0, -1.0, 1.0]), class_names=np.array(["a", "b"]),
        listfiles_train=np.array(["p", "q", "r", "s"]),
    )  # fmt: skip
    import_vectors(str(tmp_path / "a.npz"), str(tmp_path / "table"))
    ids, _, rows = read(tmp_path / "table")
    assert ids == ["p", "q", "r", "s", "test#0", "test#1"]
    assert rows["label"].to_pylist() == ["a", "b", None, "b", None, None]
    export(tmp_path / "table", str(tmp_path / "b.npz"), label="label", split="split")
    with np.load(tmp_path / "b.npz") as found:
        assert found["class_names"].tolist() == ["a", "b"]
        assert found["y_train"].tolist() == [0, 1, -1, 1]
        assert found["y_test"].tolist() == [-1, -1]
        assert found["listfiles_train"].tolist() == ids[:4]


def test_nothing_but_a_file_is_replaced_and_nothing_in_a_table(table: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.npz"
    os.mkfifo(fifo)
    with pytest.raises(SpecError, match="is no file"):
        export(table, str(fifo))
    with pytest.raises(SpecError, match="lies in a table"):
        export(table, str(table / "_delta_log" / "out.npz"))
    link, target = tmp_path / "link.npz", tmp_path / "target.npz"
    target.write_bytes(b"before")
    link.symlink_to(target)
    export(table, str(link))
    assert link.is_symlink()
    assert target.read_bytes()[:2] == b"PK"
    with pytest.raises(SpecError, match="too long"):
        export(table, str(tmp_path / ("n" * 300 + ".npz")))
    for version in (-1, 99):
        with pytest.raises(TableError, match="has the versions 0 to 1"):
            export(table, str(tmp_path / "v.npz"), version=version)


def test_a_report_that_cannot_be_written_is_said_before_anything_is_done(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", vectors())
    (tmp_path / "v.npy.report.html").mkdir()
    with pytest.raises(SpecError, match="cannot be written"):
        fmembed.probe(str(tmp_path / "v.npy"))


def test_rows_that_are_not_probed_are_said(
    tmp_path: Path, local_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    made = vectors()
    made[:3] = np.nan
    np.save(tmp_path / "v.npy", made)
    fmembed.probe(str(tmp_path / "v.npy"), ("health",))
    assert "not probed: 3 rows, not finite" in capsys.readouterr().err
