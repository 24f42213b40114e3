"""A column of vectors, with every choice made."""

from __future__ import annotations

from dataclasses import dataclass

# The column of vectors where the config names none.
DEFAULT = "embedding"


@dataclass(frozen=True)
class Output:
    """One column of vectors, with every choice made; the fields are `spec.VectorSpec`'s."""

    column: str
    pooling: str
    layer: int | None
    normalize: bool
    dims: int | None
    precision: str
