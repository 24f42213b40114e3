"""What Ray raises: a loss that can be gone on from, or an error to explain."""

from __future__ import annotations

import re

import ray
import ray.data
import ray.exceptions
import ray.util.annotations
from ray.data.exceptions import SystemException

from fmembed.errors import (
    FmembedError,
    ModelError,
)

# Ray's own defaults are endless: a row that kills the process which reads or prepares it would
# never fail the run.
MAX_TASK_RETRIES = 3
# So may a model that kills its own. Of a pool of actors Ray is told no bound: it counts lost nodes
# too, and of a node that was killed without notice it took up three retries of a window in four
# seconds, while the head took the node for alive still. `waiting.Watch` keeps this one.
MAX_ACTOR_RESTARTS = 3
_REST = "committed rows stay, the same command resumes; -v shows Ray's own messages"
# What Ray Data (2.60) adds to the message of whatever a task has raised.
_ADVICE = "\nFailed to apply UDF transform after "
_NEVER_RAN = "The actor never ran"
# What the head (2.60) says of an actor whose driver it cannot reach.
_UNREACHED = "all references to the actor were removed"
# A task's process that has died on each try.
TASK_DEATHS = (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError)
# What a lost node, worker or actor looks like from the driver, as against an error of the code.
_LOSSES = (
    *TASK_DEATHS,
    ray.exceptions.RayActorError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
    # What was lost more often than once is made again in other blocks.
    ray.exceptions.StreamingGeneratorReplayInconsistentError,
    ray.exceptions.RpcError,
)


class ModelDiedError(ray.exceptions.ActorDiedError):
    """An actor's process has died too often, and nothing was done in between."""

    def __init__(self, how: str) -> None:
        ray.exceptions.RayActorError.__init__(self, "", how)


def is_loss(error: BaseException) -> bool:
    return isinstance(root_cause(error), _LOSSES)


def root_cause(error: BaseException) -> BaseException:
    """The error at the end of the chain that Ray wrapped around it, or ours before it."""
    # Ray makes its wrapper an instance of what it wraps, with a traceback as its text.
    while isinstance(error, ray.exceptions.RayError) or not isinstance(error, FmembedError):
        cause = getattr(error, "cause", None) or error.__cause__
        # Ray Data names itself as the cause of what it did not raise.
        if not isinstance(cause, BaseException) or isinstance(cause, SystemException):
            break
        error = cause
    return error


def explain_model_death(reason: str) -> FmembedError:
    """What the user should read where the process with the model has died on each try."""
    return FmembedError(
        f"the model's process died {1 + MAX_ACTOR_RESTARTS} times and was given up: {reason}; was "
        "it killed for memory (compute.actors, compute.batch_tokens), or does the model's own code "
        f"end it? {_REST}"
    )


def explain(error: BaseException) -> FmembedError:
    """What the user should read of an error that Ray raised."""
    root = root_cause(error)
    said = str(root)
    if (at := said.find(_ADVICE)) > 0:
        said = said[:at]
    if isinstance(root, FmembedError):
        root.args = (said, *root.args[1:])
        return root
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if isinstance(root, ray.exceptions.ActorDiedError):
        # Ray hands on an error of an actor's constructor as text alone.
        if refused := re.search(r"fmembed\.errors\.ModelError: (.+)", str(root)):
            return ModelError(refused[1])
        if _UNREACHED in said:
            return FmembedError(
                "the run failed: Ray's head does not reach this process and gave its actors up: is "
                "there a firewall between them, or is one started with Ray's tokens and the other "
                f"without (RAY_AUTH_MODE)? {_REST}"
            )
        # Ray adds that it never ran, after why.
        why = [line for line in lines if not line.startswith(_NEVER_RAN)]
        return explain_model_death(why[-1] if why else "no reason known")
    if isinstance(root, TASK_DEATHS):
        return FmembedError(
            f"a process that reads and prepares rows died {1 + MAX_TASK_RETRIES} times on each of "
            "several passes and was given up: was it killed for memory (source.max_text_bytes, "
            f"source.max_media_bytes, preprocess.max_image_px)? {_REST}"
        )
    reason = lines[-1] if lines else type(root).__name__
    return FmembedError(f"the run failed: {type(root).__name__}: {reason}; {_REST}")
