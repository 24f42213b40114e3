"""Wrong input: one line that names the field and the remedy, exit 2, nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import run_cli, write_jsonl
from tables import CARD, SCHEMA, block, write

from fmembed import pipeline
from fmembed.cli import run
from fmembed.cli.runs import _print_result
from fmembed.errors import FmembedError
from fmembed.evaluate.facts import pick_headlines
from fmembed.result import RunResult
from fmembed.table.table import Table
from fmembed.table.verify import VerifyResult


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
    table = Table(config["output"]["uri"])
    table.known()
    table.claim(CARD, SCHEMA, "r")
    written = write(table.uri, block(["a"]))
    assert written.part is not None
    table.rows.commit([written.part], written.schema, CARD.to_configuration(), ("r", 0))


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


@pytest.mark.parametrize("assignment", ["model.layer", "model.layer=", "=3", ""])
def test_a_setting_without_a_value_is_no_null(
    assignment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["embed", "--set", assignment]) == 2
    said = capsys.readouterr().err
    assert said == f"fmembed: --set: takes FIELD=VALUE (null for none), got {assignment!a}\n"


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


HOSTILE = "\x1b[2J\x9b1A\u202e\r\nfmembed: all is well\udcff"


def hostile_causes(*_: Any) -> list[dict[str, Any]]:
    row = {"row_id": HOSTILE, "message": HOSTILE}
    return [{"rows": 1, "error": HOSTILE, "stage": HOSTILE, "samples": [row]}]


def hostile_verification(*_: Any) -> VerifyResult:
    return VerifyResult(HOSTILE, 1, "", 1, 0, 1, 1, 1.0, 1.0, [HOSTILE])


def hostile_result(*_: Any, **__: Any) -> RunResult:
    score = {"metric": HOSTILE, "value": 0.1, "low": 0, "high": 1, "baselines": {HOSTILE: 0.1}}
    return RunResult(
        run_id="r", started="", table=HOSTILE, version=1, fingerprint="", rows_embedded=1,
        causes={HOSTILE: 1}, probes={HOSTILE: score, "a": {"skipped": HOSTILE}}, report=HOSTILE,
    )  # fmt: skip


def hostile_error(*_: Any, **__: Any) -> None:
    raise FmembedError(f"source.uri: no such file: {HOSTILE}")


def hostile_warning(*_: Any, **__: Any) -> None:
    print(HOSTILE, file=sys.stderr)
    raise SystemExit(HOSTILE)


@pytest.mark.parametrize(
    ("name", "answer", "command"),
    [
        ("fmembed.table.table.Table.open",
         lambda _: SimpleNamespace(rejected_by_cause=hostile_causes, card=lambda: None),
         "rejected"),
        ("fmembed.table.verify.verify", hostile_verification, "verify"),
        ("fmembed.pipeline.probe", hostile_result, "probe"),
        ("fmembed.pipeline.probe", hostile_error, "probe"),
        ("fmembed.pipeline.probe", hostile_warning, "probe"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("as_json", [False, True])
def test_nothing_of_the_data_is_obeyed_by_a_terminal(
    name: str,
    answer: Callable[..., Any],
    command: str,
    as_json: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(name, answer)
    run([command, "table", *(["--json"] if as_json else [])])
    said = "".join(capsys.readouterr())
    assert said
    for line in said.splitlines():
        assert line.isprintable(), ascii(line)
    # The forged line has begun no line.
    if answer is not hostile_warning:
        assert "\nfmembed: all is well" not in said


def test_a_score_is_printed_with_what_chance_gives(capsys: pytest.CaptureFixture[str]) -> None:
    chance = {"value": 0.2, "low": 0.1, "high": 0.3, "shuffles": 1000, "p": 0.000999}
    score = {"metric": "AMI", "value": 0.9, "low": 0.8, "high": 0.95}
    probe = {
        "probe": "clustering", "column": "embedding", "headline": score, "num_test": 9,
        "baselines": {"majority": {**score, "value": -0.0001}, "shuffled labels": chance},
    }  # fmt: skip
    earlier = {**probe, "probe": "knn", "baselines": {"shuffled labels": score}}
    card: Any = SimpleNamespace(pooled=["embedding"])
    result = RunResult(
        run_id="r", started="", table="t", version=1, fingerprint="",
        probes=pick_headlines([probe, earlier], card),
    )  # fmt: skip
    _print_result(asdict(result), as_json=False, verbose=True)
    said = capsys.readouterr().out
    assert (
        "clustering AMI 0.900 [0.800, 0.950]; majority 0.000, shuffled labels 0.200 "
        "(0.100 to 0.300 in 1,000 shuffles, p = 0.001)\n" in said
    )
    # As a version before this one has stored it.
    assert "knn       AMI 0.900 [0.800, 0.950]; shuffled labels 0.900\n" in said
    _print_result(asdict(result), as_json=False, verbose=False)
    said = capsys.readouterr().out
    assert "clustering AMI 0.900 [0.800, 0.950]; majority 0.000\n" in said
    probe["baselines"]["shuffled labels"]["p"] = 0.2
    result = replace(result, probes=pick_headlines([probe], card))
    _print_result(asdict(result), as_json=False, verbose=False)
    said = capsys.readouterr().out
    assert "; majority 0.000, shuffled labels do as well (p = 0.200)\n" in said


def test_the_end_of_a_run_is_short_and_the_rest_is_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    verdict: Any = {
        "seconds": {"read": 1.0}, "actors": {}, "wait_share": 0.1, "padding_waste": 0.0,
        "tokens_per_s": 9.0, "mfu": None, "batch_tokens": {}, "advice": "give a run more rows",
    }  # fmt: skip
    result = RunResult(
        run_id="r", started="", table="t", version=1, fingerprint="", rows_read=9, rows_embedded=9,
        seconds=95.0, rows_per_s=0.1, steady_rows_per_s=4.0, verdict=verdict, report="t/r.html",
        spent={"device_hours": 0.1}, table_spent={"device_hours": 0.3}, probe_s=3.2,
    )  # fmt: skip
    _print_result(asdict(result), as_json=False, verbose=False)
    assert capsys.readouterr().out.splitlines() == [
        "rows      9 read, 9 embedded, 0 rejected, 0 skipped",
        "table     t version 1",
        "report    t/r.html",
        "time      2 min; 0.1 rows/s, 4.0 once the model was at work; probes and report 3 s more",
    ]
    _print_result(asdict(result), as_json=False, verbose=True)
    said = capsys.readouterr().out
    assert "advice    give a run more rows\n" in said
    assert "spent     0.1000 device hours; by all runs on record 0.3000 device hours\n" in said
    _print_result(asdict(replace(result, spent={"cost": 2.0})), as_json=False, verbose=False)
    assert "spent     0.0000 device hours, 2.0000 of the price" in capsys.readouterr().out


def test_what_a_run_leaves_out_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    result = RunResult(
        run_id="r", started="", table="t", version=1, fingerprint="", rows_read=9, rows_embedded=9,
        num_truncated=2, rows_absent=3,
        probes={"knn": {"skipped": "no two labels", "unlabelled": 4}},
    )  # fmt: skip
    _print_result(asdict(result), as_json=False, verbose=False)
    said = capsys.readouterr().out
    assert "cut       2 rows are longer than the model takes, and it saw a part\n" in said
    assert "labels    4 rows have none, and no part in the probes of labels\n" in said
    assert "absent    3 rows of the table were not in the source; they stay\n" in said
    _print_result(
        asdict(replace(result, rows_read=0, rows_embedded=0, num_truncated=0)), False, False
    )
    said = capsys.readouterr().out
    assert said.startswith("nothing to do: the source holds no row\n")
    assert "cut " not in said


def test_arguments_are_not_obeyed_either(tmp_path: Path) -> None:
    option = f"--{HOSTILE}"
    for arguments in (["verify", HOSTILE], ["embed", HOSTILE], [HOSTILE], ["embed", option]):
        encoded = [a.encode("utf-8", "surrogateescape") for a in arguments]
        done = subprocess.run(
            [sys.executable, "-m", "fmembed.cli", *encoded],
            capture_output=True, text=True, cwd=tmp_path, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert all(line.isprintable() for line in done.stderr.split("\n"))


def test_a_flag_that_unfolds_is_one_line() -> None:
    nested = "[" * 50_000
    run = run_cli("embed", "--source", "a", "--model", "b", "--output", "c", "--set", f"x={nested}")
    assert run.returncode == 2
    assert run.stderr.endswith("--set x: not valid YAML: it is nested too deeply\n")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.CSV", "a.parquet"])
def test_data_in_the_place_of_a_config_is_told(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text('{"text": "one"}\n')
    assert run(["embed", str(tmp_path / name)]) == 2
    assert "looks like data: --source" in capsys.readouterr().err


@pytest.mark.parametrize("rejected", [0, 2])
def test_quiet_is_quiet_unless_something_needs_a_look(
    rejected: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = RunResult(
        run_id="r", started="2026-01-01T00:00:00", table="/out", version=1, fingerprint="f",
        rows_read=9, rows_embedded=9 - rejected, rows_rejected=rejected, table_rejected=rejected,
    )  # fmt: skip
    monkeypatch.setattr(pipeline, "refresh", lambda *_, **given: made if given["quiet"] else None)
    named = ["--source", "x", "--model", "m", "--output", "o"]
    assert run(["refresh", *named, "-q"]) == 0
    assert bool(capsys.readouterr().out) == bool(rejected)
