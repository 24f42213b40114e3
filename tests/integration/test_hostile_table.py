"""Somebody else's table: what its metadata name is never run, asked or fetched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from conftest import write_jsonl
from forged import OUTPUT, SPEC, WORDS, make_table
from web_server import serve

import fmembed
from fmembed.checkpoint.opening import open_checkpoint
from fmembed.errors import SpecError, TableError
from fmembed.spec import ModelSpec

CANARY = "sk-canary-5d1f"
CODE = """
from pathlib import Path
from transformers import CLIPConfig, CLIPModel
Path({marker!r}).write_text("this code has run")
class EvilConfig(CLIPConfig): pass
class EvilModel(CLIPModel): config_class = EvilConfig
"""


def evil_clip(folder: Path, tokenizer: Path, marker: Path) -> Path:
    """A whole CLIP whose config asks for code that comes with it."""
    tiny.save_clip(folder, tokenizer)
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def evil_table(folder: Path, model: Path, url: str, **source: Any) -> str:
    """Vectors of that CLIP, and a spec that leads everywhere."""
    checkpoint = open_checkpoint(ModelSpec(id=str(model), trust_remote_code=True), False, "image")
    spec = {
        **SPEC,
        "source": {"uri": f"{url}/in.jsonl", "input": "picture", "label": "topic",
                   "caption": "text", "root": url, **source},
        "model": {"id": str(model), "trust_remote_code": True},
        "probes": ["knn", "zeroshot", "crossmodal"],
    }  # fmt: skip
    outputs = {"embedding": {**OUTPUT, "pooling": "projection"}}
    identity = {**checkpoint.identity, "preprocess.pieces_are_rows": False}
    table = make_table(
        folder, dim=24, spec=spec, identity=identity, modality="image", outputs=outputs
    )
    return table.uri


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OPENAI_API_KEY": CANARY, "HF_MODULES_CACHE": str(cwd / "modules")}
    return subprocess.run(
        [sys.executable, "-m", "fmembed.cli", *arguments],
        capture_output=True, text=True, timeout=300, cwd=cwd, check=False, env=environment,
    )  # fmt: skip


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("kind", ["http", "hf", "local", "endpoint"])
def test_a_table_is_no_instruction(kind: str, tmp_path: Path, minilm: Path) -> None:
    marker = tmp_path / "marker"
    model = evil_clip(tmp_path / "model", minilm, marker)
    secret = write_jsonl(tmp_path / "secret.jsonl", [{"text": "x", "topic": "x", "picture": "x"}])
    with serve() as server:
        server.otherwise = b'{"text": "river", "topic": "river"}\n'
        source: dict[str, Any] = {
            "http": {},
            "hf": {"format": "hf", "uri": str(model)},
            "local": {"uri": str(secret), "root": "/"},
            "endpoint": {},
        }[kind]
        uri = evil_table(tmp_path / "out", model, server.origin, **source)
        if kind == "endpoint":
            forge(uri, model={"id": "m", "endpoint": {"base_url": f"{server.origin}/v1"}})
        before = secret.stat().st_atime_ns
        result = fmembed.probe(uri)
        assert server.asked == []
    assert not marker.exists()
    assert secret.stat().st_atime_ns == before
    # What needs the table alone is there; the rest says what it wants.
    knn = result.probes["knn"]
    assert knn["value"] > 0.9
    assert knn["missing"] == "needs the source: give --from-config CONFIG"
    for name in ("zeroshot", "crossmodal"):
        assert result.probes[name]["skipped"] == "needs the model: give --from-config CONFIG"
    html = (Path(uri) / "_report.html").read_text(encoding="utf-8")
    assert "Skipped: needs the model: give --from-config CONFIG" in html
    assert "none: needs the source: give --from-config CONFIG" in html


def forge(uri: str, **parts: Any) -> None:
    """Write into the spec in the table's metadata, by hand."""
    (log,) = [p for p in (Path(uri) / "_delta_log").glob("*.json") if '"metaData"' in p.read_text()]
    actions = [json.loads(line) for line in log.read_text().splitlines()]
    for action in actions:
        if "metaData" in action:
            configuration = action["metaData"]["configuration"]
            spec = json.loads(configuration["fmembed.spec"]) | parts
            configuration["fmembed.spec"] = json.dumps(spec)
    log.write_text("\n".join(map(json.dumps, actions)))


def test_no_command_follows_a_forged_table(tmp_path: Path, minilm: Path, tiny_bert: Path) -> None:
    """A table that this user's own run has made, and somebody has written to since."""
    marker = tmp_path / "marker"
    model = evil_clip(tmp_path / "model", minilm, marker)
    rows = [{"text": f"{WORDS[i % 3]} {i}", "topic": WORDS[i % 3]} for i in range(60)]
    write_jsonl(tmp_path / "in.jsonl", rows)
    config = {
        "source": {"uri": "in.jsonl", "label": "topic"},
        "model": {"id": str(tiny_bert), "dtype": "float32"},
        "output": {"uri": "out"},
        "probes": ["knn"],
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    assert command("embed", "own.yaml", cwd=tmp_path).returncode == 0
    with serve() as server:
        server.otherwise = b'{"text": "river", "topic": "river"}\n'
        forge(
            str(tmp_path / "out"),
            source={"uri": f"{server.origin}/in.jsonl", "label": "topic", "root": server.origin},
            model={"id": str(model), "trust_remote_code": True,
                   "endpoint": {"base_url": f"{server.origin}/v1"}},
            probes=["knn", "zeroshot"],
        )  # fmt: skip
        write_jsonl(tmp_path / "in.jsonl", [*rows, {"text": "one more", "topic": "river"}])
        done = {
            arguments: command(*arguments, cwd=tmp_path)
            for arguments in (
                ("probe", "out", "--json"),
                ("verify", "out"),
                ("rejected", "out"),
                ("embed", "own.yaml", "--json"),
                ("probe", "out", "--from-config", "own.yaml", "--json"),
                ("embed", "own.yaml", "--model", str(model)),
            )
        }
        assert fmembed.read(str(tmp_path / "out")).num_rows == 61
        assert server.asked == []
    assert not marker.exists()
    codes = [d.returncode for d in done.values()]
    assert codes == [0, 0, 0, 0, 0, 2], [d.stderr for d in done.values()]
    for d in done.values():
        assert "Traceback" not in d.stderr
    said = "".join(d.stdout + d.stderr for d in done.values())
    stored = b"".join(p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert CANARY not in said
    assert CANARY.encode() not in stored
    foreign, _, _, own, named, _ = done.values()
    knn = json.loads(foreign.stdout.splitlines()[-1])["probes"]["knn"]
    # What the user's own run has found of the same rows, and nobody was asked for again.
    assert "missing" not in knn
    for trusted in (own, named):
        knn = json.loads(trusted.stdout.splitlines()[-1])["probes"]["knn"]
        assert "TF-IDF + logistic regression" in knn["baselines"]
        assert "missing" not in knn


@pytest.mark.usefixtures("local_ray")
def test_what_the_user_names_is_opened(tmp_path: Path, minilm: Path) -> None:
    """By a config that made the table, or by flags; a config of another model is refused."""
    model = tiny.save_clip(tmp_path / "model", minilm)
    checkpoint = open_checkpoint(ModelSpec(id=str(model)), False, "image")
    identity = {**checkpoint.identity, "preprocess.pieces_are_rows": False}
    outputs = {"embedding": {**OUTPUT, "pooling": "projection"}}
    stored = {**SPEC, "probes": ["zeroshot"], "model": {"id": "nowhere"}}
    uri = make_table(
        tmp_path / "out", dim=24, spec=stored, identity=identity, modality="image", outputs=outputs
    ).uri
    assert "needs the model" in fmembed.probe(uri).probes["zeroshot"]["skipped"]
    own = {
        "source": {"uri": "nowhere.jsonl", "label": "topic"},
        "model": {"id": str(model), "dtype": "float32"},
        "output": {"uri": "anywhere"},
        "probes": ["zeroshot"],
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    for result in (
        fmembed.probe(uri, spec=tmp_path / "own.yaml"),
        fmembed.probe(uri, spec=fmembed.RunSpec.parse(own)),
        fmembed.probe(uri, overrides={"model.id": str(model)}),
    ):
        assert 0 <= result.probes["zeroshot"]["value"] <= 1
    # What was found with the model is not lost to a look without.
    assert "needs the model" in fmembed.probe(uri).probes["zeroshot"]["skipped"]
    kept = json.loads(next((tmp_path / "out" / "_probes").glob("*zeroshot*")).read_text())
    assert "headline" in kept
    other = tiny.save_siglip(tmp_path / "other", minilm)
    with pytest.raises(SpecError, match=r"^--from-config: .*another .*model\.weights"):
        fmembed.probe(uri, spec=fmembed.RunSpec.parse({**own, "model": {"id": str(other)}}))
    skipped = fmembed.probe(uri, overrides={"model.id": str(other)}).probes["zeroshot"]["skipped"]
    assert skipped == "the checkpoint has changed since the table was made"


@pytest.mark.usefixtures("local_ray")
def test_texts_in_the_table_need_no_source(tmp_path: Path) -> None:
    result = fmembed.probe(make_table(tmp_path / "out").uri)
    knn = result.probes["knn"]
    assert "TF-IDF + logistic regression" in knn["baselines"]
    assert "missing" not in knn
    assert result.table == str(tmp_path / "out")


@pytest.mark.usefixtures("local_ray")
def test_columns_by_flags(tmp_path: Path) -> None:
    uri = make_table(tmp_path / "out", spec={**SPEC, "source": {"uri": "x"}}).uri
    assert fmembed.probe(uri).probes == {}
    assert fmembed.probe(uri, overrides={"source.label": "topic"}).probes["knn"]["value"] > 0.9
    with pytest.raises(SpecError, match=r"^source\.label: no column 'topik' in the table; it has "):
        fmembed.probe(uri, overrides={"source.label": "topik"})
    # Another name than the text's in the table, so that it has to be read from the source again.
    rows = [{"id": f"r{i}", "body": f"{WORDS[i % 3]} number {i}", "topic": ""} for i in range(60)]
    own = {"source.uri": str(write_jsonl(tmp_path / "in.jsonl", rows)), "source.input": "body",
           "source.id": "id", "source.label": "topic"}  # fmt: skip
    knn = fmembed.probe(uri, overrides=own).probes["knn"]
    assert "TF-IDF + logistic regression" in knn["baselines"]
    rows[7]["body"] = "changed"
    write_jsonl(tmp_path / "in.jsonl", rows)
    knn = fmembed.probe(uri, overrides=own).probes["knn"]
    assert knn["missing"] == "the source has changed since"
    with pytest.raises(SpecError, match=r"^source\.root: of which source\? give --source"):
        fmembed.probe(uri, overrides={"source.root": "x"})
    with pytest.raises(SpecError, match=r"^model\.trust_remote_code: of which model\?"):
        fmembed.probe(uri, overrides={"model.trust_remote_code": True})


def test_a_table_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no such folder"):
        fmembed.probe(str(tmp_path / "none"))
