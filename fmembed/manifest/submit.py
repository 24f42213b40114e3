"""What the CronJob's pod runs: make the RayJob, wait for its end, and end as it has ended.

`python -m fmembed.manifest.submit rayjob.yaml`, in a pod whose account may create and get RayJobs.
Exit code: 0 where the job has succeeded; else the driver's own, where the RayJob's message names
it; else 1.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import ssl
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmembed import terminal
from fmembed.config_file import MAX_CONFIG_BYTES, read_yaml
from fmembed.errors import FmembedError, SpecError

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
# Where a RayJob stays. SUCCEEDED is what its job says; Complete only that it has ended.
_ENDED = ("Complete", "Failed", "ValidationFailed")
_POLL_S = 10.0
_NEEDED = {"JOB_NAME", "JOB_UID", "KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"}
# Whoever does not answer for so long is not going to: an upgrade of the control plane takes less.
_PATIENCE_S = 900.0

Request = Callable[[str, str, dict[str, Any] | None], tuple[int, dict[str, Any]]]


@dataclass(frozen=True)
class Owner:
    """The Job that the pod belongs to: the RayJob has its name, and goes when it goes."""

    name: str
    uid: str


def submit(
    job: dict[str, Any], owner: Owner, request: Request, wait: Callable[[float], None] = time.sleep
) -> int:
    """Make a RayJob, or find the one that an earlier pod of this Job has made, and wait for it.

    Args:
        job: The RayJob's document.
        owner: Whose it is.
        request: Asks the API server: method, path and body to status and answer.
        wait: For so many seconds.

    Returns:
        The exit code.

    Raises:
        FmembedError: It was refused, is gone, or nobody answered for 15 minutes.
    """
    metadata = {**job["metadata"], "name": owner.name}
    reference = {"apiVersion": "batch/v1", "kind": "Job", "name": owner.name, "uid": owner.uid}
    metadata["ownerReferences"] = [reference]
    path = f"/apis/ray.io/v1/namespaces/{metadata['namespace']}/rayjobs"
    status, answer = _insist(request, wait, "POST", path, {**job, "metadata": metadata})
    if status not in (200, 201, 409):  # 409: it is there already
        raise FmembedError(f"rayjob {owner.name}: refused: {_message(status, answer)}")
    terminal.say(f"rayjob {owner.name}: {'found' if status == 409 else 'made'}; waiting for it")
    while True:
        status, answer = _insist(request, wait, "GET", f"{path}/{owner.name}", None)
        if status != 200:
            raise FmembedError(f"rayjob {owner.name}: is gone: {_message(status, answer)}")
        found = answer.get("status") or {}
        if found.get("jobDeploymentStatus") in _ENDED:
            return _end(owner.name, found)
        wait(_POLL_S)


def _end(name: str, status: dict[str, Any]) -> int:
    said = " ".join(str(status.get("message") or status.get("reason") or "").split())[:2000]
    if status.get("jobStatus") == "SUCCEEDED":
        terminal.say(f"rayjob {name}: succeeded")
        return 0
    terminal.say(f"rayjob {name}: {status.get('reason') or 'failed'}: {said}")
    code = re.search(r"exit code (\d{1,3})\b", said)
    # Kubernetes would take 0 for a success, and 137 and 143 for a pod that was killed.
    return int(code[1]) if code and int(code[1]) not in (0, 137, 143) else 1


def _insist(
    request: Request,
    wait: Callable[[float], None],
    method: str,
    path: str,
    body: dict[str, Any] | None,
) -> tuple[int, dict[str, Any]]:
    """Ask until somebody answers who can."""
    waited = 0.0
    while True:
        try:
            status, answer = request(method, path, body)
        except (OSError, http.client.HTTPException, ValueError) as e:
            status, answer = 503, {"message": type(e).__name__}
        # 401: the token is a new one each hour, and is read anew.
        if status not in (401, 429) and status < 500:
            return status, answer
        if waited >= _PATIENCE_S:
            raise FmembedError(f"the API server: {_message(status, answer)}, for {waited:.0f} s")
        wait(_POLL_S)
        waited += _POLL_S


def _message(status: int, answer: dict[str, Any]) -> str:
    return f"{status} {str(answer.get('message') or '')[:500]}".strip()


def _in_cluster(method: str, path: str, body: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
    """Ask the API server as the pod's account."""
    context = ssl.create_default_context(cafile=str(_ACCOUNT / "ca.crt"))
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    connection = http.client.HTTPSConnection(host, int(port), timeout=30, context=context)
    token = (_ACCOUNT / "token").read_text(encoding="ascii").strip()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        found = json.loads(response.read() or b"{}")
    finally:
        connection.close()
    return response.status, found if isinstance(found, dict) else {}


def main(arguments: list[str]) -> int:
    """Run it in a pod, and return the exit code."""
    try:
        if len(arguments) != 1 or not os.environ.keys() >= _NEEDED:
            raise SpecError(
                "takes a RayJob's file, in the pod of a CronJob that fmembed manifest has written"
            )
        with open(arguments[0], encoding="utf-8") as file:
            job = read_yaml(file.read(MAX_CONFIG_BYTES + 1), arguments[0])
        return submit(job, Owner(os.environ["JOB_NAME"], os.environ["JOB_UID"]), _in_cluster)
    except FmembedError as e:
        terminal.say(str(e))
        return e.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
