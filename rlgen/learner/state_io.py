"""Learner and store state as checkpoint parts.

Owns which files these roles write and how they come back. Tensors travel as torch files that
are only ever loaded with weights_only=True.
"""

import io
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load

from rlgen.errors import CheckpointError
from rlgen.learner.checkpoint import Part, read_part, write_part
from rlgen.learner.learner import Learner
from rlgen.nn.weights import load_state
from rlgen.policies.load import policy_bytes

POLICY = "policy.safetensors"
LEARNER = "learner.pt"
MOMENTS = "moments.pt"


def save_learner(learner: Learner, uri: str) -> list[Part]:
    """Write the policy and the learner's state; the policy file is a base for another run."""
    return [
        write_part(uri, POLICY, policy_bytes(learner.policy, learner.policy_state())),
        write_part(uri, LEARNER, dump_state(learner.state_dict())),
    ]


def restore_learner(learner: Learner, uri: str) -> None:
    """Load what save_learner wrote.

    Raises:
        CheckpointError: not committed, damaged, or of another model or configuration.
    """
    if learner.config.learner.lora is None:  # else the base's file and the adapters make it up
        load_state(learner.policy, load(read_part(uri, POLICY)), uri)
    learner.load_state_dict(parse_state(read_part(uri, LEARNER), uri))


def dump_state(state: Mapping[str, Any]) -> bytes:
    """Tensors and plain values as the bytes of a torch file."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def parse_state(payload: bytes, source: str) -> dict[str, Any]:
    """Read what dump_state wrote.

    Raises:
        CheckpointError: it holds something else; nothing in it is ever executed.
    """
    try:
        return torch.load(io.BytesIO(payload), weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{source} holds no readable state ({error}).") from None
