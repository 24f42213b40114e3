"""RunSpec and its parts: what a config may say, and what a message says of a wrong one."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from fmembed.cluster_spec import ClusterSpec
from fmembed.compute_spec import ComputeSpec
from fmembed.config_file import MAX_CONFIG_BYTES, read_yaml
from fmembed.errors import SpecError
from fmembed.redaction import conceal, is_url, looks_like_key, without_secrets
from fmembed.redaction import redact as redact
from fmembed.redaction import scrub as scrub
from fmembed.spec_part import Part as _Part
from fmembed.spec_part import is_variable, names_secret

# What a message quotes of a value.
_SHORT = reprlib.Repr()

# Of fewer rows some may be rejected, whatever share that is.
_FEW_ROWS = 10


Format = Literal[
    "auto", "parquet", "jsonl", "csv", "text_folder", "image_folder", "audio_folder",
    "webdataset", "lines", "json", "numpy", "hf",
]  # fmt: skip
Modality = Literal["text", "image", "audio"]
Pooling = Literal["cls", "mean", "cls+mean", "last", "max", "pooler", "projection", "tokens"]
Precision = Literal["float32", "float16", "int8", "binary"]
ProbeName = Literal[
    "health", "knn", "linear", "clustering", "zeroshot", "crossmodal", "fewshot", "linear@dinov2",
    "classification@mteb",
]  # fmt: skip

# The columns that fmembed itself makes, and so what neither a column of vectors nor a carried one
# may be called: those of the table, and those that rows have on their way to the model. All the
# others begin with an underscore.
OWN_COLUMNS = (
    "row_id", "content_hash", "parent_id", "piece", "piece_start", "piece_stop", "piece_text",
    "num_units", "truncated",
    "model_input", "input_dtype", "input_shapes", "piece_units", "piece_spans",
    "piece_texts",
)  # fmt: skip


class HubDataset(_Part):
    """What a Hugging Face dataset takes besides its id or folder."""

    name: str | None = None
    split: str | None = None
    revision: str | None = None
    streaming: bool = False


class CsvSpec(_Part):
    """How CSV and TSV files are written, where it is not as their names say.

    None: a comma, or in `.tsv` a tab; double quotes, or in `.tsv` none, as TSV has no quoting. An
    empty `quote` says that there is none. `encoding` is one of Python's.
    """

    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    quote: str | None = Field(default=None, max_length=1)
    encoding: str = "utf-8"

    @field_validator("encoding")
    @classmethod
    def _check_encoding(cls, value: str) -> str:
        try:
            "".encode(value)
        except LookupError:
            raise ValueError(f"{value[:80]!a} is no encoding of text that Python knows") from None
        return value

    @model_validator(mode="after")
    def _check_apart(self) -> CsvSpec:
        if any(c in ("\r", "\n", " ") for c in (self.delimiter, self.quote)):
            raise ValueError("neither delimiter nor quote can be a space or the end of a line")
        if self.quote and self.quote == self.delimiter:
            raise ValueError("delimiter and quote cannot be the same")
        return self


class SourceSpec(_Part):
    """Where the rows are and which columns matter.

    `uri` is a file, a folder, a glob, an fsspec URL, `package:<python package>[/folder]`, or, with
    `format: hf`, a dataset saved to disk or a hub id. `root` says that the input column holds paths
    below this folder or URL instead of content; nothing outside it is ever opened. `caption` is a
    column of texts that belong to pictures or sounds, for the probe crossmodal.

    A small file can unfold to more than memory holds, so a row has limits, and one over them is
    rejected: `max_text_bytes` for a text, a line of JSON, a row of CSV, and what is carried beside;
    `max_media_bytes` for a picture's or sound's file. Both hold wherever the row comes from.

    `name` is what a store calls the dataset, whatever its `uri` is from week to week.
    """

    uri: str = Field(min_length=1)
    name: str | None = Field(default=None, min_length=1, max_length=40)
    format: Format = "auto"
    input: str = "text"
    id: str | None = None
    label: str | None = None
    split: str | None = None
    carry: tuple[str, ...] = ()
    caption: str | None = None
    root: str | None = None
    encoding_errors: Literal["strict", "replace", "ignore"] = "strict"
    max_text_bytes: int = Field(default=64 * 2**20, ge=1, le=2**30)
    max_media_bytes: int = Field(default=512 * 2**20, ge=1, le=2**30)
    hf: HubDataset = HubDataset()
    csv: CsvSpec = CsvSpec()

    # Of data that a program has given: its files last as long as the run.
    _called: str | None = PrivateAttr(None)

    def call(self, name: str) -> None:
        """Have reports and the table's own record say this in place of `uri`."""
        self._called = name

    @property
    def is_given(self) -> bool:
        """Whether a program has given the data, in files that last as long as its run."""
        return self._called is not None

    @property
    def stored_name(self) -> str:
        """What to call this source in a report's title, and in the table's own record."""
        return self._called or redact(self.uri).rstrip("/")

    def conceal(self, text: str) -> str:
        """Text without what this source's URLs hold of secrets, however they are quoted in it."""
        return conceal(text, *(uri for uri in (self.uri, self.root) if uri is not None))

    @property
    def columns(self) -> tuple[str, ...]:
        """The carried columns, each once: label, split, caption, then `carry`, in that order."""
        named = (self.label, self.split, self.caption, *self.carry)
        return tuple(dict.fromkeys(c for c in named if c is not None))

    @property
    def wanted(self) -> tuple[str, ...]:
        """All columns that are read, each once."""
        named = (self.id, self.input, *self.columns)
        return tuple(dict.fromkeys(c for c in named if c is not None))


class VectorSpec(_Part):
    """How the model's states become one column of vectors.

    None means: what the checkpoint itself says (modules.json), else the family's default. `layer`
    counts hidden states as transformers does: 0 is the embedding layer, -1 the last one (before the
    model's final norm, where it has one). `dims` keeps the first dimensions (Matryoshka) and
    normalises again. int8 needs ranges: they are taken from a sample at the first run and stored.
    """

    pooling: Pooling | None = None
    layer: int | None = None
    normalize: bool | None = None
    dims: int | None = Field(default=None, ge=1)
    precision: Precision | None = None


class EndpointSpec(_Part):
    """A server that speaks OpenAI's embeddings protocol: a hosted model, vLLM, TEI, infinity.

    The key is read from the environment variable `api_key_env` where the request is made; it is no
    field, so that it is never stored.
    """

    base_url: str
    api_key_env: str = "OPENAI_API_KEY"
    dimensions: int | None = Field(default=None, ge=1)
    batch_rows: int = Field(default=64, ge=1)
    concurrency: int = Field(default=8, ge=1)
    max_retries: int = Field(default=6, ge=0)
    timeout_s: float = Field(default=60.0, gt=0)
    usd_per_million_tokens: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    @field_validator("base_url")
    @classmethod
    def _check_base_url(cls, value: str) -> str:
        if not re.fullmatch(r"https?://[^\s@?#]+", value) or redact(value) != value:
            raise ValueError(
                "takes http(s)://host/path, without user, password, query and fragment; the key "
                "comes from the environment variable that api_key_env names"
            )
        return value

    @field_validator("api_key_env")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if not is_variable(value):
            raise ValueError(
                "takes the name of an environment variable, and no key; what is given is not set "
                "here and does not read like OPENAI_API_KEY; put the key into one and give its name"
            )
        return value


class ModelSpec(VectorSpec):
    """Which checkpoint, and what it gives of each row.

    `outputs` asks for several columns in one pass; what one of them leaves open is as the fields
    here say. `modality` chooses the tower of a model that joins several; null goes by the source.
    """

    id: str = Field(min_length=1)
    revision: str | None = None
    modality: Modality | None = None
    adapter: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_tokens: int | None = Field(default=None, ge=4)
    prompt: str | None = None
    outputs: dict[str, VectorSpec] = Field(default={})
    endpoint: EndpointSpec | None = None
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    compile: bool = False
    trust_remote_code: bool = False

    @field_validator("outputs")
    @classmethod
    def _check_outputs(cls, value: dict[str, VectorSpec]) -> dict[str, VectorSpec]:
        for name in value:
            if not name.isidentifier() or name.startswith("_") or name in OWN_COLUMNS:
                raise ValueError(f"{name!r} cannot name a column of vectors; give another name")
        return value


class PreprocessSpec(_Part):
    """What is made of a row before the model sees it, and what no row may exceed.

    A small file can hold a picture that fills the memory: hence the limits, of pixels, of seconds
    and of samples (those of all channels, four bytes each; ten minutes of stereo at 96 kHz are 115
    million). What a row's bytes may be before they are decoded is in `source`. `chunk_tokens` cuts
    texts, and `window_s` sounds, into pieces that overlap; `pieces: rows` gives each its own row in
    the table (the default for texts), `mean` their average, each weighted by its tokens or samples
    (the default for sounds, whose model may take no more than a few seconds). `keep_text` keeps the
    text of each chunk that is a row, as it is by default; a table that was begun without stays so.
    """

    max_image_px: int = Field(default=100_000_000, ge=1)
    max_audio_s: float = Field(default=600.0, gt=0)
    max_audio_samples: int = Field(default=120_000_000, ge=1)
    chunk_tokens: int | None = Field(default=None, ge=8)
    chunk_overlap: int = Field(default=0, ge=0)
    window_s: float | None = Field(default=None, gt=0)
    window_overlap_s: float = Field(default=0.0, ge=0)
    pieces: Literal["auto", "rows", "mean"] = "auto"
    keep_text: bool | None = None

    def keeps_text(self, modality: Modality) -> bool:
        """Whether the table has the text of each row's chunk."""
        is_chunked = self.chunk_tokens is not None and self.pieces_are_rows(modality)
        return modality == "text" and is_chunked and self.keep_text is not False

    def pieces_are_rows(self, modality: Modality) -> bool:
        """Whether each piece gets a row in the table."""
        if self.pieces == "auto":
            return modality == "text" and self.chunk_tokens is not None
        return self.pieces == "rows"

    def identity(self, modality: Modality) -> dict[str, Any]:
        """What of it decides a vector: part of the fingerprint. The limits only reject."""
        names = {
            "text": ("chunk_tokens", "chunk_overlap"),
            "audio": ("window_s", "window_overlap_s"),
        }.get(modality, ())
        identity = {f"preprocess.{name}": getattr(self, name) for name in names}
        return {**identity, "preprocess.pieces_are_rows": self.pieces_are_rows(modality)}

    @model_validator(mode="after")
    def _check_overlaps(self) -> PreprocessSpec:
        if self.keep_text and (self.chunk_tokens is None or self.pieces == "mean"):
            raise ValueError(
                "keep_text is for chunks that are rows: give chunk_tokens; a whole text is kept by "
                "source.carry"
            )
        if self.chunk_tokens is not None and self.chunk_overlap * 2 > self.chunk_tokens:
            raise ValueError("chunk_overlap takes at most half of chunk_tokens")
        if self.window_s is not None and self.window_overlap_s * 2 > self.window_s:
            raise ValueError("window_overlap_s takes at most half of window_s")
        return self


class ZeroShotSpec(_Part):
    """What the probe zeroshot says to the text tower; null means the modality's own templates.

    `classes` gives a label the words that stand for it; a label without is its own word.
    """

    templates: tuple[str, ...] | None = None
    classes: dict[str, str] = Field(default={})

    @field_validator("templates")
    @classmethod
    def _check_templates(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and (not value or any("{}" not in t for t in value)):
            raise ValueError("takes texts with {} where the class goes")
        return value


class OutputSpec(_Part):
    """Where the table goes and how often it is committed.

    `uri` is the table; or `store` a folder of tables, one for each dataset and model, of which one
    version is promoted: see `table.store`.

    A kill costs what was not committed yet, and each commit makes a file of its own. `auto` commits
    each quarter of a minute, soon each 40 s, and in a long run after a fiftieth of the time it
    has taken so far: a day makes some 250 files, none of them over `part_bytes`, and a kill costs
    2 % of it.

    More than `max_rejected_fraction` of the rows rejected fails a run; where that is left open,
    some of fewer than ten rows do not.

    A version is kept that was the newest one at some time of the last `keep_days` (null: for ever),
    and so are the `keep_versions` newest ones; a refresh deletes what only others name.
    """

    uri: str = ""
    store: str | None = Field(default=None, min_length=1)
    commit_every_s: float | Literal["auto"] = "auto"
    part_bytes: int = Field(default=256 * 2**20, ge=1)
    max_rejected_fraction: float = Field(default=0.01, ge=0, le=1)
    on_changed: Literal["refuse", "keep"] = "refuse"
    keep_days: float | None = Field(default=30.0, ge=0)
    keep_versions: int = Field(default=5, ge=1)

    def allows(self, num_rejected: int, num_rows: int) -> bool:
        """Whether so many of so many rows may be rejected."""
        if num_rejected <= self.max_rejected_fraction * num_rows:
            return True
        # One of four is no share of anything, unless somebody has said so.
        is_said = "max_rejected_fraction" in self.model_fields_set
        return num_rejected < num_rows < _FEW_ROWS and not is_said

    @model_validator(mode="after")
    def _check_place(self) -> OutputSpec:
        if not self.uri and self.store is None:
            raise ValueError(
                "uri is missing; every config names source.uri, model.id and output.uri"
            )
        if self.uri and self.store is not None:
            raise ValueError("takes uri, a table, or store, which holds a table for each model")
        return self

    @field_validator("uri", "store")
    @classmethod
    def _check_uri(cls, value: str | None) -> str | None:
        if value is None:
            return None
        # file:///a?b is a path, whose every character is the folder's name.
        if "://" in value and not value.startswith("file:///") and redact(value) != value:
            raise ValueError(
                "takes a URL without user, password, query and fragment, which would be kept in "
                "the table; credentials come from the environment"
            )
        return value

    @field_validator("commit_every_s")
    @classmethod
    def _check_positive(cls, value: Any) -> Any:
        if value != "auto" and not value > 0:
            raise ValueError("takes a number of seconds over 0, or auto")
        return value


class RefreshSpec(_Part):
    """What may leave a table when it is refreshed.

    `on_rejected` says what becomes of a row of the table that its source still has and that cannot
    be embedded any more: it stays as it was, or leaves. Where more than `max_removed_fraction` of
    the table's rows would leave at once, none does: a source that has lost so much is more often
    broken than it is right.
    """

    on_rejected: Literal["keep", "remove"] = "keep"
    max_removed_fraction: float = Field(default=0.1, ge=0, le=1)


class GateSpec(_Part):
    """When a new version takes the place of the one that a store's readers get.

    It does unless something is worse: a probe by more than `margin`, which must be sure of the same
    model (the difference is below it in 95 of 100 bootstraps), and must be ruled out of another one
    (in 5 of 100); the share of rejected rows or of unlike inputs that share a vector, by more than
    `max_rejected_increase` and `max_copies_increase`; of rows that have the content of another one,
    by more than `max_repeated_increase`; the number of rows, but those that were deleted, of
    another table by more than the share `max_lost_fraction`. Vectors that lie all in one direction
    (their mean cosine is over `max_mean_cosine`) are refused, and, of another model, those whose
    length is another one while `same_dim` is set, or, where no probe judges both, of which less
    than `min_neighbours` of the ten nearest rows are the old ones' too. `max_arrival_auc` says how
    well what arrived may be told from what was there (0.5: not at all); null: it is only told.
    """

    margin: float = Field(default=0.01, ge=0, le=1)
    max_rejected_increase: float = Field(default=0.01, ge=0, le=1)
    max_copies_increase: float = Field(default=0.01, ge=0, le=1)
    max_repeated_increase: float = Field(default=0.1, ge=0, le=1)
    max_lost_fraction: float = Field(default=0.1, ge=0, le=1)
    max_mean_cosine: float = Field(default=0.99, ge=0, le=1)
    min_neighbours: float = Field(default=0.05, ge=0, le=1)
    same_dim: bool = True
    max_arrival_auc: float | None = Field(default=None, ge=0.5, le=1)


class RunSpec(_Part):
    """One run: a source, a model, an output, and what to measure afterwards.

    `cluster` says what machines it runs on, for `fmembed manifest`; a run itself takes those it
    finds.
    """

    source: SourceSpec
    model: ModelSpec
    output: OutputSpec
    preprocess: PreprocessSpec = PreprocessSpec()
    compute: ComputeSpec = ComputeSpec()
    refresh: RefreshSpec = RefreshSpec()
    gate: GateSpec = GateSpec()
    probes: tuple[ProbeName, ...] = ("health", "knn", "linear", "clustering")
    zeroshot: ZeroShotSpec = ZeroShotSpec()
    cluster: ClusterSpec | None = None

    @model_validator(mode="after")
    def _check_priced(self) -> RunSpec:
        endpoint = self.model.endpoint
        is_priced = self.compute.is_priced
        if endpoint is not None:
            is_priced = endpoint.usd_per_million_tokens is not None
            if self.compute.pools:
                raise ValueError("compute.pools: a server has its model itself; give none")
        if self.compute.budget.cost is not None and not is_priced:
            field = "compute.price_per_device_hour"
            if endpoint is not None:
                field = "model.endpoint.usd_per_million_tokens"
            raise ValueError(f"compute.budget.cost: takes a price: give {field}")
        return self

    @classmethod
    def from_yaml(cls, path: str | None, overrides: dict[str, Any] | None = None) -> RunSpec:
        """Read a config file and lay flags over it.

        Args:
            path: A YAML file, or None when everything comes from `overrides`.
            overrides: Dotted field names to values, e.g. `{"output.uri": "out"}`.

        Raises:
            SpecError: The file is missing or no YAML mapping, or a field is unknown or wrong.
        """
        raw: Any = {}
        if path is not None:
            try:
                with Path(path).open("rb") as file:
                    content = file.read(MAX_CONFIG_BYTES + 1)
                # What is too long may be cut within a character; it is refused below.
                is_whole = len(content) <= MAX_CONFIG_BYTES
                text = content.decode(errors="strict" if is_whole else "replace")
            except (OSError, UnicodeDecodeError) as e:
                reason = e.strerror if isinstance(e, OSError) else "not UTF-8 text"
                raise SpecError(f"config {path}: {reason}; give the path of a YAML file") from None
            raw = read_yaml(text, f"config {path}")
            if not isinstance(raw, dict):
                raise SpecError(f"config {path}: takes a mapping with source, model and output")
        for dotted, value in (overrides or {}).items():
            _set(raw, dotted.split("."), value)
        return cls.parse(raw)

    def stored(self) -> dict[str, Any]:
        """The spec as JSON, without what a URL may hold of secrets: user, password and query.

        Without `cluster` too, which says nothing of a table.
        """
        raw: dict[str, Any] = without_secrets(self.model_dump(mode="json", exclude={"cluster"}))
        if self.source._called is not None:
            raw["source"]["uri"] = self.source._called
        return raw

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> RunSpec:
        """Validate a plain mapping; the first wrong field becomes a one-line SpecError."""
        try:
            return cls.model_validate(raw)
        except ValidationError as e:
            raise SpecError(_one_line(e)) from None


def _set(raw: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        nested = raw.setdefault(key, {})
        if not isinstance(nested, dict):
            raise SpecError(f"{_shown_name(key)}: takes a mapping of fields{_shown(key, nested)}")
        raw = nested
    raw[keys[-1]] = value


def _one_line(error: ValidationError) -> str:
    # A mistyped key before the missing one that it was meant to be.
    errors: list[Any] = error.errors(include_url=False)
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    names = _names_of(first)
    field = ".".join(map(_shown_name, names)) or "config"
    # Of what may be one thing or another, each says why it is not that one.
    same = [e for e in errors if _names_of(e) == names]
    num_more = len(errors) - len(same)
    more = f" (and {num_more} more)" if num_more else ""
    if first["type"] == "extra_forbidden":
        return f"{field}: unknown key; {_hint(names)}{more}"
    if first["type"] == "missing":
        if len(names) > 2 or not RunSpec.model_fields[names[0]].is_required():
            known = sorted(_field_names(RunSpec, names[:-1]))
            return f"{field}: missing; {'.'.join(names[:-1])} takes {', '.join(known)}{more}"
        return f"{field}: missing; every config names source.uri, model.id and output.uri{more}"
    own = [e["msg"].removeprefix("Value error, ") for e in same if e["type"] == "value_error"]
    taken = " or ".join(dict.fromkeys(_what_it_takes(e) for e in same))
    message = own[0] if own else f"takes {taken}"
    if not names and own and own[0].partition(":")[0] in list_fields():  # of several parts
        return f"{own[0]}{more}"
    # Of a whole part nothing is shown: its own words say which field of it is wrong.
    is_part = bool(own) and isinstance(first["input"], dict)
    shown = "" if is_part else _shown(names[-1] if names else "", first["input"])
    return f"{field}: {message}{shown}{more}"


def _names_of(error: Any) -> list[str]:
    """The field of an error: without a union's branches, which are pydantic's names."""
    names: list[str] = []
    fields = _field_names(RunSpec, names)
    for key in error["loc"]:
        if isinstance(key, int) or key in fields or error["type"] == "extra_forbidden":
            names.append(str(key))
            fields = _field_names(RunSpec, names)
    return names


# By the beginning of pydantic's word for an error, in the words of a config.
_TAKES = {
    "literal_error": "{expected}",
    "int_": "a whole number",
    "float_": "a number",
    "bool_": "true or false",
    "string_type": "a text",
    "string_too_short": "a text that is not empty",
    "string_too_long": "a text no longer than {max_length}",
    "greater_than_equal": "a number of at least {ge}",
    "greater_than": "a number over {gt}",
    "less_than_equal": "a number of at most {le}",
    "less_than": "a number below {lt}",
    "finite_number": "a number that is finite",
    "tuple_type": "a list, in brackets",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "model_type": "a mapping of fields",
    "dict_type": "a mapping of fields",
}


def _what_it_takes(error: Any) -> str:
    found = (told for kind, told in _TAKES.items() if error["type"].startswith(kind))
    if (told := next(found, None)) is None:
        return f"another value: {error['msg']}"
    return told.format(**error.get("ctx", {}))


def _hint(names: list[str]) -> str:
    """Which field may have been meant: one of this name elsewhere, else one like it."""
    known, name = sorted(_field_names(RunSpec, names[:-1])), names[-1]
    if elsewhere := [dotted for dotted in list_fields() if dotted.rpartition(".")[2] == name]:
        return f"did you mean {' or '.join(elsewhere)}?"
    leaves = {dotted.rpartition(".")[2]: dotted for dotted in list_fields()}
    close = difflib.get_close_matches(name, known, n=1)
    close += difflib.get_close_matches(name, leaves, n=1, cutoff=0.8)
    if close:  # the first one where both are as close
        best = max(close, key=lambda other: difflib.SequenceMatcher(None, other, name).ratio())
        return f"did you mean {best if best in known else leaves[best]}?"
    return f"it takes {', '.join(known)}"


def list_fields(model: type[BaseModel] | None = None, prefix: str = "") -> Iterator[str]:
    """The dotted names of all fields that hold no others."""
    for name, field in (model or RunSpec).model_fields.items():
        # A part, or a part or nothing; of `outputs` and `pools` there are as many as users name.
        kinds = [field.annotation]
        is_many = get_origin(field.annotation) in (dict, tuple)
        kinds += [] if is_many else get_args(field.annotation)
        part = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if part is None:
            yield prefix + name
        else:
            yield from list_fields(part, f"{prefix}{name}.")


def _shown(field: str, value: Any) -> str:
    """What a message tells of a wrong value: nothing of what may be or hold a secret."""
    if isinstance(value, list | tuple) and all(isinstance(v, int | float) for v in value):
        return f", got {_SHORT.repr(list(value))}"
    if isinstance(value, dict | list | tuple):
        return f", got {'a mapping' if isinstance(value, dict) else 'a list'}"
    if isinstance(value, str):
        if names_secret(field) or any(looks_like_key(word) for word in value.split()):
            return ""
        value = redact(value) if is_url(value) else scrub(value)
    return f", got {_SHORT.repr(value)}"


def _shown_name(name: str) -> str:
    if looks_like_key(name):
        return "..."
    name = scrub(name)
    return name if len(name) <= 200 else f"{name[:200]}..."


def _field_names(model: type[BaseModel], path: list[str]) -> set[str]:
    for key in path:
        if key.isdecimal():  # one of a list
            continue
        field = model.model_fields.get(key)
        # A part, or a part or nothing.
        kinds = (field.annotation, *get_args(field.annotation)) if field is not None else ()
        parts = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        if not parts:
            return set()
        model = parts[0]
    return set(model.model_fields)
