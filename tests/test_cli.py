"""Wrong input: one line that names the field and the remedy, exit 2, nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import run_cli, write_jsonl

from fmembed.checkpoint import open_checkpoint
from fmembed.cli import run
from fmembed.spec import ModelSpec
from fmembed.table import Table


def good(tmp_path: Path, model: Path) -> dict[str, Any]:
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "one", "topic": "a"}])
    return {
        "source": {"uri": str(source)},
        "model": {"id": str(model), "dtype": "float32"},
        "output": {"uri": str(tmp_path / "out")},
    }


def unknown_key(config: dict[str, Any], tmp_path: Path) -> None:
    config["source"]["inptu"] = "text"


def missing_file(config: dict[str, Any], tmp_path: Path) -> None:
    config["source"]["uri"] = str(tmp_path / "nowhere.jsonl")


def absent_column(config: dict[str, Any], tmp_path: Path) -> None:
    config["source"]["label"] = "topik"


def no_weights(config: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    config["model"]["id"] = str(folder)


def pickle_weights(config: dict[str, Any], tmp_path: Path) -> None:
    no_weights(config, tmp_path)
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"")


def unwritable(config: dict[str, Any], tmp_path: Path) -> None:
    # A path below a device: root may write anywhere else, and tests often run as root.
    config["output"]["uri"] = os.devnull + "/out"


def another_model(config: dict[str, Any], tmp_path: Path) -> None:
    identity = open_checkpoint(ModelSpec(id=config["model"]["id"]), False).identity
    identity["model.weights"] = "another"
    table = Table(config["output"]["uri"])
    import pyarrow as pa

    schema = pa.schema([("row_id", pa.string())])
    part = table.rows.write(pa.table({"row_id": ["a"]}, schema=schema))
    table.row_ids()
    configuration = {"fmembed.fingerprint": "f", "fmembed.identity": json.dumps(identity)}
    table.rows.commit([part], schema, configuration, ("r", 0))


def not_a_table(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").write_text("mine")


def set_(part: str, **fields: Any) -> Callable[[dict[str, Any], Path], None]:
    def spoil(config: dict[str, Any], _: Path) -> None:
        config.setdefault(part, {}).update(fields)

    return spoil


def tree(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def spoiled(spoil: Callable[[dict[str, Any], Path], None], folder: Path, model: Path) -> Path:
    config = good(folder, model)
    spoil(config, folder)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize(
    ("spoil", "field", "remedy"),
    [
        (unknown_key, "source.inptu", "did you mean input?"),
        (missing_file, "source.uri", "no such file"),
        (absent_column, "source.label", "it has text, topic"),
        (no_weights, "model.id", "fetch the whole checkpoint"),
        (pickle_weights, "model.id", "convert them"),
        (unwritable, "output.uri", "give a folder or URL"),
        (another_model, "output.uri", "give another output.uri"),
        (not_a_table, "output.uri", "give another folder"),
    ],
)
def test_wrong_input(
    spoil: Callable[[dict[str, Any], Path], None],
    field: str,
    remedy: str,
    tmp_path: Path,
    tiny_bert: Path,
) -> None:
    path = spoiled(spoil, tmp_path, tiny_bert)
    before = tree(tmp_path)
    done = run_cli("embed", str(path))
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith(f"fmembed: {field}: ")
    assert remedy in done.stderr
    assert done.stderr.count("\n") == 1
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("spoil", "field", "remedy"),
    [
        (set_("model", modality="image"), "model.modality", "embeds text, not image"),
        (set_("model", adapter="/nowhere"), "model.adapter", "no such folder"),
        (set_("model", outputs={"row_id": {}}), "model.outputs", "another name"),
        (set_("model", outputs={"a": {"poling": "cls"}}), "model.outputs.a.poling", "unknown key"),
        (set_("preprocess", chunk_tokens=4096), "preprocess.chunk_tokens", "takes at most 64"),
        (set_("preprocess", chunk_tokens=8, chunk_overlap=6), "preprocess", "at most half"),
        (set_("preprocess", window_s=1), "preprocess.window_s", "is for audio"),
        (set_("source", root="/nowhere"), "source.root", "no such folder"),
        (set_("source", caption="topic"), "source.caption", "belongs to pictures or sounds"),
        (set_("zeroshot", templates=["a photo"]), "zeroshot.templates", "where the class goes"),
        (
            set_("model", endpoint={"base_url": "http://127.0.0.1:9/v1", "max_retries": 0}),
            "model.endpoint",
            "did not answer",
        ),
    ],
)
def test_wrong_options(
    spoil: Callable[[dict[str, Any], Path], None],
    field: str,
    remedy: str,
    tmp_path: Path,
    tiny_bert: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same in this process: starting one takes seconds."""
    path = spoiled(spoil, tmp_path, tiny_bert)
    before = tree(tmp_path)
    code = run(["embed", str(path)])
    said = capsys.readouterr()
    assert (code, said.out, said.err.count("\n")) == (2, "", 1)
    assert said.err.startswith(f"fmembed: {field}: ")
    assert remedy in said.err
    assert tree(tmp_path) == before


def test_what_ends_a_command_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*_: Any) -> None:
        raise SystemExit("a way failed")

    monkeypatch.setattr("fmembed.bench.check_peers", end)
    assert run(["bench", "articles"]) == 1
    assert capsys.readouterr().err == "fmembed: a way failed\n"


def test_output_that_cannot_be_written_is_no_success() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fmembed.cli", "--version"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    expected = "fmembed: cannot write the output: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, expected)


def test_missing_config() -> None:
    done = run_cli("embed", "nowhere.yaml")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "nowhere.yaml" in done.stderr


def test_verify_of_no_table(tmp_path: Path) -> None:
    done = run_cli("verify", str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert tree(tmp_path) == set()


def test_version() -> None:
    assert run_cli("--version").stdout.startswith("fmembed 0.")


def test_a_flag_that_unfolds_is_one_line() -> None:
    nested = "[" * 50_000
    run = run_cli("embed", "--source", "a", "--model", "b", "--output", "c", "--set", f"x={nested}")
    assert run.returncode == 2
    assert run.stderr.endswith("--set x: not valid YAML: it is nested too deeply\n")
    assert run.stderr.count("\n") == 1
