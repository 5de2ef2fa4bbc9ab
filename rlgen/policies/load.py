"""Policies from and to weight files.

Owns the choice of the architecture by what the file says of itself.
"""

from dataclasses import asdict

import torch

from rlgen.errors import CheckpointError
from rlgen.nn.weights import load_state, read_weights, weight_bytes
from rlgen.policies.llamagen import LlamaGen, LlamaGenConfig
from rlgen.storage import write_bytes

LLAMAGEN = "llamagen"


def load_policy(location: str, *, device: torch.device) -> LlamaGen:
    """Build the policy that a weight file describes and load it.

    Args:
        location: path or fsspec URL of a safetensors file that rlgen wrote.
        device: where to put it.
    Raises:
        CheckpointError: unreadable, of another kind, or tensors that do not fit.
    """
    fields, state = read_weights(location, kind=LLAMAGEN)
    try:
        config = LlamaGenConfig(**fields)
    except TypeError as error:
        raise CheckpointError(
            f"{location} describes a policy that this version can't build ({error}); write it "
            "again with this version's pretrain job."
        ) from None
    policy = LlamaGen(config)
    load_state(policy, state, location)
    return policy.to(device)


def save_policy(location: str, policy: LlamaGen) -> None:
    """Write a policy with its architecture."""
    write_bytes(location, policy_bytes(policy))


def policy_bytes(policy: LlamaGen) -> bytes:
    """The bytes of the weight file that `load_policy` reads."""
    return weight_bytes(policy, kind=LLAMAGEN, config=asdict(policy.config))
