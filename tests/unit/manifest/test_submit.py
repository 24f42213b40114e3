"""The CronJob's pod: one RayJob for each Job, whatever becomes of the pod, and its end told."""

from __future__ import annotations

import datetime
import http.server
import ipaddress
import json
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from manifests import written

from fmembed.errors import FmembedError
from fmembed.manifest import submit as module
from fmembed.manifest.submit import Owner, main, submit

JOB: dict[str, Any] = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {"name": "articles", "namespace": "embeddings"},
    "spec": {},
}
OWNER = Owner("articles-29000000", "uid-1")


class Api:
    """An API server with RayJobs, of which each is said to be as `states` has it, in turn."""

    def __init__(self, *states: dict[str, Any]) -> None:
        self.states, self.jobs, self.asked = list(states), {}, 0
        self.trouble: list[tuple[int, dict[str, Any]] | Exception] = []

    def __call__(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> tuple[int, dict[str, Any]]:
        self.asked += 1
        if self.trouble:
            trouble = self.trouble.pop(0)
            if isinstance(trouble, Exception):
                raise trouble
            return trouble
        assert path.startswith("/apis/ray.io/v1/namespaces/embeddings/rayjobs")
        if method == "POST":
            assert body is not None
            name = body["metadata"]["name"]
            if name in self.jobs:
                return 409, {"message": "already exists"}
            self.jobs[name] = body
            return 201, body
        name = path.rpartition("/")[2]
        if name not in self.jobs:
            return 404, {"message": "not found"}
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return 200, {**self.jobs[name], "status": state}


def run(api: Api) -> tuple[int, float]:
    waited: list[float] = []
    return submit(JOB, OWNER, api, waited.append), sum(waited)


DONE = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}


def test_it_waits_for_the_end() -> None:
    api = Api({}, {"jobDeploymentStatus": "Initializing"}, {"jobDeploymentStatus": "Running"}, DONE)
    assert run(api) == (0, 30.0)
    (job,) = api.jobs.values()
    assert job["metadata"]["name"] == OWNER.name
    (owner,) = job["metadata"]["ownerReferences"]
    assert owner == {
        "apiVersion": "batch/v1", "kind": "Job", "name": OWNER.name, "uid": OWNER.uid
    }  # fmt: skip


def test_a_pod_in_anothers_place_finds_the_job_that_is_there() -> None:
    api = Api(DONE)
    api.jobs[OWNER.name] = JOB
    assert run(api) == (0, 0.0)
    assert api.jobs == {OWNER.name: JOB}


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded"}, 1),
        ({"jobDeploymentStatus": "ValidationFailed", "message": "name too long"}, 1),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, 1),
        (
            {
                "jobDeploymentStatus": "Failed",
                "jobStatus": "FAILED",
                "message": "Job entrypoint command failed with exit code 3, last available logs",
            },
            3,
        ),
        # Kubernetes would take these for a pod that was killed, and start another.
        ({"jobDeploymentStatus": "Failed", "message": "failed with exit code 143"}, 1),
        ({"jobDeploymentStatus": "Failed", "message": "failed with exit code 0"}, 1),
    ],
)
def test_it_ends_as_the_job_has_ended(
    status: dict[str, Any], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(Api(status))[0] == code
    said = capsys.readouterr().err
    assert (status.get("reason") or status.get("message") or "failed") in said


def test_a_server_that_is_away_is_waited_for_and_one_that_refuses_is_not() -> None:
    api = Api(DONE)
    api.trouble = [OSError("refused"), (503, {}), (401, {}), (429, {})]
    assert run(api) == (0, 40.0)
    api = Api(DONE)
    api.trouble = [(403, {"message": "forbidden"})]
    with pytest.raises(FmembedError, match="rayjob articles-29000000: refused: 403 forbidden"):
        run(api)
    api.trouble = [OSError("no route")] * 1000
    with pytest.raises(FmembedError, match="the API server: 503 OSError, for 900 s"):
        run(api)


def test_a_job_that_is_taken_away_is_told() -> None:
    api = Api({"jobDeploymentStatus": "Running"})

    def forget(seconds: float) -> None:
        api.jobs.clear()

    with pytest.raises(FmembedError, match="is gone: 404 not found"):
        submit(JOB, OWNER, api, forget)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """An API server on this machine, over TLS with a CA of its own, as a pod finds it."""
    seen: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            seen.append((self.command, self.path, self.headers["Authorization"], body))
            told = json.dumps({"status": DONE}).encode()
            self.send_response(201 if self.command == "POST" else 200)
            self.send_header("Content-Length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

        do_GET = do_POST = answer

        def log_message(self, *_: Any) -> None:
            pass

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    (tmp_path / "ca.crt").write_bytes(pem)
    (tmp_path / "token").write_text("a-token\n")
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (tmp_path / "server.pem").write_bytes(pem + private)
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(module, "_ACCOUNT", tmp_path)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.server_address[1]))
    monkeypatch.setenv("JOB_NAME", OWNER.name)
    monkeypatch.setenv("JOB_UID", OWNER.uid)
    yield seen
    server.shutdown()
    thread.join()
    server.server_close()


def test_in_a_pod_it_asks_as_the_pods_account(cluster: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "rayjob.yaml"
    path.write_text(written("cronjob")[0]["data"]["rayjob.yaml"])
    assert main([str(path)]) == 0
    (made, _, token, body), (asked, at, *_) = cluster
    assert (made, asked, token) == ("POST", "GET", "Bearer a-token")
    assert at == f"/apis/ray.io/v1/namespaces/embeddings/rayjobs/{OWNER.name}"
    assert json.loads(body)["spec"] == written("rayjob")[1]["spec"]


def test_outside_of_a_pod_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("JOB_NAME", raising=False)
    assert main(["rayjob.yaml"]) == 2
    assert "in the pod of a CronJob" in capsys.readouterr().err
