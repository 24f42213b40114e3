"""What a table says of its vectors: kept in the metadata of its log and in the footer of each part.

In every part, so that a log that is lost can be made anew from what is left. It is data of whoever
made the table: checked for its shape here, and never followed to code, a model or a source.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from fmembed.spec import Modality, Precision, TableError

_PREFIX = "fmembed."
# Plain texts; the others are JSON.
_PLAIN = ("table", "fingerprint", "modality")


class StoredOutput(BaseModel):
    """One column of vectors as it was made; the fields are `spec.VectorSpec`'s."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    column: str = ""
    pooling: str
    layer: int | None = None
    normalize: bool
    dims: int | None = None
    precision: Precision


class Card(BaseModel):
    """Whose table, by which model and setting.

    `table` is the table's own random id, `identity` all that decides a vector, `ranges` are those
    of int8 by column: lowest and highest of each dimension. `spec` is the config of the run that
    made the table, without secrets.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    table: str = ""
    fingerprint: str
    identity: dict[str, Any]
    modality: Modality = "text"
    outputs: dict[str, StoredOutput]
    ranges: dict[str, tuple[list[float], list[float]]] = {}
    spec: dict[str, Any]

    @classmethod
    def of(cls, configuration: Mapping[str, str], uri: str) -> Card | None:
        """Read it from a log's metadata or a part's footer; None where there is none.

        Raises:
            TableError: Not as any version of this project writes it.
        """
        if f"{_PREFIX}fingerprint" not in configuration:
            return None
        if f"{_PREFIX}outputs" not in configuration:
            raise TableError(f"table: {uri} was made by an earlier version; embed it anew")
        names = [n for n in cls.model_fields if f"{_PREFIX}{n}" in configuration]
        try:
            raw = {n: _load(n, configuration[f"{_PREFIX}{n}"]) for n in names}
            return cls.model_validate(raw)
        except ValidationError as e:
            field = ".".join(str(key) for key in e.errors(include_url=False)[0]["loc"][:2])[:80]
        except (ValueError, RecursionError):
            field = "one of them is no JSON"
        raise TableError(f"table: {uri}: its metadata are damaged ({field}); embed it anew")

    @field_validator("outputs")
    @classmethod
    def _check_outputs(cls, value: dict[str, StoredOutput]) -> dict[str, StoredOutput]:
        if not value:
            raise ValueError("takes at least one column")
        for column in value:  # it is in the names of files
            if not column.isidentifier():
                raise ValueError("takes names of columns")
        return value

    def to_configuration(self) -> dict[str, str]:
        """As texts by name, for a log's metadata and a part's footer."""
        raw = self.model_dump(mode="json")
        return {f"{_PREFIX}{n}": v if n in _PLAIN else json.dumps(v) for n, v in raw.items()}

    @property
    def pooled(self) -> list[str]:
        """The columns that hold one vector a row."""
        return [c for c, output in self.outputs.items() if output.pooling != "tokens"]


def _load(name: str, text: str) -> Any:
    return text if name in _PLAIN else json.loads(text)
