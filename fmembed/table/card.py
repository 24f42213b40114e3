"""What a table says of itself: one card, in its logs' metadata and in each part's footer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from fmembed.errors import TableError
from fmembed.spec import Modality, Precision


def fingerprint(identity: dict[str, Any]) -> str:
    """Hash what decides a vector: blake2b-128 over the identity's canonical JSON, as hex.

    The identity is the *resolved* model and preprocessing (weights digest, pooling, truncation,
    dtype, ...), not the config's text: the same weights under another path are the same model,
    and a default written out is still the default.
    """
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


# Before each name of ours among the metadata of a log, a commit or a part.
PREFIX = "fmembed."
TABLE, FINGERPRINT = f"{PREFIX}table", f"{PREFIX}fingerprint"
_OUTPUTS = f"{PREFIX}outputs"
# In the identity of vectors that nobody here has made.
IMPORTED = "imported"
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
        if FINGERPRINT not in configuration:
            return None
        if _OUTPUTS not in configuration:
            raise TableError(f"table: {uri} was made by an earlier version; embed it anew")
        names = [n for n in cls.model_fields if f"{PREFIX}{n}" in configuration]
        try:
            raw = {n: _load(n, configuration[f"{PREFIX}{n}"]) for n in names}
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
        return {f"{PREFIX}{n}": v if n in _PLAIN else json.dumps(v) for n, v in raw.items()}

    @property
    def settings(self) -> str:
        """How its model was used, in a few words: what tells tables of one model apart."""
        identity, output = self.identity, next(iter(self.outputs.values()))
        said = [output.pooling]
        if (chunk := identity.get("preprocess.chunk_tokens")) is not None:
            shared = identity.get("preprocess.chunk_overlap")
            said.append(f"chunks of {chunk} tokens" + (f", {shared} shared" if shared else ""))
        elif self.modality == "text" and identity.get("model.max_tokens"):
            said.append(f"{identity['model.max_tokens']} tokens")
        if identity.get("model.prompt"):
            said.append(f"prompt {str(identity['model.prompt'])[:40]!r}")
        if output.dims is not None:
            said.append(f"{output.dims} dimensions")
        return ", ".join([*said, str(identity.get("model.dtype", "?"))])

    @property
    def is_imported(self) -> bool:
        """Whether its vectors were made elsewhere."""
        return IMPORTED in self.identity

    @property
    def pooled(self) -> list[str]:
        """The columns that hold one vector a row."""
        return [c for c, output in self.outputs.items() if output.pooling != "tokens"]


def _load(name: str, text: str) -> Any:
    return text if name in _PLAIN else json.loads(text)
