"""A table as a model that mteb evaluates: vectors that are stored, and none made twice.

    import mteb
    from fmembed.mteb import TableEncoder

    tasks = mteb.get_tasks(["Banking77Classification"])
    results = mteb.evaluate(TableEncoder("out/articles"), tasks)

Texts are looked up by their content: the table may hold the rows of many tasks, in any order. The
extra `mteb`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fmembed.arrays import Floats
from fmembed.errors import SpecError, TableError
from fmembed.rows.columns import CONTENT_HASH
from fmembed.rows.precision import dequantize, ranges_from_lists
from fmembed.spec import RunSpec
from fmembed.table.card import Card
from fmembed.table.table import Table

try:
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta
except ImportError as e:
    raise ImportError("fmembed.mteb needs the extra: pip install 'fmembed[mteb]'") from e


class TableEncoder(AbsEncoder):
    """Gives mteb the vectors of a version of a table."""

    def __init__(
        self,
        table: str | Path,
        *,
        column: str | None = None,
        version: int | None = None,
        config: str | Path | None = None,
    ) -> None:
        """Open the table.

        Args:
            table: Where; of texts, each with a vector.
            column: Of the vectors; the first, if none.
            version: Which; the newest, if none.
            config: The YAML that made it, checked by its fingerprint: its model embeds, in this
                process, the texts that the table does not hold. Without one they are refused.

        Raises:
            TableError: No table there, or not one of texts; or chunks of texts.
            SpecError: No such column, or a config of another model or setting.
        """
        self._table = Table.open(table)
        card = self._table.card()
        assert card is not None
        if card.modality != "text" or card.identity["preprocess.pieces_are_rows"]:
            raise TableError(f"table: {self._table.uri} does not hold a vector for each text")
        self._column = column or next(iter(card.pooled), "")
        if self._column not in card.pooled:
            have = ", ".join(card.pooled) or "none"
            raise SpecError(f"column: {self._column!r} holds no vectors of rows; there is {have}")
        self._version = self._table.version() if version is None else version
        if self._version is not None:
            self._table.check_version(self._version)
        self._model = None if config is None else _model_of(self._table, config)
        self._card: Card = card
        #: Texts that were looked up, and those of them that were embedded anew.
        self.num_found = self.num_embedded = 0
        name = str(card.spec.get("model", {}).get("id", "imported")).strip("/").split("/")[-2:]
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={"name": "/".join(["fmembed", *name][-2:]), "revision": card.fingerprint}
        )

    def encode(self, inputs: Iterable[Any], *, prompt_type: Any = None, **_: Any) -> Floats:
        """Look texts up.

        Args:
            inputs: Batches with a list of texts each, `text`.
            prompt_type: Is not looked at: the table's vectors were made with its own prompt.

        Returns:
            Shape (texts, dim), float32.

        Raises:
            TableError: A text is not in the table, and no config was given.
        """
        texts: list[str] = []
        for batch in inputs:
            if "text" not in batch:
                raise TableError(
                    f"table: mteb asks for {', '.join(batch)}; a table gives texts only"
                )
            texts += batch["text"]
        hashes = [hashlib.blake2b(t.encode(), digest_size=16).hexdigest() for t in texts]
        found = self._look_up(set(hashes))
        missing = list(
            dict.fromkeys(t for t, h in zip(texts, hashes, strict=True) if h not in found)
        )
        if missing:
            for text, vector in zip(missing, self._embed(missing, len(texts)), strict=True):
                found[hashlib.blake2b(text.encode(), digest_size=16).hexdigest()] = vector
        self.num_found += len(texts)
        self.num_embedded += len(missing)
        return np.stack([found[h] for h in hashes])

    def _look_up(self, hashes: set[str]) -> dict[str, Floats]:
        """Vectors by content; a part in memory at a time."""
        wanted, found = pa.array(sorted(hashes)), dict[str, Floats]()
        for part in self._table.rows.parts(self._version):
            own = self._table.read_part(part, [CONTENT_HASH])[CONTENT_HASH]
            is_wanted = pc.is_in(own, value_set=wanted)
            if not pc.any(is_wanted).as_py():
                continue
            rows = self._table.read_part(part, [CONTENT_HASH, self._column]).filter(is_wanted)
            column = rows[self._column].combine_chunks()
            flat = column.flatten().to_numpy(zero_copy_only=False)
            vectors = dequantize(
                flat.reshape(len(column), -1), self._column,
                self._card.outputs[self._column].precision, ranges_from_lists(self._card.ranges),
            )  # fmt: skip
            found.update(zip(rows[CONTENT_HASH].to_pylist(), vectors, strict=True))
        return found

    def _embed(self, texts: Sequence[str], num_asked: int) -> Floats:
        if self._model is None:
            raise TableError(
                f"table: {len(texts):,} of {num_asked:,} texts are not in {self._table.uri}, as "
                f"{texts[0][:60]!r}; embed them into it, or give config= to have them embedded here"
            )
        from fmembed.encoding import encode

        found: Floats = np.asarray(encode(list(texts), model=self._model), dtype=np.float32)
        return found


def _model_of(table: Table, config: str | Path) -> Any:
    """The model of the config that made a table.

    Raises:
        SpecError: Another one did.
    """
    from fmembed.evaluate.probing import check_made_by

    spec = RunSpec.from_yaml(str(config))
    check_made_by(table, spec)
    return spec.model
