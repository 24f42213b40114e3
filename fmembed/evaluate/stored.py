"""What a table's card says to a probe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fmembed.errors import TableError
from fmembed.rows.precision import Ranges, ranges_from_lists
from fmembed.spec import Modality
from fmembed.table.table import Table

# What is read of an identity.
_NAMED = (
    "model.adapter", "model.dtype", "model.max_tokens", "model.prompt", "model.revision",
    "model.weights", "preprocess.pieces_are_rows",
)  # fmt: skip
DAMAGED = "the record of it is damaged; probe the table again"


@dataclass(frozen=True)
class Stored:
    """What the table's metadata say of its vectors."""

    identity: dict[str, Any]
    outputs: dict[str, dict[str, Any]]
    ranges: Ranges
    modality: Modality

    @classmethod
    def of(cls, table: Table) -> Stored:
        card = table.card()
        assert card is not None
        if missing := sorted(set(_NAMED) - card.identity.keys()):
            raise TableError(
                f"table: {table.uri}: its metadata are damaged (no {missing[0]}); embed it anew"
            )
        outputs = {c: output.model_dump() for c, output in card.outputs.items()}
        return cls(card.identity, outputs, ranges_from_lists(card.ranges), card.modality)

    @property
    def pooled(self) -> list[str]:
        """The columns that hold one vector a row."""
        return [c for c, output in self.outputs.items() if output["pooling"] != "tokens"]
