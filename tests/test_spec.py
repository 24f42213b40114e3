from __future__ import annotations

from typing import Any

import pytest

from fmembed.spec import RunSpec, SpecError, fingerprint, redact

GOOD: dict[str, Any] = {"source": {"uri": "a"}, "model": {"id": "b"}, "output": {"uri": "c"}}


def test_short_config_is_enough() -> None:
    spec = RunSpec.parse(GOOD)
    assert spec.source.input == "text"
    assert spec.probes == ("knn", "linear", "clustering")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": {"uri": "a", "inptu": "x"}}, "source.inptu: unknown key; did you mean input?"),
        ({"modle": {}}, "modle: unknown key; did you mean model?"),
        ({"model": {}}, "model.id: missing"),
        ({"compute": {"actors": [3, 1]}}, "compute.actors: takes a number"),
        ({"compute": {"actors": "many"}}, "compute.actors: "),
        ({"probes": ["knm"]}, "probes.0: "),
        ({"output": {"uri": "c", "commit_every_s": 0}}, "output.commit_every_s: takes a number of"),
        ({"output": {"uri": "c", "commit_every_s": "often"}}, "output.commit_every_s: "),
    ],
)
def test_wrong_fields_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as e:
        RunSpec.parse({**GOOD, **change})
    assert str(e.value).startswith(message)
    assert "\n" not in str(e.value)


def test_flags_lie_over_the_file(tmp_path: Any) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("source: {uri: a, label: x}\nmodel: {id: b}\noutput: {uri: c}\n")
    spec = RunSpec.from_yaml(str(path), {"output.uri": "d"})
    assert (spec.output.uri, spec.source.label) == ("d", "x")
    # A null that is given is null; flags that are not given do not come here.
    assert RunSpec.from_yaml(str(path), {"source.label": None}).source.label is None


def test_a_stored_spec_reads_back() -> None:
    spec = RunSpec.parse({**GOOD, "compute": {"actors": [1, 4]}, "probes": ["knn"]})
    assert RunSpec.parse(spec.stored()) == spec
    assert RunSpec.parse(RunSpec.parse(GOOD).stored()) == RunSpec.parse(GOOD)


def test_fingerprint_is_of_the_content_not_its_order() -> None:
    assert fingerprint({"a": 1, "b": "x"}) == fingerprint({"b": "x", "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_secrets_are_not_stored() -> None:
    assert redact("https://me:pw@host/a?sig=1#x") == "https://host/a"
    spec = RunSpec.parse({**GOOD, "source": {"uri": "https://me:pw@host/a.csv?sig=1"}})
    assert "pw" not in str(spec.stored())
    assert "sig" not in str(spec.stored())
