"""What is measured: ways of embedding the same rows, and the ratios that are to be reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fmembed.bench import data
from fmembed.devices import cpu_has_bfloat16

STEADY, WHOLE = "rows_per_s", "whole_rows_per_s"
_FIGURES = {
    STEADY: "",
    WHOLE: "whole run",
    "share": "share of a matrix product's rate",
    "mfu": "share of a matrix product's rate",
    "wait_share": "share of the time that the model waited",
    "us_a_row": "us a row, start included",
    "first_s": "seconds to the first rows committed",
    "driver_mib": "the driver's peak memory",
    "driver_rss_mib": "the driver's peak memory, shared pages too, MiB",
    "worker_mib": "a worker's peak memory",
}


@dataclass(frozen=True)
class Way:
    """One way: a function of `ways`, or "fmembed" for the whole pipeline by its command.

    `every` takes each n-th row: a rate in the steady state needs no whole dataset. A `batch` of
    null is tried out first. `options` are more of our command's fields.
    """

    name: str
    run: str
    dtype: str = "float32"
    every: int = 1
    batch: int | None = 32
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bar:
    """What a figure of a way is to reach: as a ratio to another way's, or without one by itself.

    `rows_per_s` is the steady state: loading and warming up left out. `whole_rows_per_s` counts all
    that the process did, its start included. `share` is of a matrix product alone. Without bounds
    it is only told.
    """

    way: str
    other: str
    figure: str
    least: float | None = None
    most: float | None = None

    @property
    def what(self) -> str:
        """What is compared, in words."""
        ways = f"{self.way} / {self.other}" if self.other else self.way
        return ", ".join(filter(None, (ways, _FIGURES[self.figure])))


@dataclass(frozen=True)
class Suite:
    """Ways over the same rows, and what they are to reach."""

    name: str
    rows: int
    kind: str
    ways: tuple[Way, ...]
    bars: tuple[Bar, ...]
    make_data: Callable[[Path, int], None]
    make_model: Callable[[Path], None] | None = None


_ST, _POOL = "sentence-transformers", "sentence-transformers, its pool"
_LOOP, _FORWARD, _DAFT = "bare loop", "our forward alone", "Daft"
_RAY, _RAY_ALL = "Ray Data as documented", "Ray Data, an actor of all cores"
_EVERY = 4


def suites_on(device: str) -> tuple[Suite, ...]:
    """All suites for "cpu" or "cuda"."""
    return _on_gpu() if device == "cuda" else _on_cpu(cpu_has_bfloat16())


def _on_cpu(has_bfloat16: bool) -> tuple[Suite, ...]:
    """Ours by default is bfloat16 where the CPU computes it, and float32 where it does not.

    Without it nothing in bfloat16 is run: on an AVX2 core it took a hundred times as long.
    """
    dtypes = ("float32", "bfloat16") if has_bfloat16 else ("float32",)
    default = _name("fmembed", dtypes[-1])
    ours = tuple(Way(_name("fmembed", d), "fmembed", d) for d in dtypes)

    def each(what: str, run: str, every: int = 1, batch: int | None = 32) -> tuple[Way, ...]:
        return tuple(Way(_name(what, d), run, d, every, batch) for d in dtypes)

    text = (
        *ours,
        *each(_LOOP, "text_loop", 2),
        *each(_ST, "sentence_transformers", _EVERY),
        *each(f"{_ST}, best batch", "sentence_transformers", _EVERY, None),
        Way(_POOL, "sentence_transformers_pool", every=_EVERY),
        Way(_RAY, "ray_data"),
        Way(_RAY_ALL, "ray_data_all_cores"),
        Way(_DAFT, "daft"),
        *each(_FORWARD, "encoder", _EVERY),
    )

    # Why `placement.plan_compute` gives each core an actor of its own.
    one = Way(
        "fmembed, one actor of all cores", "fmembed", dtypes[-1], options=("compute.actors=1",)
    )

    def bars(loop: float) -> tuple[Bar, ...]:
        fast = (
            Bar("fmembed bfloat16", _ST, STEADY, 2.3),
            Bar("fmembed bfloat16", f"{_ST} bfloat16", STEADY),
        )
        return (
            *(Bar(_name("fmembed", d), _name(_LOOP, d), STEADY, loop) for d in dtypes),
            Bar("fmembed", _ST, STEADY, 1.25),
            *(fast if has_bfloat16 else ()),
            Bar(default, _DAFT, WHOLE, 2.0),
            Bar(default, _RAY, WHOLE, 2.5),
            Bar(default, _RAY_ALL, WHOLE),
        )

    forward = tuple(Bar(_name(_FORWARD, d), "", "share", 0.75) for d in dtypes)

    def media(way: Way, loop: tuple[Way, ...]) -> tuple[Bar, ...]:
        return (
            Bar(default, way.name, STEADY, 1.5),
            Bar("fmembed", way.name, STEADY),
            *(Bar(_name("fmembed", x.dtype), x.name, STEADY, 0.85) for x in loop),
        )

    pipeline = Way("transformers pipeline", "image_pipeline", every=2, batch=1)
    batched = Way("transformers pipeline, 16 at a time", "image_pipeline", every=2, batch=16)
    alone = Way("transformers, one by one", "media_one_by_one", every=2)
    loop = each(_LOOP, "media_loop", 2)
    return (
        Suite(
            "articles", 2225, "text", text, (*bars(0.90), *forward), data.articles,
        ),
        Suite("sentences", 6000, "text", text, bars(0.85), data.sentences),
        Suite(
            "actors", 1500, "text", (ours[-1], one), (Bar(default, one.name, STEADY, 1.0),),
            data.articles,
        ),
        Suite(
            "images", 480, "images", (*ours, pipeline, batched, *loop),
            media(pipeline, loop), data.images,
            lambda folder: data.save_vit(folder, "small"),
        ),
        Suite(
            "audio", 240, "audio", (*ours, alone, *loop), media(alone, loop),
            data.sounds, lambda folder: data.save_wav2vec2(folder, "small"),
        ),
        Suite(
            "overhead", 1_000_000, "text", (Way("no model", "without_model"),),
            (Bar("no model", "", "us_a_row", most=60.0),),
            data.short_texts,
        ),
    )  # fmt: skip


def _name(what: str, dtype: str) -> str:
    return what if dtype == "float32" else f"{what} {dtype}"


def _on_gpu() -> tuple[Suite, ...]:
    """Ours beside sentence-transformers and transformers on one card, in bfloat16."""
    ours = Way("fmembed", "fmembed", "bfloat16")

    def bars(other: Way, mfu: float | None) -> tuple[Bar, ...]:
        large = (Bar("fmembed", "", "mfu", mfu),) if mfu else ()
        waits = Bar("fmembed", "", "wait_share", most=0.05)
        return (Bar("fmembed", other.name, STEADY, 1.0), *large, waits)

    def text(name: str, rows: int, save: Callable[[Path], None] | None, mfu: float | None) -> Suite:
        peer = Way(_ST, "sentence_transformers", "bfloat16")
        best = Way(f"{_ST}, best batch", "sentence_transformers", "bfloat16", 1, None)
        ways = (ours, peer, best)
        return Suite(name, rows, "text", ways, bars(peer, mfu), data.articles, save)

    pipeline = Way("transformers pipeline", "image_pipeline", "bfloat16", batch=64)
    return (
        text("minilm", 65_536, None, None),
        text("bert-large", 16_384, data.save_bert_large, 0.5),
        text("decoder-7b", 2048, data.save_decoder_7b, 0.5),
        Suite(
            "vit-large", 8192, "images", (ours, pipeline), bars(pipeline, 0.5), data.images,
            lambda folder: data.save_vit(folder, "large"),
        ),
    )  # fmt: skip
