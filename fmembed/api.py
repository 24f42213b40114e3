"""What Python's users call: a run of data that they hold, of a path, or of a config.

Each is the line's own function (pipeline.py), with a spec made of what was given.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import pyarrow as pa

from fmembed import summary, terminal
from fmembed.errors import SpecError
from fmembed.result import RunResult
from fmembed.rows.columns import PARENT_ID, PIECE, ROW_ID
from fmembed.spec import Format, ModelSpec, RunSpec
from fmembed.startup import joins_cluster

if TYPE_CHECKING:
    from fmembed.embeddings import Embeddings
    from fmembed.forecast import Forecast
    from fmembed.promotion import GateMode
    from fmembed.sources.given import Given

# What becomes of a run beside another one on its table.
IfLocked = Literal["fail", "wait"]


@dataclass(frozen=True, repr=False)
class Result(RunResult):
    """What a run did (the fields of `RunResult`), and the table that it leaves."""

    # Of data that this process held: what it was.
    _given: ClassVar[Given | None] = None

    def open(self) -> Embeddings:
        """The version that the run left, to read; of data that was held here, its rows in order."""
        from fmembed.embeddings import Embeddings

        table = Embeddings(self.table, self.version)
        return table if self._given is None else table.in_order(self._put_in_order)

    def _put_in_order(self, rows: pa.Table) -> pa.Table:
        assert self._given is not None
        is_cut = PARENT_ID in rows.column_names
        at = np.array(
            self._given.positions(rows[PARENT_ID if is_cut else ROW_ID].to_pylist()), dtype=np.int64
        )
        pieces = rows[PIECE].to_numpy() if is_cut else np.zeros(rows.num_rows)
        order = np.lexsort((pieces, at))
        # Without rows of the table that are not of this data.
        return rows.take(pa.array(order[at[order] < sys.maxsize]))

    def numpy(
        self, column: str | None = None, *, label: str | None = None, ids: bool = False
    ) -> Any:
        """As `Embeddings.numpy`: all rows of the table, not those of this run alone; of data that
        was held here its own rows, in order. A rejected row has none.
        """
        return self.open().numpy(column, label=label, ids=ids)

    def to_pandas(self, columns: Sequence[str] | None = None) -> Any:
        """As `Embeddings.pandas`."""
        return self.open().pandas(columns)

    def __repr__(self) -> str:
        return "\n".join(summary.lines(asdict(self)))

    def _repr_html_(self) -> str:
        from fmembed.embeddings import as_html

        report = self.open().report_html() if self.table_rows else ""
        return as_html(summary.lines(asdict(self))) + report


def embed(
    data: Any,
    *,
    model: str | ModelSpec | Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    input: str | None = None,  # noqa: A002 - the config's name
    id: str | None = None,  # noqa: A002
    label: str | None = None,
    carry: Sequence[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    spool: str | Path | None = None,
    retry_rejected: bool = False,
    if_locked: IfLocked = "fail",
    verbose: bool = False,
    quiet: bool = False,
) -> Result:
    """Embed a dataset into a table; with the same arguments again it resumes.

    Args:
        data: A `RunSpec`, the path of a YAML config, or a dict of one; the path or URL of a
            dataset; or data: texts, dicts of a row each, or paths or contents of pictures or
            sounds, in a list or from a generator; a pyarrow, pandas or polars table, a `datasets`
            Dataset, a Ray Dataset. Rows of data are known by their number, unless `id` is given.
        model: `model.id`, or the config's part `model`.
        output: `output.uri`, the table.
        input: `source.input`, the column to embed; "text", if none.
        id: `source.id`, the column that names a row.
        label: `source.label`, what the probes predict.
        carry: `source.carry`, more columns to keep.
        overrides: Any other field by dotted name, as `{"probes": ["knn"]}`.
        spool: Where data is laid out for as long as the run takes: a temporary folder, if none; on
            a cluster a folder or URL that all nodes read.
        retry_rejected: Try the rows again that earlier runs have rejected.
        if_locked: Where another run is writing the table: raise LockedError, or wait for its end.
        verbose: Show Ray's own output.
        quiet: Tell no progress.

    Raises:
        SpecError: An argument is wrong. All else as `pipeline.embed`.
    """
    from fmembed import pipeline

    waits = _waits(if_locked)
    told = _fields(model, output, input, id, label, carry, overrides)
    with _spec_of(data, told, spool) as (spec, given):
        result = pipeline.embed(
            spec, retry_rejected=retry_rejected, waits=waits, verbose=verbose, quiet=quiet
        )
    return _with_table(result, given)


def refresh(
    data: Any,
    *,
    model: str | ModelSpec | Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    store: str | Path | None = None,
    input: str | None = None,  # noqa: A002 - the config's name
    id: str | None = None,  # noqa: A002
    label: str | None = None,
    carry: Sequence[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    spool: str | Path | None = None,
    allow_removals: int | None = None,
    gate: GateMode = "enforce",
    if_locked: IfLocked = "fail",
    verbose: bool = False,
    quiet: bool = False,
) -> Result:
    """Keep a table in step with a dataset: see `pipeline.refresh`.

    Args:
        data: As for `embed`, and so are all others but three.
        model: The same.
        output: The same.
        store: `output.store`, in place of `output`: the new version becomes what its readers get,
            unless the gate refuses it, which `Result.promotion` says.
        input: The same.
        id: The same. Without one a row is its number: put before the others, a row changes all.
        label: The same.
        carry: The same.
        overrides: The same.
        spool: The same.
        allow_removals: So many rows may leave, in place of `refresh.max_removed_fraction`.
        gate: "off" does not ask it.
        if_locked: As for `embed`.
        verbose: Show Ray's own output.
        quiet: Tell no progress.
    """
    from fmembed import pipeline

    waits = _waits(if_locked)
    told = _fields(model, output, input, id, label, carry, overrides)
    if store is not None:
        told |= {"output.store": str(store), "output.uri": ""}
    with _spec_of(data, told, spool) as (spec, given):
        result = pipeline.refresh(
            spec,
            allow_removals=allow_removals,
            gate=gate,
            waits=waits,
            verbose=verbose,
            quiet=quiet,
        )
    return _with_table(result, given)


def plan(
    data: Any,
    *,
    model: str | ModelSpec | Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    input: str | None = None,  # noqa: A002 - the config's name
    id: str | None = None,  # noqa: A002
    label: str | None = None,
    carry: Sequence[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    spool: str | Path | None = None,
    refresh: bool = False,
    allow_removals: int | None = None,
    verbose: bool = False,
    quiet: bool = False,
) -> Forecast:
    """Say what `embed`, or `refresh`, would do with the same arguments: see `pipeline.plan`."""
    from fmembed import pipeline

    told = _fields(model, output, input, id, label, carry, overrides)
    with _spec_of(data, told, spool) as (spec, _):
        return pipeline.plan(
            spec, refresh=refresh, allow_removals=allow_removals, verbose=verbose, quiet=quiet
        )


def _waits(if_locked: str) -> bool:
    if if_locked not in get_args(IfLocked):
        raise SpecError(f"if_locked: takes fail or wait, got {if_locked!a:.80}")
    return if_locked == "wait"


def _with_table(result: RunResult, given: Given | None = None) -> Result:
    whole = Result(**{f.name: getattr(result, f.name) for f in fields(RunResult)})
    if given is not None and given.has_order:
        object.__setattr__(whole, "_given", given)
    return whole


def _fields(
    model: str | ModelSpec | Mapping[str, Any] | None,
    output: str | Path | None,
    input_: str | None,
    id_: str | None,
    label: str | None,
    carry: Sequence[str] | None,
    overrides: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What arguments say, by dotted name of a field."""
    if isinstance(model, ModelSpec):
        model = model.model_dump(mode="json", exclude_unset=True)
    if output is not None and not isinstance(output, str | Path):
        raise SpecError(f"output: takes a folder or a URL, got {output!a:.80}")
    if overrides is not None and not (
        isinstance(overrides, Mapping) and all(isinstance(name, str) for name in overrides)
    ):
        raise SpecError(
            f"overrides: takes a dict of fields, as {{'compute.actors': 2}}, got {overrides!a:.80}"
        )
    if isinstance(carry, str):
        raise SpecError(f"carry: takes a list of columns, got {carry!a:.80}")
    parts = {f"model.{name}": value for name, value in model.items()} if (
        isinstance(model, Mapping)
    ) else {"model.id": model}  # fmt: skip
    named = {
        **parts,
        "output.uri": None if output is None else str(output),
        "source.input": input_,
        "source.id": id_,
        "source.label": label,
        "source.carry": None if carry is None else list(carry),
    }
    return {**{k: v for k, v in named.items() if v is not None}, **(overrides or {})}


@contextlib.contextmanager
def _spec_of(
    data: Any, told: Mapping[str, Any], spool: str | Path | None
) -> Iterator[tuple[RunSpec, Given | None]]:
    """The spec of a run; what it names is there for as long as this lasts."""
    if isinstance(data, str | Path) and str(data).endswith((".yaml", ".yml")):
        yield RunSpec.from_yaml(str(data), dict(told)), None
    elif isinstance(data, str | Path):
        yield RunSpec.from_yaml(None, {"source.uri": str(data), **told}), None
    elif isinstance(data, RunSpec):
        raw = data.model_dump(mode="json", exclude_unset=True)
        yield (RunSpec.from_yaml(None, {**raw, **told}) if told else data), None
    elif isinstance(data, Mapping):
        if "source" not in data:
            raise SpecError(
                "data: a dict is a config, with source, model and output; of columns make a table "
                "(pandas, polars or pyarrow)"
            )
        yield RunSpec.from_yaml(None, {**copy.deepcopy(dict(data)), **told}), None
    else:
        with _laid_out(data, told, spool) as given:
            spec = RunSpec.from_yaml(None, {**given.fields, **told})
            spec.source.call(given.called)
            _check_twins(spec, given)
            yield spec, given


# By so many the format of a stream is told.
_LOOKED_AT_BYTES = 2**16


@contextlib.contextmanager
def of_stream(spec: RunSpec, stream: IO[bytes]) -> Iterator[RunSpec]:
    """A spec whose source is what comes on a stream: kept in a file for as long as this lasts.

    Args:
        spec: `source.format` says what it is; if that is left open, objects or an array where it
            begins so, else a text a line.
        stream: As standard input.

    Raises:
        SpecError: Nothing came, or other machines would have to read it.
    """
    if _has_other_nodes():
        raise SpecError(
            "source.uri: - is standard input, which the nodes of a cluster do not see: put it into "
            "a file that all of them read"
        )
    with tempfile.TemporaryDirectory(prefix="fmembed-") as folder:
        path = Path(folder) / "stdin"
        with path.open("wb") as file:
            shutil.copyfileobj(stream, file)
        with path.open("rb") as file:
            begin = file.read(_LOOKED_AT_BYTES)
        if not begin:
            raise SpecError("source.uri: nothing came on standard input")
        format_ = spec.source.format
        if format_ == "auto":
            format_ = _format_of(begin, is_cut=len(begin) == _LOOKED_AT_BYTES)
        source = spec.source.model_copy(update={"uri": str(path), "format": format_})
        source.call("standard input")
        yield spec.model_copy(update={"source": source})


def _format_of(begin: bytes, is_cut: bool) -> Format:
    """The format of what begins so, if it can only be one.

    Args:
        begin: Its first bytes.
        is_cut: Whether there are more, so that the last row may be half a one.

    Raises:
        SpecError: It may as well be CSV.
    """
    text = begin.removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.match(rb'\{\s*["}]', text):
        return "jsonl"
    if re.match(rb'\[\s*["{\]]', text):
        return "json"
    for delimiter in ",\t;":
        lines = io.StringIO(text.decode(errors="replace"), newline="")
        try:
            rows = [row for row in csv.reader(lines, delimiter=delimiter) if row]
        except csv.Error:
            continue
        widths = {len(row) for row in (rows[:-1] if is_cut else rows)}
        if len(rows) > 1 and len(widths) == 1 and widths != {1}:
            raise SpecError(
                f"source.format: what comes on standard input reads as CSV, with {widths.pop()} "
                f"fields a row between {delimiter!r}: say --format csv, or --format lines"
            )
    return "lines"


def _check_twins(spec: RunSpec, given: Given) -> None:
    """Say before the work that rows of data have one id: all but the first are rejected.

    Raises:
        SpecError: They are more than a run may reject.
    """
    if not (twins := given.twins()):
        return
    assert given.ids is not None
    column = spec.source.id
    told = (
        f"{len(twins):,} of {len(given.ids):,} rows have the {column} of an earlier row, as "
        f"{twins[0][:80]!a}"
    )
    if not spec.output.allows(len(twins), len(given.ids)):
        raise SpecError(
            f"source.id: {told}, and would be rejected: name a column of ids that are there once, "
            "or none; or allow them by overrides={'output.max_rejected_fraction': ...}"
        )
    terminal.say(f"{told}: they are rejected")


def _has_other_nodes() -> bool:
    """Whether Ray is, or will be, on other machines too."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return bool(sum(node["Alive"] for node in ray.nodes()) > 1)
    return joins_cluster()


@contextlib.contextmanager
def _laid_out(data: Any, told: Mapping[str, Any], spool: str | Path | None) -> Iterator[Given]:
    from fmembed.sources.given import lay_out
    from fmembed.storage import Storage

    # A mistake in a field is told before anything is written.
    RunSpec.from_yaml(None, {"source.uri": "data", **told})
    if spool is None and _has_other_nodes():
        raise SpecError(
            "spool: data that this process holds is not seen by the nodes of a cluster: give a "
            "folder or URL that all of them read"
        )
    if spool is None or "://" not in str(spool):
        folder = tempfile.mkdtemp(prefix="fmembed-", dir=spool)
        try:
            yield lay_out(data, Storage(folder), told)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    storage = Storage(f"{str(spool).rstrip('/')}/fmembed-{uuid.uuid4().hex[:12]}")
    try:
        yield lay_out(data, storage, told)
    finally:
        for path in storage.sizes(""):
            storage.delete(path)
