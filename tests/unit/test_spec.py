from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fmembed.errors import SpecError
from fmembed.redaction import redact
from fmembed.spec import RunSpec
from fmembed.table.card import fingerprint

GOOD: dict[str, Any] = {"source": {"uri": "a"}, "model": {"id": "b"}, "output": {"uri": "c"}}


def test_short_config_is_enough() -> None:
    spec = RunSpec.parse(GOOD)
    assert spec.source.input == "text"
    assert spec.probes == ("health", "knn", "linear", "clustering")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": {"uri": "a", "inptu": "x"}}, "source.inptu: unknown key; did you mean input?"),
        ({"modle": {}}, "modle: unknown key; did you mean model?"),
        # A field of another part.
        (
            {"preprocess": {"max_tokens": 9}},
            "preprocess.max_tokens: unknown key; did you mean model.max_tokens?",
        ),
        ({"batch_tokens": 9}, "batch_tokens: unknown key; did you mean compute.batch_tokens?"),
        (
            {"output": {"uri": "c", "id": "k"}},
            "output.id: unknown key; did you mean source.id or model.id?",
        ),
        (
            {"compute": {"max-tokens": 9}},
            "compute.max-tokens: unknown key; did you mean model.max_tokens?",
        ),
        ({"foo": 1}, "foo: unknown key; it takes cluster, compute, gate, model,"),
        ({"model": {}}, "model.id: missing"),
        ({"compute": {"actors": [3, 1]}}, "compute.actors: takes a number"),
        ({"compute": {"actors": "many"}}, "compute.actors: "),
        ({"compute": {"batch_tokens": 0}}, "compute.batch_tokens: takes a number of at least 1"),
        ({"compute": {"window_rows": 0}}, "compute.window_rows: takes a number of at least 1"),
        (
            {"compute": {"gpus_per_actor": -1}},
            "compute.gpus_per_actor: takes a number",
        ),
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


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
CONFIGS = {
    "laughs": (LAUGHS, "unfolds to more than 100,000 values"),
    "merged": (LAUGHS.replace("[x", "{x: [x").replace("x]", "x]}").replace("[*", "<<: [*"), ""),
    "cycle": ("source: &a [*a]", "an alias stands inside of what it names"),
    "deep": ("[" * 300_000, "nested too deeply"),
    "deep blocks": ("- " * 300_000, "nested too deeply"),
    "digits": ("source: 1" + ":1" * 100_000, "a number of 200,001 characters"),
    "flat": ("[" + "a," * 150_000 + "]", "holds more than 100,000 values"),
    "huge": ("source: " + "x" * 2**20, "takes at most 1,048,576 bytes"),
    "no date": ("source: 2001-99-99", "a date or a number that is none"),
    "binary": ("source: a\0b", "not valid YAML"),
}


@pytest.mark.parametrize("case", list(CONFIGS))
def test_configs_that_unfold(case: str, tmp_path: Path) -> None:
    text, message = CONFIGS[case]
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as e:
        RunSpec.from_yaml(str(path))
    assert str(e.value).startswith(f"config {path}")
    assert message in str(e.value)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 500


def test_what_a_config_says_is_quoted_in_part() -> None:
    given = {"source.uri": "a", "model.id": "b", "output.uri": "c"}
    for field in ("compute.actors", "compute." + "x" * 100_000):
        for value in ("y" * 100_000, [["y"] * 1000] * 1000, {"y" * 100_000: 1}):
            with pytest.raises(SpecError) as e:
                RunSpec.from_yaml(None, {**given, field: value})
            assert len(str(e.value)) < 1500
