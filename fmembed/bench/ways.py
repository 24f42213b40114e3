"""One way of embedding a dataset, in a process of its own: `python -m fmembed.bench.ways <task>`.

A way loads its model, warms it up with a few rows and times the rest; the last line it prints is
JSON: `rows` and `seconds` of what it timed. Daft and Ray Data load the model when the first rows
come, which their seconds include. What a process takes in all, its caller measures.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Task = dict[str, Any]
Found = dict[str, Any]

_BATCH_TOKENS, _MAX_BATCH_ROWS = 4096, 1024
_BATCH_SIZES = (8, 16, 32, 64, 128)
_WARM_ROWS, _SWEEP_ROWS = 32, 128
_MEDIA_BATCH = {"images": 16, "audio": 4}
_WINDOW_ROWS, _DIM = 64, 384


# --- text -----------------------------------------------------------------------------------------


def sentence_transformers(task: Task) -> Found:
    """`SentenceTransformer.encode`; `batch` null tries several sizes first and takes the best."""
    model, texts = _sentence_transformer(task), _texts(task)
    model.encode(texts[:_WARM_ROWS])
    batch = task["batch"]
    if batch is None:
        few = texts[:: max(len(texts) // _SWEEP_ROWS, 1)]
        batch = min(_BATCH_SIZES, key=lambda n: _seconds(lambda: model.encode(few, batch_size=n)))
    return {**_timed(len(texts), lambda: model.encode(texts, batch_size=batch)), "batch": batch}


def sentence_transformers_pool(task: Task) -> Found:
    """The same with its pool of processes, one a core."""
    model, texts = _sentence_transformer(task), _texts(task)
    pool = model.start_multi_process_pool(["cpu"] * _num_cores())
    try:
        model.encode(texts[:_WARM_ROWS], pool=pool)
        return _timed(len(texts), lambda: model.encode(texts, pool=pool))
    finally:
        model.stop_multi_process_pool(pool)


def ray_data(task: Task) -> Found:
    """Ray Data as its documentation embeds: an actor around `encode`, batches of 64.

    An actor that asks for no CPUs gets one thread.
    """
    return _ray_data(task, num_cpus=None)


def ray_data_all_cores(task: Task) -> Found:
    """The same where the actor has asked for all cores, and Ray believes in one more to read."""
    return _ray_data(task, num_cpus=_num_cores())


def _ray_data(task: Task, num_cpus: int | None) -> Found:
    import ray

    model = task["model"]

    class Embed:
        def __init__(self) -> None:
            from sentence_transformers import SentenceTransformer

            self.model = SentenceTransformer(model)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            batch["embedding"] = self.model.encode(list(batch["text"]), batch_size=64)
            return batch

    believed = None if num_cpus is None else num_cpus + 1
    ray.init("local", num_cpus=believed, include_dashboard=False, log_to_driver=False)
    rows = ray.data.read_parquet(task["data"]).map_batches(
        Embed, batch_size=64, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=num_cpus
    )
    return _timed(_num_rows(task), lambda: rows.write_parquet(task["out"]))


def daft(task: Task) -> Found:
    """Daft's `embed_text` on its own runner, read to Parquet."""
    import daft as library
    from daft.functions import embed_text

    vectors = embed_text(library.col("text"), provider="transformers", model=task["model"])
    rows = library.read_parquet(task["data"]).with_column("embedding", vectors)
    return _timed(_num_rows(task), lambda: rows.write_parquet(task["out"]))


def text_loop(task: Task) -> Found:
    """The loop one would write: all texts tokenised, sorted, padded, by a budget of tokens."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    dtype = getattr(torch, task["dtype"])
    model = AutoModel.from_pretrained(task["model"], dtype=dtype).to(task["device"]).eval()
    texts, longest = _texts(task), _max_tokens(task)
    forward_s = 0.0

    @torch.inference_mode()
    def embed(some: list[str]) -> Any:
        nonlocal forward_s
        encoded = tokenizer(some, truncation=True, max_length=longest)["input_ids"]
        lengths = np.array([len(ids) for ids in encoded])
        vectors = np.zeros((len(some), model.config.hidden_size), dtype=np.float32)
        began = time.perf_counter()
        for batch in _sorted_batches(lengths):
            mask = np.arange(lengths[batch].max()) < lengths[batch, None]
            ids = np.zeros(mask.shape, dtype=np.int64)
            ids[mask] = np.concatenate([encoded[i] for i in batch])
            mask_BL = torch.from_numpy(mask.astype(np.int64)).to(task["device"])
            ids_BL = torch.from_numpy(ids).to(task["device"])
            hidden_BLD = model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state.float()
            sums_BD = (hidden_BLD * mask_BL.unsqueeze(-1)).sum(1)
            means_BD = sums_BD / mask_BL.sum(1, keepdim=True)
            vectors[batch] = torch.nn.functional.normalize(means_BD, dim=1).cpu().numpy()
        forward_s += time.perf_counter() - began
        return vectors

    embed(texts[:_WARM_ROWS])
    forward_s = 0.0
    return {**_timed(len(texts), lambda: embed(texts)), "forward_s": forward_s}


def _sorted_batches(lengths: Any) -> Iterator[Any]:
    order, at = np.argsort(-lengths, kind="stable"), 0
    while at < len(order):
        count = min(max(_BATCH_TOKENS // int(lengths[order[at]]), 1), _MAX_BATCH_ROWS)
        yield order[at : at + count]
        at += count


# --- images and audio -----------------------------------------------------------------------------


def image_pipeline(task: Task) -> Found:
    """transformers' `image-feature-extraction` pipeline over files, `batch` at a time."""
    import torch
    from transformers import pipeline

    files = _files(task)
    extract = pipeline(
        "image-feature-extraction", model=task["model"], dtype=getattr(torch, task["dtype"]),
        device=task["device"], return_tensors=True,
    )  # fmt: skip
    extract(files[:4])
    return _timed(len(files), lambda: extract(files, batch_size=task["batch"]))


def media_one_by_one(task: Task) -> Found:
    """A file, its processor, the model: as the model pages of transformers show it."""
    return _media(task, 1)


def media_loop(task: Task) -> Found:
    """The same in batches; sounds sorted by length, so that little is padded."""
    return _media(task, _MEDIA_BATCH[task["kind"]])


def _media(task: Task, batch: int) -> Found:
    import torch
    from transformers import AutoModel

    dtype = getattr(torch, task["dtype"])
    model = AutoModel.from_pretrained(task["model"], dtype=dtype).to(task["device"]).eval()
    load = _images(task) if task["kind"] == "images" else _sounds(task)
    files = _files(task)
    if task["kind"] == "audio":
        files = sorted(files, key=os.path.getsize, reverse=True)

    @torch.inference_mode()
    def embed(some: list[str]) -> None:
        for at in range(0, len(some), batch):
            inputs = load(some[at : at + batch])
            inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
            hidden_BLD = model(**inputs).last_hidden_state
            pooled_BD = hidden_BLD[:, 0] if task["kind"] == "images" else hidden_BLD.mean(1)
            pooled_BD.float().cpu().numpy()

    embed(files[:batch])
    return _timed(len(files), lambda: embed(files))


def _images(task: Task) -> Callable[[list[str]], dict[str, Any]]:
    from PIL import Image
    from transformers import AutoImageProcessor

    processor: Any = AutoImageProcessor
    processor = processor.from_pretrained(task["model"])

    def load(files: list[str]) -> dict[str, Any]:
        images = [Image.open(file).convert("RGB") for file in files]
        return dict(processor(images, return_tensors="pt"))

    return load


def _sounds(task: Task) -> Callable[[list[str]], dict[str, Any]]:
    import soundfile
    from transformers import AutoFeatureExtractor

    extractor: Any = AutoFeatureExtractor
    extractor = extractor.from_pretrained(task["model"])

    def load(files: list[str]) -> dict[str, Any]:
        sounds = [soundfile.read(file, dtype="float32")[0] for file in files]
        rate = extractor.sampling_rate
        return dict(extractor(sounds, sampling_rate=rate, padding=True, return_tensors="pt"))

    return load


# --- ours, in parts -------------------------------------------------------------------------------


def encoder(task: Task) -> Found:
    """Our model stage alone on rows that are ready, in one actor's thread, and matrix products.

    Beside rows and seconds: `share`, the model's FLOP over what products alone would have done in
    that time, each window's by the products before and after it, because a machine's rate drifts.
    """
    import torch
    from transformers import AutoTokenizer

    from fmembed.checkpoint.opening import open_checkpoint
    from fmembed.model.encoder import Encoder
    from fmembed.model.flops import peak_flops
    from fmembed.rows.pieces import Piece
    from fmembed.spec import ModelSpec

    checkpoint = open_checkpoint(ModelSpec(id=task["model"], dtype=task["dtype"]), True)
    model = Encoder(checkpoint, task["device"], num_threads=1)
    tokenizer: Any = AutoTokenizer
    tokenizer = tokenizer.from_pretrained(task["model"])
    longest = checkpoint.max_tokens
    encoded = tokenizer(_texts(task), truncation=True, max_length=longest)["input_ids"]
    pieces = [Piece(np.array(ids, dtype=np.int32), len(ids)) for ids in encoded]
    dtype, device = getattr(torch, task["dtype"]), torch.device(task["device"])
    windows = [pieces[i : i + _WINDOW_ROWS] for i in range(0, len(pieces), _WINDOW_ROWS)]
    model.embed(windows[0])
    peaks, seconds = [peak_flops(device, dtype)], []
    for window in windows:
        seconds.append(_seconds(functools.partial(model.embed, window)))
        peaks.append(peak_flops(device, dtype))
    flop = model.cost(np.array([len(ids) for ids in encoded]))
    around = [(a + b) / 2 for a, b in itertools.pairwise(peaks)]
    possible = sum(s * p for s, p in zip(seconds, around, strict=True))
    return {
        "rows": len(pieces),
        "seconds": sum(seconds),
        "share": flop / possible,
        "gflop_per_s": flop / sum(seconds) / 1e9,
        "peak_gflop_per_s": possible / sum(seconds) / 1e9,
    }


def without_model(task: Task) -> Found:
    """The whole pipeline with a model that computes nothing: what all the rest costs.

    `parts` are microseconds a row, summed over the processes of a stage; `rest` is what they leave
    of all cores: starting, Ray's own processes, the driver, idling.
    """
    from fmembed.pipeline import embed
    from fmembed.spec import RunSpec

    spec = RunSpec.parse(
        {
            "source": {"uri": task["data"]},
            "model": {"id": task["model"], "dtype": task["dtype"]},
            "output": {"uri": task["out"]},
            "probes": [],
        }
    )
    result = embed(spec, quiet=True, stage=EmbedNothing)
    us = 1e6 / result.rows_embedded
    seconds = result.verdict["seconds"]
    parts = {name: s * us for name, s in seconds.items() if name not in ("load", "wait")}
    parts["rest"] = result.seconds * us * _num_cores() - sum(parts.values())
    return {
        "rows": result.rows_embedded,
        "seconds": result.seconds,
        "us_a_row": result.seconds * us,
        "parts": parts,
    }


class EmbedNothing:
    """An embed stage whose forward pass is a copy of random numbers."""

    def __init__(self, checkpoint: Any, *, pieces_are_rows: bool, **_: Any) -> None:
        from fmembed.model.meter import Meter
        from fmembed.rows.vectors import VectorColumns

        vectors = np.random.default_rng(0).standard_normal((_MAX_BATCH_ROWS * 8, _DIM))
        self._vectors = vectors.astype(np.float32)
        dims = {"embedding": _DIM}
        self._columns = VectorColumns(checkpoint.outputs, dims, {}, pieces_are_rows)
        self._meter = Meter(0.0, lambda: 1.0, lambda _: 0.0)

    def __call__(self, rows: Any) -> Any:
        from fmembed.rows.counts import add_counts
        from fmembed.rows.pieces import unpack_pieces

        self._meter.start()
        pieces = unpack_pieces(rows)
        rows = self._columns.join(rows, pieces, *self.embed(pieces.pieces))
        return add_counts(rows, {**pieces.counts, **self._meter.stop()})

    def embed(self, pieces: Any) -> tuple[dict[str, Any], dict[int, Any]]:
        with self._meter.timed("forward_s"):
            vectors = self._vectors[: len(pieces)].copy()
        lengths = np.array([p.num_units for p in pieces])
        self._meter.batch(lengths, int(lengths.sum()))
        return {"embedding": vectors}, {}


# --- what they share ------------------------------------------------------------------------------

WAYS: dict[str, Callable[[Task], Found]] = {
    way.__name__: way
    for way in (
        sentence_transformers, sentence_transformers_pool, ray_data, ray_data_all_cores, daft,
        text_loop, image_pipeline, media_one_by_one, media_loop, encoder, without_model,
    )
}  # fmt: skip


def _sentence_transformer(task: Task) -> Any:
    import torch
    from sentence_transformers import SentenceTransformer

    dtype = getattr(torch, task["dtype"])
    return SentenceTransformer(task["model"], device=task["device"], model_kwargs={"dtype": dtype})


@functools.cache
def _read(path: str) -> list[str]:
    import pyarrow.parquet as pq

    return list(pq.read_table(path, columns=["text"])["text"].to_pylist())


def _texts(task: Task) -> list[str]:
    return _read(task["data"])[:: task["every"]]


def _num_rows(task: Task) -> int:
    return len(_read(task["data"]))


def _files(task: Task) -> list[str]:
    return sorted(str(p) for p in Path(task["data"]).rglob("*") if p.is_file())[:: task["every"]]


def _max_tokens(task: Task) -> int:
    """What sentence-transformers cuts at, so that all ways embed the same tokens."""
    own = Path(task["model"]) / "sentence_bert_config.json"
    return int(json.loads(own.read_text())["max_seq_length"]) if own.exists() else 512


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _seconds(do: Callable[[], Any]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def _timed(rows: int, do: Callable[[], Any]) -> Found:
    return {"rows": rows, "seconds": _seconds(do)}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(WAYS[given["way"]](given)))
