"""The rows that probes and the map are made from: read back from a table, checked, with inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from fmembed import probes
from fmembed.arrays import Floats
from fmembed.errors import SpecError, TableError, reason
from fmembed.evaluate.source_again import cut_inputs, fetch_inputs
from fmembed.rows.columns import PARENT_ID, PIECE_START, PIECE_STOP, PIECE_TEXT
from fmembed.rows.ids import keys_of
from fmembed.rows.precision import PRECISIONS, dequantize, ranges_from_lists
from fmembed.spec import RunSpec, SourceSpec
from fmembed.table.card import Card
from fmembed.table.reading import sample
from fmembed.table.table import Table

NO_SOURCE = "needs the source: give --from-config CONFIG"
# What evaluation reads of a card's identity.
_NAMED = (
    "model.adapter", "model.dtype", "model.max_tokens", "model.prompt", "model.revision",
    "model.weights", "preprocess.pieces_are_rows",
)  # fmt: skip


@dataclass(frozen=True)
class TableSample:
    """Rows of a table, the vectors as numbers, and the inputs where they are known.

    Shapes: vectors (rows, dim) float32 by column; `texts` has a text for each row, or else `cheap`
    the name and the features, shape (rows, n), of its pictures or sounds; `missing` says why there
    is neither. `num_unlabelled` rows of the table are left out, for they have no label.
    """

    rows: pa.Table
    vectors: dict[str, Floats]
    texts: list[str | None] | None
    cheap: tuple[str, Floats] | None
    missing: str | None
    num_unlabelled: int = 0

    def values(self, column: str | None) -> list[Any] | None:
        """A column's values; None where none is named."""
        return None if column is None else list(self.rows[column].to_pylist())


def read_card(table: Table) -> Card:
    """The table's card, with all that is read of its identity here.

    Raises:
        TableError: It is none, or says less.
    """
    card = table.card()
    assert card is not None
    if missing := sorted(set(_NAMED) - card.identity.keys()):
        raise TableError(
            f"table: {table.uri}: its metadata are damaged (no {missing[0]}); embed it anew"
        )
    return card


def check_columns(table: Table, spec: RunSpec, card: Card) -> pa.Schema:
    """The table's columns: vectors where its card says so, and all that the spec names.

    Raises:
        TableError: Columns of vectors or of pieces are not as the card promises.
        SpecError: The table has no column of that name.
    """
    try:
        schema = table.schema()
    except (pa.ArrowException, OSError) as e:
        raise TableError(f"table: {table.uri}: cannot read its parts: {reason(e)}") from None
    if not schema.names:
        return schema
    if card.identity["preprocess.pieces_are_rows"] and PARENT_ID not in schema.names:
        raise TableError(f"table: {table.uri}: its metadata are damaged: no pieces; embed it anew")
    for column in card.pooled:
        type_ = schema.field(column).type if column in schema.names else pa.null()
        if not _holds_vectors(type_, card, column):
            raise TableError(
                f"table: {table.uri}: its column {column} does not hold the vectors that its "
                "metadata promise; embed it anew"
            )
    for field in ("label", "split", "caption"):
        column = getattr(spec.source, field)
        if column is not None and column not in schema.names:
            has = ", ".join(name[:80] for name in schema.names[:20])
            raise SpecError(f"source.{field}: no column {column[:80]!r} in the table; it has {has}")
    return schema


def _holds_vectors(type_: pa.DataType, card: Card, column: str) -> bool:
    """Whether numbers of one length come in this type, and with ranges where they need some."""
    if not pa.types.is_fixed_size_list(type_) or not type_.list_size:
        return False
    if type_.value_type not in [precision.arrow for precision in PRECISIONS.values()]:
        return False
    precision = PRECISIONS[card.outputs[column].precision]
    lengths = [precision.stored_dim(len(ends)) for ends in card.ranges.get(column, ())]
    return not precision.needs_ranges or lengths == [type_.list_size] * 2


def read_sample(
    table: Table, schema: pa.Schema, spec: RunSpec, card: Card, source: SourceSpec | None
) -> TableSample:
    """Read at most `probes.MAX_ROWS` rows in a task: with a label, where one is named.

    Args:
        table: Where.
        schema: Its columns.
        spec: Names the columns.
        card: The table's.
        source: To read the inputs from again where the table does not hold them, or None.

    Raises:
        TableError: These rows are not as a run writes them.
    """
    by_piece = card.identity["preprocess.pieces_are_rows"]
    text = spec.source.input
    has_texts = card.modality == "text" and text in schema.names
    has_texts = has_texts and pa.types.is_string(schema.field(text).type)
    named = [spec.source.label, spec.source.split, spec.source.caption, text if has_texts else None]
    columns = [column for column in named if column]
    columns += [PARENT_ID, PIECE_START, PIECE_STOP] if by_piece else []
    keeps_text = PIECE_TEXT in schema.names and pa.types.is_string(schema.field(PIECE_TEXT).type)
    columns += [PIECE_TEXT] if keeps_text else []
    columns += card.pooled
    rows, num_unlabelled = ray.get(
        ray.remote(num_cpus=1)(sample).remote(
            table.uri, columns, probes.MAX_ROWS, spec.source.label
        )
    )
    check_rows(table, rows, card.pooled)
    texts, cheap, missing = None, None, None
    if keeps_text:
        texts = rows[PIECE_TEXT].to_pylist()
    elif has_texts:
        texts = rows[text].to_pylist()
        texts = cut_inputs(texts, rows) if by_piece else texts
    elif card.is_imported:
        missing = "nobody knows of what these vectors are: no column of texts"
    elif source is None:
        missing = NO_SOURCE
    else:
        texts, cheap, missing = fetch_inputs(source, card, rows)
    vectors = {column: to_floats(rows, column, card) for column in card.pooled}
    return TableSample(rows, vectors, texts, cheap, missing, num_unlabelled)


def check_rows(table: Table, rows: pa.Table, columns: Sequence[str]) -> None:
    """Refuse rows that no run has written: parts are files, which anybody may have made.

    Args:
        table: Whose.
        rows: Read from it.
        columns: Those of vectors.

    Raises:
        TableError: Texts that are no UTF-8, hashes that are none, rows without id or vector.
    """
    try:
        rows.validate(full=True)
        is_hash = pc.match_substring_regex(rows["content_hash"], "^[0-9a-f]{32}$")
        whole = pc.all(is_hash).as_py() is not False and not rows["row_id"].null_count
        for column in columns:
            values = rows[column].combine_chunks()
            whole &= not values.null_count and not values.flatten().null_count
        keys_of(rows["row_id"].to_pylist())
    except (pa.ArrowException, AttributeError, TypeError, KeyError) as e:
        raise TableError(f"table: {table.uri}: its rows are damaged: {reason(e)}") from None
    if not whole:
        raise TableError(
            f"table: {table.uri}: its rows are damaged: an id, a content hash or a vector is none"
        )


def to_floats(rows: pa.Table, column: str, card: Card) -> Floats:
    """A column's vectors as numbers, shape (rows, dim), float32 whatever they are stored in."""
    dim = rows.schema.field(column).type.list_size
    flat = rows[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    precision = card.outputs[column].precision
    return dequantize(flat.reshape(-1, dim), column, precision, ranges_from_lists(card.ranges))
