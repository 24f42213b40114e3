"""How Ray is joined and started: what is said of it."""

from __future__ import annotations

import contextlib
import os
import socket

import pytest

from fmembed.errors import FmembedError, SpecError
from fmembed.run import cluster
from fmembed.run.cluster import _without_log_level
from fmembed.startup import check_address


def test_a_cluster_that_does_not_answer_is_told_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(FmembedError, match=rf"^RAY_ADDRESS: no Ray cluster answers at {address} "):
        check_address(address)
    with pytest.raises(FmembedError, match=r"answers at x:70000 "):
        check_address("x:70000")


@pytest.mark.parametrize("address", ["auto", "ray://127.0.0.1:1", "", "localhost"])
def test_what_is_no_host_and_port_is_left_to_ray(address: str) -> None:
    check_address(address)


def test_the_address_of_a_dashboard_is_told() -> None:
    """As it is set for `ray job submit`, which many have in their shell."""
    with pytest.raises(SpecError, match=r"^RAY_ADDRESS: http://head:8265 is a dashboard's, .*6379"):
        check_address("http://head:8265")


def test_one_that_answers_passes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_address(f"127.0.0.1:{server.getsockname()[1]}")


def test_only_the_line_on_the_log_level_is_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    said = b"before\n[I 1] Set ray log level from environment variable X to 3\nafter"

    def say_and_fail() -> None:
        with _without_log_level():
            os.write(2, said)
            raise RuntimeError

    with _without_log_level():
        os.write(2, said)
    assert capfd.readouterr().err == "before\nafter"
    with pytest.raises(RuntimeError):
        say_and_fail()
    assert capfd.readouterr().err == "before\nafter"
    os.write(2, b"as ever")
    assert capfd.readouterr().err == "as ever"


@pytest.mark.parametrize("num_failures", [1, 2])
def test_a_slow_start_is_tried_once_more_and_then_told(
    num_failures: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tries: list[bool | None] = []

    def start(verbose: bool, **_: object) -> None:
        tries.append(verbose)
        if tries.count(verbose) <= num_failures:
            raise TimeoutError("the raylet did not answer")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.own_node, "start", start)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    # Of the tests beside this one in its process.
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: tries.append(None))
    monkeypatch.setattr(cluster, "_without_log_level", contextlib.nullcontext)
    if num_failures == 1:
        assert cluster.connect(verbose=False)
    else:
        with pytest.raises(
            FmembedError, match=r"Ray could not be started on this machine: .*raylet"
        ):
            cluster.connect(verbose=False)
    assert tries == [False, None, False]
    assert "Ray did not start (" in (told := capsys.readouterr().err)
    assert "the raylet did not answer" in told
