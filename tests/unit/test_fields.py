"""What each field of a config means, where people look it up."""

from __future__ import annotations

import pytest
from conftest import ROOT

from fmembed.errors import SpecError
from fmembed.fields import MEANINGS, describe_fields, lines, markdown
from fmembed.spec import list_fields


def test_every_field_is_described_and_nothing_else() -> None:
    assert set(MEANINGS) == set(list_fields())
    assert [f.name for f in describe_fields()].index("model.id") < [
        f.name for f in describe_fields()
    ].index("model.pooling")


def test_the_reference_has_the_same_table() -> None:
    reference = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    assert "\n".join(markdown()) in reference, "fmembed fields --markdown prints it"


def test_a_part_is_listed_with_defaults_and_choices() -> None:
    assert list(lines("refresh")) == [
        "refresh.on_rejected  (keep; keep, remove)",
        f"    {MEANINGS['refresh.on_rejected']}",
        "refresh.max_removed_fraction  (0.1)",
        f"    {MEANINGS['refresh.max_removed_fraction']}",
    ]
    found = {f.name: f for f in describe_fields()}
    assert found["source.uri"].default == "required"
    assert found["source.max_text_bytes"].default == "64 MiB"
    assert found["probes"].default == "health, knn, linear, clustering"
    assert found["probes"].choices == (
        "health, knn, linear, clustering, zeroshot, crossmodal, fewshot, linear@dinov2, "
        "classification@mteb"
    )
    assert found["compute.actors"].choices == ""  # a number too
    assert [f.name for f in describe_fields("source.csv.quote")] == ["source.csv.quote"]


@pytest.mark.parametrize(
    ("part", "hint"),
    [
        ("modle", "did you mean model"),
        ("source.cvs", "did you mean source.csv"),
        ("x", "there are"),
    ],
)
def test_what_is_no_part_is_told(part: str, hint: str) -> None:
    with pytest.raises(SpecError, match=f"fields: no part or field '{part}'; {hint}"):
        list(describe_fields(part))
