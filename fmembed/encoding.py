"""A list of texts, pictures or sounds to vectors in this process: no Ray, no table.

Each input goes through the stations that a row of a run goes through, so its vector is the same.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fmembed.checkpoint.opening import Checkpoint, list_modalities, open_checkpoint
from fmembed.devices import cpu_has_bfloat16, has_cuda
from fmembed.errors import ModelError, RejectedError, SpecError, reason
from fmembed.rows.columns import ERROR, MESSAGE, TRUNCATED, row_schema
from fmembed.rows.outputs import DEFAULT, Output
from fmembed.rows.precision import PRECISIONS
from fmembed.rows.vectors import vector_type
from fmembed.sources.canonical import canonical
from fmembed.sources.given import content_of, is_file_name, is_picture
from fmembed.sources.source import BadRow, RawRow, Source
from fmembed.spec import Modality, ModelSpec, PreprocessSpec, RunSpec, SourceSpec

# Inputs that are read, prepared and embedded together: of texts many, to be sorted by length; of
# pictures as many as fit as pixels.
_WINDOW_ROWS: dict[Modality, int] = {"text": 4096, "image": 64, "audio": 64}
_INPUT = "input"


def encode(
    inputs: str | bytes | Path | Iterable[str | bytes | Path],
    model: str | ModelSpec | Mapping[str, Any],
    *,
    prompt: str | None = None,
    dims: int | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None,
    modality: Modality | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    on_rejected: Literal["raise", "nan"] = "raise",
) -> Any:
    """Embed a few texts, pictures or sounds, as a run would.

    The model stays loaded for the next call, until another one is asked for.

    Args:
        inputs: Texts; or pictures or sounds, each as the path of a file or as its bytes, pictures
            as Pillow's too. Of a model that takes both, a `str` is a text, and a path is a `Path`.
            One alone is a list of one, whose vector comes without the list.
        model: Hub id, folder, `package:<package>/<folder>`, or the fields of the config's part
            `model`, as `{"id": ..., "dtype": "float32", "prompt": "query: "}`.
        prompt: `model.prompt`, before every text.
        dims: `model.dims`, so many dimensions.
        dtype: `model.dtype`; auto is bfloat16 where the device computes that natively, as in a run.
        modality: What the inputs are, of a model that takes several kinds.
        device: What to compute on; "auto" is a GPU where there is one.
        on_rejected: What becomes of an input that a run would reject, as an empty text or a picture
            that cannot be decoded: an error, or a row of NaN and a warning.

    Returns:
        Shape (inputs, dim), float32 (float16, int8 where `precision` says so), C-contiguous; with
        `outputs` a dict of these by name; with pooling `tokens` a list of (tokens, dim).

    Raises:
        RejectedError: An input cannot be embedded, and `on_rejected` is "raise".
        SpecError: An argument is wrong.
        ModelError: The model cannot be loaded, or is none for these inputs.
    """
    is_one = isinstance(inputs, str | bytes | Path) or is_picture(inputs)
    is_table = isinstance(inputs, Mapping) or hasattr(inputs, "columns")
    if is_table or not (is_one or isinstance(inputs, Iterable)) or hasattr(inputs, "column_names"):
        hint = "; give one of its columns" if is_table or hasattr(inputs, "column_names") else ""
        raise SpecError(
            f"inputs: takes a list of texts, paths or bytes, got {type(inputs).__name__}{hint}"
        )
    if isinstance(inputs, pa.Array | pa.ChunkedArray):
        inputs = inputs.to_pylist()
    several: Any = [inputs] if is_one else inputs
    given: list[Any] = list(several)
    _check_choice("device", device, ("auto", "cpu", "cuda"))
    _check_choice("on_rejected", on_rejected, ("raise", "nan"))
    if device == "auto":
        device = "cuda" if has_cuda() else "cpu"
    elif device == "cuda" and not has_cuda():
        raise SpecError(
            "device: there is no CUDA device here that torch can use; takes cpu or auto"
        )
    told = {"prompt": prompt, "dims": dims, "dtype": dtype}
    checkpoint = _open(model, modality, given, device, told)
    whole = [o.column for o in checkpoint.outputs if not PRECISIONS[o.precision].has_norms]
    if on_rejected == "nan" and whole:
        raise SpecError(f"on_rejected: the whole numbers of {whole[0]} have no NaN; takes raise")
    rows = _embed(checkpoint, given, device)
    _tell(checkpoint, rows, on_rejected)
    found = {o.column: _vectors(o, rows[o.column]) for o in checkpoint.outputs}
    if is_one:
        found = {name: vectors[0] for name, vectors in found.items()}
    return found[DEFAULT] if list(found) == [DEFAULT] else found


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise SpecError(f"{name}: takes {' or '.join(choices)}, got {value!a:.80}")


def _open(
    model: str | ModelSpec | Mapping[str, Any],
    modality: Modality | None,
    inputs: Sequence[Any],
    device: str,
    told: Mapping[str, Any],
) -> Checkpoint:
    if isinstance(model, str | Path):
        model = {"id": str(model)}
    elif isinstance(model, ModelSpec):
        model = model.model_dump(mode="json", exclude_unset=True)
    elif not isinstance(model, Mapping):
        raise SpecError(f"model: takes an id, or a dict of fields, got {type(model).__name__}")
    named = {name: value for name, value in told.items() if value is not None}
    elsewhere = {"uri": "encode"}
    raw = {"source": elsewhere, "model": {**model, **named}, "output": elsewhere}
    spec = RunSpec.parse(raw).model
    if spec.endpoint is not None:
        raise ModelError(
            "model.endpoint: encode runs a model in this process; fmembed.embed asks a server"
        )
    takes = list_modalities(spec)
    chosen = modality or spec.modality
    if chosen is None and len(takes) > 1:
        chosen = _guess_modality(inputs, takes)
    if chosen is not None and chosen not in takes:
        raise ModelError(f"modality: {spec.id} embeds {' or '.join(takes)}, not {chosen!a:.80}")
    if takes == ("text",) and inputs and isinstance(inputs[0], str) and is_file_name(inputs[0]):
        raise SpecError(
            f"inputs[0]: {inputs[0]!a:.200} is a file here; give files as pathlib.Path, which are "
            "read, and texts as they are"
        )
    native_bfloat16 = device == "cuda" or cpu_has_bfloat16()
    checkpoint = open_checkpoint(spec, native_bfloat16, chosen)
    for output in checkpoint.outputs:
        if PRECISIONS[output.precision].needs_ranges:
            raise ModelError(
                f"model.precision: {output.precision} takes ranges from a sample of a dataset, "
                "which a table keeps; encode takes float32, float16 or binary"
            )
    return checkpoint


def _guess_modality(inputs: Sequence[Any], takes: Sequence[Modality]) -> Modality:
    """A text, or what else the model takes; never the name of a file as a text."""
    is_text = [isinstance(given, str) for given in inputs]
    if not any(is_text):
        return next(m for m in takes if m != "text")
    if not all(is_text):
        raise SpecError(
            "inputs: texts and files together; the model takes either: encode them one after the "
            "other, or say which they are by modality"
        )
    for i, given in enumerate(inputs):
        if is_file_name(given):
            raise SpecError(
                f"inputs[{i}]: {given!a:.200} is a file here, and could be a text: say which by "
                f"modality ({' or '.join(takes)})"
            )
    return "text"


def _embed(checkpoint: Checkpoint, inputs: Sequence[Any], device: str) -> pa.Table:
    """A row for each input, in order: its vectors, `_error`, `_message` and `truncated`."""
    from fmembed.prepare.stage import Preprocess

    spec = SourceSpec(uri="inputs", input=_INPUT)
    source = Source(spec, "jsonl", None, (), pa.schema([]), checkpoint.modality)
    schema = row_schema(source.carried, source.modality)
    prepare = Preprocess(checkpoint, PreprocessSpec())
    kept = [*(o.column for o in checkpoint.outputs), ERROR, MESSAGE, TRUNCATED]
    tables = []
    with _loaded(checkpoint, device) as encoder:
        step = _WINDOW_ROWS[checkpoint.modality]
        for start in range(0, max(len(inputs), 1), step):
            window = enumerate(inputs[start : start + step], start)
            raw: list[RawRow] = [(str(i), _read(given, source)) for i, given in window]
            tables.append(encoder(prepare(canonical(source, raw, 0, schema))).select(kept))
    return pa.concat_tables(tables)


def _read(given: Any, source: Source) -> Any:
    """An input as a row that a reader has read, or why it is none."""
    is_path = isinstance(given, Path) or (source.modality != "text" and isinstance(given, str))
    if is_path:
        try:
            size = Path(given).stat().st_size
            given = Path(given).read_bytes() if size <= source.most_bytes else size
        except (OSError, ValueError) as e:  # a NUL in it
            return "cannot be read", f"{str(given)!a:.200}: {reason(e)}"
    try:
        given = content_of(given)
    except BadRow as e:
        return e.error, e.message
    size = given if isinstance(given, int) else len(given) if hasattr(given, "__len__") else 0
    if size > source.most_bytes:
        return "too large", f"{size:,} bytes, more than {source.limit} = {source.most_bytes:,}"
    return {_INPUT: given}


_lock = threading.Lock()
_kept: tuple[Any, Any] | None = None


@contextmanager
def _loaded(checkpoint: Checkpoint, device: str) -> Iterator[Any]:
    """The encoder of a checkpoint, for one caller at a time; it is kept until another is asked for.

    Its identity is part of the key, and so the digest of its files: weights that were changed
    meanwhile are loaded anew.
    """
    global _kept
    with _lock:
        if _kept is None or _kept[0] != (checkpoint, device):
            _kept = None  # before the next one takes memory
            from fmembed.model.embed import load

            _kept = (checkpoint, device), load(checkpoint, device=device)
        yield _kept[1]


def _tell(checkpoint: Checkpoint, rows: pa.Table, on_rejected: str) -> None:
    """Say what was not embedded, or not all of it."""
    errors = rows[ERROR].to_pylist()
    bad = [i for i, error in enumerate(errors) if error is not None]
    if bad:
        shown = "; ".join(f"inputs[{i}]: {errors[i]}: {rows[MESSAGE][i]}" for i in bad[:3])
        more = f"; and {len(bad) - 3:,} more" if len(bad) > 3 else ""
        if on_rejected == "raise":
            raise RejectedError(
                f"{len(bad):,} of {len(errors):,} inputs cannot be embedded: {shown}{more} "
                '(on_rejected="nan" gives them NaN)'
            )
        warnings.warn(f"{len(bad):,} inputs have no vector: {shown}{more}", stacklevel=3)
    if num_cut := sum(rows[TRUNCATED].to_pylist()):
        most = f" ({checkpoint.max_tokens:,} tokens)" if checkpoint.modality == "text" else ""
        warnings.warn(
            f"{num_cut:,} of {len(errors):,} inputs are longer than the model takes{most}, and it "
            "saw a part of each",
            stacklevel=3,
        )


def _vectors(output: Output, column: pa.ChunkedArray) -> Any:
    """A column of vectors as numpy has them; an input without one has NaN, or no token."""
    precision, type_ = PRECISIONS[output.precision], vector_type(column.type)
    assert type_ is not None
    dim = type_.list_size
    dtype = precision.arrow.to_pandas_dtype()
    if output.pooling == "tokens":
        none = np.empty((0, dim), dtype)
        return [_matrix(row.values, dim) if row.is_valid else none for row in column]
    found = np.concatenate([_matrix(chunk.drop_null(), dim) for chunk in column.chunks])
    if not column.null_count:
        return found
    vectors = np.full((len(column), dim), np.nan, dtype)
    vectors[np.asarray(column.is_valid(), dtype=np.bool_)] = found
    return vectors


def _matrix(vectors: pa.FixedSizeListArray, dim: int) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = vectors.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
    return found
