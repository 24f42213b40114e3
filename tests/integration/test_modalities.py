"""Pictures and sounds through the whole line, from folders, tar shards, Parquet and datasets."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from media import bomb_png, picture, sound
from PIL import Image
from tiny import save_clip
from transformers import CLIPImageProcessorPil

import fmembed
from fmembed import RunSpec
from fmembed.cli import run
from fmembed.rows.columns import KILLS
from fmembed.sources.opening import open_source
from fmembed.sources.reading import read_here
from fmembed.spec import SourceSpec

GOOD = {f"{'ab'[i % 2]}/{i:02}": picture(20 + i, 30) for i in range(24)}
BAD = {"a/bad": b"no picture", "b/bomb": bomb_png()}


def folder_source(folder: Path) -> dict[str, Any]:
    for name, content in (GOOD | BAD).items():
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return {"uri": str(folder), "label": "label"}


def add(archive: tarfile.TarFile, name: str, content: bytes, **fields: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(content))


def tar_source(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    for n, part in enumerate((list(GOOD.items())[:10], [*list(GOOD.items())[10:], *BAD.items()])):
        with tarfile.open(folder / f"{n}.tar", "w") as archive:
            for name, content in part:
                add(archive, f"{name}.png", content)
                add(archive, f"{name}.cls", name[0].encode())
    return {"uri": str(folder), "input": "png", "label": "cls", "id": "__key__"}


def parquet_source(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    rows = [
        {"id": name, "image": {"bytes": content, "path": "/etc/passwd"}, "topic": name[0]}
        for name, content in (GOOD | BAD).items()
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "x.parquet")
    return {"uri": str(folder), "input": "image", "label": "topic", "id": "id"}


def hf_source(folder: Path) -> dict[str, Any]:
    import datasets

    rows = [
        {"id": name, "image": {"bytes": content, "path": None}, "topic": name[0]}
        for name, content in (GOOD | BAD).items()
    ]
    text = datasets.Value("string")
    features = datasets.Features({"id": text, "image": datasets.Image(), "topic": text})
    raw = {name: [row[name] for row in rows] for name in ("id", "image", "topic")}
    datasets.Dataset.from_dict(raw, features=features).save_to_disk(folder)
    return {"uri": str(folder), "input": "image", "label": "topic", "id": "id"}


@pytest.mark.usefixtures("local_ray")
def test_every_picture_source_gives_the_same_table(tmp_path: Path, tiny_vit: Path) -> None:
    reference: dict[str, Any] = {}
    makes: list[Callable[[Path], dict[str, Any]]] = [
        folder_source, tar_source, parquet_source, hf_source,
    ]  # fmt: skip
    for make in makes:
        source = make(tmp_path / make.__name__)
        out = str(tmp_path / f"out-{make.__name__}")
        result = fmembed.embed(
            RunSpec.parse({
                "source": source,
                "model": {"id": str(tiny_vit), "dtype": "float32"},
                "output": {"uri": out, "max_rejected_fraction": 0.2},
                "probes": ["knn"],
            })
        )  # fmt: skip
        assert (result.rows_read, result.rows_embedded, result.rows_rejected) == (26, 24, 2)
        assert result.causes == {"corrupt image": 1, "image too large": 1}
        assert "value" in result.probes["knn"]
        assert fmembed.verify(out).problems == []
        rows = fmembed.read(out).to_pylist()
        found = {r["row_id"].removesuffix(".png"): r["embedding"] for r in rows}
        assert found.keys() == GOOD.keys()
        reference = reference or found
        for name, vector in found.items():
            np.testing.assert_allclose(vector, reference[name], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("local_ray")
def test_sounds_by_the_command(
    tmp_path: Path, tiny_wav2vec2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    for i in range(8):
        path = folder / "xy"[i % 2] / f"{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sound(2000 + 500 * i))
    (folder / "x" / "bad.wav").write_bytes(b"RIFF")
    (folder / "x" / "empty.flac").write_bytes(b"")
    out = str(tmp_path / "out")
    command = [
        "embed", "--source", str(folder), "--label", "class", "--model", str(tiny_wav2vec2),
        "--dtype", "float32", "--output", out, "--set", "probes=[]",
    ]  # fmt: skip
    code = run([*command, "--set", "output.max_rejected_fraction=0.5"])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "rows      10 read, 8 embedded, 2 rejected, 0 skipped" in said.out
    assert run(["rejected", out]) == 0
    listed = capsys.readouterr().out
    assert "1 corrupt audio (stage preprocess)" in listed
    assert "1 empty input (stage read)" in listed
    assert run([*command, "--set", "output.max_rejected_fraction=0.5"]) == 0
    assert capsys.readouterr().out.startswith("nothing to do")
    assert run(command) == 1, "two of ten are more than the default allows, today as well"
    assert "2 of 10 rows were rejected" in capsys.readouterr().err


def test_a_hostile_archive_is_only_read(tmp_path: Path) -> None:
    """Links, devices, names that climb out: members are bytes by name, never paths."""
    path = tmp_path / "in" / "evil.tar"
    path.parent.mkdir()
    target = tmp_path / "secret.png"
    target.write_bytes(picture())
    with tarfile.open(path, "w") as archive:
        add(archive, "good.png", picture())
        add(archive, "../../climb.png", picture())
        add(archive, "/abs.png", picture())
        add(archive, "link.png", b"", type=tarfile.SYMTYPE, linkname=str(target))
        add(archive, "hard.png", b"", type=tarfile.LNKTYPE, linkname="good.png")
        add(archive, "device.png", b"", type=tarfile.CHRTYPE)
        add(archive, "last.png", picture())
    before = sorted(tmp_path.rglob("*"))
    spec = SourceSpec(uri=str(path), input="png", id="__key__")
    source = open_source(spec, "image")
    rows = pa.concat_tables(read_here(source)).to_pylist()[:-1]
    assert [(r["row_id"], r["_error"]) for r in rows] == [
        ("good", None), ("../../climb", None), ("abs", None),
        ("evil.tar#3", "unreadable file"), ("evil.tar#4", "unreadable file"),
        ("evil.tar#5", "unreadable file"), ("last", None),
    ]  # fmt: skip
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("spoil", ["cut", "not a tar", "empty", "bad gzip"])
def test_broken_archives(spoil: str, tmp_path: Path) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for i in range(5):
            add(archive, f"{i}.png", picture(100, 100))
    (tmp_path / "a.tar").write_bytes(sink.getvalue())
    content, name = {
        "cut": (sink.getvalue()[:60_000], "b.tar"),
        "not a tar": (b"hello " * 500, "b.tar"),
        "empty": (b"", "b.tar"),
        "bad gzip": (b"\x1f\x8b" + b"x" * 900, "b.tar.gz"),
    }[spoil]
    (tmp_path / name).write_bytes(content)
    source = open_source(SourceSpec(uri=str(tmp_path), input="png"), "image")
    rows = [r for t in read_here(source) for r in t.to_pylist() if r["row_id"]]
    assert [r["_error"] for r in rows[:5]] == [None] * 5
    rest = [(r["row_id"].partition("#")[0], r["_error"]) for r in rows[5:] if r["_error"]]
    assert rest == [(name, "unreadable file")]


def ray_workers() -> Iterator[Path]:
    """The processes that this one's Ray has started for tasks and actors."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            if (process / "cmdline").read_bytes().startswith(b"ray::"):
                raylet = (process / "stat").read_text().rpartition(") ")[2].split()[1]
                driver = Path(f"/proc/{raylet}/stat").read_text().rpartition(") ")[2].split()[1]
                if int(driver) == os.getpid():
                    yield process


@pytest.mark.usefixtures("local_ray")
def test_a_picture_that_explodes_when_resized_is_one_rejected_row(
    tmp_path: Path, minilm: Path
) -> None:
    """129 bytes are 1 x 25,000 pixels, which CLIP's processor makes 224 x 5,600,000: 12 GB."""
    folder = tmp_path / "in"
    folder.mkdir()
    sink = io.BytesIO()
    Image.new("L", (1, 25_000), 128).save(sink, "PNG")
    pictures = [picture(50 + i) for i in range(3)] + [sink.getvalue()]
    for i, content in enumerate(pictures):
        (folder / f"{i}.png").write_bytes(content)
    model = save_clip(tmp_path / "clip", minilm)
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=size).save_pretrained(model)
    peaks_kib: dict[str, int] = {}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            for process in ray_workers():
                with contextlib.suppress(OSError, IndexError):
                    status = (process / "status").read_text()
                    peaks_kib[process.name] = int(status.split("VmHWM:")[1].split()[0])

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    try:
        result = fmembed.embed(
            RunSpec.parse({
                "source": {"uri": str(folder)},
                "model": {"id": str(model), "dtype": "float32"},
                "output": {"uri": str(tmp_path / "out"), "max_rejected_fraction": 0.5},
                "probes": [],
            })
        )  # fmt: skip
    finally:
        ended.set()
        watcher.join()
    assert time.monotonic() - began < 30
    assert (result.rows_embedded, result.rows_rejected) == (3, 1)
    assert result.causes == {"image too large": 1}
    assert peaks_kib
    assert max(peaks_kib.values()) < 2 * 2**20


KILLING = """
import os
from transformers import ViTImageProcessorPil
class KillingProcessor(ViTImageProcessorPil):
    def preprocess(self, images, *args, **kwargs):
        if images[0][0, 0].tolist() == [1, 2, 3]:
            os.kill(os.getpid(), 9)
        return super().preprocess(images, *args, **kwargs)
"""


@pytest.mark.usefixtures("local_ray")
def test_a_picture_that_ends_the_process_which_prepares_it_is_one_rejected_row(
    tmp_path: Path, tiny_vit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a codec's bug does, or the kernel when memory is at its end."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02}.png").write_bytes(picture(50 + i))
    Image.new("RGB", (20, 20), (1, 2, 3)).save(folder / "13.png")
    model = shutil.copytree(tiny_vit, tmp_path / "model")
    (model / "killing.py").write_text(KILLING)
    settings = json.loads((model / "preprocessor_config.json").read_text())
    settings |= {"image_processor_type": "KillingProcessor"}
    settings |= {"auto_map": {"AutoImageProcessor": "killing.KillingProcessor"}}
    (model / "preprocessor_config.json").write_text(json.dumps(settings))
    result = fmembed.embed(
        RunSpec.parse({
            "source": {"uri": str(folder)},
            "model": {"id": str(model), "dtype": "float32", "trust_remote_code": True},
            "output": {"uri": str(tmp_path / "out"), "max_rejected_fraction": 0.5},
            "probes": [],
        })
    )  # fmt: skip
    assert (result.rows_embedded, result.rows_rejected) == (19, 1)
    assert result.causes == {KILLS: 1}
    assert "looking for a row that ends its process" in capsys.readouterr().err
    assert run(["rejected", result.table]) == 0
    listed = capsys.readouterr().out
    assert "1 ends its process (stage preprocess)" in listed
    assert "13.png: its process died, also with this row alone" in listed
    assert fmembed.verify(result.table).problems == []
