"""What becomes of a process that dies each time."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.data._internal.util
import ray.exceptions

from fmembed.errors import DamagedError, FmembedError, ModelError
from fmembed.run.faults import MAX_TASK_RETRIES, explain, is_loss
from fmembed.run.stages import read
from fmembed.sources.opening import open_source
from fmembed.spec import SourceSpec


@pytest.mark.usefixtures("local_ray")
def test_a_file_that_kills_its_reader_is_tried_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = tmp_path / "tries"

    def die(*_: Any) -> Any:
        """Read as a file does that takes all memory."""
        with tries.open("a") as f:
            f.write("x")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("fmembed.run.stages.read_shard", die)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    source = open_source(SourceSpec(uri=str(tmp_path / "a.jsonl")))
    plan: Any = SimpleNamespace(cpus_per_task=1.0, num_workers=1)
    with pytest.raises(ray.exceptions.RayError) as failed:
        list(read(source, plan).iter_internal_ref_bundles())
    assert is_loss(failed.value), failed.value
    assert len(tries.read_text()) == 1 + MAX_TASK_RETRIES
    message = str(explain(failed.value))
    assert message.startswith("a process that reads and prepares rows died 4 times ")
    assert "source.max_text_bytes" in message


def test_a_driver_that_the_head_does_not_reach_is_no_death_of_the_model() -> None:
    why = (
        "The actor is dead because all references to the actor were removed including lineage ref "
        "count."
    )
    error = ray.exceptions.ActorDiedError()
    ray.exceptions.RayActorError.__init__(error, "", why)
    assert is_loss(error)
    told = str(explain(error))
    assert told.startswith("the run failed: Ray's head does not reach this process")
    assert "RAY_AUTH_MODE" in told
    assert "died" not in told


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ModelError("model.id: m cannot be loaded"), "model.id: m cannot be loaded"),
        (DamagedError("out/t", "cut"), str(DamagedError("out/t", "cut"))),
        (OSError("name"), "the run failed: OSError: name; committed rows stay, the same command "
         "resumes; -v shows Ray's own messages"),
    ],
)  # fmt: skip
def test_what_a_task_raises_is_told_without_what_ray_adds(error: Exception, told: str) -> None:
    annotate = ray.data._internal.util._annotate_exception_with_retry_context
    annotated = annotate(
        error, description="apply UDF transform", attempts=1, max_attempts=1, total_backoff_s=0.0,
        exception_str="",
    )  # fmt: skip
    assert str(annotated) != told
    found = explain(annotated)
    assert str(found) == told
    assert isinstance(found, type(error) if isinstance(error, FmembedError) else FmembedError)
