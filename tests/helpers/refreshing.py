"""A corpus that changes from week to week, and what a table of it must be."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import inline
import numpy as np
from conftest import write_jsonl

import fmembed
from fmembed import RunResult, RunSpec, pipeline
from fmembed.rows.columns import ROW_ID, accepted
from fmembed.rows.counts import add_counts
from fmembed.rows.pieces import Piece, unpack_pieces
from fmembed.rows.vectors import VectorColumns

DIM = 8


def make_stage(log: Path) -> type:
    """A stand-in for the model that writes down the ids of the rows it has seen.

    Within a function, as Ray's workers cannot import this module.
    """

    def vector_of(piece: Piece) -> Any:
        """Unlike for unlike inputs, and alike in every process."""
        content = np.ascontiguousarray(piece.values).tobytes()
        seed = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
        vector = np.random.default_rng(seed).standard_normal(DIM)
        return (vector / np.linalg.norm(vector)).astype(np.float32)

    class Recorder:
        def __init__(self, checkpoint: Any, *, pieces_are_rows: bool, **_: Any) -> None:
            self._columns = VectorColumns(
                checkpoint.outputs, {"embedding": DIM}, {}, pieces_are_rows
            )

        def __call__(self, rows: Any) -> Any:
            pieces = unpack_pieces(rows)
            ids = rows[ROW_ID].to_numpy()[accepted(rows)]
            with log.open("a") as file:
                file.writelines(f"{i}\n" for i in ids)
            vectors = np.stack([vector_of(p) for p in pieces.pieces] or [np.zeros(DIM)])
            embedded = {"embedding": vectors[: len(pieces.pieces)].astype(np.float32)}
            rows = self._columns.join(rows, pieces, embedded, {})
            # A tenth of a second each, of an actor that is not looked at.
            return add_counts(rows, {**pieces.counts, "actor/0/busy_s": 0.1})

    return Recorder


def graded_vector(ids: Any, name: str, noise: float) -> Any:
    """A vector that tells what the first word is, as well as the model of this name does."""
    told = np.random.default_rng(int(ids[1])).standard_normal(2 * DIM)
    content = np.ascontiguousarray(ids, dtype=np.int64).tobytes() + name.encode()
    seed = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
    vector = told + noise * np.random.default_rng(seed).standard_normal(2 * DIM)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def make_graded_stage(name: str, noise: float) -> type:
    """A stand-in for a model that is better or worse than others, in this process only."""

    class Graded:
        def __init__(self, checkpoint: Any, *, pieces_are_rows: bool, **_: Any) -> None:
            dims = {"embedding": 2 * DIM}
            self._columns = VectorColumns(checkpoint.outputs, dims, {}, pieces_are_rows)

        def __call__(self, rows: Any) -> Any:
            pieces = unpack_pieces(rows)
            vectors = [graded_vector(np.asarray(p.values), name, noise) for p in pieces.pieces]
            embedded = {"embedding": np.stack(vectors or [np.zeros(2 * DIM, np.float32)])}
            embedded["embedding"] = embedded["embedding"][: len(vectors)]
            return add_counts(self._columns.join(rows, pieces, embedded, {}), pieces.counts)

    return Graded


def row(key: str, text: str | None = None, topic: str = "a") -> dict[str, Any]:
    """A row of a corpus."""
    return {"key": key, "text": f"about {key}" if text is None else text, "topic": topic}


class Corpus:
    """A folder of JSONL files, a table of it, and what the model has seen."""

    def __init__(self, folder: Path, model: Path, **parts: Any) -> None:
        self.folder, self.out, self.log = folder / "in", folder / "out", folder / "seen"
        self.folder.mkdir()
        self.stage = make_stage(self.log)
        raw: dict[str, Any] = {
            "source": {"uri": str(self.folder), "id": "key", "label": "topic"},
            "model": {"id": str(model), "dtype": "float32"},
            "output": {"uri": str(self.out), "max_rejected_fraction": 1.0},
            "probes": [],
        }
        for name, part in parts.items():
            raw[name] = {**raw.get(name, {}), **part} if isinstance(part, dict) else part
        self.spec = RunSpec.parse(raw)

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        write_jsonl(self.folder / name, rows)

    def refresh(self, allow_removals: int | None = None) -> RunResult:
        """Refresh in this process; all that holds of every refresh is looked at."""
        self.log.unlink(missing_ok=True)
        return self.check(inline.refresh(self.spec, self.stage, allow_removals=allow_removals))

    def refresh_by_ray(self, allow_removals: int | None = None) -> RunResult:
        """The same, as a user does."""
        self.log.unlink(missing_ok=True)
        return self.check(
            pipeline.refresh(self.spec, allow_removals=allow_removals, quiet=True, stage=self.stage)
        )

    def check(self, result: RunResult) -> RunResult:
        assert result.rows_read == (
            result.rows_embedded + result.rows_rejected + result.rows_skipped
        )
        assert len(self.seen()) == result.contents_embedded
        assert fmembed.verify(str(self.out)).problems == []
        assert not list(self.out.glob("_quarantine/*"))
        return result

    def embed(self) -> RunResult:
        return inline.embed(self.spec, self.stage)

    def all_rows(self) -> list[dict[str, Any]]:
        """The rows of the source."""
        lines = (p.read_text().splitlines() for p in sorted(self.folder.glob("*.jsonl")))
        return [json.loads(line) for some in lines for line in some]

    def seen(self) -> list[str]:
        """The ids of the rows that the model has seen in the last refresh."""
        return sorted(self.log.read_text().split()) if self.log.exists() else []

    def rows(self, version: int | None = None) -> dict[str, dict[str, Any]]:
        """The table's rows by id, but for their ids."""
        rows = fmembed.read(str(self.out), version).to_pylist()
        return {row.pop("row_id"): row for row in rows}

    def check_kept_out(self, texts: list[str], hashes: set[str]) -> None:
        """No row of these texts is among those of these contents."""
        for text in texts:
            assert hashlib.blake2b(text.encode(), digest_size=16).hexdigest() not in hashes

    def check_as_from_scratch(self, folder: Path) -> None:
        """Compare the table with one that is made of the source anew."""
        spec = self.spec.model_copy(
            update={"output": self.spec.output.model_copy(update={"uri": str(folder)})}
        )
        inline.embed(spec, make_stage(folder.with_suffix(".seen")))
        anew = fmembed.read(str(folder)).to_pylist()
        assert self.rows() == {row.pop("row_id"): row for row in anew}
