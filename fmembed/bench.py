"""Measure runs as whole processes: what does not show from inside.

`memory`: the peak of a run over so many rows, and of one over ten times as many.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_MARK = "FMEMBED_BENCH"
_RATE_HZ = 16_000
_CLIP_S = 10
_IMAGE_PX = 224
_SAMPLE_EVERY_S = 0.25


@dataclass(frozen=True)
class Peak:
    """One run: its rows, its rate, and the most memory that all its processes held at once."""

    what: str
    rows: int
    rows_per_s: float
    peak_bytes: int


def memory(num_images: int, num_clips: int) -> dict[str, list[Peak]]:
    """Stream pictures and sounds through small models, and ten times as many.

    Args:
        num_images: Pictures of the first run, 224 x 224.
        num_clips: Sounds of the first run, ten seconds each.

    Returns:
        For images and audio the two runs. Memory is the sum over all processes of the run (driver,
        Ray's own, workers, actors) of their proportional set size, shared memory included.
    """
    found: dict[str, list[Peak]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for what, count, make, save in (
            ("images", num_images, _make_image, _save_vit),
            ("audio", num_clips, _make_clip, _save_wav2vec2),
        ):
            save(folder / what / "model")
            found[what] = []
            for factor in (1, 10):
                data = folder / what / f"x{factor}"
                _write(data, count, factor, make)
                found[what].append(
                    _measure(what, data, folder / what / "model", folder / what / f"out{factor}")
                )
    return found


def _measure(what: str, data: Path, model: Path, out: Path) -> Peak:
    mark = uuid.uuid4().hex
    kind = "image_folder" if what == "images" else "audio_folder"
    run = subprocess.Popen(  # noqa: S603 - our own command
        [
            sys.executable, "-m", "fmembed.cli", "embed", "--json", "--source", str(data),
            "--format", kind, "--model", str(model), "--output", str(out), "--dtype", "float32",
            "--set", "probes=[]",
        ],
        env={**os.environ, _MARK: mark}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    peak, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(_SAMPLE_EVERY_S):
            peak = max(peak, sum(map(_pss_bytes, _processes(mark))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    stdout, _ = run.communicate()
    ended.set()
    watcher.join()
    if run.returncode:
        raise SystemExit(f"the run over {data} failed with exit code {run.returncode}")
    result = json.loads(stdout.splitlines()[-1])
    return Peak(what, result["rows_embedded"], result["rows_per_s"], peak)


def _processes(mark: str) -> list[Path]:
    """All processes of a run: Ray hands its environment down to every one of them."""
    wanted = f"{_MARK}={mark}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (process / "environ").read_bytes().split(b"\0"):
                found.append(process)
        except OSError:  # ended, or another user's
            continue
    return found


def _pss_bytes(process: Path) -> int:
    try:
        lines = (process / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * next((int(x.split()[1]) for x in lines if x.startswith("Pss:")), 0)


# --- what is measured on --------------------------------------------------------------------------


def _write(folder: Path, count: int, factor: int, make: Callable[[Path, int], None]) -> None:
    """`count` different files, each under `factor` names: the disk holds them once."""
    for i in range(count):
        first = folder / f"{i % 100:02d}" / f"{i:06d}-0"
        first.parent.mkdir(parents=True, exist_ok=True)
        make(first, i)
        (made,) = first.parent.glob(f"{first.name}.*")
        for copy in range(1, factor):
            os.link(made, first.parent / f"{i:06d}-{copy}{made.suffix}")


def _make_image(path: Path, seed: int) -> None:
    from PIL import Image

    small = np.random.default_rng(seed).integers(0, 255, (14, 14, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((_IMAGE_PX, _IMAGE_PX), Image.Resampling.BICUBIC)
    image.save(path.with_name(path.name + ".jpg"), quality=90)


def _make_clip(path: Path, seed: int) -> None:
    import soundfile

    samples = np.random.default_rng(seed).normal(0, 0.1, _CLIP_S * _RATE_HZ)
    soundfile.write(path.with_name(path.name + ".wav"), samples, _RATE_HZ, subtype="PCM_16")


def _save_vit(folder: Path) -> None:
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    config = ViTConfig(
        hidden_size=192, num_hidden_layers=4, num_attention_heads=4, intermediate_size=768,
        patch_size=32,
    )  # fmt: skip
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessorPil().save_pretrained(folder)


def _save_wav2vec2(folder: Path) -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    config = Wav2Vec2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        conv_dim=(32,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    Wav2Vec2Model(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)  # type: ignore[no-untyped-call]


def report_memory(found: dict[str, list[Peak]]) -> list[dict[str, Any]]:
    """Rows, rates, peaks and their ratio, as JSON."""
    return [
        {
            "what": what,
            "rows": [peak.rows for peak in peaks],
            "rows_per_s": [peak.rows_per_s for peak in peaks],
            "peak_mib": [round(peak.peak_bytes / 2**20) for peak in peaks],
            "ratio": round(peaks[-1].peak_bytes / peaks[0].peak_bytes, 3),
        }
        for what, peaks in found.items()
    ]
