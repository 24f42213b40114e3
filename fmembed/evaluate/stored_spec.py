"""The spec in a table's metadata: words, whoever wrote them."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from fmembed.errors import SpecError, TableError
from fmembed.spec import ModelSpec, RunSpec, SourceSpec
from fmembed.table.table import Table

# What a stored source may tell a probe: names of the table's own columns.
_COLUMNS = ("input", "id", "label", "split", "caption", "carry")


def stored_spec(
    table: Table, overrides: dict[str, Any]
) -> tuple[RunSpec, SourceSpec | None, ModelSpec | None]:
    """The spec in a table's metadata, with flags over it; anybody may have written it.

    So it is words: it names columns and probes, and is shown. A source or a model that it names is
    never opened.

    Returns:
        The spec; and of source and model what the flags name, None where they do not.

    Raises:
        TableError: It is none.
        SpecError: A flag is wrong, or says more of a source or a model that no flag names.
    """
    card = table.card()
    assert card is not None
    try:
        told = RunSpec.model_validate(card.spec)
    except ValidationError as e:
        # Not the value, which is as long as somebody pleased.
        first = e.errors(include_url=False)[0]
        where = ": ".join([".".join(map(str, first["loc"])) or "spec", first["msg"]])
        raise TableError(
            f"table: {table.uri}: the spec in its metadata is damaged ({where[:200]}); "
            "give --from-config CONFIG"
        ) from None
    raw = told.model_dump(mode="json")
    for part, address in (("source", "source.uri"), ("model", "model.id")):
        if address in overrides:
            raw[part] = {k: v for k, v in raw[part].items() if part == "source" and k in _COLUMNS}
            continue
        columns = [f"source.{c}" for c in _COLUMNS] if part == "source" else []
        for name in overrides:
            if name.split(".")[0] == part and name not in columns:
                raise SpecError(f"{name}: of which {part}? give --{part} too, or --from-config")
    spec = RunSpec.from_yaml(None, {**raw, **overrides})
    source = spec.source if "source.uri" in overrides else None
    return spec, source, spec.model if "model.id" in overrides else None
