"""The client against a real server on loopback, with every fault that servers have."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fake_endpoint import DIM, NAN, REFUSED, Server, serve, vector_of

from fmembed.errors import FmembedError, ModelError, SpecError
from fmembed.evaluate.facts import cost_usd
from fmembed.model.server import Endpoint
from fmembed.spec import EndpointSpec, RunSpec

TEXTS = [f"text number {i}" for i in range(40)]
CANARY = "sk-canary-1f2e3d4c"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    with serve() as running:
        yield running


def make(server: Server, **options: Any) -> Endpoint:
    defaults: dict[str, Any] = {"batch_rows": 8, "concurrency": 2, "timeout_s": 20}
    return Endpoint(EndpointSpec(base_url=server.url, **{**defaults, **options}), "m")


def assert_exact(vectors: list[Any], texts: list[str]) -> None:
    np.testing.assert_array_equal(np.stack(vectors), [vector_of(t) for t in texts])


def test_vectors_in_order_tokens_counted(server: Server) -> None:
    endpoint = make(server)
    vectors, causes = endpoint.embed(TEXTS)
    assert_exact(vectors, TEXTS)
    assert causes == {}
    num_tokens = sum(map(len, TEXTS))
    assert +endpoint.counts == {"endpoint_tokens": num_tokens, "endpoint_requests": 5}
    assert server.authorizations == {f"Bearer {CANARY}"}


@pytest.mark.parametrize(
    "fault",
    [429, 500, 503, "drop", "reordered", "short", "twice", "out of range", "no numbers",
     "no JSON", "another length"],
)  # fmt: skip
def test_a_fault_changes_no_vector(server: Server, fault: Any) -> None:
    endpoint = make(server)
    endpoint.check()
    server.faults = [None, fault]
    vectors, causes = endpoint.embed(TEXTS)
    assert_exact(vectors, TEXTS)
    assert causes == {}
    assert endpoint.counts["endpoint_retries"] == (0 if fault == "reordered" else 1)


def test_a_server_that_hangs_is_asked_again(server: Server) -> None:
    server.faults = ["hang"]
    vectors, causes = make(server, timeout_s=0.5).embed(TEXTS)
    assert_exact(vectors, TEXTS)
    assert causes == {}


def test_concurrency_is_used_and_bounded(server: Server) -> None:
    # Nobody is answered before three are there; a fourth at once would be counted.
    server.hold = threading.Barrier(3)
    make(server, concurrency=3, batch_rows=1).embed(TEXTS[:30])
    assert server.num_most == 3


def test_a_refused_text_is_found_alone(server: Server) -> None:
    texts = [*TEXTS[:5], f"please {REFUSED}", *TEXTS[5:20], f"and {NAN}", *TEXTS[20:]]
    vectors, causes = make(server).embed(texts)
    assert causes.keys() == {5, 21}
    assert causes[5] == ("refused by the server", "Error code: 400 - a text is not allowed")
    assert causes[21][0] == "not finite"
    good = [i for i in range(len(texts)) if i not in causes]
    assert_exact([vectors[i] for i in good], [texts[i] for i in good])


def test_answers_that_stay_short_cost_only_their_own_row(server: Server) -> None:
    server.faults = ["short"] * 3
    endpoint = make(server, batch_rows=40, concurrency=1)
    vectors, causes = endpoint.embed(TEXTS)
    assert_exact(vectors, TEXTS)
    assert causes == {}
    server.faults = ["no numbers"] * 3
    _, causes = endpoint.embed(TEXTS[:1])
    assert causes == {0: ("no answer", "the server gives no usable vector for it")}


def test_what_is_no_row_s_fault_ends_the_run(server: Server) -> None:
    server.faults = [500] * 99
    with pytest.raises(FmembedError, match=r"answered 500 in 3 tries.*the same command resumes"):
        make(server, max_retries=2).embed(TEXTS)


@pytest.mark.parametrize(
    ("status", "says"), [(401, "OPENAI_API_KEY"), (403, "refuses the key"), (404, "knows no model")]
)
def test_check_names_what_to_mend(server: Server, status: int, says: str) -> None:
    server.faults = [status]
    with pytest.raises(ModelError, match=says):
        make(server).check()


def test_check_finds_the_dimension(server: Server) -> None:
    assert make(server).check() == DIM
    assert make(server, dimensions=5).check() == 5


def test_nobody_listens() -> None:
    spec = EndpointSpec(base_url="http://127.0.0.1:9/v1", max_retries=0)
    with pytest.raises(ModelError, match="did not answer in 1 tries"):
        Endpoint(spec, "m").check()


def test_the_key_is_nowhere(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server.faults = [500, 401]
    with pytest.raises(ModelError) as error:
        make(server).check()
    assert caplog.records
    assert CANARY not in caplog.text
    assert CANARY not in str(error.value)
    assert CANARY not in repr(make(server)._spec)


@pytest.mark.parametrize(
    ("endpoint", "says"),
    [
        ({"base_ur": "http://x/v1"}, "model.endpoint.base_ur: unknown key; did you mean base_url?"),
        ({"base_url": "ftp://x"}, "model.endpoint.base_url"),
        ({"base_url": "https://user:pw@x/v1"}, "model.endpoint.base_url"),
        ({"base_url": "http://x/v1", "api_key_env": "sk-abc def"}, "model.endpoint.api_key_env"),
    ],
)
def test_wrong_fields_are_named(endpoint: dict[str, Any], says: str) -> None:
    raw = {"source": {"uri": "x"}, "output": {"uri": "y"}, "model": {"id": "m"}}
    raw["model"] = {"id": "m", "endpoint": endpoint}
    with pytest.raises(SpecError) as error:
        RunSpec.parse(raw)
    assert says in str(error.value)


def test_cost() -> None:
    priced = EndpointSpec(base_url="http://x/v1", usd_per_million_tokens=0.02)
    assert cost_usd(priced, 5_000_000) == pytest.approx(0.1)
    assert cost_usd(EndpointSpec(base_url="http://x/v1"), 5) is None
