"""A source's spec -> what there is to read: files -> format -> columns -> shards.

On the driver, before Ray starts, so that what is wrong is told within a second.
"""

from __future__ import annotations

import difflib
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa

from fmembed.errors import NoFilesError, SourceError, reason
from fmembed.redaction import redact
from fmembed.rows.columns import RESERVED
from fmembed.sources.file_list import FileList
from fmembed.sources.files import is_local
from fmembed.sources.formats.base import Format, Opened
from fmembed.sources.formats.registry import FORMATS
from fmembed.sources.listing import Listing, list_files, open_fs
from fmembed.sources.shards import plan_shards, with_keys
from fmembed.sources.source import File, Source
from fmembed.sources.types import UnstorableError, stored_type
from fmembed.sources.walking import DEAD_LINKS
from fmembed.spec import Modality, SourceSpec

# Of what is passed over as it is not of the format.
OF_OTHERS = "files with"
# Formats whose columns are of the types that their values are of.
_TYPED = ("csv", "hf", "json", "jsonl", "numpy", "parquet")
# What is no dataset yet, and how it becomes one.
_SHEET = "a spreadsheet: save it as CSV (UTF-8), or pandas.read_excel(path).to_parquet(...)"
_DOCUMENT = (
    "a document: extract its text first, as pdftotext and pandoc do, into .txt or JSON Lines"
)
_PICKLE = "a pickle, which can run code when it is read: pandas.read_pickle(path).to_parquet(...)"
_DATABASE = "a database: pandas.read_sql(query, connection).to_parquet(...)"
_ARROW = "an Arrow file: pyarrow.feather.read_table(path), then pyarrow.parquet.write_table(...)"
_HINTS = {
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".ods"), _SHEET),
    **dict.fromkeys((".pdf", ".docx", ".doc", ".html", ".epub"), _DOCUMENT),
    **dict.fromkeys((".pkl", ".pickle"), _PICKLE),
    **dict.fromkeys((".db", ".sqlite", ".sqlite3", ".duckdb"), _DATABASE),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), _ARROW),
}
_SHOWN_NAMES, _SHOWN_CHARACTERS, _SHOWN_SUFFIXES = 20, 40, 5


def open_source(spec: SourceSpec, modalities: Sequence[Modality] = ("text",)) -> Source:
    """Find the files and their format, check that the named columns are there, and cut shards.

    Args:
        spec: The source part of the config.
        modalities: What the model takes; the input column is text, or bytes of a picture or sound.
            If it takes several, the format or the column's type decides.

    Raises:
        SourceError: No such file, an unknown format, an absent column, a reserved name.
    """
    _check_names(spec)
    format_, fs, files, passed_over = _find(spec, modalities)
    source = Source(
        spec, format_.name, fs, (), pa.schema([]), modalities[0], _open_root(spec),
        file_is_row=format_.modality is not None, passed_over=passed_over,
    )  # fmt: skip
    opened = _open(format_, source, files)
    _check_columns(spec, set(opened.schema.names))
    modality = _choose_modality(format_, spec, opened.schema, modalities)
    if format_.name in _TYPED:
        _check_input(spec, opened.schema, modality)
    return replace(
        source,
        spec=opened.spec,
        shards=with_keys(opened.spec, opened.shards, opened.revision, source.fs),
        carried=_carried_schema(spec, opened.schema),
        modality=modality,
    )


def find_columns(spec: SourceSpec) -> tuple[Source, list[str]]:
    """A dataset of which no column is known yet, and the names of those that it has.

    Raises:
        SourceError: No such file, or an unknown format.
    """
    format_, fs, files, passed_over = _find(spec, ("text", "image", "audio"))
    source = Source(
        spec, format_.name, fs, (), pa.schema([]), file_is_row=format_.modality is not None,
        passed_over=passed_over,
    )  # fmt: skip
    opened = _open(format_, source, files)
    found = replace(source, spec=opened.spec, shards=tuple(opened.shards))
    return found, list(opened.schema.names)


def _check_names(spec: SourceSpec) -> None:
    for column in spec.columns:
        if column in RESERVED or column.startswith("_"):
            raise SourceError(
                f"source.carry: {column!r} is a name of the table's own; rename it in the dataset"
            )


def _find(
    spec: SourceSpec, modalities: Sequence[Modality]
) -> tuple[Format, Any, Sequence[File], dict[str, int]]:
    """The format, the filesystem, its files, and what is passed over by reason; no file where a
    library finds the dataset.
    """
    format_ = None if spec.format == "auto" else FORMATS[spec.format]
    if format_ is not None and format_.open is not None:
        return format_, None, [], {}
    listing = list_files(spec)
    if format_ is None:
        format_ = _detect_format(spec, listing)
    if format_.open is not None:
        return format_, None, [], {}
    if format_.modality is not None and format_.modality not in modalities:
        raise SourceError(
            f"source.uri: {redact(spec.uri)} is a folder of another kind ({format_.name}) than "
            f"the model takes, which embeds {' or '.join(modalities)}"
        )
    # Where the format is named, and no file has a name of its own: what others are called too; and
    # of files that are named themselves whatever they are called.
    tries = [format_.suffixes]
    if spec.format != "auto":
        tries += [format_.more_suffixes, *([("",)] if listing.is_named else [])]
    for suffixes in tries:
        others: Counter[str] = Counter()
        files = FileList(_with(suffixes, listing, others))
        if files:
            break
    else:
        raise NoFilesError(
            f"source.uri: no {format_.name} file ({', '.join(format_.suffixes)}) in "
            f"{redact(spec.uri)}"
        )
    num_dead = others.pop(DEAD_LINKS, 0)
    passed_over = {**listing.passed_over, **_shown(others, format_)}
    return format_, listing.fs, files, passed_over | ({DEAD_LINKS: num_dead} if num_dead else {})


def _with(suffixes: tuple[str, ...], listing: Listing, others: Counter[str]) -> Iterator[File]:
    """The files whose names end with a suffix; what the others end with is counted."""
    has_links = is_local(listing.fs)
    for file in listing.files:
        if file.name.lower().endswith(suffixes):
            yield file
        elif has_links and not file.revision:  # it might have been a folder
            others[DEAD_LINKS] += 1
        else:
            others[posixpath.splitext(file.name)[1].lower() or "no suffix"] += 1


def _shown(others: Counter[str], format_: Format) -> dict[str, int]:
    """How many files are not of the format, by suffix."""
    shown = {
        f"files with {s}, no {format_.name}": n for s, n in others.most_common(_SHOWN_SUFFIXES)
    }
    if rest := others.total() - sum(shown.values()):
        shown[f"{OF_OTHERS} other suffixes"] = rest
    return shown


def _detect_format(spec: SourceSpec, listing: Listing) -> Format:
    """The format of which there are most files, by suffix; of a marked folder the marker's."""
    marked = {marker: f for f in FORMATS.values() for marker in f.markers}
    suffixes_of = [(f.name, f.suffixes) for f in FORMATS.values() if f.suffixes]
    counts: Counter[str] = Counter()
    found: Format | None = None
    for file in listing.files:
        found = found or marked.get(file.name)
        name = file.name.lower()
        for format_, suffixes in suffixes_of:
            if name.endswith(suffixes):
                counts[format_] += 1
    if found is not None and listing.fs.isdir(listing.root):
        return found
    # Of as many of both the one that comes first.
    best = max(FORMATS, key=lambda name: counts[name])
    if not counts[best]:
        found_suffixes = {posixpath.splitext(file.name)[1].lower() for file in listing.files}
        for suffix, what in _HINTS.items():
            if suffix in found_suffixes:
                raise SourceError(f"source.uri: {redact(spec.uri)} is {what}")
        raise SourceError(
            f"source.format: cannot tell the format of {redact(spec.uri)}; "
            f"name one of {', '.join(FORMATS)}"
        )
    return FORMATS[best]


def _open(format_: Format, source: Source, files: Sequence[File]) -> Opened:
    if format_.open is not None:
        return format_.open(source.spec)
    assert format_.schema is not None, f"{format_.name} has neither `open` nor `schema`"
    schema = format_.schema(source, files)
    return Opened(source.spec, schema, plan_shards(source.spec, format_.name, source.fs, files))


def _choose_modality(
    format_: Format, spec: SourceSpec, schema: pa.Schema, modalities: Sequence[Modality]
) -> Modality:
    if len(modalities) == 1:
        return modalities[0]
    if format_.modality is not None:
        return format_.modality
    # Behind a root are files: a text is no path.
    if spec.root is None and format_.is_text(spec, schema):
        return "text"
    return next(m for m in modalities if m != "text")


def _open_root(spec: SourceSpec) -> tuple[Any, str] | None:
    if spec.root is None:
        return None
    if "://" not in spec.root and not Path(spec.root).is_dir():
        raise SourceError(f"source.root: no such folder: {spec.root}")
    try:
        fs, folder = open_fs(spec.root)
        if isinstance(getattr(fs, "fs", None), fsspec.AbstractFileSystem):
            # Links and redirects are checked on the innermost filesystem, which this would hide.
            raise ValueError("a root is a folder or one URL, not a cache or folder of another")
        return fs, folder
    except Exception as e:  # by filesystem
        why = spec.conceal(reason(e))
        raise SourceError(f"source.root: cannot read {redact(spec.root)}: {why}") from None


def _check_columns(spec: SourceSpec, available: set[str]) -> None:
    named = {"source.input": spec.input, "source.id": spec.id}
    named |= {"source.label": spec.label, "source.split": spec.split}
    named |= {"source.caption": spec.caption}
    named |= {f"source.carry[{i}]": c for i, c in enumerate(spec.carry)}
    shown = sorted(name for name in available if not name.startswith("_"))  # not for users to name
    for field, column in named.items():
        if column is not None and column not in available:
            close = difflib.get_close_matches(column, shown, n=1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            raise SourceError(
                f"{field}: no column {column!r} in {spec.stored_name}; it has "
                f"{_some(shown) or 'none'}{meant}"
            )


def _check_input(spec: SourceSpec, schema: pa.Schema, modality: Modality) -> None:
    """Refuse an input column of whose rows each would be rejected.

    Raises:
        SourceError: Numbers or times for texts; texts for pictures or sounds, which may be paths.
    """
    type_ = schema.field(spec.input).type
    if modality == "text" and _holds_no_text(type_):
        texts = [f.name for f in schema if pa.types.is_string(f.type) and f.name != spec.input]
        others = f", as {_some(texts)}" if texts else ""
        raise SourceError(
            f"source.input: column {spec.input!r} holds {type_}, and the model takes texts: name a "
            f"column of them{others}"
        )
    is_text = pa.types.is_string(type_) or pa.types.is_large_string(type_)
    if modality != "text" and is_text and spec.root is None:
        raise SourceError(
            f"source.input: column {spec.input!r} holds texts, and the model takes {modality}s: if "
            "they are paths or links, source.root names the folder or URL that they are below"
        )


def _holds_no_text(type_: pa.DataType) -> bool:
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal,
             pa.types.is_temporal)  # fmt: skip
    return any(is_kind(type_) for is_kind in kinds)


def _some(names: Sequence[str]) -> str:
    """Names for a message: of a million the first few, each cut."""
    shown = [n if len(n) <= _SHOWN_CHARACTERS else f"{n[:_SHOWN_CHARACTERS]}..." for n in names]
    more = len(names) - _SHOWN_NAMES
    return ", ".join(shown[:_SHOWN_NAMES]) + (f" and {more:,} more" if more > 0 else "")


def _carried_schema(spec: SourceSpec, types: pa.Schema) -> pa.Schema:
    """The carried columns' types as the table has them.

    Raises:
        SourceError: One that Delta Lake cannot hold.
    """
    fields = []
    for column in spec.columns:
        try:
            fields.append(pa.field(column, stored_type(types.field(column).type)))
        except UnstorableError as e:
            raise SourceError(
                f"source.carry: {column!r} holds {e}, which Delta Lake has no type for; cast it in "
                "the dataset (text holds all), or leave it out"
            ) from None
    return pa.schema(fields)
