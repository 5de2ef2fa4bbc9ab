"""What the worker shells share: their device, and errors that survive the way to the driver."""

import traceback

import torch

from rlgen.errors import RlgenError


def actor_device(num_gpus: float) -> torch.device:
    """The GPU that Ray gave this actor, or the CPU."""
    return torch.device("cuda" if num_gpus > 0 else "cpu")


def explained(error: Exception, kind: type[RlgenError], worker: str) -> RlgenError:
    """The error itself if it is meant for people, else one that carries the traceback."""
    if isinstance(error, RlgenError):
        return error
    return kind(f"{worker} failed: {traceback.format_exc()}")
