"""What a run is of and where it goes, found and checked before anything is computed.

Imports neither Ray nor torch, which take three seconds: a mistake in a spec is said within one.
"""

from __future__ import annotations

import os
import posixpath
import re
import sys
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from fsspec.utils import glob_translate

from fmembed.checkpoint.files import check_processor
from fmembed.checkpoint.opening import Checkpoint, list_modalities, open_checkpoint
from fmembed.devices import cpu_has_bfloat16, has_cuda
from fmembed.errors import ModelError, NoFilesError, SourceError, SpecError, TableError
from fmembed.redaction import redact, split_chain
from fmembed.rows.columns import PIECE, PIECE_TEXT, table_schema
from fmembed.rows.precision import Ranges, delta_field, ranges_to_lists
from fmembed.sources.formats.folder import LABEL, has_class_folders
from fmembed.sources.opening import open_source
from fmembed.sources.source import Source
from fmembed.spec import RunSpec
from fmembed.storage import resolve_package
from fmembed.table.card import Card, StoredOutput, fingerprint
from fmembed.table.output import carried_types, check_columns, check_schema
from fmembed.table.store import Store
from fmembed.table.table import Table

# One name of each kind of file in a table: a source's pattern that matches one holds the table.
_OWN_NAMES = (
    f"part-{'0' * 32}.parquet",
    f"_delta_log/{'0' * 20}.json",
    "_report.html",
)


@dataclass(frozen=True)
class Inputs:
    """A spec, and what it names. `identity` is all that decides a vector; `store` is what the table
    lies in, if in any.
    """

    spec: RunSpec
    source: Source
    checkpoint: Checkpoint
    identity: dict[str, Any]
    table: Table
    store: Store | None = None

    def card(self, ranges: Ranges) -> Card:
        """What a table of these says of itself, if it is made now."""
        return Card(
            table=uuid.uuid4().hex,
            fingerprint=fingerprint(self.identity),
            identity=self.identity,
            modality=self.checkpoint.modality,
            outputs={o.column: StoredOutput(**asdict(o)) for o in self.checkpoint.outputs},
            ranges=ranges_to_lists(ranges),
            spec=self.spec.stored(),
        )

    def schema(self) -> pa.Schema:
        """The columns of its log, before a vector is made."""
        vectors = [delta_field(o) for o in self.checkpoint.outputs]
        spec, modality = self.spec.preprocess, self.checkpoint.modality
        in_pieces, keeps_text = spec.pieces_are_rows(modality), spec.keeps_text(modality)
        return table_schema(self.source.carried, vectors, in_pieces, keeps_text)


def open_inputs(spec: RunSpec, may_be_empty: bool = False, gpus_may_come: bool = False) -> Inputs:
    """Find and check the source, the checkpoint and the table, which is still until a run has its
    lock.

    Args:
        spec: Of the run.
        may_be_empty: Whether it is no mistake that a source has nothing any more that a table was
            made of.
        gpus_may_come: Whether the cluster may start nodes with GPUs, though none is there.

    Raises:
        UserError: One of them is wrong; nothing was written.
    """
    modalities = list_modalities(spec.model)
    if spec.model.modality is not None:
        if spec.model.modality not in modalities:
            raise ModelError(
                f"model.modality: {spec.model.id} embeds {' or '.join(modalities)}, "
                f"not {spec.model.modality}"
            )
        modalities = (spec.model.modality,)
    store = None if spec.output.store is None else Store(spec.output.store)
    try:
        source = open_source(spec.source, modalities)
    except NoFilesError:
        if not may_be_empty:
            raise
        source = _open_emptied(spec, store)
    _check_apart(spec, source)
    _check_stays(spec)
    checkpoint = open_checkpoint(spec.model, _native_bfloat16(spec, gpus_may_come), source.modality)
    # Code of a checkpoint's own may keep its words wherever it likes.
    is_ours = checkpoint.endpoint is None and not checkpoint.trust_remote_code
    if is_ours:
        check_processor(checkpoint.folder() / checkpoint.weights, checkpoint.modality)
    _check_preprocess(spec, checkpoint)
    identity = {**checkpoint.identity, **spec.preprocess.identity(checkpoint.modality)}
    if store is not None:
        store.check_usable()
        spec = _in_store(spec, store, identity)
    table = Table.open_output(spec.output.uri, identity, redact(spec.model.id), is_still=True)
    if not source.file_is_row:  # there the column has whatever name it is given
        check_columns(table, spec.source.input, spec.source.id)
    spec, source = _with_folders_as_labels(_with_choice_of_text(spec, table), source, table)
    source = replace(source, carried=carried_types(table, source.carried))
    inputs = Inputs(spec, source, checkpoint, identity, table, store)
    check_schema(table, inputs.schema())
    return inputs


def _in_store(spec: RunSpec, store: Store, identity: dict[str, Any]) -> RunSpec:
    """With the table's own place in a store, which is the dataset's and the fingerprint's."""
    name = store.name(spec.source.name or spec.source.input, fingerprint(identity))
    update = {"uri": store.uri_of(name), "store": None}
    return spec.model_copy(update={"output": spec.output.model_copy(update=update)})


def _with_choice_of_text(spec: RunSpec, table: Table) -> RunSpec:
    """A table of chunks that was begun without their texts stays so, unless the config says how."""
    if spec.preprocess.keep_text is not None or not (names := table.rows.schema().names):
        return spec
    update = {"keep_text": False}
    if PIECE in names and PIECE_TEXT not in names:
        return spec.model_copy(update={"preprocess": spec.preprocess.model_copy(update=update)})
    return spec


def _with_folders_as_labels(spec: RunSpec, source: Source, table: Table) -> tuple[RunSpec, Source]:
    """Folders of classes give their files a label, where the config leaves that open.

    A table that was begun without stays so, and one that has them keeps them.
    """
    if not source.file_is_row or "label" in spec.source.model_fields_set or not source.shards:
        return spec, source
    is_begun = table.card() is not None
    if not (has_folders_as_labels(table) if is_begun else has_class_folders(source)):
        return spec, source
    update = {"label": LABEL}
    carried = pa.schema([pa.field(LABEL, pa.string()), *source.carried])
    labelled = replace(source, spec=source.spec.model_copy(update=update), carried=carried)
    return spec.model_copy(update={"source": spec.source.model_copy(update=update)}), labelled


def has_folders_as_labels(table: Table) -> bool:
    """Whether a table was filled from files whose folders are their labels."""
    card = table.card()
    told = card.spec.get("source") if card is not None else None
    named = told.get("label") if isinstance(told, dict) else None
    return named == LABEL and LABEL in table.rows.schema().names


def _open_emptied(spec: RunSpec, store: Store | None) -> Source:
    """A source of which nothing is left, by what the table says of it, or what is promoted.

    Raises:
        NoFilesError: There is no table, so that nothing was ever in it.
    """
    pointer = None if store is None else store.current()
    if store is not None and pointer is None:
        raise
    uri = spec.output.uri if store is None or pointer is None else store.uri_of(pointer.table)
    table = Table(uri)
    card = table.card()
    if card is None:
        raise
    schema = table.rows.schema()
    carried = pa.schema([schema.field(c) for c in spec.source.columns if c in schema.names])
    format_: Any = spec.source.format
    return Source(spec.source, format_, None, (), carried, card.modality)


def _check_apart(spec: RunSpec, source: Source) -> None:
    """Refuse a source that holds the output, or an output that holds the source.

    The next run would read the table's own parts as rows, or the table would be somebody's dataset.

    Raises:
        TableError: One lies in the other.
    """
    uri = spec.source.uri
    if source.format == "hf" and not Path(uri).expanduser().exists():
        return
    if uri.startswith("package:"):
        uri = resolve_package(uri, "source.uri", SourceError)
    output, place = _place(_where(spec)), _place(uri)
    if any(c in uri for c in "*?[") and not Path(uri).exists():
        pattern = re.compile(glob_translate(place))
        holds = any(pattern.fullmatch(f"{output}/{name}") for name in _OWN_NAMES)
    else:
        holds = f"{output}/".startswith(f"{place.rstrip('/')}/")
    scheme = f"{output.partition('://')[0]}://" if "://" in output else ""
    folders = {posixpath.dirname(f.path) for shard in source.shards for f in shard.files}
    folders |= {place} if source.format == "hf" else set()
    lies = any(f"{_place(scheme + folder)}/".startswith(f"{output}/") for folder in folders)
    if holds or lies:
        raise TableError(
            f"output.uri: source.uri ({spec.source.stored_name}) "
            f"{'holds' if holds else 'lies in'} {_where(spec)}; a table and its source are kept "
            "apart: give another folder"
        )


def _check_stays(spec: RunSpec) -> None:
    """Refuse an output in the copy of a folder that a submitted job runs in, which Ray deletes.

    Raises:
        TableError: It is there.
    """
    if "/_ray_pkg_" in _place(_where(spec)) + "/":
        raise TableError(
            f"output.uri: {_where(spec)} is in the job's copy of its folder, which Ray deletes: "
            "give a URL, or an absolute path that all nodes share"
        )


def _where(spec: RunSpec) -> str:
    """The table, or the store that it will lie in."""
    return spec.output.store or spec.output.uri


def _place(uri: str) -> str:
    """A path without links and dots, or a URL without its end's slash."""
    uri = split_chain(uri)[-1]
    scheme, is_url, path = uri.partition("://")
    if is_url and scheme not in ("file", "local"):
        # One name for each store, and for each object in it.
        path = re.sub("/+", "/", path).rstrip("/")
        return f"{scheme.removesuffix('a')}://{path}"  # s3a is s3
    path = path if is_url else re.sub("^(file|local):(?=/)", "", uri)
    return os.path.realpath(Path(path).expanduser())


def _check_preprocess(spec: RunSpec, checkpoint: Checkpoint) -> None:
    """Refuse what this model cannot do.

    Raises:
        ModelError: Chunks without a tokenizer.
        SpecError: Chunks longer than the model takes, or options of another modality.
    """
    for output in checkpoint.outputs:
        if output.column in spec.source.columns:
            raise SpecError(
                f"model.outputs.{output.column}: the source's column of that name is carried; "
                "give the vectors another name"
            )
    options = spec.preprocess
    if options.chunk_tokens is not None:
        if checkpoint.modality != "text":
            raise SpecError(f"preprocess.chunk_tokens: is for text, not {checkpoint.modality}")
        if checkpoint.endpoint is not None:
            raise ModelError("preprocess.chunk_tokens: a server does not show its tokenizer")
        if options.chunk_tokens > checkpoint.max_tokens:
            raise SpecError(
                f"preprocess.chunk_tokens: takes at most {checkpoint.max_tokens} with this model, "
                f"got {options.chunk_tokens}"
            )
    if options.window_s is not None and checkpoint.modality != "audio":
        raise SpecError(f"preprocess.window_s: is for audio, not {checkpoint.modality}")
    if spec.source.caption is not None and checkpoint.modality == "text":
        raise SpecError("source.caption: belongs to pictures or sounds; this run embeds text")


def _native_bfloat16(spec: RunSpec, gpus_may_come: bool) -> bool:
    """Whether the device that `dtype: auto` will run on computes bfloat16 natively."""
    if spec.model.dtype != "auto":
        return False
    gpus = spec.compute.first_gpus
    on_cpu = gpus == 0
    ray: Any = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        resources: dict[str, float] = ray.cluster_resources()
        if not on_cpu and (gpus != "auto" or gpus_may_come or resources.get("GPU", 0)):
            return True
        return bool(ray.get(ray.remote(num_cpus=0)(cpu_has_bfloat16).remote()))
    return (not on_cpu and has_cuda()) or cpu_has_bfloat16()
