"""The config that `fmembed init` writes."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT
from media import picture, sound

from fmembed import RunSpec, cli
from fmembed.errors import SourceError, SpecError
from fmembed.first_config import propose
from fmembed.sources.opening import open_source

LONG = "a sentence of some words that goes on for a while. " * 40


def rows(n: int = 40) -> list[dict[str, Any]]:
    return [
        {
            "sku": f"A-{i}", "title": f"Thing {i}",
            "body": f"{i} {LONG if i % 4 == 0 else 'short'}",
            "when": pd.Timestamp("2026-01-01", tz="UTC") + pd.Timedelta(i, "h"),
            "topic": ["spam", "ham"][i % 2], "split": ["train", "test"][i % 5 == 0],
            "price": i / 2, "more": {"a": 1}, "truncated": 0,
        }
        for i in range(n)
    ]  # fmt: skip


def check(text: str, modality: Any = "text") -> dict[str, Any]:
    """It is a config, whose source can be opened; what it says."""
    spec = RunSpec.parse(yaml.safe_load(text))
    open_source(spec.source, (modality,))
    found: dict[str, Any] = yaml.safe_load(text)
    return found


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.jsonl", "a.json"])
def test_columns_are_for_what_they_look_like(name: str, tmp_path: Path) -> None:
    frame = pd.DataFrame(rows())
    path = tmp_path / name
    if name == "a.csv":
        frame.drop(columns="more").to_csv(path, index=False)
    elif name == "a.parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=name == "a.jsonl", date_format="iso")
    text = propose(str(path))
    found = check(text)
    assert found["source"]["carry"] == ["title", "when", "price"]
    assert found == {
        "source": {
            "uri": str(path), "format": name[2:], "input": "body", "id": "sku", "label": "topic",
            "split": "split", "carry": ["title", "when", "price"],
        },
        "model": {"id": "sentence-transformers/all-MiniLM-L6-v2"},
        "output": {"uri": "out/a"},
    }  # fmt: skip
    assert "what the probes predict: 2 values (ham, spam) in the first 40 rows" in text
    assert "not all of 25 % of the texts" in text
    assert "#   chunk_tokens: 256" in text


def test_what_cannot_be_told_is_left_open(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"words": f"text {i}"}) for i in range(9))
    )
    text = propose(str(tmp_path / "a.jsonl"), model="my/model", output="s3://bucket/t")
    found = check(text)
    assert found["source"] == {
        "uri": str(tmp_path / "a.jsonl"), "format": "jsonl", "input": "words"
    }  # fmt: skip
    assert (found["model"], found["output"]) == ({"id": "my/model"}, {"uri": "s3://bucket/t"})
    assert "# id: ..." in text
    assert "# label: ..." in text
    assert "chunk_tokens" not in text


def test_texts_in_other_letters_get_a_model_that_knows_them(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Übergrößenträger für Mädchen\n" * 3 + "これは日本語の文です\n")
    found = check(propose(str(tmp_path / "a.txt"), format_="lines"))
    assert "multilingual" in found["model"]["id"]


@pytest.mark.parametrize(
    ("suffix", "content", "modality", "model"),
    [
        (".png", picture(), "image", "facebook/dinov2-small"),
        (".wav", sound(4000), "audio", "facebook/wav2vec2-base"),
        (".txt", b"some words", "text", "sentence-transformers/all-MiniLM-L6-v2"),
    ],
)
def test_folders_of_files(
    suffix: str, content: bytes, modality: str, model: str, tmp_path: Path
) -> None:
    for name in ("cat/1", "cat/2", "dog/1", "dog/2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}{suffix}").write_bytes(content)
    text = propose(str(tmp_path))
    found = check(text, modality)
    assert (found["model"]["id"], found["source"]["label"]) == (model, "label")
    assert "4 files" in text


def test_columns_of_pictures_and_sounds(tmp_path: Path) -> None:
    table = pa.table({"id": [1, 2], "img": [picture(), picture()], "caption": ["one", "two"]})
    pq.write_table(table, tmp_path / "a.parquet")
    found = check(propose(str(tmp_path / "a.parquet")), "image")
    assert (found["source"]["input"], found["source"]["id"]) == ("img", "id")
    assert found["model"]["id"] == "facebook/dinov2-small"
    pq.write_table(pa.table({"clip": [sound(4000)]}), tmp_path / "b.parquet")
    assert check(propose(str(tmp_path / "b.parquet")), "audio")["source"]["input"] == "clip"
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "c.npz", X=pixels, y=np.array([0, 1, 0, 1, 1]))
    found = check(propose(str(tmp_path / "c.npz")), "image")
    assert (found["source"]["input"], found["source"]["label"]) == ("X", "y")


def test_a_tar_of_samples(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(6):
            for suffix, content in (("jpg", picture()), ("cls", b"01"[i % 2 : i % 2 + 1])):
                member = tarfile.TarInfo(f"{i:04}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    found = check(propose(str(tmp_path / "a.tar")), "image")["source"]
    assert (found["input"], found["id"], found["label"]) == ("jpg", "__key__", "cls")


def test_names_that_yaml_and_terminals_take_for_more_are_quoted(tmp_path: Path) -> None:
    frame = pd.DataFrame({"yes": ["some words here"] * 4, "a: b # c\n\x1b[31m": ["x", "y"] * 2})
    frame.to_parquet(tmp_path / "it's: odd #1.parquet")
    text = propose(str(tmp_path / "it's: odd #1.parquet"))
    found = check(text)
    assert (found["source"]["input"], found["source"]["label"]) == ("yes", "a: b # c\n\x1b[31m")
    assert "\x1b" not in text


def test_what_is_no_dataset_is_told(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        propose(str(tmp_path / "none.csv"))
    (tmp_path / "a.csv").write_text("n,m\n1,2\n")
    pd.DataFrame({"n": [1, 2]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(SpecError, match=r"init: no column of .* holds texts, .*; it has n$"):
        propose(str(tmp_path / "a.parquet"))
    (tmp_path / "b.jsonl").write_text("nothing\nof the kind\n")
    with pytest.raises(SourceError):
        propose(str(tmp_path / "b.jsonl"))


def test_the_configs_of_the_project_come_with_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.run(["init", "--example", "text", "--to", "-"]) == 0
    assert capsys.readouterr().out == (ROOT / "jobs/configs/text.yaml").read_text()
    assert cli.run(["init", "--example", "nope"]) == 2
    assert "there are audio, clap, clip" in capsys.readouterr().err
    assert cli.run(["init"]) == 2
    assert cli.run(["init", str(tmp_path), "--example", "text"]) == 2


def test_the_command_writes_where_nothing_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pd.DataFrame(rows()).to_parquet("a.parquet")
    assert cli.run(["init", "a.parquet"]) == 0
    assert capsys.readouterr().out == "wrote a.yaml; look at it, then: fmembed embed a.yaml\n"
    check(Path("a.yaml").read_text())
    assert cli.run(["init", "a.parquet"]) == 2
    assert "a.yaml is there already; give another --to" in capsys.readouterr().err
    assert cli.run(["init", "a.parquet", "--to", "-", "--output", "out/x"]) == 0
    assert check(io.StringIO(capsys.readouterr().out).read())["output"] == {"uri": "out/x"}
    assert cli.run(["init", "a.parquet", "--to", "no/such/a.yaml"]) == 2


@pytest.mark.parametrize(
    "evil",
    [
        "z\nsource: {uri: /e}#",
        "\nprobes: [] #",
        "a\rb",
        "\x1b[31m",
        "x\x85y",
        "'",
        '"',
        "#",
        "{",
        "%",
    ],
)
def test_no_value_or_name_says_more_than_itself(evil: str, tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"text": ["some words"] * 6, "topic": [evil, "b"] * 3, evil: ["c", "d"] * 3}
    )
    frame.to_parquet(tmp_path / "a.parquet")
    text = propose(str(tmp_path / "a.parquet"), model=f"m{evil}", output=f"o{evil}")
    found = check(text)
    assert found["source"]["uri"] == str(tmp_path / "a.parquet")
    assert (found["source"]["label"], found["source"]["carry"]) == ("topic", [evil])
    assert (found["model"]["id"], found["output"]["uri"]) == (f"m{evil}", f"o{evil}")
    assert set(found) == {"source", "model", "output"}


def test_of_a_header_that_is_no_utf8_the_encoding_is_asked(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,na\xefve\nsome words,x\nmore words,y\n")
    with pytest.raises(SourceError, match=r"header is not utf-8: .*source\.csv\.encoding"):
        propose(str(tmp_path / "a.csv"))
