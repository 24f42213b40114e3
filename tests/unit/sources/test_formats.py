"""Each format that the config names has its contract, and each contract is whole."""

from __future__ import annotations

from typing import get_args

import pytest

from fmembed.sources.formats.registry import FORMATS
from fmembed.spec import Format


def test_the_config_names_the_formats_that_there_are() -> None:
    assert {*FORMATS, "auto"} == set(get_args(Format))


@pytest.mark.parametrize("name", FORMATS)
def test_a_contract_is_whole(name: str) -> None:
    format_ = FORMATS[name]
    assert format_.name == name
    # Listed by us and told by suffixes, or opened by a library.
    assert (format_.schema is None) == (format_.open is not None) == (not format_.suffixes)
    for suffix in format_.suffixes:
        assert suffix.startswith(".")
        assert suffix == suffix.lower()


def test_a_suffix_belongs_to_one_format() -> None:
    suffixes = [s for format_ in FORMATS.values() for s in format_.suffixes]
    assert len(set(suffixes)) == len(suffixes)
