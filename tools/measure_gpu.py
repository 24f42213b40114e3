"""The model stage alone on this machine's GPU: tokens/s, share of a product's rate, its kernels.

    python tools/measure_gpu.py                        # all, in bfloat16: three minutes on a card
    python tools/measure_gpu.py bert-large --dtype float32 --batch-tokens 16384
    python tools/measure_gpu.py mistral --kernels 10   # what the card's time goes into
    python tools/measure_gpu.py --device cpu --tiny    # to see that it runs

Weights are seeded, of the shapes that the names say (`mistral` has four of its 32 layers, so that
it is loaded in seconds); texts have the lengths of news articles. Each model prints a line of JSON,
as soon as it is known. The whole pipeline beside other ways: `python jobs/bench.py --device cuda`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fmembed.bench import data
from fmembed.checkpoint.opening import open_checkpoint
from fmembed.model.encoder import Encoder
from fmembed.model.flops import peak_flops
from fmembed.rows.pieces import Piece
from fmembed.spec import ModelSpec

_ROWS = {"minilm": 4096, "bert-large": 2048, "vit-large": 1024, "mistral": 1024}
_WORDS = (1000, 20_000)
_TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
}  # fmt: skip


def save_minilm(folder: Path, tiny: bool) -> None:
    from transformers import BertConfig, BertModel

    size = {
        "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
        "intermediate_size": 1536,
    }  # fmt: skip
    config = BertConfig(**(_TINY if tiny else size))
    data._save_with_tokenizer(data._seeded(BertModel, config), folder)


def save_bert_large(folder: Path, tiny: bool) -> None:
    (data.save_bert_tiny if tiny else data.save_bert_large)(folder)


def save_vit_large(folder: Path, tiny: bool) -> None:
    data.save_vit(folder, "tiny" if tiny else "large")


def save_mistral(folder: Path, tiny: bool) -> None:
    from transformers import MistralConfig, MistralModel

    size = {**_TINY, "num_key_value_heads": 2, "head_dim": 16} if tiny else {"num_hidden_layers": 4}
    model = data._seeded(MistralModel, MistralConfig(**size), "bfloat16")
    data._save_with_tokenizer(model, folder)


_SAVE: dict[str, Callable[[Path, bool], None]] = {
    "minilm": save_minilm, "bert-large": save_bert_large, "vit-large": save_vit_large,
    "mistral": save_mistral,
}  # fmt: skip


def make_pieces(name: str, count: int, longest: int) -> list[Piece]:
    """What the model takes: pixels, or token ids of as many lengths as articles have."""
    draw = np.random.default_rng(0)
    if name.startswith("vit"):
        pictures = draw.integers(0, 255, (min(count, 64), 3, 224, 224), dtype=np.uint8)
        return [Piece(pictures[i % len(pictures)], 1) for i in range(count)]
    lengths = np.clip(draw.normal(450, 200, count), 40, longest).astype(int).tolist()
    return [Piece(draw.integers(*_WORDS, n).astype(np.int32), n) for n in lengths]


def measure(name: str, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Medians of a few windows, after two that nobody counts."""
    device = torch.device(given.device)
    spec = ModelSpec(id=str(folder), dtype=given.dtype)
    checkpoint = open_checkpoint(spec, native_bfloat16=True)
    began = time.perf_counter()
    encoder = Encoder(checkpoint, given.device, batch_tokens=given.batch_tokens or "auto")
    load_s = time.perf_counter() - began
    longest = min(checkpoint.max_tokens, 512) if checkpoint.modality == "text" else 0
    pieces = make_pieces(name, 16 if given.tiny else _ROWS[name], longest)
    seconds = []
    for _ in range(given.windows + 2):
        began = time.perf_counter()
        encoder.embed(pieces)
        seconds.append(time.perf_counter() - began)
    if given.kernels:
        tell_kernels(lambda: encoder.embed(pieces), given.kernels)
    median = statistics.median(seconds[2:])
    lengths = encoder._model.lengths(pieces, np.arange(len(pieces)))
    rate = encoder.cost(lengths) / median
    peak = peak_flops(device, getattr(torch, checkpoint.dtype))
    found = {
        "model": name, "dtype": checkpoint.dtype, "attention": encoder._tower.attention,
        "batch_tokens": encoder._batch_tokens, "halved": encoder.num_halved,
        "load_s": round(load_s, 1), "first_s": round(seconds[0], 3), "window_s": round(median, 4),
        "rows_per_s": round(len(pieces) / median, 1),
        "tokens_per_s": round(int(lengths.sum()) / median),
        "tflop_per_s": round(rate / 1e12, 2), "peak_tflop_per_s": round(peak / 1e12, 2),
        "mfu": round(rate / peak, 3),
    }  # fmt: skip
    if device.type == "cuda":
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        torch.cuda.reset_peak_memory_stats()
    return found


def tell_kernels(run: Callable[[], Any], most: int) -> None:
    """Where a window's time goes on the card, and how long the card was idle."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        began = time.perf_counter()
        run()
        wall_s = time.perf_counter() - began
    kernels = [e for e in profiled.key_averages() if e.self_device_time_total > 0]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    busy_us = sum(e.self_device_time_total for e in kernels)
    print(json.dumps({"wall_s": round(wall_s, 4), "card_s": round(busy_us / 1e6, 4)}), flush=True)
    for kernel in kernels[:most]:
        share = kernel.self_device_time_total / busy_us
        print(f"  {share:6.1%} {kernel.count:6d} {kernel.key[:120]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(_SAVE))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--kernels", type=int, default=0)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    if unknown := sorted(set(given.models) - set(_SAVE)):
        parser.error(f"takes {', '.join(_SAVE)}, got {', '.join(unknown)}")
    if given.device == "cuda":
        if not torch.cuda.is_available():
            sys.exit("measure_gpu: torch finds no CUDA device here")
        print(json.dumps({"card": torch.cuda.get_device_name(), "torch": torch.__version__}))
    with tempfile.TemporaryDirectory() as scratch:
        for name in given.models or _SAVE:
            folder = Path(scratch) / name
            _SAVE[name](folder, given.tiny)
            print(json.dumps(measure(name, folder, given)), flush=True)


if __name__ == "__main__":
    main()
