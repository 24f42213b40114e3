"""A first config for a dataset: what its columns look like they are for, each choice explained."""

from __future__ import annotations

import datetime
import json
import os
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from fmembed.config_file import read_yaml
from fmembed.errors import SpecError
from fmembed.redaction import redact
from fmembed.rows.columns import RESERVED
from fmembed.sources.glance import Glance, glance
from fmembed.spec import Format, Modality, RunSpec
from fmembed.terminal import printable

_TEXTS = ("text", "body", "content", "document", "article", "abstract", "description", "review",
          "question", "query", "sentence", "message", "title", "name")  # fmt: skip
_IDS = re.compile(r"(?i)^(_?id|uuid|guid|key|sku|.*[_-]?(id|key|uuid))$|Id$")
_LABELS = re.compile(r"(?i)label|class|categor|topic|target|sentiment|genre|section|^y$|type")
_SPLITS = re.compile(r"(?i)^(split|fold|subset|partition)$")
_PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
_SOUNDS = (b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"FORM")
# What a column of labels may have of values, and how often each is there at least, on average.
_MOST_CLASSES, _LEAST_PER_CLASS = 100, 2
_CHARACTERS_PER_TOKEN = 4.5
_MODELS: dict[str, tuple[str, str]] = {
    "text": ("sentence-transformers/all-MiniLM-L6-v2", "small and quick; English"),
    "texts": (
        "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2",
        "small; fifty languages, as these texts are not only in English letters",
    ),
    "image": ("facebook/dinov2-small", "small and quick; what is alike looks alike"),
    "audio": ("facebook/wav2vec2-base", "speech; laion/clap-htsat-unfused is for all sounds"),
}
_MODEL_TOKENS = {"text": 256, "texts": 128}


def propose(uri: str, *, format_: Format = "auto", model: str = "", output: str = "") -> str:
    """A commented YAML config for a dataset; it is checked to be one.

    Args:
        uri: As `source.uri`.
        format_: As `source.format`.
        model: As `model.id`; a small one for what the dataset holds, if none.
        output: As `output.uri`; out/<name of the dataset>, if none.

    Raises:
        SourceError: There is no dataset, or none of whose rows can be read.
        SpecError: No column of it is text, or a picture or sound.
    """
    seen = glance(uri, format_)
    columns = _Columns(seen, redact(uri))
    output = output or f"out/{_stem(uri)}"
    text = "\n".join(_lines(uri, seen, columns, model, output)) + "\n"
    spec = RunSpec.parse(read_yaml(text, "config"))
    said = (spec.source.input, spec.source.id, spec.source.split, spec.output.uri)
    meant = (columns.input or "text", columns.id or None, columns.split or None, output)
    if said != meant:  # no name of a column may say more than itself
        raise SpecError(f"init: {redact(uri)} has names that a config cannot hold; rename them")
    return text


class _Columns:
    """What each column looks like it is for."""

    def __init__(self, seen: Glance, shown: str) -> None:
        self.values = {name: [row.get(name) for row in seen.rows] for name in seen.columns}
        self.modality: Modality = seen.modality or "text"
        self.input = ""
        if seen.modality is None:
            self.modality, self.input = self._find_input(shown)
        self.id = "__key__" if seen.format == "webdataset" else self._find_id()
        self.split = self._first(_SPLITS)
        self.label = "" if seen.has_classes else self._find_label()
        used = {self.input, self.id, self.split, self.label}
        self.carry = [
            name for name in seen.columns if name not in used and self._is_short(name)
        ][:8]  # fmt: skip

    def texts(self, name: str) -> list[str]:
        return [v for v in self.values.get(name, ()) if isinstance(v, str)]

    def _usable(self) -> Iterator[str]:
        return (name for name in self.values if _is_usable(name))

    def _find_input(self, shown: str) -> tuple[Modality, str]:
        for name in self.values:
            given = next((v for v in self.values[name] if v is not None), None)
            if isinstance(given, dict):  # what `datasets` writes of a picture or a sound
                given = given.get("bytes")
            if isinstance(given, bytes) and (kind := _kind_of(given)):
                return kind, name
        lengths = {
            name: statistics.fmean(map(len, texts))
            for name in self._usable()
            if len(texts := self.texts(name)) * 2 > len(self.values[name])
        }
        if not lengths:
            raise SpecError(
                f"init: no column of {shown} holds texts, pictures or sounds; it has "
                f"{', '.join(list(self.values)[:20]) or 'none'}"
            )
        # The longest, unless one is called so and is long enough to be read.
        longest = max(lengths, key=lambda name: lengths[name])
        named = [n for n in _TEXTS for name in lengths if name.lower() == n for n in [name]]
        likely = next((n for n in named if lengths[n] * 3 > lengths[longest]), longest)
        return "text", likely

    def _first(self, pattern: re.Pattern[str]) -> str:
        return next((n for n in self._usable() if pattern.search(n) and n != self.input), "")

    def _find_id(self) -> str:
        """A column whose values are there once each."""
        for name in self._usable():
            values = self.values[name]
            whole = [v for v in values if isinstance(v, str | int) and not isinstance(v, bool)]
            is_unique = len(set(whole)) == len(values) > 0
            if name != self.input and is_unique and _IDS.search(name):
                return name
        return ""

    def _find_label(self) -> str:
        """A column of few values that are there often; one that is called so before others."""
        found = []
        for name in self._usable():
            values = [v for v in self.values[name] if isinstance(v, str | int) and v != ""]
            num_classes = len(set(values))
            is_short = all(len(str(v)) <= 60 for v in values)
            is_often = len(values) >= num_classes * _LEAST_PER_CLASS
            if name in (self.input, self.id, self.split) or not (is_short and is_often):
                continue
            if 2 <= num_classes <= _MOST_CLASSES:
                found.append((not _LABELS.search(name), name))
        return min(found)[1] if found else ""

    def _is_short(self, name: str) -> bool:
        values = self.values[name]
        plain = str | int | float | bool | datetime.date  # a time of a day is a date too
        is_plain = all(v is None or isinstance(v, plain) for v in values)
        return _is_usable(name) and is_plain and all(len(str(v)) <= 300 for v in values)


def _is_usable(name: str) -> bool:
    """Whether a table may have a column of this name."""
    return name not in RESERVED and name[:1] != "_"


def _kind_of(content: bytes) -> Modality | None:
    if content.startswith(b"RIFF"):
        return "audio" if content[8:12] == b"WAVE" else "image"
    if content.startswith(_PICTURES):
        return "image"
    return "audio" if content.startswith(_SOUNDS) else None


def _lines(uri: str, seen: Glance, columns: _Columns, model: str, output: str) -> Iterator[str]:
    of = f"{seen.num_files:,} files" if seen.num_files > 1 else "one file"
    yield f"# Made by fmembed init: {of}, {seen.num_bytes / 2**20:,.1f} MiB, read as {seen.format}."
    if seen.columns:
        yield f"# Its columns: {printable(', '.join(seen.columns[:30]))}."
    yield "# fmembed plan says what a run would do and take, fmembed fields what else there is."
    yield "source:"
    yield f"  uri: {_quoted(os.path.normpath(uri) if '://' not in uri else uri)}"
    yield f"  format: {seen.format}"
    if columns.input:
        yield _field("input", columns.input, "the column to embed")
    if columns.id:
        yield _field("id", columns.id, "names a row from run to run: no value is there twice")
    elif seen.columns:
        yield "  # id: ...  # a column that names a row; without one a row is its file and number"
    if columns.label:
        values = sorted({str(v) for v in columns.values[columns.label] if v is not None})
        seen_in = f" in the first {len(seen.rows):,} rows"
        yield _field("label", columns.label, f"what the probes predict: {_some(values)}{seen_in}")
    elif seen.has_classes:
        yield _field("label", "label", "the name of a file's folder; what the probes predict")
    else:
        yield "  # label: ...  # what the probes predict; without one only their health is told"
    if columns.split:
        yield _field("split", columns.split, "its own train and test")
    if columns.carry:
        names = ", ".join(map(_quoted, columns.carry))
        yield f"  carry: [{names}]  # more columns to keep beside the vectors"
    yield "model:"
    kind, why = _choose_model(columns)
    yield f"  id: {_quoted(model or _MODELS[kind][0])}" + ("" if model else f"  # {why}")
    if columns.modality == "text":
        yield '  # prompt: "query: "  # before every text, where the page of the model says so'
        yield from _chunks(columns, _MODEL_TOKENS[kind])
    elif columns.modality == "audio":
        yield "preprocess:"
        yield "  window_s: 10  # longer sounds go through in windows, and are averaged"
    yield "output:"
    yield f"  uri: {_quoted(output)}"


def _chunks(columns: _Columns, limit: int) -> Iterator[str]:
    """Whether texts are longer than the model takes; of files nobody has looked into them."""
    texts = columns.texts(columns.input)
    num_long = sum(len(t) > limit * _CHARACTERS_PER_TOKEN for t in texts)
    if texts and not num_long:
        return
    share = f"{100 * num_long // len(texts)} % of the texts" if texts else "long texts"
    yield f"# The model sees {limit} tokens, about {limit * 3 // 4} words: not all of {share}."
    yield "# In chunks it sees all of them, and each chunk is a row with a vector and its text."
    yield "# preprocess:"
    yield f"#   chunk_tokens: {limit}"
    yield f"#   chunk_overlap: {limit // 8}"


def _choose_model(columns: _Columns) -> tuple[str, str]:
    if columns.modality != "text":
        return columns.modality, _MODELS[columns.modality][1]
    letters = [c for t in columns.texts(columns.input)[:200] for c in t[:1000] if c.isalpha()]
    share = sum(not c.isascii() for c in letters) / max(len(letters), 1)
    kind = "texts" if share > 0.02 else "text"
    return kind, _MODELS[kind][1]


def _field(name: str, value: str, why: str) -> str:
    return f"  {name}: {_quoted(value)}  # {why}"


def _quoted(value: str) -> str:
    """A word as YAML has it: as it is, or as JSON has it, which is YAML too."""
    is_plain = re.fullmatch(r"[A-Za-z_./][\w./-]*(:[\w./-]+)*", value, re.ASCII)
    return value if is_plain and yaml.safe_load(value) == value else json.dumps(value)


def _some(values: Sequence[str]) -> str:
    shown = ", ".join(value[:20] for value in values[:4])
    shown = printable(shown).encode("ascii", "backslashreplace").decode()
    return f"{len(values)} values ({shown}{', ...' if len(values) > 4 else ''})"


def _stem(uri: str) -> str:
    """A name for the table."""
    last = redact(uri).rstrip("/").rpartition("/")[2].rpartition(":")[2]
    stem = re.sub(r"[^\w.-]+", "-", last.partition(".")[0].replace("*", "")).strip("-.")
    return stem or "table"


def example(name: str) -> str:
    """One of the configs that come with the project, as it is.

    Raises:
        SpecError: There is none of that name.
    """
    package = Path(__file__).parent
    # In a wheel, or beside the package in its checkout.
    folders = [package / "configs", package.parent / "jobs" / "configs"]
    known = {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}
    if name not in known:
        raise SpecError(f"init: no example {name!a:.80}; there are {', '.join(known) or 'none'}")
    return known[name].read_text(encoding="utf-8")


def write(text: str, path: str) -> None:
    """Write a config where there is none yet.

    Raises:
        SpecError: There is one, or it cannot be written.
    """
    try:
        with Path(path).open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise SpecError(f"init: {path} is there already; give another --to, or remove it") from None
    except OSError as e:
        raise SpecError(f"init: cannot write {path}: {e.strerror}") from None


def default_path(uri: str) -> str:
    """Where the config of a dataset is written."""
    return f"{_stem(uri)}.yaml"
