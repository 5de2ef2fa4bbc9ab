"""What the worker shells share: their loop, their device, and errors that survive the way home.

Imports no torch by itself: workers that only pretend to compute are light because of it.
"""

import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from rlgen.actors.coordinator import Stop
from rlgen.actors.heartbeat import start_beating
from rlgen.errors import RlgenError

if TYPE_CHECKING:
    import torch

_BRIEF = 160


def work_until_stopped(
    coordinator: Any,
    name: str,
    *,
    fetch: Any,
    work: Callable[[Any], Any],
    kind: type[RlgenError],
) -> None:
    """Give signs of life, fetch work, do it, and hand the result in with the next request.

    Args:
        coordinator: hears the signs of life, and of the error that ends this worker.
        name: of the worker, as the coordinator knows it.
        fetch: the coordinator's method that takes a result or None and gives work, None (ask
            again) or Stop.
        work: from what was fetched to the result.
        kind: of an error that is not meant for people.
    """
    start_beating(coordinator, name)
    done = None
    while not isinstance(item := ray.get(fetch.remote(name, done)), Stop):
        done = None
        if item is None:
            continue
        try:
            done = work(item)
        except RayError:
            raise  # a process, node or object was lost: whoever watches this worker decides
        except Exception as error:
            ray.get(coordinator.fail.remote(explained(error, kind, name)))
            return


def actor_device(num_gpus: float) -> "torch.device":
    """The GPU that Ray gave this actor, or the CPU."""
    import torch

    return torch.device("cuda" if num_gpus > 0 else "cpu")


def brief(error: BaseException) -> str:
    """The first line of Ray's long reports, or the last one of a traceback, for our messages."""
    lines = str(error).strip().split("\n")
    told = lines[-1 if lines[0].startswith("Traceback") else 0]
    return told if len(told) <= _BRIEF else f"{told[:_BRIEF]}..."


def explained(error: Exception, kind: type[RlgenError], worker: str) -> RlgenError:
    """The error itself if it is meant for people, else one that carries the traceback."""
    if isinstance(error, RlgenError):
        return error
    return kind(f"{worker} failed: {traceback.format_exc()}")
