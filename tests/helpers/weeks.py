"""A year in small: a corpus that changes every week, and a table that is kept in step with it."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import inline
import numpy as np
import pytest
import tokenizers
from conftest import write_jsonl
from refreshing import graded_vector, make_graded_stage, make_stage

import fmembed
from fmembed import RunSpec
from fmembed.result import RunResult
from fmembed.rows.found import COPY, EMBED
from fmembed.run.refresh import Foreseen
from fmembed.storage import Storage, _LocalDraft
from fmembed.table.table import Table


class Killed(BaseException):
    """The process is gone: what it was about to write is not written."""


@contextmanager
def killed_at(number: int, under: str) -> Iterator[Callable[[], int]]:
    """Die at the write with a number to a table; how many there were."""
    count = 0

    def dies(owner: type, name: str) -> Any:
        original = getattr(owner, name)

        def method(self: Any, *given: Any, **named: Any) -> Any:
            nonlocal count
            place = self.uri if isinstance(self, Storage) else str(self._half)
            if place.startswith(under) and not str(given[0]).startswith("_lock/"):
                count += 1
                if count == number:
                    raise Killed(f"{name} {given[0]}")
            return original(self, *given, **named)

        return method

    with pytest.MonkeyPatch.context() as patch:
        for name in ("put", "create", "delete", "move"):
            patch.setattr(Storage, name, dies(Storage, name))
        patch.setattr(_LocalDraft, "publish", dies(_LocalDraft, "publish"))
        yield lambda: count


def check_foreseen(seen: Foreseen, result: RunResult) -> None:
    """What a plan says of rows is what the refresh then does."""
    if result.unchanged:
        assert not seen.counts["todo"]
        return
    fanned, fates = seen.drawn.num_fanned_out, seen.drawn.fates
    assert {
        **{f"rows_{name}": seen.counts[name] for name in ("new", "changed", "unchanged")},
        "rows_read": seen.rows_read,
        "rows_removed": seen.rows_removed,
        "rows_withheld": seen.rows_withheld,
        "contents_embedded": fates.get(EMBED, 0),
        "rows_embedded": fates.get(EMBED, 0) + fanned,
        "rows_copied": fates.get(COPY, 0) - fanned,
    } == {name: getattr(result, name) for name in (
        "rows_new", "rows_changed", "rows_unchanged", "rows_read", "rows_removed", "rows_withheld",
        "contents_embedded", "rows_embedded", "rows_copied",
    )}  # fmt: skip


@dataclass
class Week:
    """What a week's refresh has done, as against what it had to."""

    number: int
    what: str
    result: RunResult
    seen: int
    needed: int
    seconds: float = 0.0


@dataclass
class Year:
    """The corpus: ids with a text, a topic and the file that has them.

    `kept` is what the table holds by now, by the plain model: id to text and topic.
    """

    folder: Path
    table: str
    model: str
    num_rows: int
    seed: int = 0
    num_files: int = 10
    rows: dict[str, tuple[str, str, int]] = field(default_factory=dict)
    kept: dict[str, tuple[str, str]] = field(default_factory=dict)
    next_id: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)  # noqa: S311
        self.source, self.log = self.folder / "in", self.folder / "seen"
        self.source.mkdir(parents=True)
        self.stage = make_stage(self.log)
        self.spec = self.spec_of(self.table)
        for _ in range(self.num_rows):
            self.add()
        self.write()

    def spec_of(self, table: str) -> RunSpec:
        return RunSpec.parse(
            {
                "source": {"uri": str(self.source), "id": "key", "label": "topic"},
                "model": {"id": self.model, "dtype": "float32"},
                "output": {"uri": table, "max_rejected_fraction": 1.0},
                "refresh": {"on_rejected": "remove"},
                "probes": [],
            }
        )

    def add(self) -> None:
        self.rows[f"id{self.next_id}"] = (self.text(), "t0", self.random.randrange(self.num_files))
        self.next_id += 1

    def text(self) -> str:
        """One in ten is a copy of another one, one in fifty is none."""
        if self.rows and self.random.random() < 0.1:
            return self.random.choice(list(self.rows.values()))[0]
        if self.random.random() < 0.02:
            return ""
        return f"words {self.random.random():.12f}"

    def change(self) -> None:
        """1 % new, 1 % changed, 0.5 % removed; labels, places and orders of some."""
        n = max(self.num_rows // 100, 1)
        some = self.random.sample(sorted(self.rows), 4 * n)
        for key in some[: n // 2 or 1]:
            del self.rows[key]
        for key in some[n : 2 * n]:
            self.rows[key] = (self.text(), *self.rows[key][1:])
        for key in some[2 * n : 3 * n]:
            self.rows[key] = (self.rows[key][0], f"t{self.random.randrange(5)}", self.rows[key][2])
        for key in some[3 * n :]:
            file = self.random.randrange(self.num_files)
            self.rows[key] = (*self.rows[key][:2], file)
        for _ in range(n):
            self.add()

    def write(self) -> None:
        for path in self.source.iterdir():
            path.unlink()
        for file in range(self.num_files):
            rows = [
                {"key": key, "text": text, "topic": topic}
                for key, (text, topic, own) in self.rows.items() if own == file
            ]  # fmt: skip
            write_jsonl(self.source / f"{file}.jsonl", rows)

    def wanted(self) -> dict[str, tuple[str, str]]:
        """What the table has to hold."""
        return {key: row[:2] for key, row in self.rows.items() if row[0]}

    def run(self, number: int, what: str = "refresh", kill_at: int = 0) -> Week:
        """A week: refresh, be killed and refresh again, or find the source emptied."""
        self.log.unlink(missing_ok=True)
        wanted = self.wanted()
        needed = len({t for t, _ in wanted.values()} - {t for t, _ in self.kept.values()})
        run_id = f"{number:012x}"
        if what == "emptied":
            for path in self.source.iterdir():
                path.unlink()
            result = inline.refresh(self.spec, self.stage, run_id)
            assert result.rows_withheld == len(self.kept)
            self.check(self.kept)
            self.write()
        if what == "killed":
            with killed_at(kill_at, self.table), contextlib.suppress(Killed):
                inline.refresh(self.spec, self.stage, f"{number + 1000:012x}")
        if what == "embed":
            inline.embed(self.spec, self.stage, f"{number + 2000:012x}")
        seen = inline.foresee(self.spec)
        result = inline.refresh(self.spec, self.stage, run_id)
        check_foreseen(seen, result)
        self.kept = wanted
        self.check(wanted)
        seen = len(self.log.read_text().split()) if self.log.exists() else 0
        if what not in ("killed", "embed"):
            assert seen == needed, (what, seen, needed)
        assert seen >= needed
        return Week(number, what, result, seen, needed)

    def check(self, wanted: dict[str, tuple[str, str]]) -> None:
        """The table is the plain model's: rows, labels; and equal vectors for equal texts."""
        rows = fmembed.read(self.table, columns=["row_id", "content_hash", "topic", "embedding"])
        found = {r["row_id"]: r for r in rows.to_pylist()}
        assert len(found) == rows.num_rows
        assert found.keys() == wanted.keys()
        vectors: dict[str, Any] = {}
        for key, (text, topic) in wanted.items():
            assert found[key]["topic"] == topic
            assert vectors.setdefault(text, found[key]["embedding"]) == found[key]["embedding"]
        assert Table(self.table).staged() == []
        assert fmembed.verify(self.table).problems == []

    def check_as_from_scratch(self, table: str) -> None:
        """All columns of all rows are those of a table that is made anew."""
        inline.embed(self.spec_of(table), make_stage(self.folder / "seen-anew"), "feed00000000")
        both = [fmembed.read(uri).sort_by("row_id") for uri in (self.table, table)]
        assert both[0].equals(both[1])


# What a row is about: the first word of its text, which a model sees more or less well.
_TOPICS = ("sport", "music", "war", "money", "water")


@dataclass
class StoreYear:
    """A corpus, a store, and models that are better and worse: who is promoted, by a plain model.

    `noises` is by the name of a model how much of its vectors says nothing; a model is a
    fingerprint of its own. `promoted` is what readers have to get.
    """

    folder: Path
    store: str
    model: str
    num_rows: int
    noises: dict[str, float]
    seed: int = 0
    rows: dict[str, tuple[str, str]] = field(default_factory=dict)
    promoted: tuple[str, dict[str, tuple[str, str]]] | None = None
    previous: tuple[str, dict[str, tuple[str, str]]] | None = None
    next_id: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)  # noqa: S311
        self._tokenizer = tokenizers.Tokenizer.from_file(f"{self.model}/tokenizer.json")
        self._tokenizer.no_padding()
        self.source = self.folder / "in"
        self.source.mkdir(parents=True)
        for _ in range(self.num_rows):
            self.add()
        self.write()

    def add(self) -> None:
        self.rows[f"id{self.next_id}"] = self.row()
        self.next_id += 1

    def row(self) -> tuple[str, str]:
        topic = self.random.choice(_TOPICS)
        return f"{topic} {self.random.random():.12f}", topic

    def change(self) -> None:
        """1 % new, 1 % changed, 0.5 % removed."""
        n = max(self.num_rows // 100, 2)
        some = self.random.sample(sorted(self.rows), 2 * n)
        for key in some[: n // 2]:
            del self.rows[key]
        for key in some[n:]:
            self.rows[key] = self.row()
        for _ in range(n):
            self.add()
        self.write()

    def write(self) -> None:
        rows = [
            {"key": key, "text": text, "topic": topic} for key, (text, topic) in self.rows.items()
        ]
        for file in range(4):
            write_jsonl(self.source / f"{file}.jsonl", rows[file::4])

    def spec(self, name: str) -> RunSpec:
        # A setting that decides a vector, and makes no other one of texts so short.
        max_tokens = 40 + sorted(self.noises).index(name)
        source = {"uri": str(self.source), "id": "key", "label": "topic", "name": "corpus"}
        return RunSpec.parse(
            {
                "source": source,
                "model": {"id": self.model, "dtype": "float32", "max_tokens": max_tokens},
                "output": {"store": self.store, "keep_days": 0, "keep_versions": 2},
                "probes": ["knn"],
            }
        )  # fmt: skip

    def refresh(self, name: str, kill_at: int = 0, spec: dict[str, Any] | None = None) -> RunResult:
        """By one of the models; be killed first, if at a write; with other parts of a config."""
        stage = make_graded_stage(name, self.noises[name])
        config = self.spec(name).model_dump(mode="json", exclude_unset=True) | (spec or {})
        run = lambda: inline.refresh(RunSpec.parse(config), stage)  # noqa: E731
        if kill_at:
            with killed_at(kill_at, self.store), contextlib.suppress(Killed):
                run()
            self.check(killed=name)
        result = run()
        if result.promotion in ("promoted", "current"):
            if self.promoted != (name, self.rows):
                self.previous = self.promoted
            self.promoted = name, dict(self.rows)
        self.check()
        return result

    def check(self, killed: str | None = None) -> None:
        """Readers get what is promoted: whole, of one model, and verified."""
        pointer = fmembed.Store.open(self.store).current()
        if self.promoted is None:
            assert pointer is None
            return
        assert pointer is not None
        name, wanted = self.promoted
        rows = fmembed.read(self.store, fingerprint=pointer.fingerprint).to_pylist()
        found = {r["row_id"]: r for r in rows}
        if killed is not None and found.keys() != wanted.keys():
            # After the switch, and before this was told of it.
            name, wanted = killed, self.rows
        assert len(found) == len(rows)
        assert found.keys() == wanted.keys()
        for key, (text, topic) in wanted.items():
            assert found[key]["topic"] == topic
            ids = np.array(self._tokenizer.encode(text).ids)
            vector = graded_vector(ids, name, self.noises[name])
            # To rounding: a sum goes another way by where in memory it lies.
            assert np.allclose(found[key]["embedding"], vector, atol=1e-6)
        if killed is None:  # else what it had not come to is told
            assert fmembed.verify(f"{self.store}/tables/{pointer.table}").problems == []


class Reader:
    """Somebody in a process of its own who reads a store without end, a hundred times a second.

    What is read must be one of the versions that may have been promoted, whole, and none that came
    before one that was read, unless readers were switched back.
    """

    def __init__(self, year: StoreYear) -> None:
        self._year = year
        self._allowed: list[int] = []
        self._seen = year.folder / "seen"

    def allow(self) -> None:
        """From now on the rows as they are may be promoted."""
        self._allowed.append(_digest((key, topic) for key, (_, topic) in self._year.rows.items()))

    def __enter__(self) -> Reader:
        (self._year.folder / "reader.log").touch()
        self._process = multiprocessing.get_context("spawn").Process(
            target=_read_on, args=(self._year.store, str(self._seen)), daemon=True
        )
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()

    def wait(self) -> None:
        """Until what is promoted now has been read."""
        before = self._num_reads()
        deadline = time.monotonic() + 60
        while self._num_reads() < before + 2:
            assert time.monotonic() < deadline, self._seen.read_text()[-500:]
            time.sleep(0.01)

    def _num_reads(self) -> int:
        return self._seen.read_text().count("\n") if self._seen.exists() else 0

    def told(self, num_back: int = 0) -> str:
        """How much was read; all of it was looked at.

        Args:
            num_back: How often readers were switched back.

        Raises:
            AssertionError: Something was read that was never promoted, or an error came.
        """
        reads = [line.split(maxsplit=2) for line in self._seen.read_text().splitlines()]
        whole = [line for line in reads if len(line) > 1]
        errors = [line for line in whole if line[0] == "error" and "nothing is promoted" not in
                  " ".join(line) and "is no store" not in " ".join(line)]  # fmt: skip
        assert not errors, errors[:3]
        digests = [int(line[0]) for line in whole if line[0] != "error"]
        assert digests
        assert set(digests) <= set(self._allowed), set(digests) - set(self._allowed)
        order = [self._allowed.index(digest) for digest in digests]
        back = sum(b < a for a, b in itertools.pairwise(order))
        assert back == num_back, f"readers went back {back} times"
        times = [float(line[1]) for line in whole if line[0] != "error"]
        rate = len(times) / max(times[-1] - times[0], 1e-9)
        return f"{len(digests):,} reads of {len(set(digests))} versions, {rate:.0f} a second"


def _digest(rows: Iterable[tuple[str, str]]) -> int:
    told = json.dumps(sorted(rows)).encode()
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "little")


def _read_on(uri: str, seen: str) -> None:
    with open(seen, "w") as file:
        while True:
            began = time.monotonic()
            try:
                rows = fmembed.read(uri, columns=["row_id", "topic"])
                both = zip(rows["row_id"].to_pylist(), rows["topic"].to_pylist(), strict=True)
                told = str(_digest(both))
            except Exception as e:  # told, and looked at in the end
                told = "error"
                file.write(f"error {began} {type(e).__name__} {e}\n")
            else:
                file.write(f"{told} {began}\n")
            file.flush()
            time.sleep(max(0.01 - (time.monotonic() - began), 0))
